"""Folder in, folder out: what is written is what the streamed run saw, and transformers opens it."""

from __future__ import annotations

import errno
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slow_twins
import torch
from safetensors.torch import load_file
from test_decoder import TOLERANCE, run_decoder, run_reference
from tiny import CASES, FAMILIES, make_checkpoint, make_config
from torch import Tensor

from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.decoder import apply_norm, make_frame, project
from compress.errors import UserError
from compress.evaluate import fill_hidden
from compress.family import find_family
from compress.hidden import HiddenStore, batches
from compress.pipeline import Result, Task, compress_checkpoint, find_units, plan_checkpoint
from compress.plan import LayerPlan, Plan, keep_everything
from compress.recipe import Recipe
from compress.solve import RIDGE
from compress.spec import ModelSpec
from compress.stats import ordinary_tokens
from compress.surgery.describe import new_config
from compress.surgery.rebuild import ATTENTION, MLP, Half, half_inputs
from compress.surgery.width import axis_rows, slice_weights
from compress.text import Windows
from compress.weights import Weights, embed_rows, read_layer, read_spec

WINDOWS = Windows(torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(3)), "random")
# Tiny models would be refined and their plans tried, which takes seconds: only tests about these ask for them.
SMALL = Recipe(keep=0.6, multiple=8, refine=0, trials=0)
# The least squares of o and down alone.
PURE: dict[str, Any] = {"norms": "slnp", "inputs": "none"}


def open_task(folder: Path, **recipe: Any) -> Task:
    checkpoint = open_checkpoint(folder)
    return Task(checkpoint, read_spec(checkpoint), WINDOWS, replace(SMALL, **recipe))


def make_task(folder: Path, case: str, dtype: torch.dtype = torch.float32, **recipe: Any) -> Task:
    return open_task(make_checkpoint(folder / "dense", case, dtype), **recipe)


def write_result(task: Task, plan: Plan, out: Path) -> Result:
    with CheckpointWriter(out, new_config(task.spec, plan, task.recipe), task.recipe.shard_bytes) as writer:
        result = compress_checkpoint(task, plan, writer)
        writer.finish()
    return result


def write_plain(task: Task, plan: Plan, out: Path) -> Result:
    """Cut only, for comparison."""
    return write_result(replace(task, recipe=replace(task.recipe, repair="none", **PURE)), plan, out)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def last_stream(folder: Path) -> Tensor:
    """The stream behind the last layer on all calibration windows."""
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    with HiddenStore((*WINDOWS.ids.shape, spec.shape.hidden)) as store:
        fill_hidden(checkpoint, spec, WINDOWS, store)
        return store.read(0, len(WINDOWS.ids))


def stream_error(folder: Path, task: Task, plan: Plan) -> float:
    """Squared error of the last stream against the dense one on ordinary tokens, as a share of the dense energy."""
    dense = last_stream(task.checkpoint.folder)
    mask = ordinary_tokens(dense)[0]
    wanted = dense[..., list(plan.hidden)]
    return float((last_stream(folder) - wanted)[mask].pow(2).sum() / wanted[mask].pow(2).sum())


def assert_sample_matches(result: Result, folder: Path, bound: float = 1e-4) -> None:
    """The logits of the streamed run against a fresh run of the written folder."""
    fresh = run_decoder(folder, result.sample_ids, torch.float32)
    assert torch.isfinite(fresh).all()
    assert float((result.sample_logits - fresh).abs().max() / fresh.abs().max()) <= bound


def assert_opens_in_transformers(folder: Path, ids: Tensor = WINDOWS.ids[:2]) -> None:
    if find_family(read_config(folder), str(folder)).stock:
        theirs = run_reference(folder, ids, torch.float64)
        assert float((run_decoder(folder, ids, torch.float64) - theirs).abs().max()) <= TOLERANCE[torch.float64]


# Keeping everything


@pytest.mark.parametrize("case", FAMILIES)
def test_keeping_everything_changes_no_bit(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, keep=1.0)
    result = write_result(task, plan_checkpoint(task), tmp_path / "out")
    dense = load_file(task.checkpoint.folder / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == dense.keys()
    for name, tensor in dense.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    assert read_config(tmp_path / "out") == read_config(task.checkpoint.folder)
    logits = run_decoder(task.checkpoint.folder, result.sample_ids, torch.float32)
    assert torch.equal(run_decoder(tmp_path / "out", result.sample_ids, torch.float32), logits)
    assert_sample_matches(result, tmp_path / "out", 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3_text"])
def test_keeping_everything_changes_no_bit_of_half_types(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, dtype, keep=1.0)
    write_result(task, plan_checkpoint(task), tmp_path / "out")
    dense = load_file(task.checkpoint.folder / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in dense.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor), name


def mix_dtypes(folder: Path) -> dict[str, Tensor]:
    """Norms and head in float32 beside bfloat16 projections, as some trainers leave them."""
    from safetensors.torch import save_file  # noqa: PLC0415 (only here)

    tensors = load_file(folder / "model.safetensors")
    mixed = {n: t.float() + 1e-6 if "norm" in n or "head" in n else t.bfloat16() for n, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    return mixed


def test_keeping_everything_changes_no_bit_of_mixed_types(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    mixed = mix_dtypes(folder)
    task = open_task(folder, keep=1.0)
    write_result(task, plan_checkpoint(task), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in mixed.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name


def test_keeping_everything_of_a_tied_matrix_stored_as_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 (only here)

    folder = make_checkpoint(tmp_path / "dense", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    task = open_task(folder, keep=1.0)
    result = write_result(task, plan_checkpoint(task), tmp_path / "out")
    assert_sample_matches(result, tmp_path / "out", 1e-6)
    assert_opens_in_transformers(tmp_path / "out")


# Compressing


@pytest.mark.parametrize("case", CASES)
def test_a_compressed_folder_is_what_the_run_saw(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case)
    plan = plan_checkpoint(task)
    result = write_result(task, plan, tmp_path / "out")
    spec = read_spec(open_checkpoint(tmp_path / "out"))
    assert spec.shape == result.spec.shape
    assert spec.shape.layer_parameters <= 0.6 * task.spec.shape.layer_parameters
    assert spec.shape.layer_parameters == pytest.approx(
        plan.notes["kept_fraction"] * task.spec.shape.layer_parameters, rel=1e-12
    )
    assert_sample_matches(result, tmp_path / "out")
    assert_opens_in_transformers(tmp_path / "out")
    # Repaired against unrepaired, on the tokens of the repair.
    assert_sample_matches(write_plain(task, plan, tmp_path / "plain"), tmp_path / "plain")
    repaired, cut = (stream_error(tmp_path / name, task, plan) for name in ("out", "plain"))
    assert repaired < 0.9 * cut


HALF = Plan(
    tuple(range(0, 48, 2)) + tuple(range(33, 48, 2)),
    tuple(LayerPlan(i, (0, 2), tuple(range(i % 2, 56, 2))) for i in range(4)),
)
HALF = replace(HALF, hidden=tuple(sorted(HALF.hidden)))  # 32 channels: 4 heads divide it


@pytest.mark.parametrize("case", CASES)
def test_repair_helps_on_every_axis_at_once(case: str, tmp_path: Path) -> None:
    """A plan that does not depend on scores, so that hidden channels and groups go in every family."""
    task = make_task(tmp_path, case)
    plan = HALF
    if case == "mistral-no-window":  # 9 heads in 3 groups
        assert task.spec.layers[0].shape.group == 3
    result = write_result(task, plan, tmp_path / "out")
    assert_sample_matches(result, tmp_path / "out")
    assert_opens_in_transformers(tmp_path / "out")
    write_plain(task, plan, tmp_path / "plain")
    repaired, cut = (stream_error(tmp_path / name, task, plan) for name in ("out", "plain"))
    assert repaired < 0.75 * cut
    assert repaired < 0.9


def fit_half(half: Half, cut: Weights, x: Tensor, wanted: Tensor, scale: Tensor, model: ModelSpec) -> Weights:
    """What the repair of one branch should give (float64): `x` `[tokens, in]` and the wanted change of the stream."""
    weight, bias = cut[half.projection], cut.get(f"{half.projection}_bias")
    if half.norm not in cut:
        goal = wanted / model.residual_multiplier
        if bias is None:
            return {half.projection: slow_twins.fit_projection(x, goal, weight, RIDGE)}
        fitted, shift = slow_twins.fit_with_bias(x, goal, weight, RIDGE)
        return {half.projection: fitted, f"{half.projection}_bias": shift}
    gain, scaled = cut[half.norm] + model.norm_offset, x * scale
    now, tau = scaled @ weight.T, 0.3 * gain.abs().median()
    goal = now + (wanted - gain * now) * gain / (gain**2 + tau**2)
    fitted = slow_twins.fit_projection(scaled, goal, weight, RIDGE)
    raw = x @ fitted.T
    unit = raw * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + model.eps)
    return {
        half.projection: fitted,
        half.norm: slow_twins.fit_gain(unit, wanted, gain, RIDGE) - model.norm_offset,
    }


@pytest.mark.parametrize("case", ["llama", "llama-biases", "granite", "glm4", "gemma2", "olmo2", "phi3"])
def test_the_repair_is_the_least_squares_fit_to_the_dense_stream(case: str, tmp_path: Path) -> None:
    """Both branches of the first layer, fitted from scratch on stacked data in float64."""
    task = make_task(tmp_path, case, **PURE)
    write_result(task, HALF, tmp_path / "out")
    out, ids, double = open_checkpoint(tmp_path / "out"), WINDOWS.ids, torch.float64
    old, new, hidden = task.spec, read_spec(out), torch.tensor(HALF.hidden)
    row = HALF.layers[0]
    rows = axis_rows(old.layers[0].shape, hidden, torch.tensor(row.kv_groups), torch.tensor(row.ffn))
    dense = read_layer(task.checkpoint, old, 0, double)
    cut, written = slice_weights(old, dense, rows), read_layer(out, new, 0, double)
    frame = make_frame(old, *ids.shape, 0, double)
    d, p = embed_rows(task.checkpoint, old, ids, double), embed_rows(out, new, ids, double)
    mask = ordinary_tokens(d)[0]
    for half in (ATTENTION, MLP):
        raw = project(dense, half.projection, half_inputs(old, 0, half, dense, d, frame))
        scale = torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + old.eps)
        d = d + apply_norm(old, dense, half.norm, raw) * old.residual_multiplier
        x = half_inputs(new, 0, half, cut, p, frame)
        fitted = fit_half(half, cut, x[mask], (d[..., hidden] - p)[mask], scale[mask], new)
        for role, tensor in fitted.items():
            torch.testing.assert_close(written[role], tensor, rtol=1e-3, atol=1e-3)
            assert float((written[role] - cut[role]).abs().max()) > 0.03  # the fit moved it well beyond the tolerance
        branch = apply_norm(new, written, half.norm, project(written, half.projection, x))
        p = p + branch * new.residual_multiplier


@pytest.mark.parametrize("case", ["llama", "qwen2", "olmo2", "phi3", "granite"])
def test_a_head_size_that_config_left_out_is_written_when_it_no_longer_follows(case: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", case)
    config = {key: value for key, value in read_config(folder).items() if key != "head_dim"}
    (folder / "config.json").write_text(json.dumps(config))
    task = open_task(folder, repair="none", **PURE)
    everything = keep_everything(task.spec.shape)
    fewer = replace(everything, layers=tuple(replace(layer, kv_groups=(0, 2)) for layer in everything.layers))
    for place, plan in enumerate((fewer, replace(everything, hidden=tuple(range(36))), HALF)):
        result = write_result(task, plan, tmp_path / f"out{place}")
        assert {layer.shape.head_dim for layer in read_spec(open_checkpoint(tmp_path / f"out{place}")).layers} == {8}
        assert_sample_matches(result, tmp_path / f"out{place}")
        assert_opens_in_transformers(tmp_path / f"out{place}")


@pytest.mark.parametrize(("case", "dtype"), [("llama-tied", torch.float32), ("gemma2", torch.bfloat16)], ids=str)
def test_refined_layers_of_a_tried_plan_are_what_is_written(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As the default is for small models, with fewer steps and trials; all channels stay, so that errors compare."""
    task = make_task(tmp_path, case, dtype, refine=6, trials=2, axes=("ffn", "kv"), keep=0.8)
    plan = plan_checkpoint(task)
    tried = [trial["loss"] for trial in plan.notes["tried"]]
    assert 1 <= len(tried) <= 2
    assert plan.notes["measured_loss"] == min(tried)
    result = write_result(task, plan, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert_sample_matches(result, tmp_path / "out")
    assert_opens_in_transformers(tmp_path / "out")
    write_result(replace(task, recipe=replace(task.recipe, refine=0)), plan, tmp_path / "closed")
    refined, closed = (stream_error(tmp_path / name, task, plan) for name in ("out", "closed"))
    assert refined < closed


DROPS = {"first": (1, 2, 3), "middle": (0, 3), "last": (0, 1, 2), "first and last": (1, 2), "all but one": (2,)}


def drop_layers(task: Task, kept: tuple[int, ...]) -> Plan:
    plan = keep_everything(task.spec.shape)
    return replace(plan, layers=tuple(plan.layers[index] for index in kept))


@pytest.mark.parametrize("kept", DROPS.values(), ids=DROPS)
@pytest.mark.parametrize("case", ["llama", "glm4", "olmo2", "gemma3_text"])
def test_dropped_layers_are_made_up_for(case: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    task = make_task(tmp_path, case, **PURE)
    plan = drop_layers(task, kept)
    result = write_result(task, plan, tmp_path / "out")
    assert_sample_matches(result, tmp_path / "out")
    write_plain(task, plan, tmp_path / "plain")
    repaired, cut = (stream_error(tmp_path / name, task, plan) for name in ("out", "plain"))
    assert repaired < 0.8 * cut


@pytest.mark.parametrize("case", ["mistral", "olmo2"])
def test_the_layers_axis_alone(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case, axes=("layers",))
    plan = plan_checkpoint(task)
    assert len(plan.layers) == 2
    assert {0, 3} == set(plan.kept_layers)
    assert plan.hidden == tuple(range(48))
    assert_sample_matches(write_result(task, plan, tmp_path / "out"), tmp_path / "out")


PATTERNED = [
    "gemma2", "gemma3_text", "gemma3_text-linear", "qwen2-window", "smollm3", "smollm3-window", "mistral",
    "phi3-partial",
]  # fmt: skip


@pytest.mark.parametrize("kept", [(1, 2, 3), (0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("case", PATTERNED)
def test_facts_by_layer_move_with_their_layers(case: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    """Windows, rotary bases and layers without rotation: rules by index would shift when layers go."""
    task = make_task(tmp_path, case, repair="none", **PURE)
    write_result(task, drop_layers(task, kept), tmp_path / "out")
    spec = read_spec(open_checkpoint(tmp_path / "out"))
    assert [x.window for x in spec.layers] == [task.spec.layers[i].window for i in kept]
    assert [x.rope for x in spec.layers] == [task.spec.layers[i].rope for i in kept]
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(5))
    assert_opens_in_transformers(tmp_path / "out", ids)


def test_a_dropped_layer_is_gone_and_the_others_untouched(tmp_path: Path) -> None:
    task = make_task(tmp_path, "qwen3", repair="none", **PURE)
    write_result(task, drop_layers(task, (0, 2, 3)), tmp_path / "out")
    dense = load_file(task.checkpoint.folder / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in written.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str([0, 2, 3][int(parts[2])])
        assert torch.equal(tensor, dense[".".join(parts)]), name
    assert len(written) < len(dense)


UNEVEN = Plan(
    tuple(range(48)),
    (
        LayerPlan(0, (0, 1, 2), tuple(range(0, 56, 2))),
        LayerPlan(1, (2,), tuple(range(56))),
        LayerPlan(3, (0, 2), (5,)),
    ),
)


@pytest.mark.parametrize("case", FAMILIES)
def test_uneven_layers_are_written_and_read_back(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case)
    result = write_result(task, UNEVEN, tmp_path / "out")
    spec = read_spec(open_checkpoint(tmp_path / "out"))
    assert [x.kv_heads for x in spec.shape.layers] == [3, 1, 2]
    assert [x.ffn for x in spec.shape.layers] == [28, 56, 1]
    assert set(read_config(tmp_path / "out")["per_layer_config"]) == {"1", "2"}
    assert_sample_matches(result, tmp_path / "out")


def test_an_uneven_model_is_compressed_again(tmp_path: Path) -> None:
    """Sizes per layer in, and the next plan keeps to them: first with a budget, then with all layers kept."""
    task = make_task(tmp_path, "mistral")
    write_result(task, UNEVEN, tmp_path / "once")
    again = open_task(tmp_path / "once", keep=1.0)
    result = write_result(again, plan_checkpoint(again), tmp_path / "same")
    assert read_config(tmp_path / "same") == read_config(tmp_path / "once")
    assert_sample_matches(result, tmp_path / "same", 1e-5)
    smaller = Plan(UNEVEN.hidden, (LayerPlan(0, (1, 2), tuple(range(28))), LayerPlan(1, (0,), tuple(range(20)))))
    result = write_result(again, smaller, tmp_path / "twice")
    assert [x.kv_heads for x in result.spec.shape.layers] == [2, 1]
    assert_sample_matches(result, tmp_path / "twice")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", FAMILIES)
def test_half_types_stay_and_the_run_sees_what_is_written(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounding to bfloat16 moves logits by a per cent: a run on unrounded weights would show."""
    task = make_task(tmp_path, case, dtype)
    result = write_result(task, HALF, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    assert_sample_matches(result, tmp_path / "out")


def test_mixed_types_stay_when_channels_go(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    mixed = mix_dtypes(folder)
    result = write_result(open_task(folder), HALF, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        name: tensor.dtype for name, tensor in mixed.items()
    }
    assert_sample_matches(result, tmp_path / "out")


def test_heads_that_do_not_divide_open_as_another_family(tmp_path: Path) -> None:
    task = make_task(tmp_path, "llama")
    plan = replace(keep_everything(task.spec.shape), hidden=tuple(range(40)))
    result = write_result(task, plan, tmp_path / "out")
    assert read_config(tmp_path / "out")["model_type"] == "mistral"
    assert_sample_matches(result, tmp_path / "out")
    assert_opens_in_transformers(tmp_path / "out")


def test_a_shape_that_nobody_opens_is_refused_before_any_work(tmp_path: Path) -> None:
    task = make_task(tmp_path, "gemma2")
    plan = replace(keep_everything(task.spec.shape), hidden=tuple(range(40)))
    with pytest.raises(UserError, match="6 heads"):
        new_config(task.spec, plan)


@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
def test_a_run_is_deterministic_and_shards_do_not_matter(case: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, case)
    plan = plan_checkpoint(task)
    assert plan_checkpoint(task) == plan
    write_result(task, plan, tmp_path / "one")
    write_result(replace(task, recipe=replace(task.recipe, shard_bytes=20_000)), plan, tmp_path / "two")
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    assert len({info.file for info in two.tensors.values()}) > 3
    for name in one.tensors:
        assert torch.equal(one.read_one(name), two.read_one(name)), name


# The store of hidden states


def test_spilling_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spills = tmp_path / "spills"
    spills.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spills))
    task = make_task(tmp_path, "glm4")
    spilling = replace(task, recipe=replace(task.recipe, spill_bytes=0))
    plan = plan_checkpoint(task)
    assert plan_checkpoint(spilling) == plan
    found, spilled = find_units(task), find_units(spilling)
    assert torch.equal(found.hidden_score, spilled.hidden_score)
    assert found.layers == spilled.layers
    one = write_result(task, plan, tmp_path / "one")
    two = write_result(spilling, plan, tmp_path / "two")
    assert torch.equal(one.sample_logits, two.sample_logits)
    written, other = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert written.read_bytes() == other.read_bytes()
    assert not list(spills.iterdir())


@pytest.mark.parametrize("spill_bytes", [0, 2**20])
def test_a_store_holds_what_is_written(
    spill_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    values = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    with HiddenStore((5, 3, 4), spill_bytes) as store:
        assert store.spilled == (spill_bytes == 0)
        store.write(0, values[:2])
        store.write(2, values[2:])
        read = store.read(1, 4)
        assert torch.equal(read, values[1:4])
        read.zero_()
        assert torch.equal(store.read(0, 5), values)  # a read is a copy
        store.resize(2)
        assert store.shape == (5, 3, 2)
        store.write(0, values[..., :2])
        assert torch.equal(store.read(0, 5), values[..., :2])
        store.resize(4)
        store.write(3, values[:2])
        assert torch.equal(store.read(3, 5), values[:2])
    assert not list(tmp_path.iterdir())


def test_the_bound_counts_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with HiddenStore((5, 3, 4), 240) as fits, HiddenStore((5, 3, 4), 239) as spills:
        assert not fits.spilled
        assert spills.spilled


def test_the_file_goes_when_the_work_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="stop"), HiddenStore((5, 3, 4), 0) as store:
        assert store.spilled
        assert not list(tmp_path.iterdir())  # nameless from the start: even a killed process leaves nothing
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_a_full_temporary_folder_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(UserError, match="has no room for .* GiB of hidden states .* set TMPDIR"):
        HiddenStore((5, 3, 4), 0)


def test_a_failed_run_leaves_neither_files_nor_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spills = tmp_path / "spills"
    spills.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spills))
    task = make_task(tmp_path, "llama", spill_bytes=0)

    def stop(stage: str, done: int, total: int) -> None:
        assert not list(spills.iterdir())
        if done == 2:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(tmp_path / "out", new_config(task.spec, HALF)) as writer,
    ):
        compress_checkpoint(task, HALF, writer, stop)
    assert not list(spills.iterdir())
    with pytest.raises(KeyboardInterrupt):
        find_units(task, stop)
    assert not list(spills.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"spills", "dense"}


@pytest.mark.parametrize(("windows", "length", "tokens"), [(7, 10, 30), (1, 5000, 2048), (9, 3, 1), (4, 8, 10_000)])
def test_batches_cover_all_windows_once(windows: int, length: int, tokens: int) -> None:
    spans = list(batches(windows, length, tokens))
    assert [place for start, stop in spans for place in range(start, stop)] == list(range(windows))
    assert all((stop - start) * length <= max(tokens, length) for start, stop in spans)


def test_all_cases_have_even_groups() -> None:
    """HALF keeps 2 of 3 groups: the tiny models must have 3, and head counts that divide 32 or need not."""
    assert all(make_config(case)["num_key_value_heads"] == 3 for case in CASES)
