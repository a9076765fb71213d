"""From findings to a plan: which shape loses least within the budget, and which units it keeps.

Loss is predicted additively: price x damage^1.2 for every cut branch, every dropped layer and the hidden width, where
damage is the error left in the stream as a share of its energy and the price of an axis is measured (probe.py,
trials.py). The optimum over layers is exact (allocate.py); depth competes with width there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from compress.allocate import (
    Allocation,
    LayerChoice,
    Solver,
    UnitCurve,
    allocate,
    allocate_uniform,
    allocate_widths,
    allowed_counts,
    explain_infeasible,
    find_least,
)
from compress.errors import UserError
from compress.family import POST_NORMS
from compress.goal import Goal, keep_goal, sum_costs
from compress.importance.findings import Findings, LayerFindings
from compress.importance.ratio import Counts, find_budget, find_costs, flap_counts, slim_counts, uniform_counts
from compress.plan import LOSS_EXPONENT, LayerPlan, Plan, describe_choice, grid, keep_everything, plan_shape, step_size
from compress.recipe import Recipe
from compress.shapes import LayerShape, ModelShape
from compress.spec import ModelSpec
from compress.spec_change import add_biases, drop_norms
from compress.spec_writer import find_writer
from compress.surgery.describe import REPAIRED

# Searches for a limit on the sum of parts whose true cost is what was asked for, and how near is near enough.
MOST_ROUNDS, NEAR = 6, 0.99


@dataclass(frozen=True)
class Prices:
    """Loss in nats at one unit of damage: by axis, and each layer's (attention, MLP) share of it relative to 1."""

    axis: Mapping[str, float]
    layers: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def of_layer(self, index: int) -> tuple[float, float]:
        """Return the prices of a layer's KV and FFN damage."""
        attention, mlp = self.layers.get(index, (1.0, 1.0))
        return self.axis.get("kv", 1.0) * attention, self.axis.get("ffn", 1.0) * mlp


@dataclass(frozen=True)
class Scope:
    """What the optimiser may choose among: hidden widths, and how many layers may go."""

    widths: tuple[int, ...]
    most_dropped: int
    least_dropped: int = 0


@dataclass(frozen=True)
class Choice:
    """A plan and the loss predicted for it."""

    plan: Plan
    loss: float


def full_scope(spec: ModelSpec, findings: Findings, recipe: Recipe, goal: Goal | None = None) -> Scope:
    """Return everything that the recipe's axes and the goal's steps allow."""
    hidden = spec.shape.hidden
    step = step_size(hidden, recipe, goal.hidden_step if goal else 0)
    widths = grid(hidden, step, max(len(findings.pinned), step)) if "hidden" in recipe.axes else (hidden,)
    return Scope(widths, len(findings.drop_order) if "layers" in recipe.axes else 0)


def choose_plan(
    spec: ModelSpec,
    findings: Findings,
    recipe: Recipe,
    prices: Prices,
    scope: Scope | None = None,
    goal: Goal | None = None,
) -> Choice:
    """Return the plan of least predicted loss within the goal (the recipe's `keep` where none is given).

    Raises UserError that names the bound when nothing fits.
    """
    if recipe.ratio == "influence":
        return Choice(influence_plan(spec, findings, recipe), 0.0)
    if recipe.ratio != "loss":
        return Choice(ratio_plan(spec, findings, recipe, goal), 0.0)
    goal = goal or keep_goal(spec.shape, recipe)
    scope = scope or full_scope(spec, findings, recipe, goal)
    search = open_search(spec, findings, recipe, prices, scope, goal)
    width, best = meet_goal(search)
    plan = fill_layers(findings, width, best)
    if recipe.shapes == "per-layer" and not is_writable(spec, plan_shape(plan, spec.shape), recipe):
        # Layers that came out alike are written for stock classes, which this shape does not suit.
        return choose_plan(spec, findings, replace(recipe, shapes="uniform"), prices, scope, goal)
    notes = describe_choice(spec, findings, plan, split_loss(findings, prices, plan, width))
    return Choice(replace(plan, notes=notes), best.loss)


# Under the budget


@dataclass(frozen=True)
class Search:
    """All that the optimiser chooses among: for each hidden width its layers, its cost outside them and its loss."""

    spec: ModelSpec
    findings: Findings
    recipe: Recipe
    goal: Goal
    solve: Solver
    made: Mapping[int, tuple[Sequence[LayerChoice], int, float]]


def open_search(
    spec: ModelSpec, findings: Findings, recipe: Recipe, prices: Prices, scope: Scope, goal: Goal
) -> Search:
    """Price every count at every width of the scope."""
    rated = bar_drops([rate_layer(spec, layer, findings, recipe, prices, goal) for layer in findings.layers], scope)
    made = {width: make_choices(spec, rated, recipe, width, goal) for width in scope.widths}
    usable = {
        width: (layers, goal.costs.outside(replace(spec.shape, hidden=width)), price_hidden(findings, prices, width))
        for width, layers in made.items()
        if layers
    }
    solve = allocate if recipe.shapes == "per-layer" else allocate_uniform
    return Search(spec, findings, recipe, goal, force_drops(solve, scope.least_dropped), usable)


def meet_goal(search: Search) -> tuple[int, Allocation]:
    """Return the hidden width and the allocation of least loss whose true cost is within the goal.

    Where the parts do not add up to the truth, the limit on their sum is moved until the truth meets the goal: down
    while it is missed, up while more than 1 % is left, a few times. Raises UserError where nothing fits.
    """
    goal, limit = search.goal, search.goal.limit
    best: tuple[float, int, Allocation] | None = None
    for _ in range(1 if goal.measure is None else MOST_ROUNDS):
        found = allocate_widths(search.made.__getitem__, search.made, limit, search.solve)
        if found is None or goal.measure is None:
            break
        actual = goal.measure(allocation_shape(search, *found))
        if actual <= goal.limit and (best is None or actual > best[0]):
            best = (actual, *found)
        if NEAR * goal.limit <= actual <= goal.limit or actual <= 0:
            break
        scaled = int(limit * min(2.0, goal.limit / actual))
        if actual > goal.limit:  # what was just found must not fit again
            scaled = min(scaled, sum_costs(goal.costs, allocation_shape(search, *found)) - 1)
        limit = scaled
    if best is not None:
        return best[1], best[2]
    if found is None or goal.measure is not None:
        layers = {width: (own[0], own[1]) for width, own in search.made.items()}
        raise explain_budget(search.recipe, search.goal, layers)
    return found


def allocation_shape(search: Search, width: int, allocation: Allocation) -> ModelShape:
    """Return the shape that an allocation makes of the dense one."""
    dense = zip(search.spec.shape.layers, allocation.picks, strict=True)
    priced = price_shape(search.spec, search.recipe)
    layers = tuple(priced(layer).resize(*pick) for layer, pick in dense if pick is not None)
    return replace(search.spec.shape, hidden=width, layers=layers)


def price_shape(spec: ModelSpec, recipe: Recipe) -> Callable[[LayerShape], LayerShape]:
    """Return what makes of a dense layer the one that is paid for: without absorbed norms, with added biases."""
    added = add_biases(spec, spec.shape, REPAIRED, extend=recipe.biases == "own") if recipe.biases != "none" else None
    biases = dict(zip(spec.shape.layers, added.layers, strict=True)) if added else {}

    def price(layer: LayerShape) -> LayerShape:
        own = biases.get(layer, layer)
        return drop_norms(own, POST_NORMS) if recipe.absorb == "all" else own

    return price


# What can become of a layer


@dataclass(frozen=True)
class Rated:
    """Losses of one layer at any hidden width: of keeping so many KV groups, so many channels, and of dropping it."""

    groups: Mapping[int, float]
    channels: tuple[int, ...]
    channel_losses: tuple[float, ...]
    drop_loss: float | None


def rate_layer(
    spec: ModelSpec, found: LayerFindings, findings: Findings, recipe: Recipe, prices: Prices, goal: Goal
) -> Rated:
    """Return the losses of a layer's counts that the recipe's axes and the steps allow."""
    layer = spec.shape.layers[found.index]
    kv_price, ffn_price = prices.of_layer(found.index)
    groups = allowed_counts(layer.kv_heads, goal.kv_step, 1) if "kv" in recipe.axes else (layer.kv_heads,)
    step = step_size(layer.ffn, recipe, goal.ffn_step)
    channels = allowed_counts(layer.ffn, step, step) if "ffn" in recipe.axes else (layer.ffn,)
    may_go = "layers" in recipe.axes and found.index in findings.drop_order
    return Rated(
        {count: price(kv_price, found.kv_damage(count)) for count in groups},
        channels,
        tuple(price(ffn_price, found.ffn_damage(count)) for count in channels),
        price(prices.axis.get("layers", 1.0), found.drop_damage) if may_go else None,
    )


def order_drops(layers: Sequence[Rated | LayerChoice]) -> list[int]:
    """Return the places of layers that may go, those that cost least first."""
    rated = [(layer.drop_loss, place) for place, layer in enumerate(layers) if layer.drop_loss is not None]
    return [place for _, place in sorted(rated)]


def bar_drops(layers: Sequence[Rated], scope: Scope) -> list[Rated]:
    """Return the layers with only the scope's most that may be dropped."""
    allowed = order_drops(layers)[: scope.most_dropped]
    return [layer if place in allowed else replace(layer, drop_loss=None) for place, layer in enumerate(layers)]


def force_drops(solve: Solver, count: int) -> Solver:
    """Return `solve` with the `count` layers that cost least dropped, whatever else is chosen."""

    def solve_rest(layers: Sequence[LayerChoice], budget: int) -> Allocation | None:
        forced = order_drops(layers)[:count]
        found = solve([layer for place, layer in enumerate(layers) if place not in forced], budget)
        if found is None:
            return None
        picks = iter(found.picks)
        every = tuple(None if place in forced else next(picks) for place in range(len(layers)))
        lost = sum(layers[place].drop_loss or 0.0 for place in forced)
        return replace(found, picks=every, loss=found.loss + lost, bound=found.bound + lost)

    return solve_rest


def make_choices(
    spec: ModelSpec, rated: Sequence[Rated], recipe: Recipe, width: int, goal: Goal
) -> list[LayerChoice]:
    """Return what can become of each layer at one hidden width; empty where no head count can be written there."""
    writable = list_head_counts(spec, recipe, width)
    allowed = [[count for count in layer.groups if count in writable] for layer in rated]
    if not all(allowed):
        return []
    costs = goal.costs
    # Layers alike share one row of costs: a model has many widths and channels.
    of_groups = cache(lambda own, counts: tuple(costs.attention(own.resize(n), width) for n in counts))
    of_channels = cache(lambda own, counts: tuple(costs.mlp(own.resize(None, n), width) for n in counts))
    fixed = cache(lambda own: costs.fixed(own, width))
    made, priced = [], price_shape(spec, recipe)
    for layer, full, groups in zip(rated, spec.shape.layers, allowed, strict=True):
        own = priced(full)
        kv = UnitCurve(tuple(groups), tuple(layer.groups[n] for n in groups), of_groups(own, tuple(groups)))
        ffn = UnitCurve(layer.channels, layer.channel_losses, of_channels(own, layer.channels))
        made.append(LayerChoice(kv, ffn, fixed(own), layer.drop_loss))
    return made


def list_head_counts(spec: ModelSpec, recipe: Recipe, width: int) -> tuple[int, ...]:
    """Return the numbers of KV groups that can be written at one hidden width when all layers are alike."""
    counts = range(1, max(layer.kv_heads for layer in spec.shape.layers) + 1)
    if recipe.shapes == "per-layer":  # no stock class opens uneven layers, so none limits their heads
        return tuple(counts)
    shape, ffn = replace(spec.shape, hidden=width), spec.shape.layers[0].ffn
    sized = {n: replace(shape, layers=tuple(layer.resize(n, ffn) for layer in shape.layers)) for n in counts}
    return tuple(n for n in counts if is_writable(spec, sized[n], recipe))


def is_writable(spec: ModelSpec, shape: ModelShape, recipe: Recipe) -> bool:
    """Tell whether a shape can be written once the recipe has added biases and absorbed norms."""
    if not shape.uniform or recipe.biases == "own":  # then no stock class is meant to open it
        return True
    bare = replace(shape, layers=tuple(drop_norms(layer, POST_NORMS) for layer in shape.layers))
    # Which norms `safe` absorbs is settled later; with all of them gone another family's class may decide.
    variants = {"none": (shape,), "safe": (shape, bare), "all": (bare,)}[recipe.absorb]
    return all(is_accepted(spec, variant, recipe) for variant in variants)


def is_accepted(spec: ModelSpec, shape: ModelShape, recipe: Recipe) -> bool:
    """Tell whether a stock configuration class takes the shape, with the biases that the recipe adds."""
    if recipe.biases == "none":
        return find_writer(spec, shape) is not None
    try:
        return find_writer(spec, add_biases(spec, shape, REPAIRED)) is not None
    except UserError:
        return False


def price(unit: float, damage: float) -> float:
    """Return the predicted loss in nats of one damage."""
    return float(unit * max(damage, 0.0) ** LOSS_EXPONENT)


def price_hidden(findings: Findings, prices: Prices, width: int) -> float:
    """Return the predicted loss of a hidden width."""
    return price(prices.axis.get("hidden", 1.0), findings.hidden_damage(width))


def explain_budget(recipe: Recipe, goal: Goal, made: Mapping[int, tuple[Sequence[LayerChoice], int]]) -> UserError:
    """Return the refusal of a budget that nothing fits, naming the bound that stops it and the least that fits."""
    if not made:
        return UserError(
            f"{goal.asked}: no head count that --axes {','.join(recipe.axes)} leaves can be written for a "
            "stock class at any allowed hidden width; change --axes or --multiple, or use --shapes per-layer."
        )
    uniform = recipe.shapes == "uniform"
    leasts = {width: find_least_cost(layers, outside, uniform) for width, (layers, outside) in made.items()}
    width = min(leasts, key=leasts.__getitem__)
    layers, outside = made[width]
    # Where parts do not add up to the truth, a limit can be met by their sum and yet not by the model.
    short = goal.limit if leasts[width] > goal.limit else int(leasts[width]) - 1
    reason = explain_infeasible(layers, short, uniform, outside, goal.unit).partition(": ")[2].rstrip(".")
    least = "" if math.isinf(leasts[width]) else f" ({goal.again(int(leasts[width]))})"
    return UserError(
        f"{goal.asked} leaves {goal.limit:,} of {goal.dense:,} {goal.unit}, which pruning "
        f"{','.join(recipe.axes)} cannot reach: {reason}{least}; more --axes or a smaller --multiple go further."
    )


def find_least_cost(layers: Sequence[LayerChoice], outside: int, uniform: bool) -> float:
    """Return the cost of the smallest model at a hidden width; infinity where layers share no counts."""
    stay = [layer for layer in layers if layer.drop_loss is None]
    least = [find_least(curves, uniform) for curves in ([x.attention for x in stay], [x.mlp for x in stay])]
    fixed = outside + sum(layer.fixed for layer in stay)
    return fixed + sum(math.inf if found is None else found[1] for found in least)


def fill_layers(findings: Findings, width: int, allocation: Allocation) -> Plan:
    """Pick the units of an allocation by the layers' rankings."""
    rows = tuple(
        LayerPlan(layer.index, layer.kv.keep(pick[0]), layer.ffn.keep(pick[1]))
        for layer, pick in zip(findings.layers, allocation.picks, strict=True)
        if pick is not None
    )
    return Plan(findings.keep_hidden(width), rows)


def split_loss(findings: Findings, prices: Prices, plan: Plan, width: int) -> dict[str, float]:
    """Return the predicted loss of a plan by axis."""
    rows = {row.layer: row for row in plan.layers}
    losses = dict.fromkeys(("ffn", "kv", "hidden", "layers"), 0.0)
    losses["hidden"] = price_hidden(findings, prices, width)
    for layer in findings.layers:
        row = rows.get(layer.index)
        if row is None:
            losses["layers"] += price(prices.axis.get("layers", 1.0), layer.drop_damage)
            continue
        kv_price, ffn_price = prices.of_layer(layer.index)
        losses["kv"] += price(kv_price, layer.kv_damage(len(row.kv_groups)))
        losses["ffn"] += price(ffn_price, layer.ffn_damage(len(row.ffn)))
    return losses


def influence_plan(spec: ModelSpec, findings: Findings, recipe: Recipe) -> Plan:
    """Return the plan that drops layers of least block influence until the budget is met (ShortGPT, methods 8.2)."""
    budget, full = int(recipe.keep * spec.shape.layer_parameters), keep_everything(spec.shape)
    for count in range(len(findings.drop_order) + 1):
        gone = findings.drop_order[:count]
        plan = replace(full, layers=tuple(row for row in full.layers if row.layer not in gone))
        if plan_shape(plan, spec.shape).layer_parameters <= budget:
            return replace(plan, notes=describe_choice(spec, findings, plan, {}))
    raise UserError(
        f"--keep {recipe.keep:g} cannot be met by dropping layers: only {len(findings.drop_order)} of "
        f"{len(spec.layers)} may go; keep more, or allow more --axes."
    )


def ratio_plan(spec: ModelSpec, findings: Findings, recipe: Recipe, goal: Goal | None = None) -> Plan:
    """Return the plan of a stated layer ratio over KV and FFN: `equal`, `softmax` (SlimLLM) or `zscore` (FLAP)."""
    budget = find_budget(spec.shape, recipe.keep)
    costs = [find_costs(layer, spec.shape.hidden) for layer in spec.shape.layers]
    step = min(step_size(layer.ffn, recipe, goal.ffn_step if goal else 0) for layer in spec.shape.layers)
    counters: dict[str, Callable[..., tuple[Counts, ...]]] = {
        "equal": uniform_counts, "softmax": slim_counts, "zscore": flap_counts,
    }  # fmt: skip
    # FLAP standardises its scores by itself; doing it again would enlarge attention.
    options = {"standard": recipe.score == "flap"} if recipe.ratio == "zscore" else {}
    counts = counters[recipe.ratio](findings.layers, costs, budget, step=step, **options)
    rows = tuple(
        LayerPlan(layer.index, layer.kv.keep(kv), layer.ffn.keep(ffn))
        for layer, (kv, ffn) in zip(findings.layers, counts, strict=True)
    )
    plan = Plan(findings.keep_hidden(spec.shape.hidden), rows)
    notes: dict[str, Any] = describe_choice(spec, findings, plan, {})
    return replace(plan, notes=notes)
