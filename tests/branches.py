"""Branches of random tokens for tests of scores: correlated inputs, means that are not zero, weights that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import slow_twins
import torch
from torch import Tensor

from compress.importance.branch import FFN, KV, Branch
from compress.stats import ChannelSums, Moments

HEADS = 2  # query heads that share one key/value head


@dataclass(frozen=True)
class Sample:
    """A branch and the tokens it was made from: `x` `[tokens, n]`, `read` `[tokens, hidden]`."""

    branch: Branch
    x: Tensor
    read: Tensor


def gather(x: Tensor) -> Moments:
    moments = Moments.empty(x.shape[1])
    moments.update(x)
    return moments


def draw_sample(kind: str, units: int, size: int, hidden: int = 6, tokens: int = 60, seed: int = 0) -> Sample:
    """Draw a branch; the tokens make three windows of unlike length."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    n = units * size
    x, read = draw(tokens, n) @ draw(n, n) + 0.3 * draw(n), draw(tokens, hidden) + 0.2
    weight = draw(hidden, n)
    if kind == KV:
        rows = units * size // HEADS
        weights = {"q": draw(n, hidden), "k": draw(rows, hidden), "v": draw(rows, hidden), "o": weight}
    else:
        weights = {"gate": draw(n, hidden), "up": draw(n, hidden), "down": weight}
    sums = ChannelSums.empty(hidden)
    sums.update(read)
    spread = torch.tensor(slow_twins.spread_windows(cut_windows(x)), dtype=torch.float64)
    slopes = draw(units).abs()
    return Sample(Branch(kind, 3, gather(x), weight, size, weights, sums, spread, seed, slopes), x, read)


def cut_windows(x: Tensor) -> list[Tensor]:
    third = len(x) // 3
    return [x[: third - 2], x[third - 2 : 2 * third], x[2 * third :]]


def with_tokens(sample: Sample, x: Tensor) -> Sample:
    """The same weights reading other inputs."""
    spread = torch.tensor(slow_twins.spread_windows(cut_windows(x)), dtype=torch.float64)
    return Sample(replace(sample.branch, moments=gather(x), spread=spread), x, sample.read)


KINDS = [(KV, 4), (FFN, 1)]
