"""What one decode step must read: weights as an ONNX graph stores them, its cache, and how fast this machine reads."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # its stubs are a package of their own
from onnx import GraphProto, TensorProto, helper

from backends.ort import GRAPH_NAME
from compress.errors import UserError

PAST = "past_key_values."
# (operator, input) that takes single rows of a table by index: the table as a whole is never read.
LOOKED_UP = {
    ("Gather", 0),
    *(("GatherBlockQuantized", place) for place in (0, 2, 3)),  # codes, scales, zeros
    *(("GroupQueryAttention", place) for place in (7, 8)),  # cosines and sines
    *(("RotaryEmbedding", place) for place in (2, 3)),
}
SAME_VALUES = {"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze"}
NO_WEIGHTS = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}  # shapes, positions, switches
FORMATS: Mapping[int, str] = {
    TensorProto.FLOAT: "fp32", TensorProto.DOUBLE: "fp64", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.INT4: "int4", TensorProto.UINT4: "int4",
}  # fmt: skip
STREAM = (4096, 8192)  # inputs and outputs of the float32 product that measures bandwidth: 128 MiB, beyond most caches
LEAST_CALLS = 5
QUIET, OPSET, IR_VERSION = 4, 18, 8  # not from `backends.onnx_graph`, whose torch would count as memory of the model
Uses = Mapping[str, list[tuple[onnx.NodeProto, int]]]


@dataclass(frozen=True)
class CacheLayer:
    """Keys and values of one layer: bytes of one token of one row, and the tokens that a step looks back at most."""

    token_bytes: int
    window: int | None = None


@dataclass(frozen=True)
class Footprint:
    """A graph in bytes: what a decode step reads of its weights, what its files take, what each layer caches.

    `format`: the number format of most of the weights that are read.
    """

    format: str
    weight_bytes: int
    file_bytes: int
    cache: tuple[CacheLayer, ...]

    def count_read(self, prompt: int, new: int, batch: int) -> float:
        """Return the mean bytes that one of `new` decode steps after `prompt` tokens reads: weights once, all caches.

        A step attends to its own token too; what it writes, and activations, are not counted.
        """
        lengths = range(prompt + 1, prompt + new + 1)
        seen = sum(
            layer.token_bytes * min(length, layer.window or length) for layer in self.cache for length in lengths
        )
        return self.weight_bytes + batch * seen / new


def read_footprint(folder: Path) -> Footprint:
    """Count a folder's graph without reading its weights; UserError when there is no graph or it cannot be parsed."""
    path = folder / GRAPH_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {GRAPH_NAME}; export the checkpoint into it first.")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX graph or is cut short; export it again.") from error
    sizes = weigh_formats(graph)
    kind = max(sizes, key=lambda name: sizes[name], default="no weights")
    return Footprint(kind, sum(sizes.values()), count_files(path, graph), list_cache(graph))


def weigh_formats(graph: GraphProto) -> Counter[str]:
    """Return the bytes by number format of all initializers that a decode step reads as a whole."""
    uses = list_uses(graph)
    sizes: Counter[str] = Counter()
    for tensor in graph.initializer:
        if tensor.data_type not in NO_WEIGHTS and not is_looked_up(tensor.name, uses):
            sizes[name_format(tensor, uses)] += count_bytes(tensor)
    return sizes


def list_uses(graph: GraphProto) -> Uses:
    """Return by value the nodes that take it, each with the place among the node's inputs."""
    uses: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for place, name in enumerate(node.input):
            uses[name].append((node, place))
    return uses


def is_looked_up(name: str, uses: Uses) -> bool:
    """Tell whether no node reads more of a tensor than rows by index; one that nobody takes is never read at all."""
    return all(
        (node.op_type, place) in LOOKED_UP
        or (node.op_type in SAME_VALUES and place == 0 and is_looked_up(node.output[0], uses))
        for node, place in uses.get(name, ())
    )


def name_format(tensor: TensorProto, uses: Uses) -> str:
    """Return the number format of a tensor: packed codes have the bits of the operator that takes them."""
    if tensor.data_type == TensorProto.UINT8:
        for node, _ in uses.get(tensor.name, ()):
            bits = [attribute.i for attribute in node.attribute if attribute.name == "bits"]
            if bits:
                return f"int{bits[0]}"
    if any(node.op_type == "DynamicQuantizeMatMul" for node, _ in uses.get(tensor.name, ())):
        return "w8a8"
    return FORMATS.get(tensor.data_type, f"type {tensor.data_type}")


def count_bytes(tensor: TensorProto) -> int:
    """Return the bytes that an initializer's values take."""
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    if tensor.raw_data:
        return len(tensor.raw_data)
    count: int = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return -(-count // 2)
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def count_files(path: Path, graph: GraphProto) -> int:
    """Return the size of the graph and of the data files it names; UserError when one is missing."""
    locations = {
        entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    files = [path, *(path.parent / location for location in sorted(locations))]
    for file in files:
        if not file.is_file():
            raise UserError(f"The weights {file} are missing beside {path.name}; copy them there or export again.")
    return sum(file.stat().st_size for file in files)


def list_cache(graph: GraphProto) -> tuple[CacheLayer, ...]:
    """Return what each layer caches; windows are known of fused attention only."""
    windows = {
        name: attribute.i
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == "local_window_size" and attribute.i > 0
        for name in node.input
        if name.startswith(PAST)
    }
    layers: dict[str, CacheLayer] = {}
    for value in graph.input:
        if value.name.startswith(PAST):
            kind = value.type.tensor_type
            heads, size = (kind.shape.dim[axis].dim_value for axis in (1, 3))
            own = heads * size * helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
            layer = value.name.removeprefix(PAST).partition(".")[0]
            before = layers[layer].token_bytes if layer in layers else 0
            layers[layer] = CacheLayer(before + own, windows.get(value.name))
    return tuple(layers.values())


def open_stream(threads: int | None, sides: tuple[int, int] = STREAM) -> Callable[[float], float]:
    """Return a function from least seconds to the bytes per second at which ONNX Runtime reads a float32 weight.

    The product of one row with it, as in a decode step; the best quarter of its calls, as in `backends.machine`:
    whatever else runs on the machine only ever makes a call slower.
    """
    floats, (rows, columns) = TensorProto.FLOAT, sides
    weight = np.full(sides, 0.5, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "stream",
        [helper.make_tensor_value_info("x", floats, [1, rows])],
        [helper.make_tensor_value_info("y", floats, [1, columns])],
        [helper.make_tensor("w", floats, sides, weight.tobytes(), raw=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones((1, rows), np.float32)}
    return lambda least: weight.nbytes / time_calls(lambda: session.run(None, feeds), least)


def time_calls(call: Callable[[], Any], least: float) -> float:
    """Return the lower quartile of the seconds of calls that last `least` together, after one that wakes threads."""
    call()
    times: list[float] = []
    while len(times) < LEAST_CALLS or sum(times) < least:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.quantile(times, 0.25))
