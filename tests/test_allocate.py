"""Allocation under a budget: equal to plain enumeration, ties and all; bounds hold; what cannot be met is explained."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import numpy as np
import pytest

from compress.allocate import (
    Allocation,
    LayerChoice,
    Pick,
    UnitCurve,
    allocate,
    allocate_uniform,
    allocate_widths,
    allowed_counts,
    bound_loss,
    bound_pairs,
    explain_infeasible,
    list_options,
    list_pairs,
    solve_pair,
)
from compress.errors import UserError
from compress.knapsack import Options, relax_options, solve_options, stack_options

SEEDS = range(80)
Layers = list[LayerChoice]


# Random instances: losses and costs on coarse grids, so that sums are exact and ties abound.


def draw_curve(rng: random.Random, falling: bool) -> UnitCurve:
    counts = tuple(sorted(rng.sample((1, 2, 3, 4, 6, 8), rng.randint(1, 4))))
    losses = [rng.randrange(0, 7) / 8 for _ in counts[1:]]
    costs = [rng.randrange(0, 6) for _ in counts]
    if falling:
        losses, costs = sorted(losses, reverse=True), sorted(costs)
    return UnitCurve(counts, (*losses, 0.0), tuple(costs))


def draw_layers(seed: int, most: int = 4) -> Layers:
    """Curves falling or not; layers unlike in all, in nothing but the drop, or in their losses only."""
    rng = random.Random(seed)
    first = [draw_curve(rng, seed % 2 == 0) for _ in range(2)]
    layers = []
    for _ in range(rng.randint(1, most)):
        curves = [draw_curve(rng, seed % 2 == 0) for _ in range(2)] if seed % 3 == 0 else first
        if seed % 3 == 2:
            curves = [UnitCurve(x.counts, tuple(rng.randrange(7) / 8 for _ in x.counts), x.costs) for x in first]
        drop = None if rng.random() < 0.4 else rng.randrange(0, 13) / 8
        layers.append(LayerChoice(*curves, fixed=rng.randrange(0, 3) if seed % 3 == 0 else 1, drop_loss=drop))
    return layers


def draw_budgets(seed: int, layers: Layers) -> list[int]:
    rng = random.Random(-1 - seed)
    full = sum(x.fixed + max(x.attention.costs) + max(x.mlp.costs) for x in layers)
    return [rng.randint(0, full) for _ in range(3)] + [full]


# The slow twins: every allocation there is.


def price_pick(layer: LayerChoice, pick: Pick) -> tuple[float, int]:
    if pick is None:
        assert layer.drop_loss is not None
        return layer.drop_loss, 0
    places = layer.attention.counts.index(pick[0]), layer.mlp.counts.index(pick[1])
    loss = layer.attention.losses[places[0]] + layer.mlp.losses[places[1]]
    return loss, layer.fixed + layer.attention.costs[places[0]] + layer.mlp.costs[places[1]]


def price_picks(layers: Layers, picks: Sequence[Pick]) -> tuple[float, int]:
    priced = [price_pick(layer, pick) for layer, pick in zip(layers, picks, strict=True)]
    return sum(loss for loss, _ in priced), sum(cost for _, cost in priced)


def list_picks(layer: LayerChoice) -> list[Pick]:
    kept: list[Pick] = list(product(layer.attention.counts, layer.mlp.counts))
    return kept if layer.drop_loss is None else [*kept, None]


def enumerate_all(layers: Layers) -> Iterator[tuple[Pick, ...]]:
    return product(*map(list_picks, layers))


def enumerate_uniform(layers: Layers) -> Iterator[tuple[Pick, ...]]:
    return (picks for picks in enumerate_all(layers) if len({pick for pick in picks if pick is not None}) <= 1)


def prefer(picks: Sequence[Pick]) -> list[tuple[int, int, int]]:
    return [(1, 0, 0) if pick is None else (0, -pick[0], -pick[1]) for pick in picks]


def rank_every(layers: Layers, every: Iterator[tuple[Pick, ...]]) -> list[Allocation]:
    """Sort by loss, then cost, then layer by layer: kept first, more groups first, more channels first."""
    priced = [(*price_picks(layers, picks), prefer(picks), picks) for picks in every]
    return [Allocation(picks, loss, cost, loss) for loss, cost, _, picks in sorted(priced, key=lambda x: x[:3])]


def find_best(ranked: list[Allocation], budget: int) -> Allocation | None:
    return next((each for each in ranked if each.cost <= budget), None)


CASES = [
    pytest.param(allocate, enumerate_all, 3, id="per-layer"),
    pytest.param(allocate_uniform, enumerate_uniform, 4, id="uniform"),
]
Enumerate = Callable[[Layers], Iterator[tuple[Pick, ...]]]
Solve = Callable[[Sequence[LayerChoice], int], Allocation | None]


@pytest.mark.parametrize(("solve", "enumerate_", "most"), CASES)
def test_equals_enumeration_ties_included(solve: Solve, enumerate_: Enumerate, most: int) -> None:
    seen = {"drops": 0, "infeasible": 0, "ties": 0}
    for seed in SEEDS:
        layers = draw_layers(seed, most)
        ranked = rank_every(layers, enumerate_(layers))
        pairs = Counter((each.loss, each.cost) for each in ranked)
        for budget in draw_budgets(seed, layers):
            found, expected = solve(layers, budget), find_best(ranked, budget)
            assert found == expected, f"seed {seed}, budget {budget}"
            seen["infeasible"] += expected is None
            seen["drops"] += expected is not None and None in expected.picks and set(expected.picks) != {None}
            seen["ties"] += expected is not None and pairs[expected.loss, expected.cost] > 1
    assert min(seen.values()) > 5, seen  # the instances are worth their name


def test_equals_enumeration_with_losses_on_no_grid() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        layers = []
        for _ in range(3):
            curves = [
                UnitCurve((1, 2, 3), (rng.random(), rng.random(), 0.0), tuple(rng.sample(range(10**9), 3)))
                for _ in range(2)
            ]
            layers.append(LayerChoice(*curves, fixed=rng.randrange(10**8), drop_loss=rng.choice((None, rng.random()))))
        for solve, enumerate_ in ((allocate, enumerate_all), (allocate_uniform, enumerate_uniform)):
            ranked = rank_every(layers, enumerate_(layers))
            for budget in draw_budgets(seed, layers):
                found, expected = solve(layers, budget), find_best(ranked, budget)
                assert (found and found.picks) == (expected and expected.picks), f"seed {seed}, budget {budget}"
                assert found is None or found.bound == found.loss == pytest.approx(expected.loss)


def draw_deep(layers: int, groups: int, channels: int, seed: int) -> Layers:
    """Unlike layers with convex-ish loss, tiled costs and a drop that competes; the ends stay."""
    rng = np.random.default_rng(seed)

    def draw(count: int, step: int, scale: float) -> UnitCurve:
        kept = np.arange(1, count + 1)
        losses = scale * (1 - kept / count) ** rng.uniform(1.0, 1.8) * (1 + 0.05 * rng.random(count))
        costs = kept * step + (kept + 3) // 4 * step + rng.integers(0, step // 2 + 1, count)
        return UnitCurve(tuple(kept.tolist()), tuple(losses.tolist()), tuple(costs.tolist()))

    made = []
    for place in range(layers):
        scale = float(rng.lognormal(0.0, 0.7))
        drop = None if place in (0, layers - 1) else 0.3 * scale
        made.append(LayerChoice(draw(groups, 8, 0.1 * scale), draw(channels, 2, 0.4 * scale), 1, drop))
    return made


def solve_by_money(layers: Layers, budget: int) -> float:
    """The textbook twin: the least loss for every budget from 0 up, one layer after the other."""
    least = np.zeros(budget + 1)
    for layer in layers:
        following = np.full(budget + 1, np.inf)
        for cost, loss in zip(*list_options(layer), strict=True):
            if cost <= budget:
                following[cost:] = np.minimum(following[cost:], least[: budget + 1 - cost] + loss)
        least = following
    return float(least[budget])


@pytest.mark.parametrize("keep", [0.9, 0.6])
def test_a_deep_model_equals_the_dynamic_program_over_every_budget(keep: float) -> None:
    layers = draw_deep(40, 4, 24, seed=3)
    budget = int(keep * sum(x.fixed + x.attention.costs[-1] + x.mlp.costs[-1] for x in layers))
    found = allocate(layers, budget)
    assert found is not None
    assert found.loss == pytest.approx(solve_by_money(layers, budget), rel=1e-12)
    assert found.bound == found.loss
    assert found.cost <= budget
    assert price_picks(layers, found.picks) == (pytest.approx(found.loss), found.cost)


def test_forty_large_layers_are_proven_optimal() -> None:
    layers = draw_deep(40, 8, 176, seed=5)
    budget = int(0.8 * sum(x.fixed + x.attention.costs[-1] + x.mlp.costs[-1] for x in layers))
    found, alike = allocate(layers, budget), allocate_uniform(layers, budget)
    assert found is not None
    assert alike is not None
    assert bound_loss(layers, budget) <= found.loss == found.bound < alike.loss == alike.bound
    assert max(found.cost, alike.cost) <= budget
    assert len({pick for pick in alike.picks if pick is not None}) == 1


def test_a_search_cut_short_states_a_gap_that_holds() -> None:
    gaps = 0
    for seed in range(60):
        layers = draw_deep(5, 3, 6, seed)
        options = stack_options(map(list_options, layers))
        for keep in (0.8, 0.5):
            budget = int(keep * sum(x.fixed + x.attention.costs[-1] + x.mlp.costs[-1] for x in layers))
            exact = allocate(layers, budget)
            best, bound = solve_options(options, budget, work=40) or pytest.fail("fits")
            assert exact is not None
            assert bound <= exact.loss * (1 + 1e-12)
            assert exact.loss <= best.loss * (1 + 1e-12)
            assert best.cost <= budget
            gaps += best.loss > bound
    assert gaps > 10


def maximise_dual(options: Options, budget: int) -> float:
    """The Lagrangian bound at every price where some row changes its mind."""
    prices = {0.0}
    for costs, losses in zip(options.costs, options.losses, strict=True):
        points = [(c, x) for c, x in zip(costs.tolist(), losses.tolist(), strict=True) if x < math.inf]
        prices |= {(y - x) / (c - d) for c, x in points for d, y in points if c > d and y > x}
    return max(float((options.losses + p * options.costs).min(axis=1).sum()) - p * budget for p in prices)


def test_the_bound_is_the_lagrangian_one() -> None:
    below = 0
    for seed in SEEDS:
        layers = draw_layers(seed)
        options = stack_options(map(list_options, layers))
        for budget in draw_budgets(seed, layers):
            found, bound, relaxed = allocate(layers, budget), bound_loss(layers, budget), relax_options(options, budget)
            assert (found is None) == (bound == math.inf) == (relaxed is None)
            if found is None or relaxed is None:
                continue
            assert bound == pytest.approx(maximise_dual(options, budget), abs=1e-9)
            assert bound <= found.loss <= relaxed.fitting.loss
            below += bound < found.loss - 1e-3
    assert below > 20


@pytest.mark.parametrize("solve", [allocate, allocate_uniform])
def test_a_larger_budget_never_loses_more(solve: Solve) -> None:
    for seed in range(30):
        layers = draw_layers(seed)
        full = draw_budgets(seed, layers)[-1]
        losses = [found.loss if (found := solve(layers, budget)) else math.inf for budget in range(-1, full + 1)]
        assert losses[0] == math.inf
        assert all(after <= before for before, after in pairwise(losses))


def test_a_valley_that_the_hull_hides_is_found() -> None:
    """Keeping 2 lies above the line from 1 to 3, so no price chooses it; it is the best within a budget of 7."""
    bumpy = UnitCurve((1, 2, 3), (1.0, 0.75, 0.0), (2, 6, 8))
    layer = LayerChoice(UnitCurve((1,), (0.0,), (1,)), bumpy, 0, None)
    assert allocate([layer], 7) == Allocation(((1, 2),), 0.75, 7, 0.75)
    assert bound_loss([layer], 7) < 0.5


def test_a_layer_that_lacks_the_counts_can_only_be_dropped() -> None:
    one = UnitCurve((1,), (0.0,), (1,))
    free = LayerChoice(one, UnitCurve((2, 4), (0.5, 0.0), (2, 4)), 0, None)
    odd = LayerChoice(one, UnitCurve((3, 4), (0.0, 0.0), (3, 4)), 0, 2.0)
    assert allocate_uniform([free, odd], 10) == Allocation(((1, 4), (1, 4)), 0.0, 10, 0.0)
    assert allocate_uniform([free, odd], 9) == Allocation(((1, 4), None), 2.0, 5, 2.0)
    assert allocate_uniform([free, LayerChoice(one, UnitCurve((3,), (0.0,), (3,)), 0, None)], 99) is None


def test_uniform_ties_are_settled_layer_by_layer() -> None:
    """(2, 1) without the first layer and (1, 2) without the second lose and cost the same: the first layer is kept."""

    def make(costs: tuple[int, int], other: tuple[int, int]) -> LayerChoice:
        flat = (0.0, 0.0)
        return LayerChoice(UnitCurve((1, 2), flat, costs), UnitCurve((1, 2), flat, other), 0, 1.0)

    layers = [make((1, 9), (9, 1)), make((9, 1), (1, 9))]
    found = allocate_uniform(layers, 2)
    assert found == find_best(rank_every(layers, enumerate_uniform(layers)), 2)
    assert found == Allocation(((1, 2), None), 1.0, 2, 1.0)


def draw_unlike_costs(seed: int) -> Layers:
    rng = random.Random(seed)
    attention = UnitCurve((1, 2), (0.25, 0.0), (1, 2))
    layers = []
    for _ in range(6):
        mlp = UnitCurve((1, 2), (rng.randrange(9) / 8, 0.0), (rng.randint(1, 9), rng.randint(9, 30)))
        layers.append(LayerChoice(attention, mlp, 1, rng.randrange(1, 33) / 8))
    return layers


def test_uniform_choice_of_layers_is_exact_where_their_costs_differ() -> None:
    for seed in range(25):
        layers = draw_unlike_costs(seed)
        ranked = rank_every(layers, enumerate_uniform(layers))
        for budget in draw_budgets(seed, layers):
            assert allocate_uniform(layers, budget) == find_best(ranked, budget), f"seed {seed}, budget {budget}"


def test_the_bound_of_a_pair_of_counts_holds_and_is_exact_for_equal_costs() -> None:
    below = equal = 0
    for seed in range(50):
        layers = draw_unlike_costs(seed) if seed % 2 else draw_layers(3 * seed // 2 + 1)
        pairs, kept = list_pairs(layers)
        drops = np.array([math.inf if layer.drop_loss is None else layer.drop_loss for layer in layers])
        for budget in draw_budgets(seed, layers):
            for place, bound in enumerate(bound_pairs(kept, drops, budget)):
                row = Options(kept.costs[place], kept.losses[place])
                if math.isinf(bound):
                    assert any(row.losses[drops == math.inf] == math.inf) or row.costs[drops == math.inf].sum() > budget
                    continue
                exact = solve_pair(pairs[place], row, drops, budget)
                assert exact is not None
                assert bound <= exact.loss
                below += bound < exact.loss - 1e-6
                if len(set(row.costs[row.losses < math.inf].tolist())) == 1:
                    assert bound == pytest.approx(exact.loss)
                    equal += 0 < exact.cost
    assert min(below, equal) > 20


def test_no_layers_cost_nothing() -> None:
    for solve in (allocate, allocate_uniform):
        assert solve([], 0) == Allocation((), 0.0, 0, 0.0)
        assert solve([], -1) is None


# Hidden widths


def make_widths(seed: int) -> Callable[[int], tuple[Layers, int, float]]:
    base = draw_layers(seed, 2)

    def make(width: int) -> tuple[Layers, int, float]:
        def scale(curve: UnitCurve) -> UnitCurve:
            return UnitCurve(curve.counts, curve.losses, tuple(width * cost for cost in curve.costs))

        layers = [LayerChoice(scale(x.attention), scale(x.mlp), width * x.fixed, x.drop_loss) for x in base]
        return layers, 2 * width, (8 - width) / 8

    return make


@pytest.mark.parametrize(("solve", "enumerate_", "most"), CASES)
def test_the_best_width_equals_enumeration(solve: Solve, enumerate_: Enumerate, most: int) -> None:
    nowhere = inside = 0
    for seed in range(40):
        make, budget = make_widths(seed), random.Random(seed).randrange(0, 80)
        best: list[tuple[float, int, int, tuple[Pick, ...]]] = []
        for width in (2, 4, 5, 8):
            layers, cost, loss = make(width)
            if found := find_best(rank_every(layers, enumerate_(layers)), budget - cost):
                best.append((found.loss + loss, found.cost + cost, -width, found.picks))
        chosen = allocate_widths(make, (2, 4, 5, 8), budget, solve)
        if not best:
            assert chosen is None
            nowhere += 1
            continue
        loss, cost, negative, picks = min(best, key=lambda entry: entry[:3])
        assert chosen == (-negative, Allocation(picks, loss, cost, loss)), f"seed {seed}"
        inside += -negative in (4, 5)
    assert nowhere
    assert inside


def test_a_width_that_cannot_win_is_not_solved() -> None:
    solved = []

    def make(width: int) -> tuple[Layers, int, float]:
        return draw_layers(0), width, abs(width - 3) * 10.0

    def solve(layers: Sequence[LayerChoice], budget: int) -> Allocation | None:
        solved.append(budget)
        return allocate(layers, budget)

    chosen = allocate_widths(make, range(1, 9), 100, solve)
    assert chosen is not None
    assert chosen[0] == 3
    assert solved == [97]


def test_of_equal_widths_the_widest_is_kept() -> None:
    chosen = allocate_widths(lambda width: (draw_layers(0), 5, 0.0), (4, 8, 6), 100, allocate)
    assert chosen is not None
    assert chosen[0] == 8


# Counts, refusals, explanations


@pytest.mark.parametrize(
    ("size", "step", "least", "cap", "expected"),
    [
        (64, 16, 16, None, (16, 32, 48, 64)),
        (64, 16, 17, None, (32, 48, 64)),
        (70, 16, 32, None, (32, 48, 64, 70)),
        (70, 16, 32, 69, (32, 48, 64)),
        (64, 16, 1, 40, (16, 32)),
        (8, 16, 1, None, (8,)),
        (8, 1, 8, None, (8,)),
        (4, 1, 0, None, (0, 1, 2, 3, 4)),
    ],
)
def test_allowed_counts(size: int, step: int, least: int, cap: int | None, expected: tuple[int, ...]) -> None:
    assert allowed_counts(size, step, least, cap) == expected


def test_a_cap_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="a cap of 15 leaves no count to keep of 64 in steps of 16 with at least 1"):
        allowed_counts(64, 16, 1, 15)


@pytest.mark.parametrize(
    ("counts", "losses", "costs"),
    [
        ((), (), ()),
        ((1, 2), (0.5,), (1, 2)),
        ((1, 2), (0.5, 0.0), (1,)),
        ((2, 1), (0.5, 0.0), (1, 2)),
        ((1, 1), (0.5, 0.0), (1, 2)),
        ((1, 2), (math.nan, 0.0), (1, 2)),
        ((1, 2), (math.inf, 0.0), (1, 2)),
        ((1, 2), (0.5, 0.0), (-1, 2)),
    ],
)
def test_a_curve_that_is_none_is_refused(
    counts: tuple[int, ...], losses: tuple[float, ...], costs: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="curve"):
        UnitCurve(counts, losses, costs)


def test_explanation_names_layers_counts_and_the_largest_part() -> None:
    attention, mlp = UnitCurve((2, 4), (0.5, 0.0), (20, 40)), UnitCurve((16, 32), (0.5, 0.0), (1000, 2000))
    stays, goes = LayerChoice(attention, mlp, 3, None), LayerChoice(attention, mlp, 3, 1.0)
    assert explain_infeasible([stays, stays, goes, stays], 3000, outside=7) == (
        "A budget of 3,000 parameters cannot be met: layers 0-1, 3 must stay with at least 2 KV groups and 16 FFN "
        "channels, so that the least possible is 3,076, of which 3,000 for these FFN channels; raise the budget to "
        "3,076 or allow fewer FFN channels."
    )
    assert "of which 90 outside the layers" in explain_infeasible([goes], 50, outside=90, unit="ns")
    assert "no layer must stay, so that the least possible is 90" in explain_infeasible([goes], 50, outside=90)
    with pytest.raises(ValueError, match="can be met"):
        explain_infeasible([stays], 1023)


@pytest.mark.parametrize("uniform", [False, True])
def test_explanation_gives_the_nearest_budget_that_can_be_met(uniform: bool) -> None:
    solve, nearest = allocate_uniform if uniform else allocate, 0
    for seed in SEEDS:
        layers = draw_layers(seed)
        said = explain_infeasible(layers, -1, uniform)
        found = re.search(r"raise the budget to ([\d,]+)", said)
        if found is None:
            assert "No budget can be met by layers all alike" in said
            assert solve(layers, 10**6) is None
            continue
        least = int(found[1].replace(",", ""))
        assert solve(layers, least) is not None
        assert solve(layers, least - 1) is None
        nearest += least > 0
    assert nearest > 30
