"""Shapes and precision inside a graph: zero-length and open dimensions, steps of the cube, and norms that overflow."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy
from onnx import NodeProto, TensorProto, numpy_helper

from backends.ascend_check_data import is_external
from backends.ascend_graph import OpenGraph, describe_value, name_element, name_node
from backends.ascend_rules import ERROR, WARNING, Finding, load_rules, show_names

MATRIX_RANK, CACHE_RANK, PAIR = 2, 4, 2
PRODUCTS = {"MatMul": (0, 1), "Gemm": (0, 1)}
INTEGERS = ("INT8", "UINT8", "INT4", "UINT4")
HALVES = ("FLOAT16",)
SQUARE = 2.0
# Nodes that pass a product's weight on without changing what is measured here.
PASSED_ON = (
    "Cast", "CastLike", "Mul", "Sub", "Transpose", "Identity", "DequantizeLinear", "AscendAntiQuant", "NPUAntiQuant",
)  # fmt: skip


def check_inputs(graph: OpenGraph) -> Iterator[Finding]:
    """Yield inputs whose element types the general page of ATC does not list (ascend.md 2.2)."""
    rules = load_rules()["inputs"]
    long = [entry.name for entry in graph.inputs if name_element(describe_value(entry).element) in rules["unlisted"]]
    if long:
        text = (
            f"{show_names(long)} are int64, which works on a 310B1 and is not in ATC's list of input types; if the "
            "conversion stops there, export int32 ids."
        )
        yield Finding("input-type", WARNING, graph.name, long[0], text)


def check_open_inputs(graph: OpenGraph) -> Iterator[Finding]:
    """Yield a finding when inputs have open dimensions and no atc command is there to fix them."""
    dims = {entry.name: describe_value(entry).dims or () for entry in graph.inputs}
    open_ones = [name for name, sizes in dims.items() if any(isinstance(size, str) for size in sizes)]
    if open_ones:
        text = (
            f"{show_names(open_ones)} have open dimensions, and no build.json gives sizes or gears; export with fixed "
            "shapes, or write --input_shape and --dynamic_dims."
        )
        yield Finding("open-shape", ERROR, graph.name, open_ones[0], text)


def check_zero_dims(graph: OpenGraph) -> Iterator[Finding]:
    """Yield tensors that are no constants and have a dimension of length 0 (ascend.md 2.2)."""
    empty = [
        name for name, value in graph.values.items() if value.dims and 0 in value.dims and name not in graph.constants
    ]
    if empty:
        text = f"{show_names(empty)} have a dimension of length 0, which ATC refuses; use a cache of fixed size."
        yield Finding("zero-dim", ERROR, graph.name, empty[0], text)


# Steps of the cube


def check_steps(graph: OpenGraph) -> Iterator[Finding]:
    """Yield weights whose sides are no multiples of the cube's steps, and caches with odd heads (ascend.md 5)."""
    tiles, found = load_rules()["tiles"], {}
    for node in graph.nodes:
        for name in node.input[1:2] if node.op_type in PRODUCTS else ():
            weight = graph.constants.get(name)
            if weight is None or len(weight.dims) != MATRIX_RANK:
                continue
            steps = tiles["int8"] if name_element(weight.data_type) in INTEGERS else tiles["float"]
            sides = tuple(weight.dims) if not is_transposed(node) else tuple(reversed(weight.dims))
            if any(side % step for side, step in zip(sides, steps, strict=True)):
                found[name] = sides
    if found:
        name, sides = next(iter(found.items()))
        text = (
            f"{show_names(found)} have sides that are no multiple of 16 (K {sides[0]}, N {sides[1]}): padding is "
            "computed and moved; choose widths that are."
        )
        yield Finding("steps", WARNING, graph.name, name, text)
    yield from check_heads(graph)


def is_transposed(node: NodeProto) -> bool:
    """Return whether a product reads its second input transposed, `[N, K]`."""
    return any(entry.name == "transB" and entry.i for entry in node.attribute)


def check_heads(graph: OpenGraph) -> Iterator[Finding]:
    """Yield caches, float or int8 inputs `[.., .., .., head_dim]`, whose heads are off the cube's steps (4.5, 5)."""
    rules = load_rules()["fused_attention"]
    for entry in graph.inputs:
        value = describe_value(entry)
        if value.dims is None or len(value.dims) != CACHE_RANK or not isinstance(value.dims[-1], int):
            continue
        if "mask" in entry.name:  # its last axis counts tokens
            continue
        small = name_element(value.element) in INTEGERS
        step = rules["int8_head_multiple"] if small else rules["head_multiple"]
        if value.dims[-1] % step:
            text = f"head_dim {value.dims[-1]} of {entry.name} is no multiple of {step}; choose a head_dim that is."
            yield Finding("head-dim", ERROR if small else WARNING, graph.name, entry.name, text)
            return


def check_quantised_products(graph: OpenGraph) -> Iterator[Finding]:
    """Yield quantised products with a side above 65535, such as an int8 head of a large vocabulary (4.5)."""
    rules = load_rules()["quantised_products"]
    for name, tensor in graph.constants.items():
        if name_element(tensor.data_type) not in INTEGERS or len(tensor.dims) < MATRIX_RANK:
            continue
        side = max(tensor.dims[-MATRIX_RANK:])
        if side > rules["largest"] and feeds_product(graph, name, (*PRODUCTS, *rules["names"])):
            text = (
                f"{name} is quantised with a side of {side}, and quantised products end at {rules['largest']}; keep it "
                "in float16."
            )
            yield Finding("quantised-size", ERROR, graph.name, name, text)


def feeds_product(graph: OpenGraph, name: str, kinds: Collection[str], depth: int = 6) -> bool:
    """Return whether a constant reaches a product, directly or dequantised."""
    readers = graph.readers.get(name, [])
    if any(node.op_type in kinds or node.op_type == "MatMulInteger" for node in readers):
        return True
    passed = (node.output[0] for node in readers if node.op_type in PASSED_ON)
    return depth > 0 and any(feeds_product(graph, value, kinds, depth - 1) for value in passed)


# Norms


def check_squares(graph: OpenGraph, half: str, kept: Collection[str]) -> Iterator[Finding]:
    """Yield norms whose square is taken in float16, where activations above 256 overflow (ascend.md 2.1, 2.7).

    A square is safe when it is float32 and stays so: the precision mode keeps float32, or its node or type is in
    `kept`. ATC merges Pow(x, 2) and Mul(x, x) into Square, so that name counts too.
    """
    risky = [node for node in graph.nodes if is_square(graph, node) and feeds_mean(graph, node)]
    halved = [node for node in risky if name_element(graph.element(node.input[0])) in HALVES]
    singles = [node for node in risky if half and node not in halved]
    lowered = [node for node in singles if not {node.op_type, "Square", name_node(node)} & set(kept)]
    if halved:
        text = f"{len(halved)} norm(s) square float16 values, which overflow above 255; cast to float32 before."
        yield Finding("norm-square", WARNING, graph.name, name_node(halved[0]), text)
    if lowered:
        text = (
            f"{len(lowered)} norm(s) square float32 values that the precision mode may turn into float16, where 256 "
            "overflows; put Square on the black list of --modify_mixlist with mixed_float16, or use --keep_dtype."
        )
        yield Finding("norm-square", WARNING, graph.name, name_node(lowered[0]), text)


def is_square(graph: OpenGraph, node: NodeProto) -> bool:
    """Return whether a node squares its first input."""
    if len(node.input) != PAIR:
        return False
    if node.op_type == "Mul":
        return bool(node.input[0] == node.input[1])
    return node.op_type == "Pow" and read_scalar(graph.constants.get(node.input[1])) == SQUARE


def read_scalar(tensor: TensorProto | None) -> float | None:
    """Return the one value of a constant in the graph's own file, None for any other."""
    if tensor is None or is_external(tensor) or int(numpy.prod(tensor.dims, dtype=numpy.int64)) != 1:
        return None
    return float(numpy_helper.to_array(tensor).reshape(-1)[0])


def feeds_mean(graph: OpenGraph, node: NodeProto) -> bool:
    """Return whether a node's output is averaged or summed."""
    return any(reader.op_type in ("ReduceMean", "ReduceSum") for reader in graph.readers.get(node.output[0], []))
