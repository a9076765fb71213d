"""Plans that are tried: what is measured, what is learnt from, and which plan is taken."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_findings import make_spec
from refusals import refused
from test_decoder import run_decoder
from tiny import make_checkpoint
from torch import Tensor

import compress.surgery.rebuild
import compress.trials
from compress.calibrate import fill_embeddings
from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.choose import Choice, Prices, choose_plan
from compress.errors import UserError
from compress.importance.findings import Findings
from compress.pipeline import Task, compress_checkpoint, find_units
from compress.plan import LayerPlan, Plan, keep_everything, plan_shape
from compress.probe import CUTS, LEAST, cut_spec, price_damage, probe_damage, probe_plans, run_probes, weigh_axes
from compress.recipe import AXES, Recipe
from compress.settle import settle_plan
from compress.surgery.describe import new_config
from compress.surgery.ends import cut_ends, finish_norm, storage_types
from compress.surgery.job import Rebuild, open_streams, start_pruned
from compress.surgery.rebuild import rebuild_layers
from compress.text import Windows
from compress.trials import (
    LEARNED,
    MEASURED,
    TRIALS,
    Bench,
    count_trials,
    describe_trial,
    list_choices,
    make_prices,
    measure_plan,
    pick_windows,
    price_axes,
    search_plan,
)
from compress.weights import read_spec

IDS = torch.randint(3, 96, (10, 16), generator=torch.Generator().manual_seed(8))
RECIPE = Recipe(keep=0.6, multiple=8, trials=3)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bench on a tiny model with its findings; the model and the findings are made once."""

    @cache
    def open_case(case: str) -> tuple[Bench, Findings]:
        checkpoint = open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model") / "dense", case))
        bench = Bench(checkpoint, read_spec(checkpoint), Windows(IDS, "random"), RECIPE)
        return bench, find_units(Task(bench.checkpoint, bench.spec, bench.windows, bench.recipe))

    def open_with(case: str, **changes: Any) -> tuple[Bench, Findings]:
        bench, findings = open_case(case)
        return replace(bench, recipe=replace(RECIPE, **changes)), findings

    return open_with


def ignore(stage: str, done: int, total: int) -> None:
    pass


HALF = Plan(
    tuple(range(0, 48, 3)) + (46, 47),
    (LayerPlan(0, (0, 2), tuple(range(0, 56, 2))), LayerPlan(2, (1,), tuple(range(40))), LayerPlan(3, (0, 1), (5, 9))),
)
HALF = replace(HALF, hidden=tuple(sorted(HALF.hidden)))


# The search


@pytest.mark.parametrize("shapes", ["uniform", "per-layer"])
def test_the_plan_that_measures_best_is_taken(shapes: str, load: Any) -> None:
    bench, findings = load("llama", shapes=shapes)
    reports: list[tuple[str, int, int]] = []
    plan = search_plan(bench, findings, lambda *report: reports.append(report))
    tried = plan.notes["tried"]
    assert len(tried) == 3
    assert plan.notes["measured_loss"] == min(entry["loss"] for entry in tried)
    best = min(tried, key=lambda entry: entry["loss"])
    assert best == {
        "loss": plan.notes["measured_loss"],
        "layers": len(plan.layers),
        "hidden": len(plan.hidden),
        "kv_groups": [len(row.kv_groups) for row in plan.layers],
        "ffn": [len(row.ffn) for row in plan.layers],
    }
    assert measure_plan(bench, plan) == pytest.approx(plan.notes["measured_loss"], abs=6e-5)
    assert len({json.dumps(entry) for entry in tried}) == 3
    assert plan_shape(plan, bench.spec.shape).layer_parameters <= 0.6 * bench.spec.shape.layer_parameters
    assert plan.notes["kept_fraction"] <= 0.6
    json.dumps(plan.to_json())
    assert [each for each in reports if each[0] == "try plans"] == [("try plans", done, 3) for done in range(4)]
    priced = [each for each in reports if each[0] == "price axes"]
    assert priced == [("price axes", done, priced[0][2]) for done in range(priced[0][2] + 1)]


def test_not_the_prediction_but_the_measurement_decides(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, findings = load("llama")
    choices = list_choices(bench, findings, Prices({}))
    monkeypatch.setattr(compress.trials, "price_axes", lambda bench, findings, progress: {})
    for winner in range(3):
        losses = iter([0.0 if place == winner else 1.0 + place for place in range(3)])
        monkeypatch.setattr(compress.trials, "measure_plan", lambda bench, plan, losses=losses: next(losses))
        assert search_plan(bench, findings, ignore) == choices[winner].plan


def test_the_same_search_gives_the_same_plan(load: Any) -> None:
    bench, findings = load("qwen2", trials=2, axes=("ffn", "layers"))
    one, two = (search_plan(bench, findings, ignore) for _ in range(2))
    assert one.to_json() == two.to_json()


def test_choices_differ_and_come_best_prediction_first(load: Any) -> None:
    bench, findings = load("llama")
    prices = Prices({"layers": 0.5, "hidden": 0.2})
    for axes, wanted in ((AXES, {2, 3, 4}), (("layers", "ffn"), {2, 3, 4}), (("hidden",), {4})):
        recipe = replace(bench.recipe, axes=axes)
        choices = list_choices(replace(bench, recipe=recipe), findings, prices)
        losses = [choice.loss for choice in choices]
        assert losses == sorted(losses)
        assert choices[0].plan == choose_plan(bench.spec, findings, recipe, prices).plan
        assert len({(choice.plan.hidden, choice.plan.layers) for choice in choices}) == len(choices)
        for choice in choices:
            assert plan_shape(choice.plan, bench.spec.shape).layer_parameters <= 0.6 * bench.spec.shape.layer_parameters
        assert {len(choice.plan.layers) for choice in choices} == wanted


@pytest.mark.parametrize("trials", [0, 3])
def test_a_budget_out_of_reach_is_refused(trials: int, load: Any) -> None:
    bench, findings = load("llama", axes=("kv",), keep=0.05, trials=trials)
    refused(lambda: search_plan(bench, findings, ignore), "--keep 0.05", "must stay", "--axes")


# Without trials


def forbid(*_: object) -> None:
    raise AssertionError("must not be called")


def test_without_trials_the_probes_of_single_axes_decide(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, findings = load("llama", trials=0)
    axis = weigh_axes(bench.checkpoint, bench.spec, findings, bench.windows)
    assert set(axis) == set(AXES)
    monkeypatch.setattr(compress.trials, "measure_plan", forbid)
    plan = search_plan(bench, findings, forbid)
    assert plan == choose_plan(bench.spec, findings, bench.recipe, Prices(axis)).plan
    assert "tried" not in plan.notes
    monkeypatch.setattr(compress.trials, "weigh_axes", lambda *_: {"layers": 1e-9})
    assert len(search_plan(bench, findings, forbid).layers) == 2
    monkeypatch.setattr(compress.trials, "weigh_axes", forbid)  # one axis alone needs no price
    one = replace(bench, recipe=replace(bench.recipe, axes=("ffn",), keep=0.8))
    assert search_plan(one, findings, forbid) == choose_plan(bench.spec, findings, one.recipe, Prices({})).plan
    stated = replace(one.recipe, axes=("ffn", "kv"), ratio="softmax", shapes="per-layer", trials=5)
    plan = search_plan(replace(bench, recipe=stated), findings, forbid)
    assert plan == choose_plan(bench.spec, findings, stated, Prices({})).plan


def test_plans_are_settled_either_way(load: Any) -> None:
    for trials in (0, 2):
        bench, findings = load("glm4", trials=trials, absorb="all", depth="clap", axes=("layers",), keep=0.8)
        plan = search_plan(bench, findings, ignore)
        assert len(plan.layers) == 3
        assert all(len(row.absorbed) == 2 for row in plan.layers)
        bare = replace(plan, layers=tuple(replace(row, absorbed=(), merged=()) for row in plan.layers))
        every = keep_everything(bench.spec.shape)
        bare = replace(every, layers=tuple(row for row in every.layers if row.layer in bare.kept_layers))
        assert plan == settle_plan(bench.checkpoint, bench.spec, findings, bench.recipe, bare)
        assert any(row.merged for row in plan.layers)


def test_how_many_plans_are_tried() -> None:
    def count(windows: int, large: bool = False, **recipe: Any) -> int:
        spec = make_spec("llama", **({"intermediate_size": 2**15, "num_hidden_layers": 8} if large else {}))
        return count_trials(Bench(None, spec, Windows(IDS[:windows], "random"), Recipe(**recipe)))  # type: ignore[arg-type]

    assert count(10) == TRIALS
    assert count(10, large=True) == 0
    assert count(10, large=True, trials=3) == 3
    assert count(10, trials=0) == 0
    assert count(10, repair="none") == 0
    assert count(10, repair="none", trials=2) == 2
    assert count(1) == 0
    assert count(2) == TRIALS
    assert count(1, trials=0) == 0
    refused(lambda: count(1, trials=2), "--trials 2", "two windows", "--trials 0")


# What is measured


@pytest.mark.parametrize("count", [2, 3, 5, *(LEARNED + MEASURED + near for near in (-1, 0, 1)), 100, 1000])
def test_windows_that_measure_are_others_than_those_that_teach(count: int) -> None:
    windows, measured = pick_windows(Windows(torch.arange(count)[:, None], "x"))
    places = windows.ids[:, 0].tolist()
    assert places == sorted(set(places))
    assert 1 <= measured == min(MEASURED, max(1, count // 4))
    assert 1 <= len(places) - measured == min(LEARNED, count - measured)
    assert (places[0], places[-1]) == (0, count - 1)
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1  # spread over the whole text


def divergence(dense: Tensor, found: Tensor) -> float:
    """Mean over tokens of sum p (ln p - ln q), `[..., vocab]` logits, float64."""
    p, q = dense.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("norms", ["calibrated", "slnp"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "granite", "phi3"])
def test_a_trial_measures_the_model_that_a_run_on_its_learnt_windows_writes(
    case: str, norms: str, load: Any, tmp_path: Path
) -> None:
    """So the windows that measure teach nothing, and no shape or norm of a trial is other than in a real run."""
    bench, _ = load(case, norms=norms, refine=0)
    rows = tuple(replace(row, kv_groups=(0, 2), ffn=(1, 5, 7)) for row in HALF.layers)
    plan = Plan(tuple(range(24)), rows)
    windows, measured = pick_windows(bench.windows)
    learned = windows.take(len(windows.ids) - measured)
    with CheckpointWriter(tmp_path / "out", new_config(bench.spec, plan, bench.recipe)) as writer:
        compress_checkpoint(Task(bench.checkpoint, bench.spec, learned, bench.recipe), plan, writer)
        writer.finish()
    ids = windows.ids[-measured:]
    dense, found = (run_decoder(folder, ids, torch.float64) for folder in (bench.checkpoint.folder, tmp_path / "out"))
    wanted = divergence(dense, found)
    assert wanted > 0.05
    assert measure_plan(bench, plan) == pytest.approx(wanted, rel=1e-3)


def rebuild(bench: Bench, plan: Plan, ids: Tensor, measured: int) -> list[Tensor]:
    """All tensors of a trial's model."""
    new, windows = describe_trial(bench, plan), Windows(ids, "random")
    with ExitStack() as stack:
        types = storage_types(bench.checkpoint, bench.spec, new)
        job = Rebuild(bench.checkpoint, bench.spec, new, plan, replace(bench.recipe, refine=0), types)
        streams = open_streams(stack, job, windows, measured)
        fill_embeddings(bench.checkpoint, bench.spec, windows, streams.dense)
        start_pruned(new, windows, streams, cut_ends(job, ("embed",))["embed"])
        tensors = [tensor for weights in rebuild_layers(job, streams) for tensor in weights.values()]
        return [*tensors, finish_norm(job, streams)]


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "biases": {"biases": "own"},
    "diagonal, own target": {"repair": "diagonal", "biases": "own", "target": "own", "axes": ("ffn", "kv", "layers")},
    "bias, dense target": {"repair": "bias", "biases": "own", "target": "dense", "inputs": "none"},
    "absorbed": {"absorb": "all"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["llama", "glm4"])
def test_nothing_is_learnt_from_windows_that_measure(case: str, variant: str, load: Any) -> None:
    bench, _ = load(case, **VARIANTS[variant])
    plan = HALF if "axes" not in VARIANTS[variant] else replace(HALF, hidden=tuple(range(48)))
    if case == "glm4" and ("absorb" in VARIANTS[variant] or bench.recipe.repair == "bias"):  # a bias needs its place
        plan = replace(plan, layers=tuple(replace(row, absorbed=(("mlp_out", 0.7),)) for row in plan.layers))
    other = (IDS + 7) % 93 + 3
    before = rebuild(bench, plan, IDS, 3)
    measured = rebuild(bench, plan, torch.cat((IDS[:-3], other[-3:])), 3)
    assert all(torch.equal(one, two) for one, two in zip(before, measured, strict=True))
    learned = rebuild(bench, plan, torch.cat((other[:1], IDS[1:])), 3)
    changed = [not torch.equal(one, two) for one, two in zip(before, learned, strict=True)]
    assert sum(changed) >= 2 * len(plan.layers)


def test_a_trial_is_the_closed_form(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress.surgery.rebuild, "refine_layer", forbid)
    losses = []
    for refine in (-1, 0, 7):
        bench, findings = load("llama", refine=refine, trials=1, axes=("kv",), keep=0.9)
        losses.append(measure_plan(bench, HALF))
        assert "tried" in search_plan(bench, findings, ignore).notes
    assert len(set(losses)) == 1


def test_keeping_everything_measures_nothing(load: Any) -> None:
    for case in ("llama", "olmo2", "gemma3_text"):
        bench, _ = load(case, norms="slnp", inputs="none", repair="none")
        assert measure_plan(bench, keep_everything(bench.spec.shape)) < 1e-6


def test_repairs_and_biases_count_in_a_trial(load: Any) -> None:
    for case in ("llama", "qwen2", "phi3"):
        losses = {}
        for repair, biases in (("none", "none"), ("bias", "own"), ("lstsq", "none"), ("lstsq", "own")):
            bench, _ = load(case, repair=repair, biases=biases)
            losses[repair, biases] = measure_plan(bench, HALF)
            assert {"o", "down"} <= set(describe_trial(bench, HALF).layers[0].shape.biases) or biases == "none"
        assert len(set(losses.values())) == len(losses)  # random weights: nothing here says which should be less


# Prices


def test_prices_of_axes_are_measured_loss_over_damage(load: Any) -> None:
    bench, findings = load("llama", keep=0.7)
    prices = make_prices(findings, price_axes(bench, findings)).axis
    assert set(prices) == set(AXES)
    cuts = {"ffn": 0.3, "kv": 0.3, "hidden": 0.15, "layers": 0.15}
    for axis, plan in probe_plans(bench.spec, findings, cuts).items():
        wanted = measure_plan(bench, plan) / probe_damage(findings, plan, axis)
        assert prices[axis] == pytest.approx(wanted, rel=1e-6)
    two = replace(bench, recipe=replace(bench.recipe, axes=("ffn", "layers")))
    found = make_prices(findings, price_axes(two, findings)).axis
    assert found == {axis: prices[axis] for axis in ("ffn", "layers")}


def test_prices_give_back_what_the_probes_measured_whatever_the_shares_of_layers(load: Any) -> None:
    bench, findings = load("llama", keep=0.7)
    measured = price_axes(bench, findings)
    shares = {layer.index: (0.5 + layer.index, 2.0 - 0.4 * layer.index) for layer in findings.layers}
    prices = make_prices(findings, measured, shares)
    for axis, (added, plan) in measured.items():
        assert prices.axis[axis] * probe_damage(findings, plan, axis, shares) == pytest.approx(max(added, LEAST))
    assert prices.axis["ffn"] != make_prices(findings, measured).axis["ffn"]


def test_absorption_is_no_axis_s_price(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, findings = load("glm4", absorb="all", axes=("ffn",))
    full = len(bench.spec.layers) * bench.spec.shape.layers[0].ffn
    lost = lambda plan: 3.0 + (full - sum(len(row.ffn) for row in plan.layers)) / full  # noqa: E731
    monkeypatch.setattr(compress.trials, "measure_plan", lambda bench, plan: lost(plan))
    ((added, plan),) = price_axes(bench, findings).values()
    assert added == pytest.approx(lost(plan) - 3.0)


def test_merged_groups_are_priced_as_they_are_tried(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, findings = load("llama", depth="clap", axes=("layers",))
    seen: list[Plan] = []
    monkeypatch.setattr(compress.trials, "measure_plan", lambda bench, plan: seen.append(plan) or 1.0)
    price_axes(bench, findings)
    assert [len(plan.layers) for plan in seen] == [3]
    assert any(row.merged for row in seen[0].layers)


def test_a_probe_that_tells_nothing_sets_no_price() -> None:
    assert price_damage(0.3, 0.1) == pytest.approx(3.0)
    assert price_damage(-1.0, 0.1) == price_damage(0.0, 0.1) == LEAST / 0.1
    assert price_damage(0.5, 0.0) == price_damage(0.0, 1e-12) == 1.0


def test_probes_cut_one_axis_each(load: Any) -> None:
    bench, findings = load("llama")
    spec = bench.spec
    plans = probe_plans(spec, findings, CUTS)
    full = keep_everything(spec.shape)
    assert set(plans) == set(AXES)
    sizes = {
        axis: (len(plan.layers), len(plan.hidden), *{(len(x.kv_groups), len(x.ffn)) for x in plan.layers})
        for axis, plan in plans.items()
    }
    assert sizes == {
        "ffn": (4, 48, (3, 42)), "hidden": (4, 40, (3, 56)), "kv": (4, 48, (2, 56)), "layers": (3, 48, (3, 56)),
    }  # fmt: skip
    for axis, plan in plans.items():
        assert probe_damage(findings, plan, axis) > 0
        for other in AXES:
            if axis not in (other, "layers"):
                assert probe_damage(findings, plan, other) == pytest.approx(0.0, abs=1e-12)
        assert probe_damage(findings, full, axis) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2"])
def test_probed_losses_are_those_of_the_cut_models(case: str, load: Any, tmp_path: Path) -> None:
    """Side by side, a layer at a time, against each model written and run whole."""
    bench, findings = load(case, repair="none", norms="slnp", inputs="none")
    plans = {**probe_plans(bench.spec, findings, CUTS), "dense": keep_everything(bench.spec.shape)}
    losses = run_probes(bench.checkpoint, bench.spec, plans, IDS)
    for axis, plan in plans.items():
        try:
            config = new_config(bench.spec, plan)
        except UserError:
            continue  # no stock class takes the shape; a probe runs it all the same
        with CheckpointWriter(tmp_path / axis, config) as writer:
            compress_checkpoint(Task(bench.checkpoint, bench.spec, bench.windows, bench.recipe), plan, writer)
            writer.finish()
        logits = run_decoder(tmp_path / axis, IDS, torch.float64)[:, :-1]
        wanted = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        assert losses[axis] == pytest.approx(float(wanted), rel=1e-5)
    assert losses.keys() == plans.keys()
    assert cut_spec(bench.spec, plans["kv"]).shape == plan_shape(plans["kv"], bench.spec.shape)


def test_layers_are_priced_by_their_sensitivity_where_they_may_differ(load: Any) -> None:
    bench, findings = load("llama", trials=0)
    assert compress.trials.price_layers(bench) == {}
    uneven = replace(bench, recipe=replace(bench.recipe, shapes="per-layer"))
    prices = compress.trials.price_layers(uneven)
    assert sorted(prices) == [layer.index for layer in findings.layers]
    for branch in range(2):
        values = [pair[branch] for pair in prices.values()]
        assert min(values) > 0
        assert len(set(values)) > 1
        assert sum(values) / len(values) == pytest.approx(1.0)


def test_joined_choices_take_turns_without_repeats(load: Any) -> None:
    bench, findings = load("llama", trials=0)
    first, second = list_choices(bench, findings, Prices({}))[:2]
    third = Choice(keep_everything(bench.spec.shape), 0.1)
    joined = compress.trials.join_choices([first, third], [second, first])
    assert [choice.plan for choice in joined] == [first.plan, second.plan, third.plan]
