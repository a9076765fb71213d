"""Exact allocation: which layers, KV groups and FFN channels stay, so that the predicted loss is least within a budget.

Numbers in, numbers out: losses in nats, costs in whole units (parameters, nanoseconds). Nothing is made convex: curves
may have steps, bumps and ties. Losses are taken to add up over branches and layers. `knapsack.py` holds the method.

One rule settles ties, up to rounding: the least loss, then the least cost, then layer by layer from the first: kept
before dropped, more KV groups before fewer, more FFN channels before fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from compress.errors import UserError
from compress.knapsack import (
    ROUNDING,
    Floats,
    Ints,
    Options,
    relax_options,
    solve_options,
    stack_options,
)


@dataclass(frozen=True)
class UnitCurve:
    """One branch of one layer: allowed kept counts, rising, with loss (nats) and cost of each; need not be convex."""

    counts: tuple[int, ...]
    losses: tuple[float, ...]
    costs: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for an empty or ragged curve, counts that do not rise, or numbers that are no numbers."""
        if not self.counts or not len(self.counts) == len(self.losses) == len(self.costs):
            raise ValueError("a curve needs one loss and one cost for each of at least one count")
        if any(after <= before for before, after in pairwise(self.counts)):
            raise ValueError("the counts of a curve must rise")
        if min(self.costs) < 0 or not all(map(math.isfinite, self.losses)):
            raise ValueError("the losses of a curve must be finite and its costs not negative")


@dataclass(frozen=True)
class LayerChoice:
    """What can become of one layer; `fixed` is its cost whatever the counts, `drop_loss` None where it must stay."""

    attention: UnitCurve
    mlp: UnitCurve
    fixed: int
    drop_loss: float | None


Pick = tuple[int, int] | None


@dataclass(frozen=True)
class Allocation:
    """Per layer (attention count, MLP count) or None where dropped; nothing that fits loses less than `bound`."""

    picks: tuple[Pick, ...]
    loss: float
    cost: int
    bound: float

    @property
    def gap(self) -> float:
        """Return how far the loss can lie above the least one possible: 0 where the optimum is proven."""
        return self.loss - self.bound


Solver = Callable[[Sequence[LayerChoice], int], Allocation | None]


def allowed_counts(size: int, step: int, least: int, cap: int | None = None) -> tuple[int, ...]:
    """Return, rising, the full size and the multiples of `step` below it that are at least `least`, none above `cap`.

    Raises UserError where the cap leaves nothing.
    """
    first = -(-least // step) * step
    counts = (*range(first, size, step), size)
    found = tuple(count for count in counts if cap is None or count <= cap)
    if not found:
        raise UserError(
            f"a cap of {cap} leaves no count to keep of {size} in steps of {step} with at least {least}; "
            "raise the cap, or lower the step or the least count."
        )
    return found


def list_options(layer: LayerChoice) -> tuple[Ints, Floats]:
    """Return costs and losses `[attention counts x MLP counts + 1]`, both counts falling; the last is the drop."""
    costs = np.add.outer(layer.attention.costs[::-1], layer.mlp.costs[::-1]).ravel() + layer.fixed
    losses = np.add.outer(layer.attention.losses[::-1], layer.mlp.losses[::-1]).ravel()
    dropped = np.inf if layer.drop_loss is None else layer.drop_loss
    return np.append(costs, 0).astype(np.int64), np.append(losses, dropped).astype(np.float64)


def read_option(layer: LayerChoice, column: int) -> Pick:
    """Return the counts that a column of `list_options` stands for."""
    attention, mlp = layer.attention.counts, layer.mlp.counts
    row, rest = divmod(column, len(mlp))
    return None if row == len(attention) else (attention[-1 - row], mlp[-1 - rest])


def bound_loss(layers: Sequence[LayerChoice], budget: int) -> float:
    """Return a bound (nats) under the loss of every allocation, uniform or not; infinity where nothing fits."""
    relaxed = relax_options(stack_options(map(list_options, layers)), budget)
    return math.inf if relaxed is None else relaxed.bound


def allocate(layers: Sequence[LayerChoice], budget: int) -> Allocation | None:
    """Return the least-loss allocation of summed cost at most `budget`, layers free of each other; None if none fits.

    Exact unless the search exceeds knapsack.MOST_WORK; then `bound`, which is else the loss itself, lies below the loss
    and tells how far off it can be. Where all layers have a `drop_loss`, all may be dropped: the caller pins one.
    """
    solved = solve_options(stack_options(map(list_options, layers)), budget)
    if solved is None:
        return None
    best, bound = solved
    picks = tuple(read_option(layer, column) for layer, column in zip(layers, best.columns.tolist(), strict=True))
    return Allocation(picks, best.loss, best.cost, bound)


# Uniform shapes: one attention count and one MLP count for all kept layers.


@dataclass(frozen=True)
class Table:
    """One branch of all layers: all counts, falling; losses, infinite where not allowed, costs `[counts, layers]`."""

    counts: tuple[int, ...]
    losses: Floats
    costs: Ints


def tabulate_curves(curves: Sequence[UnitCurve]) -> Table:
    """Lay the curves of one branch out over the counts that occur in any layer."""
    counts = sorted({count for curve in curves for count in curve.counts}, reverse=True)
    losses, costs = np.full((len(counts), len(curves)), np.inf), np.zeros((len(counts), len(curves)), np.int64)
    places = {count: place for place, count in enumerate(counts)}
    for column, curve in enumerate(curves):
        rows = [places[count] for count in curve.counts]
        losses[rows, column], costs[rows, column] = curve.losses, curve.costs
    return Table(tuple(counts), losses, costs)


def fill_knapsacks(gains: Floats, costs: Ints, spare: Ints) -> Floats:
    """Return a bound `[pairs]` above what items of these gains and costs `[pairs, layers]` can give within `spare`.

    Items are taken by gain per cost; the last one in part, or not at all where all cost the same, for then it is exact.
    """
    worth = np.divide(gains, costs, out=np.where(gains > 0, np.inf, 0.0), where=costs > 0)
    order = np.argsort(-worth, axis=1, kind="stable")
    gains, costs = np.take_along_axis(gains, order, axis=1), np.take_along_axis(costs, order, axis=1)
    left = spare[:, None] - (costs.cumsum(axis=1) - costs)
    shares = np.where(costs <= left, 1.0, (left / costs.clip(min=1)).clip(0.0, 1.0))
    equal = ((costs == costs.max(axis=1, keepdims=True)) | (gains == 0)).all(axis=1, keepdims=True)
    filled: Floats = (gains * np.where(equal, np.floor(shares), shares)).sum(axis=1)
    return filled


def bound_pairs(kept: Options, drops: Floats, budget: int) -> Floats:
    """Return a bound `[pairs]` under the loss at each pair of counts, infinite where it cannot fit.

    `kept` holds loss and cost of keeping `[pairs, layers]`, `drops` the loss of dropping `[layers]`. What is left to
    choose at a pair of counts, which layers stay, is a knapsack of what keeping each one gains over dropping it.
    """
    must, allowed = np.isinf(drops), np.isfinite(kept.losses)
    losses, dropped = np.where(allowed, kept.losses, 0.0), np.where(must, 0.0, drops)
    gains = np.where(allowed & ~must, dropped - losses, 0.0).clip(min=0.0)
    spare = budget - np.where(must, kept.costs, 0).sum(axis=1)
    bare = np.where(must, losses, dropped)
    rounding = ROUNDING * (np.abs(bare) + gains).sum(axis=1)
    least = bare.sum(axis=1) - fill_knapsacks(gains, np.where(gains > 0, kept.costs, 0), spare) - rounding
    return np.where((spare < 0) | (must & ~allowed).any(axis=1), np.inf, least)


def list_pairs(layers: Sequence[LayerChoice]) -> tuple[list[tuple[int, int]], Options]:
    """Return all pairs of counts, and loss and cost of keeping each layer at each of them `[pairs, layers]`."""
    attention = tabulate_curves([layer.attention for layer in layers])
    mlp = tabulate_curves([layer.mlp for layer in layers])
    pairs = [(groups, channels) for groups in attention.counts for channels in mlp.counts]
    losses = (attention.losses[:, None] + mlp.losses[None]).reshape(len(pairs), -1)
    costs = (attention.costs[:, None] + mlp.costs[None]).reshape(len(pairs), -1)
    return pairs, Options(costs + np.array([layer.fixed for layer in layers], np.int64), losses)


def solve_pair(pair: tuple[int, int], kept: Options, drops: Floats, budget: int) -> Allocation | None:
    """Choose exactly which layers stay at one pair of counts."""
    options = Options(np.stack([kept.costs, 0 * kept.costs], axis=1), np.stack([kept.losses, drops], axis=1))
    solved = solve_options(options, budget)
    if solved is None:
        return None
    best, bound = solved
    return Allocation(tuple(None if column else pair for column in best.columns), best.loss, best.cost, bound)


def rank_allocation(allocation: Allocation) -> tuple[float, int, list[tuple[int, int]]]:
    """Return what sorts allocations by the rule for ties at the head of this module."""
    picks = [(1, 1) if pick is None else (-pick[0], -pick[1]) for pick in allocation.picks]
    return allocation.loss, allocation.cost, picks


def allocate_uniform(layers: Sequence[LayerChoice], budget: int) -> Allocation | None:
    """Return the least-loss allocation within `budget` whose kept layers are all alike; None if none fits.

    Exact, whatever the layers cost: pairs of counts are tried by rising bound, and for each the layers that stay are
    chosen exactly. A layer that does not allow a pair of counts can only be dropped there.
    """
    if not layers:
        return allocate(layers, budget)
    pairs, kept = list_pairs(layers)
    drops = np.array([np.inf if layer.drop_loss is None else layer.drop_loss for layer in layers])
    bounds = bound_pairs(kept, drops, budget)
    found: list[Allocation] = []
    for place in np.argsort(bounds, kind="stable"):
        if np.isinf(bounds[place]) or bounds[place] > min((each.loss for each in found), default=math.inf):
            break
        solved = solve_pair(pairs[place], Options(kept.costs[place], kept.losses[place]), drops, budget)
        found += [] if solved is None else [solved]
    best = min(found, key=rank_allocation, default=None)
    return best and replace(best, bound=min(each.bound for each in found))


# Hidden width: enumerated outside, bounded first, solved only where it can win.

MakeLayers = Callable[[int], tuple[Sequence[LayerChoice], int, float]]


def allocate_widths(
    make_layers: MakeLayers, widths: Iterable[int], budget: int, solve: Solver
) -> tuple[int, Allocation] | None:
    """Return the hidden width of least loss with its allocation; None where nothing fits.

    `make_layers` returns for a width its layers, the cost outside the layers and the loss of the width itself; both are
    in the loss, cost and bound of what is returned. A width is solved only where its Lagrangian bound is not above the
    best loss found. Ties: least cost, then the wider.
    """
    made = {width: make_layers(width) for width in widths}
    bounds = {width: loss + bound_loss(layers, budget - cost) for width, (layers, cost, loss) in made.items()}
    found: dict[int, Allocation] = {}
    for width in sorted((width for width in made if bounds[width] < math.inf), key=bounds.__getitem__):
        if bounds[width] > min((each.loss for each in found.values()), default=math.inf):
            break
        layers, cost, loss = made[width]
        solved = solve(layers, budget - cost)
        if solved is not None:
            found[width] = replace(solved, loss=solved.loss + loss, cost=solved.cost + cost, bound=solved.bound + loss)
    if not found:
        return None
    best = min(found, key=lambda width: (found[width].loss, found[width].cost, -width))
    return best, replace(found[best], bound=min(each.bound for each in found.values()))


# What to say when nothing fits.


def find_least(curves: Sequence[UnitCurve], uniform: bool) -> tuple[list[int], int] | None:
    """Return the cheapest count of each curve, one for all if `uniform`, and their cost; None if none is common."""
    maps = [dict(zip(curve.counts, curve.costs, strict=True)) for curve in curves]
    if not uniform or not curves:
        counts = [min(costs, key=costs.__getitem__) for costs in maps]
        return counts, sum(costs[count] for costs, count in zip(maps, counts, strict=True))
    shared = sorted(set.intersection(*map(set, maps)))
    sums = {count: sum(costs[count] for costs in maps) for count in shared}
    if not sums:
        return None
    count = min(sums, key=sums.__getitem__)
    return [count] * len(curves), sums[count]


def describe_numbers(numbers: Sequence[int]) -> str:
    """Return rising numbers with runs joined: '0-3, 7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def describe_least(counts: Sequence[int], unit: str) -> str:
    """Return '1 KV groups' or '1 to 4 KV groups' for the least counts of the layers."""
    low, high = min(counts), max(counts)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def explain_infeasible(
    layers: Sequence[LayerChoice], budget: int, uniform: bool = False, outside: int = 0, unit: str = "parameters"
) -> str:
    """Say in one sentence what keeps `budget` from being met, and the nearest budget that can be.

    `outside` is a cost beside the layers that both budgets include. Raises ValueError where the budget can be met.
    """
    places = [place for place, layer in enumerate(layers) if layer.drop_loss is None]
    stay = [layers[place] for place in places]
    named = f"layer{'s' * (len(places) > 1)} {describe_numbers(places)}"
    attention = find_least([layer.attention for layer in stay], uniform)
    mlp = find_least([layer.mlp for layer in stay], uniform)
    if attention is None or mlp is None:
        missing = "KV groups" if attention is None else "FFN channels"
        return (
            f"No budget can be met by layers all alike: {named} must stay but share no allowed number of {missing}; "
            "change their pinned units, caps or steps, or allow uneven layers."
        )
    fixed = sum(layer.fixed for layer in stay)
    least = outside + fixed + attention[1] + mlp[1]
    if least <= budget:
        raise ValueError(f"a budget of {budget} can be met: the least is {least}")
    parts = [
        (mlp[1], "for these FFN channels", "allow fewer FFN channels"),
        (attention[1], "for these KV groups", "allow fewer KV groups"),
        (fixed, "fixed per layer", "allow more layers to be dropped"),
        (outside, "outside the layers", "make what lies outside the layers smaller"),
    ]
    largest, place, remedy = max(parts, key=lambda part: part[0])
    counts = f"{describe_least(attention[0], 'KV groups')} and {describe_least(mlp[0], 'FFN channels')}" if stay else ""
    why = f"{named} must stay with at least {counts}" if stay else "no layer must stay"
    return (
        f"A budget of {budget:,} {unit} cannot be met: {why}, so that the least possible is {least:,}, of which "
        f"{largest:,} {place}; raise the budget to {least:,} or {remedy}."
    )
