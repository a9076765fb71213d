"""The view of an absorbed model is the model that absorption makes, under its new names, and can be rotated and cut."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from test_decoder import TOLERANCE, run_decoder, run_reference
from test_rotate import (
    EXACT,
    WINDOWS,
    largest,
    make_task,
    open_tiny,
    place_sink,
    random_rotation,
    run_whole,
    turned_energies,
    write_cut,
)
from tiny import CASES, POST_NORM_FAMILIES, make_checkpoint, make_config
from torch import Tensor

from compress.checkpoint import Checkpoint, check_finite, open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.decoder import compute_logits, make_frame, run_layer
from compress.family import POST_NORMS, explain_not_stock
from compress.pipeline import (
    Result,
    Task,
    check_turnable,
    compress_checkpoint,
    find_units,
    plan_checkpoint,
    storage_types,
    turn_planned,
    write_plan,
)
from compress.plan import Plan, read_plan
from compress.recipe import Recipe
from compress.settle import list_constants, planned_constants, report_absorption
from compress.spec import ModelSpec, expected_tensors, resolve_model
from compress.spec_change import drop_norms, resolve_absorbed
from compress.spec_writer import write_config
from compress.surgery.absorb import absorb_post_norm
from compress.surgery.absorbed_view import AbsorbedCheckpoint, absorb_checkpoint, check_rotation
from compress.surgery.describe import new_config
from compress.surgery.rotate import (
    RotatedCheckpoint,
    choose_rotation,
    collect_stream_gram,
    rotate_checkpoint,
    rotated_findings,
)
from compress.weights import embed_rows, read_head, read_layer, read_spec

Constants = Mapping[int, Mapping[str, float]]
DOUBLE = torch.float64
ALL: Constants = {index: {"attn_out": 1.3 + 0.1 * index, "mlp_out": 0.8 - 0.1 * index} for index in range(4)}
SOME: Constants = {1: {"attn_out": 1.4}, 2: {"mlp_out": 0.7, "attn_out": 0.6}}
RELATIVES = {"glm4": "glm", "pangu_sandwich": "llama"}
# Name -> case and changes: every family that can, and biases on what is scaled, tied ends, biases before it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {case: (case, {}) for case in POST_NORM_FAMILIES} | {
    "biases": ("pangu_sandwich", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("pangu_sandwich", {"tie_word_embeddings": True}),
    "tied, windows": ("gemma3_text-linear", {}),
    "qkv biases": ("glm4", {"attention_bias": True}),
    "added biases": ("glm4", {"lightpress": {"biases": ["o", "down"]}}),
}
models = pytest.mark.parametrize("model", MODELS)


def open_model(folder: Path, model: str, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, ModelSpec]:
    case, changes = MODELS[model]
    checkpoint = open_checkpoint(make_checkpoint(folder / "dense", case, dtype, **changes))
    return checkpoint, read_spec(checkpoint)


def absorb_layer(checkpoint: Checkpoint, spec: ModelSpec, index: int, constants: Constants) -> dict[str, Tensor]:
    """One layer by role in float64, absorbed the slow way: all of it at once."""
    weights = read_layer(checkpoint, spec, index, DOUBLE)
    for role, constant in constants.get(index, {}).items():
        weights = absorb_post_norm(spec, weights, role, constant)
    return weights


def run_absorbed(checkpoint: Checkpoint, spec: ModelSpec, ids: Tensor, constants: Constants) -> Tensor:
    """Logits of the layers that `absorb_layer` makes, in the family and under the names of the dense model."""
    new = resolve_absorbed(spec, constants)
    x, frame = embed_rows(checkpoint, spec, ids, DOUBLE), make_frame(spec, *ids.shape, dtype=DOUBLE)
    for index, layer in enumerate(new.layers):
        x, _ = run_layer(new, layer, absorb_layer(checkpoint, spec, index, constants), x, frame)
    return compute_logits(spec, read_head(checkpoint, spec, DOUBLE), x)


def save_view(view: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    save_file(view.read(view.tensors, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(view.config))
    return folder


# The same model as absorption makes


@pytest.mark.parametrize("constants", [ALL, SOME, {}], ids=["all", "some", "none"])
@models
def test_layers_are_those_of_absorption(model: str, constants: Constants, tmp_path: Path) -> None:
    checkpoint, spec = open_model(tmp_path, model)
    view = absorb_checkpoint(checkpoint, spec, constants)
    seen = read_spec(view)
    for index in range(len(spec.layers)):
        expected = absorb_layer(checkpoint, spec, index, constants)
        found = read_layer(view, seen, index, DOUBLE)
        assert expected.keys() == found.keys()
        assert not expected.keys() & constants.get(index, {}).keys()
        assert all(torch.equal(found[role], tensor) for role, tensor in expected.items())
        plain = read_layer(checkpoint, spec, index, DOUBLE)
        scaled = {POST_NORMS[norm][0] for norm in constants.get(index, {})}
        changed = {role for role, tensor in found.items() if not torch.equal(tensor, plain[role])}
        assert changed == {role for role in found if role.removesuffix("_bias") in scaled}
    logits = run_absorbed(checkpoint, spec, WINDOWS.ids, constants)
    assert torch.equal(run_whole(view, seen, WINDOWS.ids), logits)
    dense = run_whole(checkpoint, spec, WINDOWS.ids)
    assert (largest(logits - dense) > 0.01) == bool(constants)


@pytest.mark.parametrize("choice", ["random", "pca"])
@models
def test_rotated_equals_absorbed(model: str, choice: str, tmp_path: Path) -> None:
    checkpoint, spec = open_model(tmp_path, model)
    view = absorb_checkpoint(checkpoint, spec, ALL)
    seen = read_spec(view)
    rotation = choose_rotation(collect_stream_gram(view, seen, WINDOWS)) if choice == "pca" else random_rotation(48)
    rotated = rotate_checkpoint(view, seen, rotation)
    expected, found = run_whole(view, seen, WINDOWS.ids), run_whole(rotated, read_spec(rotated), WINDOWS.ids)
    assert largest(found - expected) <= EXACT * largest(expected)
    streams = [embed_rows(*pair, WINDOWS.ids, DOUBLE) for pair in ((view, seen), (rotated, read_spec(rotated)))]
    assert largest(streams[0] - streams[1]) > 0.1, "it is another basis"


def test_an_absorbed_model_loses_its_other_norms(tmp_path: Path) -> None:
    """What an earlier run left, and a view of a view, are the same as all at once."""
    for case in POST_NORM_FAMILIES:
        checkpoint, spec = open_tiny(tmp_path / case, case)
        part = absorb_checkpoint(checkpoint, spec, SOME)
        written = open_checkpoint(save_view(part, tmp_path / case / "part", DOUBLE))
        assert written.config["per_layer_config"]["2"] == {"absorbed_norms": ["attn_out", "mlp_out"]}
        rest = {
            index: {role: c for role, c in own.items() if role not in SOME.get(index, {})} for index, own in ALL.items()
        }
        expected = absorb_checkpoint(checkpoint, spec, {i: {**ALL[i], **SOME.get(i, {})} for i in ALL})
        for source in (part, written):
            view = absorb_checkpoint(source, read_spec(source), rest)
            assert view.config == expected.config
            assert read_spec(view).shape == read_spec(expected).shape
            for name, tensor in expected.read(expected.tensors, DOUBLE).items():
                assert torch.equal(view.read_one(name, DOUBLE), tensor), name


# Names and config


@pytest.mark.parametrize("constants", [ALL, SOME], ids=["all", "some"])
@models
def test_the_view_is_what_the_writer_would_write(model: str, constants: Constants, tmp_path: Path) -> None:
    checkpoint, spec = open_model(tmp_path, model)
    view = absorb_checkpoint(checkpoint, spec, constants)
    case = MODELS[model][0]
    left = {"per_layer_config"} if constants is SOME or case not in RELATIVES else set()
    assert view.config["model_type"] == (spec.config["model_type"] if left else RELATIVES[case])
    assert {"per_layer_config"} & view.config.keys() == left
    shape = replace(
        spec.shape,
        layers=tuple(drop_norms(layer, constants.get(i, {})) for i, layer in enumerate(spec.shape.layers)),
    )
    written = resolve_model(write_config(spec, shape, range(4), extend=model == "added biases"), None)
    seen = read_spec(view)  # every tensor that the family wants is there, and no other
    assert seen.shape == written.shape == shape
    assert seen.layers == written.layers
    assert [layer.names for layer in seen.layers] == [layer.names for layer in written.layers]
    conventions = ("eps", "activation", "attention_scale", "embedding_multiplier", "logit_softcap", "attention_softcap")
    assert all(getattr(seen, name) == getattr(written, name) for name in conventions)
    assert {name: info.shape for name, info in view.tensors.items()} == expected_tensors(seen)
    assert all(info.name == name for name, info in view.tensors.items())


def test_a_name_may_stand_for_another_norm(tmp_path: Path) -> None:
    """`post_attention_layernorm` is a post-norm in the sandwich, and the MLP's pre-norm in the relative."""
    checkpoint, spec = open_tiny(tmp_path, "pangu_sandwich")
    view = absorb_checkpoint(checkpoint, spec, ALL)
    name = "model.layers.1.post_attention_layernorm.weight"
    assert (spec.layers[1].names["attn_out"], read_spec(view).layers[1].names["mlp_in"]) == (name, name)
    assert torch.equal(view.read_one(name), checkpoint.read_one("model.layers.1.pre_mlp_layernorm.weight"))
    assert not torch.equal(view.read_one(name), checkpoint.read_one(name))


@pytest.mark.parametrize("model", ["glm4", "qkv biases", "pangu_sandwich", "biases", "tied"])
def test_stock_code_opens_the_relative(model: str, tmp_path: Path) -> None:
    view = absorb_checkpoint(*open_model(tmp_path, model), ALL)
    assert explain_not_stock(view.config) == ""
    folder = save_view(view, tmp_path / "out", DOUBLE)
    theirs, ids = run_reference(folder, WINDOWS.ids[:2], DOUBLE), WINDOWS.ids[:2]
    assert largest(run_decoder(folder, ids, DOUBLE) - theirs) <= TOLERANCE[DOUBLE]
    assert largest(run_whole(view, read_spec(view), ids) - theirs) <= TOLERANCE[DOUBLE]


@pytest.mark.parametrize("stored", ["embed", "head", "both"])
@pytest.mark.parametrize("case", ["pangu_sandwich", "gemma2"])
def test_tied_models_stay_tied(case: str, stored: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", case, tie_word_embeddings=True)
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    tensors = load_file(folder / "model.safetensors")
    if stored != "embed":
        tensors[head] = tensors[embed].clone()
    if stored == "head":
        del tensors[embed]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    view = absorb_checkpoint(checkpoint, spec, ALL)
    seen = read_spec(view)
    expected = run_absorbed(checkpoint, spec, WINDOWS.ids, ALL)
    assert seen.shape.tied
    assert torch.equal(run_whole(view, seen, WINDOWS.ids), expected)
    rotated = rotate_checkpoint(view, seen, random_rotation(48))
    assert largest(run_whole(rotated, read_spec(rotated), WINDOWS.ids) - expected) <= EXACT * largest(expected)


# What is read


@models
def test_stored_types_stay_and_values_are_not_rounded(model: str, tmp_path: Path) -> None:
    checkpoint, spec = open_model(tmp_path, model, torch.bfloat16)
    view = absorb_checkpoint(checkpoint, spec, ALL)
    assert set(storage_types(view, read_spec(view)).values()) == {torch.bfloat16}
    check_finite(view)
    for name in view.tensors:
        plain, exact, half = view.read_one(name), view.read_one(name, DOUBLE), view.read_one(name, torch.bfloat16)
        assert (plain.dtype, exact.dtype, half.dtype) == (torch.float32, DOUBLE, torch.bfloat16)
        assert torch.allclose(plain.double(), exact, rtol=1e-6, atol=0)
        assert torch.equal(plain.bfloat16(), half), "rounded once"
    exact = absorb_layer(checkpoint, spec, 3, ALL)["down"]
    assert torch.equal(view.read_one("model.layers.3.mlp.down_proj.weight", DOUBLE), exact)
    assert not torch.equal(exact, exact.bfloat16().double())


@dataclass(frozen=True, eq=False)
class Watched(Checkpoint):
    """A checkpoint that notes what is read of which tensor."""

    seen: list[tuple[str, str, Any]]

    def read(self, names: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        wanted = list(names)
        self.seen.extend(("whole", name, None) for name in wanted)
        return super().read(wanted, dtype)

    def read_rows(self, name: str, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        self.seen.append(("rows", name, rows.tolist()))
        return super().read_rows(name, rows, dtype)

    def read_slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        self.seen.append(("slice", name, [start, stop]))
        return super().read_slice(name, start, stop, dtype)


def watch_view(folder: Path, model: str) -> tuple[AbsorbedCheckpoint, ModelSpec, list[tuple[str, str, Any]]]:
    plain, spec = open_model(folder, model)
    seen: list[tuple[str, str, Any]] = []
    view = absorb_checkpoint(Watched(plain.folder, plain.config, plain.tensors, seen), spec, ALL)
    return view, spec, seen


@pytest.mark.parametrize("model", ["biases", "glm4"])
def test_parts_of_a_tensor_equal_the_whole(model: str, tmp_path: Path) -> None:
    view, _, _ = watch_view(tmp_path, model)
    rows = torch.tensor([7, 0, 7, 5])
    for dtype in (None, DOUBLE, torch.bfloat16):
        for name in view.tensors:
            whole = view.read_one(name, dtype)
            assert torch.equal(view.read_slice(name, 2, 7, dtype), whole[2:7])
            assert torch.equal(view.read_rows(name, rows, dtype), whole[rows])
            assert torch.equal(view.read_one(name, dtype), whole), "reading changes nothing"
    for name, info in view.tensors.items():
        with pytest.raises(IndexError):
            view.read_slice(name, 0, info.shape[0] + 1)
        for outside in (-1, info.shape[0]):
            with pytest.raises(IndexError):
                view.read_rows(name, torch.tensor([outside]))
    gone = "model.layers.1.post_mlp_layernorm.weight"
    for name in ("unknown", gone):
        with pytest.raises(KeyError):
            view.read_one(name)


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    view, spec, seen = watch_view(tmp_path, "pangu_sandwich")
    assert not seen
    names = spec.layers[2].names
    read_layer(view, read_spec(view), 2, torch.float32)
    assert sorted(name for _, name, _ in seen) == sorted(names.values())
    seen.clear()
    view.read_rows(names["down"], torch.tensor([3, 1]))
    view.read_slice(names["o"], 5, 7)
    view.read_slice(names["q"], 0, 2)
    assert seen == [
        ("rows", names["down"], [3, 1]), ("whole", names["mlp_out"], None),
        ("slice", names["o"], [5, 7]), ("whole", names["attn_out"], None), ("slice", names["q"], [0, 2]),
    ]  # fmt: skip


# Refusals


def test_what_cannot_be_absorbed_is_refused(tmp_path: Path) -> None:
    sandwich, post, plain = (open_tiny(tmp_path / case, case) for case in ("glm4", "olmo2", "llama"))
    refused(lambda: absorb_checkpoint(*post, ALL), "'olmo2'", "never be normalised")
    refused(lambda: absorb_checkpoint(*plain, ALL), "'llama'", "no norm behind the attention")
    refused(lambda: absorb_checkpoint(*sandwich, {0: {"mlp_in": 1.0}}), "'mlp_in'", "attn_out and mlp_out")
    refused(lambda: absorb_checkpoint(*sandwich, {4: {"attn_out": 1.0}}), "layer 4", "0 to 3")
    for wrong in (0.0, -1.0, math.nan, math.inf):
        refused(lambda wrong=wrong: absorb_checkpoint(*sandwich, {2: {"attn_out": wrong}}), "layer 2", repr(wrong))
    view = absorb_checkpoint(*sandwich, SOME)
    refused(lambda: absorb_checkpoint(view, read_spec(view), {1: {"attn_out": 1.0}}), "'attn_out'", "gone", "layer 1")
    refused(lambda: rotate_checkpoint(view, read_spec(view), random_rotation(48)), "'glm4'", "absorb them first")


PCA = Recipe(rotate="pca", trials=0)


@pytest.mark.parametrize("case", CASES)
def test_a_rotation_is_refused_before_work(case: str) -> None:
    spec = resolve_model(make_config(case), None)
    if spec.family.name in POST_NORM_FAMILIES:
        for absorb in ("none", "safe"):
            refused(lambda absorb=absorb: check_rotation(spec, replace(PCA, absorb=absorb)), "--absorb all")
        check_rotation(spec, replace(PCA, absorb="all"))
        check_rotation(resolve_absorbed(spec, ALL), PCA)
        refused(lambda: check_rotation(resolve_absorbed(spec, SOME), PCA), "--absorb all")
        check_rotation(spec, replace(PCA, rotate="none"))
        check_rotation(spec, replace(PCA, axes=("ffn", "kv")))
    elif "attn_out" in spec.family.layer:
        for absorb in ("none", "all"):
            refused(lambda absorb=absorb: check_rotation(spec, replace(PCA, absorb=absorb)), "as they are instead")
    else:
        check_rotation(spec, PCA)


# Cutting


@pytest.mark.parametrize("model", ["glm4", "gemma2", "pangu_sandwich", "biases", "tied", "tied, windows"])
@pytest.mark.parametrize("repair", ["none", "lstsq"])
def test_passes_run_on_the_rotated_view(model: str, repair: str, tmp_path: Path) -> None:
    view = absorb_checkpoint(*open_model(tmp_path, model, torch.bfloat16), ALL)
    gram = collect_stream_gram(view, read_spec(view), WINDOWS)
    rotation = choose_rotation(gram)
    task = make_task(rotate_checkpoint(view, read_spec(view), rotation), repair=repair, score="activation")
    findings = rotated_findings(find_units(task), turned_energies(gram, rotation))
    result = write_cut(task, findings.keep_hidden(36), tmp_path / "cut")
    written = open_checkpoint(tmp_path / "cut")
    assert {info.dtype for info in written.tensors.values()} == {torch.bfloat16}
    assert (written.config["hidden_size"], written.config["tie_word_embeddings"]) == (36, False)
    assert written.config["model_type"] == view.config["model_type"]
    assert all(not set(POST_NORMS) & set(layer.names) for layer in read_spec(written).layers)
    again = run_whole(written, read_spec(written), result.sample_ids, torch.float32)
    assert largest(again - result.sample_logits) <= 1e-4 * largest(again)


# Whole runs


WHOLE = Recipe(keep=0.5, axes=("hidden", "layers"), multiple=12, rotate="pca", absorb="all", trials=0, refine=0)
RUNS = {
    "hidden and layers": {},
    "hidden": {"axes": ("hidden",)},
    "clap": {"axes": ("hidden", "layers"), "depth": "clap"},
    "every axis": {"axes": ("hidden", "layers", "kv", "ffn"), "multiple": 8, "repair": "lstsq"},
    "measured plans": {"trials": 2, "absorb_constant": "mean-inverse"},
    "own biases": {"axes": ("hidden",), "biases": "own"},
}


def plan_task(folder: Path, model: str, **recipe: Any) -> tuple[Task, Plan]:
    """A task whose recipe rotates and absorbs, and its plan as it is read back from its file."""
    checkpoint, spec = open_model(folder, model)
    task = Task(checkpoint, spec, WINDOWS, replace(WHOLE, **recipe))
    plan = plan_checkpoint(task)
    write_plan(plan, folder / "plan.json")
    again = read_plan(folder / "plan.json", spec.shape)
    assert again == plan
    return task, again


def write_run(task: Task, plan: Plan, out: Path) -> Result:
    """Write the model under the config that the command line makes, from the dense model's description."""
    with CheckpointWriter(out, new_config(task.spec, plan, task.recipe)) as writer:
        result = compress_checkpoint(task, plan, writer)
        writer.finish()
    return result


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("model", ["glm4", "gemma2", "biases", "tied"])
def test_a_run_absorbs_and_rotates(model: str, run: str, tmp_path: Path) -> None:
    task, plan = plan_task(tmp_path, model, **RUNS[run])
    assert plan.hidden == tuple(range(len(plan.hidden)))
    assert len(plan.hidden) < 48 or run == "every axis"
    assert any(row.merged for row in plan.layers) == (run == "clap" and model != "gemma2")  # which drops no layer
    plan = replace(plan, hidden=plan.hidden[:36])  # an edited plan, where the optimiser kept all
    assert all({role for role, _ in row.absorbed} == set(POST_NORMS) for row in plan.layers)
    result = write_run(task, plan, tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    seen = read_spec(written)
    assert seen.shape == result.spec.shape and dict(seen.config) == dict(result.spec.config)
    assert not any(set(POST_NORMS) & set(layer.names) for layer in seen.layers)
    assert not seen.shape.tied
    again = run_whole(written, seen, result.sample_ids, torch.float32)
    assert largest(again - result.sample_logits) <= 1e-4 * largest(again)


@pytest.mark.parametrize("model", ["glm4", "gemma2", "tied"])
def test_a_plan_of_full_width_is_absorbed_without_a_rotation(model: str, tmp_path: Path) -> None:
    task, plan = plan_task(tmp_path, model, **RUNS["every axis"])
    plan = replace(plan, hidden=tuple(range(48)))
    assert turn_planned(task, plan) is task
    one, two = (
        write_run(replace(task, recipe=replace(task.recipe, rotate=rotate)), plan, tmp_path / rotate)
        for rotate in ("pca", "none")
    )
    assert torch.equal(one.sample_logits, two.sample_logits)
    assert one.spec.shape.tied == task.spec.shape.tied
    assert not any(set(POST_NORMS) & set(layer.names) for layer in one.spec.layers)


def test_a_plan_file_gives_the_same_model_as_the_run(tmp_path: Path) -> None:
    """The file holds the constants of dropped layers too, which its rows do not name."""
    task, again = plan_task(tmp_path, "glm4")
    plan = plan_checkpoint(task)
    assert 0 < len(plan.layers) < 4
    one, two = (write_run(task, made, tmp_path / name) for made, name in ((plan, "one"), (again, "two")))
    assert torch.equal(one.sample_logits, two.sample_logits)
    assert planned_constants(again) == planned_constants(plan)
    found = list_constants(report_absorption(find_units(task), task.recipe))
    assert planned_constants(again) == found and found.keys() == set(range(4))
    # A row decides over what was noted, and what is edited is used.
    rows = tuple(replace(row, absorbed=(("attn_out", 0.5), ("mlp_out", 0.5))) for row in again.layers)
    edited = write_run(task, replace(again, layers=rows), tmp_path / "three")
    assert largest(edited.sample_logits - two.sample_logits) > 1e-3


def test_what_a_plan_file_lacks_for_a_rotation_is_refused(tmp_path: Path) -> None:
    task, plan = plan_task(tmp_path, "glm4")
    dropped = min(set(range(4)) - set(plan.kept_layers))
    bare = replace(plan, notes={key: value for key, value in plan.notes.items() if key != "absorption"})
    refused(lambda: check_turnable(bare, task.spec, task.recipe), f"layer {dropped}", "absorb them first")
    rows = (replace(plan.layers[0], absorbed=()), *plan.layers[1:])
    kept = replace(plan, layers=rows)
    refused(lambda: check_turnable(kept, task.spec, task.recipe), "layer 0", "absorb them first")
    refused(lambda: write_run(task, kept, tmp_path / "out"), "layer 0", "absorb them first")
    assert not (tmp_path / "out").exists()
    check_turnable(plan, task.spec, task.recipe)
    check_turnable(replace(kept, hidden=tuple(range(48))), task.spec, task.recipe)
    check_turnable(kept, task.spec, replace(task.recipe, rotate="none"))
    data = json.loads((tmp_path / "plan.json").read_text())
    for wrong in (3, [3], [{"layer": 4}], [{"layer": 1, "norm": "mlp_in", "constant": 1.0}],
                  [{"layer": 1, "norm": ["mlp_out"], "constant": 1.0}],
                  [{"layer": 1, "norm": "mlp_out", "constant": "1"}], [{"layer": 1, "norm": "mlp_out"}]):  # fmt: skip
        (tmp_path / "plan.json").write_text(json.dumps({**data, "absorption": wrong}))
        refused(lambda: read_plan(tmp_path / "plan.json", task.spec.shape), "absorption")


def test_a_run_that_cannot_rotate_stops_before_pass_one(tmp_path: Path) -> None:
    checkpoint, spec = open_model(tmp_path, "glm4")

    def fail(*_: object) -> None:
        raise AssertionError("pass 1 has begun")

    task = Task(checkpoint, spec, WINDOWS, replace(WHOLE, absorb="none"))
    refused(lambda: plan_checkpoint(task, fail), "--absorb all")
    with pytest.raises(AssertionError, match="pass 1"):
        plan_checkpoint(replace(task, recipe=WHOLE), fail)


@pytest.mark.parametrize("case", ["llama", "glm4"])
def test_massive_channels_stay_pinned_when_the_plan_is_carried_out(case: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", case)
    place_sink(folder)
    checkpoint = open_checkpoint(folder)
    absorb = "all" if case == "glm4" else "none"
    recipe = replace(WHOLE, axes=("hidden",), absorb=absorb)
    task = Task(checkpoint, read_spec(checkpoint), WINDOWS, recipe)
    plan = plan_checkpoint(task)
    write_plan(plan, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json", task.spec.shape)
    assert again.notes["pinned_channels"] == [4] and again.notes["rotate"] == "pca"
    turned = turn_planned(task, again)
    assert isinstance(turned.checkpoint, RotatedCheckpoint)
    unit = torch.zeros(48, dtype=DOUBLE).index_fill_(0, torch.tensor([4]), 1.0)
    assert torch.equal(turned.checkpoint.rotation[:, 0], unit)
