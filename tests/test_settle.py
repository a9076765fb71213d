"""What a plan's shape leaves open: norms that are absorbed, and groups of dropped layers that live on."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from made_findings import make_findings, make_spec
from refusals import refused
from tiny import FAMILIES, POST_NORM_FAMILIES, make_checkpoint
from torch import Tensor

from compress.checkpoint import Checkpoint, open_checkpoint
from compress.decoder import attention_branch, attention_context, make_frame, mlp_activation, project, run_layer
from compress.family import POST_NORMS
from compress.importance.findings import Findings
from compress.pipeline import Task, find_units
from compress.plan import LayerPlan, MergedGroups, Plan, keep_everything
from compress.probe import cut_spec
from compress.recipe import Recipe
from compress.settle import check_absorb, scale_merged, settle_plan
from compress.spec import ModelSpec
from compress.stats_norms import PostNormSums
from compress.surgery.cut import cut_layer
from compress.surgery.depth import check_merges, unlike_layers
from compress.surgery.ends import storage_types
from compress.surgery.job import Rebuild
from compress.text import Windows
from compress.weights import embed_rows, read_layer, read_spec

DOUBLE = torch.float64
IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(5))
Model = tuple[Checkpoint, ModelSpec, Findings]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoint, description and findings of a tiny model; made once."""

    @cache
    def open_case(case: str) -> Model:
        folder = make_checkpoint(tmp_path_factory.mktemp("model") / "dense", case)
        checkpoint = open_checkpoint(folder)
        task = Task(checkpoint, read_spec(checkpoint), Windows(IDS, "random"), Recipe())
        return checkpoint, task.spec, find_units(task)

    return open_case


def drop(spec: ModelSpec, *gone: int) -> Plan:
    full = keep_everything(spec.shape)
    return replace(full, layers=tuple(row for row in full.layers if row.layer not in gone), notes={"kept_fraction": 1})


# Absorption


def raw_outputs(model: Model, layer: int, role: str) -> tuple[Tensor, Tensor]:
    """Raw branch outputs `[tokens, hidden]` in front of a post-norm, and its gain, float64; no first tokens."""
    checkpoint, spec, _ = model
    x, frame = embed_rows(checkpoint, spec, IDS, DOUBLE), make_frame(spec, *IDS.shape, 0, DOUBLE)
    for index in range(layer):
        weights = read_layer(checkpoint, spec, index, DOUBLE)
        x, _ = run_layer(spec, spec.layers[index], weights, x, frame)
    weights = read_layer(checkpoint, spec, layer, DOUBLE)
    context, _ = attention_context(spec, spec.layers[layer], weights, x, frame)
    middle = x + attention_branch(spec, weights, context)
    inputs = context if role == "attn_out" else mlp_activation(spec, weights, middle)
    return project(weights, POST_NORMS[role][0], inputs)[:, 1:].flatten(0, 1), weights[role] + spec.norm_offset


def test_nothing_is_settled_unless_asked() -> None:
    """Neither the checkpoint nor the findings are looked at."""
    spec = make_spec("glm4")
    plan = drop(spec, 1)
    assert settle_plan(None, spec, None, Recipe(), plan) is plan  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["least-squares", "mean-inverse"])
@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_all_norms_are_absorbed_with_the_constants_that_fit(case: str, rule: str, load: Any) -> None:
    model = checkpoint, spec, findings = load(case)
    plan = settle_plan(checkpoint, spec, findings, Recipe(absorb="all", absorb_constant=rule), drop(spec, 2))
    assert plan.kept_layers == (0, 1, 3)
    for row in plan.layers:
        assert [role for role, _ in row.absorbed] == ["attn_out", "mlp_out"]
        for role, constant in row.absorbed:
            raw, gain = raw_outputs(model, row.layer, role)
            rms = (raw.pow(2).mean(-1, keepdim=True) + spec.eps).sqrt()
            best = ((gain * raw) ** 2 / rms).sum() / ((gain * raw) ** 2).sum()
            wanted = best if rule == "least-squares" else (1 / rms).mean()
            assert constant == pytest.approx(float(wanted), rel=1e-4)
    assert replace(plan, layers=tuple(replace(row, absorbed=()) for row in plan.layers)) == drop(spec, 2)


def test_notes_hold_a_report_of_every_norm(load: Any) -> None:
    checkpoint, spec, findings = load("glm4")
    plan = settle_plan(checkpoint, spec, findings, Recipe(absorb="all"), drop(spec, 1))
    assert plan.notes["kept_fraction"] == 1  # what was noted before stays
    reports = plan.notes["absorption"]
    assert [(x["layer"], x["norm"]) for x in reports] == [(i, n) for i in range(4) for n in ("attn_out", "mlp_out")]
    for report in reports:
        sums = findings.layers[report["layer"]].post_norms[report["norm"]].ordinary
        assert report["variation"] == pytest.approx(sums.variation, abs=1e-4)
        assert report["go"] == (sums.variation < 0.15)
        assert {"error", "sink_error", "peak"} <= report.keys()
    assert plan.notes["overflow"] == []
    json.dumps(plan.to_json())


def test_safe_absorbs_what_varies_little(load: Any) -> None:
    checkpoint, spec, findings = load("pangu_sandwich")
    found = {
        (layer.index, role): sums.ordinary.variation
        for layer in findings.layers
        for role, sums in layer.post_norms.items()
    }
    levels = sorted(found.values())
    for limit, count in ((0.0, 0), ((levels[2] + levels[3]) / 2, 3), (levels[-1] + 0.01, 8)):
        recipe = Recipe(absorb="safe", absorb_limit=limit)
        plan = settle_plan(checkpoint, spec, findings, recipe, keep_everything(spec.shape))
        absorbed = {(row.layer, role) for row in plan.layers for role, _ in row.absorbed}
        assert absorbed == {key for key, variation in found.items() if variation < limit}
        assert len(absorbed) == count
        assert sum(report["go"] for report in plan.notes["absorption"]) == count


def outgrow(findings: Findings, layer: int, role: str) -> Findings:
    """A single token of this branch put out huge values, and all others one tenth of them."""
    old = findings.layers[layer].post_norms[role]
    raw = torch.full((5, len(old.gain)), 1e5)
    raw[0] *= 10
    sums = PostNormSums(layer, role, old.gain, 1e-6, old.ordinary.empty(48), old.sinks.empty(48))
    sums.update(raw, torch.tensor([False, True, True, True, True]))
    sums = replace(sums, gain=old.gain * 1e5)
    layers = list(findings.layers)
    layers[layer] = replace(layers[layer], post_norms={**layers[layer].post_norms, role: sums})
    return replace(findings, layers=tuple(layers))


def test_overflow_is_said_of_norms_that_go_only(load: Any) -> None:
    checkpoint, spec, findings = load("glm4")
    findings = outgrow(findings, 2, "mlp_out")

    def warn(recipe: Recipe, *gone: int) -> list[str]:
        warnings: list[str] = settle_plan(checkpoint, spec, findings, recipe, drop(spec, *gone)).notes["overflow"]
        return warnings

    [warning] = warn(Recipe(absorb="all"))
    assert "layer 2" in warning and "MLP" in warning and "float16" in warning
    assert warn(Recipe(absorb="all"), 2) == []
    assert warn(Recipe(absorb="safe", absorb_limit=0.0)) == []
    assert len(warn(Recipe(absorb="safe", absorb_limit=1e9))) == 1


@pytest.mark.parametrize("case", FAMILIES)
def test_models_without_norms_to_absorb_are_refused(case: str) -> None:
    spec = make_spec(case)
    for absorb in ("safe", "all"):
        recipe = Recipe(absorb=absorb)
        if case in POST_NORM_FAMILIES:
            check_absorb(spec, recipe)
            continue
        words = ["before the", "never be normalised"] if case == "olmo2" else [f"--absorb {absorb}", "no norms behind"]
        for check in (
            lambda recipe=recipe: check_absorb(spec, recipe),
            lambda recipe=recipe: settle_plan(None, spec, make_findings(spec), recipe, drop(spec)),  # type: ignore[arg-type]
        ):
            refused(check, f"'{case}'", *words)
    check_absorb(spec, Recipe())


# Merges

CLAP = Recipe(depth="clap")


def best_groups(findings: Findings, pool: list[int], count: int) -> dict[int, tuple[int, ...]]:
    """The slow way: the best groups of a pool of layers, one after the other; equals favour the earlier layer."""
    scores = {(layer, group): s for layer in pool for group, s in enumerate(findings.layers[layer].groups)}
    taken: dict[int, list[int]] = {}
    for _ in range(count):
        layer, group = max(scores, key=lambda unit: scores[unit])
        del scores[layer, group]
        taken.setdefault(layer, []).append(group)
    return {layer: tuple(sorted(groups)) for layer, groups in taken.items()}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("gone", [(1,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "granite", "glm4"])
def test_the_best_groups_of_a_run_live_on(case: str, gone: tuple[int, ...], count: int, load: Any) -> None:
    checkpoint, spec, findings = load(case)
    plan = drop(spec, *gone)
    plan = replace(plan, layers=tuple(replace(row, kv_groups=row.kv_groups[:count]) for row in plan.layers))
    merged = settle_plan(checkpoint, spec, findings, CLAP, plan)
    assert merged.hidden == plan.hidden
    assert "not_merged" not in merged.notes
    for before, row in zip(plan.layers, merged.layers, strict=True):
        wanted = best_groups(findings, [row.layer, *gone], count)
        if row.layer != gone[0] - 1 or wanted.keys() == {row.layer}:
            assert row == before  # nothing moves: the layer's own ranking of what stays is the better one
            continue
        assert {groups.layer: groups.kv_groups for groups in row.sources if groups.kv_groups} == wanted
        assert row.group_count == count
        assert (row.ffn, row.absorbed) == (before.ffn, before.absorbed)


def test_groups_move_at_all(load: Any) -> None:
    """So that the test above compares something."""
    checkpoint, spec, findings = load("llama")
    assert settle_plan(checkpoint, spec, findings, CLAP, drop(spec, 1, 2)).layers[0].merged


def test_nothing_moves_without_clap_or_without_dropped_layers(load: Any) -> None:
    _, spec, findings = load("llama")
    plan = drop(spec, 1, 2)
    assert settle_plan(None, spec, findings, Recipe(depth="drop"), plan) is plan  # type: ignore[arg-type]
    full = drop(spec)
    assert settle_plan(None, spec, findings, CLAP, full) is full  # type: ignore[arg-type]


UNLIKE = {
    "qwen3": "qk-norm",
    "smollm3": "rotates",
    "smollm3-window": "attends",
    "gemma2": "attends",
    "qwen2-window": "attends",
    "olmo2": "qk-norms span all heads",
}


@pytest.mark.parametrize("case", UNLIKE)
def test_unlike_layers_stay_apart_and_it_is_said_why(case: str, load: Any) -> None:
    checkpoint, spec, findings = load(case)
    weights = [read_layer(checkpoint, spec, index, torch.float32) for index in range(4)]
    refusals = []
    for gone in ((1,), (2,), (1, 2)):
        plan = settle_plan(checkpoint, spec, findings, CLAP, drop(spec, *gone))
        kept = gone[0] - 1
        reasons = {layer: unlike_layers(spec, kept, layer, weights[kept], weights[layer]) for layer in gone}
        wanted = {str(layer): reason for layer, reason in reasons.items() if reason}
        assert plan.notes.get("not_merged", {}) == wanted
        merged = {groups.layer for row in plan.layers for groups in row.merged}
        assert merged <= {layer for layer, reason in reasons.items() if not reason}
        refusals += wanted.values()
        check_merges(spec, plan, lambda layer: weights[layer])
        json.dumps(plan.to_json())
    assert refusals and any(UNLIKE[case] in reason for reason in refusals)


@pytest.mark.parametrize("rule", ["least-squares", "mean-inverse"])
@pytest.mark.parametrize("absorb", ["none", "all"])
@pytest.mark.parametrize("case", ["glm4", "pangu_sandwich"])
def test_moved_groups_bring_the_constant_of_their_own_norm(case: str, absorb: str, rule: str, load: Any) -> None:
    """`scale` times the kept layer's constant is what the layer itself would be absorbed with."""
    checkpoint, spec, findings = load(case)
    recipe = Recipe(depth="clap", absorb=absorb, absorb_constant=rule)
    every = settle_plan(checkpoint, spec, findings, replace(recipe, absorb="all"), drop(spec)).layers
    constants = {row.layer: dict(row.absorbed)["attn_out"] for row in every}
    plan = settle_plan(checkpoint, spec, findings, recipe, drop(spec, 1, 2))
    merged = plan.layers[0].merged
    assert merged
    for groups in merged:
        assert groups.scale == pytest.approx(constants[groups.layer] / constants[0], rel=1e-12)
        assert abs(groups.scale - 1) > 1e-3
    assert bool(plan.layers[0].absorbed) == (absorb == "all")


def test_moved_groups_of_models_without_post_norms_are_not_scaled(load: Any) -> None:
    checkpoint, spec, findings = load("llama")
    merged = settle_plan(checkpoint, spec, findings, CLAP, drop(spec, 1, 2)).layers[0].merged
    assert {groups.scale for groups in merged} == {1.0}
    assert all("scale" not in groups.to_json() for groups in merged)


def test_a_row_that_lives_on_borrowed_groups_alone(load: Any) -> None:
    checkpoint, spec, findings = load("llama")
    layers = list(findings.layers)
    layers[0] = replace(layers[0], groups=(0.0, 0.0, 0.0))
    layers[1] = replace(layers[1], groups=(1.0, 2.0, 3.0))
    plan = settle_plan(checkpoint, spec, replace(findings, layers=tuple(layers)), CLAP, drop(spec, 1))
    assert plan.layers[0] == LayerPlan(0, (), tuple(range(56)), (MergedGroups(1, (0, 1, 2)),))


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("case", ["glm4", "pangu_sandwich"])
def test_merged_attention_is_the_sum_of_attentions_each_with_its_own_constant(
    case: str, absorbed: bool, load: Any
) -> None:
    """c_s g_s o_s(x) summed over the layers that become one, on one input; behind a norm that stays, over c g."""
    checkpoint, spec, findings = load(case)
    everything = keep_everything(spec.shape).layers
    merged = tuple(MergedGroups(layer, (0, 1, 2)) for layer in (1, 2))
    row = scale_merged(findings.layers, Recipe(), replace(everything[0], merged=merged))
    constants = {row.layer: 0.7} | {groups.layer: 0.7 * groups.scale for groups in row.merged}
    row = replace(row, absorbed=(("attn_out", 0.7),) if absorbed else ())
    plan = Plan(tuple(range(48)), (row, everything[3]))
    dense = [read_layer(checkpoint, spec, index, torch.float32) for index in range(3)]
    job = Rebuild(checkpoint, spec, cut_spec(spec, plan), plan, Recipe(), storage_types(checkpoint, spec))
    cut, _ = cut_layer(job, 0, dense[0])
    x = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(2))
    frame = make_frame(spec, 2, 20)
    wanted = torch.zeros(2, 20, 48)
    for index, weights in enumerate(dense):
        context, _ = attention_context(spec, spec.layers[index], weights, x, frame)
        wanted += constants[index] * (weights["attn_out"] + spec.norm_offset) * project(weights, "o", context)
    context, _ = attention_context(job.new, job.new.layers[0], cut, x, frame)
    found = project(cut, "o", context)
    assert ("attn_out" in cut) != absorbed
    if not absorbed:
        found = found * constants[0] * (dense[0]["attn_out"] + spec.norm_offset)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
