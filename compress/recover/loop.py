"""The one training loop: gradients of a few batches, clipped, into AdamW, at a rate that a schedule gives.

It prints nothing and writes nothing: `train` yields a report after each step, and its caller logs, evaluates, saves.
A group of processes runs the same loop over the same batches, each on its rows; losses, norms and so all decisions are
those of the whole batch in every process.
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

from compress.parallel import Group
from compress.recover.losses import Objective, count_piece, differentiate_rows, match_error, score_tokens, widen
from compress.recover.model import Student
from compress.recover.optimizer import AdamOptions, AdamW, Average
from compress.recover.parallel import measure_norm, own_part
from compress.recover.parallel_data import ask_teacher, take_rows
from compress.recover.schedule import Schedule, rate_factor
from compress.recover.teacher import Guide, Teaching, select_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.recover.data import Batch

SMOOTH = 0.9  # of the running mean of the loss
SETTLE = 10  # steps whose mean loss is the level that a diverging run is held against
CLIP_FLOOR = 1e-6  # added to the norm, as torch's own clip does
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
    """What the run has been like, saved with it: steps, tokens and batches used, level and running mean of the loss.

    `rates`: (first step, highest rate) of each stretch, since a run may be resumed with another rate.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0
    level: float = 0.0
    running: float = 0.0
    rates: list[tuple[int, float]] = field(default_factory=list)

    def note_rate(self, rate: float) -> None:
        """Note that the next step is taken at another highest rate than those before it."""
        if not self.rates or self.rates[-1][1] != rate:
            self.rates.append((self.step + 1, rate))

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

    @property
    def group(self) -> Group:
        """The processes that train together."""
        return self.student.group


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
        history.note_rate(options.rate)
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
    total, weight, tokens, group = 0.0, 0.0, 0, trainer.group
    with trainer.student.open_ends():
        for _ in range(trainer.options.accumulate):
            batch = next(batches)
            guide = ask_teacher(teaching, trainer.history.batches, batch, group)
            total += add_batch(trainer, batch, guide)
            weight += float(batch.weights[:, 1:].sum(dtype=torch.float64))
            tokens += batch.ids.numel()
            trainer.history.batches += 1
    weight = weight or 1.0  # a step in which nothing counts has no gradient
    with torch.no_grad():
        for tensor in trainer.optimizer.parameters.values():
            if tensor.grad is not None:
                own_part(tensor.grad).div_(weight / group.size)  # of a group, it is the mean over the processes
    return group.total(total)[0] / weight, tokens


def add_batch(trainer: Trainer, batch: Batch, guide: Guide) -> float:
    """Add the gradients of this process's rows of a batch to the parameters'; return their summed loss."""
    if not bool((batch.weights[:, 1:] > 0).any()):
        return 0.0
    student, objective, own = trainer.student, trainer.objective, take_rows(batch, trainer.group)
    rows = select_rows(own)  # perhaps none: the process runs all the same, since the others wait for its sums
    with torch.enable_grad(), cast_if(trainer.options.bf16, trainer.group.device):
        stream, tapped = student(own.ids, own.documents, [layer for layer, _ in objective.matches])
        chosen = rows.pick(stream)

        def score(logits: Tensor, span: slice) -> Tensor:
            with keep_exact(trainer.group.device):
                return score_tokens(objective, logits, rows.labels[span], rows.weights[span], guide.target(span))

        # First the head, piece by piece, then everything below it from the gradient by its input.
        loss, gradient = differentiate_rows(student.logits, chosen, score, count_piece(student.spec.shape.vocab))
        outputs, gradients = [chosen], [gradient]
        for layer, other in objective.matches:
            pair = (rows.pick(tapped[layer]), guide.hidden[other])
            with keep_exact(trainer.group.device):
                error = objective.match_weight * match_error(*pair, rows.weights, trainer.group)
            loss += float(error.detach())
            outputs.append(error)
            gradients.append(torch.ones_like(error))
    torch.autograd.backward(outputs, gradients)
    return loss


def cast_if(bf16: bool, device: torch.device) -> AbstractContextManager[object]:
    """Return the block in which matrix products run in bfloat16; the masters and sums stay as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def keep_exact(device: torch.device) -> AbstractContextManager[object]:
    """Return the block in which losses are summed as they are: autocast would round their product with the weights."""
    return torch.autocast(device.type, enabled=False)


def clip_gradients(trainer: Trainer) -> float:
    """Scale all gradients down to a joint norm of `clip`; return the norm before."""
    limit, parameters = trainer.options.clip or math.inf, list(trainer.optimizer.parameters.values())
    if trainer.group.size == 1:
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    gradients = [one.grad for one in parameters if one.grad is not None]
    norm = measure_norm(gradients, trainer.group)
    for one in gradients:
        own_part(one).mul_(min(1.0, limit / (norm + CLIP_FLOOR)))
    return norm


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
    total, weight = 0.0, 0.0
    with student.open_ends():
        for batch in batches:
            own = take_rows(batch, student.group)
            with cast_if(bf16, student.group.device):
                total += sum_entropies(student, own)
            weight += float(select_rows(batch).weights.sum(dtype=torch.float64))
    return student.group.total(total)[0] / weight if weight else math.nan


def sum_entropies(student: Student, batch: Batch) -> float:
    """Return the weighted sum of the cross entropies of a batch's counted tokens."""
    step, total, rows = count_piece(student.spec.shape.vocab), 0.0, select_rows(batch)
    chosen = rows.pick(student(batch.ids, batch.documents)[0])
    for start in range(0, len(chosen), step):
        span = slice(start, start + step)
        losses = F.cross_entropy(widen(student.logits(chosen[span])), rows.labels[span], reduction="none")
        total += float((losses * rows.weights[span]).sum(dtype=torch.float64))
    return total


def check_finite(trainer: Trainer) -> None:
    """Raise Diverged, in every process, where a parameter is not finite, so that it is not saved."""
    parameters = {name: own_part(tensor.detach()) for name, tensor in trainer.optimizer.parameters.items()}
    bad = [tensor.numel() > 0 and not is_finite(tensor) for tensor in parameters.values()]
    for name, wrong in zip(parameters, trainer.group.any(*bad), strict=True):
        if wrong:
            raise Diverged(trainer.history.step, f"{name} is not finite")


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, without a copy."""
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
