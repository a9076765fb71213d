"""An ONNX graph under construction: nodes and small constants in memory, weights straight to an external data file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from compress.checkpoint import BLOCK_BYTES

GRAPH_FILE = "model.onnx"
OPSET = 18  # the newest that Ascend's ATC reads
IR_VERSION = 8  # the one that came with opset 18
ELEMENT_TYPES = {torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE}
PAGE = 4096  # big tensors start on a page, so that runtimes map them instead of copying
CACHE_LINE = 64
PAGED_FROM = 2**20  # bytes from which padding to a page costs nothing worth mentioning
Axis = str | int


@dataclass
class GraphBuilder:
    """Collects an ONNX graph whose weights go to `data` under the name `location`; `dtype` is that of all floats."""

    data: BinaryIO
    location: str
    dtype: torch.dtype = torch.float32
    scope: str = ""
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    _constants: dict[tuple[str, tuple[float, ...]], str] = field(default_factory=dict)

    @property
    def element_type(self) -> int:
        """ONNX's code of the float type."""
        return ELEMENT_TYPES[self.dtype]

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append a node with one output and return that output's name."""
        return self.add_node(operator, inputs, [output or self._name_output(operator)], attributes)[0]

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Append a Split of the last axis into `sizes`."""
        names = [f"{self._name_output('Split')}_{part}" for part in range(len(sizes))]
        return self.add_node("Split", (value, self.integers(*sizes)), names, {"axis": -1})

    def add_node(
        self, operator: str, inputs: Sequence[str], outputs: list[str], attributes: dict[str, Any]
    ) -> list[str]:
        """Append a node named after its first output and return its outputs."""
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def integers(self, *values: int) -> str:
        """Return an int64 vector constant."""
        return self._constant("int64", TensorProto.INT64, values, [len(values)])

    def integer(self, value: int) -> str:
        """Return an int64 scalar constant."""
        return self._constant("int64_scalar", TensorProto.INT64, (value,), [])

    def number(self, value: float) -> str:
        """Return a scalar constant of the graph's float type."""
        return self._constant("float", self.element_type, (value,), [])

    def numbers(self, values: torch.Tensor) -> str:
        """Return a vector constant of the graph's float type."""
        return self._constant("floats", self.element_type, tuple(values.tolist()), [len(values)])

    def add_input(self, name: str, axes: Sequence[Axis], element_type: int | None = None) -> str:
        """Declare a graph input; a named axis is dynamic."""
        self.inputs.append(helper.make_tensor_value_info(name, element_type or self.element_type, axes))
        return name

    def add_output(self, name: str, axes: Sequence[Axis]) -> None:
        """Declare a graph output of the graph's float type."""
        self.outputs.append(helper.make_tensor_value_info(name, self.element_type, axes))

    def store(self, name: str, tensor: torch.Tensor) -> str:
        """Append a tensor (any strides) to the data file, block by block, and return the initializer's name."""
        row_bytes = max(tensor[0].numel() * self.dtype.itemsize, 1)
        return self.store_blocks(name, tuple(tensor.shape), torch.split(tensor, max(BLOCK_BYTES // row_bytes, 1)))

    def store_blocks(self, name: str, shape: tuple[int, ...], blocks: Iterable[torch.Tensor]) -> str:
        """Append a tensor that comes as blocks of its rows to the data file and return the initializer's name."""
        length = torch.Size(shape).numel() * self.dtype.itemsize
        start = self._align_data(PAGE if length >= PAGED_FROM else CACHE_LINE)
        for block in blocks:
            values = block.detach().to("cpu", self.dtype).contiguous()
            self.data.write(values.view(-1).view(torch.uint8).numpy().data)
        if self.data.tell() - start != length:
            raise ValueError(f"the blocks of {name} do not fill the shape {list(shape)}")
        self.initializers.append(self._describe_external(name, shape, start, length))
        return name

    def store_array(self, name: str, values: torch.Tensor, element_type: int) -> str:
        """Append a tensor of another type than the graph's to the data file and return the initializer's name."""
        data = values.contiguous().view(-1).view(torch.uint8).numpy().data
        start = self._align_data(PAGE if len(data) >= PAGED_FROM else CACHE_LINE)
        self.data.write(data)
        tensor = self._describe_external(name, tuple(values.shape), start, len(data))
        tensor.data_type = element_type
        self.initializers.append(tensor)
        return name

    def add_default(self, name: str, value: int) -> str:
        """Declare an int64 vector input of one value that need not be given."""
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1]))
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
        return name

    def rename(self, value: str, name: str) -> None:
        """Give the output of the last node another name, such as that of a graph output."""
        node = self.nodes[-1]
        if node.output[0] != value:
            raise ValueError(f"{value} is not what the last node gives")
        node.output[0] = name

    def move_first(self, start: int) -> None:
        """Move the nodes from index `start` on before all others."""
        self.nodes = self.nodes[start:] + self.nodes[:start]

    def name(self, what: str) -> str:
        """Return a fresh name for an output of the next node."""
        return self._name_output(what)

    def build_model(self, producer: str) -> ModelProto:
        """Return the model that holds all that was added."""
        graph: GraphProto = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self.initializers)
        domains = dict.fromkeys(node.domain for node in self.nodes if node.domain)
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=producer)

    def _name_output(self, operator: str) -> str:
        return f"{self.scope}/{operator}_{len(self.nodes)}"

    def _constant(self, kind: str, element_type: int, values: tuple[float, ...], shape: list[int]) -> str:
        key = (kind, values)
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            self.initializers.append(helper.make_tensor(name, element_type, shape, values))
            self._constants[key] = name
        return self._constants[key]

    def _align_data(self, boundary: int) -> int:
        self.data.write(bytes(-self.data.tell() % boundary))
        return self.data.tell()

    def _describe_external(self, name: str, shape: tuple[int, ...], offset: int, length: int) -> TensorProto:
        tensor = TensorProto(name=name, dims=shape, data_type=self.element_type)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
