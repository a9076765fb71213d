"""Training as it is seen: notes, the curve, saved states, interrupts. Imported only by running verbs."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from types import FrameType, TracebackType
from typing import Any, Self

from cli.console import Console, RunFailure, format_count
from cli.training_job import Job, Lesson
from compress.recover.loop import Diverged, StepReport, Trainer, measure_loss
from compress.recover.state import Curve, find_state, load_state, save_state

NOTE_SECONDS = 5.0

class Stopper(AbstractContextManager["Stopper"]):
    """Turns the first interrupt into a wish, so that no step is left half done; the second one stops at once."""

    def __init__(self, console: Console) -> None:
        self.asked = False
        self._console = console
        self._held: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._held[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._held.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._console.note("Stopping after this step.")


class Meter:
    """Notes on how training goes, every few seconds."""

    def __init__(self, job: Job, done: int, console: Console) -> None:
        self._steps, self._first, self._console = job.steps, done, console
        self._tokens = job.batch_tokens * job.options.accumulate
        self._started = self._noted = time.monotonic()
        self.rate = 0.0

    def report(self, report: StepReport, running: float, heldout: float | None) -> None:
        """Say step, loss, tokens per second and the time left."""
        now = time.monotonic()
        each = (now - self._started) / (report.step - self._first)
        self.rate = self._tokens / each
        if heldout is None and now - self._noted < NOTE_SECONDS and report.step < self._steps:
            return
        self._noted = now
        held = "" if heldout is None else f", held-out loss {heldout:.4f}"
        self._console.note(
            f"step {report.step} of {self._steps}: loss {running:.4g}{held}, {format_count(self.rate)} tokens/s, "
            f"about {each * (self._steps - report.step):.0f} s left"
        )


def resume_run(job: Job, trainer: Trainer, console: Console) -> None:
    """Put the trainer where the last saved state stood."""
    state = find_state(job.work) if job.asked["resume"] else None
    if state is not None:
        load_state(state, trainer)
        console.note(f"Resuming after step {trainer.history.step} of {job.steps}.")
    elif job.asked["resume"]:
        console.note("No step was saved yet: training starts from the beginning.")


def advise_resume() -> str:
    """Return how a stopped run goes on."""
    return "give the same command with --resume to go on"


def train_lesson(
    job: Job, lesson: Lesson, trainer: Trainer, steps: Iterator[StepReport], console: Console
) -> None:
    """Take the steps to a lesson's end, saving on the way and there; RunFailure for a run that diverges."""
    try:
        with Stopper(console) as stopper:
            own = islice(steps, lesson.last - trainer.history.step)
            for report in log_steps(job, trainer, own, console):
                (stop,) = trainer.group.any(stopper.asked)  # a signal may reach one process a step before another
                if stop and report.step < job.steps:
                    save_state(job.work, trainer)
                    raise KeyboardInterrupt(
                        f"stopped after step {report.step} of {job.steps}, saved in {job.work}: {advise_resume()}"
                    )
        save_state(job.work, trainer)  # what follows may fail, or be stopped
    except Diverged as error:
        raise RunFailure(explain_divergence(job, error)) from error


def log_steps(
    job: Job, trainer: Trainer, reports: Iterator[StepReport], console: Console
) -> Iterator[StepReport]:
    """Pass the steps through: each into the curve, some with a held-out loss, some saved."""
    first, meter = trainer.group.first, Meter(job, trainer.history.step, console)
    curve = Curve(job.work, trainer.history.step) if first else None
    saved = time.monotonic()
    for report in reports:
        due = report.step % job.asked["eval_steps"] == 0 and report.step < job.steps
        heldout = evaluate(job, trainer) if due else None
        if curve is not None:
            curve.add(report, heldout)
        meter.report(report, trainer.history.running, heldout)
        every = job.asked["save_steps"]
        wanted = time.monotonic() - saved >= 60 * job.asked["save_minutes"] or (every and report.step % every == 0)
        (agreed,) = trainer.group.any(first and bool(wanted))  # by the first process's clock
        if agreed and not trainer.history.rising:
            save_state(job.work, trainer)
            saved = time.monotonic()
        yield report


def explain_divergence(job: Job, error: Diverged) -> str:
    """Return what happened and what is left of the run."""
    state = find_state(job.work)
    left = (
        f"nothing was saved before; delete {job.work} and start again with a lower --lr" if state is None
        else f"the last good state is {state}: --resume with a lower --lr goes on from there"
    )  # fmt: skip
    return f"Training diverged at step {error.step} ({error.reason}); {left} (it was {job.options.rate:.2g})."


def evaluate(job: Job, trainer: Trainer) -> float | None:
    """Return the held-out loss in nats per token, or None without a text for it."""
    return measure_loss(trainer.student, job.heldout, job.options.bf16) if job.heldout else None
