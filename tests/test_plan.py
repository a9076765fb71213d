"""Plans: files a user may edit, grids, shapes, and the config.json of what a plan makes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_findings import make_findings, make_spec
from refusals import refused
from tiny import CASES, POST_NORM_FAMILIES

from compress.choose import Prices, choose_plan
from compress.errors import UserError
from compress.pipeline import write_plan
from compress.plan import (
    OBSERVED,
    LayerPlan,
    MergedGroups,
    Plan,
    describe_counts,
    grid,
    keep_everything,
    plan_shape,
    read_plan,
    step_size,
)
from compress.recipe import Recipe
from compress.spec import ModelSpec, expected_tensors
from compress.surgery.describe import describe_new, new_config

SMALL = make_spec("llama")
PLAN = Plan(
    (0, 3, 47), (LayerPlan(0, (0, 2), (1, 2, 55)), LayerPlan(2, (1,), (0,)), LayerPlan(3, (0, 1, 2), (4, 5)))
)  # fmt: skip


def choose_small() -> Plan:
    return choose_plan(SMALL, make_findings(SMALL, (3,)), Recipe(keep=0.5), Prices({})).plan


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
    plan = choose_small()
    write_plan(plan, tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json", SMALL.shape)
    assert read == plan
    assert read.notes == {key: plan.notes[key] for key in OBSERVED if key in plan.notes}


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = choose_small()
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


# Layers 1 and 2 are dropped; groups of both may live on in layer 0, which keeps one of its own.
MERGED = Plan(
    (0, 3, 47),
    (LayerPlan(0, (1,), (4, 5), (MergedGroups(1, (0, 2)), MergedGroups(2, (1,)))), LayerPlan(3, (0, 2), (4,))),
)  # fmt: skip


def edit_merged(place: int = 0, merged: Any = None, **changes: Any) -> dict[str, Any]:
    data = MERGED.to_json()
    data["layers"][place] |= {"merged": merged, **changes}
    return data


def test_a_plan_with_merged_groups_survives_its_file(tmp_path: Path) -> None:
    write_plan(MERGED, tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json", SMALL.shape)
    assert read == MERGED
    rows = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert rows[0]["merged"] == [{"layer": 1, "kv_groups": [0, 2]}, {"layer": 2, "kv_groups": [1]}]
    assert "merged" not in rows[1]  # as all plans were before
    assert all("merged" not in row for row in PLAN.to_json()["layers"])
    assert [layer.group_count for layer in read.layers] == [4, 2]
    assert read.layers[0].sources == (MergedGroups(0, (1,)), *MERGED.layers[0].merged)
    shape = plan_shape(read, SMALL.shape)
    assert [(x.query_heads, x.kv_heads) for x in shape.layers] == [(8, 4), (4, 2)]


@pytest.mark.parametrize(
    "changes",
    [
        {"merged": [{"layer": 2, "kv_groups": [0]}], "kv_groups": []},  # nothing of its own
        {"merged": [{"layer": 2, "kv_groups": [0]}, {"layer": 1, "kv_groups": [0, 1, 2]}]},
        {"merged": []},
    ],
)
def test_merged_groups_that_are_read(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(edit_merged(**changes)))
    row = read_plan(tmp_path / "plan.json", SMALL.shape).layers[0]
    assert [x.to_json() for x in row.merged] == changes["merged"]
    assert row.kv_groups == tuple(changes.get("kv_groups", [1]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (edit_merged(merged=[{"layer": 3, "kv_groups": [0]}]), ["layer 3", "keeps"]),
        (edit_merged(merged=[{"layer": 0, "kv_groups": [0]}]), ["layer 0", "keeps"]),
        (edit_merged(merged=[{"layer": 4, "kv_groups": [0]}]), ["layer 4", "0 to 3"]),
        (edit_merged(merged=[{"layer": -1, "kv_groups": [0]}]), ["layer -1", "0 to 3"]),
        (edit_merged(merged=[{"layer": "1", "kv_groups": [0]}]), ["layer '1'", "0 to 3"]),
        (edit_merged(merged=[{"layer": True, "kv_groups": [0]}]), ["layer True", "0 to 3"]),
        (edit_merged(merged=[{"kv_groups": [0]}]), ["layer None", "0 to 3"]),
        (edit_merged(1, merged=[{"layer": 2, "kv_groups": [0]}]), ["layer 3 merged", "layer 2", "in layer 0 only"]),
        (edit_layer(1, merged=[{"layer": 1, "kv_groups": [0]}]), ["layer 2 merged", "layer 1", "in layer 0 only"]),
        (edit_merged(merged=[{"layer": 1, "kv_groups": [0]}, {"layer": 1, "kv_groups": [1]}]), ["layer 1 twice"]),
        (edit_merged(merged=[{"layer": 1, "kv_groups": [0, 0]}]), ["layer 0 merged: layer 1", "rising"]),
        (edit_merged(merged=[{"layer": 1, "kv_groups": [2, 0]}]), ["layer 0 merged: layer 1", "rising"]),
        (edit_merged(merged=[{"layer": 1, "kv_groups": [3]}]), ["layer 0 merged: layer 1", "0 to 2"]),
        (edit_merged(merged=[{"layer": 1, "kv_groups": []}]), ["layer 0 merged: layer 1", "at least one"]),
        (edit_merged(merged=[{"layer": 1}]), ["layer 0 merged: layer 1", "at least one"]),
        (edit_merged(merged=[{"layer": 1, "kv_groups": [0.5]}]), ["layer 0 merged: layer 1", "whole number"]),
        (edit_merged(merged=[], kv_groups=[]), ["layer 0 kv_groups", "at least one"]),
        (edit_merged(merged=[{"layer": 1, "kv_groups": [0]}], kv_groups=None), ["layer 0 kv_groups"]),
        (edit_merged(merged={"layer": 1, "kv_groups": [0]}), ["layer 0 merged", "list of entries"]),
        (edit_merged(merged=[1]), ["layer 0 merged", "list of entries"]),
        (edit_merged(merged=None), ["layer 0 merged", "list of entries"]),
        (edit_merged(merged="1"), ["layer 0 merged", "list of entries"]),
    ],
)
def test_merged_groups_that_cannot_be_meant_are_refused(data: Any, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    refused(lambda: read_plan(path, SMALL.shape), str(path), *words)


def test_merged_groups_without_a_kept_layer_before_them_are_refused(tmp_path: Path) -> None:
    data = MERGED.to_json()
    data["layers"] = [data["layers"][1] | {"merged": [{"layer": 1, "kv_groups": [0]}]}]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    refused(lambda: read_plan(tmp_path / "plan.json", SMALL.shape), "layer 3 merged", "layer 1", "no kept layer")


# Absorbed norms, and what merged groups are scaled by behind a norm

SANDWICH = make_spec("glm4", head_dim=8)
ABSORBED = Plan(
    (0, 3, 47),
    (
        LayerPlan(0, (1,), (4, 5), (MergedGroups(1, (0, 2), 0.5), MergedGroups(2, (1,))), (("attn_out", 0.25),)),
        LayerPlan(3, (0, 2), (4,), (), (("attn_out", 2.0), ("mlp_out", 1e-3))),
    ),
)


def edit_absorbed(place: int = 1, spoil: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The plan as data; `changes` go into a row, `spoil` into the first entry of what it merges."""
    data = ABSORBED.to_json()
    data["layers"][place] |= changes
    if spoil is not None:
        data["layers"][place]["merged"][0] |= spoil
    return data


def test_a_plan_with_absorbed_norms_survives_its_file(tmp_path: Path) -> None:
    write_plan(ABSORBED, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json", SANDWICH.shape) == ABSORBED
    rows = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert rows[0]["absorbed"] == {"attn_out": 0.25}
    assert rows[0]["merged"] == [{"layer": 1, "kv_groups": [0, 2], "scale": 0.5}, {"layer": 2, "kv_groups": [1]}]
    assert rows[1]["absorbed"] == {"attn_out": 2.0, "mlp_out": 1e-3}
    assert all("absorbed" not in row for row in MERGED.to_json()["layers"])  # as all plans were before


@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_absorbed_norms_are_gone_from_the_shape(case: str) -> None:
    shape = make_spec(case).shape
    before, after = shape.layers[0], plan_shape(ABSORBED, shape).layers
    assert before.norms == ("attn_in", "attn_out", "mlp_in", "mlp_out")
    assert [layer.norms for layer in after] == [("attn_in", "mlp_in", "mlp_out"), ("attn_in", "mlp_in")]
    kept = plan_shape(replace(ABSORBED, layers=tuple(replace(row, absorbed=()) for row in ABSORBED.layers)), shape)
    assert kept.layer_parameters - plan_shape(ABSORBED, shape).layer_parameters == 3 * len(ABSORBED.hidden)


@pytest.mark.parametrize("data", [edit_absorbed(absorbed={}), edit_absorbed(0, absorbed={"mlp_out": 3})])
def test_absorbed_norms_that_are_read(data: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(data))
    read = read_plan(tmp_path / "plan.json", SANDWICH.shape)
    assert [dict(row.absorbed) for row in read.layers] == [row.get("absorbed", {}) for row in data["layers"]]
    assert all(type(constant) is float for row in read.layers for _, constant in row.absorbed)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (edit_absorbed(absorbed={"attn_in": 1.0}), ["layer 3 absorbed", "attn_out and mlp_out"]),
        (edit_absorbed(absorbed={"final_norm": 1.0}), ["layer 3 absorbed"]),
        (edit_absorbed(absorbed=["attn_out"]), ["layer 3 absorbed"]),
        (edit_absorbed(absorbed=None), ["layer 3 absorbed"]),
        (edit_absorbed(absorbed={"attn_out": 0}), ["layer 3 absorbed: attn_out", "above 0", "got 0"]),
        (edit_absorbed(absorbed={"attn_out": -1.0}), ["attn_out", "above 0"]),
        (edit_absorbed(absorbed={"mlp_out": True}), ["mlp_out", "above 0"]),
        (edit_absorbed(absorbed={"mlp_out": "1"}), ["mlp_out", "above 0"]),
        (edit_absorbed(absorbed={"mlp_out": None}), ["mlp_out", "above 0"]),
        (edit_absorbed(absorbed={"mlp_out": math.inf}), ["mlp_out", "above 0"]),
        (edit_absorbed(absorbed={"mlp_out": math.nan}), ["mlp_out", "above 0"]),
        (edit_absorbed(0, spoil={"scale": 0}), ["layer 0 merged: layer 1 scale", "above 0"]),
        (edit_absorbed(0, spoil={"scale": "2"}), ["layer 0 merged: layer 1 scale", "above 0"]),
        (edit_absorbed(0, spoil={"scale": None}), ["layer 0 merged: layer 1 scale", "above 0"]),
        (edit_absorbed(0, spoil={"scale": math.nan}), ["layer 0 merged: layer 1 scale", "above 0"]),
    ],
)
def test_constants_that_cannot_be_meant_are_refused(data: Any, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    refused(lambda: read_plan(path, SANDWICH.shape), str(path), *words)


def test_constants_for_norms_that_a_model_lacks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(edit_layer(0, absorbed={"attn_out": 1.0})))
    refused(lambda: read_plan(path, SMALL.shape), "layer 0 absorbed", "this layer has none")
    path.write_text(json.dumps(edit_merged(merged=[{"layer": 1, "kv_groups": [0], "scale": 2.0}])))
    refused(lambda: read_plan(path, SMALL.shape), "layer 0 merged: layer 1", "scale", "norm behind attention")


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


def test_longrope_lists_fix_the_hidden_size_per_head() -> None:
    spec = make_spec("phi3-longrope")
    plan = replace(keep_everything(spec.shape), hidden=tuple(range(40)))
    refused(lambda: new_config(spec, plan), "6 heads", "40")


def assert_reads_back(spec: ModelSpec, plan: Plan) -> None:
    """The config.json that is written says what the plan does, and where each layer came from."""
    new = describe_new(spec, plan, Recipe())
    assert json.loads(json.dumps(new.config)) == new.config
    assert new.shape == plan_shape(plan, spec.shape)
    assert [x.window for x in new.layers] == [spec.layers[i].window for i in plan.kept_layers]
    assert [x.rope for x in new.layers] == [spec.layers[i].rope for i in plan.kept_layers]


@pytest.mark.parametrize("shapes", ["uniform", "per-layer"])
@pytest.mark.parametrize("case", CASES)
def test_every_chosen_shape_gives_a_config_that_reads_back(case: str, shapes: str) -> None:
    spec = make_spec(case)
    findings, prices = make_findings(spec), ({}, {"ffn": 50.0}, {"hidden": 0.01}, {"kv": 0.01}, {"layers": 1e-6})
    for axis in prices:
        for keep in (0.6, 0.8):
            recipe = Recipe(keep=keep, multiple=8, shapes=shapes)
            assert_reads_back(spec, choose_plan(spec, findings, recipe, Prices(axis)).plan)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_with_borrowed_groups_gives_a_config_that_reads_back(case: str) -> None:
    spec = make_spec(case)
    rows = list(keep_everything(spec.shape).layers)
    rows[0] = replace(rows[0], kv_groups=(2,), merged=(MergedGroups(1, (0, 1)),))
    assert_reads_back(spec, Plan(tuple(range(spec.shape.hidden)), (rows[0], *rows[2:])))
