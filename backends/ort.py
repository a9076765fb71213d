"""Run an exported ONNX folder on ONNX Runtime's CPU provider: prefill, cached decode, greedy generation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # its stubs are a package of their own
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from backends.runtime import Ids, Logits, Speed, generate_greedily, measure, measure_pair
from compress.errors import UserError

__all__ = ["OrtCache", "OrtModel", "Speed", "measure", "measure_pair", "open_onnx"]

GRAPH_NAME = "model.onnx"
CPU_PROVIDER = "CPUExecutionProvider"
QUIET = 4  # onnxruntime's log level "fatal": what it would log, it also raises
PAST_PREFIX = "past_key_values."
KEEP = "logits_to_keep"  # an input that only fused graphs have
SPARE_TOKENS = 64  # room that a new cache has beyond the prompt: the operator clears what it does not use, step by step
REFUSALS = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
    RuntimeError,
)
FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class OrtCache:
    """Keys and values as onnxruntime's own tensors, never copied to numpy, and the mask `[batch, total]` so far."""

    values: tuple[Any, ...]
    mask: Ids


class Feeder:
    """Binds a graph's caches and its small inputs and outputs to memory that is used again from step to step.

    Arrays of the same size are bound once: binding anew and fresh logits cost a decode step some 5 % of its time
    (benchmarks/RESULTS.md).
    """

    def __init__(self, session: Any, past: tuple[tuple[str, Any, tuple[int, int]], ...], batch: int, room: int) -> None:
        """Open empty caches `[batch, heads, room, size]`, past and present in one buffer."""
        self.session, self.binding = session, session.io_binding()
        self.buffers = tuple(np.zeros((batch, heads, room, size), dtype) for _, dtype, (heads, size) in past)
        self.arrays: dict[str, NDArray[Any]] = {}
        self.ones = np.ones(batch * room, np.int64)
        for (name, _, _), buffer in zip(past, self.buffers, strict=True):
            self._bind_input(name, buffer)
            self._bind_output(f"present.{name.removeprefix(PAST_PREFIX)}", buffer)

    def run(self, ids: Ids, total: int, kept: int, vocab: int) -> Logits:
        """Run new tokens `[batch, new]`, the last of `total`; return the logits `[batch, kept, vocab]` of the last."""
        np.copyto(self._place("input_ids", ids.shape, np.int64), ids)
        self._place(KEEP, (1,), np.int64)[0] = kept
        self._bind_input("attention_mask", self.ones[: len(ids) * total].reshape(len(ids), total))
        logits = self._place("logits", (len(ids), kept, vocab), np.float32)
        self.session.run_with_iobinding(self.binding)
        return logits.copy() if kept == 1 else self.arrays.pop("logits")  # one row is cheaper to copy than to bind

    def _place(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return the array bound to a name, bound anew if its shape has changed."""
        array = self.arrays.get(name)
        if array is None or array.shape != shape:
            array = self.arrays[name] = np.empty(shape, dtype)
            (self._bind_output if name == "logits" else self._bind_input)(name, array)
        return array

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


@dataclass(frozen=True)
class SharedCache:
    """Keys and values in buffers that the graph appends to in place, and the tokens `length` of them that count.

    Caches that follow from each other share their buffers: an earlier one stays valid as long as nothing else is
    decoded after it.
    """

    feeder: Feeder
    length: int

    @property
    def capacity(self) -> int:
        """Tokens that fit into the buffers."""
        return int(self.feeder.buffers[0].shape[2])


@dataclass(frozen=True)
class OrtModel:
    """An open ONNX folder: the session, and the name, element type and sizes of each past tensor.

    `fused`: the graph keeps its cache in place and computes the logits of the last positions only.
    """

    folder: Path
    session: Any
    past: tuple[tuple[str, Any, tuple[int, int]], ...]
    fused: bool = False

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return int(self.session.get_outputs()[0].shape[-1])

    def prefill(self, ids: Ids, mask: Ids | None = None, every: bool = True) -> tuple[Logits, Any]:
        """Run prompts `[batch, sequence]`; `mask` is 0 where a row is padded on the left (standard graphs only).

        Returns logits `[batch, sequence, vocab]` (arbitrary but finite at padded places), or of the last position alone
        unless `every` is asked for (fused graphs only), and the cache. Raises ValueError for padding in a fused graph.
        """
        if self.fused:
            if mask is not None and not mask.all():
                raise ValueError("a fused graph takes no padding: run prompts of unequal length one by one")
            return self._run_shared(ids, self._open_cache(len(ids), ids.shape[1]), every)
        empty = tuple(
            onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((len(ids), heads, 0, size), dtype))
            for _, dtype, (heads, size) in self.past
        )
        return self._run(ids, empty, np.ones_like(ids) if mask is None else mask)

    def decode(self, ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """Run further tokens `[batch, new]` after a cache, which stays valid; return logits and the longer cache."""
        if self.fused:
            return self._run_shared(ids, cache, every=True)
        return self._run(ids, cache.values, np.concatenate([cache.mask, np.ones_like(ids)], 1))

    def generate(self, ids: Ids | Sequence[int], count: int, stop: Collection[int] = frozenset()) -> list[int]:
        """Return up to `count` greedy new ids after one prompt; a stop id is the last one returned."""
        return generate_greedily(self, ids, count, stop)

    def _run(self, ids: Ids, past: tuple[Any, ...], mask: Ids) -> tuple[Logits, OrtCache]:
        # Padding takes no position: the first real token has position 0.
        positions = np.maximum(np.cumsum(mask, 1)[:, -ids.shape[1] :] - 1, 0)
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, dtype=np.int64))
            for name, value in whole.items()
        }
        feeds |= {name: value for (name, _, _), value in zip(self.past, past, strict=True)}
        logits, *present = self.session.run_with_ort_values(None, feeds)
        return logits.numpy(), OrtCache(tuple(present), mask)

    def _open_cache(self, batch: int, length: int) -> SharedCache:
        """Return an empty cache with room for `length` tokens and some more."""
        return SharedCache(Feeder(self.session, self.past, batch, length + SPARE_TOKENS), 0)

    def _grow(self, cache: SharedCache, length: int) -> SharedCache:
        """Return the cache in buffers with room for `length` tokens and some more.

        Room is not doubled: in each step the operator clears all that is free, and a copy once in many steps is less.
        """
        grown = self._open_cache(len(cache.feeder.buffers[0]), length)
        for new, old in zip(grown.feeder.buffers, cache.feeder.buffers, strict=True):
            new[:, :, : cache.length] = old[:, :, : cache.length]
        return replace(grown, length=cache.length)

    def _run_columns(self, ids: Ids, cache: SharedCache) -> tuple[Logits, SharedCache]:
        parts = []
        for place in range(ids.shape[1]):
            logits, cache = self._run_shared(ids[:, place : place + 1], cache, every=True)
            parts.append(logits)
        return np.concatenate(parts, 1), cache

    def _run_shared(self, ids: Ids, cache: SharedCache, every: bool) -> tuple[Logits, SharedCache]:
        if len(ids) > 1 and ids.shape[1] > 1 and cache.length:  # the operator takes several new tokens of one row only
            return self._run_columns(ids, cache)
        total = cache.length + ids.shape[1]
        if total > cache.capacity:
            cache = self._grow(cache, total)
        logits = cache.feeder.run(ids, total, ids.shape[1] if every else 1, self.vocab)
        return logits, replace(cache, length=total)


def open_onnx(folder: Path, threads: int | None = None, provider: str = CPU_PROVIDER) -> OrtModel:
    """Open `folder`/model.onnx with that many CPU threads (None: onnxruntime's choice) on one of its providers.

    Raises UserError when the graph or its external data is missing or cut short, onnxruntime refuses it, or the
    provider is not there.
    """
    check_provider(provider)
    path = folder / GRAPH_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {GRAPH_NAME}; export the checkpoint into it first.")
    graph = read_graph(path)
    check_external_data(path, graph)
    options = make_options(graph, threads)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except REFUSALS as error:
        raise UserError(f"ONNX Runtime refuses {path} ({first_line(error)}); export it again.") from error
    if session.get_providers()[0] != provider:  # onnxruntime falls back to the CPU without an error
        raise UserError(
            f"{provider} does not start on this machine (its libraries or its device are missing); install them, or "
            f"use {CPU_PROVIDER}."
        )
    given = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    return OrtModel(folder, session, describe_past(path, session), KEEP in given)


def check_provider(provider: str) -> None:
    """Raise UserError for a provider that this onnxruntime does not have."""
    known = onnxruntime.get_available_providers()
    if provider not in known:
        raise UserError(
            f"This onnxruntime has no provider {provider}, only {', '.join(known)}; choose one, or install the "
            "onnxruntime package that brings it."
        )


def read_graph(path: Path) -> onnx.GraphProto:
    """Parse a graph without its external data; UserError when it cannot be parsed."""
    try:
        return onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX graph or is cut short; export it again.") from error


def make_options(graph: onnx.GraphProto, threads: int | None) -> Any:
    """Return session options: quiet, and exact where the graph computes in float64."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    if any(node.op_type == "DynamicQuantizeMatMul" for node in graph.node) and sums_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if any(value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE for value in graph.input):
        # Seen in onnxruntime 1.31: its fused norm takes epsilon from a float32 constant only, and for a float64 one
        # silently puts 1e-5 in its place.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def sums_overflow() -> bool:
    """Tell whether this CPU's products of 8-bit numbers saturate at 16 bits: x86 without VNNI (onnxruntime PR 12088).

    The option that avoids it costs time where it is not needed. Not tried on such a CPU.
    """
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    except OSError:  # another system: nothing is known
        return False
    return "sse2" in flags and not flags & {"avx512_vnni", "avx_vnni"}


def check_external_data(path: Path, graph: onnx.GraphProto) -> None:
    """Raise UserError when an external data file of the graph is missing or too short."""
    needed: dict[str, int] = {}
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in where:
            end = int(where.get("offset", 0)) + int(where.get("length", 0))
            needed[where["location"]] = max(end, needed.get(where["location"], 0))
    for location, size in needed.items():
        check_size(path.parent / location, size)


def check_size(file: Path, needed: int) -> None:
    """Raise UserError when a data file is missing or shorter than `needed` bytes."""
    if not file.is_file():
        raise UserError(f"The weights {file} are missing beside {GRAPH_NAME}; copy them there or export again.")
    size = file.stat().st_size
    if size < needed:
        raise UserError(f"The weights {file} are cut short ({size} of {needed} bytes); copy or export them again.")


def describe_past(path: Path, session: Any) -> tuple[tuple[str, Any, tuple[int, int]], ...]:
    """Return name, element type and (heads, head size) of the past inputs, in the order of the present outputs."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    names = [f"{PAST_PREFIX}{name.removeprefix('present.')}" for name in outputs[1:]]
    expected = {"input_ids", "attention_mask", *names}
    if outputs[0] != "logits" or not expected <= set(inputs) <= {*expected, "position_ids", KEEP}:
        raise UserError(f"{path} has other inputs or outputs than Lightpress exports; export the checkpoint again.")
    shapes = [(name, FLOATS[inputs[name].type], inputs[name].shape) for name in names]
    return tuple((name, dtype, (int(shape[1]), int(shape[3]))) for name, dtype, shape in shapes)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without a closing full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".")
