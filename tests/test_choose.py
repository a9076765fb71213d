"""The choice of a shape: least predicted loss against enumeration, bounds, ratios, and what stock classes accept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from made_findings import change_layer, make_findings, make_spec
from refusals import refused

from compress.choose import Choice, Prices, Scope, choose_plan, full_scope, ratio_plan
from compress.errors import UserError
from compress.importance.findings import Findings, order_layers
from compress.importance.ratio import find_budget, find_costs, flap_counts
from compress.plan import LOSS_EXPONENT, LayerPlan, Plan, grid, keep_everything, plan_shape
from compress.recipe import AXES, Recipe
from compress.shapes import ModelShape
from compress.spec import ModelSpec
from compress.spec_writer import find_writer
from compress.surgery.describe import describe_new, new_config

# Two groups, twelve channels: small enough to list every plan.
SIZES = {
    "hidden_size": 24, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
SHAPES = ("uniform", "per-layer")
PRICES = (
    Prices({}),
    Prices({"ffn": 40.0, "hidden": 0.3}),
    Prices({"kv": 30.0, "hidden": 3.0, "layers": 0.02}),
    Prices({"layers": 0.1, "ffn": 5.0}, {0: (0.1, 4.0), 2: (3.0, 0.2)}),
)


def budget_of(spec: ModelSpec, recipe: Recipe) -> int:
    return int(recipe.keep * spec.shape.layer_parameters)


def sizes_of(plan: Plan) -> tuple[object, ...]:
    return len(plan.hidden), [(row.layer, len(row.kv_groups), len(row.ffn)) for row in plan.layers]


# Against enumeration


def list_rows(findings: Findings, recipe: Recipe) -> list[list[LayerPlan | None]]:
    """For every layer all that the axes allow, None for dropping it."""
    found: list[list[LayerPlan | None]] = []
    for layer in findings.layers:
        groups = range(1, len(layer.kv.order) + 1) if "kv" in recipe.axes else [len(layer.kv.order)]
        full = len(layer.ffn.order)
        channels = [*range(recipe.multiple, full, recipe.multiple), full] if "ffn" in recipe.axes else [full]
        pairs = product(groups, channels)
        rows: list[LayerPlan | None] = [LayerPlan(layer.index, layer.kv.keep(g), layer.ffn.keep(c)) for g, c in pairs]
        found.append(rows + [None] * ("layers" in recipe.axes and layer.index in findings.drop_order))
    return found


def list_plans(spec: ModelSpec, findings: Findings, recipe: Recipe) -> Iterator[Plan]:
    """Every plan that the axes, the steps and the shapes allow, whatever it costs."""
    hidden = spec.shape.hidden
    widths = range(recipe.multiple, hidden + 1, recipe.multiple) if "hidden" in recipe.axes else [hidden]
    for width, rows in product(widths, product(*list_rows(findings, recipe))):
        plan = Plan(findings.keep_hidden(width), tuple(row for row in rows if row is not None))
        if recipe.shapes == "per-layer" or can_be_even(spec, plan):
            yield plan


def can_be_even(spec: ModelSpec, plan: Plan) -> bool:
    """All layers alike, and some stock class takes them."""
    shape = plan_shape(plan, spec.shape)
    return shape.uniform and find_writer(spec, shape) is not None


def find_best(spec: ModelSpec, rated: list[tuple[float, int, Plan]], recipe: Recipe) -> float | None:
    """The least loss within the budget; layers that come out alike must suit a stock class, whatever was allowed."""
    fitting = [(loss, plan) for loss, cost, plan in rated if cost <= budget_of(spec, recipe)]
    loss, plan = min(fitting, key=lambda pair: pair[0], default=(None, None))
    if plan is None or not plan_shape(plan, spec.shape).uniform or can_be_even(spec, plan):
        return loss
    return min((loss for loss, plan in fitting if can_be_even(spec, plan)), default=None)


def add_losses(findings: Findings, prices: Prices, plan: Plan) -> float:
    """The predicted loss of a plan: price x damage^1.2, summed over all that was cut."""
    rows, axis = {row.layer: row for row in plan.layers}, {**dict.fromkeys(AXES, 1.0), **prices.axis}
    total = axis["hidden"] * findings.hidden_damage(len(plan.hidden)) ** LOSS_EXPONENT
    for layer in findings.layers:
        attention, mlp = prices.layers.get(layer.index, (1.0, 1.0))
        if layer.index not in rows:
            total += axis["layers"] * (layer.change / layer.energy) ** LOSS_EXPONENT
            continue
        gone = len(layer.kv.order) - len(rows[layer.index].kv_groups), len(layer.ffn.order) - len(rows[layer.index].ffn)
        total += axis["kv"] * attention * (layer.kv.damage[gone[0]] / layer.energy) ** LOSS_EXPONENT
        total += axis["ffn"] * mlp * (layer.ffn.damage[gone[1]] / layer.energy) ** LOSS_EXPONENT
    return total


@pytest.mark.parametrize("axes", [AXES, ("ffn", "kv"), ("hidden",), ("layers", "hidden"), ("kv", "layers")], ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("case", ["mistral", "gemma2"])
def test_the_choice_equals_enumeration(case: str, shapes: str, axes: tuple[str, ...]) -> None:
    """Gemma's class wants heads that divide the width: 4 heads do not divide 18, nor 6."""
    spec = make_spec(case, **SIZES, num_hidden_layers=3 if shapes == "per-layer" and axes == AXES else 4)
    findings = make_findings(spec, seed=len(axes))
    recipe = Recipe(axes=axes, shapes=shapes, multiple=6)
    every = list(list_plans(spec, findings, recipe))
    costs = [plan_shape(plan, spec.shape).layer_parameters for plan in every]
    for prices in PRICES:
        rated = [(add_losses(findings, prices, plan), cost, plan) for plan, cost in zip(every, costs, strict=True)]
        for keep in (0.35, 0.6, 0.85):
            recipe = replace(recipe, keep=keep)
            best = find_best(spec, rated, recipe)
            if best is None:
                refused(lambda r=recipe, p=prices: choose_plan(spec, findings, r, p), f"--keep {keep:g}")
                continue
            choice = choose_plan(spec, findings, recipe, prices)
            assert plan_shape(choice.plan, spec.shape).layer_parameters <= budget_of(spec, recipe)
            assert choice.loss == pytest.approx(best, rel=1e-9)
            assert add_losses(findings, prices, choice.plan) == pytest.approx(best, rel=1e-9)
            assert sum(choice.plan.notes["predicted_loss"].values()) == pytest.approx(best, abs=3e-5)


# Bounds


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("multiple", [0, 1, 12])
@pytest.mark.parametrize("axes", [AXES, ("ffn",), ("ffn", "kv"), ("hidden",), ("layers",), ("kv", "layers")], ids=str)
def test_the_choice_obeys_budget_axes_and_multiples(
    axes: tuple[str, ...], multiple: int, keep: float, shapes: str
) -> None:
    spec = make_spec("mistral", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=6)
    findings = make_findings(spec, pinned=(5, 9))
    recipe = Recipe(keep=keep, axes=axes, multiple=multiple, shapes=shapes)
    try:
        plan = choose_plan(spec, findings, recipe, Prices({})).plan
    except UserError as error:
        # What the axes take at most leaves this much: embeddings and what else must stay are out of reach.
        assert axes != AXES and str(error).startswith(f"--keep {keep:g} ")
        return
    shape = plan_shape(plan, spec.shape)
    assert shape.layer_parameters <= budget_of(spec, recipe)
    assert shape.uniform or shapes == "per-layer"
    assert set(plan.hidden) >= {5, 9}
    assert shape.hidden in (48, *range(multiple or 16, 48, multiple or 16))
    assert {0, 5} <= set(plan.kept_layers)
    assert all(layer.ffn in (56, *range(multiple or 8, 56, multiple or 8)) for layer in shape.layers)
    for axis, changed in (
        ("ffn", {layer.ffn for layer in shape.layers} != {56}),
        ("kv", {layer.kv_heads for layer in shape.layers} != {4}),
        ("hidden", shape.hidden != 48),
        ("layers", len(plan.layers) < 6),
    ):
        assert axis in axes or not changed


@pytest.mark.parametrize("axes", [("ffn",), ("kv",), ("hidden",), ("layers",)])
def test_each_axis_alone_is_used(axes: tuple[str, ...]) -> None:
    spec = make_spec("mistral", num_hidden_layers=6)
    plan = choose_plan(spec, make_findings(spec), Recipe(keep=0.85, axes=axes, multiple=4), Prices({})).plan
    assert plan != keep_everything(spec.shape)


@pytest.mark.parametrize("count", [1, 9, 17, 40])
def test_pinned_channels_set_the_least_width(count: int) -> None:
    spec = make_spec("mistral")
    findings = make_findings(spec, pinned=tuple(range(count)))  # of the lowest scores
    widths = full_scope(spec, findings, Recipe(multiple=8)).widths
    assert widths == grid(48, 8, max(count, 8))
    cheap = Prices({"hidden": 1e-9})
    plan = choose_plan(spec, findings, Recipe(keep=0.95, multiple=8), cheap).plan
    assert set(findings.pinned) <= set(plan.hidden)
    tight = choose_plan(spec, findings, Recipe(keep=max(0.3, count / 45), multiple=8), cheap).plan
    assert len(tight.hidden) < 48
    assert set(findings.pinned) <= set(tight.hidden)


def test_units_that_stay_are_those_of_the_rankings() -> None:
    spec = make_spec("mistral")
    findings = make_findings(spec, pinned=(1,))
    plan = choose_plan(spec, findings, Recipe(keep=0.5, multiple=8), Prices({})).plan
    width = len(plan.hidden)
    assert plan.hidden == (1, *range(48 - width + 1, 48))
    for row in plan.layers:
        layer = findings.layers[row.layer]
        assert set(row.kv_groups) == set(layer.kv.order[3 - len(row.kv_groups) :])
        assert set(row.ffn) == set(layer.ffn.order[56 - len(row.ffn) :])


def test_the_same_findings_give_the_same_plan() -> None:
    spec = make_spec("llama")
    for shapes in SHAPES:
        recipe = Recipe(keep=0.6, multiple=4, shapes=shapes)
        one, two = (choose_plan(spec, make_findings(spec), recipe, PRICES[2]) for _ in range(2))
        assert one == two
        assert one.plan.to_json() == two.plan.to_json()


def test_notes_say_what_the_plan_does() -> None:
    spec = make_spec("llama")
    plan = choose_plan(spec, make_findings(spec, (3,)), Recipe(keep=0.5), Prices({"layers": 1e-3})).plan
    shape = plan_shape(plan, spec.shape)
    assert plan.notes["parameters"] == shape.parameters
    assert plan.notes["dense_parameters"] == spec.shape.parameters
    assert plan.notes["kept_fraction"] == shape.layer_parameters / spec.shape.layer_parameters <= 0.5
    assert plan.notes["pinned_channels"] == [3]
    assert plan.notes["skipped_sink_tokens"] == 7
    assert plan.notes["dropped_layers"] == [i for i in range(4) if i not in plan.kept_layers] != []
    json.dumps(plan.to_json())


# Refusals


@pytest.mark.parametrize(
    ("shapes", "axes", "words"),
    [
        ("uniform", ("kv",), ["kv", "layers 0-3 must stay", "1 KV groups and 56 FFN channels", "FFN channels"]),
        ("per-layer", ("kv",), ["kv", "layers 0-3 must stay", "1 KV groups and 56 FFN channels"]),
        ("uniform", ("layers",), ["layers", "layers 0, 3 must stay", "3 KV groups and 56 FFN channels"]),
        ("uniform", ("hidden",), ["hidden", "layers 0-3 must stay"]),
        ("per-layer", AXES, ["ffn,kv,hidden,layers", "layers 0, 3 must stay", "1 KV groups and 8 FFN channels"]),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_the_least_that_is_in_reach(
    shapes: str, axes: tuple[str, ...], words: list[str]
) -> None:
    spec, recipe = make_spec("mistral"), Recipe(keep=0.01, axes=axes, shapes=shapes)
    findings = make_findings(spec)
    refused(
        lambda: choose_plan(spec, findings, recipe, Prices({})),
        "--keep 0.01", f"{spec.shape.layer_parameters:,}", "so that the least possible is", "--axes", *words,
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        choose_plan(spec, findings, recipe, Prices({}))
    least = float(str(caught.value).partition("(--keep ")[2].partition(")")[0])
    plan = choose_plan(spec, findings, replace(recipe, keep=least), Prices({})).plan
    assert least - 0.0011 < plan_shape(plan, spec.shape).layer_parameters / spec.shape.layer_parameters <= least
    with pytest.raises(UserError):
        choose_plan(spec, findings, replace(recipe, keep=least - 0.002), Prices({}))


def test_a_scope_that_drops_too_few_is_refused_with_its_own_least() -> None:
    spec = make_spec("mistral", num_hidden_layers=6)
    findings, recipe = make_findings(spec), Recipe(keep=0.4, axes=("layers",))
    assert len(choose_plan(spec, findings, recipe, Prices({})).plan.layers) == 2
    few = Scope((48,), 2)
    refused(lambda: choose_plan(spec, findings, recipe, Prices({}), few), "must stay", "--keep 0.667)")


def test_layers_that_share_no_count_are_refused() -> None:
    """A dense model of uneven layers, as a compression with --shapes per-layer leaves it."""
    uneven = {"1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}}
    spec = make_spec("mistral", per_layer_config=uneven)
    findings, recipe = make_findings(spec), Recipe(keep=0.8, axes=("ffn",), multiple=8)
    refused(
        lambda: choose_plan(spec, findings, recipe, Prices({})), "share no allowed number of KV groups", "uneven layers"
    )
    for shapes, axes in (("per-layer", ("ffn",)), ("uniform", ("ffn", "kv")), ("per-layer", AXES)):
        plan = choose_plan(spec, findings, replace(recipe, shapes=shapes, axes=axes), Prices({"kv": 1e3})).plan
        shape = plan_shape(plan, spec.shape)
        assert shape.uniform == (shapes == "uniform")
        assert shape.layer_parameters <= budget_of(spec, recipe)
    assert [layer.kv_heads for layer in shape.layers] == [3, 2, 3, 3]  # free layers keep all that they have


# Uneven and even shapes


def draw_cases() -> Iterator[tuple[ModelSpec, Findings, Recipe, Prices]]:
    for seed, (case, keep) in enumerate(product(("llama", "gemma2", "qwen3", "phi3-longrope"), (0.4, 0.7))):
        spec = make_spec(case, num_hidden_layers=5)
        for prices in PRICES:
            yield spec, make_findings(spec, (2,), seed), Recipe(keep=keep, multiple=8), prices


def test_uneven_layers_never_lose_more_than_even_ones() -> None:
    gained = []
    for spec, findings, recipe, prices in draw_cases():
        even, uneven = (choose_plan(spec, findings, replace(recipe, shapes=shapes), prices) for shapes in SHAPES)
        assert uneven.loss <= even.loss * (1 + 1e-12)
        gained.append(uneven.loss < even.loss - 1e-4)
    assert sum(gained) > len(gained) // 2


def test_a_dear_layer_keeps_more() -> None:
    """Per-layer prices, as a probe of single layers gives them."""

    def units(plan: Plan, index: int) -> float:
        return len(plan.layers[index].kv_groups) / 3 + len(plan.layers[index].ffn) / 56

    spec = make_spec("mistral", num_hidden_layers=5)
    findings, recipe = make_findings(spec), Recipe(keep=0.4, multiple=4, shapes="per-layer", axes=("ffn", "kv"))
    plain = choose_plan(spec, findings, recipe, Prices({})).plan
    for index in range(5):
        mlp = choose_plan(spec, findings, recipe, Prices({}, {index: (1.0, 50.0)})).plan
        both = choose_plan(spec, findings, recipe, Prices({}, {index: (50.0, 50.0)})).plan
        assert len(mlp.layers[index].ffn) > len(plain.layers[index].ffn)
        assert units(both, index) > units(plain, index)
        cheap = choose_plan(spec, findings, recipe, Prices({}, {index: (1e-6, 1e-6)})).plan
        assert (len(cheap.layers[index].kv_groups), len(cheap.layers[index].ffn)) == (1, 4)
    scaled = choose_plan(spec, findings, recipe, Prices({"kv": 3.0, "ffn": 3.0}))
    assert scaled.plan == plain  # only their ratios decide
    assert Prices({"kv": 2.0}, {1: (3.0, 5.0)}).of_layer(1) == (6.0, 5.0)
    assert Prices({"kv": 2.0}, {1: (3.0, 5.0)}).of_layer(0) == (2.0, 1.0)


# Depth


@pytest.mark.parametrize("shapes", SHAPES)
def test_scopes_limit_how_many_layers_go(shapes: str) -> None:
    spec = make_spec("mistral", num_hidden_layers=7)
    findings, recipe = make_findings(spec), Recipe(keep=0.5, multiple=8, shapes=shapes)
    prices = Prices({"layers": 0.3})
    rated = [(layer.change / layer.energy, layer.index) for layer in findings.layers[1:-1]]
    cheapest = [index for _, index in sorted(rated)]
    full = choose_plan(spec, findings, recipe, prices)
    losses = []
    for count in range(6):
        scope = Scope(full_scope(spec, findings, recipe).widths, count, count)
        choice = choose_plan(spec, findings, recipe, prices, scope)
        assert choice.plan.notes["dropped_layers"] == sorted(cheapest[:count])
        assert choice.loss == pytest.approx(add_losses(findings, prices, choice.plan), rel=1e-9)
        assert choice.loss >= full.loss * (1 - 1e-12)
        assert plan_shape(choice.plan, spec.shape).layer_parameters <= budget_of(spec, recipe)
        at_most = choose_plan(spec, findings, recipe, prices, replace(scope, least_dropped=0))
        assert len(at_most.plan.notes["dropped_layers"]) <= count
        at_least = choose_plan(spec, findings, recipe, prices, replace(scope, most_dropped=5))
        assert set(at_least.plan.notes["dropped_layers"]) >= set(cheapest[:count])
        assert full.loss * (1 - 1e-12) <= at_least.loss <= choice.loss * (1 + 1e-12)
        losses.append(choice.loss)
        assert at_most.loss <= min(losses) * (1 + 1e-12)
    width = choose_plan(spec, findings, recipe, prices, Scope((32,), 5))
    assert len(width.plan.hidden) == 32
    assert width.loss >= full.loss * (1 - 1e-12)


def test_first_last_and_sink_layers_are_never_dropped() -> None:
    spec = make_spec("mistral", num_hidden_layers=7)
    findings = make_findings(spec)
    for index, sinks in enumerate((0, 1, 1, 9, 9, 10, 10)):  # they emerge in layer 2: after it there are nine
        findings = change_layer(findings, index, sinks=sinks)
    findings = replace(findings, drop_order=order_layers(list(findings.layers)))
    assert set(findings.drop_order) == {1, 3, 4, 5}
    free = Prices({"layers": 1e-9})
    for shapes in SHAPES:
        recipe = Recipe(keep=0.5, axes=("layers",), shapes=shapes)
        assert choose_plan(spec, findings, recipe, free).plan.kept_layers[0] == 0
        tight = choose_plan(spec, findings, replace(recipe, keep=0.45), free).plan
        assert tight.kept_layers == (0, 2, 6)
        with pytest.raises(UserError, match="layers 0, 2, 6 must stay"):
            choose_plan(spec, findings, replace(recipe, keep=0.4), free)


def test_depth_competes_with_width() -> None:
    spec = make_spec("mistral", num_hidden_layers=6)
    findings, recipe = make_findings(spec), Recipe(keep=0.6, multiple=8)
    dropped = [
        len(choose_plan(spec, findings, recipe, Prices({"layers": unit})).plan.notes["dropped_layers"])
        for unit in (1e-6, 1e-2, 1e6)
    ]
    assert dropped == sorted(dropped, reverse=True)
    assert (dropped[0] > 0, dropped[-1]) == (True, 0)


# Stated ratios


def state_ratio(ratio: str, keep: float, score: str = "obs") -> Recipe:
    shapes = "uniform" if ratio == "equal" else "per-layer"
    return Recipe(keep=keep, axes=("ffn", "kv"), ratio=ratio, multiple=4, score=score, shapes=shapes)


def rate(spec: ModelSpec, findings: Findings, ratio: str, keep: float, score: str = "obs") -> Plan:
    return ratio_plan(spec, findings, state_ratio(ratio, keep, score))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("ratio", ["equal", "softmax", "zscore"])
def test_ratios_stay_within_the_budget(ratio: str, keep: float) -> None:
    spec = make_spec("llama", num_hidden_layers=6)
    findings = make_findings(spec)
    plan = rate(spec, findings, ratio, keep)
    shape = plan_shape(plan, spec.shape)
    assert shape.layer_parameters <= int(keep * spec.shape.layer_parameters)
    one_step = 4 * 3 * spec.shape.hidden * len(spec.layers)
    assert shape.layer_parameters > keep * spec.shape.layer_parameters - one_step or ratio == "zscore"
    assert plan.kept_layers == tuple(range(6))
    assert plan.hidden == tuple(range(48))
    assert all(layer.ffn in (56, *range(4, 56, 4)) for layer in shape.layers)
    assert shape.uniform == (ratio == "equal")
    assert plan.notes["kept_fraction"] == shape.layer_parameters / spec.shape.layer_parameters
    choice = choose_plan(
        spec, findings, state_ratio(ratio, keep), Prices({"ffn": 9.0})
    )
    assert choice == Choice(plan, 0.0)  # prices do not matter
    for row in plan.layers:
        layer = findings.layers[row.layer]
        assert row.kv_groups == layer.kv.keep(len(row.kv_groups))
        assert row.ffn == layer.ffn.keep(len(row.ffn))


def test_softmax_takes_most_from_layers_that_change_the_stream_least() -> None:
    spec = make_spec("llama", num_hidden_layers=6)
    findings = make_findings(spec)
    for index in range(6):
        findings = change_layer(findings, index, influence=0.5 - 0.08 * index)
    kept = [len(row.ffn) + 56 * len(row.kv_groups) for row in rate(spec, findings, "softmax", 0.6).layers]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_scores_that_come_standardised_are_not_standardised_again() -> None:
    """FLAP's own score holds z-scores per layer and branch; those of others are brought to one scale first."""
    spec = make_spec("llama", num_hidden_layers=6)
    findings = make_findings(spec)
    layers = findings.layers
    for layer in layers:  # channels of a wider spread than groups, and some layers of a wider one
        score = tuple((3.0 + layer.index) * value for value in layer.ffn.score)
        findings = change_layer(findings, layer.index, ffn=replace(layer.ffn, score=score))
    budget = find_budget(spec.shape, 0.5)
    costs = [find_costs(layer, spec.shape.hidden) for layer in spec.shape.layers]
    plans = {score: rate(spec, findings, "zscore", 0.5, score) for score in ("flap", "wanda")}
    for score, plan in plans.items():
        wanted = flap_counts(findings.layers, costs, budget, standard=score == "flap", step=4)
        assert [(len(row.kv_groups), len(row.ffn)) for row in plan.layers] == list(wanted)
    assert plans["flap"] != plans["wanda"]


@pytest.mark.parametrize("ratio", ["equal", "softmax", "zscore"])
def test_a_ratio_that_cannot_be_met_is_refused(ratio: str) -> None:
    spec = make_spec("llama")
    refused(lambda: rate(spec, make_findings(spec), ratio, 0.05), "one KV group", "keep more")


# What stock configuration classes accept


def choose_many(spec: ModelSpec, recipe: Recipe, prices: Sequence[Prices] = PRICES) -> list[Plan]:
    findings, plans = make_findings(spec), []
    for price, keep in product((*prices, Prices({"hidden": 1e-9}), Prices({"kv": 1e-9})), (0.4, 0.6, 0.8)):
        try:
            plans.append(choose_plan(spec, findings, replace(recipe, keep=keep), price).plan)
        except UserError as error:
            assert "cannot reach" in str(error) or "head count" in str(error)
    assert plans
    return plans


def heads_divide(shape: ModelShape) -> bool:
    return all(shape.hidden % layer.query_heads == 0 for layer in shape.layers)


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text", "llama-biases", "pangu_embedded"])
def test_heads_that_no_stock_class_accepts_are_avoided_unless_layers_are_uneven(case: str) -> None:
    spec = make_spec(case, num_attention_heads=10, num_key_value_heads=5, hidden_size=40)
    recipe = Recipe(multiple=4)
    found = {shapes: choose_many(spec, replace(recipe, shapes=shapes)) for shapes in SHAPES}
    for shapes, plans in found.items():
        for plan in plans:
            shape = plan_shape(plan, spec.shape)
            describe_new(spec, plan, replace(recipe, shapes=shapes))  # refuses what cannot be written
            assert heads_divide(shape) or not shape.uniform
    assert any(not heads_divide(plan_shape(plan, spec.shape)) for plan in found["per-layer"])


@pytest.mark.parametrize("shapes", SHAPES)
def test_heads_decide_where_only_the_width_may_change(shapes: str) -> None:
    """All heads stay, and so does every channel: layers come out alike whatever was allowed."""
    spec = make_spec("gemma2")
    plans = choose_many(spec, Recipe(axes=("hidden",), multiple=4, shapes=shapes))
    assert {len(plan.hidden) for plan in plans} <= {12, 24, 36}
    assert {len(plan.hidden) for plan in choose_many(make_spec("mistral"), Recipe(axes=("hidden",), multiple=4))} - {
        12, 24, 36,
    }  # fmt: skip


def test_no_head_count_at_all_is_refused() -> None:
    spec = make_spec("gemma2")
    recipe = Recipe(keep=0.5, axes=("hidden",), multiple=20)  # 20 and 40; 6 heads divide neither
    refused(
        lambda: choose_plan(spec, make_findings(spec), recipe, Prices({}), Scope((20, 40), 0)),
        "--keep 0.5", "head count", "--axes", "--multiple",
    )  # fmt: skip


def test_longrope_lists_fix_the_hidden_size_per_head() -> None:
    spec = make_spec("phi3-longrope")
    shapes = [plan_shape(plan, spec.shape) for plan in choose_many(spec, Recipe(multiple=8))]
    assert all(shape.hidden // layer.query_heads == 8 for shape in shapes for layer in shape.layers)
    assert len({shape.hidden for shape in shapes}) > 1


def test_absorbed_norms_change_the_class_that_decides() -> None:
    """Without post-norms the Pangu sandwich is written as llama: with biases its heads must divide the width."""
    spec = make_spec("pangu_sandwich", attention_bias=True)
    free = choose_many(spec, Recipe(multiple=4))
    assert any(not heads_divide(plan_shape(plan, spec.shape)) for plan in free)
    for absorb in ("safe", "all"):
        plans = choose_many(spec, Recipe(multiple=4, absorb=absorb))
        assert all(heads_divide(plan_shape(plan, spec.shape)) for plan in plans)
        gone = (("attn_out", 1.0), ("mlp_out", 1.0))
        for plan in plans:
            new_config(spec, replace(plan, layers=tuple(replace(row, absorbed=gone) for row in plan.layers)))


def test_added_biases_change_the_class_that_decides() -> None:
    """Heads that do not divide are written as a family without biases, which is no way out for added ones."""
    spec = make_spec("llama")
    assert any(not heads_divide(plan_shape(plan, spec.shape)) for plan in choose_many(spec, Recipe(multiple=4)))
    for biases in ("stock", "own"):
        recipe = Recipe(multiple=4, biases=biases)
        plans = choose_many(spec, recipe)
        for plan in plans:
            assert {"o", "down"} <= set(describe_new(spec, plan, recipe).layers[0].shape.biases)
        assert all(heads_divide(plan_shape(plan, spec.shape)) for plan in plans) == (biases == "stock")


def test_random_findings_never_break_the_budget() -> None:
    for spec, findings, recipe, prices in draw_cases():
        scores = torch.rand(spec.shape.hidden, generator=torch.Generator().manual_seed(4))
        mixed = replace(findings, hidden_score=scores, hidden_energy=scores.expand(3, -1) ** 2)
        for shapes in SHAPES:
            choice = choose_plan(spec, mixed, replace(recipe, shapes=shapes), prices)
            assert plan_shape(choice.plan, spec.shape).layer_parameters <= budget_of(spec, recipe)
            assert 2 in choice.plan.hidden


def test_layers_of_least_influence_go_first() -> None:
    spec = make_spec("llama", num_hidden_layers=8)
    findings = make_findings(spec)
    plan = choose_plan(spec, findings, Recipe(keep=0.7, axes=("layers",), ratio="influence"), Prices({})).plan
    gone = sorted(set(range(8)) - set(plan.kept_layers))
    assert gone == sorted(findings.drop_order[: len(gone)])
    shape = plan_shape(plan, spec.shape)
    assert shape.layer_parameters <= 0.7 * spec.shape.layer_parameters < shape.layer_parameters * 8 / len(shape.layers)
    few = replace(findings, drop_order=findings.drop_order[:1])
    half = Recipe(keep=0.5, axes=("layers",), ratio="influence")
    refused(lambda: choose_plan(spec, few, half, Prices({})), "only 1 of 8")
