"""What methods 1.10 and 2.9 say a correct implementation must show, on whole runs of every family.

Signs that need a real model (merging against dropping, SLNP against none, ...) are in benchmarks/quality.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_decoder import run_decoder
from test_pipeline import (
    HALF,
    WINDOWS,
    assert_opens_in_transformers,
    assert_sample_matches,
    make_task,
    open_task,
    read_config,
    stream_error,
    write_plain,
    write_result,
)
from test_rotate import place_sink
from tiny import CASES, FAMILIES, POST_NORM_FAMILIES, make_checkpoint
from torch import Tensor

from compress.calibrate import fill_embeddings
from compress.checkpoint import open_checkpoint
from compress.decoder import attention_branch, attention_context, make_frame, mlp_activation, mlp_branch, run_layer
from compress.errors import UserError
from compress.family import POST_NORMS, explain_not_stock
from compress.pipeline import Task, plan_checkpoint
from compress.plan import MergedGroups, Plan, keep_everything
from compress.spec import ModelSpec
from compress.stats import ordinary_tokens
from compress.surgery.absorb import absorb_post_norm
from compress.surgery.depth import unlike_layers
from compress.surgery.describe import describe_new
from compress.surgery.ends import cut_ends, finish_norm, storage_types
from compress.surgery.job import Rebuild, open_streams, start_pruned
from compress.surgery.rebuild import rebuild_layers
from compress.weights import Weights, embed_rows, read_layer, read_spec

DOUBLE = torch.float64
UNTOUCHED: dict[str, Any] = {"norms": "slnp", "inputs": "none", "repair": "none"}

# Nothing pruned

EVERY_OPTION: dict[str, dict[str, Any]] = {
    "ours": {
        "norms": "calibrated", "inputs": "lstsq", "repair": "lstsq", "target": "corrected", "biases": "own",
        "refine": 3, "trials": 3, "depth": "clap", "absorb": "safe", "rotate": "pca", "shapes": "per-layer",
    },
    "papers": {
        "axes": ("ffn", "kv"), "norms": "slnp", "repair": "diagonal", "target": "own", "biases": "stock",
        "ratio": "softmax", "shapes": "per-layer", "score": "slim", "absorb": "all", "absorb_constant": "mean-inverse",
    },
    "cheap": {"norms": "none", "repair": "bias", "target": "dense", "biases": "own", "score": "flap", "depth": "clap"},
}  # fmt: skip


@pytest.mark.parametrize("options", EVERY_OPTION.values(), ids=EVERY_OPTION)
@pytest.mark.parametrize("case", FAMILIES)
def test_nothing_pruned_is_bit_identical_whatever_is_asked_for(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Methods 1.10.1 and 2.9.1."""
    task = make_task(tmp_path, case, keep=1.0, **options)
    write_result(task, plan_checkpoint(task), tmp_path / "out")
    dense, out = task.checkpoint.folder, tmp_path / "out"
    tensors, written = (load_file(folder / "model.safetensors") for folder in (dense, out))
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert read_config(out) == read_config(dense)
    ids = WINDOWS.ids[:1]
    assert torch.equal(run_decoder(out, ids, torch.float32), run_decoder(dense, ids, torch.float32))


def rebuild_whole(task: Task) -> list[tuple[Weights, Weights]]:
    """Pairs of rebuilt and dense weights by role, with pass 2 run on the plan that keeps everything (ends last)."""
    checkpoint, spec, plan = task.checkpoint, task.spec, keep_everything(task.spec.shape)
    with ExitStack() as stack:
        new = describe_new(spec, plan, task.recipe)
        job = Rebuild(checkpoint, spec, new, plan, task.recipe, storage_types(checkpoint, spec, new))
        streams = open_streams(stack, job, WINDOWS)
        fill_embeddings(checkpoint, spec, WINDOWS, streams.dense)
        start_pruned(new, WINDOWS, streams, cut_ends(job, ("embed",))["embed"])
        layers = [(w, read_layer(checkpoint, spec, i)) for i, w in enumerate(rebuild_layers(job, streams))]
        ends = {**cut_ends(job), "final_norm": finish_norm(job, streams)}
    return [*layers, (ends, {role: checkpoint.read_one(spec.names[role]) for role in ends})]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in FAMILIES)]
)
def test_pass_two_of_nothing_pruned_changes_no_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Cutting, merging, SLNP and rounding are identities."""
    for found, dense in rebuild_whole(make_task(tmp_path, case, dtype, **UNTOUCHED)):
        assert found.keys() == dense.keys()
        assert all(found[role].dtype == dtype and torch.equal(found[role], tensor) for role, tensor in dense.items())


@pytest.mark.parametrize(
    "options",
    [
        {"repair": "lstsq", "target": "corrected", "inputs": "lstsq"},
        {"repair": "lstsq", "target": "dense", "inputs": "none"},
        {"repair": "diagonal", "target": "corrected"},
        {"repair": "diagonal", "target": "own", "axes": ("ffn", "kv")},
    ],
    ids=lambda options: f"{options['repair']}-{options['target']}",
)
@pytest.mark.parametrize("case", [*FAMILIES, "llama-biases"])
def test_repairs_of_nothing_pruned_are_one_and_zero(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Methods 2.9.1: A = 1, B = 0 up to rounding; the same for refitted inputs, calibrated norms and the final norm."""
    task = make_task(tmp_path, case, norms="calibrated", **options)
    for found, dense in rebuild_whole(task):
        for role, tensor in dense.items():
            # Float32 products, solved in float64 with a ridge of a thousandth.
            assert float((found[role] - tensor).abs().max() / tensor.abs().max()) < 2e-3, role


@pytest.mark.parametrize("case", ["llama-biases", "gemma2", "phi3"])
def test_steps_of_nothing_pruned_change_nothing(case: str, tmp_path: Path) -> None:
    """Not by a rounding error more than the repair before them, though the layers are refined."""
    options = {"norms": "calibrated", "repair": "lstsq"}
    plain, refined = (rebuild_whole(make_task(tmp_path, case, refine=steps, **options)) for steps in (0, 3))
    for (found, dense), (wanted, _) in zip(refined, plain, strict=True):
        assert all(torch.equal(found[role], wanted[role]) for role in dense)


def test_moved_biases_of_nothing_pruned_stay(tmp_path: Path) -> None:
    task = make_task(tmp_path, "llama-biases", repair="bias", biases="stock")
    for found, dense in rebuild_whole(task):
        for role, tensor in dense.items():
            torch.testing.assert_close(found[role], tensor, rtol=0, atol=1e-5)


# Merged attention


def alike_checkpoint(folder: Path, case: str) -> Path:
    """A tiny model whose layers share their qk-norms, which a merge needs."""
    make_checkpoint(folder, case)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "q_norm" in name or "k_norm" in name:
            tensors[name] = tensors[name.replace(name.split(".")[2], "0", 1)].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def layers_of(folder: Path) -> tuple[ModelSpec, list[Weights]]:
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    return spec, [read_layer(checkpoint, spec, i, DOUBLE) for i in range(len(spec.layers))]


def find_alike(folder: Path) -> int:
    """The first layer after layer 0 whose groups may live on there."""
    spec, layers = layers_of(folder)
    return next(i for i in range(1, 4) if not unlike_layers(spec, 0, i, layers[0], layers[i]))


def run_attention(spec: ModelSpec, index: int, weights: Weights, x: Tensor) -> Tensor:
    frame = make_frame(spec, *x.shape[:2], 0, DOUBLE)
    return attention_branch(spec, weights, attention_context(spec, spec.layers[index], weights, x, frame)[0])


MERGEABLE = [case for case in CASES if case.partition("-")[0] not in ("olmo2", *POST_NORM_FAMILIES)]


@pytest.mark.parametrize("case", MERGEABLE)
def test_a_written_merge_is_both_attentions_in_parallel(case: str, tmp_path: Path) -> None:
    """Methods 1.10.2 on a written folder: K = 2 G groups give the sum of both attentions on one input."""
    folder = alike_checkpoint(tmp_path / "dense", case)
    other, task = find_alike(folder), open_task(folder, **UNTOUCHED)
    full = keep_everything(task.spec.shape).layers
    row = replace(full[0], merged=(MergedGroups(other, (0, 1, 2)),))
    result = write_result(task, Plan(tuple(range(48)), (row, *full[other + 1 :])), tmp_path / "out")
    assert result.spec.shape.layers[0].kv_heads == 6
    assert_sample_matches(result, tmp_path / "out")
    old, dense = layers_of(folder)
    new, merged = layers_of(tmp_path / "out")
    x = torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(3), dtype=DOUBLE) + 0.3
    apart = [run_attention(old, i, dense[i], x) for i in (0, other)]
    together = run_attention(new, 0, merged[0], x)
    assert float((together - sum(apart)).abs().max()) <= 1e-5  # the moved columns were rounded to float32
    assert float(apart[1].abs().max()) > 0.01
    for role in ("gate", "up", "down", "mlp_in"):
        assert torch.equal(merged[0][role], dense[0][role])


@pytest.mark.parametrize("case", ["llama-biases", "mistral", "qwen2", "qwen3", "phi3", "smollm3"])
def test_merged_groups_load_in_stock_code_and_are_repaired(case: str, tmp_path: Path) -> None:
    folder = alike_checkpoint(tmp_path / "dense", case)
    other, task = find_alike(folder), open_task(folder)
    row = replace(HALF.layers[0], kv_groups=(2,), merged=(MergedGroups(other, (1,)),))
    plan = replace(HALF, layers=(row, *HALF.layers[other + 1 :]))
    result = write_result(task, plan, tmp_path / "out")
    assert {layer.kv_heads for layer in result.spec.shape.layers} == {2}
    assert_sample_matches(result, tmp_path / "out")
    assert_opens_in_transformers(tmp_path / "out")
    write_plain(task, plan, tmp_path / "plain")
    repaired, cut = (stream_error(tmp_path / name, task, plan) for name in ("out", "plain"))
    assert repaired < 0.9 * cut


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3"])
def test_a_plan_may_merge_by_itself(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, depth="clap", axes=("layers", "kv"), keep=0.5)
    plan = plan_checkpoint(task)
    assert any(row.merged for row in plan.layers)
    result = write_result(task, plan, tmp_path / "out")
    assert_sample_matches(result, tmp_path / "out")
    assert_opens_in_transformers(tmp_path / "out")


# Absorbed norms

RELATIVES = {"glm4": "glm", "pangu_sandwich": "llama"}


def absorb_rows(plan: Plan, roles: Mapping[int, tuple[str, ...]], constant: float = 1.3) -> Plan:
    rows = [replace(r, absorbed=tuple((role, constant) for role in roles.get(r.layer, ()))) for r in plan.layers]
    return replace(plan, layers=tuple(rows))


SOME: dict[int, tuple[str, ...]] = {0: ("attn_out",), 1: tuple(POST_NORMS), 3: ("mlp_out",)}
ALL: dict[int, tuple[str, ...]] = dict.fromkeys(range(4), tuple(POST_NORMS))


@pytest.mark.parametrize("roles", [SOME, ALL], ids=["some", "all"])
@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_absorbed_norms_are_gone_from_the_written_model(
    case: str, roles: dict[int, tuple[str, ...]], tmp_path: Path
) -> None:
    task = make_task(tmp_path, case, **UNTOUCHED)
    plan = absorb_rows(keep_everything(task.spec.shape), roles)
    result = write_result(task, plan, tmp_path / "out")
    assert_sample_matches(result, tmp_path / "out")
    spec, layers = layers_of(tmp_path / "out")
    old, dense = layers_of(task.checkpoint.folder)
    for index, (weights, wanted) in enumerate(zip(layers, dense, strict=True)):
        for role in roles.get(index, ()):
            wanted = absorb_post_norm(old, wanted, role, 1.3)
        assert set(spec.layers[index].shape.norms) == set(wanted) & {"attn_in", "mlp_in", *POST_NORMS}
        assert weights.keys() == wanted.keys()
        for role, tensor in wanted.items():
            torch.testing.assert_close(weights[role], tensor, rtol=1e-6, atol=1e-7)
    config = read_config(tmp_path / "out")
    assert config["model_type"] == (RELATIVES.get(case) if roles == ALL else None) or task.spec.config["model_type"]
    if roles == ALL and case in RELATIVES:
        assert explain_not_stock(config) == ""
        assert_opens_in_transformers(tmp_path / "out")
    else:
        assert explain_not_stock(config)


@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_absorbed_and_cut_at_once_is_repaired_against_the_dense_model(case: str, tmp_path: Path) -> None:
    task, plan = make_task(tmp_path, case), absorb_rows(HALF, ALL)
    result = write_result(task, plan, tmp_path / "out")
    assert_sample_matches(result, tmp_path / "out")
    if case in RELATIVES:
        assert read_config(tmp_path / "out")["model_type"] == RELATIVES[case]
        assert_opens_in_transformers(tmp_path / "out")
    write_plain(task, plan, tmp_path / "plain")
    repaired, cut = (stream_error(tmp_path / name, task, plan) for name in ("out", "plain"))
    assert repaired < 0.75 * cut


def measure_absorption(task: Task, plan: Plan) -> dict[tuple[int, str], float]:
    """Relative error of every absorbed branch on the dense stream, on the tokens that count."""
    checkpoint, spec, found = task.checkpoint, task.spec, {}
    x = embed_rows(checkpoint, spec, WINDOWS.ids, torch.float32)
    frame = make_frame(spec, *WINDOWS.ids.shape)
    for index, row in enumerate(plan.layers):
        weights = read_layer(checkpoint, spec, index, torch.float32)
        mask = ordinary_tokens(x)[0]
        context = attention_context(spec, spec.layers[index], weights, x, frame)[0]
        activation = mlp_activation(spec, weights, x + attention_branch(spec, weights, context))
        for role, constant in row.absorbed:
            changed = absorb_post_norm(spec, weights, role, constant)
            run = {"attn_out": (attention_branch, context), "mlp_out": (mlp_branch, activation)}[role]
            wanted, present = (run[0](spec, w, run[1])[mask] for w in (weights, changed))
            found[index, role] = float((present - wanted).norm() / wanted.norm())
        x = run_layer(spec, spec.layers[index], weights, x, frame)[0]
    return found


@pytest.mark.parametrize("constant", ["least-squares", "mean-inverse"])
@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_the_plan_predicts_the_error_of_absorption(case: str, constant: str, tmp_path: Path) -> None:
    """Methods 1.10.5: within 5 % of what is measured, for every norm; its spread is in the plan too."""
    task = make_task(tmp_path, case, absorb="all", absorb_constant=constant, axes=("ffn",), keep=0.9)
    plan = plan_checkpoint(task)
    measured = measure_absorption(task, plan)
    noted = {(entry["layer"], entry["norm"]): entry for entry in plan.notes["absorption"]}
    assert len(measured) == 8 == len(noted)
    for key, error in measured.items():
        assert noted[key]["error"] == pytest.approx(error, rel=0.05)
        assert noted[key]["variation"] > 0.02
        assert error > 0.02


@pytest.mark.parametrize(("case", "dtype"), [("gemma2", torch.float32), ("glm4", torch.bfloat16)], ids=str)
def test_a_model_without_some_norms_is_compressed_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The first layer has none left, the others do: types, shapes and repairs go by each layer's own."""
    task = make_task(tmp_path, case, dtype)
    write_result(task, absorb_rows(HALF, {0: tuple(POST_NORMS), 2: ("mlp_out",)}), tmp_path / "once")
    again = open_task(tmp_path / "once", keep=0.8, axes=("ffn",))
    result = write_result(again, plan_checkpoint(again), tmp_path / "twice")
    assert [set(POST_NORMS) - set(x.norms) for x in result.spec.shape.layers] == [
        set(POST_NORMS), set(), {"mlp_out"}, set()
    ]  # fmt: skip
    assert {tensor.dtype for tensor in load_file(tmp_path / "twice" / "model.safetensors").values()} == {dtype}
    assert_sample_matches(result, tmp_path / "twice")


def test_only_steady_norms_are_absorbed_when_it_is_to_be_safe(tmp_path: Path) -> None:
    notes = plan_checkpoint(make_task(tmp_path, "glm4", absorb="all", axes=("ffn",), keep=0.8)).notes["absorption"]
    limit = sorted(entry["variation"] for entry in notes)[3] + 1e-4
    task = open_task(tmp_path / "dense", absorb="safe", absorb_limit=limit, axes=("ffn",), keep=0.8)
    plan = plan_checkpoint(task)
    assert sum(len(row.absorbed) for row in plan.layers) == sum(entry["go"] for entry in plan.notes["absorption"]) == 4
    result = write_result(task, plan, tmp_path / "out")
    assert_sample_matches(result, tmp_path / "out")
    assert "norms behind" in explain_not_stock(read_config(tmp_path / "out"))


# Added biases

@pytest.mark.parametrize(
    ("case", "repair"),
    [("llama", "lstsq"), ("llama", "bias"), ("granite", "diagonal"), ("smollm3", "bias"), ("pangu_embedded", "lstsq")],
)
def test_biases_of_the_familys_own_class_are_filled_and_opened(case: str, repair: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, repair=repair, biases="stock")
    result = write_result(task, HALF, tmp_path / "out")
    weights = layers_of(tmp_path / "out")[1]
    assert all(float(w[name].abs().min()) > 0 for w in weights for name in ("o_bias", "down_bias"))
    assert "lightpress" not in read_config(tmp_path / "out")
    assert_sample_matches(result, tmp_path / "out")
    assert_opens_in_transformers(tmp_path / "out")
    write_plain(task, HALF, tmp_path / "plain")
    repaired, cut = (stream_error(tmp_path / name, task, HALF) for name in ("out", "plain"))
    assert repaired < 0.97 * cut


@pytest.mark.parametrize("case", [case for case in FAMILIES if case not in POST_NORM_FAMILIES])
def test_biases_of_our_own_are_written_and_read_back(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, biases="own")
    result = write_result(task, HALF, tmp_path / "out")
    assert set(result.spec.shape.layers[0].biases) >= {"o", "down"}
    own = read_config(tmp_path / "out").get("lightpress", {}).get("biases")
    assert own is None or set(own) <= {"o", "down"}
    assert bool(own) == bool(explain_not_stock(read_config(tmp_path / "out"))) or not task.spec.family.stock
    assert_sample_matches(result, tmp_path / "out")


def test_a_bias_helps_the_least_squares(tmp_path: Path) -> None:
    """SlimLLM's regression with B against through the origin."""
    task = make_task(tmp_path, "llama", axes=("ffn", "kv"), **{**UNTOUCHED, "repair": "diagonal"})
    plan = replace(HALF, hidden=tuple(range(48)))
    write_result(task, plan, tmp_path / "none")
    write_result(replace(task, recipe=replace(task.recipe, biases="stock")), plan, tmp_path / "stock")
    with_bias, without = (stream_error(tmp_path / name, task, plan) for name in ("stock", "none"))
    assert with_bias < without


@pytest.mark.parametrize("case", ["qwen2", "mistral", "glm"])
def test_a_bias_without_a_stock_place_is_refused(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, biases="stock")
    with pytest.raises(UserError, match="no place for a bias"):
        write_result(task, HALF, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Rotation


@pytest.mark.parametrize("case", ["llama-tied", "pangu_embedded", "qwen3", "phi3", "granite"])
def test_a_rotated_run_is_what_is_written(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, rotate="pca", axes=("hidden",), keep=0.7)
    plan = plan_checkpoint(task)
    assert plan.hidden == tuple(range(len(plan.hidden)))
    result = write_result(task, plan, tmp_path / "out")
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    assert_sample_matches(result, tmp_path / "out")
    assert_opens_in_transformers(tmp_path / "out")
    logits = [run_decoder(f, WINDOWS.ids, torch.float32) for f in (task.checkpoint.folder, tmp_path / "out")]
    plain = open_task(tmp_path / "dense", axes=("hidden",), **UNTOUCHED)
    write_result(plain, replace(plan, hidden=tuple(range(len(plan.hidden)))), tmp_path / "first")
    first = run_decoder(tmp_path / "first", WINDOWS.ids, torch.float32)
    assert float((logits[1] - logits[0]).norm()) < float((first - logits[0]).norm())


@pytest.mark.parametrize("case", ["llama-tied", "granite"])
def test_a_rotation_that_cuts_nothing_is_not_made(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, rotate="pca", axes=("ffn",), **UNTOUCHED)
    plan = plan_checkpoint(task)
    write_result(task, plan, tmp_path / "out")
    dense, written = (load_file(f / "model.safetensors") for f in (task.checkpoint.folder, tmp_path / "out"))
    assert torch.equal(written["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert read_config(tmp_path / "out")["tie_word_embeddings"] == (case == "llama-tied")


def test_a_rotation_pins_what_the_plan_was_made_with(tmp_path: Path) -> None:
    """Turned with the others, a massive channel would spread, and sinks could not be told from ordinary tokens."""
    folder = make_checkpoint(tmp_path / "dense", "llama")
    place_sink(folder)
    task = open_task(folder, rotate="pca", axes=("hidden",), keep=0.8)
    plan = plan_checkpoint(task)
    assert plan.notes["pinned_channels"] == [4]
    write_result(task, plan, tmp_path / "out")
    written, dense = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folder))
    assert torch.equal(written["model.embed_tokens.weight"][:, 0], dense["model.embed_tokens.weight"][:, 4])


# The same run twice


def test_two_runs_with_every_option_on_are_equal(tmp_path: Path) -> None:
    """Methods 2.9.6: plan and tensors, with measured plans and the block-wise solve; another seed is another run."""
    options = {"trials": 2, "refine": 2, "depth": "clap", "shapes": "per-layer", "axes": ("ffn", "kv", "layers")}
    task = make_task(tmp_path, "gemma2", **options)
    plans = [plan_checkpoint(task) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].notes == plans[1].notes
    assert len(plans[0].notes["tried"]) == 2
    files = []
    for number, seed in enumerate((0, 0, 1)):
        run = replace(task, recipe=replace(task.recipe, seed=seed))
        write_result(run, plans[0], tmp_path / str(number))
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
