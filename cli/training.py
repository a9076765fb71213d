"""What `recover` does, from the checks to the proved output. Imported only by running verbs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cli.console import Console
from cli.curriculum import settle_order
from cli.measure import limit_threads
from cli.training_job import ACTIVATION_BYTES, Job, Lesson, describe_job, prepare
from cli.training_lessons import open_lesson, score_material, take_text
from cli.training_output import describe_run, show_result, write_student
from cli.training_watch import evaluate, resume_run, train_lesson
from compress.checkpoint_writer import remove_folder
from compress.errors import UserError
from compress.parallel import ALONE, Group
from compress.recover.loop import Trainer, train
from compress.recover.lora import LoraOptions
from compress.recover.model import Student, StudentOptions, estimate_activations
from compress.recover.state import open_work
from compress.report import make_plain


def run_recover(asked: Mapping[str, Any], console: Console, group: Group = ALONE) -> dict[str, Any]:
    """Check, train lesson by lesson, write and prove; returns what the manifest says of the run.

    In a group all processes train, and the first one writes.

    Raises UserError before anything is written, RunFailure for a run that diverged, KeyboardInterrupt (which says how
    to resume) when asked to stop.
    """
    limit_threads(asked["threads"])
    started = time.perf_counter()
    job = prepare(asked, console, group)
    describe_job(job, console)
    if group.first:
        open_work(job.work, job.settings, asked["resume"])
    group.wait()
    with forget_refused(job, group):
        job = replace(job, order=group.tell(settle_order(job, console) if group.first else None))
        if asked["offline"] and not job.lessons[0].round:  # before the student takes its memory
            score_material(job, take_text(job), console, group)
    trainer = make_trainer(job, group)
    before = evaluate(job, trainer)
    resume_run(job, trainer, console)
    train_all(job, trainer, console)
    if trainer.average is not None:
        trainer.average.swap(trainer.optimizer.parameters)
    after = evaluate(job, trainer)
    facts = describe_run(job, trainer, (before, after), time.perf_counter() - started)
    proofs = write_student(job, trainer.student, facts, console)
    if not group.first:
        return facts
    remove_folder(job.work)
    return show_result(job, {**facts, "proofs": make_plain(proofs)}, proofs, console)


@contextmanager
def forget_refused(job: Job, group: Group) -> Iterator[None]:
    """Remove the folder of a new run that is refused before its first step: a corrected command starts anew."""
    try:
        yield
    except UserError:
        if group.first and not job.asked["resume"]:
            remove_folder(job.work)
        raise


def train_all(job: Job, trainer: Trainer, console: Console) -> None:
    """Train what the trainer still has to learn, one lesson after the other."""
    for lesson in job.lessons:
        if trainer.history.step < lesson.last:
            take_lesson(job, lesson, trainer, console)


def take_lesson(job: Job, lesson: Lesson, trainer: Trainer, console: Console) -> None:
    """Open a lesson and train to its end; its teacher is gone when this returns."""
    batches, teaching = open_lesson(job, lesson, trainer, console)
    train_lesson(job, lesson, trainer, train(trainer, teaching, batches), console)


def make_trainer(job: Job, group: Group) -> Trainer:
    """Load the student; each process of a group keeps its part."""
    checkpoint, spec = job.student
    again = job.asked["checkpointing"]
    if again is None:
        again = estimate_activations(spec, job.batch_tokens // group.size) > ACTIVATION_BYTES
        # Whole copies of merged or rounded matrices would wait for the backward pass: nothing would be shared.
        again = again or (group.size > 1 and bool(job.asked["lora"] or job.asked["bf16"]))
    lora = LoraOptions(job.asked["lora"], seed=job.asked["seed"]) if job.asked["lora"] else None
    options = StudentOptions(lora, again, group=group)
    return Trainer(Student(checkpoint, spec, options), job.objective, job.options)
