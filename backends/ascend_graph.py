"""A graph as the checker sees it: nodes, element types and shapes, without a byte of its external data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from backends.ascend_rules import STANDARD

Dims = tuple[int | str, ...]
Shapes = Mapping[str, Sequence[int | str]]


@dataclass(frozen=True)
class Value:
    """A tensor's element type (0: unknown) and dimensions; a name stands for a dimension that is not fixed."""

    element: int
    dims: Dims | None


@dataclass(frozen=True)
class OpenGraph:
    """An ONNX file opened without external data; `problem` is what shape inference said, empty when it went through."""

    path: Path
    model: ModelProto
    values: Mapping[str, Value]
    problem: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @cached_property
    def opsets(self) -> dict[str, int]:
        """Opset by domain; the standard domain is called ai.onnx."""
        return {entry.domain or STANDARD: entry.version for entry in self.model.opset_import}

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """Initializers and Constant nodes by name, subgraphs included."""
        found = {}
        for graph in walk_graphs(self.model.graph):
            found.update({tensor.name: tensor for tensor in graph.initializer})
            for node in graph.node:
                found.update(read_constant(node))
        return found

    @cached_property
    def nodes(self) -> list[NodeProto]:
        """All nodes, those of subgraphs included."""
        return [node for graph in walk_graphs(self.model.graph) for node in graph.node]

    @cached_property
    def inputs(self) -> list[ValueInfoProto]:
        """Graph inputs that are no initializers."""
        return [entry for entry in self.model.graph.input if entry.name not in self.constants]

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        """Nodes that read a value, by its name."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def makers(self) -> dict[str, NodeProto]:
        """The node that makes a value, by its name."""
        return {name: node for node in self.nodes for name in node.output}

    def element(self, name: str) -> int:
        """Return the element type of a value, 0 where it is not known."""
        return self.values[name].element if name in self.values else 0


def read_constant(node: NodeProto) -> dict[str, TensorProto]:
    """Return the tensor of a Constant node by its output's name."""
    if node.op_type != "Constant":
        return {}
    tensors = [entry.t for entry in node.attribute if entry.name == "value"]
    return {node.output[0]: tensors[0]} if tensors else {}


def walk_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and the subgraphs of its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
            for part in inner:
                yield from walk_graphs(part)


def open_graph(path: Path, model: ModelProto, shapes: Shapes | None = None) -> OpenGraph:
    """Return a graph with its inferred types and shapes; `shapes` replace the dimensions of named inputs."""
    fixed = fix_inputs(model, shapes or {})
    try:
        inferred, problem = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True), ""
    except Exception as error:  # noqa: BLE001 - the C++ side raises several classes, some of them plain RuntimeError
        problem = " ".join(str(error).split())
        inferred = infer_loosely(fixed)
    return OpenGraph(path, model, collect_values(inferred), problem)


def infer_loosely(model: ModelProto) -> ModelProto:
    """Return a model with what can be inferred; a node that defies inference leaves its outputs unknown."""
    try:
        return onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=False)
    except Exception:  # noqa: BLE001 - as above; the caller reports the strict run's message
        return model


def fix_inputs(model: ModelProto, shapes: Shapes) -> ModelProto:
    """Return a copy of a model whose named inputs have the given dimensions."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for entry in fixed.graph.input:
        sizes = shapes.get(entry.name)
        if sizes is None or len(sizes) != len(entry.type.tensor_type.shape.dim):
            continue
        for dimension, size in zip(entry.type.tensor_type.shape.dim, sizes, strict=True):
            if isinstance(size, int):
                dimension.dim_value = size
    if shapes:
        # The outputs' declared shapes were those of the open graph.
        for entry in fixed.graph.output:
            entry.type.tensor_type.ClearField("shape")
    return fixed


def collect_values(model: ModelProto) -> dict[str, Value]:
    """Return all named values of a model and its subgraphs."""
    found = {}
    for graph in walk_graphs(model.graph):
        for entry in (*graph.input, *graph.output, *graph.value_info):
            found[entry.name] = describe_value(entry)
        for tensor in graph.initializer:
            found[tensor.name] = Value(tensor.data_type, tuple(tensor.dims))
    return found


def describe_value(entry: ValueInfoProto) -> Value:
    """Return element type and dimensions of a value; a dimension without a name is called `?`."""
    kind = entry.type.tensor_type
    if not kind.HasField("shape"):
        return Value(kind.elem_type, None)
    dims = (item.dim_value if item.HasField("dim_value") else item.dim_param or "?" for item in kind.shape.dim)
    return Value(kind.elem_type, tuple(dims))


def name_node(node: NodeProto) -> str:
    """Return a node's name, else its type and first output."""
    return node.name or f"{node.op_type} -> {node.output[0] if node.output else ''}"


def name_element(code: int) -> str:
    """Return ONNX's name of an element type."""
    names: dict[int, str] = {number: name for name, number in TensorProto.DataType.items()}
    return names.get(code, f"type {code}")
