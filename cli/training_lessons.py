"""The lessons of a run: on the text, then on what the student answers. Imported only by running verbs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cli.console import Console, format_bytes, format_count
from cli.estimate import free_memory
from cli.training_job import HELDOUT_BATCHES, Job, Lesson
from cli.training_watch import advise_resume
from compress.checkpoint_writer import check_space
from compress.hidden import release_memory
from compress.parallel import Group
from compress.recover.data import Batch
from compress.recover.loop import Trainer
from compress.recover.model import Frozen
from compress.recover.rollout import (
    Rollouts,
    RolloutStream,
    Writer,
    close_round,
    draw_prompts,
    fill_round,
    hash_student,
    measure_frozen,
    open_round,
    read_rollouts,
    read_round,
)
from compress.recover.sampler import view_student
from compress.recover.teacher import (
    CachedTeacher,
    Guide,
    NoTeacher,
    OnlineTeacher,
    Plan,
    Teaching,
    fill_cache,
    list_missing,
    open_cache,
    plan_cache,
)

RESIDENT_SHARE = 0.4  # of the free memory that a teacher may take


@dataclass(frozen=True)
class Material:
    """What a lesson is on: its batches from number `start` on, hashes of them, and the folder of their scores."""

    lesson: Lesson
    batches: Callable[[int], Iterator[Batch]]
    key: Mapping[str, str]
    scores: Path


@dataclass(frozen=True)
class LessonTeacher:
    """The scores of one lesson, for batches that are counted from the start of the run."""

    teaching: CachedTeacher
    first: int

    def guide(self, number: int, batch: Batch) -> Guide:
        """Return what the teacher says of batch `number` of the run."""
        return self.teaching.guide(number - self.first, batch)


def open_lesson(job: Job, lesson: Lesson, trainer: Trainer, console: Console) -> tuple[Iterator[Batch], Teaching]:
    """Return a lesson's batches from where the trainer stands, and its targets; a round's answers are written here."""
    material = answer_round(job, lesson, trainer, console) if lesson.round else take_text(job)
    if lesson.round and trainer.history.step == lesson.first:
        judge_round(job, material, trainer.group, console)
    teaching = make_teaching(job, material, console, trainer.group)
    return material.batches(trainer.history.batches - job.count_batches(lesson.first)), teaching


# What lessons are on


def take_text(job: Job) -> Material:
    """Return the first lesson's material; its key is of the tokens, in which a chat template may have put the date."""
    order = hashlib.sha256(json.dumps(job.order).encode()).hexdigest()
    key = {"tokens": job.stream.digest, "order": order}
    return Material(job.lessons[0], job.batches, key, Path(job.asked["cache"] or job.work / "scores"))


def answer_round(job: Job, lesson: Lesson, trainer: Trainer, console: Console) -> Material:
    """Return a round's material: what the student answers now, or answered when the round began."""
    folder = find_round(job, lesson)
    rollouts = (
        read_rollouts(folder) if trainer.history.step > lesson.first
        else write_answers(job, lesson, trainer, console)
    )  # fmt: skip
    stream = RolloutStream(folder, rollouts, replace(job.stream.options, seed=job.asked["seed"] + lesson.round))
    data = hashlib.sha256()
    for part in (rollouts.ids, rollouts.sizes, rollouts.prompts):
        data.update(part.tobytes())
    return Material(lesson, stream.batches, {"data": data.hexdigest()}, folder / "scores")


def find_round(job: Job, lesson: Lesson) -> Path:
    """Return a round's folder."""
    return job.work / f"round-{lesson.round:02d}"


def write_answers(job: Job, lesson: Lesson, trainer: Trainer, console: Console) -> Rollouts:
    """Let the student answer the round's prompts; what a stopped run had of it is used."""
    folder, options, group = find_round(job, lesson), job.rollout_options(lesson), trainer.group
    started, key = time.perf_counter(), hash_student(trainer.student)
    if group.first:
        open_round(folder, key)
    group.wait()
    console.note(
        f"Round {lesson.round} of {job.lessons[-1].round}: the student answers prompts, up to "
        f"{format_count(options.tokens)} tokens with them."
    )
    prompts = draw_prompts(job.stream, job.prompters(), options)
    try:
        writer = Writer(view_student(trainer.student), console.progress, group)
        found = fill_round(folder, writer, prompts, options)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped while the student answered; {folder} keeps what is done: {advise_resume()}"
        ) from stop
    del writer
    release_memory()
    facts = {"round": lesson.round, "first_step": lesson.first, "steps": lesson.steps}
    if group.first:
        close_round(folder, {**facts, **found.describe(options.sample.stop), "seconds": time.perf_counter() - started})
    group.wait()
    return found


def judge_round(job: Job, material: Material, group: Group, console: Console) -> None:
    """Measure the teacher's loss on a round's first batches, note it down (the first process) and tell of it."""
    assert job.teacher is not None
    folder, lesson = find_round(job, material.lesson), material.lesson
    count = min(HELDOUT_BATCHES, job.count_batches(lesson.steps))
    loss = measure_frozen(Frozen(*job.teacher), islice(material.batches(0), count))
    facts = {**read_round(folder), "teacher_loss": loss}
    release_memory()
    if group.first:
        close_round(folder, facts)
    console.note(render_round(facts))


def list_rounds(job: Job) -> list[dict[str, Any]]:
    """Return what is told of all rounds of a run that is over."""
    return [read_round(find_round(job, lesson)) for lesson in job.lessons if lesson.round]


def render_round(facts: dict[str, Any]) -> str:
    """Return what is told of a round as one sentence."""
    return (
        f"Round {facts['round']}: {facts['prompts']} answers of {facts['mean_tokens']:.3g} tokens, "
        f"{100 * facts['ended']:.0f} % with an end; the teacher's loss on them is {facts['teacher_loss']:.4g}."
    )


# Who teaches


def make_teaching(job: Job, material: Material, console: Console, group: Group) -> Teaching:
    """Return where targets come from; offline, all scores are on disk when this returns and the teacher is gone."""
    if job.teacher is None:
        return NoTeacher()
    if job.asked["offline"]:
        cached = CachedTeacher(material.scores, score_material(job, material, console, group))
        return LessonTeacher(cached, job.count_batches(material.lesson.first))
    checkpoint, spec = job.teacher
    free = free_memory()
    resident = free is None or 4 * spec.shape.parameters * group.local < RESIDENT_SHARE * free
    if not resident:
        console.warn("the teacher is too large for memory and read again for each batch; --offline is quicker.")
    model = Frozen(checkpoint, spec, resident, device=group.device)
    return OnlineTeacher(model, [other for _, other in job.objective.matches])


def score_material(job: Job, material: Material, console: Console, group: Group) -> Plan:
    """Let the teacher score what no finished file holds yet, each process its share; return the plan of the scores."""
    assert job.teacher is not None
    plan, folder = plan_scores(job, material), material.scores
    if group.first:
        open_cache(folder, plan)
    missing = group.tell(list_missing(folder, plan))
    if missing:
        batches = min(len(missing) * plan.per_shard, plan.batches)
        size = plan.form.record.itemsize * batches * job.batch_tokens
        check_space(folder, size)
        console.note(f"Scoring with the teacher: the top {plan.form.k} of each token, at most {format_bytes(size)}.")
        try:
            model = Frozen(*job.teacher, device=group.device)
            fill_cache(folder, plan, model, material.batches, console.progress, group)
            del model
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped while scoring; {folder} keeps what is done: {advise_resume()}") from stop
        release_memory()
    return plan


def plan_scores(job: Job, material: Material) -> Plan:
    """Return the plan of the teacher's scores."""
    assert job.teacher is not None
    key = {"teacher": json.dumps(job.settings["teacher_files"], sort_keys=True), **material.key}
    batches = job.count_batches(material.lesson.steps)
    return plan_cache(key, job.teacher[1].shape.vocab, batches, job.batch_tokens)
