"""Graphs whose products have 8-bit inputs: exact integers, what falls back, parity with the decoder, and the flags."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint, make_config
from torch import Tensor
from typer.testing import CliRunner
from words import write_tokenizer

from backends import onnx_fused
from backends.eager import EagerModel, load_eager
from backends.export_onnx import GRAPH_NAME, GraphForm, export_onnx
from backends.genai import GENAI_NAME
from backends.onnx_fused import emit_product, store_product
from backends.onnx_graph import GraphBuilder
from backends.ort import OrtModel, open_onnx
from cli.app import app
from cli.weights import list_formats, predict_speed
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import UserError
from compress.family import ABSORBED
from compress.quantize import onnx_w8a8
from compress.quantize.blocks import Quantised
from compress.quantize.onnx_w8a8 import BLOCKS, GraphMatrix, StepForm, StepLinear, StepQuantiser, encode_step
from compress.quantize.w8a8 import DYNAMIC, QuantisedLinear, as_weights
from compress.spec import resolve_model
from compress.stats import ordinary_tokens
from compress.text import Windows
from compress.weights import read_layer, read_spec
from profiles.loader import load_profile

ROOT = Path(__file__).resolve().parents[1]
LENGTH, SPLIT = 24, 15
# Of the largest logit. Where two runtimes' last digits fall on both sides of a half, a code differs by one, and what
# follows with it: that happens to few prompts, of which nothing is asked but to be near.
TOLERANCE, NEAR = 1e-5, 0.1
PROMPTS = 5
UNEVEN = {
    "1": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "3": {"num_attention_heads": 2, "num_key_value_heads": 1},
}
LOST = {"0": {ABSORBED: ["attn_out"]}, "2": {ABSORBED: ["attn_out", "mlp_out"]}}
ALL = StepForm(limit=math.inf)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_windows(count: int = 6, seed: int = 5) -> Windows:
    return Windows(torch.tensor(draw_ids(count, seed)), "random")


def draw_ids(rows: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 96, (rows, LENGTH), dtype=np.int64)


def draw_linear(inputs: int, outputs: int, bias: bool, seed: int = 0) -> StepLinear:
    """Codes over the whole range of int8, its ends included."""
    chance = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, inputs), generator=chance, dtype=torch.int8)
    codes[0] = 127
    codes[-1] = -128
    scale = torch.rand(outputs, generator=chance) * 0.02 + 1e-3
    return StepLinear(DYNAMIC, codes, scale, bias=torch.randn(outputs, generator=chance) if bias else None)


# Exact integers


def round_slowly(x: np.ndarray) -> tuple[list[int], np.float32, int]:
    """ONNX's DynamicQuantizeLinear, value by value in float32."""
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float32((high - low) / np.float32(255)) if high > low else np.float32(1)
    zero = round(float(np.float32(-low / scale)))
    return [min(255, max(0, round(float(np.float32(value / scale))) + zero)) for value in x.flat], scale, zero


def multiply_slowly(x: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Integer products `[tokens, out]` and the inputs' scale, in plain loops over Python's integers."""
    found, scale, zero = round_slowly(x)
    width = x.shape[-1]
    rows = [[code - zero for code in found[start : start + width]] for start in range(0, len(found), width)]
    weights = [[int(code) for code in row] for row in codes]
    return np.array([[sum(a * b for a, b in zip(row, w, strict=True)) for w in weights] for row in rows]), scale


def run_product(folder: Path, parts: list[StepLinear], x: np.ndarray, precise: bool = False) -> np.ndarray:
    """Store weights as one product and run it alone on ONNX Runtime."""
    with (folder / "data").open("wb") as data:
        graph = GraphBuilder(data, "data")
        graph.add_input("x", ("batch", "tokens", x.shape[-1]))
        graph.add_output("y", ("batch", "tokens", sum(len(part.codes) for part in parts)))
        stored = store_product(graph, "w", parts, [part.bias for part in parts])
        graph.rename(emit_product(graph, stored, "x"), "y")
    onnx.save(graph.build_model("test"), folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


SHAPES = [(1, 1, 1, 1), (1, 1, 7, 5), (1, 9, 33, 17), (3, 1, 129, 3), (2, 5, 172, 31), (1, 3, 2051, 6)]


@pytest.mark.parametrize(("batch", "tokens", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_integers_are_exact(batch: int, tokens: int, inputs: int, outputs: int, shift: float, tmp_path: Path) -> None:
    """Slow twin, decoder's stand-in and operator; one grid for the whole batch of a step, as the operator has it."""
    x = np.random.default_rng(inputs).standard_normal((batch, tokens, inputs), dtype=np.float32) + np.float32(shift)
    linear = draw_linear(inputs, outputs, bias=False)
    sums, scale = multiply_slowly(x, linear.codes.numpy())
    unit = scale.astype(np.float64) * linear.weight_scale.double().numpy()
    found = run_product(tmp_path, [linear], x).reshape(batch * tokens, outputs)
    own = linear.apply(torch.tensor(x).flatten(0, 1)).numpy()
    for values in (found, own):
        # Exact up to float32's own rounding: of the sum from 2^24 on, of the factors, and of their product.
        np.testing.assert_allclose(values / unit, sums, rtol=4e-7, atol=0)
    if tokens * batch > 1:
        assert not np.array_equal(run_product(tmp_path, [linear], x[:1, :1])[0, 0], found[0])  # alone: another grid


@pytest.mark.parametrize("biased", [(True, True), (True, False), (False, False)])
def test_weights_of_the_same_inputs_are_one_product(biased: tuple[bool, bool], tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((1, 5, 48), dtype=np.float32)
    parts = [draw_linear(48, rows, bias, seed) for seed, (rows, bias) in enumerate(zip((21, 8), biased, strict=True))]
    wanted = torch.cat([part.apply(torch.tensor(x)) for part in parts], -1).numpy()
    np.testing.assert_allclose(run_product(tmp_path, parts, x), wanted, rtol=1e-5, atol=1e-5)
    (node,) = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    assert node.op_type == "DynamicQuantizeMatMul"
    assert len(node.input) == (5 if any(biased) else 3)


def test_the_slower_exact_kernel_computes_the_same(tmp_path: Path) -> None:
    """The option for CPUs whose sums would saturate; every code at the end of its range is where they would first."""
    x = np.ones((1, 4, 512), np.float32)
    x[0, 1:] = np.random.default_rng(2).random((3, 512), dtype=np.float32)
    linear = draw_linear(512, 24, bias=True)
    wanted = linear.apply(torch.tensor(x)).numpy()
    np.testing.assert_allclose(run_product(tmp_path, [linear], x, precise=True), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_constant_inputs(value: float, tmp_path: Path) -> None:
    x, linear = np.full((1, 3, 5), value, np.float32), draw_linear(5, 4, bias=True)
    wanted = linear.apply(torch.tensor(x)).numpy()
    np.testing.assert_allclose(run_product(tmp_path, [linear], x), wanted, rtol=1e-6, atol=1e-6)
    codes, scale, zero = encode_step(torch.tensor(x))
    assert torch.allclose((codes - zero) * scale, torch.tensor(x))


def test_each_window_has_its_own_grid() -> None:
    sizes = torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * sizes
    linear = draw_linear(16, 4, bias=True)
    assert torch.equal(linear.apply(x), torch.stack([linear.apply(window) for window in x]))
    assert torch.equal(linear.round_inputs(x), torch.stack([linear.round_inputs(window) for window in x]))
    steps = torch.tensor([float(encode_step(window)[1]) for window in x])
    assert ((linear.round_inputs(x) - x).abs().amax((1, 2)) <= 0.5001 * steps).all()


# Graphs


def quantise(checkpoint: Checkpoint, form: StepForm, seed: int = 5) -> tuple[StepQuantiser, EagerModel]:
    """Quantise all layers; return the quantiser and the model that the graph is to compute."""
    spec, dense = read_spec(checkpoint), load_eager(checkpoint)
    with StepQuantiser(checkpoint, spec, form, draw_windows(seed=seed)) as quantiser:
        layers = [
            stand_in(quantiser.quantise_layer(index, read_layer(checkpoint, spec, index, torch.float32)))
            for index in range(len(spec.layers))
        ]
        embed, head = (matrix.dequantise() for matrix in quantiser.quantise_ends(checkpoint, spec) if matrix)
    return quantiser, EagerModel(spec, embed, tuple(layers), {**dense.head, "head": head})


def stand_in(found: dict[str, GraphMatrix]) -> dict[str, Tensor]:
    return as_weights({role: m.dequantise() if isinstance(m, Quantised) else m for role, m in found.items()})


def export(checkpoint: Checkpoint, folder: Path, form: StepForm) -> OrtModel:
    with StepQuantiser(checkpoint, read_spec(checkpoint), form, draw_windows()) as quantiser:
        export_onnx(checkpoint, folder, form=GraphForm(quantiser=quantiser))
    return open_onnx(folder, 1)


def count_operators(folder: Path) -> dict[str, int]:
    nodes = onnx.load(folder / GRAPH_NAME, load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def measure_gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_same_steps(model: OrtModel, reference: EagerModel, rows: int = 1) -> None:
    """Prefill, single steps, then several tokens at once, for several prompts: most are equal, all are near.

    Several tokens of several rows are run column by column, so the decoder is given no such step.
    """
    worst, steps = [], [(SPLIT, SPLIT + 1), (SPLIT + 1, SPLIT + 2), *([(SPLIT + 2, LENGTH)] if rows == 1 else [])]
    for seed in range(PROMPTS):
        ids = draw_ids(rows, seed)
        ours, cache = model.prefill(ids[:, :SPLIT])
        theirs, past = reference.prefill(ids[:, :SPLIT])
        gaps = [measure_gap(ours, theirs)]
        for start, stop in steps:
            ours, cache = model.decode(ids[:, start:stop], cache)
            theirs, past = reference.decode(ids[:, start:stop], past)
            gaps.append(measure_gap(ours, theirs))
        worst.append(max(gaps))
    assert max(worst) <= NEAR
    assert sorted(worst)[PROMPTS // 2] <= TOLERANCE


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}), ("llama-tied", {}), ("llama-biases", {}), ("qwen2", {}), ("qwen3", {}), ("phi3", {}), ("olmo2", {}),
    ("gemma2", {}), ("granite", {}), ("pangu_sandwich", {}), ("llama-biases", {"per_layer_config": UNEVEN}),
    ("glm", {"per_layer_config": UNEVEN}), ("glm4", {"per_layer_config": LOST}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "changes"), CASES)
def test_graphs_compute_what_the_decoder_does(
    case: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digits; the head's inputs are left in float32 here."""
    monkeypatch.setattr(onnx_fused, "ACCURACY_LEVEL", 1)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", case, **changes))
    model, (_, reference) = export(checkpoint, tmp_path / "onnx", ALL), quantise(checkpoint, ALL)
    assert_same_steps(model, reference)
    ids = draw_ids(1)
    dense = load_eager(checkpoint).prefill(ids)[0]
    assert np.abs(model.prefill(ids)[0] - dense).max() > 1e-3 * np.abs(dense).max()  # it did round
    kinds = count_operators(tmp_path / "onnx")
    layers = len(read_spec(checkpoint).layers)
    assert kinds["DynamicQuantizeMatMul"] == 5 * layers
    assert kinds["GroupQueryAttention"] == layers
    assert kinds["MatMulNBits"] == 1  # the head


def encode_batch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = encode_step(x.flatten(0, -2))
    return codes.view(x.shape), scale, zero


def test_rows_of_a_batch_share_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator has one grid for all rows of a step, whatever sequence they belong to."""
    monkeypatch.setattr(onnx_fused, "ACCURACY_LEVEL", 1)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama"))
    model, (_, reference) = export(checkpoint, tmp_path / "onnx", ALL), quantise(checkpoint, ALL)
    monkeypatch.setattr(onnx_w8a8, "encode_step", encode_batch)
    assert_same_steps(model, reference, rows=3)


def test_genai_reads_the_same_description(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama"))
    export_onnx(checkpoint, tmp_path / "fp32")
    export(checkpoint, tmp_path / "w8a8", ALL)
    assert (tmp_path / "w8a8" / GENAI_NAME).read_text() == (tmp_path / "fp32" / GENAI_NAME).read_text()


# What falls back


def test_a_loss_is_that_of_whole_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow twin: window by window, ordinary tokens and the others apart, the worst of the group's projections."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama"))
    spec = read_spec(checkpoint)
    seen: list[tuple[float, float]] = []
    original = StepQuantiser.measure_worst

    def watch(self: StepQuantiser, index: int, roles: Any, current: Any, made: Any, read: Any) -> Any:
        worst = [0.0, 0.0]
        for role in roles:
            sums = np.zeros((2, 2))
            for place in range(len(self.streams[1].read(0, 6))):
                x = self.streams[1].read(place, place + 1)
                ordinary, inputs = ordinary_tokens(x)[0][0], read(x)[0]
                exact = (inputs @ current[role].T).double()
                missed = made[role].apply(inputs).double() - exact
                for kind, mask in enumerate((ordinary, ~ordinary)):
                    sums[kind] += float(missed[mask].square().sum()), float(exact[mask].square().sum())
            worst = [max(old, lost / all_) for old, (lost, all_) in zip(worst, sums, strict=True)]
        seen.append((worst[0], worst[1]))
        return original(self, index, roles, current, made, read)

    monkeypatch.setattr(StepQuantiser, "measure_worst", watch)
    quantiser, _ = quantise(checkpoint, ALL)
    assert len(quantiser.report.groups) == 4 * len(spec.layers)
    for group, wanted in zip(quantiser.report.groups, seen, strict=True):
        assert (group.ordinary, group.sinks) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("case", ["llama", "llama-biases"])
def test_groups_that_lose_too_much_have_blocks(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_fused, "ACCURACY_LEVEL", 1)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", case))
    losses = sorted(group.ordinary for group in quantise(checkpoint, ALL)[0].report.groups)
    form = StepForm(limit=losses[len(losses) // 2])
    model, (quantiser, reference) = export(checkpoint, tmp_path / "onnx", form), quantise(checkpoint, form)
    lost = [group for group in quantiser.report.groups if group.kind == BLOCKS]
    assert 0 < len(lost) < len(losses)
    for group in quantiser.report.groups:
        fits = group.ordinary <= form.limit and group.sinks <= onnx_w8a8.SINK_SLACK * form.limit
        assert group.kind == (DYNAMIC if fits else BLOCKS)
    kinds, products = count_operators(tmp_path / "onnx"), sum(2 if len(g.roles) == 2 else 1 for g in lost)
    assert kinds["MatMulNBits"] == products + 1
    assert kinds["DynamicQuantizeMatMul"] == 5 * 4 - products
    assert_same_steps(model, reference)


def test_one_massive_token_makes_its_neighbours_fall_back(tmp_path: Path) -> None:
    """A token whose gate and up are huge: its row sets the grid of `down` for all others."""
    folder = make_checkpoint(tmp_path / "dense", "llama", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    normal = quantise(open_checkpoint(folder), StepForm())[0].report.groups[-1]
    (name,) = [name for name in tensors if "embed" in name]
    # All windows begin with token 5, which alone has the first channel, and every row of the MLP looks for that.
    tensors[name][:, 0] = 0.0
    tensors[name][5, 0] = 30.0
    for own, tensor in tensors.items():
        if "gate_proj" in own or "up_proj" in own:
            tensor[:, 0] = 20.0
        if "o_proj" in own:
            tensor[0] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    windows = draw_windows()
    windows.ids[windows.ids == 5] = 6  # noqa: PLR2004
    windows.ids[:, 0] = 5
    with StepQuantiser(checkpoint, read_spec(checkpoint), StepForm(), windows) as quantiser:
        found = quantiser.quantise_layer(0, read_layer(checkpoint, read_spec(checkpoint), 0, torch.float32))
    assert normal.roles == ("down",)
    assert quantiser.report.groups[-1].ordinary > 30 * normal.ordinary
    assert quantiser.report.groups[-1].kind == BLOCKS
    assert isinstance(found["down"], Quantised)


def test_without_text_all_inputs_are_rounded(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama"))
    spec = read_spec(checkpoint)
    with pytest.raises(UserError, match="calibration text"):
        StepQuantiser(checkpoint, spec, StepForm())
    with pytest.raises(UserError, match="gptq, nearest"):
        StepForm("search")
    with StepQuantiser(checkpoint, spec, StepForm("nearest")) as quantiser:
        found = quantiser.quantise_layer(0, read_layer(checkpoint, spec, 0, torch.float32))
        with pytest.raises(ValueError, match="no logits"):
            quantiser.sample_logits(1)
    assert sum(isinstance(matrix, QuantisedLinear) for matrix in found.values()) == 7
    assert not quantiser.report.groups


def test_compensated_weights_are_nearer_than_the_nearest_ones(tmp_path: Path) -> None:
    """On the inputs it has seen; both with the same 8-bit inputs."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama"))
    dense, ids = load_eager(checkpoint), draw_windows().ids.numpy()
    wanted = dense.prefill(ids)[0]
    learned = quantise(checkpoint, ALL)[1].prefill(ids)[0]
    with StepQuantiser(checkpoint, dense.spec, StepForm("nearest")) as quantiser:
        layers = [
            stand_in(quantiser.quantise_layer(i, read_layer(checkpoint, dense.spec, i, torch.float32)))
            for i in range(len(dense.layers))
        ]
        embed, head = (matrix.dequantise() for matrix in quantiser.quantise_ends(checkpoint, dense.spec) if matrix)
    plain = EagerModel(dense.spec, embed, tuple(layers), {**dense.head, "head": head}).prefill(ids)[0]
    assert np.square(learned - wanted).mean() < np.square(plain - wanted).mean()


# The commands


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "dense", "llama", hidden_size=64, intermediate_size=96)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words, path = random.Random(0), tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(f"w{words.randint(3, 95)}" for _ in range(60)) for _ in range(30)))
    return path


def run(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.stderr, done.exception)
    return done


def test_export_and_generate(source: Path, text: Path, tmp_path: Path) -> None:
    done = run("export", source, "-o", tmp_path / "onnx", "--format", "w8a8", "--text", text, "--windows", 3)
    assert "groups of products have 8-bit inputs" in done.stderr
    assert "head in 8" in done.stderr
    assert count_operators(tmp_path / "onnx")["DynamicQuantizeMatMul"] > 0
    said = run("generate", tmp_path / "onnx", "w5 w6 w7", "--new", 4, "--no-stop", "--threads", 1)
    assert len(said.stdout.split()) >= 4
    plain = run("export", source, "-o", tmp_path / "plain", "--format", "w8a8", "--method", "nearest")
    assert "nobody measured" in plain.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--block", 32), "--block is for weights in blocks"),
        (("--symmetric",), "--symmetric/--asymmetric is for weights in blocks"),
        (("--block", 32, "--asymmetric"), "--block and --symmetric/--asymmetric is for"),
        (("--method", "search"), "--method search looks for the scales of blocks"),
        (("--standard-ops",), "--standard-ops has no operator for w8a8 weights"),
    ],
)
def test_what_blocks_alone_have_is_refused(flags: tuple[object, ...], said: str, source: Path, tmp_path: Path) -> None:
    done = run("export", source, "-o", tmp_path / "onnx", "--format", "w8a8", *flags, code=2)
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "onnx").exists()


def write_profile(folder: Path) -> Path:
    """A CPU that reads it: the shipped one with VNNI, and 8-bit inputs beside its own formats."""
    data = (ROOT / "profiles/cpu-avx512.toml").read_text()
    lines = [
        'activations = ["fp32", "int8"]' if line.startswith("activations = ")
        else 'quantisations = ["w8a8-dynamic", "int8", "int4"]' if line.startswith("quantisations = ")
        else 'name = "cpu-own"' if line.startswith('name = "cpu') else line
        for line in data.splitlines()
    ]  # fmt: skip
    (folder / "cpu-own.toml").write_text("\n".join(lines))
    return folder / "cpu-own.toml"


def test_a_profile_chooses_it(source: Path, text: Path, tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    fast = ("--keep", 0.8, "--windows", 6, "--length", 24, "--threads", 1, "--trials", 0, "--refine", 0, "--no-bench")
    flags = (*fast, "--text", text, "--profile", profile, "--format", "w8a8", "--json")
    report = json.loads(run("compress", source, "-o", tmp_path / "out", *flags).stdout)
    assert report["graph_format"] == "w8a8"
    assert {proof["runtime"]: proof["status"] for proof in report["proofs"]}["onnxruntime"] == "close"
    assert "holds the model in w8a8" in report["next_steps"][0]
    assert count_operators(tmp_path / "out/onnx")["DynamicQuantizeMatMul"] > 0
    own, sizes = load_profile(profile), {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 32000}
    shape = resolve_model(make_config("llama", **sizes), None).shape
    assert list_formats(own) == ["fp32", "int8", "w8a8", "int4"]
    assert list_formats(load_profile("cpu-avx2")) == ["fp32", "int8", "int4"]  # its sums of int8 would saturate
    assert predict_speed("w8a8", shape, own) > predict_speed("fp32", shape, own)
