"""What several compressed models beside the dense one mean: who is beaten by whom, where to stop, how sure it is.

Numbers in, numbers out: nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.choose import Prices
from compress.importance.findings import Findings
from compress.importance.units import Ranking
from compress.plan import LOSS_EXPONENT
from compress.report_frontier import DENSE, Answers, Interval, Point

LEAST_KEEP = 0.4  # the smallest model of a frontier that nobody asked for in numbers
RESAMPLES, CONFIDENCE = 2000, 0.95
GRAM = 4  # tokens of a piece of text that counts as said before
CURVE_ROWS = 9  # of a damage curve, which has one for every unit: a page holds two curves of every layer
MOST_LOSS = 700.0  # nats: exp of more is no float

Curves = dict[str, dict[str, tuple[tuple[float, float], ...]]]


# Which points, which of them to take


def spread_levels(count: int) -> tuple[float, ...]:
    """Return `count` keep levels below 1 at equal distances, down to 0.4."""
    return tuple(round(1 - (1 - LEAST_KEEP) * place / count, 4) for place in range(1, count + 1))


GAIN = 1.01  # times dense from which a point counts as faster


@dataclass(frozen=True)
class Standing:
    """Where one model stands on one device: higher `speed` is better, lower `loss` (nats per token) is."""

    name: str
    speed: float
    loss: float


def find_frontier(standings: Iterable[Standing]) -> tuple[Standing, ...]:
    """Return those that no other beats (as fast and as good, and better in one), the slowest and best first.

    Of models that are equal on both axes the first stays.
    """
    best: list[Standing] = []
    for one in sorted(standings, key=lambda own: (-own.speed, own.loss)):  # stable: equals keep their order
        if not best or one.loss < best[-1].loss:
            best.append(one)
    return tuple(reversed(best))


def find_knee(frontier: Sequence[Standing]) -> Standing | None:
    """Return the point of a frontier that lies furthest on the good side of the line between its ends.

    Both axes are scaled to 0 .. 1 first (Kneedle; Satopaa et al. 2011, section III, on the points themselves: few as
    they are, we fit no spline). None where fewer than three points, or none on that side, leave nothing to choose.
    """
    if len(frontier) < 3:  # noqa: PLR2004 (two are the ends of the line)
        return None
    first, last = frontier[0], frontier[-1]
    speed, loss = last.speed - first.speed, last.loss - first.loss
    gains = [(one.speed - first.speed) / speed - (one.loss - first.loss) / loss for one in frontier]
    place = max(range(len(gains)), key=gains.__getitem__)
    return frontier[place] if gains[place] > 0 else None


def answer_device(points: Sequence[Point], profile: str, loss: float, speedup: float) -> Answers:
    """Return what helps to choose among the points (dense first) on one device.

    `loss`: how far above dense the perplexity may be, as a share; `speedup`: least speed over dense. Only points of the
    frontier are named, dense only in the frontier itself.
    """
    dense = points[0].perplexity.value
    standings = [
        Standing(own.name, own.speeds[profile].speedup, math.log(own.perplexity.value))
        for own in points
        if profile in own.speeds
    ]
    frontier = find_frontier(standings)
    cut = [one for one in frontier if one.name != DENSE]
    near = [one for one in cut if one.speed >= GAIN and one.loss <= math.log(dense * (1 + loss))]
    fast = [one for one in cut if one.speed >= speedup]
    knee = find_knee(frontier)
    return Answers(
        tuple(one.name for one in frontier), knee.name if knee else None, near[-1].name if near else None,
        fast[0].name if fast else None, loss, speedup,
    )  # fmt: skip


# How sure a number is


@dataclass(frozen=True)
class TextScores:
    """What a model makes of a text, against dense: perplexity, its ratio to dense's, divergence (nats), agreement."""

    perplexity: Interval
    ratio: Interval
    divergence: Interval
    agreement: Interval


def score_windows(sums: Tensor, tokens: int, seed: int = 0) -> TextScores:
    """Return the scores of sums over windows `[windows, 4]`, as `compare_logits` orders them, of `tokens` tokens each.

    Intervals are 95 % percentile bootstrap intervals (Efron 1979) over windows, the same resamples for all scores;
    the ratio's are of the difference of both models' losses in each window.
    """
    means = sums.double() / tokens
    values = torch.cat([means[:, 1:], means[:, 1:2] - means[:, :1]], 1)  # loss, divergence, agreement, difference
    loss, divergence, agreement, difference = bound_means(values, seed)
    return TextScores(raise_interval(loss), raise_interval(difference), divergence, agreement)


def bound_means(values: Tensor, seed: int) -> list[Interval]:
    """Return the mean of each column of `[rows, columns]` with its bootstrap interval; none for a single row."""
    middle = values.mean(0).tolist()
    if len(values) == 1:
        return [Interval(value) for value in middle]
    means = resample_means(values, seed)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype), dim=0).tolist()
    return [Interval(*row) for row in zip(middle, low, high, strict=True)]


def resample_means(values: Tensor, seed: int) -> Tensor:
    """Return the column means `[resamples, columns]` of rows drawn with replacement, as many as there are."""
    rows = len(values)
    chosen = torch.randint(rows, (RESAMPLES, rows), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLES, rows, dtype=values.dtype).scatter_add_(
        1, chosen, torch.ones(RESAMPLES, rows, dtype=values.dtype)
    )
    return counts @ values / rows


def raise_interval(interval: Interval) -> Interval:
    """Return exp of a loss and of its bounds."""
    low, high = interval.low, interval.high
    ends = (None if end is None else math.exp(min(end, MOST_LOSS)) for end in (low, high))
    return Interval(math.exp(min(interval.value, MOST_LOSS)), *ends)


# Generated text


def count_agreed(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens from the start are the same."""
    for place, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return place
    return min(len(one), len(other))


def measure_repetition(ids: Sequence[int], size: int = GRAM) -> float:
    """Return the share of runs of `size` tokens that occurred before in the same text; 0 where it is shorter."""
    grams = [tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# Damage


def sample_damage(findings: Findings, prices: Prices) -> Curves:
    """Return layer -> priced axis -> a few rows of (kept share, predicted nats per token), everything kept first.

    Loss is predicted as the plan's optimiser does: price x damage^1.2 (compress.choose).
    """
    curves: Curves = {}
    for layer in findings.layers:
        kv, ffn = prices.of_layer(layer.index)
        found = (("kv", layer.kv, kv), ("ffn", layer.ffn, ffn))
        curves[str(layer.index)] = {
            axis: sample_curve(units, layer.energy, price) for axis, units, price in found if axis in prices.axis
        }
    return curves


def sample_curve(ranking: Ranking, energy: float, price: float) -> tuple[tuple[float, float], ...]:
    """Return rows of (kept share, predicted nats) from all units down to one, at most CURVE_ROWS."""
    units = len(ranking.order)
    rows = min(units, CURVE_ROWS)
    gone = sorted({round(place * (units - 1) / max(rows - 1, 1)) for place in range(rows)})
    return tuple(
        (round(1 - one / units, 4), float(f"{price * max(ranking.damage[one] / energy, 0.0) ** LOSS_EXPONENT:.4g}"))
        for one in gone
    )


def middle_level(levels: Mapping[str, float]) -> str:
    """Return the name of the level in the middle, which stands for all where only one can be tried."""
    ordered = sorted(levels, key=lambda name: (levels[name], name))
    return ordered[len(ordered) // 2]
