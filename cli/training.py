"""What `recover` does, from the checks to the proved output. Imported only by running verbs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli.console import Console, format_bytes
from cli.estimate import free_memory
from cli.measure import limit_threads
from cli.training_job import ACTIVATION_BYTES, Job, describe_job, prepare
from cli.training_output import describe_run, show_result, write_student
from cli.training_watch import advise_resume, evaluate, resume_run, train_all
from compress.checkpoint_writer import check_space
from compress.hidden import release_memory
from compress.recover.loop import Trainer
from compress.recover.lora import LoraOptions
from compress.recover.model import Frozen, Student, StudentOptions, estimate_activations
from compress.recover.state import open_work
from compress.recover.teacher import (
    CachedTeacher,
    NoTeacher,
    OnlineTeacher,
    Plan,
    Teaching,
    fill_cache,
    list_missing,
    open_cache,
    plan_cache,
)
from compress.report import make_plain

RESIDENT_SHARE = 0.4  # of the free memory that a teacher may take

def run_recover(asked: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Check, score or load the teacher, train, write and prove; returns what the manifest says of the run.

    Raises UserError before anything is written, RunFailure for a run that diverged, KeyboardInterrupt (which says how
    to resume) when asked to stop.
    """
    limit_threads(asked["threads"])
    started = time.perf_counter()
    job = prepare(asked, console)
    describe_job(job, console)
    open_work(job.work, job.settings, asked["resume"])
    teaching = make_teaching(job, console)
    trainer = make_trainer(job)
    before = evaluate(job, trainer)
    resume_run(job, trainer, console)
    train_all(job, trainer, teaching, console)
    if trainer.average is not None:
        trainer.average.swap(trainer.optimizer.parameters)
    after = evaluate(job, trainer)
    facts = describe_run(job, trainer, (before, after), time.perf_counter() - started)
    proofs = write_student(job, trainer.student, facts, console)
    shutil.rmtree(job.work, ignore_errors=True)
    return show_result(job, {**facts, "proofs": make_plain(proofs)}, proofs, console)


# Teacher and student


def make_teaching(job: Job, console: Console) -> Teaching:
    """Return where targets come from; offline, all scores are on disk when this returns and the teacher is gone."""
    if job.teacher is None:
        return NoTeacher()
    checkpoint, spec = job.teacher
    if not job.asked["offline"]:
        free = free_memory()
        resident = free is None or 4 * spec.shape.parameters < RESIDENT_SHARE * free
        if not resident:
            console.warn("the teacher is too large for memory and read again for each batch; --offline is quicker.")
        return OnlineTeacher(Frozen(checkpoint, spec, resident), [other for _, other in job.objective.matches])
    plan, folder = plan_scores(job), Path(job.asked["cache"] or job.work / "scores")
    size = plan.form.record.itemsize * job.steps * job.options.accumulate * job.batch_tokens
    check_space(folder, size)
    open_cache(folder, plan)
    if list_missing(folder, plan):
        console.note(f"Scoring with the teacher: the top {plan.form.k} of each token, at most {format_bytes(size)}.")
        try:
            fill_cache(folder, plan, Frozen(checkpoint, spec), job.batches, console.progress)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped while scoring; {folder} keeps what is done: {advise_resume()}") from stop
        release_memory()
    return CachedTeacher(folder, plan)


def plan_scores(job: Job) -> Plan:
    """Return the plan of the teacher's scores."""
    assert job.teacher is not None
    _, spec = job.teacher
    key = {"teacher": json.dumps(job.settings["teacher_files"], sort_keys=True), "data": job.settings["data"]}
    return plan_cache(key, spec.shape.vocab, job.steps * job.options.accumulate, job.batch_tokens)


def make_trainer(job: Job) -> Trainer:
    """Load the student."""
    checkpoint, spec = job.student
    again = job.asked["checkpointing"]
    if again is None:
        again = estimate_activations(spec, job.batch_tokens) > ACTIVATION_BYTES
    lora = LoraOptions(job.asked["lora"], seed=job.asked["seed"]) if job.asked["lora"] else None
    return Trainer(Student(checkpoint, spec, StudentOptions(lora, again)), job.objective, job.options)
