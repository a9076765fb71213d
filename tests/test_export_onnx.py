"""The standard ONNX graph computes what the decoder does: every family, cached decode, padding, uneven layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny import CASES, make_checkpoint

from backends.eager import EagerModel, load_eager
from backends.export_onnx import DATA_NAME, GRAPH_NAME, STANDARD, GraphForm, export_onnx
from backends.ort import OrtModel, open_onnx
from backends.runtime import measure_all, measure_pair
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.decoder import compute_logits, make_frame, run_layer
from compress.errors import UserError
from compress.weights import embed_rows, read_head, read_layer, read_spec

# Relative to the largest logit. The runtimes sum ~50 products per value in different orders and approximate exp and
# sin differently, over four layers: 1e-6 is usual, and a wrong convention shows as 1e-2 or more. Float64 has the same
# operations with 1e-16 rounding, which proves the graph itself.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}
LENGTH = 40  # longer than every sliding window, and than the original context of the scaled rotary variants
SPLIT = 17
SHORT = 29  # longer than the windows too, and on the same side of longrope's context as LENGTH
# longrope rotates all positions anew once the original context is passed, which no cache can follow.
ONE_SIDE = {"phi3-longrope": {"original_max_position_embeddings": 64}}
UNEVEN = {
    "1": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "2": {"intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 3},
    "3": {"num_attention_heads": 2, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: the models are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Exporter = Callable[..., tuple[Checkpoint, OrtModel]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Return a function that makes, exports and opens a tiny model, each once."""
    made: dict[str, tuple[Checkpoint, OrtModel]] = {}

    def make(case: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Checkpoint, OrtModel]:
        key = f"{case} {dtype} {changes}"
        if key not in made:
            folder = tmp_path_factory.mktemp(case)
            checkpoint = open_checkpoint(make_checkpoint(folder / "dense", case, **changes))
            export_onnx(checkpoint, folder / "onnx", form=GraphForm(fused=False, dtype=dtype))
            made[key] = checkpoint, open_onnx(folder / "onnx", threads=1)
        return made[key]

    return make


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """Two sequences of token ids."""
    return np.random.default_rng(5).integers(3, 96, (2, LENGTH), dtype=np.int64)


def assert_close(ours: np.ndarray, theirs: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert np.abs(ours - theirs).max() <= TOLERANCE[dtype] * np.abs(theirs).max()


def decode_stepwise(model: OrtModel | EagerModel, ids: np.ndarray) -> np.ndarray:
    """Prefill SPLIT tokens and decode the rest one by one."""
    logits, cache = model.prefill(ids[:, :SPLIT])
    outputs = [logits]
    for place in range(SPLIT, ids.shape[1]):
        logits, cache = model.decode(ids[:, place : place + 1], cache)
        outputs.append(logits)
    return np.concatenate(outputs, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_equals_decoder(case: str, dtype: torch.dtype, export: Exporter, ids: np.ndarray) -> None:
    checkpoint, model = export(case, dtype)
    theirs, _ = load_eager(checkpoint, dtype).prefill(ids)
    assert_close(model.prefill(ids)[0], theirs, dtype)


@pytest.mark.parametrize("case", CASES)
def test_cached_decode_equals_prefill(case: str, export: Exporter, ids: np.ndarray) -> None:
    checkpoint, model = export(case, **ONE_SIDE.get(case, {}))
    whole, _ = load_eager(checkpoint).prefill(ids)
    assert_close(decode_stepwise(model, ids), whole)
    assert_close(decode_stepwise(load_eager(checkpoint), ids), whole)


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "smollm3-window", "glm"])
def test_prefill_in_pieces_equals_prefill(case: str, export: Exporter, ids: np.ndarray) -> None:
    checkpoint, model = export(case)
    whole, _ = load_eager(checkpoint).prefill(ids)
    for runtime in (model, load_eager(checkpoint)):
        first, cache = runtime.prefill(ids[:, :SPLIT])
        assert_close(np.concatenate([first, runtime.decode(ids[:, SPLIT:], cache)[0]], 1), whole)


@pytest.mark.parametrize("case", CASES)
def test_left_padding_changes_nothing(case: str, export: Exporter, ids: np.ndarray) -> None:
    _, model = export(case)
    gap = LENGTH - SHORT
    padded, mask = ids.copy(), np.ones_like(ids)
    padded[1, :gap], mask[1, :gap] = 0, 0
    logits, cache = model.prefill(padded, mask)
    after, _ = model.decode(ids[:, :1], cache)
    assert np.isfinite(logits).all()
    for row, start in ((0, 0), (1, gap)):
        alone, own = model.prefill(ids[row : row + 1, start:])
        assert_close(logits[row : row + 1, start:], alone)
        assert_close(after[row : row + 1], model.decode(ids[row : row + 1, :1], own)[0])


def test_padding_takes_no_position(export: Exporter, ids: np.ndarray) -> None:
    """Rotation is relative, so only longrope shows it: 20 tokens stay inside its context of 24, however padded."""
    _, model = export("phi3-longrope")
    mask = np.ones_like(ids[:1])
    mask[:, :20] = 0
    assert_close(model.prefill(ids[:1], mask)[0][:, 20:], model.prefill(ids[:1, 20:])[0])


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_equals_eager(case: str, export: Exporter, ids: np.ndarray) -> None:
    checkpoint, model = export(case, **ONE_SIDE.get(case, {}))
    ours = model.generate(ids[0, :12], 10)
    assert len(ours) == 10
    assert ours == load_eager(checkpoint).generate(ids[0, :12], 10)


def test_generation_ends_with_a_stop_id(export: Exporter, ids: np.ndarray) -> None:
    _, model = export("llama")
    free = model.generate(ids[0].tolist(), 8)
    place = free.index(free[3])
    assert model.generate(ids[0].tolist(), 8, {free[3]}) == free[: place + 1]
    assert model.generate(ids[0], 0) == []


@pytest.mark.parametrize("case", CASES)
def test_graph_is_plain_onnx(case: str, export: Exporter) -> None:
    _, opened = export(case)
    onnx.checker.check_model(str(opened.folder / GRAPH_NAME), full_check=True)
    model = onnx.load(opened.folder / GRAPH_NAME, load_external_data=False)
    assert [(entry.domain, entry.version <= 18) for entry in model.opset_import] == [("", True)]
    assert {node.domain for node in model.graph.node} == {""}
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    inline = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert all(t.name.startswith("constant.") for t in inline)


def test_interface(export: Exporter) -> None:
    _, opened = export("llama")
    graph = onnx.load(opened.folder / GRAPH_NAME, load_external_data=False).graph

    def shapes(values: Any) -> dict[str, list[str | int]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    inputs, outputs = shapes(graph.input), shapes(graph.output)
    assert list(inputs)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert inputs["attention_mask"] == ["batch", "past_sequence + sequence"]
    assert inputs["past_key_values.3.value"] == ["batch", 3, "past_sequence", 8]
    assert outputs["logits"] == ["batch", "sequence", 96]
    assert outputs["present.3.key"] == ["batch", 3, "past_sequence + sequence", 8]
    assert len(inputs) == 3 + 8
    assert len(outputs) == 1 + 8


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma2", "glm", "olmo2", "qwen3", "llama-biases"])
def test_uneven_layers(case: str, export: Exporter, ids: np.ndarray) -> None:
    checkpoint, model = export(case, per_layer_config=UNEVEN)
    assert [sizes[0] for _, _, sizes in model.past] == [3, 3, 2, 2, 3, 3, 1, 1]
    whole, _ = load_eager(checkpoint).prefill(ids)
    assert_close(model.prefill(ids)[0], whole)
    assert_close(decode_stepwise(model, ids), whole)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations(activation: str, export: Exporter, ids: np.ndarray) -> None:
    checkpoint, model = export("llama", hidden_act=activation)
    assert_close(model.prefill(ids)[0], load_eager(checkpoint).prefill(ids)[0])


def test_position_ids_only_turn_the_rotary_tables(export: Exporter, ids: np.ndarray) -> None:
    """Far positions: angles of 1e5 must be reduced as exactly as torch does, and causality must not move with them."""
    checkpoint, model = export("llama")
    spec, start = read_spec(checkpoint), 100_000
    x = embed_rows(checkpoint, spec, torch.tensor(ids), torch.float32)
    frame = make_frame(spec, len(ids), LENGTH, start)
    for index, layer in enumerate(spec.layers):
        x, _ = run_layer(spec, layer, read_layer(checkpoint, spec, index), x, frame)
    feeds = {name: np.zeros((2, *sizes[:1], 0, *sizes[1:]), dtype) for name, dtype, sizes in model.past}
    feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": frame.positions.numpy()}
    ours = model.session.run(["logits"], feeds)[0]
    assert_close(ours, compute_logits(spec, read_head(checkpoint, spec, torch.float32), x).numpy())


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2"])
def test_row_without_any_token_stays_finite(case: str, export: Exporter, ids: np.ndarray) -> None:
    _, model = export(case)
    mask = np.ones_like(ids)
    mask[1] = 0
    logits, _ = model.prefill(ids, mask)
    assert np.isfinite(logits).all()
    assert_close(logits[:1], model.prefill(ids[:1])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_checkpoint_becomes_float32(dtype: torch.dtype, tmp_path: Path, ids: np.ndarray) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "half", "phi3", dtype))
    export_onnx(checkpoint, tmp_path / "onnx")
    ours, _ = open_onnx(tmp_path / "onnx", 1).prefill(ids)
    assert ours.dtype == np.float32
    assert_close(ours, load_eager(checkpoint).prefill(ids)[0])


def test_tied_matrix_is_stored_once(export: Exporter) -> None:
    sizes = {}
    for case in ("llama", "llama-tied"):
        checkpoint, model = export(case)
        parameters = read_spec(checkpoint).shape.parameters
        sizes[case] = (model.folder / DATA_NAME).stat().st_size
        assert 4 * parameters <= sizes[case] <= 4 * parameters + 64 * 60  # 38 or 39 tensors, each padded to 64 bytes
    assert sizes["llama"] - sizes["llama-tied"] == 4 * 96 * 48


def test_big_tensors_start_on_a_page(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "wide", "llama", vocab_size=8000, num_hidden_layers=1))
    graph = onnx.load(export_onnx(checkpoint, tmp_path / "onnx"), load_external_data=False).graph
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    assert int(entries["embed.weight"]["length"]) == int(entries["head.weight"]["length"]) == 4 * 8000 * 48
    assert int(entries["head.weight"]["offset"]) % 4096 == 0
    assert all(int(entry["offset"]) % 64 == 0 for entry in entries.values())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / GRAPH_NAME).unlink(), "has no model.onnx"),
        (lambda folder: (folder / DATA_NAME).unlink(), "are missing"),
        (lambda folder: cut_file(folder / DATA_NAME), "cut short"),
        (lambda folder: cut_file(folder / GRAPH_NAME), "cut short"),
        (lambda folder: rename_operator(folder / GRAPH_NAME), "refuses"),
        (lambda folder: rename_input(folder / GRAPH_NAME), "other inputs"),
    ],
    ids=["no graph", "no data", "short data", "short graph", "unknown operator", "foreign graph"],
)
def test_damaged_folder_is_one_sentence(damage: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    export_onnx(open_checkpoint(make_checkpoint(tmp_path / "dense", "llama")), tmp_path / "onnx", form=STANDARD)
    damage(tmp_path / "onnx")
    with pytest.raises(UserError, match=words) as caught:
        open_onnx(tmp_path / "onnx", 1)
    assert "\n" not in str(caught.value)


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_operator(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())


def rename_input(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    model.graph.input[2].name = "positions"
    for node in model.graph.node:
        node.input[:] = ["positions" if name == "position_ids" else name for name in node.input]
    path.write_bytes(model.SerializeToString())


def test_failed_export_leaves_the_old_one(tmp_path: Path, ids: np.ndarray) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama"))
    export_onnx(checkpoint, tmp_path / "onnx", form=STANDARD)
    before, _ = open_onnx(tmp_path / "onnx", 1).prefill(ids)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_onnx(checkpoint, tmp_path / "onnx", fail, STANDARD)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == [GRAPH_NAME, DATA_NAME]
    assert np.array_equal(open_onnx(tmp_path / "onnx", 1).prefill(ids)[0], before)


def test_export_is_repeatable_and_reports_progress(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "gemma3_text")
    (folder / "tokenizer.json").write_text("{}")
    seen: list[tuple[int, int]] = []
    written = []
    for name in ("first", "second"):
        path = export_onnx(open_checkpoint(folder), tmp_path / name, lambda done, total: seen.append((done, total)))
        written.append([path.read_bytes(), (path.parent / DATA_NAME).read_bytes()])
        assert (path.parent / "tokenizer.json").read_text() == "{}"
    assert written[0] == written[1]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2


def test_export_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama"))
    with pytest.raises(UserError, match="float16"):
        export_onnx(checkpoint, tmp_path / "onnx", form=GraphForm(fused=False, dtype=torch.float16))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_onnx(checkpoint, tmp_path / "file")


def test_eager_refuses_padding(export: Exporter, ids: np.ndarray) -> None:
    checkpoint, _ = export("llama")
    mask = np.ones_like(ids)
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="padding"):
        load_eager(checkpoint).prefill(ids, mask)


class Recorder:
    """A runtime that writes down the order of its calls."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls, self.vocab = name, calls, 10

    def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None, every: bool = True) -> tuple[np.ndarray, None]:
        self.calls.append(f"{self.name}{ids.shape[1]}")
        return np.zeros((1, ids.shape[1], 10)), None

    def decode(self, ids: np.ndarray, cache: None) -> tuple[np.ndarray, None]:
        return np.zeros((1, 1, 10)), None


def test_pair_is_measured_in_alternation() -> None:
    calls: list[str] = []
    first, second = measure_pair(Recorder("a", calls), Recorder("b", calls), 4, 2, 3)
    assert calls == ["a4", "b4", "a4", "b4", "b4", "a4", "a4", "b4"]  # the first of each only warms up
    for speed in (first, second):
        assert speed.rounds == 3
        assert 0 < speed.prefill_range[0] <= speed.prefill_tokens_per_s <= speed.prefill_range[1]
        assert 0 < speed.decode_range[0] <= speed.decode_tokens_per_s <= speed.decode_range[1]
    with pytest.raises(ValueError, match="at least 1"):
        measure_all([Recorder("a", calls)], 4, 0, 3)


def test_both_runtimes_can_be_measured(export: Exporter) -> None:
    checkpoint, model = export("llama")
    for speed in measure_pair(model, load_eager(checkpoint), 8, 2, 2):
        assert speed.prefill_tokens_per_s > 0
