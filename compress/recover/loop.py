"""The one training loop: gradients of a few batches, clipped, into AdamW, at a rate that a schedule gives.

It prints nothing and writes nothing: `train` yields a report after each step, and its caller logs, evaluates, saves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.recover.losses import Objective, count_piece, differentiate_rows, match_error, score_tokens, widen
from compress.recover.model import Student
from compress.recover.optimizer import AdamOptions, AdamW, Average
from compress.recover.schedule import Schedule, rate_factor
from compress.recover.teacher import Guide, Teaching, select_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.recover.data import Batch

SMOOTH = 0.9  # of the running mean of the loss
SETTLE = 10  # steps whose mean loss is the level that a diverging run is held against
RISE, MARGIN = 2.0, 1.0  # a run has diverged when its running mean is above RISE times that level plus MARGIN nats


class Diverged(Exception):
    """Training that came to nothing: the step and why; the weights in memory are not to be kept."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


@dataclass(frozen=True)
class LoopOptions:
    """How to train: highest `rate`, batches in one step, clip of the gradient's norm (0: none), EMA (0: none), bf16."""

    rate: float
    schedule: Schedule
    accumulate: int = 1
    clip: float = 1.0
    average: float = 0.0
    bf16: bool = False
    adam: AdamOptions = AdamOptions()


@dataclass
class History:
    """What the run has been like, saved with it: steps, tokens and batches used, level and running mean of the loss."""

    step: int = 0
    batches: int = 0
    tokens: int = 0
    level: float = 0.0
    running: float = 0.0

    @property
    def rising(self) -> bool:
        """True half-way to divergence, where the last state saved is the better one to go back to."""
        return self.running > (1 + RISE) / 2 * self.level + MARGIN / 2


@dataclass(frozen=True)
class StepReport:
    """One finished step: loss in nats for each counted token, the gradient's norm before the clip, rate, seconds."""

    step: int
    loss: float
    norm: float
    rate: float
    tokens: int
    seconds: float


@dataclass
class Trainer:
    """Everything that a step changes, and what it needs; `history.batches` is the place in the data."""

    student: Student
    objective: Objective
    options: LoopOptions
    history: History = field(default_factory=History)
    optimizer: AdamW = field(init=False)
    average: Average | None = field(init=False)

    def __post_init__(self) -> None:
        """Make the optimiser's state."""
        trained = self.student.trained()
        self.optimizer = AdamW(trained, self.options.adam)
        self.average = Average(trained, self.options.average) if self.options.average else None


def train(trainer: Trainer, teaching: Teaching, batches: Iterator[Batch]) -> Iterator[StepReport]:
    """Train to the end of the schedule from where the trainer stands; `batches` starts at `history.batches`.

    Raises Diverged for a loss or gradient that is not finite (the step is not taken), and for a loss that has risen
    far above its start.
    """
    history, options = trainer.history, trainer.options
    while history.step < options.schedule.steps:
        started = time.perf_counter()
        loss, tokens = add_gradients(trainer, teaching, batches)
        norm = clip_gradients(trainer)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss:g}" if not math.isfinite(loss) else f"the gradient's norm is {norm:g}"
            raise Diverged(history.step + 1, what)
        rate = options.rate * rate_factor(options.schedule, history.step)
        trainer.optimizer.step(rate)
        trainer.optimizer.clear_gradients()
        if trainer.average is not None:
            trainer.average.update(trainer.optimizer.parameters)
        history.step += 1
        history.tokens += tokens
        watch_loss(history, loss)
        yield StepReport(history.step, loss, norm, rate, history.tokens, time.perf_counter() - started)


def add_gradients(trainer: Trainer, teaching: Teaching, batches: Iterator[Batch]) -> tuple[float, int]:
    """Back-propagate the batches of one step; return its mean loss and how many tokens they hold.

    Gradients are those of the sum over all batches over the sum of all weights: one large batch gives the same.
    """
    total, weight, tokens = 0.0, 0.0, 0
    for _ in range(trainer.options.accumulate):
        batch = next(batches)
        total += add_batch(trainer, batch, teaching.guide(trainer.history.batches, batch))
        weight += float(batch.weights[:, 1:].sum(dtype=torch.float64))
        tokens += batch.ids.numel()
        trainer.history.batches += 1
    weight = weight or 1.0  # a step in which nothing counts has no gradient
    with torch.no_grad():
        for tensor in trainer.optimizer.parameters.values():
            if tensor.grad is not None:
                tensor.grad.div_(weight)
    return total / weight, tokens


def add_batch(trainer: Trainer, batch: Batch, guide: Guide) -> float:
    """Add one batch's gradients to the parameters'; return its summed loss."""
    student, objective, rows = trainer.student, trainer.objective, select_rows(batch)
    if not len(rows.labels):
        return 0.0
    with torch.enable_grad(), cast_if(trainer.options.bf16):
        stream, tapped = student(batch.ids, batch.documents, [own for own, _ in objective.matches])
        chosen = rows.pick(stream)

        def score(logits: Tensor, span: slice) -> Tensor:
            return score_tokens(objective, logits, rows.labels[span], rows.weights[span], guide.target(span))

        # First the head, piece by piece, then everything below it from the gradient by its input.
        loss, gradient = differentiate_rows(student.logits, chosen, score, count_piece(student.spec.shape.vocab))
        outputs, gradients = [chosen], [gradient]
        for own, other in objective.matches:
            error = objective.match_weight * match_error(rows.pick(tapped[own]), guide.hidden[other], rows.weights)
            loss += float(error.detach())
            outputs.append(error)
            gradients.append(torch.ones_like(error))
    torch.autograd.backward(outputs, gradients)
    return loss


def cast_if(bf16: bool) -> AbstractContextManager[object]:
    """Return the block in which matrix products run in bfloat16; the masters and sums stay as they are."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def clip_gradients(trainer: Trainer) -> float:
    """Scale all gradients down to a joint norm of `clip`; return the norm before."""
    limit = trainer.options.clip or math.inf
    return float(torch.nn.utils.clip_grad_norm_(trainer.optimizer.parameters.values(), limit))


def watch_loss(history: History, loss: float) -> None:
    """Add a step's loss to the running mean; raises Diverged where that is far above the level of the first steps."""
    if history.step <= SETTLE:
        history.level += (loss - history.level) / history.step
        history.running = history.level
        return
    history.running = SMOOTH * history.running + (1 - SMOOTH) * loss
    if history.running > RISE * history.level + MARGIN:
        raise Diverged(history.step, f"the loss rose from {history.level:.3g} to {history.running:.3g}")


@torch.no_grad()
def measure_loss(student: Student, batches: Iterable[Batch], bf16: bool = False) -> float:
    """Return the mean cross entropy in nats of the counted tokens of `batches`, whatever the objective."""
    step, total, weight = count_piece(student.spec.shape.vocab), 0.0, 0.0
    for batch in batches:
        rows = select_rows(batch)
        with cast_if(bf16):
            chosen = rows.pick(student(batch.ids, batch.documents)[0])
            for start in range(0, len(chosen), step):
                span = slice(start, start + step)
                losses = F.cross_entropy(widen(student.logits(chosen[span])), rows.labels[span], reduction="none")
                total += float((losses * rows.weights[span]).sum(dtype=torch.float64))
        weight += float(rows.weights.sum(dtype=torch.float64))
    return total / weight if weight else math.nan


def check_finite(trainer: Trainer) -> None:
    """Raise Diverged where a parameter is not finite, so that it is not saved."""
    for name, tensor in trainer.optimizer.parameters.items():
        low, high = tensor.detach().aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise Diverged(trainer.history.step, f"{name} is not finite")
