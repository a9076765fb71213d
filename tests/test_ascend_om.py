"""What goes to ATC computes what the decoder does, in pieces, with a fixed cache; and the folder says all there is."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
import torch
from onnx.reference import ReferenceEvaluator
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import CASES, make_checkpoint

from backends import ascend_om, om_graph, om_runner
from backends.ascend_check import check_folder
from backends.ascend_om import (
    DATA,
    HalfCheck,
    OmReport,
    OmRequest,
    export_om,
    request_for,
    resolve_request,
    store_model,
)
from backends.ascend_rules import list_operators
from backends.eager import EagerModel, load_eager
from backends.om_graph import OmGraph, StepForm, emit_step
from backends.om_runner import AclSession, Contract, Engine, Failure, OnnxSession, plan_pieces
from cli.ascend_om import OmFlags, make_request, run_om_export
from cli.console import Console
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.weights import read_spec
from profiles.loader import load_profile

REQUEST = OmRequest("Ascend310B1", dtype="fp32", cache=128, gears=(1, 4, 16))
HALF = replace(REQUEST, dtype="fp16")
PROMPT, NEW = 29, 64  # pieces of 16 and of 13 padded to 16; longer than every window and scaled context
UNEVEN = {
    "1": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "3": {"num_attention_heads": 2, "num_key_value_heads": 1},
}
ABSORBED = {"0": {"absorbed_norms": ["attn_out"]}, "2": {"absorbed_norms": ["attn_out", "mlp_out"]}}
# Relative to the largest logit. Sums in another order give 1e-6; float16 rounds each value by 5e-4.
CLOSE = {"fp32": 1e-5, "fp16": 2e-2}


class Made:
    """A tiny model, its export, and the runner over it."""

    def __init__(self, folder: Path, case: str, request: OmRequest, **changes: Any) -> None:
        self.checkpoint = open_checkpoint(make_checkpoint(folder / "dense", case, **changes))
        self.report = export_om(self.checkpoint, folder / "om", request)
        self.folder = folder / "om"
        self.contract = Contract(self.folder)

    @cached_property
    def session(self) -> OnnxSession:
        return OnnxSession(self.contract, threads=1)

    def engine(self) -> Engine:
        """A runner with an empty cache."""
        session = copy.copy(self.session)
        session.cache = np.zeros_like(session.cache)
        return Engine(self.contract, session)

    @cached_property
    def eager(self) -> EagerModel:
        return load_eager(self.checkpoint)

    def graphs(self) -> list[onnx.ModelProto]:
        return [onnx.load(path, load_external_data=False) for path in sorted(self.folder.glob("*.onnx"))]


Maker = Callable[..., Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Return a function that makes each tiny export once."""
    made: dict[str, Made] = {}

    def build(case: str, request: OmRequest = REQUEST, **changes: Any) -> Made:
        key = f"{case} {request} {changes}"
        if key not in made:
            made[key] = Made(tmp_path_factory.mktemp(case), case, request, **changes)
        return made[key]

    return build


def draw_ids(count: int = PROMPT) -> list[int]:
    ids: list[int] = np.random.default_rng(5).integers(3, 96, count).tolist()
    return ids


def compare(engine: Engine, model: EagerModel, bound: float) -> None:
    """Prefill in pieces, decode three tokens and a further piece; each time the last logits are the decoder's."""
    cache: Any = None
    for ids in (draw_ids(), [7], [5], [90], draw_ids(6)):
        block = np.array([ids])
        theirs, cache = model.prefill(block) if cache is None else model.decode(block, cache)
        assert np.abs(engine.feed(ids) - theirs[0, -1]).max() <= bound * np.abs(theirs).max()


# The same numbers as the decoder


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_decoders(case: str, make: Maker) -> None:
    made = make(case)
    assert made.engine().generate(draw_ids(), NEW) == made.eager.generate(draw_ids(), NEW)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_decoders(case: str, dtype: str, make: Maker) -> None:
    made = make(case, replace(REQUEST, dtype=dtype))
    compare(made.engine(), made.eager, CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("case", "layers"),
    [("llama-biases", UNEVEN), ("phi3", UNEVEN), ("glm", UNEVEN), ("olmo2", UNEVEN), ("qwen3", UNEVEN),
     ("gemma2", UNEVEN), ("gemma2", ABSORBED), ("glm4", ABSORBED), ("pangu_sandwich", ABSORBED)],
)  # fmt: skip
def test_uneven_and_absorbed_layers(case: str, layers: dict[str, Any], dtype: str, make: Maker) -> None:
    made = make(case, replace(REQUEST, dtype=dtype), per_layer_config=layers)
    compare(made.engine(), made.eager, CLOSE[dtype])
    if layers is UNEVEN:
        heads = [(row["first"], row["kv_heads"]) for row in made.contract.cache["layers"]]
        assert heads == [(0, 3), (6, 2), (10, 3), (16, 1)]
        assert made.contract.cache_shape()[2] == 18


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations(activation: str, make: Maker) -> None:
    for request in (REQUEST, HALF):
        made = make("llama", request, hidden_act=activation)
        compare(made.engine(), made.eager, CLOSE[request.dtype])


@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3-longrope", "smollm3-window"])
def test_static_graphs_share_one_data_file(case: str, make: Maker) -> None:
    made = make(case, replace(REQUEST, static=True, gears=(1, 16)))
    assert {"decode.onnx", "prefill_16.onnx", DATA} <= set(made.report.files)
    for model in made.graphs():
        sizes = [d.WhichOneof("value") for v in (*model.graph.input, *model.graph.output)
                 for d in v.type.tensor_type.shape.dim]  # fmt: skip
        assert set(sizes) == {"dim_value"}
    compare(made.engine(), made.eager, CLOSE["fp32"])
    assert made.report.files[DATA] == make(case).report.files[DATA]


def test_int32_ids_and_all_logits(make: Maker) -> None:
    made = make("gemma2", replace(REQUEST, ids="int32", logits="all"))
    compare(made.engine(), made.eager, CLOSE["fp32"])
    session = made.session
    feeds = om_runner.make_feeds(made.contract, draw_ids(4), 4, 0, long=False)
    assert {value.dtype.name for value in feeds.values()} == {"int32"}
    theirs, _ = made.eager.prefill(np.array([draw_ids(4)]))
    ours = session.step(feeds, 4, 0, True)
    assert ours is not None and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_longrope_changes_where_the_decoder_does(make: Maker) -> None:
    """Its context of 24 is passed by the prompt, or by decoding; then all tokens of that call turn anew."""
    made = make("phi3-longrope")
    assert made.contract.long_after == 24
    for prompt in (20, 24, 25):
        ids = draw_ids(prompt)
        assert made.engine().generate(ids, 12) == made.eager.generate(ids, 12)
    short = make("phi3-longrope", replace(REQUEST, cache=24))
    assert short.contract.long_after is None
    assert short.engine().generate(draw_ids(16), 8) == made.eager.generate(draw_ids(16), 8)


def test_one_layer_and_more_than_can_be_joined_at_once(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    single = make("llama", num_hidden_layers=1)
    compare(single.engine(), single.eager, CLOSE["fp32"])
    monkeypatch.setattr(om_graph, "MOST_JOINED", 3)
    made = make("llama", replace(REQUEST, cache=127))
    compare(made.engine(), made.eager, CLOSE["fp32"])
    joined = [len(node.input) for node in made.graphs()[0].graph.node if node.name.startswith(("cache/", "new_key"))]
    assert joined == [3, 2]


# float16, operator by operator


class SlowSession(OnnxSession):
    """ONNX's own plain evaluator: every value of a float16 node is rounded to float16, nothing is fused."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.cache = np.zeros(contract.cache_shape(), contract.dtype)
        self.sessions = {}
        for graph in contract.graphs:
            evaluator = ReferenceEvaluator(str(contract.folder / graph["onnx"]))
            self.sessions |= dict.fromkeys(graph["gears"], evaluator)


# onnx's Sigmoid also computes the branch that it then leaves out: exp of what is positive, and inf / inf.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("case", ["llama-biases", "gemma2", "glm4", "olmo2", "granite", "smollm3-window"])
def test_strict_half_precision(case: str, make: Maker) -> None:
    made = make(case, HALF)
    compare(Engine(made.contract, SlowSession(made.contract)), made.eager, CLOSE["fp16"])


def test_a_stream_whose_squares_overflow_float16(make: Maker) -> None:
    """Massive activations: the stream reaches thousands, its squares tens of millions."""
    made = make("granite", HALF, embedding_multiplier=5000.0)
    compare(Engine(made.contract, SlowSession(made.contract)), made.eager, CLOSE["fp16"])


def test_scores_that_overflow_before_the_scale(make: Maker) -> None:
    """Products of 300000 before the scale of 1 / 2048: float16 holds them only because queries are scaled first."""
    made = make("gemma2", HALF, query_pre_attn_scalar=2048**2, attn_logit_softcapping=None)
    tensors = load_file(made.checkpoint.folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] *= 100
    folder = made.folder.with_name("large")
    shutil.copytree(made.checkpoint.folder, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    export_om(checkpoint, folder / "om", HALF)
    contract = Contract(folder / "om")
    compare(Engine(contract, SlowSession(contract)), load_eager(checkpoint), CLOSE["fp16"])


def test_float32_nodes_are_the_ones_kept(make: Maker) -> None:
    """Every node that ONNX infers to give float32 is on the list, but for casts and what merely moves data."""
    made = make("gemma2", HALF)
    model = onnx.shape_inference.infer_shapes(made.graphs()[0])
    kept = set((made.folder / "keep_dtype.cfg").read_text().split())
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    wide = {node.name for node in model.graph.node if types[node.output[0]] == onnx.TensorProto.FLOAT}
    casts = {node.name for node in model.graph.node if node.op_type == "Cast"}
    assert wide - casts - kept <= {node.name for node in model.graph.node if node.op_type == "Slice"}
    assert kept <= wide
    computing = {node.op_type for node in model.graph.node if node.name in kept}
    assert {"Mul", "ReduceMean", "Add", "Sqrt", "Div", "Softmax", "Tanh"} <= computing
    black = json.loads((made.folder / "mixlist.json").read_text())["black-list"]["to-add"]
    assert {"Square", "SoftmaxV2", "RealDiv", "ReduceMean"} <= set(black)


# What ATC will read


STATIC = replace(HALF, static=True, gears=(1, 8), ids="int32")
FORMS = [(case, HALF) for case in CASES] + [(case, form) for case in ("gemma2", "glm4") for form in (REQUEST, STATIC)]


@pytest.mark.parametrize(("case", "request_"), FORMS)
def test_graphs_hold_what_atc_converts(case: str, request_: OmRequest, make: Maker) -> None:
    made = make(case, request_)
    findings = check_folder(made.folder).findings
    assert not [finding for finding in findings if finding.severity == "error"]
    for path in made.folder.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    for model in made.graphs():
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert model.ir_version <= 8
        for node in model.graph.node:
            assert node.domain == ""
            operator = list_operators()[node.op_type]
            assert any(low <= 18 <= high for low, high in operator.opsets)
            assert node.op_type not in ("Trilu", "Shape", "Where", "Range", "Expand", "Pow")
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)
        inline = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(np.prod(t.dims) for t in inline) < 500
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            dims = value.type.tensor_type.shape.dim
            assert len(dims) <= 4
            assert all(dim.dim_value > 0 for dim in dims if dim.HasField("dim_value"))


def test_contract_describes_the_graph(make: Maker) -> None:
    made = make("phi3-longrope", HALF)
    contract = json.loads((made.folder / "io.json").read_text())
    graph = made.graphs()[0].graph
    names = {"S": "new_tokens", "C+S": "cached_and_new_tokens"}
    for said, real in ((contract["inputs"], graph.input), (contract["outputs"], graph.output)):
        assert [entry["name"] for entry in said] == [value.name for value in real]
        for entry, value in zip(said, real, strict=True):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert dims == [names.get(axis, axis) for axis in entry["shape"]]
            element = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert element.name == entry["dtype"]
    assert contract["tokens"] == {"bos": 1, "eos": [2], "pad": 0}
    assert contract["cache"]["row_bytes"] == 24 * 8 * 2
    assert contract["rope"]["long_after"] == 24


def test_weights_beyond_two_gigabytes(make: Maker, tmp_path: Path) -> None:
    """Offsets above 2^31, by a hole in the data file: nothing in the graph grows with it."""
    made = make("llama-tied")
    spec, request = read_spec(made.checkpoint), resolve_request(REQUEST, read_spec(made.checkpoint))
    shutil.copytree(made.folder, tmp_path / "big")
    with (tmp_path / "big" / DATA).open("wb") as data:
        data.seek(2**31)
        graph = OmGraph(data, DATA)
        stored = store_model(graph, (made.checkpoint, spec), request.cache, HalfCheck(False), None)
    emit_step(graph, spec, stored, StepForm(request.cache, None))
    (tmp_path / "big" / "model.onnx").write_bytes(graph.build_model("test").SerializeToString())
    entries = [entry for tensor in graph.initializers for entry in tensor.external_data if entry.key == "offset"]
    assert min(int(entry.value) for entry in entries) >= 2**31
    contract = Contract(tmp_path / "big")
    compare(Engine(contract, OnnxSession(contract, threads=1)), made.eager, CLOSE["fp32"])


# The command


def run_script(folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", str(folder / "build_om.sh")]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)


def test_build_script_runs_what_build_json_says(make: Maker, tmp_path: Path) -> None:
    """A stand-in for atc writes its arguments down; real ATC is not on this machine."""
    request = replace(HALF, static=True, gears=(1, 16), host_cpu="aarch64", jobs=2)
    folder = tmp_path / "a folder"
    shutil.copytree(make("llama", request).folder, folder)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "atc").write_text(
        '#!/bin/sh\nfor word; do echo "$word" >>atc.log\n'
        'case $word in --output=*) touch "${word#*=}_linux_aarch64.om";; esac; done\n'
        'echo "jobs=$TE_PARALLEL_COMPILER" >>atc.log\n'
    )
    (tools / "atc").chmod(0o755)
    ran = run_script(folder, f"{tools}:{os.environ['PATH']}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:2] == ["written: decode.om", "written: prefill_16.om"]
    commands = json.loads((folder / "build.json").read_text())["commands"]
    expected = []
    for command in commands:
        expected += [*(f"--{name}={value}" for name, value in command["flags"].items()), "jobs=2"]
    assert (folder / "atc.log").read_text().splitlines() == expected
    assert commands[1]["flags"]["input_shape"] == (
        "input_ids:1,16;attention_mask:1,144;position_ids:1,16;past_key_values:1,128,24,8"
    )
    assert commands[0]["flags"]["host_env_cpu"] == "aarch64"
    assert commands[0]["flags"]["external_weight"] == "1"
    assert (folder / "decode.om").is_file()


def test_gears_follow_the_open_axes(make: Maker) -> None:
    flags = json.loads((make("phi3-longrope", HALF).folder / "build.json").read_text())["commands"][0]["flags"]
    assert flags["dynamic_dims"] == "1,129,1,1;4,132,4,4;16,144,16,16"
    assert flags["input_shape"].startswith("input_ids:1,-1;attention_mask:1,-1;position_ids:1,-1;rope_ids:1,-1;past")
    assert flags["precision_mode_v2"] == "mixed_float16"
    assert flags["input_format"] == "ND"
    origin = make("llama", replace(HALF, precision="origin"))
    assert not {"keep_dtype.cfg", "mixlist.json"} & set(origin.report.files)


def test_build_script_without_atc(make: Maker) -> None:
    ran = run_script(make("llama").folder, "/usr/bin:/bin")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1 and "Ascend310B1" in ran.stderr


# The runner


@pytest.mark.parametrize("gears", [(1, 4, 16), (1,), (1, 2, 4, 8), (1, 128)])
def test_pieces_cover_any_length(gears: tuple[int, ...]) -> None:
    for count in range(1, 140):
        pieces = plan_pieces(count, gears)
        assert sum(used for _, used in pieces) == count
        assert all(0 < used <= gear and gear in gears for gear, used in pieces)
        assert all(gear == used == gears[-1] for gear, used in pieces[:-1])
        assert not [gear for gear in gears if pieces[-1][1] <= gear < pieces[-1][0]]


def test_cache_fills_to_the_last_row(make: Maker) -> None:
    made = make("llama", replace(REQUEST, cache=32))
    new = made.engine().generate(draw_ids(30), 10)
    assert new == made.eager.generate(draw_ids(30), 3)  # two more rows, and what the last one predicts
    with pytest.raises(Failure, match=r"33 tokens .* cache of 32"):
        made.engine().feed(draw_ids(33))


def test_a_stop_id_ends_the_text(make: Maker) -> None:
    free = make("llama").engine().generate(draw_ids(), 8)
    assert make("llama").engine().generate(draw_ids(), 8, {free[3]}) == free[: free.index(free[3]) + 1]


def run_copy(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run_om.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def test_run_om_stands_alone(make: Maker) -> None:
    made = make("gemma2")
    ran = run_copy(made.folder, "--ids", "5,6,7", "--new", "6", "--onnx")
    assert ran.returncode == 0, ran.stderr
    expected = made.eager.generate([5, 6, 7], 6, {2})
    assert [int(word) for word in ran.stdout.split(",")] == expected


def test_run_om_without_cann_says_so(make: Maker) -> None:
    ran = run_copy(make("gemma2").folder, "--ids", "5")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1 and "CANN" in ran.stderr and "--onnx" in ran.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--ids", "x"], "whole numbers"), (["--ids", ""], "no token"), ([], "either"), (["--ids", "96"], "0 .. 95"),
     (["--ids", "5", "--new", "0"], "--new"), (["--prompt", "hello"], "tokenizer.json"),
     (["--ids", ",".join(["5"] * 129)], "129 tokens")],
)  # fmt: skip
def test_runner_mistakes(words: list[str], said: str, make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    assert om_runner.main([*words, "--onnx", "--folder", str(make("llama").folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and error.endswith(".\n")


@pytest.mark.parametrize("damage", ["missing", "short", "garbage"])
def test_runner_with_a_damaged_folder(damage: str, make: Maker, tmp_path: Path) -> None:
    shutil.copytree(make("llama").folder, tmp_path / "om")
    if damage == "missing":
        (tmp_path / "om" / DATA).unlink()
    elif damage == "short":
        os.truncate(tmp_path / "om" / DATA, 1000)
    else:
        (tmp_path / "om" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(Failure, match="cannot open .*model.onnx") as caught:
        OnnxSession(Contract(tmp_path / "om"))
    assert "\n" not in str(caught.value)


def test_a_prompt_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path / "dense", "llama")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{id}": id for id in range(96)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.enable_truncation(2)  # neither may touch a prompt
    words.enable_padding(length=8)
    words.save(str(source / "tokenizer.json"))
    export_om(open_checkpoint(source), tmp_path / "om", REQUEST)
    assert om_runner.main(["--prompt", "w5 w6 w7", "--new", "4", "--onnx", "--folder", str(tmp_path / "om")]) == 0
    expected = load_eager(open_checkpoint(source)).generate([5, 6, 7], 4, {2})
    assert capsys.readouterr().out.split() == [f"w{id}" for id in expected]
    (tmp_path / "om/tokenizer.json").write_text("{}")
    assert om_runner.main(["--prompt", "w5", "--onnx", "--folder", str(tmp_path / "om")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is no tokenizer" in error and "--ids" in error


def test_runner_needs_its_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert om_runner.main(["--ids", "1", "--folder", str(tmp_path)]) == 2
    assert "io.json" in capsys.readouterr().err


class FakeDevice:
    """Stands in for CANN's `acl`: checked device memory, and ONNX Runtime in the place of a compiled model."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.models: dict[int, dict[str, Any]] = {}
        self.gear: dict[int, list[int]] = {}
        self.loaded = 0
        names = "load_from_file create_desc get_desc get_num_inputs get_num_outputs get_input_size_by_index"
        names += " get_output_size_by_index create_dataset add_dataset_buffer get_input_index_by_name"
        names += " set_input_dynamic_dims execute unload destroy_desc"
        self.mdl = types.SimpleNamespace(**{name: getattr(self, name) for name in names.split()})
        self.rt = types.SimpleNamespace(
            set_device=lambda device: 0, create_context=lambda device: (1, 0), malloc=self.malloc, memset=self.memset,
            memcpy=self.memcpy, destroy_context=lambda context: 0, reset_device=lambda device: self.blocks.clear() or 0,
        )  # fmt: skip
        self.finished = False

    def init(self) -> int:
        return 0

    def finalize(self) -> int:
        self.finished = True
        return 0

    def unload(self, model: int) -> int:
        del self.models[model]
        return 0

    def destroy_desc(self, description: dict[str, int]) -> int:
        return 0

    def malloc(self, size: int, policy: int) -> tuple[int, int]:
        block = np.full(size, 0xFF, np.uint8)  # NaN, as memory may hold anything
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data, 0

    def inside(self, address: int, count: int) -> bool:
        return any(start <= address and address + count <= start + len(block) for start, block in self.blocks.items())

    def memset(self, address: int, room: int, value: int, count: int) -> int:
        ctypes.memset(address, value, count)
        return 0 if self.inside(address, room) else 1

    def memcpy(self, target: int, room: int, source: int, count: int, kind: int) -> int:
        if count > room or (kind in (1, 3) and not self.inside(target, room)):
            return 107000
        if kind in (2, 3) and not self.inside(source, count):
            return 107000
        ctypes.memmove(target, source, count)
        return 0

    def create_data_buffer(self, address: int, size: int) -> tuple[int, int]:
        return address, size

    def create_dataset(self) -> list[tuple[int, int]]:
        return []

    def add_dataset_buffer(self, dataset: Any, buffer: tuple[int, int]) -> tuple[Any, int]:
        dataset.append(buffer)
        return dataset, 0

    def load_from_file(self, path: str) -> tuple[int, int]:
        contract = Contract(Path(path).parent)
        graph = next(graph for graph in contract.graphs if graph["om"] == Path(path).name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(contract.folder / graph["onnx"]), options)
        self.loaded += 1
        self.models[self.loaded] = {"contract": contract, "gears": graph["gears"], "session": session}
        return self.loaded, 0

    def create_desc(self) -> dict[str, int]:
        return {}

    def get_desc(self, description: dict[str, int], model: int) -> int:
        description["model"] = model
        return 0

    def values(self, description: dict[str, int], side: str) -> list[dict[str, Any]]:
        return list(getattr(self.models[description["model"]]["contract"], side))

    def get_num_inputs(self, description: dict[str, int]) -> int:
        geared = len(self.models[description["model"]]["gears"]) > 1
        return len(self.values(description, "inputs")) + geared

    def get_num_outputs(self, description: dict[str, int]) -> int:
        return len(self.values(description, "outputs"))

    def size(self, description: dict[str, int], value: dict[str, Any]) -> int:
        model = self.models[description["model"]]
        shape = model["contract"].shape(value, max(model["gears"]))
        return int(np.prod(shape)) * np.dtype(value["dtype"]).itemsize

    def get_input_size_by_index(self, description: dict[str, int], index: int) -> int:
        values = self.values(description, "inputs")
        return self.size(description, values[index]) if index < len(values) else 64

    def get_output_size_by_index(self, description: dict[str, int], index: int) -> int:
        return self.size(description, self.values(description, "outputs")[index])

    def get_input_index_by_name(self, description: dict[str, int], name: str) -> tuple[int, int]:
        assert name == "ascend_mbatch_shape_data"
        return len(self.values(description, "inputs")), 0

    def set_input_dynamic_dims(self, model: int, dataset: Any, index: int, dims: dict[str, Any]) -> int:
        assert dims["dimCount"] == len(dims["dims"]) and index == len(dataset) - 1
        self.gear[model] = dims["dims"]
        return 0

    def execute(self, model: int, inputs: list[tuple[int, int]], outputs: list[tuple[int, int]]) -> int:
        data = self.models[model]
        contract, sizes = data["contract"], list(self.gear.get(model, []))
        feeds = {}
        for (address, _), value in zip(inputs, contract.inputs, strict=False):
            shape = contract.shape(value, data["gears"][0])
            if sizes:
                shape, sizes = tuple(sizes[: len(shape)]), sizes[len(shape) :]
            block = (ctypes.c_char * (int(np.prod(shape)) * np.dtype(value["dtype"]).itemsize)).from_address(address)
            feeds[value["name"]] = np.frombuffer(block, value["dtype"]).reshape(shape)
        for (address, size), result in zip(outputs, data["session"].run(None, feeds), strict=True):
            assert result.nbytes <= size
            ctypes.memmove(address, np.ascontiguousarray(result).ctypes.data, result.nbytes)
        return 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    fake = FakeDevice()
    monkeypatch.setitem(sys.modules, "acl", fake)  # type: ignore[arg-type]
    yield fake


@pytest.mark.parametrize(
    ("case", "request_"),
    [("gemma2", REQUEST), ("gemma2", replace(REQUEST, static=True, gears=(1, 16))), ("phi3-longrope", HALF)],
)
def test_device_session_does_what_the_check_does(
    case: str, request_: OmRequest, make: Maker, device: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(case, request_)
    for graph in made.contract.graphs:
        (made.folder / graph["om"]).touch()
    session = AclSession(made.contract)
    assert Engine(made.contract, session).generate(draw_ids(), 20) == made.engine().generate(draw_ids(), 20)
    assert om_runner.main(["--ids", "5,6", "--new", "3", "--folder", str(made.folder)]) == 0
    assert capsys.readouterr().out.count(",") <= 2
    assert device.finished and not device.blocks  # the command gives all back
    for graph in made.contract.graphs:
        (made.folder / graph["om"]).unlink()


def test_device_mistakes_are_sentences(make: Maker, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("gemma2", HALF)
    with pytest.raises(Failure, match=r"model\.om is missing; run build_om\.sh"):
        AclSession(made.contract)
    (made.folder / "model.om").touch()
    monkeypatch.setattr(device.mdl, "get_input_size_by_index", lambda description, index: 4)
    with pytest.raises(Failure, match="compile it again"):
        AclSession(made.contract)
    monkeypatch.setattr(device.rt, "set_device", lambda number: 507033)
    with pytest.raises(Failure, match=r"opening device 0 failed with error code 507033"):
        AclSession(made.contract)
    (made.folder / "model.om").unlink()


# Requests


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"soc_version": "Ascend310Q9"}, ["Ascend310Q9", "nearest"]),
        ({"soc_version": "Ascend910B"}, ["old 910"]),
        ({"soc_version": ""}, ["npu-smi"]),
        ({"soc_version": "Ascend310P3", "dtype": "bf16"}, ["Ascend310P3", "no bfloat16", "fp16"]),
        ({"soc_version": "Ascend310P3", "precision": "mixed_bfloat16"}, ["no bfloat16"]),
        ({"dtype": "bf16"}, ["bf16", "fp16"]),
        ({"dtype": "int8"}, ["int8", "fp16"]),
        ({"gears": (1,)}, ["--gears 1", "2 to 100", "--static"]),
        ({"gears": tuple(range(1, 102))}, ["101", "2 to 100"]),
        ({"gears": tuple(range(1, 102)), "static": True}, ["101 graphs"]),
        ({"gears": (1, 16, 8)}, ["ascend"]),
        ({"gears": (1, 8, 8)}, ["ascend"]),
        ({"gears": (2, 8)}, ["from 1"]),
        ({"gears": (0, 8)}, ["from 1"]),
        ({"gears": (1, 129)}, ["cache of 128"]),
        ({"cache": 0}, ["--cache 0"]),
        ({"cache": 257}, ["256 positions"]),
        ({"ids": "int8"}, ["--ids int8", "int32"]),
        ({"logits": "first"}, ["--logits first"]),
        ({"precision": "double"}, ["--precision double"]),
        ({"host_cpu": "arm"}, ["--host-cpu arm", "aarch64"]),
        ({"external_weight": 3}, ["--external-weight 3"]),
        ({"jobs": 0}, ["--jobs 0"]),
        ({"memory_gib": 1e-4, "profile": "a-tiny-board"}, ["Weights and cache", "a-tiny-board", "--cache"]),
    ],
)
def test_requests_that_cannot_be(changes: dict[str, Any], words: list[str], make: Maker, tmp_path: Path) -> None:
    request = replace(REQUEST, **changes)
    refused(lambda: export_om(make("llama").checkpoint, tmp_path / "om", request), *words)
    assert not list(tmp_path.iterdir())


def test_odd_heads_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "dense", "llama", head_dim=7))
    refused(lambda: export_om(checkpoint, tmp_path / "om", REQUEST), "7 values", "even head size")


def test_choices_that_are_left_open(make: Maker) -> None:
    spec = read_spec(make("llama").checkpoint)
    plan = resolve_request(OmRequest("Ascend310P3"), spec)
    assert (plan.cache, plan.gears, plan.precision, plan.external_weight) == (256, (1, 8, 32, 128), "mixed_float16", 0)
    assert resolve_request(OmRequest("Ascend310P3", cache=40), spec).gears == (1, 8, 32)
    static = resolve_request(OmRequest("Ascend310P3", static=True), spec)
    assert (static.gears, static.external_weight) == ((1, 128), 1)
    assert resolve_request(OmRequest("Ascend310P3", dtype="fp32"), spec).precision == "origin"


def test_profiles_name_their_chip() -> None:
    board = OmRequest("Ascend310B1", "ascend-310b1", host_cpu="aarch64", memory_gib=12)
    assert request_for(load_profile("ascend-310b1")) == board
    assert request_for(load_profile("ascend-300i-duo")).soc_version == "Ascend310P3"
    assert request_for(load_profile("ascend-a3"), "Ascend910_9382").soc_version == "Ascend910_9382"
    refused(lambda: request_for(load_profile("ascend-310b1"), "Ascend310P3"), "Ascend310P3", "ascend-310b1")
    refused(lambda: request_for(load_profile("cpu-avx2")), "cpu-avx2")
    refused(lambda: request_for(load_profile("cpu-avx2"), "Ascend310B1"), "cpu-avx2", "Ascend310B1")
    own = replace(load_profile("ascend-310p3"), name="my-card")
    assert request_for(own, "Ascend310P1").soc_version == "Ascend310P1"
    refused(lambda: request_for(own), "my-card", "--soc-version")


def change_tensor(source: Checkpoint, folder: Path, value: float) -> Checkpoint:
    """Copy a checkpoint with one weight of layer 2 set to `value`."""
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns("om"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][1, 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def test_weights_that_float16_cannot_hold(make: Maker, tmp_path: Path) -> None:
    large = change_tensor(make("llama").checkpoint, tmp_path / "large", -70000.0)
    refused(lambda: export_om(large, tmp_path / "om", HALF), "model.layers.2.mlp.down_proj.weight", "70000", "65504")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    assert export_om(large, tmp_path / "om", REQUEST).largest == (70000.0, "model.layers.2.mlp.down_proj.weight")


def test_report_counts_small_weights_as_a_loop_does(make: Maker, tmp_path: Path) -> None:
    checkpoint = change_tensor(make("phi3").checkpoint, tmp_path / "small", 1e-8)
    report: OmReport = export_om(checkpoint, tmp_path / "om", HALF)
    matrices = [t for n, t in load_file(checkpoint.folder / "model.safetensors").items() if "norm" not in n]
    values = torch.cat([tensor.flatten() for tensor in matrices]).numpy()
    halves = values.astype(np.float16)
    flushed = sum(1 for value, half in zip(values, halves, strict=True) if value != 0 and half == 0)
    tiny = np.finfo(np.float16).tiny
    subnormal = sum(1 for half in halves if half != 0 and abs(half) < tiny)
    assert flushed >= 1
    assert report.flushed == flushed / len(values)
    assert abs(report.subnormal - subnormal / len(values)) <= 1 / len(values)  # one may round up to the first normal
    assert report.largest[0] == np.abs(values).max()


# The folder


def test_a_failed_export_leaves_nothing(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ascend_om, "write_texts", fail)
    refused(lambda: export_om(make("llama").checkpoint, tmp_path / "om", REQUEST), "No space left")
    assert not list(tmp_path.iterdir())


def test_an_old_export_stays_until_the_new_one_is_whole(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make("llama").checkpoint
    export_om(checkpoint, tmp_path / "om", REQUEST)
    before = {path.name: path.read_bytes() for path in (tmp_path / "om").iterdir()}
    refused(lambda: export_om(checkpoint, tmp_path / "om", HALF), "not empty", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(ascend_om, "write_texts", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        refused(lambda: export_om(checkpoint, tmp_path / "om", HALF, overwrite=True), "Input/output error")
    assert {path.name: path.read_bytes() for path in (tmp_path / "om").iterdir()} == before
    export_om(checkpoint, tmp_path / "om", HALF, overwrite=True)
    assert json.loads((tmp_path / "om" / "build.json").read_text())["dtype"] == "fp16"
    assert [path.name for path in tmp_path.iterdir()] == ["om"]


def test_folders_that_are_not_ours_are_kept(make: Maker, tmp_path: Path) -> None:
    checkpoint = make("llama").checkpoint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    refused(lambda: export_om(checkpoint, tmp_path / "mine", REQUEST, overwrite=True), "mine", "not overwritten")
    refused(lambda: export_om(checkpoint, tmp_path / "file", REQUEST), "is a file")
    refused(lambda: export_om(checkpoint, checkpoint.folder, REQUEST, overwrite=True), "input folder")
    refused(lambda: export_om(checkpoint, checkpoint.folder.parent, REQUEST, overwrite=True), "input folder")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_exports_are_equal_byte_for_byte(make: Maker, tmp_path: Path) -> None:
    checkpoint, steps = make("gemma2", HALF).checkpoint, []
    export_om(checkpoint, tmp_path / "om", HALF, lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for path in (tmp_path / "om").iterdir():
        assert path.read_bytes() == (make("gemma2", HALF).folder / path.name).read_bytes(), path.name


# The command line's part


def test_run_om_export(make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(make("llama").checkpoint.folder)
    flags = OmFlags(profile="ascend-310b1", cache=64, gears="1,8")
    run_om_export(source, tmp_path / "om", flags, Console(as_json=True, quiet=True))
    facts = json.loads(capsys.readouterr().out)
    assert (facts["soc_version"], facts["cache"], facts["gears"]) == ("Ascend310B1", 64, [1, 8])
    run_om_export(source, tmp_path / "om", replace(flags, overwrite=True), Console(quiet=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "build_om.sh" in lines[1] and "run_om.py" in lines[2]


def test_flags_that_cannot_be() -> None:
    refused(lambda: make_request(OmFlags()), "--profile", "--soc-version")
    refused(lambda: make_request(OmFlags(soc_version="Ascend310B1", gears="1,x")), "--gears 1,x")
    assert make_request(OmFlags(profile="ascend-310b4", host_cpu="")).host_cpu == ""
    assert make_request(OmFlags(soc_version="Ascend310P3", gears="1,4")).gears == (1, 4)
