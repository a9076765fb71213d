"""The Ascend checker: clean folders pass, one planted fault of each kind is found, and the table is what was read."""

import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from onnx import TensorProto, helper, numpy_helper
from refusals import refused
from safetensors.torch import save_file
from tiny import CASES, make_checkpoint
from typer.testing import CliRunner

from backends.ascend_build import Build, fill_shapes, list_gears, parse_shapes, read_arguments, read_builds, read_script
from backends.ascend_check import check_folder
from backends.ascend_check_data import Stored, check_overlaps, measure_values
from backends.ascend_graph import open_graph
from backends.ascend_hf import HfRequest, export_hf
from backends.ascend_om import OmRequest, export_om
from backends.ascend_rules import explain_soc, find_chip, list_operators, list_socs, load_rules
from backends.export_onnx import STANDARD, export_onnx
from cli.check_ascend import check_ascend
from compress.checkpoint import open_checkpoint
from profiles.loader import list_profiles

FLOAT, HALF, BRAIN, LONG, INT = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT64, TensorProto.INT32,
)  # fmt: skip
WIDTH, VOCAB, STEPS, SLOTS, HEAD = 32, 64, 4, 8, 16
FLAGS = {
    "framework": 5,
    "soc_version": "Ascend310B1",
    "input_format": "ND",
    "precision_mode_v2": "mixed_float16",
    "modify_mixlist": "ops_info.json",
    "external_weight": 1,
    "input_shape": "input_ids:1,-1;cache:1,8,2,16",
    "dynamic_dims": "1;2;4",
}
TYPES = {np.dtype("float16"): HALF, np.dtype("float32"): FLOAT, np.dtype("int64"): LONG, np.dtype("int32"): INT}
BLOCK = 50
random = np.random.default_rng(0)


# A clean folder, written by hand


def weight(*shape, kind=np.float16):
    return (random.standard_normal(shape) * 0.1).astype(kind)


def make_model(nodes=(), inputs=(), outputs=(), constants=None, opsets=None):
    """An embedding, a norm in float32 and a head, with a cache; more nodes may follow the norm's output `normed`."""
    own = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"], name="embed"),
        helper.make_node("Cast", ["hidden"], ["wide"], name="widen", to=FLOAT),
        helper.make_node("Mul", ["wide", "wide"], ["squared"], name="square"),
        helper.make_node("ReduceMean", ["squared"], ["mean"], name="mean", axes=[-1], keepdims=1),
        helper.make_node("Add", ["mean", "epsilon"], ["shifted"], name="shift"),
        helper.make_node("Sqrt", ["shifted"], ["root"], name="root"),
        helper.make_node("Div", ["wide", "root"], ["even"], name="divide"),
        helper.make_node("Cast", ["even"], ["normed"], name="narrow", to=HALF),
        helper.make_node("MatMul", ["normed", "head"], ["logits"], name="logits"),
        helper.make_node("Mul", ["cache", "scale"], ["cache_out"], name="cache"),
    ]
    values = {
        "embedding": weight(VOCAB, WIDTH),
        "head": weight(WIDTH, VOCAB),
        "epsilon": np.float32(1e-5).reshape(()),
        "scale": np.float16(1).reshape(()),
        **(constants or {}),
    }
    graph = helper.make_graph(
        [*own, *nodes],
        "decoder",
        [
            helper.make_tensor_value_info("input_ids", INT, [1, "sequence"]),
            helper.make_tensor_value_info("cache", HALF, [1, SLOTS, 2, HEAD]),
            *inputs,
        ],
        [
            helper.make_tensor_value_info("logits", HALF, [1, "sequence", VOCAB]),
            helper.make_tensor_value_info("cache_out", HALF, [1, SLOTS, 2, HEAD]),
            *outputs,
        ],
        [
            value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
            for name, value in values.items()
        ],
    )
    stamps = [helper.make_opsetid(domain, version) for domain, version in (opsets or {"": 17}).items()]
    return helper.make_model(graph, opset_imports=stamps, ir_version=8)


def move_outside(model, path, align=64):
    """Write the matrices of a model to `path` and let the model point there."""
    with path.open("wb") as stream:
        for tensor in model.graph.initializer:
            if len(tensor.dims) < 2:
                continue
            stream.write(bytes(-stream.tell() % align))
            data = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
            del tensor.external_data[:]
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", path.name), ("offset", stream.tell()), ("length", len(data))):
                tensor.external_data.add(key=key, value=str(value))
            stream.write(data)
            tensor.ClearField("raw_data")
    return model


def write_folder(folder, model=None, flags=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    own = onnx.ModelProto()
    own.CopyFrom(model or make_model())
    model = move_outside(own, folder / "model.onnx.data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    given = {**(FLAGS if flags is None else flags), **changes}
    given = {name: value for name, value in given.items() if value is not None}
    build = {"soc_version": given.get("soc_version"), "graphs": [{"model": "model.onnx", "atc": given}]}
    (folder / "build.json").write_text(json.dumps(build))
    (folder / "ops_info.json").write_text(json.dumps({"black-list": {"to-add": ["Square"]}}))
    (folder / "io.json").unlink(missing_ok=True)
    if len(model.graph.input) + len(model.graph.output) == 4:
        write_interface(folder)
    return folder


def write_interface(folder, **changes):
    inputs = [
        {"name": "input_ids", "dtype": "int32", "shape": [1, -1]},
        {"name": "cache", "dtype": "float16", "shape": [1, SLOTS, 2, HEAD], **changes},
    ]
    outputs = [{"name": "logits", "dtype": "float16"}, {"name": "cache_out", "dtype": "float16"}]
    (folder / "io.json").write_text(json.dumps({"inputs": inputs, "outputs": outputs}))


def rules_found(folder, soc=None, severity="error", **options):
    return {finding.rule for finding in check_folder(folder, soc, **options).findings if finding.severity == severity}


def judge(folder, rule, *words, severity="error", soc=None, **options):
    """The findings of `rule`, each of them one sentence; together they say the words."""
    report = check_folder(folder, soc, **options)
    found = [finding for finding in report.findings if finding.rule == rule and finding.severity == severity]
    assert found, [(finding.rule, finding.severity, finding.sentence) for finding in report.findings]
    for finding in report.findings:
        assert finding.sentence.endswith(".")
        assert "\n" not in finding.sentence
    text = " ".join(f"{finding.file} {finding.node} {finding.sentence}" for finding in found)
    for word in words:
        assert word in text, text
    return found


@pytest.mark.parametrize("soc", [None, "Ascend310B4", "Ascend310P3", "Ascend910B2", "Ascend910_9391"])
def test_a_clean_folder_has_no_findings_at_all(tmp_path, soc):
    report = check_folder(write_folder(tmp_path / "om", **({"soc_version": soc} if soc else {})), soc)
    assert report.findings == ()
    assert report.checked == ("model.onnx: 10 nodes, 4 constants",)
    assert report.soc_version == (soc or "Ascend310B1")


def test_a_plain_graph_without_build_is_checked_for_the_chip_that_is_given(tmp_path):
    (tmp_path / "model.onnx").write_bytes(make_model().SerializeToString())
    assert rules_found(tmp_path, "Ascend310B1") == {"open-shape"}
    judge(tmp_path, "soc-version", "--soc-version", severity="warning")


# Nodes


def extra(kind, inputs=("normed",), domain="", constants=None, opsets=None, **attributes):
    node = helper.make_node(kind, list(inputs), ["more"], name="planted", domain=domain, **attributes)
    return make_model([node], outputs=[helper.make_empty_tensor_value_info("more")], constants=constants, opsets=opsets)


BOTH = {"": 17, "npu": 1}


@pytest.mark.parametrize(
    ("model", "rule", "words"),
    [
        (lambda: make_model(opsets={"": 20}), "opset", ["opset 20", "11 to 18"]),
        (lambda: make_model(opsets={"": 10}), "opset", ["opset 10"]),
        (lambda: extra("FastGelu", domain="com.microsoft", opsets={"": 17}), "domain", ["com.microsoft", "E19999"]),
        (lambda: make_model(opsets={"npu": 1}), "domain", ["ai.onnx", "E19999"]),
        (lambda: extra("NewOp", domain="com.microsoft", opsets={"": 17, "com.microsoft": 1}), "operator", ["NewOp"]),
        (lambda: extra("Ceil"), "operator", ["Ceil", "not in the table", "planted"]),
        (lambda: extra("CastLike", ["normed", "normed"], opsets={"": 13}), "operator", ["15 to 18", "stamped 13"]),
        (lambda: extra("GreaterOrEqual", ["normed", "normed"], opsets={"": 11}), "operator", ["8, 12 to 18"]),
        (lambda: extra("Mish"), "operator", ["registered for the opsets 18"]),
        (lambda: extra("NPUGeluV2"), "operator", ["npu only"]),
        (lambda: extra("NPUGroupQuant", domain="npu", opsets=BOTH), "operator", ["put it into ai.onnx"]),
        (lambda: extra("NPUFastGelu", domain="npu", opsets={"": 17, "npu": 2}), "operator", ["opset_import says 2"]),
        (lambda: extra("NPUPromptFlashAttention"), "operator", ["11 to 16, 19", "domain npu"]),
        (lambda: extra("NPUFlashAttention", domain="npu", opsets=BOTH), "operator", ["not verified"]),
        (lambda: extra("NPUPromptFlashAttention", domain="npu", opsets=BOTH), "attribute", ["num_heads"]),
        (lambda: extra("Trilu", ["normed", "epsilon"]), "attribute", ["2 inputs"]),
        (lambda: extra("AscendQuant", dst_type="INT5"), "attribute", ["INT5", "INT8"]),
        (lambda: extra("NPURmsNorm", domain="npu", opsets=BOTH, epsilon=1e-5), "attribute", ["1e-06", "1e-05"]),
        (
            lambda: extra("MatMul", ["normed", "odd"], constants={"odd": weight(32, 16, kind=np.float64)}),
            "dtype",
            ["DOUBLE"],
        ),
        (lambda: extra("Softmax", ["ids"], constants={"ids": np.arange(16)}), "dtype", ["INT64", "Softmax reads ids"]),
        (lambda: extra("Cast", to=TensorProto.FLOAT8E4M3FNUZ), "dtype", ["FLOAT8E4M3FNUZ"]),
    ],
)
def test_planted_node_faults_are_found(tmp_path, model, rule, words):
    judge(write_folder(tmp_path, model()), rule, *words)


@pytest.mark.parametrize("kind", sorted(load_rules()["banned"]))
def test_banned_operators_are_named_with_what_to_write_instead(tmp_path, kind):
    domain = "com.microsoft" if kind in ("MatMulNBits", "GroupQueryAttention") else ""
    folder = write_folder(tmp_path, extra(kind, domain=domain, opsets={"": 17, "com.microsoft": 1}))
    judge(folder, "operator", kind, "not registered", load_rules()["banned"][kind])


def test_a_wrong_stamp_is_one_finding_and_banned_operators_are_still_named(tmp_path):
    folder = write_folder(tmp_path, extra("RMSNormalization", ["normed", "scale"], opsets={"": 23}))
    found = [(finding.rule, finding.node) for finding in check_folder(folder).findings if finding.severity == "error"]
    assert ("opset", "") in found
    assert [node for rule, node in found if rule == "operator"] == ["planted"]


def test_values_that_nothing_makes(tmp_path):
    judge(write_folder(tmp_path / "a", extra("Relu", ["ghost"])), "wiring", "ghost", "planted")
    model = make_model(outputs=[helper.make_tensor_value_info("phantom", HALF, [1])])
    judge(write_folder(tmp_path / "b", model), "wiring", "phantom")


def test_nodes_of_subgraphs_are_checked(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Gelu", ["normed"], ["inner"], name="deep")],
        "then",
        [],
        [helper.make_empty_tensor_value_info("inner")],
    )
    folder = write_folder(
        tmp_path, extra("If", ["yes"], constants={"yes": np.array(True)}, then_branch=branch, else_branch=branch)
    )
    judge(folder, "operator", "deep", "Gelu")


@pytest.mark.parametrize("kind", load_rules()["chips"]["310B"]["lacks"])
def test_kernels_that_310b_lacks(tmp_path, kind):
    operator = list_operators().get(kind)
    if operator is None:  # NPUSwiGlu is no registered name either: it fails earlier
        judge(write_folder(tmp_path, extra(kind, domain="npu", opsets=BOTH)), "operator", kind)
        return
    low = operator.opsets[0][1] if operator.opsets and operator.opsets[0][1] < 18 else 17
    domain, opsets = ("npu", BOTH) if operator.npu else ("", {"": low})
    folder = write_folder(tmp_path, extra(kind, domain=domain, opsets=opsets))
    judge(folder, "kernel", "Ascend310B1 has no kernel", kind)
    assert "kernel" not in rules_found(folder, "Ascend910B2")


def test_other_ascend_operators_are_doubtful_on_310b_only(tmp_path):
    folder = write_folder(tmp_path, extra("NPUFastGelu", domain="npu", opsets=BOTH))
    judge(folder, "kernel", "NPUFastGelu", severity="warning")
    assert "kernel" not in rules_found(folder, "Ascend310P3", "warning")


def test_limits_of_single_kernels_on_310p(tmp_path):
    narrow = extra("NPURmsNorm", ["small"], domain="npu", opsets=BOTH, constants={"small": weight(2, 8)})
    judge(write_folder(tmp_path / "norm", narrow), "kernel", "16 bytes", soc="Ascend310P3")
    assert "kernel" not in rules_found(tmp_path / "norm", "Ascend910B2")
    wide = extra(
        "NPUPromptFlashAttention", ["query"], domain="npu", opsets=BOTH, num_heads=300, input_layout="BSND",
        constants={"query": weight(129, 1, 1, 520)},
    )  # fmt: skip
    words = ("batch 129", "head_dim 520, more", "no multiple", "300 heads")
    judge(write_folder(tmp_path / "attention", wide), "kernel", *words, soc="Ascend310P3")


def test_fused_norms_and_another_epsilon_in_the_config(tmp_path):
    folder = write_folder(tmp_path, extra("NPURmsNorm", domain="npu", opsets=BOTH))
    (folder / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-5}))
    judge(folder, "epsilon", "1e-05", "1e-06", soc="Ascend910B2")
    (folder / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-6}))
    assert "epsilon" not in rules_found(folder, "Ascend910B2")


def test_bfloat16_in_a_graph_for_310p(tmp_path):
    values = helper.make_tensor("brain", BRAIN, [4], [1.0, 2.0, 3.0, 4.0])
    folder = write_folder(tmp_path, extra("Relu", ["brain"], constants={"brain": values}))
    judge(folder, "bf16", "brain", soc="Ascend310P3")
    assert "bf16" not in rules_found(folder, "Ascend910B2")


def test_contradictions_are_found_by_inference(tmp_path):
    folder = write_folder(tmp_path, extra("MatMul", ["normed", "odd"], constants={"odd": weight(48, 16)}))
    judge(folder, "inference", "MatMul")


# Files


def edit(folder, name, **places):
    """Change where a tensor is said to lie."""
    model = onnx.load_model(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    for entry in tensor.external_data:
        entry.value = str(places.get(entry.key, entry.value))
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"location": "other.data"}, ["other.data", "missing"]),
        ({"location": "../model.onnx.data"}, ["../model.onnx.data", "below"]),
        ({"location": "/etc/passwd"}, ["/etc/passwd", "below"]),
        ({"offset": 10**9}, ["cut short"]),
        ({"offset": -64}, ["cut short"]),
        ({"offset": "x"}, ["not a number"]),
        ({"length": 100}, ["100 bytes", "4096"]),
        ({"offset": 64}, ["overlap"]),
    ],
)
def test_planted_faults_of_external_data(tmp_path, places, words):
    folder = write_folder(tmp_path)
    edit(folder, "head", **places)
    judge(folder, "external-data", *words)


def test_tied_ranges_are_right_and_odd_offsets_doubtful(tmp_path):
    edit(write_folder(tmp_path), "head", offset=0)  # as large as the embedding: the same range twice
    assert "external-data" not in rules_found(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes((tmp_path / "model.onnx.data").read_bytes() + bytes(64))
    edit(tmp_path, "head", offset=4096 + 2)
    judge(tmp_path, "alignment", "head", severity="warning")


def test_overlaps_equal_a_plain_loop():
    graph = open_graph(Path("model.onnx"), make_model())
    for seed in range(200):
        draw = np.random.default_rng(seed)
        placed = [
            Stored(f"t{i}", f"f{draw.integers(2)}", int(draw.integers(40)), int(draw.integers(1, 12))) for i in range(5)
        ]
        slow = any(
            a.location == b.location
            and (a.offset, a.length) != (b.offset, b.length)
            and a.offset < b.offset + b.length
            and b.offset < a.offset + a.length
            for a in placed
            for b in placed
        )
        assert bool(list(check_overlaps(graph, placed))) == slow, placed


def test_the_two_gigabyte_rule_with_a_sparse_file(tmp_path):
    with (tmp_path / "model.onnx").open("wb") as stream:
        os.truncate(stream.fileno(), 2**31)
    judge(tmp_path, "protobuf", "2147483648", "E13015", soc="Ascend310B1")


def test_external_data_above_two_gigabytes_pass_without_being_held(tmp_path):
    # 2.2 GB of zeros that take no disk: the graph stays small, and the values are read block by block.
    folder = write_folder(tmp_path)
    model = onnx.load_model(str(folder / "model.onnx"), load_external_data=False)
    size = 1_100_000_000
    tensor = TensorProto(
        name="large", dims=[size // 64, 64], data_type=TensorProto.INT8, data_location=TensorProto.EXTERNAL
    )
    for number in range(2):
        tensor.name = f"large{number}"
        del tensor.external_data[:]
        start = 2**16 + number * size
        for key, value in (("location", "model.onnx.data"), ("offset", start), ("length", size // 64 * 64)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    os.truncate(folder / "model.onnx.data", 2**16 + 2 * size)
    assert rules_found(folder) == set()
    (folder / "build.json").write_text(json.dumps({**FLAGS, "external_weight": 0, "model": "model.onnx"}))
    judge(folder, "external-weight", "GiB", severity="warning")


def test_layout_of_external_weights(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "model.om").write_bytes(b"om")
    judge(folder, "external-weight", "missing")
    (folder / "weight").mkdir()
    assert "external-weight" not in rules_found(folder)
    write_folder(folder, external_weight=0)
    judge(folder, "external-weight", "delete", severity="warning")


# Values


@pytest.mark.parametrize(("value", "kind"), [(np.inf, np.float16), (np.nan, np.float16), (-np.inf, np.float32)])
def test_values_that_are_not_finite(tmp_path, value, kind):
    planted = weight(16, 16, kind=kind)
    planted[3, 3] = value
    folder = write_folder(tmp_path, extra("Relu", ["bad"], constants={"bad": planted}))
    judge(folder, "overflow", "bad", "1 value")


@pytest.mark.parametrize(("mode", "severity"), [("fp16", "error"), ("mixed_float16", "warning"), ("origin", None)])
def test_float32_values_beyond_float16_follow_the_precision_mode(tmp_path, mode, severity):
    planted = weight(16, 16, kind=np.float32)
    planted[3, 3] = -70000
    folder = write_folder(tmp_path, extra("Relu", ["bad"], constants={"bad": planted}), precision_mode_v2=mode)
    found = {finding.severity for finding in check_folder(folder).findings if finding.rule == "overflow"}
    assert found == ({severity} if severity else set())


@pytest.mark.parametrize("kind", [HALF, FLOAT, BRAIN])
def test_measured_values_equal_a_plain_loop(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("backends.ascend_check_data.BLOCK", BLOCK)
    values = (torch.randn(2 * BLOCK + 7, generator=torch.Generator().manual_seed(1)) * 50).to(
        {HALF: torch.float16, FLOAT: torch.float32, BRAIN: torch.bfloat16}[kind]
    )
    values[[1, BLOCK, -1]] = torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=values.dtype)
    values[BLOCK + 3] = -300
    (tmp_path / "data").write_bytes(bytes(64) + values.view(torch.uint8).numpy().tobytes())
    tensor = TensorProto(name="x", dims=[len(values)], data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "data"), ("offset", 64), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    finite = [abs(value) for value in values.tolist() if np.isfinite(value)]
    assert measure_values(tmp_path, tensor) == (len(values) - len(finite), max(finite))


def test_squares_of_norms(tmp_path):
    folder = write_folder(tmp_path, modify_mixlist=None)
    judge(folder, "norm-square", "float32", severity="warning")
    (folder / "keep.txt").write_text("square\n")
    for changes in ({"keep_dtype": "keep.txt"}, {"precision_mode_v2": "origin"}):
        assert "norm-square" not in rules_found(write_folder(folder, modify_mixlist=None, **changes), None, "warning")
    half = [
        helper.make_node("Pow", ["normed", "two"], ["p"], name="power"),
        helper.make_node("ReduceMean", ["p"], ["more"], name="average", axes=[-1]),
    ]
    two = {"two": np.float16(2).reshape(())}
    model = make_model(half, outputs=[helper.make_empty_tensor_value_info("more")], constants=two)
    judge(write_folder(tmp_path / "half", model), "norm-square", "power", "float16 values", severity="warning")


# Shapes


def test_zero_length_dimensions(tmp_path):
    past = helper.make_tensor_value_info("past", HALF, [1, 0, 16])
    model = extra("Relu", ["past"])
    model.graph.input.append(past)
    judge(write_folder(tmp_path, model), "zero-dim", "past")
    judge(
        write_folder(tmp_path, input_shape="input_ids:1,0;cache:1,8,2,16", dynamic_dims=None), "zero-dim", "input_ids"
    )


def test_zero_length_dimensions_that_appear_at_a_gear_only(tmp_path):
    # A slice from the first position on is empty where there is one position.
    node = helper.make_node("Slice", ["normed", "one", "end", "one"], ["more"], name="rest")
    one, end = np.array([1]), np.array([2**31])
    model = make_model(
        [node], outputs=[helper.make_empty_tensor_value_info("more")], constants={"one": one, "end": end}
    )
    judge(write_folder(tmp_path, model), "zero-dim", "more")
    assert "zero-dim" not in rules_found(write_folder(tmp_path, model, dynamic_dims="2;4"))


GEARS = "gears"


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"dynamic_dims": None}, GEARS, ["no gears"]),
        ({"dynamic_dims": "1"}, GEARS, ["1 gear", "2 to 100"]),
        ({"dynamic_dims": ";".join(map(str, range(1, 102)))}, GEARS, ["101 gear"]),
        ({"dynamic_dims": "1,2;2,4"}, GEARS, ["as many values"]),
        ({"dynamic_dims": "1;0"}, GEARS, ["below 1"]),
        ({"dynamic_dims": "1;2;2"}, GEARS, ["twice"]),
        ({"dynamic_dims": "1;two"}, GEARS, ["no numbers"]),
        ({"input_format": None}, GEARS, ["ND"]),
        ({"input_format": "NCHW"}, GEARS, ["ND"]),
        ({"dynamic_batch_size": "1,2"}, GEARS, ["--dynamic_batch_size", "excludes"]),
        ({"dynamic_dims": None, "dynamic_batch_size": "1,4096"}, GEARS, ["4096", "above 2048"]),
        ({"dynamic_dims": None, "dynamic_batch_size": "1,2"}, GEARS, ["first dimension only"]),
        ({"input_shape": "input_ids:1,4;cache:1,8,2,16"}, GEARS, ["0 open dimension"]),
        (
            {"input_shape": "input_ids:1,-1;cache:1,-1,2,16", "dynamic_dims": "1,8;2,8"},
            "input-shape",
            ["fixes", "cache"],
        ),
        ({"input_shape": "input_ids:1,1~64;cache:1,8,2,16", "dynamic_dims": None}, "ranges", ["Ascend310B1"]),
        ({"input_shape": "input_ids:1,1~64;cache:1,8,2,16"}, "ranges", ["beside gears"]),
        ({"input_shape": "input_ids:1,9~4;cache:1,8,2,16", "dynamic_dims": None}, "ranges", ["9~4"]),
        ({"input_shape": "input_ids:1,-1;cash:1,8,2,16"}, "input-shape", ["cash"]),
        ({"input_shape": "input_ids:-1;cache:1,8,2,16"}, "input-shape", ["1 sizes, it has 2"]),
        ({"input_shape": "input_ids:1,-1;cache:1,8,2,32"}, "input-shape", ["32", "16"]),
        ({"input_shape": "input_ids:1,x;cache:1,8,2,16"}, "input-shape", ["cannot be read"]),
        ({"input_shape": "cache:1,8,2,16", "dynamic_dims": None}, "open-shape", ["input_ids"]),
        ({"precision_mode": "force_fp16"}, "precision", ["exclude each other"]),
        ({"precision_mode_v2": "force_fp16"}, "precision", ["force_fp16", "mixed_float16"]),
        ({"precision_mode_v2": None, "precision_mode": "mixed_float16"}, "precision", ["allow_mix_precision"]),
        ({"framework": 1}, "flag", ["--framework=1"]),
        ({"mode": 1}, "flag", ["--mode=1"]),
        ({"input_format": "NHWC"}, "flag", ["NHWC"]),
        ({"external_weight": 3}, "flag", ["--external_weight=3"]),
        ({"keep_dtype": "no_such.txt"}, "flag-file", ["no_such.txt"]),
        ({"soc_version": "Ascend310B"}, "soc-version", ["Ascend310B1", "family"]),
        ({"soc_version": "Ascend310b1"}, "soc-version", ["nearest: Ascend310B1"]),
        ({"soc_version": None}, "soc-version", ["no --soc_version"]),
    ],
)
def test_planted_faults_of_the_command(tmp_path, changes, rule, words):
    if "fixes" in words:
        words = [word for word in words if word != "fixes"]
    judge(write_folder(tmp_path, **changes), rule, *words)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dynamic_dims": "1;2;4;8;16"}, "gears"),
        ({"op_select_implmode": "high_precision"}, "flag"),
        ({"--no_such_flag": "1"}, "flag"),
    ],
)
def test_doubtful_flags_are_warnings(tmp_path, changes, rule):
    folder = write_folder(tmp_path, **changes)
    judge(folder, rule, severity="warning")
    assert rules_found(folder) == set()


def test_ranges_and_batches_where_they_are_right(tmp_path):
    shape = "input_ids:1,1~64;cache:1,8,2,16"
    folder = write_folder(tmp_path, input_shape=shape, dynamic_dims=None, soc_version="Ascend310P3")
    assert rules_found(folder) == set()
    model = make_model()
    dimension = model.graph.input[0].type.tensor_type.shape.dim
    dimension[0].dim_param, dimension[1].dim_value = "batch", 4
    dimension = model.graph.output[0].type.tensor_type.shape.dim
    dimension[0].dim_param, dimension[1].dim_value = "batch", 4
    shape = "input_ids:-1,4;cache:1,8,2,16"
    folder = write_folder(tmp_path / "batch", model, input_shape=shape, dynamic_dims=None, dynamic_batch_size="1,2048")
    assert rules_found(folder) == set()


def test_gears_out_of_order_are_found_by_the_names_of_dimensions(tmp_path):
    positions = helper.make_tensor_value_info("position_ids", INT, [1, "sequence"])
    slots = helper.make_tensor_value_info("slots", INT, ["total"])
    shape = "input_ids:1,-1;position_ids:1,-1;slots:-1;cache:1,8,2,16"
    for gears, right in (("1,1,8;4,4,8", True), ("1,8,1;4,8,4", False)):
        folder = write_folder(
            tmp_path / str(right), make_model(inputs=[positions, slots]), input_shape=shape, dynamic_dims=gears
        )
        assert ("gear-order" in rules_found(folder)) is not right


@pytest.mark.parametrize("mode", ["mixed_bfloat16", "allow_fp32_to_bf16"])
def test_bfloat16_modes_per_chip(tmp_path, mode):
    name = "precision_mode_v2" if mode.startswith("mixed") else "precision_mode"
    folder = write_folder(tmp_path, **{"precision_mode_v2": None, name: mode})
    judge(folder, "bf16", mode, soc="Ascend310P3")
    assert "bf16" not in rules_found(folder, "Ascend310B1")


def test_a_graph_quantised_for_deployment_takes_no_gears_and_no_float_modes(tmp_path):
    model = extra("AscendQuant", scale=1.0)
    judge(write_folder(tmp_path, model), "quantised-gears", "AscendQuant")
    static = {"input_shape": "input_ids:1,4;cache:1,8,2,16", "dynamic_dims": None}
    assert rules_found(write_folder(tmp_path, model, **static)) == set()
    judge(write_folder(tmp_path, model, **static, precision_mode_v2="origin"), "precision", "origin")


def test_steps_and_heads(tmp_path):
    model = extra("MatMul", ["normed", "odd"], constants={"odd": weight(32, 20)})
    judge(write_folder(tmp_path, model), "steps", "odd", "K 32, N 20", severity="warning")
    for kind, size, severity in ((HALF, 24, "warning"), (TensorProto.INT8, 16, "error")):
        cache = helper.make_tensor_value_info("keys", kind, [1, 2, 8, size])
        folder = write_folder(tmp_path / severity, make_model(inputs=[cache]))
        judge(folder, "head-dim", f"head_dim {size}", severity=severity)


def test_int64_inputs_are_doubtful(tmp_path):
    model = make_model()
    model.graph.input[0].type.tensor_type.elem_type = LONG
    folder = write_folder(tmp_path, model)
    judge(folder, "input-type", "input_ids", "int32", severity="warning")


@pytest.mark.parametrize(("rows", "wrong"), [(65536, True), (65535, False)])
def test_an_int8_head_above_the_limit_of_quantised_products(tmp_path, rows, wrong):
    head = np.zeros((16, rows), np.int8)
    nodes = [
        helper.make_node("Cast", ["small"], ["large"], to=HALF),
        helper.make_node("Slice", ["normed", "zero", "sixteen", "last"], ["part"]),
        helper.make_node("MatMul", ["part", "large"], ["more"]),
    ]
    more = {"zero": np.array([0]), "sixteen": np.array([16]), "last": np.array([2])}
    model = make_model(nodes, outputs=[helper.make_empty_tensor_value_info("more")], constants={"small": head, **more})
    assert ("quantised-size" in rules_found(write_folder(tmp_path, model))) is wrong


# io.json and build.json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "past"}, ["past", "lacks", "cache"]),
        ({"dtype": "float32"}, ["float32", "FLOAT16"]),
        ({"shape": [1, 8, 2]}, ["shape"]),
        ({"shape": [1, 9, 2, 16]}, ["shape"]),
    ],
)
def test_io_json_must_be_about_the_graph(tmp_path, changes, words):
    folder = write_folder(tmp_path)
    write_interface(folder, **changes)
    judge(folder, "interface", *words)


@pytest.mark.parametrize(
    "data",
    [
        {"model.onnx": FLAGS},
        {"graphs": {"model.onnx": {"flags": FLAGS}}},
        {"soc_version": "Ascend310B1", "graphs": [{"model": "model.onnx", "flags": FLAGS}]},
        {"commands": [["atc", "--model=model.onnx", *(f"--{name}={value}" for name, value in FLAGS.items())]]},
        {"atc": {f"--{name}": value for name, value in FLAGS.items()}, "producer": {"version": 1}},
        {**FLAGS, "input_shape": {"input_ids": [1, -1], "cache": [1, 8, 2, 16]}, "dynamic_dims": [[1], [2], [4]]},
    ],
)
def test_flags_are_found_in_every_form_of_build_json(tmp_path, data):
    folder = write_folder(tmp_path)
    (folder / "build.json").write_text(json.dumps(data))
    (build,) = read_builds(folder, ["model.onnx"])
    assert {name: build.get(name) for name in FLAGS} == {name: str(value) for name, value in FLAGS.items()}
    assert check_folder(folder).findings == ()


def test_flags_are_read_from_the_script_when_there_is_no_build_json(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "build.json").unlink()
    flags = " \\\n  ".join(f'--{name}="{value}"' for name, value in FLAGS.items())
    (folder / "build_om.sh").write_text(f"#!/bin/sh\n# it's atc\natc --model=model.onnx \\\n  {flags}\n")
    assert check_folder(folder).findings == ()
    (folder / "build_om.sh").write_text(f'atc --model=model.onnx {flags} "--dynamic_dims=1"\n')
    judge(folder, "gears", "build_om.sh")


def test_commands_and_graphs_must_meet(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "build.json").write_text(json.dumps({"graphs": [{"model": "other.onnx", **FLAGS}]}))
    judge(folder, "build", "other.onnx", "missing")
    judge(folder, "build", "model.onnx", severity="warning")


def test_two_graphs_share_one_data_file(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "decode.onnx").write_bytes((folder / "model.onnx").read_bytes())
    graphs = {name: FLAGS for name in ("model.onnx", "decode.onnx")}
    (folder / "build.json").write_text(json.dumps(graphs))
    assert check_folder(folder).findings == ()
    assert len(check_folder(folder).checked) == 2


def test_parsing_of_shapes_and_arguments():
    assert parse_shapes("a:1,-1;b/c:0:2~5") == {"a": [1, -1], "b/c:0": ["2~5"]}
    assert fill_shapes({"a": [1, -1], "b": [-1, 3]}, [7, 8]) == {"a": [1, 7], "b": [8, 3]}
    assert list_gears(Build("m", {"input_shape": "a:-1,2;b:-1", "dynamic_batch_size": "1,8"})) == [[1, 1], [8, 8]]
    assert read_arguments(["atc", "--mode=0", "--model", "m.onnx", "--log"]) == {
        "mode": "0",
        "model": "m.onnx",
        "log": "",
    }
    assert read_script("echo hi\n/usr/bin/atc --mode=0\n") == [{"mode": "0"}]


# Chips and the table


def test_every_ascend_profile_names_a_chip_that_is_known():
    shipped = {
        listed.name for listed in list_profiles() if listed.origin == "package" and listed.name.startswith("ascend")
    }
    assert set(load_rules()["profiles"]) == shipped
    assert set(load_rules()["profiles"].values()) <= set(list_socs())


@pytest.mark.parametrize("prefix", sorted(load_rules()["prefixes"]))
def test_prefixes_are_refused(tmp_path, prefix):
    assert load_rules()["prefixes"][prefix] in explain_soc(prefix)
    refused(lambda: check_folder(write_folder(tmp_path), prefix), prefix)


def test_the_table_is_that_of_the_notes():
    table = list_operators()
    opsets = {name: operator.opsets for name, operator in table.items()}
    assert opsets["MatMul"] == opsets["Softmax"] == opsets["Pad"] == ((8, 18),)
    assert opsets["ScatterND"] == ((8, 8), (10, 18))
    assert opsets["LayerNormalization"] == ((17, 18),)
    assert opsets["NPURmsNorm"] == ((11, 18),) and table["NPURmsNorm"].npu
    assert opsets["QuantBatchMatMul"] == ((8, 16),) and not table["QuantBatchMatMul"].npu
    assert not set(table) & set(load_rules()["banned"])
    assert set(load_rules()["float_operators"]["names"]) <= set(table)
    assert find_chip("Ascend310P3").bf16 is False
    for section, data in load_rules().items():
        for part in data if isinstance(data, list) else [data]:
            assert "source" in part or section in ("banned", "chips", "prefixes", "profiles", "limits"), section


@pytest.mark.skipif(not Path("/work/shared/reference/ascend.md").is_file(), reason="the notes are not here")
def test_every_operator_in_the_notes_is_in_the_table():
    text = Path("/work/shared/reference/ascend.md").read_text(encoding="utf-8")
    part = text.partition("### 2.3")[2].partition("### 2.5")[0]
    names = {
        word.strip("()*.;:")
        for line in part.splitlines() if line.startswith("|")
        for cell in line.split("|") for word in re.split(r"[,/ (]+", cell)
    }  # fmt: skip
    known = {*list_operators(), *load_rules()["banned"], *load_rules()["unverified"]["names"]}
    real = {name for name in names if onnx.defs.has(name) or name.startswith(("NPU", "Ascend"))}
    assert len(real) > 55
    assert real - known == {"Sum"}  # of ReduceMean/Sum/Max/Min/Prod


# Graphs of the exporter


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}

    def export(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            checkpoint = open_checkpoint(make_checkpoint(folder / "model", case))
            made[case] = export_onnx(checkpoint, folder / "onnx", form=STANDARD).parent
        return made[case]

    return export


def restamp(folder, target, opset):
    """Copy an exported folder with another opset in its graph's stamp."""
    model = onnx.load_model(str(folder / "model.onnx"), load_external_data=False)
    model.opset_import[0].version = opset
    target.mkdir()
    (target / "model.onnx").write_bytes(model.SerializeToString())
    (target / "model.onnx.data").hardlink_to(folder / "model.onnx.data")
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("case", CASES)
def test_operators_of_standard_graphs_are_all_registered(exported, case):
    rules = rules_found(exported(case), "Ascend310B1")
    assert rules <= {"open-shape"}, check_folder(exported(case), "Ascend310B1").findings


@pytest.mark.parametrize("case", ["llama", "phi3-longrope"])
@pytest.mark.parametrize("opset", [11, 12, 17, 18, 19, 20])
def test_standard_graphs_at_other_stamps(exported, tmp_path, case, opset):
    kinds = restamp(exported(case), tmp_path / "other", opset)
    findings = check_folder(tmp_path / "other", "Ascend310B1").findings
    assert ("opset" in {finding.rule for finding in findings}) is (opset > 18)
    missing = {"GreaterOrEqual"} & kinds if opset == 11 else set()
    named = {finding.sentence.split()[0] for finding in findings if finding.rule == "operator"}
    assert named == missing


def test_fused_graphs_are_refused_operator_by_operator(tmp_path):
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "llama"))
    folder = export_onnx(checkpoint, tmp_path / "onnx").parent
    judge(folder, "operator", "GroupQueryAttention", "SkipSimplifiedLayerNormalization", soc="Ascend310B1")


@pytest.mark.parametrize("soc", ["Ascend310B1", "Ascend310P3"])
@pytest.mark.parametrize("form", [{}, {"static": True}, {"dtype": "fp32"}, {"ids": "int32"}])
def test_folders_of_the_om_exporter_have_no_errors(tmp_path, soc, form):
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "qwen3"))
    export_om(checkpoint, tmp_path / "om", OmRequest(soc, cache=64, gears=(1, 8, 32), **form))
    report = check_folder(tmp_path / "om")
    assert report.errors == 0, report.findings
    assert report.soc_version == soc
    # A width of 56 is padded to steps of 16, and ids are int64 unless asked otherwise.
    assert {finding.rule for finding in report.findings} == {"steps"} | ({"input-type"} if "ids" not in form else set())


@pytest.mark.parametrize("name", ["build.json", "build_om.sh", "io.json", "run_om.py"])
def test_a_file_that_an_om_folder_has_lost(tmp_path, name):
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "qwen3"))
    export_om(checkpoint, tmp_path / "out/ascend", OmRequest("Ascend310B1", cache=64, gears=(1, 8, 32)))
    (tmp_path / "out/ascend" / name).unlink()
    (tmp_path / "out/lightpress.json").write_text("{}")  # as `compress` leaves it: the ascend folder is meant
    found = [finding for finding in check_folder(tmp_path / "out", "Ascend310B1").findings if finding.rule == "files"]
    assert [finding.file for finding in found] == [name]
    assert "is missing" in found[0].sentence


@pytest.mark.parametrize("case", ["llama-biases", "gemma2", "phi3-longrope", "olmo2", "granite", "pangu_sandwich"])
def test_om_folders_of_other_families_have_no_errors(tmp_path, case):
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", case))
    export_om(checkpoint, tmp_path / "om", OmRequest("Ascend310B4", cache=64, gears=(1, 8, 32)))
    report = check_folder(tmp_path / "om")
    assert report.errors == 0, report.findings
    assert {finding.rule for finding in report.findings} <= {"steps", "input-type", "head-dim"}


def test_an_om_folder_without_its_exceptions_is_doubtful(tmp_path):
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "qwen3"))
    export_om(checkpoint, tmp_path / "om", OmRequest("Ascend310B1", cache=64, gears=(1, 8, 32)))
    build = json.loads((tmp_path / "om" / "build.json").read_text())
    for name in ("keep_dtype", "modify_mixlist"):
        build["commands"][0]["flags"].pop(name)
    (tmp_path / "om" / "build.json").write_text(json.dumps(build))
    judge(tmp_path / "om", "norm-square", "Square", severity="warning")


# Hugging Face folders


SIZES = {
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
}
CONFIG = {"model_type": "llama", "torch_dtype": "float16", "vocab_size": 96, **SIZES}
LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip


def float_tensors(dtype=torch.float16):
    tensors = {"model.embed_tokens.weight": torch.ones(96, 64), "lm_head.weight": torch.ones(96, 64)}
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.{name}.weight": torch.ones(shape) for name, shape in LINEARS.items()}
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(64)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def pack_scales(values):
    """The bit pattern of float32 in int64, as fp16 models hold it."""
    return values.view(torch.int32).to(torch.int64)


def quantised_tensors(kind, bf16=False):
    """AscendV1 tensors and their description, by the table of ascend.md 4.3."""
    tensors, types = {}, {}
    for name, tensor in float_tensors(torch.bfloat16 if bf16 else torch.float16).items():
        stem = name.removesuffix("weight")
        if "_proj" not in name:
            tensors[name], types[name] = tensor, "FLOAT"
            continue
        out = len(tensor)
        parts = {"weight": tensor.to(torch.int8)}
        if kind == "W8A8":
            scale = torch.full([out], 0.5)
            parts |= {
                "input_scale": torch.ones(1),
                "input_offset": torch.zeros(1),
                "quant_bias": torch.zeros(out).int(),
            }
            parts["deq_scale"] = scale if bf16 else pack_scales(scale)
        else:
            parts |= {"weight_scale": torch.ones(out, 1), "weight_offset": torch.zeros(out, 1)}
        tensors |= {stem + part: value for part, value in parts.items()}
        types |= {stem + part: kind for part in parts}
    return tensors, {"model_quant_type": kind, "version": "1.0.0", **types}


def write_served(folder, tensors=None, description=None, drop=(), **config):
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in (tensors or float_tensors()).items() if name not in drop}
    save_file(kept, folder / "model.safetensors")
    data = {name: value for name, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))
    if description is not None:
        (folder / "quant_model_description.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B2", "Ascend910_9391"])
@pytest.mark.parametrize("kind", ["FLOAT", "W8A8", "W8A8_DYNAMIC"])
def test_clean_checkpoints_have_no_findings(tmp_path, soc, kind):
    tensors, description = (None, None) if kind == "FLOAT" else quantised_tensors(kind)
    assert check_folder(write_served(tmp_path, tensors, description), soc, devices=2).findings == ()


def test_scales_of_bfloat16_models_are_floats_except_on_310p(tmp_path):
    folder = write_served(tmp_path, *quantised_tensors("W8A8", bf16=True), torch_dtype="bfloat16")
    assert check_folder(folder, "Ascend910B2").findings == ()
    judge(folder, "deq-scale", "F32", "I64", soc="Ascend310P3")
    tensors, description = quantised_tensors("W8A8")
    judge(write_served(tmp_path / "half", tensors, description, torch_dtype="bfloat16"), "deq-scale", soc="Ascend910B2")
    name = "model.layers.0.mlp.up_proj.deq_scale"
    for wrong in (torch.full([128], -1), torch.full([128], 2**40), pack_scales(torch.full([128], torch.inf))):
        folder = write_served(tmp_path / "bits", {**tensors, name: wrong}, description)
        judge(folder, "deq-scale", name, "bit pattern", soc="Ascend910B2")


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"torch_dtype": "bfloat16"}, "bf16", ["float16"]),
        ({"per_layer_config": [{}]}, "uniform", ["--target uniform"]),
        ({"head_dim": 20, "hidden_size": 80}, "head-dim", ["20", "multiple of 16"]),
        ({"head_dim": 528, "hidden_size": 2112}, "head-dim", ["above 512"]),
        ({"num_attention_heads": 3, "hidden_size": 48}, "head-dim", ["no multiple of num_key_value_heads"]),
        ({"num_attention_heads": 130, "hidden_size": 2080}, "head-dim", ["64 to 1"]),
        ({"num_key_value_heads": 1, "head_dim": 24, "hidden_size": 96}, "head-dim", ["num_key_value_heads * head_dim"]),
        ({"hidden_size": 128}, "mindie-head-dim", ["32", "16"]),
        ({"num_attention_heads": 0}, "config", ["num_attention_heads"]),
        ({"quantization_config": {"quant_method": "awq"}}, "compressed-tensors", ["awq"]),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", ["Ascend310P3"]),
    ],
)
def test_planted_faults_of_config_json(tmp_path, changes, rule, words):
    judge(write_served(tmp_path, **changes), rule, *words, soc="Ascend310P3")


def test_types_that_mindie_reads_head_dim_of(tmp_path):
    assert rules_found(write_served(tmp_path, hidden_size=128, model_type="qwen3"), "Ascend310P3") == set()
    judge(write_served(tmp_path, hidden_size=128), "mindie-head-dim", severity="warning", soc="Ascend910B2")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"torch_dtype": None, "dtype": "float16"}, "torch-dtype"),
        ({"torch_dtype": "float32"}, "torch-dtype"),
        ({"intermediate_size": 120}, "steps"),
        ({"head_dim": 256, "hidden_size": 1024}, "pages"),
    ],
)
def test_doubts_about_config_json(tmp_path, changes, rule):
    folder = write_served(tmp_path, **changes)
    judge(folder, rule, severity="warning", soc="Ascend310P3")
    assert rules_found(folder, "Ascend310P3") <= {"sizes"}  # the tensors beside it were not changed


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_hidden_layers": 3}, ("num_hidden_layers is 3", "2 layers")), ({"intermediate_size": 144}, ("144", "128"))],
)
def test_sizes_that_the_tensors_do_not_have(tmp_path, changes, words):
    judge(write_served(tmp_path, **changes), "sizes", *words, soc="Ascend910B2")


def test_tensor_parallelism_must_divide(tmp_path):
    judge(write_served(tmp_path), "tensor-parallel", "num_key_value_heads 2", soc="Ascend910B2", devices=4)
    assert rules_found(tmp_path, "Ascend910B2", devices=2) == set()


def test_layers_of_different_shapes(tmp_path):
    tensors = float_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(112, 64, dtype=torch.float16)
    judge(
        write_served(tmp_path, tensors), "uniform", "[128, 64]".replace("[", "(").replace("]", ")"), soc="Ascend910B2"
    )


def test_bfloat16_tensors_on_310p(tmp_path):
    judge(write_served(tmp_path, float_tensors(torch.bfloat16)), "bf16", "stored as bfloat16", soc="Ascend310P3")


def test_no_server_runs_on_310b(tmp_path):
    judge(write_served(tmp_path), "server", "ascend-om", soc="Ascend310B1")


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("types", "rule", "words"),
    [
        ({"model.embed_tokens.weight": None}, "description", ["embed_tokens", "no entry"]),
        ({"model.extra.weight": "FLOAT"}, "description", ["model.extra.weight", "no tensor"]),
        ({f"{Q}.weight": "W4A16X"}, "quant-type", ["W4A16X"]),
        ({f"{Q}.weight": "W4A16"}, "quant-type", ["experts only"]),
        ({f"{Q}.weight": "W8A16"}, "quant-type", ["Ascend310P3", "W8A16"]),
        ({f"{Q}.weight": "FLOAT"}, "quant-type", ["stored as I8"]),
        ({f"{Q}.deq_scale": "FLOAT"}, "quant-type", ["deq_scale"]),
        ({f"{Q}.weight": "W8A8_DYNAMIC"}, "fused-types", ["q_proj is W8A8_DYNAMIC", "k_proj is W8A8"]),
        ({"model.layers.1.mlp.up_proj.weight": "W8A8_DYNAMIC"}, "fused-types", ["gate_proj is W8A8"]),
    ],
)
def test_planted_faults_of_the_description(tmp_path, types, rule, words):
    tensors, description = quantised_tensors("W8A8")
    changed = {name: kind for name, kind in {**description, **types}.items() if kind is not None}
    judge(write_served(tmp_path, tensors, changed), rule, *words, soc="Ascend310P3")


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_DYNAMIC"])
def test_each_part_of_a_quantised_linear_is_needed_in_its_type_and_shape(tmp_path, kind):
    tensors, description = quantised_tensors(kind)
    for number, name in enumerate(
        name for name in tensors if name.startswith(f"{Q}.") and not name.endswith(".weight")
    ):
        left = {key: value for key, value in description.items() if key != name}
        judge(
            write_served(tmp_path / f"{number}a", tensors, left, drop=[name]), "quant-suffix", name, soc="Ascend910B2"
        )
        wrong = {**tensors, name: tensors[name].to(torch.int16)}
        rule = "deq-scale" if name.endswith("deq_scale") else "quant-dtype"
        judge(write_served(tmp_path / f"{number}b", wrong, description), rule, name, "I16", soc="Ascend910B2")
        wrong = {**tensors, name: torch.cat([tensors[name]] * 2)}
        judge(write_served(tmp_path / f"{number}c", wrong, description), "quant-shape", name, soc="Ascend910B2")
    wrong = {**tensors, f"{Q}.weight": tensors[f"{Q}.weight"].half()}
    judge(write_served(tmp_path / "d", wrong, description), "quant-dtype", f"{Q}.weight", soc="Ascend910B2")
    wrong = {**tensors, f"{Q}.weight": tensors[f"{Q}.weight"].flatten()}
    judge(write_served(tmp_path / "e", wrong, description), "quant-shape", "[out, in]", soc="Ascend910B2")


def test_other_faults_of_quantised_folders(tmp_path):
    tensors, description = quantised_tensors("W8A8_DYNAMIC")
    judge(write_served(tmp_path / "a", tensors), "quantisation", "neither", soc="Ascend910B2")
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    judge(write_served(tmp_path / "b", tensors, description, **config), "quantisation", "beside", soc="Ascend910B2")
    small = {**SIZES, "head_dim": 48, "hidden_size": 192}
    folder = write_served(tmp_path / "c", tensors, {**description, "kv_cache_type": "C8"}, **small)
    judge(folder, "head-dim", "int8", "48", soc="Ascend910B2")
    large = {
        "lm_head.weight": torch.zeros(65536, 16, dtype=torch.int8),
        "lm_head.weight_scale": torch.ones(65536, 1),
        "lm_head.weight_offset": torch.zeros(65536, 1),
    }
    types = dict.fromkeys(large, "W8A8_DYNAMIC")
    folder = write_served(tmp_path / "d", {**tensors, **large}, {**description, **types})
    judge(folder, "quantised-size", "lm_head.weight", "65536", soc="Ascend910B2")
    judge(folder, "steps", "lm_head.weight", severity="warning", soc="Ascend910B2")
    judge(write_served(tmp_path / "e", tensors, {k: v for k, v in description.items() if k != "model_quant_type"}),
          "description", "model_quant_type", severity="warning", soc="Ascend910B2")  # fmt: skip


@pytest.mark.parametrize(
    ("edit_map", "words"),
    [
        (lambda names: names, None),
        (lambda names: dict(list(names.items())[1:]), ["leaves out"]),
        (lambda names: {**names, "model.ghost": "model.safetensors"}, ["model.ghost"]),
        (lambda names: dict.fromkeys(names, "other.safetensors"), ["where they are not"]),
        (lambda names: None, ["no weight_map"]),
    ],
)
def test_the_index_must_be_complete(tmp_path, edit_map, words):
    folder = write_served(tmp_path)
    names = dict.fromkeys(float_tensors(), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": edit_map(names)}))
    if words is None:
        assert check_folder(folder, "Ascend910B2").findings == ()
    else:
        judge(folder, "index", *words, soc="Ascend910B2")


def test_shards_need_an_index(tmp_path):
    save_file({"model.more": torch.ones(1)}, write_served(tmp_path) / "extra.safetensors")
    judge(tmp_path, "index", "2 safetensors files", soc="Ascend910B2")


def compressed_config(**changes):
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **changes.get("weights", {})}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    inputs |= changes.get("inputs", {})
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": groups,
    }


def compressed_tensors():
    tensors, _ = quantised_tensors("W8A8_DYNAMIC")
    return {name: value for name, value in tensors.items() if not name.endswith("offset")}


def test_compressed_tensors(tmp_path):
    tensors = compressed_tensors()
    folder = write_served(tmp_path / "right", tensors, quantization_config=compressed_config())
    assert check_folder(folder, "Ascend910B2").findings == ()
    for number, (changes, word) in enumerate(
        [
            ({"weights": {"num_bits": 4}}, "num_bits is 4"),
            ({"weights": {"symmetric": False}}, "symmetric is False"),
            ({"weights": {"strategy": "group"}}, "strategy is group"),
            ({"inputs": {"type": "float"}}, "type is float"),
            ({"inputs": {"dynamic": False}}, "must be tensor"),
            ({"inputs": {"dynamic": False, "strategy": "tensor"}}, "input_scale"),
        ]
    ):
        folder = write_served(tmp_path / str(number), tensors, quantization_config=compressed_config(**changes))
        judge(folder, "compressed-tensors", word, soc="Ascend910B2")
    config = compressed_config()
    judge(write_served(tmp_path / "f", quantization_config=config), "compressed-tensors", "int8", soc="Ascend910B2")
    folder = write_served(tmp_path / "s", tensors, drop=[f"{Q}.weight_scale"], quantization_config=config)
    judge(folder, "compressed-tensors", f"{Q}.weight_scale", soc="Ascend910B2")
    folder = write_served(tmp_path / "g", tensors, quantization_config={"quant_method": "compressed-tensors"})
    judge(folder, "compressed-tensors", "config_groups", soc="Ascend910B2")


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B2"])
@pytest.mark.parametrize("quantisation", ["none", "w8a8-dynamic", "compressed-tensors-w8a8"])
def test_folders_of_the_hf_exporter_have_no_errors(tmp_path, soc, quantisation):
    if (soc, quantisation) == ("Ascend310P3", "compressed-tensors-w8a8"):
        refused(lambda: export(tmp_path, soc, quantisation), "compressed-tensors")
        return
    export(tmp_path, soc, quantisation)
    report = check_folder(tmp_path / "hf", soc)
    assert report.errors == 0, report.findings


def export(folder, soc, quantisation):
    checkpoint = open_checkpoint(make_checkpoint(folder / "model", "qwen3", num_key_value_heads=2))
    return export_hf(checkpoint, folder / "hf", HfRequest(soc, quantisation, gptq=False, alpha=None, mixed=False))


# Mistakes of the user, and the command


def test_folders_that_cannot_be_checked(tmp_path):
    refused(lambda: check_folder(tmp_path / "none"), "none", "does not exist")
    refused(lambda: check_folder(tmp_path), "no .onnx graph and no config.json")
    (tmp_path / "file").write_text("x")
    refused(lambda: check_folder(tmp_path / "file"), "is a file")
    (tmp_path / "model.onnx").write_bytes(b"\xff\xfe not a graph")
    refused(lambda: check_folder(tmp_path), "model.onnx", "not an ONNX graph")
    damaged = make_model().SerializeToString().replace(b"normed", b"n\xffrmed")
    (tmp_path / "model.onnx").write_bytes(damaged)
    refused(lambda: check_folder(tmp_path), "model.onnx", "damaged")
    (tmp_path / "model.onnx").write_bytes(b"")
    refused(lambda: check_folder(tmp_path), "model.onnx", "not an ONNX graph")
    refused(lambda: check_folder(write_folder(tmp_path), "Ascend310"), "Ascend310B1")
    (tmp_path / "build.json").write_text("{")
    refused(lambda: check_folder(tmp_path), "build.json", "JSON")


def test_checkpoints_that_cannot_be_checked(tmp_path):
    folder = write_served(tmp_path)
    (folder / "quant_model_description.json").write_text("[]")
    refused(lambda: check_folder(folder), "quant_model_description.json")
    (folder / "config.json").write_text("[]")
    refused(lambda: check_folder(folder), "config.json")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"short")
    refused(lambda: check_folder(folder), "model.safetensors", "not a whole")
    (folder / "model.safetensors").unlink()
    refused(lambda: check_folder(folder), "no .safetensors")


def run(*arguments):
    app = typer.Typer()
    app.command()(check_ascend)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_findings_and_fails_on_errors(tmp_path):
    ran = run(write_folder(tmp_path / "clean"))
    assert ran.exit_code == 0, ran.output
    assert "0 error(s), 0 warning(s)." in ran.stdout
    folder = write_folder(tmp_path / "bad", extra("Ceil"))
    ran = run(folder)
    assert type(ran.exception).__name__ == "RunFailure"
    assert "operator: model.onnx planted" in ran.stdout
    data = json.loads(run(folder, "--json").stdout)
    assert (data["errors"], data["soc_version"], data["findings"][0]["rule"]) == (1, "Ascend310B1", "operator")


def test_the_command_takes_a_profile_a_chip_and_strictness(tmp_path):
    folder = write_folder(tmp_path, dynamic_dims="1;2;3;4;5")
    assert json.loads(run(folder, "--profile", "ascend-310p3", "--json").stdout)["soc_version"] == "Ascend310P3"
    assert type(run(folder, "--strict").exception).__name__ == "RunFailure"
    for arguments, word in (
        (["--profile", "cpu-avx2"], "cpu-avx2"),
        (["--profile", "ascend-310p3", "--soc-version", "Ascend310P3"], "one of them"),
        (["--soc-version", "Ascend910B"], "old 910"),
    ):
        error = run(folder, *arguments).exception
        assert type(error).__name__ == "UserError" and word in str(error)


def test_atc_is_offered_where_it_is_installed(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "om")
    (folder / "build_om.sh").write_text("atc\n")
    assert json.loads(run(folder, "--json").stdout)["command"] is None
    tool = tmp_path / "atc"
    tool.write_text("#!/bin/sh\nexit 1\n")  # a run would leave a mark: it is only offered
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert json.loads(run(folder, "--json").stdout)["command"] == f"sh {folder / 'build_om.sh'}"


def test_atc_runs_only_when_asked_and_after_a_clean_check(tmp_path, monkeypatch, capfd):
    folder = write_folder(tmp_path / "om")
    script = folder / "build_om.sh"
    script.write_text('cd "$(dirname "$0")"\natc --model=model.onnx >made\n')
    assert "needs atc on PATH" in str(run(folder, "--run-atc").exception)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "atc"
    tool.write_text('#!/bin/sh\necho "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    assert run(folder).exit_code == 0
    assert not (folder / "made").exists()
    assert run(folder, "--run-atc").exit_code == 0
    assert (folder / "made").read_text() == "--model=model.onnx\n"
    script.write_text("exit 3\n")
    assert "exit code 3" in str(run(folder, "--run-atc").exception)
    (folder / "made").unlink()
    script.write_text(f"echo >{folder / 'made'}\n")
    write_folder(folder, framework=1)
    assert "error" in str(run(folder, "--run-atc").exception)
    assert not (folder / "made").exists()


def test_a_folder_judged_for_another_chip_says_so(tmp_path):
    judge(write_folder(tmp_path), "soc-version", "compiles for Ascend310B1", severity="warning", soc="Ascend310P3")
