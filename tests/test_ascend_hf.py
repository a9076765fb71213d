"""`export --target ascend-hf`: grids, smoothing and integers against slow twins; folders against a reader of files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ascend_reader import META, Folder, IntLinear
from tiny import CASES, FAMILIES, make_checkpoint, make_config, make_tensors

from backends.ascend_check import check_folder
from backends.ascend_format import LAYOUTS, describe_compressed
from backends.ascend_hf import HfRequest, export_hf, make_form
from cli.ascend_hf import HfFlags, export_ascend_hf
from cli.console import Console
from compress.checkpoint import open_checkpoint
from compress.decoder import compute_logits, make_frame, run_layer
from compress.errors import UserError
from compress.quantize.activations import (
    BINS,
    ChannelRange,
    Histogram,
    InputGrid,
    clip_errors,
    fold_norm,
    make_grid,
    search_grid,
    settle_scale,
    smooth_inputs,
    smooth_reads,
    smoothing_factors,
)
from compress.quantize.w8a8 import (
    DYNAMIC,
    FLOAT,
    STATIC,
    LinearForm,
    as_weights,
    cut_scale,
    multiply_exactly,
    quantise_linear,
    round_gptq,
    round_nearest,
)
from compress.quantize.w8a8_stream import LinearQuantiser
from compress.spec import resolve_model
from compress.surgery.job import ATTENTION, MLP
from compress.text import Windows
from compress.weights import read_layer, read_spec

HALF, BRAIN = torch.float16, torch.bfloat16
SHAPE = {"head_dim": 16, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
A2, P310 = "Ascend910B2", "Ascend310P3"
QUANTISED = ["w8a8-static", "w8a8-dynamic", "compressed-tensors-w8a8", "compressed-tensors-w8a8-static"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_windows(count=4, length=24, seed=3):
    return Windows(torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(seed)), "made")


def make_case(folder, case="llama", dtype=torch.float32, **changes):
    return open_checkpoint(make_checkpoint(folder, case, dtype, **{**SHAPE, **changes}))


def export(checkpoint, folder, soc=A2, quantisation="none", windows=None, **more):
    windows = windows or (make_windows() if quantisation != "none" else None)
    return export_hf(checkpoint, folder, HfRequest(soc, quantisation, **more), windows)


# Grids


def test_histogram_is_a_sum_over_values():
    x, importance = draw(40, 3), torch.tensor([1.0, 2.0, 0.5])
    histogram = Histogram((-1.5, 2.0), importance)
    histogram.update(x)
    slow = [0.0] * BINS
    for row in x.tolist():
        for value, weight in zip(row, importance.tolist(), strict=True):
            place = math.floor((value + 1.5) / (3.5 / BINS))
            slow[min(max(place, 0), BINS - 1)] += weight
    assert histogram.mass.tolist() == pytest.approx(slow)


def test_clip_errors_are_sums_over_bins():
    histogram = Histogram((-3.0, 5.0), torch.ones(2))
    histogram.update(draw(200, 2).abs() * 2 - 1)
    lows, highs = torch.tensor([-3.0, -0.7, 0.0]).double(), torch.tensor([5.0, 2.0, 0.4]).double()
    fast = clip_errors(histogram, lows, highs)
    for i, low in enumerate(lows.tolist()):
        for j, high in enumerate(highs.tolist()):
            step, slow = (high - low) / 255, 0.0
            for centre, mass in zip(histogram.centres.tolist(), histogram.mass.tolist(), strict=True):
                if centre < low:
                    slow += mass * (low - centre) ** 2
                elif centre > high:
                    slow += mass * (centre - high) ** 2
                else:
                    slow += mass * step**2 / 12
            assert float(fast[i, j]) == pytest.approx(slow)


@pytest.mark.parametrize("symmetric", [False, True])
def test_searched_grid_beats_the_full_range_where_one_value_is_far_out(symmetric):
    x = torch.cat([draw(5000), torch.tensor([40.0])])[:, None]
    histogram = Histogram((float(x.min()), float(x.max())), torch.ones(1))
    histogram.update(x)
    grid, whole = search_grid(histogram, BRAIN, symmetric), make_grid(float(x.min()), float(x.max()), BRAIN, symmetric)
    missed = [float((g.decode(g.encode(x)) - x).square().sum()) for g in (grid, whole)]
    assert grid.scale < whole.scale
    assert missed[0] < missed[1]
    assert not symmetric or grid.offset == 0


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_grid_holds_zero_and_both_ends_in_values_of_its_type(dtype):
    for low, high in ((-1.3, 4.0), (0.0, 2.0), (-0.01, 0.0), (0.0, 0.0)):
        grid = make_grid(low, high, dtype)
        ends = torch.tensor([low, 0.0, high])
        assert (grid.decode(grid.encode(ends)) - ends).abs().max() <= grid.scale
        assert grid.decode(grid.encode(torch.zeros(1))).item() == 0
        assert float(torch.tensor(grid.scale, dtype=dtype)) == grid.scale
        assert -128 <= grid.offset <= 127


def test_settled_scale_and_its_rounded_inverse_nearly_cancel():
    worst = 0.0
    for wanted in torch.linspace(0.01, 0.04, 60).tolist():
        scale = settle_scale(wanted, BRAIN)
        assert wanted * 0.996 <= scale <= wanted * 1.025
        worst = max(worst, abs(InputGrid(scale, 0, BRAIN).inverse * scale - 1))
    assert worst < 2e-3


# Smoothing


def test_smoothing_factors_are_smoothquants():
    peak, columns = torch.tensor([4.0, 1.0, 0.25, 0.0]), torch.tensor([1.0, 0.5, 2.0, 1.0])
    raw = [p**0.7 / c**0.3 for p, c in zip(peak[:3].tolist(), columns[:3].tolist(), strict=True)]
    mean = (raw[0] * raw[1] * raw[2]) ** (1 / 3)
    assert smoothing_factors(peak, columns, 0.7).tolist() == pytest.approx([*(value / mean for value in raw), 1.0])


def test_folded_norm_times_factors_is_the_norm():
    gain = draw(64).double() + 1
    gain[3] = 0.0
    for offset in (0.0, 1.0):
        stored, made = fold_norm(gain, offset, draw(64, seed=1).double().abs() + 0.1, BRAIN)
        assert torch.equal(stored, stored.to(BRAIN).double())
        whole = made != 1
        torch.testing.assert_close(((stored + offset) * made)[whole], (gain + offset)[whole], rtol=1e-14, atol=0)
        assert torch.equal(stored[~whole], gain[~whole].to(BRAIN).double())
    assert fold_norm(gain, 0.0, torch.ones(64).double(), BRAIN)[1][3] == 1


@pytest.mark.parametrize("case", sorted(CASES))
def test_smoothing_changes_nothing_in_any_family(case):
    spec = resolve_model(make_config(case), None)
    tensors = make_tensors(spec)
    ids = make_windows(2, 20).ids
    x = tensors[spec.names["embed"]][ids].double() * spec.embedding_multiplier
    frame = make_frame(spec, *ids.shape, dtype=torch.float64)
    for index, layer in enumerate(spec.layers):
        stored = {role: tensors[name].double() for role, name in layer.names.items()}
        weights = {}
        for role, tensor in stored.items():
            parts = layer.parts.get(role, (role,))
            sizes = {"q": layer.shape.query, "k": layer.shape.kv, "v": layer.shape.kv}
            rows = [sizes.get(part, layer.shape.ffn) for part in parts] if len(parts) > 1 else [len(tensor)]
            weights |= dict(zip(parts, torch.split(tensor, rows), strict=True))
        smoothed = dict(weights)
        for half, rows in ((ATTENTION, layer.shape.kv), (MLP, layer.shape.ffn)):
            smooth_inputs(layer, half, smoothed, draw(rows, seed=index).double().exp())
            smooth_reads(spec, half, smoothed, draw(spec.shape.hidden, seed=index + 9).double().exp(), BRAIN)
        moved = [role for role in weights if not torch.equal(weights[role], smoothed[role])]
        reads = {half.reads for half in (ATTENTION, MLP)} & set(weights)
        assert {"v", "o", "up", "down"} | reads <= set(moved)
        exact, _ = run_layer(spec, layer, weights, x, frame)
        torch.testing.assert_close(run_layer(spec, layer, smoothed, x, frame)[0], exact, rtol=1e-10, atol=1e-10)
        x = exact


# Integers


def test_products_are_exact_beyond_what_float32_sums_hold():
    random = torch.Generator().manual_seed(5)
    left = torch.randint(-128, 128, (3, 2, 5000), generator=random)
    right = torch.randint(-128, 128, (7, 5000), generator=random)
    left[0, 0], right[0] = -128, -128
    assert torch.equal(multiply_exactly(left.float(), right.to(torch.int8)).long(), left @ right.T)


def test_cut_scale_keeps_the_nearest_value_of_19_bits():
    scale = draw(500).abs() * 1e-3
    cut = cut_scale(scale)
    assert ((cut.view(torch.int32) & 0x1FFF) == 0).all()
    assert ((cut - scale).abs() / scale).max() <= 2**-11
    assert torch.equal(cut_scale(cut), cut)


def test_gptq_of_whole_rows_is_the_papers_algorithm():
    weight, x = draw(5, 40), draw(300, 40, seed=1) @ (torch.eye(40) + 0.3 * draw(40, 40, seed=2))
    gram, steps = (x.T @ x).double(), weight.abs().amax(1).double() / 20
    codes = round_gptq(weight, gram, steps)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(damped[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    slow = torch.zeros(5, 40, dtype=torch.int8)
    for row in range(5):
        left = weight[row].double()[order].clone()
        for column in range(40):
            code = torch.round(left[column] / steps[row]).clamp(-128, 127)
            slow[row, order[column]] = int(code)
            error = (left[column] - code * steps[row]) / upper[column, column]
            left[column:] -= error * upper[column, column:]
    assert torch.equal(codes, slow)
    missed = [(c.double() * steps[:, None] - weight) for c in (codes, round_nearest(weight, steps))]
    assert (missed[0] @ gram * missed[0]).sum() < (missed[1] @ gram * missed[1]).sum()


@pytest.mark.parametrize("kind", [STATIC, DYNAMIC])
@pytest.mark.parametrize("folds", [True, False])
def test_a_quantised_linear_is_near_the_float_one(kind, folds):
    weight, bias, x = draw(24, 96), draw(24, seed=4), draw(50, 96, seed=1)
    weight[5] = 0.0
    form = LinearForm(kind, BRAIN, folds_bias=folds)
    grid = make_grid(float(x.min()), float(x.max()), BRAIN, symmetric=not folds) if kind == STATIC else None
    linear = quantise_linear(weight, bias, form, grid, (x.T @ x).double())
    y = F.linear(x, weight, bias)
    assert ((linear.apply(x) - y).square().sum() / y.square().sum()).sqrt() < 0.015
    assert linear.codes.dtype == torch.int8
    assert torch.equal(F.linear(x, as_weights({"q": linear})["q"], bias), linear.apply(x))
    rounded = F.linear(linear.round_inputs(x), linear.dequantise(), linear.bias)
    torch.testing.assert_close(linear.apply(x), rounded, rtol=1e-2, atol=1e-2)
    assert (linear.dequantise()[5] == 0).all()


def test_static_inputs_need_text_and_forms_must_exist(tmp_path):
    checkpoint = make_case(tmp_path / "model")
    with pytest.raises(UserError, match="needs calibration text"):
        LinearQuantiser(checkpoint, read_spec(checkpoint), LinearForm(STATIC))
    for bad in ({"kind": "W4A4"}, {"alpha": 1.5}, {"fallback": "W8A16"}):
        with pytest.raises(UserError):
            LinearForm(**bad)


# Folders


def run_exporter(checkpoint, request, ids):
    """Logits of the exporter's own quantised layers, and the layers."""
    spec, form = read_spec(checkpoint), make_form(request)
    embed = checkpoint.read_one(spec.names["embed"], form.dtype).float()
    x, frame, layers = embed[ids] * spec.embedding_multiplier, make_frame(spec, *ids.shape), []
    with LinearQuantiser(checkpoint, spec, form, make_windows()) as quantiser:
        for index, layer in enumerate(spec.layers):
            layers.append(as_weights(quantiser.quantise_layer(index, read_layer(checkpoint, spec, index))))
            x, _ = run_layer(spec, layer, layers[-1], x, frame)
    head = embed if spec.shape.tied else checkpoint.read_one(spec.names["head"], form.dtype).float()
    norm = checkpoint.read_one(spec.names["final_norm"], form.dtype).float()
    return compute_logits(spec, {"final_norm": norm, "head": head}, x), layers


EVERYWHERE = [(case, "w8a8-static") for case in [*FAMILIES, "llama-biases", "llama-tied"]]
SOME = [(case, quantisation) for case in ("llama-biases", "phi3", "gemma2") for quantisation in QUANTISED[1:]]


@pytest.mark.parametrize("case, quantisation", EVERYWHERE + SOME)
def test_reader_of_files_matches_the_exporter(case, quantisation, tmp_path):
    checkpoint = make_case(tmp_path / "model", case)
    request = HfRequest(A2, quantisation, dtype="bfloat16")
    export(checkpoint, tmp_path / "out", A2, quantisation)
    folder, ids = Folder(tmp_path / "out"), make_windows(2, 16, seed=8).ids
    logits, layers = run_exporter(checkpoint, request, ids)
    for index, weights in enumerate(layers):
        for role, own in folder.layer(index).items():
            if isinstance(own, IntLinear):
                x = draw(9, own.shape[1], seed=index) * 2
                assert np.array_equal(own.codes, weights[role].codes.numpy())
                assert torch.equal(own(x), weights[role].apply(x)), role
                torch.testing.assert_close(own.dequantise(), weights[role].dequantise(), rtol=1e-6, atol=1e-9)
            else:
                assert torch.equal(own, weights[role].to(BRAIN).float()), role
    torch.testing.assert_close(folder.logits(ids), logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("soc", [A2, P310])
@pytest.mark.parametrize("quantisation", ["w8a8-static", "w8a8-dynamic"])
def test_ascend_tensors_are_to_the_letter(soc, quantisation, tmp_path):
    checkpoint = make_case(tmp_path / "model", "qwen2")
    report = export(checkpoint, tmp_path / "out", soc, quantisation)
    folder, half = Folder(tmp_path / "out"), soc == P310
    dtype = HALF if half else BRAIN
    assert folder.config["torch_dtype"] == folder.config["dtype"] == ("float16" if half else "bfloat16")
    assert "quantization_config" not in folder.config
    assert set(folder.tensors) == set(folder.kinds)
    prefix, kind = "model.layers.1.self_attn.q_proj", LAYOUTS[quantisation].kind
    out, wide = 64, 64
    wanted = {"weight": (torch.int8, (out, wide)), "weight_scale": (torch.float32, (out, 1)),
              "weight_offset": (torch.float32, (out, 1)), "bias": (dtype, (out,))}  # fmt: skip
    if kind == STATIC:
        factors = torch.int64 if half else torch.float32
        wanted |= {"input_scale": (dtype, (1,)), "input_offset": (dtype, (1,)), "quant_bias": (torch.int32, (out,)),
                   "deq_scale": (factors, (out,))}  # fmt: skip
    stored = {n.removeprefix(f"{prefix}."): t for n, t in folder.tensors.items() if n.startswith(f"{prefix}.")}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == wanted
    assert {folder.kinds[f"{prefix}.{name}"] for name in wanted if name != "bias"} == {kind}
    assert folder.kinds[f"{prefix}.bias"] == folder.kinds["lm_head.weight"] == FLOAT
    assert folder.description["model_quant_type"] == kind
    assert (stored["weight_scale"].to(dtype).float() == stored["weight_scale"]).all() or kind == STATIC
    assert report.kinds == {kind: 14}
    if kind == STATIC:
        check_formula(stored)
    assert check_folder(tmp_path / "out", soc).errors == 0


def check_formula(stored):
    """quant_bias and deq_scale follow from the other tensors (reference/ascend.md, 4.3)."""
    scale, offset = stored["input_scale"].double(), stored["input_offset"].double()
    factor = stored["deq_scale"]
    factor = factor.to(torch.int32).view(torch.float32) if factor.dtype == torch.int64 else factor
    assert torch.allclose(factor.double(), scale * stored["weight_scale"][:, 0].double(), rtol=1e-6, atol=0)
    exact = stored["bias"].double() / factor.double() - stored["weight"].double().sum(1) * offset
    # The bias in the file is rounded to the model's type, the folded one is not.
    slack = 0.51 + stored["bias"].double().abs() / factor.double() * 2**-8
    assert ((stored["quant_bias"].double() - exact).abs() <= slack).all()


@pytest.mark.parametrize("case", ["llama", "glm4", "phi3"])
def test_fused_parts_share_one_type_and_one_input_scale(case, tmp_path):
    checkpoint = make_case(tmp_path / "model", case)
    export(checkpoint, tmp_path / "out", A2, "w8a8-static")
    folder = Folder(tmp_path / "out")
    for layer in range(2):
        parts = [name for name in folder.kinds if f"layers.{layer}.self_attn" in name and name.endswith("weight")]
        groups = [[name for name in parts if f".{p}_proj" in name] for p in ("q", "k", "v")]
        if case == "phi3":
            assert [name for name in parts if "qkv_proj" in name] and not any(groups)
            continue
        scales = [folder.tensors[f"{name.removesuffix('.weight')}.input_scale"] for (name,) in groups]
        assert len({folder.kinds[name] for (name,) in groups}) == 1
        assert all(torch.equal(scale, scales[0]) for scale in scales)


def test_a_group_that_loses_too_much_falls_back_as_one(tmp_path):
    checkpoint = make_case(tmp_path / "model", "llama-biases")
    spec = read_spec(checkpoint)
    for fallback in (DYNAMIC, FLOAT):
        form = LinearForm(STATIC, BRAIN, fallback=fallback, limit=0.0)
        with LinearQuantiser(checkpoint, spec, form, make_windows()) as quantiser:
            found = quantiser.quantise_layer(0, read_layer(checkpoint, spec, 0))
        assert {group.kind for group in quantiser.report.groups} == {fallback}
        roles = [role for group in quantiser.report.groups for role in group.roles]
        assert sorted(roles) == sorted(["q", "k", "v", "o", "gate", "up", "down"])
        assert all(isinstance(found[role], torch.Tensor) == (fallback == FLOAT) for role in roles)


def test_sums_that_devices_share_have_no_input_offset(tmp_path):
    checkpoint = make_case(tmp_path / "model", "llama")
    offsets = []
    for devices in (1, 2):
        export(checkpoint, tmp_path / f"out-{devices}", A2, "w8a8-static", devices=devices)
        folder = Folder(tmp_path / f"out-{devices}")
        offsets.append({name: float(t) for name, t in folder.tensors.items() if name.endswith("input_offset")})
    whole, shared = offsets
    parts = [name for name in whole if "o_proj" in name or "down_proj" in name]
    assert len(parts) == 4 and any(whole[name] for name in parts)
    assert not any(shared[name] for name in parts)
    assert any(shared[name] for name in shared if name not in parts)


def plant_sink(folder):
    """A checkpoint whose first token is a sink: one channel of it is huge, and drives the MLP."""
    checkpoint = make_case(folder, "llama")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][1, 7] = 3000.0
    tensors["model.layers.1.mlp.gate_proj.weight"][:, 7] = 8.0
    tensors["model.layers.1.mlp.up_proj.weight"][:, 7] = 8.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(checkpoint.folder)


def test_sinks_that_saturate_make_a_group_dynamic(tmp_path):
    checkpoint = plant_sink(tmp_path / "model")
    ids = make_windows().ids.clone()
    ids[:, 0] = 1
    spec, groups = read_spec(checkpoint), {}
    for fallback in (DYNAMIC, ""):
        form = LinearForm(STATIC, BRAIN, fallback=fallback)
        with LinearQuantiser(checkpoint, spec, form, Windows(ids, "made")) as quantiser:
            for index in range(2):
                quantiser.quantise_layer(index, read_layer(checkpoint, spec, index))
        groups[fallback] = {(group.layer, group.roles[0]): group for group in quantiser.report.groups}
    assert groups[DYNAMIC][1, "gate"].kind == DYNAMIC
    assert groups[DYNAMIC][0, "o"].kind == STATIC
    assert groups[DYNAMIC][1, "gate"].sinks < 0.01
    # Without the way out the sink saturates, although ordinary tokens look fine.
    assert groups[""][1, "gate"].kind == STATIC
    assert groups[""][1, "gate"].ordinary < 0.01
    assert groups[""][1, "gate"].sinks > 0.1


@pytest.mark.parametrize("case", FAMILIES)
def test_float_folder_holds_the_model_in_the_chips_type(case, tmp_path):
    checkpoint = make_case(tmp_path / "model", case)
    report = export(checkpoint, tmp_path / "out", P310)
    folder = Folder(tmp_path / "out")
    assert set(folder.tensors) == set(checkpoint.tensors) and not folder.kinds
    for name, tensor in folder.tensors.items():
        assert torch.equal(tensor, checkpoint.read_one(name).to(HALF))
    assert report.rounded.values == sum(tensor.numel() for tensor in folder.tensors.values())
    assert check_folder(tmp_path / "out", P310).errors == 0


def test_overflow_in_float16_names_the_tensor_and_leaves_nothing(tmp_path):
    folder = tmp_path / "model"
    make_case(folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = 7e4
    tensors["model.layers.0.mlp.down_proj.weight"][:2] = 1e-9
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.down_proj.weight holds values up to 7e.04"):
        export(open_checkpoint(folder), tmp_path / "out", P310)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    report = export(open_checkpoint(folder), tmp_path / "out", A2)
    assert report.dtype == "bfloat16"
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = export(open_checkpoint(folder), tmp_path / "half", P310)
    assert report.rounded.lost >= 2 * 96
    assert any("lost precision" in warning for warning in report.warnings)


@pytest.mark.parametrize("quantisation", ["none", "w8a8-static", "compressed-tensors-w8a8"])
def test_shards_have_an_index_and_the_formats_names(quantisation, tmp_path):
    checkpoint = make_case(tmp_path / "model", "qwen3")
    export(checkpoint, tmp_path / "out", A2, quantisation, shard_bytes=40_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    stem = "quant_model_weights" if quantisation == "w8a8-static" else "model"
    assert len(names) > 1
    assert names == [f"{stem}-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    assert (tmp_path / "out" / f"{stem}.safetensors.index.json").is_file()
    assert len(list((tmp_path / "out").glob("*.index.json"))) == 1
    Folder(tmp_path / "out")
    assert check_folder(tmp_path / "out", A2).errors == 0


def test_a_second_export_is_the_same_to_the_byte(tmp_path):
    checkpoint = make_case(tmp_path / "model", "gemma2")
    for name in ("one", "two"):
        export(checkpoint, tmp_path / name, A2, "w8a8-static")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "README.md"}
        for name in ("one", "two")
    )
    assert first == second


def test_compressed_scheme_is_the_librarys():
    library = pytest.importorskip("compressed_tensors.quantization")
    for kind in (STATIC, DYNAMIC):
        config = library.QuantizationConfig.model_validate(describe_compressed(kind, ["lm_head"]))
        group = config.config_groups["group_0"]
        assert (group.weights.num_bits, group.weights.strategy, group.weights.symmetric) == (8, "channel", True)
        assert group.input_activations.strategy == ("token" if kind == DYNAMIC else "tensor")
        assert group.input_activations.dynamic == (kind == DYNAMIC)
        assert config.quant_method == "compressed-tensors" and config.format == "int-quantized"


def test_transformers_runs_the_integers_to_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    checkpoint = make_case(tmp_path / "model", "llama-biases")
    export(checkpoint, tmp_path / "out", A2, "w8a8-static", dtype="float16")
    folder, ids = Folder(tmp_path / "out"), make_windows(2, 16, seed=8).ids
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: t.float() for name, t in folder.tensors.items() if folder.kinds[name] == FLOAT}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(folder.kinds.get(name) == STATIC for name in missing)
    for name in missing:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.forward = folder.linear(name)
    logits = model(ids).logits
    exact = folder.logits(ids)
    assert float((logits - exact).norm() / exact.norm()) < 1e-2


# Refusals and warnings


@pytest.mark.parametrize(
    "soc, options, said",
    [
        ("Ascend910B", {}, "not a chip that is known"),
        ("Ascend310B1", {}, "--target ascend-om"),
        (P310, {"dtype": "bfloat16"}, "no bfloat16"),
        (A2, {"dtype": "float32"}, "float16 or bfloat16"),
        (A2, {"quantisation": "w4a4"}, "is not one of"),
        (P310, {"quantisation": "compressed-tensors-w8a8"}, "No server reads"),
        (A2, {"quantisation": "compressed-tensors-w8a8", "dtype": "float16"}, "underflow"),
        (A2, {"devices": 4}, "cannot be split over 4"),
        (A2, {"devices": 0}, "cannot be split over 0"),
        (A2, {"int8_head": True}, "int8 head goes with"),
        (P310, {"int8_head": True, "quantisation": "w8a8-static"}, "keep the head in float"),
    ],
)
def test_what_no_server_takes_is_refused(soc, options, said, tmp_path):
    checkpoint = make_case(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        export_hf(checkpoint, tmp_path / "out", HfRequest(soc, **options), make_windows())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, said", [({"head_dim": 24}, "multiple of 16"), ({"vocab_size": 65600}, "65600 rows")])
def test_sizes_beyond_the_kernels_are_refused(changes, said, tmp_path):
    checkpoint = make_case(tmp_path / "model", **changes)
    request = HfRequest(A2, "w8a8-dynamic", int8_head="vocab_size" in changes)
    with pytest.raises(UserError, match=said):
        export_hf(checkpoint, tmp_path / "out", request)


def test_static_without_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs calibration text"):
        export_hf(make_case(tmp_path / "model"), tmp_path / "out", HfRequest(A2, "w8a8-static"))


@pytest.mark.parametrize(
    "case, changes, said",
    [
        ("llama", {"per_layer_config": {"1": {"intermediate_size": 48}}}, "--shapes uniform"),
        ("gemma2", {"per_layer_config": {"1": {"absorbed_norms": ["mlp_out"]}}}, "ascend-om"),
        ("llama", {"lightpress": {"biases": ["down"]}}, "--biases none or stock"),
    ],
)
def test_models_of_our_own_are_refused_with_the_way_out(case, changes, said, tmp_path):
    checkpoint = make_case(tmp_path / "model", case, **changes)
    with pytest.raises(UserError, match=said):
        export_hf(checkpoint, tmp_path / "out", HfRequest(A2))


def test_int8_head_is_dynamic_and_described(tmp_path):
    checkpoint = make_case(tmp_path / "model", "qwen3")
    export(checkpoint, tmp_path / "out", A2, "w8a8-static", int8_head=True)
    folder = Folder(tmp_path / "out")
    assert folder.kinds["lm_head.weight"] == DYNAMIC
    assert folder.tensors["lm_head.weight"].dtype == torch.int8
    assert torch.isfinite(folder.logits(make_windows(1, 8).ids)).all()


def test_dynamic_needs_no_text(tmp_path):
    checkpoint = make_case(tmp_path / "model", "qwen3")
    report = export_hf(checkpoint, tmp_path / "out", HfRequest(A2, "w8a8-dynamic"))
    assert report.kinds == {DYNAMIC: 14}
    Folder(tmp_path / "out").logits(make_windows(1, 8).ids)


def test_warnings_come_from_the_servers_table(tmp_path):
    report = export(make_case(tmp_path / "a", "llama", hidden_size=48), tmp_path / "out-a", P310, "w8a8-dynamic")
    assert any("vllm-ascend names no models of type llama for 310P" in line for line in report.warnings)
    assert any("head size of type llama: 12, where this model has 16" in line for line in report.warnings)
    assert any("accuracy issue" in line for line in report.warnings)
    assert [start.server for start in report.starts] == ["vllm-ascend"]
    report = export(make_case(tmp_path / "b", "qwen3", hidden_size=48), tmp_path / "out-b", P310)
    assert not [line for line in report.warnings if "head size" in line or "names no models" in line]


def test_readme_has_the_commands_and_says_what_was_not_run(tmp_path):
    export(make_case(tmp_path / "m", "qwen3"), tmp_path / "out", P310, "w8a8-static", devices=2)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve /path/to/out --dtype float16 --tensor-parallel-size 2" in text
    assert "--quantization ascend" in text and "examples.run_pa --model_path /path/to/out" in text
    assert "Nothing here was run on a device" in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantize"] == "w8a8"
    assert META <= set(json.loads((tmp_path / "out" / "quant_model_description.json").read_text()))
    export(make_case(tmp_path / "n", "qwen3"), tmp_path / "ct", A2, "compressed-tensors-w8a8")
    text = (tmp_path / "ct" / "README.md").read_text()
    assert "--quantization" not in text and "run_pa" not in text


def test_channel_range_starts_at_zero_and_spans_tokens():
    found = ChannelRange.empty(3)
    found.update(torch.tensor([[1.0, -2.0, 3.0], [0.5, -4.0, 2.0]]))
    found.update(torch.zeros(0, 3))
    assert found.low.tolist() == [0, -4, 0] and found.high.tolist() == [1, 0, 3]
    assert found.peak.tolist() == [1, 4, 3] and found.span == (-4, 3)


def test_transformers_opens_compressed_folders_with_the_library(tmp_path):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    for quantisation in QUANTISED[2:]:
        checkpoint = make_case(tmp_path / f"model-{quantisation}", "llama-biases")
        export(checkpoint, tmp_path / quantisation, A2, quantisation)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / quantisation, dtype=torch.float32)
        folder, ids = Folder(tmp_path / quantisation), make_windows(2, 16, seed=8).ids
        exact = folder.logits(ids)
        # The library decompresses the weights and leaves the inputs as they are.
        assert float((model(ids).logits - exact).norm() / exact.norm()) < 0.05


# The command


def test_command_writes_the_folder_and_says_what_to_run(tmp_path, capsys):
    make_case(tmp_path / "model", "qwen3")
    flags = HfFlags(profile="ascend-310p3", quantisation="w8a8-static", windows=2, devices=2)
    with Console(as_json=True, quiet=True) as console:
        export_ascend_hf(str(tmp_path / "model"), tmp_path / "out", flags, False, console)
    said = json.loads(capsys.readouterr().out)
    assert said["dtype"] == "float16" and said["soc_version"] == P310
    assert sum(said["projections"].values()) == 14
    assert set(said["commands"]) == {"vllm-ascend", "MindIE"}
    assert set(said["files"]) == {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "flags, said",
    [
        (HfFlags(), "--profile"),
        (HfFlags(profile="cpu-avx2"), "No --soc_version is known"),
        (HfFlags(soc_version=A2, text=Path("corpus.txt")), "--text would do nothing"),
        (HfFlags(soc_version=A2, quantisation="w8a8-static", text=Path("no.txt")), "no.txt"),
    ],
)
def test_command_refuses_before_it_works(flags, said, tmp_path):
    make_case(tmp_path / "model", "qwen3")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "WordLevel", "vocab": '
                                                       '{"a": 0}, "unk_token": "a"}}')  # fmt: skip
    with Console(as_json=False, quiet=True) as console, pytest.raises(UserError, match=said):
        export_ascend_hf(str(tmp_path / "model"), tmp_path / "out", flags, False, console)
    assert not (tmp_path / "out").exists()
