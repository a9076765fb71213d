"""Plans: files a user may edit, grids and budgets, and shapes that stock configuration classes accept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CASES, make_config

from compress.errors import UserError
from compress.importance.findings import Findings, LayerFindings
from compress.importance.units import Ranking
from compress.pipeline import new_config, write_plan
from compress.plan import (
    LOSS_EXPONENT,
    OBSERVED,
    Candidate,
    LayerPlan,
    Plan,
    axis_damage,
    describe_counts,
    fill_plan,
    fit_ffn,
    grid,
    keep_everything,
    list_candidates,
    make_plan,
    plan_shape,
    predict_loss,
    read_plan,
    step_size,
)
from compress.recipe import AXES, Recipe
from compress.shapes import LayerShape, ModelShape
from compress.spec import ModelSpec, resolve_model


def make_spec(case: str, **changes: Any) -> ModelSpec:
    return resolve_model(make_config(case, **changes), None)


def make_ranking(count: int, step: float, seed: int) -> Ranking:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return Ranking(tuple(order), tuple(step * gone**1.5 for gone in range(count + 1)))


def make_findings(spec: ModelSpec, pinned: tuple[int, ...] = ()) -> Findings:
    """Damage that grows with every unit, a drop order that leaves the ends, hidden scores that rise."""
    layers = tuple(
        LayerFindings(i, make_ranking(x.kv_heads, 0.2, i), make_ranking(x.ffn, 0.001, 100 + i), 1.0, 0.7, 0.1 * i, 0)
        for i, x in enumerate(spec.shape.layers)
    )
    score = torch.arange(1.0, spec.shape.hidden + 1)
    order = tuple(range(len(layers) - 2, 0, -1))
    return Findings(layers, score, score.expand(3, -1) ** 2, order, pinned, 999, 7)


SMALL = make_spec("llama")
PLAN = Plan(
    (0, 3, 47), (LayerPlan(0, (0, 2), (1, 2, 55)), LayerPlan(2, (1,), (0,)), LayerPlan(3, (0, 1, 2), (4, 5)))
)  # fmt: skip


def refused(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", ".)"))
    for word in words:
        assert word in message, message


# Files


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    noted = replace(PLAN, notes={"kept_fraction": 0.5, "dropped_layers": [1]})
    write_plan(noted, tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json", SMALL.shape)
    assert read == PLAN
    assert read.notes == {}  # predictions do not hold for a plan that may have been edited
    assert read.to_json() == PLAN.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_chosen_plan_survives_its_file(tmp_path: Path) -> None:
    plan = make_plan(SMALL, make_findings(SMALL), Recipe(keep=0.5), {})
    write_plan(plan, tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json", SMALL.shape)
    assert read == plan
    assert read.notes == {key: plan.notes[key] for key in OBSERVED}


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = make_plan(SMALL, make_findings(SMALL), Recipe(keep=0.5), {})
    write_plan(plan, tmp_path / "plan.json")
    with pytest.raises(UserError, match="was made for another model"):
        read_plan(tmp_path / "plan.json", replace(SMALL.shape, vocab=SMALL.shape.vocab + 1))


def test_a_plan_with_unknown_notes_and_other_layout_is_read(tmp_path: Path) -> None:
    data = {"why": "by hand", **PLAN.to_json()}
    (tmp_path / "plan.json").write_text(json.dumps(data, indent=4))
    assert read_plan(tmp_path / "plan.json", SMALL.shape) == PLAN


def edit(**changes: Any) -> dict[str, Any]:
    return {**PLAN.to_json(), **changes}


def edit_layer(place: int, **changes: Any) -> dict[str, Any]:
    data = PLAN.to_json()
    data["layers"][place] |= changes
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (edit(hidden=[0, 48]), ["hidden", "0 to 47"]),
        (edit(hidden=[-1, 3]), ["hidden"]),
        (edit(hidden=[3, 0]), ["hidden", "rising"]),
        (edit(hidden=[3, 3]), ["hidden", "rising"]),
        (edit(hidden=[]), ["hidden"]),
        (edit(hidden=None), ["hidden"]),
        (edit(hidden=5), ["hidden"]),
        (edit(hidden=[0, 1.0]), ["hidden", "whole number"]),
        (edit(hidden=[False, True]), ["hidden", "whole number"]),
        (edit(hidden=["0"]), ["hidden", "whole number"]),
        (edit(layers=[]), ["layers"]),
        (edit(layers=[3]), ["layers"]),
        (edit(layers=None), ["version"]),
        (edit(layers=PLAN.to_json()["layers"][::-1]), ["layers", "rising"]),
        (edit(layers=PLAN.to_json()["layers"][:1] * 2), ["layers", "rising"]),
        (edit_layer(2, layer=4), ["layers", "0 to 3"]),
        (edit_layer(1, layer="2"), ["layers"]),
        (edit_layer(1, kv_groups=[3]), ["layer 2", "kv_groups", "0 to 2"]),
        (edit_layer(1, kv_groups=[]), ["layer 2", "kv_groups"]),
        (edit_layer(0, kv_groups=[1, 0]), ["layer 0", "kv_groups", "rising"]),
        (edit_layer(2, ffn=[56]), ["layer 3", "ffn", "0 to 55"]),
        (edit_layer(2, ffn=[5, 5]), ["layer 3", "ffn", "rising"]),
        (edit_layer(2, ffn=[]), ["layer 3", "ffn"]),
        (edit_layer(2, ffn={}), ["layer 3", "ffn"]),
        (edit(version=2), ["version 1"]),
        (edit(version=None), ["version 1"]),
        ([1, 2], ["version 1"]),
        ("plan", ["version 1"]),
    ],
)  # fmt: skip
def test_an_edit_that_cannot_be_meant_is_refused(data: Any, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    refused(lambda: read_plan(path, SMALL.shape), str(path), *words)


@pytest.mark.parametrize("text", [b"", b"{", b"{'version': 1}", b"\xff\xfe", b"PK\x03\x04"])
def test_what_is_not_json_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(text)
    refused(lambda: read_plan(tmp_path / "plan.json", SMALL.shape), "plan.json", "not a readable plan")


def test_a_missing_plan_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(lambda: read_plan(tmp_path / "none.json", SMALL.shape), "none.json", "no such plan", "lightpress plan")
    refused(lambda: read_plan(tmp_path, SMALL.shape), str(tmp_path), "not a readable plan")


# Shapes


def test_shapes_of_plans() -> None:
    assert plan_shape(keep_everything(SMALL.shape), SMALL.shape) == SMALL.shape
    assert keep_everything(SMALL.shape).kept_layers == (0, 1, 2, 3)
    shape = plan_shape(PLAN, SMALL.shape)
    assert shape.hidden == 3
    assert [(x.query_heads, x.kv_heads, x.ffn, x.head_dim) for x in shape.layers] == [
        (4, 2, 3, 8), (2, 1, 1, 8), (6, 3, 2, 8),
    ]  # fmt: skip
    assert not shape.uniform
    assert PLAN.kept_layers == (0, 2, 3)


def test_parameters_equal_the_tensors_of_the_model() -> None:
    """The budget counts what is stored, qk-norms aside."""
    from compress.spec import expected_tensors  # noqa: PLC0415 only here

    for case in CASES:
        spec = make_spec(case)
        shapes = expected_tensors(spec)
        counted = {name: shape for name, shape in shapes.items() if "q_norm" not in name and "k_norm" not in name}
        stored = sum(math.prod(shape) for shape in counted.values())
        assert spec.shape.parameters == stored, case


def test_counts_in_words() -> None:
    assert describe_counts([3, 3]) == "3"
    assert describe_counts([4, 2, 3]) == "2-4"


@given(size=st.integers(1, 5000), step=st.integers(1, 64), least=st.integers(1, 300))
def test_grid_holds_the_size_and_the_multiples_below(size: int, step: int, least: int) -> None:
    values = grid(size, step, least)
    assert values[0] == size
    assert list(values) == sorted(set(values), reverse=True)
    assert set(values[1:]) == {value for value in range(step, size, step) if value >= least}


@given(size=st.integers(1, 5000), multiple=st.integers(0, 64))
def test_steps_divide_the_dense_size_unless_told(size: int, multiple: int) -> None:
    step = step_size(size, Recipe(multiple=multiple))
    assert step == multiple if multiple else size % step == 0 and step <= 16


layer_shapes = st.builds(
    lambda group, kv, size, ffn: LayerShape(group * kv, kv, size, ffn, biases=("q", "k", "v", "gate", "down")),
    st.integers(1, 4), st.integers(1, 8), st.sampled_from([8, 64]), st.integers(16, 600),
)  # fmt: skip


@settings(deadline=None)
@given(
    layers=st.lists(layer_shapes, min_size=1, max_size=4),
    hidden=st.integers(8, 256),
    keep=st.floats(0.05, 1.0),
    step=st.integers(1, 32),
    groups=st.integers(1, 8),
)
def test_channels_are_the_most_that_fit(
    layers: list[LayerShape], hidden: int, keep: float, step: int, groups: int
) -> None:
    shape = ModelShape(100, hidden, True, tuple(layers))
    groups = min(groups, *(layer.kv_heads for layer in layers))
    full = min(layer.ffn for layer in layers)
    budget = int(keep * shape.layer_parameters)

    def count(ffn: int) -> int:
        return replace(shape, layers=tuple(layer.resize(groups, ffn) for layer in layers)).layer_parameters

    ffn = fit_ffn(shape, groups, step, budget)
    assert 0 <= ffn <= full
    assert ffn == full or ffn % step == 0
    assert ffn == 0 or count(ffn) <= budget
    larger = min((ffn // step + 1) * step, full)
    assert ffn == full or count(larger) > budget or larger <= ffn
    assert fit_ffn(shape, groups, 0, budget) == (full if count(full) <= budget else 0)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("multiple", [0, 1, 12])
@pytest.mark.parametrize("axes", [AXES, ("ffn",), ("ffn", "kv"), ("hidden",), ("layers",), ("kv", "layers")])
def test_candidates_obey_budget_axes_and_multiples(axes: tuple[str, ...], multiple: int, keep: float) -> None:
    spec = make_spec("mistral", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=6)
    findings, recipe = make_findings(spec, pinned=(5, 9)), Recipe(keep=keep, axes=axes, multiple=multiple)
    budget = int(keep * spec.shape.layer_parameters)
    found = list_candidates(spec, findings, recipe, budget)
    assert len(set(found)) == len(found)
    for candidate in found:
        shape = plan_shape(fill_plan(spec, findings, candidate), spec.shape)
        assert shape.layer_parameters <= budget
        assert shape.uniform
        assert candidate.hidden in (48, *range(multiple or 16, 48, multiple or 16))
        assert candidate.ffn in (56, *range(multiple or 8, 56, multiple or 8))
        assert candidate.hidden >= 2
        for axis, changed in (
            ("ffn", candidate.ffn != 56), ("kv", candidate.groups != 4),
            ("hidden", candidate.hidden != 48), ("layers", candidate.dropped),
        ):  # fmt: skip
            assert axis in axes or not changed
    if axes == AXES:
        assert found


def test_the_choice_is_the_least_predicted_loss_and_obeys_weights() -> None:
    findings, recipe = make_findings(SMALL), Recipe(keep=0.6, multiple=8)
    budget = int(0.6 * SMALL.shape.layer_parameters)
    # llama divides: every candidate that could be written takes part.
    for weights in ({}, {"ffn": 100.0}, {"kv": 100.0, "hidden": 100.0}, {"layers": 1e-6}):
        plan = make_plan(SMALL, findings, recipe, weights)
        losses = [
            sum(predict_loss(axis_damage(findings, candidate), weights).values())
            for candidate in list_candidates(SMALL, findings, recipe, budget)
        ]
        assert sum(plan.notes["predicted_loss"].values()) == pytest.approx(min(losses), abs=1e-3)
        assert plan_shape(plan, SMALL.shape).layer_parameters <= budget
    dropped = make_plan(SMALL, findings, recipe, {"layers": 1e-6})
    assert dropped.kept_layers in ((0, 3), (0, 1, 3))
    assert dropped.notes["dropped_layers"] == [i for i in range(4) if i not in dropped.kept_layers]


def test_notes_say_what_the_plan_does() -> None:
    plan = make_plan(SMALL, make_findings(SMALL, (3,)), Recipe(keep=0.5), {})
    shape = plan_shape(plan, SMALL.shape)
    assert plan.notes["parameters"] == shape.parameters
    assert plan.notes["dense_parameters"] == SMALL.shape.parameters
    assert plan.notes["kept_fraction"] == shape.layer_parameters / SMALL.shape.layer_parameters <= 0.5
    assert plan.notes["pinned_channels"] == [3]
    assert plan.notes["skipped_sink_tokens"] == 7
    json.dumps(plan.to_json())


def test_damage_by_axis() -> None:
    findings = make_findings(SMALL)
    none = axis_damage(findings, Candidate(0, 3, 48, 56))
    assert none == pytest.approx(dict.fromkeys(AXES, 0.0), abs=1e-6)
    some = axis_damage(findings, Candidate(1, 2, 32, 50))
    assert some["layers"] == pytest.approx(0.7)
    assert some["kv"] == pytest.approx(3 * 0.2)
    assert some["ffn"] == pytest.approx(3 * 0.001 * 6**1.5)
    assert some["hidden"] > 0
    loss = predict_loss(some, {"kv": 2.0})
    assert loss == pytest.approx({axis: (2 if axis == "kv" else 1) * some[axis] ** LOSS_EXPONENT for axis in AXES})


def test_units_that_stay_are_those_of_the_rankings() -> None:
    findings = make_findings(SMALL)
    plan = fill_plan(SMALL, findings, Candidate(1, 2, 40, 50))
    assert plan.hidden == tuple(range(8, 48))
    assert plan.kept_layers == (0, 1, 3)
    for row in plan.layers:
        layer = findings.layers[row.layer]
        assert set(row.kv_groups) == set(layer.kv.order[1:])
        assert set(row.ffn) == set(layer.ffn.order[6:])


def test_a_budget_out_of_reach_is_refused() -> None:
    refused(
        lambda: make_plan(SMALL, make_findings(SMALL), Recipe(keep=0.01, axes=("kv",)), {}),
        "--keep 0.01", "kv", "--axes",
    )  # fmt: skip


# What stock configuration classes accept


def test_heads_that_do_not_divide_are_written_as_another_family() -> None:
    plan = replace(keep_everything(SMALL.shape), hidden=tuple(range(40)))
    config = new_config(SMALL, plan)
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["sliding_window"] is None
    assert (config["head_dim"], config["num_attention_heads"], config["hidden_size"]) == (8, 6, 40)
    # The same heads where they divide, and fewer heads that divide, stay what they were.
    for hidden, groups in ((36, (0, 1, 2)), (40, (0, 1)), (48, (1, 2))):
        layers = tuple(replace(row, kv_groups=groups) for row in keep_everything(SMALL.shape).layers)
        assert new_config(SMALL, Plan(tuple(range(hidden)), layers))["model_type"] == "llama"


def test_heads_that_do_not_divide_are_refused_where_nobody_takes_them() -> None:
    for case in ("llama-biases", "gemma2", "gemma3_text", "pangu_embedded"):
        spec = make_spec(case)
        plan = replace(keep_everything(spec.shape), hidden=tuple(range(40)))
        refused(lambda spec=spec, plan=plan: new_config(spec, plan), "6 heads", "40")


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text", "llama-biases", "pangu_embedded"])
def test_only_shapes_that_divide_are_offered(case: str) -> None:
    spec = make_spec(case, num_attention_heads=12, num_key_value_heads=6)
    found = list_candidates(spec, make_findings(spec), Recipe(multiple=8), int(0.7 * spec.shape.layer_parameters))
    assert {candidate.groups for candidate in found} >= {4, 3, 2, 1}
    assert all(candidate.hidden % (2 * candidate.groups) == 0 for candidate in found)


def test_longrope_lists_fix_the_hidden_size_per_head() -> None:
    spec = make_spec("phi3-longrope")
    found = list_candidates(spec, make_findings(spec), Recipe(multiple=8), int(0.8 * spec.shape.layer_parameters))
    assert found
    assert all(candidate.hidden // (2 * candidate.groups) == 8 for candidate in found)
    plan = replace(keep_everything(spec.shape), hidden=tuple(range(40)))
    refused(lambda: new_config(spec, plan), "6 heads", "40")


@pytest.mark.parametrize("case", CASES)
def test_every_offered_shape_gives_a_config_that_reads_back(case: str) -> None:
    spec = make_spec(case)
    findings = make_findings(spec)
    for candidate in list_candidates(spec, findings, Recipe(multiple=8), int(0.6 * spec.shape.layer_parameters)):
        plan = fill_plan(spec, findings, candidate)
        shape = plan_shape(plan, spec.shape)
        new = resolve_model(json.loads(json.dumps(new_config(spec, plan))), None)
        assert new.shape == replace(shape, layers=tuple(x for x in shape.layers))
        assert [x.window for x in new.layers] == [spec.layers[i].window for i in plan.kept_layers]
        assert [x.rope for x in new.layers] == [spec.layers[i].rope for i in plan.kept_layers]
