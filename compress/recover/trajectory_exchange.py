"""Chosen documents exchanged for others while what they train comes nearer to what all documents train.

    apprentice   a run of the experts' optimiser from their start on the chosen documents alone, again and again
    lag          the lower of its mean losses, half-way and at the end, on real documents that it does not train on
    exchange     one to three documents leave, others that fit the budget come; kept where the lag falls

Inner products of gradients at two states (trajectory_rows.py) say where a few steps lead, not what dozens of steps
on the same documents, again and again, end with. So whole trajectories are run, which for a small proxy takes seconds.
They are compared by the loss on real text: it foretells the loss on held-out text better than the distance of the
parameters does (benchmarks/RESULTS.md). The lower of two states is taken, since the rate and the number of steps of
the training to come are not known. All documents come up before one does again, and the rate falls to nothing: with
documents drawn anew for each step at one rate, as the experts have them, two runs on the same documents differ by five
times as much, and exchanges follow that noise. This stage is ours; the method's text was not available (methods
section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.recover.data import Document
from compress.recover.functional import Model, embed_tokens, run_layers, stack_documents, sum_losses
from compress.recover.trajectory import Report, Theta, TrajectoryOptions, apply_theta, follow_batches

ROWS = 32  # documents that are measured at once
MOST = 3  # documents that leave at once


@dataclass(frozen=True)
class Exchanged:
    """What is chosen in the end; how many exchanges were kept; the lag before and after (None: no trial was made)."""

    taken: tuple[int, ...]
    kept: int = 0
    first: float | None = None
    last: float | None = None


@dataclass(frozen=True)
class Apprentice:
    """What all apprentices have in common: `tests` are the numbers of the documents that they are measured on."""

    model: Model
    documents: Sequence[Document]
    tests: tuple[int, ...]
    options: TrajectoryOptions

    def measure(self, taken: Sequence[int]) -> float:
        """Return the lag of some documents, in nats per token."""
        own = set(taken)
        chosen = [self.documents[number] for number in taken]
        unseen = [number for number in self.tests if number not in own] or list(self.tests)
        draws = draw_epochs(len(chosen), self.options)
        return min(
            self._measure_state(theta, unseen)
            for step, theta in enumerate(follow_batches(self.model, chosen, draws, self.options, falls=True))
            if step in (len(draws) // 2, len(draws))
        )

    @torch.no_grad()
    def _measure_state(self, theta: Theta, numbers: Sequence[int]) -> float:
        """Return the mean loss of documents under some parameters, in nats per counted token."""
        total, weight, layers = 0.0, 0.0, apply_theta(self.model, theta, self.options)
        for start in range(0, len(numbers), ROWS):
            ids, weights = stack_documents([self.documents[number] for number in numbers[start : start + ROWS]])
            x = embed_tokens(self.model, ids)
            losses = sum_losses(self.model, run_layers(self.model, x, layers), ids, weights.to(x.dtype))
            total += float(losses.sum(dtype=torch.float64))
            weight += float(weights[:, 1:].sum())
        return total / weight


def exchange_rows(
    model: Model, documents: Sequence[Document], taken: Sequence[int], options: TrajectoryOptions, budget: float,
    report: Report | None = None,
) -> Exchanged:  # fmt: skip
    """Return documents that train better than those `taken`, of at most `budget` tokens, or as many as theirs."""
    if not options.exchanges:
        return Exchanged(tuple(taken))
    random = torch.Generator().manual_seed(options.seed)
    sizes = [len(one.ids) for one in documents]
    budget = max(budget, sum(sizes[number] for number in taken))
    order = sorted(range(len(documents)), key=sizes.__getitem__)  # documents of one length are measured together
    drawn = set(torch.randperm(len(documents), generator=random)[: options.tests].tolist())
    apprentice = Apprentice(model, documents, tuple(number for number in order if number in drawn), options)
    chosen, kept = tuple(taken), 0
    first = best = apprentice.measure(chosen)
    for trial in range(options.exchanges):
        other = draw_exchange(chosen, sizes, budget, random)
        lag = apprentice.measure(other)
        if lag < best:
            chosen, best, kept = other, lag, kept + 1
        if report is not None:
            report("exchange documents", trial + 1, options.exchanges)
    return Exchanged(chosen, kept, first, best)


def draw_exchange(
    taken: Sequence[int], sizes: Sequence[int], budget: float, random: torch.Generator
) -> tuple[int, ...]:
    """Return `taken` without one to three of its documents, filled up to the budget with others at random."""
    gone = int(torch.randint(1, MOST + 1, (1,), generator=random))
    left = [taken[place] for place in draw_order(len(taken), random)[gone:]]
    room, here = budget - sum(sizes[number] for number in left), set(left)
    for number in draw_order(len(sizes), random):
        if number not in here and sizes[number] <= room:
            left.append(number)
            room -= sizes[number]
    return tuple(left) or tuple(taken)


def draw_epochs(count: int, options: TrajectoryOptions) -> list[list[int]]:
    """Return the documents of each step, of `count`: all come up before one does again."""
    random = torch.Generator().manual_seed(options.seed)
    size, steps = min(options.batch, count), options.expert_steps
    order = [number for _ in range(-(-steps * size // count)) for number in draw_order(count, random)]
    return [order[step * size : (step + 1) * size] for step in range(steps)]


def draw_order(count: int, random: torch.Generator) -> list[int]:
    """Return the numbers below `count` in a random order."""
    order: Tensor = torch.randperm(count, generator=random)
    return [int(number) for number in order]
