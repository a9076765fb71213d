"""Mergeable moments: sums over tokens from which scores, damage curves and repairs follow exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.parallel import Group

# Rows of one float32 product; sums across products are float64, so that rounding does not grow with the text.
CHUNK = 2048


@dataclass
class Moments:
    """Float64 Gram matrix `[n, n]`, sums `[n]` and count of inputs x, cross products `[n, m]` with targets y."""

    gram: Tensor
    total: Tensor
    cross: Tensor
    target_total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, inputs: int, targets: int = 0) -> Moments:
        """Start with no tokens."""
        zeros = torch.zeros
        exact = torch.float64
        return cls(
            zeros(inputs, inputs, dtype=exact), zeros(inputs, dtype=exact),
            zeros(inputs, targets, dtype=exact), zeros(targets, dtype=exact),
        )  # fmt: skip

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add tokens: `x` `[tokens, n]`, optionally targets `y` `[tokens, m]`."""
        for start in range(0, len(x), CHUNK):
            rows = x[start : start + CHUNK]
            add_gram(self.gram, rows)
            self.total += rows.sum(0)
            self.count += len(rows)
            if y is not None:
                wanted = y[start : start + CHUNK]
                self.cross += rows.T @ wanted
                self.target_total += wanted.sum(0)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both token sets together."""
        return Moments(
            self.gram + other.gram, self.total + other.total, self.cross + other.cross,
            self.target_total + other.target_total, self.count + other.count,
        )  # fmt: skip

    def reduce(self, group: Group) -> None:
        """Become the moments of all processes' tokens."""
        group.add((self.gram, self.total, self.cross, self.target_total))
        self.count = int(group.total(self.count)[0])


def add_gram(gram: Tensor, rows: Tensor, block: int = 256) -> None:
    """Add rows^T rows to `gram` in place, computing only the upper blocks; the rest is copied from them."""
    size = rows.shape[1]
    for start in range(0, size, block):
        stop = min(start + block, size)
        gram[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]
        gram[stop:, start:stop] = gram[start:stop, stop:].T


@dataclass
class ChannelSums:
    """Per-channel sums over tokens of |x| and x^2, `[n]` in float64 (importance of hidden channels)."""

    absolute: Tensor
    square: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int) -> ChannelSums:
        """Start with no tokens."""
        return cls(torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Add tokens `[tokens, n]`."""
        self.absolute += x.abs().sum(0, dtype=torch.float64)
        self.square += x.pow(2).sum(0, dtype=torch.float64)
        self.count += len(x)

    def merge(self, other: ChannelSums) -> ChannelSums:
        """Return the sums of both token sets together."""
        return ChannelSums(self.absolute + other.absolute, self.square + other.square, self.count + other.count)

    def reduce(self, group: Group) -> None:
        """Become the sums of all processes' tokens."""
        group.add((self.absolute, self.square))
        self.count = int(group.total(self.count)[0])


@dataclass
class BlockSums:
    """What a block does to the stream: sums of cosine(in, out), |out|^2 and |out - in|^2 over tokens."""

    cosine: float = 0.0
    square_out: float = 0.0
    change: float = 0.0
    count: int = 0

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add tokens `[tokens, hidden]` before and after the block."""
        self.cosine += float(torch.cosine_similarity(before, after, dim=-1).sum(dtype=torch.float64))
        self.square_out += float(after.pow(2).sum(dtype=torch.float64))
        self.change += float((after - before).pow(2).sum(dtype=torch.float64))
        self.count += len(before)

    def merge(self, other: BlockSums) -> BlockSums:
        """Return the sums of both token sets together."""
        return BlockSums(
            self.cosine + other.cosine, self.square_out + other.square_out, self.change + other.change,
            self.count + other.count,
        )  # fmt: skip

    def reduce(self, group: Group) -> None:
        """Become the sums of all processes' tokens."""
        self.cosine, self.square_out, self.change = group.total(self.cosine, self.square_out, self.change)
        self.count = int(group.total(self.count)[0])

    @property
    def influence(self) -> float:
        """Block influence: 1 - mean cosine of the stream before and after (ShortGPT; methods 8.2)."""
        return 1.0 - self.cosine / max(self.count, 1)


SINK_RATIO = 100.0
# Finding a median is slow; only tokens with a spike this far above their mean can be sinks, and few tokens have one.
SPIKE_RATIO = 8.0


def ordinary_tokens(x: Tensor, skip_first: bool = True) -> tuple[Tensor, int]:
    """Return a mask `[batch, sequence]` of tokens that statistics count, and how many sinks were left out.

    The first token and tokens with max |x| / median |x| above 100 are attention sinks (arXiv 2410.13835;
    methods 7.4): they would dominate every sum.
    """
    peak = torch.linalg.vector_norm(x, float("inf"), -1)
    sinks = peak > SPIKE_RATIO / x.shape[-1] * torch.linalg.vector_norm(x, 1, -1)
    spiked = x[sinks].abs()
    sinks[sinks.clone()] = spiked.amax(-1) > SINK_RATIO * spiked.median(-1).values
    mask = ~sinks
    if skip_first and x.shape[1] > 1:
        mask[:, 0] = False
        sinks = sinks[:, 1:]
    return mask, int(sinks.sum())
