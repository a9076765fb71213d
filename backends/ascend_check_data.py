"""A graph's files: the 2 GB rule, external data where the graph says it lies, and values that float16 cannot hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy
from onnx import TensorProto, helper, numpy_helper

from backends.ascend_graph import OpenGraph, name_element
from backends.ascend_rules import ERROR, WARNING, Finding, show_names

PROTOBUF_LIMIT = 2**31 - 1  # bytes; above it ATC stops with E13015 (ascend.md 2.2)
ADVISED_LIMIT = 1_500_000_000  # bytes; from there on weights belong outside (ascend.md 2.2)
ALIGNMENT = 64  # bytes of a cache line: ours, so that runtimes map tensors instead of copying them
HALF_MAX = 65504.0
BLOCK = 4 * 2**20  # values read at a time
KNOWN_TYPES = frozenset(TensorProto.DataType.values())
NIBBLES = ("INT4", "UINT4", "FLOAT4E2M1")  # two values to a byte


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie: location as written, offset, and length."""

    name: str
    location: str
    offset: int
    length: int


def check_size(path: Path) -> Iterator[Finding]:
    """Yield a finding for a graph file that protobuf cannot read, or nearly so."""
    size = path.stat().st_size
    if size > PROTOBUF_LIMIT:
        text = f"{path.name} has {size} bytes, above 2 GB (E13015); export it with external data."
        yield Finding("protobuf", ERROR, path.name, "", text)
    elif size > ADVISED_LIMIT:
        text = f"{path.name} has {size} bytes, near the limit of 2 GB; export it with external data."
        yield Finding("protobuf", WARNING, path.name, "", text)


def count_bytes(tensor: TensorProto) -> int:
    """Return the bytes that a tensor's values take; -1 for a type without a fixed size."""
    count: int = math.prod(tensor.dims)
    if name_element(tensor.data_type) in NIBBLES:
        return (count + 1) // 2
    if name_element(tensor.data_type) in ("STRING", "UNDEFINED") or tensor.data_type not in KNOWN_TYPES:
        return -1
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def is_external(tensor: TensorProto) -> bool:
    """Return whether a tensor's values lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def check_external(graph: OpenGraph) -> Iterator[Finding]:
    """Yield what is wrong with where a graph's external data are said to lie."""
    placed: list[Stored] = []
    for name, tensor in graph.constants.items():
        if not is_external(tensor):
            continue
        problems = list(explain_place(graph.path.parent, tensor))
        for text in problems:
            yield Finding("external-data", ERROR, graph.name, name, text)
        if not problems:
            placed.append(read_place(tensor))
    yield from check_overlaps(graph, placed)
    loose = [stored.name for stored in placed if stored.offset % ALIGNMENT]
    if loose:
        text = f"{show_names(loose)} do not start at a multiple of {ALIGNMENT} bytes and cannot be mapped; align them."
        yield Finding("alignment", WARNING, graph.name, loose[0], text)


def read_place(tensor: TensorProto) -> Stored:
    """Return where an external tensor lies; ValueError for numbers that are none."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = int(entries["length"]) if "length" in entries else count_bytes(tensor)
    return Stored(tensor.name, entries.get("location", ""), int(entries.get("offset", "0")), length)


def explain_place(folder: Path, tensor: TensorProto) -> Iterator[str]:
    """Yield a sentence for each mistake in an external tensor's location, offset and length."""
    try:
        stored = read_place(tensor)
    except ValueError:
        yield f"Offset or length of {tensor.name} is not a number; write the graph again."
        return
    where = PurePosixPath(stored.location)
    if not stored.location or where.is_absolute() or ".." in where.parts or "\\" in stored.location:
        yield f"The location '{stored.location}' of {tensor.name} must lie below the graph's folder; move the data."
        return
    file, needed = folder / where, count_bytes(tensor)
    if not file.is_file():
        yield f"{stored.location}, where {tensor.name} lies, is missing; copy it beside the graph."
    elif stored.offset < 0 or stored.length < 0 or stored.offset + stored.length > file.stat().st_size:
        yield (
            f"{tensor.name} lies at {stored.offset} to {stored.offset + stored.length} of {stored.location}, which has "
            f"{file.stat().st_size} bytes; the file is cut short, so copy or export it again."
        )
    elif needed >= 0 and stored.length != needed:
        yield f"{tensor.name} has {stored.length} bytes, and its shape needs {needed}; export the graph again."


def check_overlaps(graph: OpenGraph, placed: list[Stored]) -> Iterator[Finding]:
    """Yield a finding for tensors that share bytes without being the same range."""
    last: Stored | None = None  # of those before in the file, the one that reaches furthest
    for stored in sorted(placed, key=lambda stored: (stored.location, stored.offset, -stored.length)):
        if last is not None and last.location == stored.location and stored.offset < last.offset + last.length:
            # Tied weights are one range under two names, which is right.
            if (last.offset, last.length) != (stored.offset, stored.length):
                text = f"{last.name} and {stored.name} overlap in {stored.location}; export the graph again."
                yield Finding("external-data", ERROR, graph.name, stored.name, text)
            if stored.offset + stored.length <= last.offset + last.length:
                continue
        last = stored


# Values


def check_values(graph: OpenGraph, half: str) -> Iterator[Finding]:
    """Yield findings for constants that float16 cannot hold; `half` says what ATC makes of float32.

    `half`: "all" (float32 becomes float16), "some" (a mixed mode) or "" (it stays). External data are read in blocks.
    """
    for name, tensor in graph.constants.items():
        element = name_element(tensor.data_type)
        if element not in ("FLOAT", "FLOAT16", "BFLOAT16"):
            continue
        try:
            broken, largest = measure_values(graph.path.parent, tensor)
        except (OSError, ValueError):
            continue  # check_external says what is wrong with its place
        if broken:
            text = f"{name} ({element}) holds {broken} value(s) that are inf or NaN; mend the weights and export again."
            yield Finding("overflow", ERROR, graph.name, name, text)
        elif element != "FLOAT16" and half and largest > HALF_MAX:
            text = (
                f"{name} ({element}) reaches {largest:g}, float16 ends at 65504, and the precision mode turns "
                f"{'it' if half == 'all' else 'parts of the graph'} into float16; scale it down, or keep it in float32."
            )
            yield Finding("overflow", ERROR if half == "all" else WARNING, graph.name, name, text)


def measure_values(folder: Path, tensor: TensorProto) -> tuple[int, float]:
    """Return how many values of a float tensor are inf or NaN, and the largest finite magnitude."""
    broken, largest = 0, 0.0
    for block in read_blocks(folder, tensor):
        finite = numpy.isfinite(block)
        broken += int(block.size - numpy.count_nonzero(finite))
        largest = max(largest, float(numpy.abs(block, where=finite, out=numpy.zeros_like(block)).max(initial=0.0)))
    return broken, largest


def read_blocks(folder: Path, tensor: TensorProto) -> Iterator[numpy.ndarray]:
    """Yield a float tensor's values as flat float32 blocks of bounded size."""
    if not is_external(tensor):
        yield numpy_helper.to_array(tensor).astype(numpy.float32).reshape(-1)
        return
    stored = read_place(tensor)
    brain = name_element(tensor.data_type) == "BFLOAT16"
    kind = numpy.dtype("<u2" if brain else "<f2" if name_element(tensor.data_type) == "FLOAT16" else "<f4")
    with (folder / stored.location).open("rb") as stream:
        stream.seek(stored.offset)
        left = stored.length // kind.itemsize
        while left > 0:
            values = numpy.fromfile(stream, kind, min(left, BLOCK))
            if not values.size:
                raise ValueError(f"{stored.location} ends before {tensor.name} does")
            left -= values.size
            yield (values.astype(numpy.uint32) << 16).view(numpy.float32) if brain else values.astype(numpy.float32)
