"""The fused ONNX graph computes what the decoder computes, keeps its cache in place, and holds quantised weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny import CASES, make_checkpoint

from backends import onnx_fused, ort
from backends.eager import EagerModel, load_eager
from backends.export_onnx import DATA_NAME, GRAPH_NAME, STANDARD, GraphForm, export_onnx
from backends.genai import GENAI_NAME
from backends.ort import OrtModel, open_onnx
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.quantize.blocks import Quantised
from compress.quantize.stream import LayerQuantiser, WeightForm
from compress.text import Windows
from compress.weights import read_layer, read_spec

TOLERANCE = 1e-4  # of the largest logit; 1e-6 is usual
LENGTH, SPLIT = 40, 17
# longrope rotates all positions anew once the original context is passed, which no cache can follow.
ONE_SIDE = {"phi3-longrope": {"original_max_position_embeddings": 64}}
UNEVEN = {
    "1": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "3": {"num_attention_heads": 2, "num_key_value_heads": 1},
}
# Heads of 16 are turned inside GroupQueryAttention, those of 8 (the tiny default) outside.
WIDE = {"head_dim": 16, "hidden_size": 96}
LONG = {"long_factor": [1.5 + 0.3 * i for i in range(8)], "short_factor": [1 + 0.1 * i for i in range(8)]}
# More that a case needs for heads that the operator can turn.
TURNED: dict[str, dict[str, Any]] = {
    "phi3-longrope": {"original_max_position_embeddings": 64, "rope_scaling": {"type": "longrope", **LONG}},
    "glm4": {"head_dim": 32},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_ids(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(5).integers(3, 96, (rows, LENGTH), dtype=np.int64)


def open_both(folder: Path, case: str, form: GraphForm | None = None, **changes: Any) -> tuple[OrtModel, EagerModel]:
    checkpoint = open_checkpoint(make_checkpoint(folder / "dense", case, **changes))
    export_onnx(checkpoint, folder / "onnx", form=form or GraphForm())
    return open_onnx(folder / "onnx", 1), load_eager(checkpoint)


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def assert_same_steps(model: OrtModel, reference: EagerModel, ids: np.ndarray) -> None:
    """Prefill, single steps, then several tokens at once."""
    ours, cache = model.prefill(ids[:, :SPLIT])
    theirs, past = reference.prefill(ids[:, :SPLIT])
    assert_close(ours, theirs)
    for start, stop in ((SPLIT, SPLIT + 1), (SPLIT + 1, SPLIT + 2), (SPLIT + 2, LENGTH)):
        ours, cache = model.decode(ids[:, start:stop], cache)
        theirs, past = reference.decode(ids[:, start:stop], past)
        assert_close(ours, theirs)


# Parity


@pytest.mark.parametrize("case", CASES)
def test_every_family(case: str, tmp_path: Path) -> None:
    model, reference = open_both(tmp_path, case, **ONE_SIDE.get(case, {}))
    assert model.fused
    assert_same_steps(model, reference, draw_ids())


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "phi3-longrope", "gemma2", "glm4", "olmo2", "granite"])
def test_heads_of_whole_vectors(case: str, tmp_path: Path) -> None:
    model, reference = open_both(tmp_path, case, **{**WIDE, **TURNED.get(case, {})})
    assert_same_steps(model, reference, draw_ids())
    kinds = {node.op_type for node in onnx.load(model.folder / GRAPH_NAME, load_external_data=False).graph.node}
    assert {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"} <= kinds
    assert not kinds & {"Softmax", "Cos"}


def test_longrope_takes_its_second_table(tmp_path: Path) -> None:
    """Prompts on both sides of the original context, with the tables inside the operator."""
    sizes = {**WIDE, **TURNED["phi3-longrope"], "original_max_position_embeddings": 24}
    model, reference = open_both(tmp_path, "phi3-longrope", **sizes)
    for length in (20, 24, 25, 40):
        ids = draw_ids()[:, :length]
        assert_close(model.prefill(ids)[0], reference.prefill(ids)[0])


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma2", "glm", "olmo2", "qwen3", "llama-biases"])
def test_uneven_layers(case: str, tmp_path: Path) -> None:
    model, reference = open_both(tmp_path, case, per_layer_config=UNEVEN)
    assert_same_steps(model, reference, draw_ids())


# The cache


def test_logits_of_the_last_position_alone(tmp_path: Path) -> None:
    model, _ = open_both(tmp_path, "llama")
    ids = draw_ids()
    last, cache = model.prefill(ids, every=False)
    every, _ = model.prefill(ids)
    assert last.shape == (2, 1, 96)
    assert_close(last[:, 0], every[:, -1], 1e-6)
    assert cache.length == LENGTH


def test_the_cache_grows_and_keeps_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "SPARE_TOKENS", 4)
    model, reference = open_both(tmp_path, "llama")
    ids = draw_ids()
    ours, cache = model.prefill(ids[:, :6])
    theirs, past = reference.prefill(ids[:, :6])
    rooms = {cache.capacity}
    for place in range(6, LENGTH):
        ours, cache = model.decode(ids[:, place : place + 1], cache)
        theirs, past = reference.decode(ids[:, place : place + 1], past)
        rooms.add(cache.capacity)
        assert_close(ours, theirs)
    assert len(rooms) > 2


def test_an_earlier_cache_can_be_continued_again(tmp_path: Path) -> None:
    model, _ = open_both(tmp_path, "llama")
    ids = draw_ids()
    _, start = model.prefill(ids[:, :SPLIT])
    first, _ = model.decode(ids[:, SPLIT : SPLIT + 1], start)
    model.decode(ids[:, 3:4], start)
    again, _ = model.decode(ids[:, SPLIT : SPLIT + 1], start)
    assert np.array_equal(first, again)


def test_padding_is_refused(tmp_path: Path) -> None:
    model, _ = open_both(tmp_path, "llama")
    mask = np.ones_like(draw_ids())
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="padding"):
        model.prefill(draw_ids(), mask)


# Quantised weights


@pytest.mark.parametrize("case", ["llama", "llama-tied", "qwen2", "gemma2", "glm4", "qwen3"])
@pytest.mark.parametrize(("bits", "block", "symmetric"), [(4, 16, False), (4, 32, True), (8, 32, True)])
def test_quantised_graphs_hold_what_was_quantised(
    case: str, bits: int, block: int, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products in float32, the graph equals the decoder on the dequantised weights."""
    monkeypatch.setattr(onnx_fused, "ACCURACY_LEVEL", 1)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", case))
    spec = read_spec(checkpoint)
    form = WeightForm(bits, block, symmetric)
    windows = Windows(torch.tensor(draw_ids(6)), "random")
    with LayerQuantiser(checkpoint, spec, form, windows) as quantiser:
        export_onnx(checkpoint, tmp_path / "onnx", form=GraphForm(quantiser=quantiser))
    model = open_onnx(tmp_path / "onnx", 1)
    reference = dequantise_model(checkpoint, form, windows)
    ids = draw_ids()
    assert_close(model.prefill(ids)[0], reference.prefill(ids)[0], 1e-3)
    dense = load_eager(checkpoint).prefill(ids)[0]
    assert np.abs(reference.prefill(ids)[0] - dense).max() > 1e-3 * np.abs(dense).max()  # it did round


def dequantise_model(checkpoint: Checkpoint, form: WeightForm, windows: Windows) -> EagerModel:
    spec, dense = read_spec(checkpoint), load_eager(checkpoint)
    with LayerQuantiser(checkpoint, spec, form, windows) as quantiser:
        layers = []
        for index in range(len(spec.layers)):
            found = quantiser.quantise_layer(index, read_layer(checkpoint, spec, index, torch.float32))
            floats = {r: m.dequantise() if isinstance(m, Quantised) else m for r, m in found.items()}
            layers.append(floats)
        embed, head = (matrix.dequantise() for matrix in quantiser.quantise_ends(checkpoint, spec) if matrix)
    return EagerModel(spec, embed, tuple(layers), {**dense.head, "head": head})


def test_eight_bits_are_a_quarter_of_the_size(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama", hidden_size=96, intermediate_size=256))
    spec, sizes = read_spec(checkpoint), []
    for bits in (0, 8, 4):
        quantiser = LayerQuantiser(checkpoint, spec, WeightForm(bits, 32, True, "nearest")) if bits else None
        export_onnx(checkpoint, tmp_path / f"onnx{bits}", form=GraphForm(quantiser=quantiser))
        sizes.append((tmp_path / f"onnx{bits}" / DATA_NAME).stat().st_size)
    assert sizes[1] < 0.31 * sizes[0]
    assert sizes[2] < 0.22 * sizes[0]


# onnxruntime-genai


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_genai_description(case: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", case))
    export_onnx(checkpoint, tmp_path / "onnx")
    data = json.loads((tmp_path / "onnx" / GENAI_NAME).read_text())
    shape, decoder = read_spec(checkpoint).shape, data["model"]["decoder"]
    assert data["model"]["vocab_size"] == shape.vocab
    assert decoder["num_key_value_heads"] == shape.layers[0].kv_heads
    assert decoder["head_size"] == shape.layers[0].head_dim
    graph = onnx.load(tmp_path / "onnx" / GRAPH_NAME, load_external_data=False).graph
    names = {value.name for value in (*graph.input, *graph.output)}
    for index in range(len(shape.layers)):
        wanted = [*list(decoder["inputs"].values())[2:], *list(decoder["outputs"].values())[1:]]
        assert {pattern % index for pattern in wanted} <= names
    export_onnx(checkpoint, tmp_path / "plain", form=STANDARD)
    assert not (tmp_path / "plain" / GENAI_NAME).exists()


@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed")
@pytest.mark.parametrize("uneven", [False, True])
def test_genai_generates_the_same_tokens(uneven: bool, tmp_path: Path) -> None:
    import onnxruntime_genai as genai

    changes = {"per_layer_config": UNEVEN} if uneven else {}
    model, reference = open_both(tmp_path, "llama", **changes)
    prompt = draw_ids()[0, :8].tolist()
    loaded = genai.Model(str(model.folder))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=40, do_sample=False)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    found = []
    for _ in range(20):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    end = json.loads((model.folder / GENAI_NAME).read_text())["model"]["eos_token_id"]
    wanted = reference.generate(prompt, 20, {end})  # behind the end token genai gives padding
    assert found[: len(wanted)] == wanted == model.generate(prompt, 20, {end})
