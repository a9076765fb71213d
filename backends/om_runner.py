#!/usr/bin/env python3
"""Run the exported model in this folder: prefill in pieces, then greedy decoding. Needs numpy and CANN's pyACL.

This file stands alone: `lightpress export --target ascend-om` copies it as run_om.py beside the graphs, and everything
it knows of the model is in io.json. `--onnx` runs the same loop on ONNX Runtime's CPU provider instead of a device,
which checks the folder before anything is compiled. The calls of pyACL follow public programs (ascend.md 2.7); they
were not run on a device by us.

  python3 run_om.py --prompt "Once upon a time" --new 64
  python3 run_om.py --ids 1,15,27 --onnx
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CONTRACT = "io.json"
TOKENIZER = "tokenizer.json"
GEAR_INPUT = "ascend_mbatch_shape_data"  # ATC's name for the input by which a gear is chosen
MALLOC_HUGE_FIRST = 0
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
MISTAKE = 2  # exit code
Array = NDArray[Any]
Feeds = dict[str, Array]


class Failure(Exception):
    """What the user can put right, in one sentence."""


class Session(Protocol):
    """What runs one step; it owns the cache."""

    def step(self, feeds: Feeds, keep: int, row: int, wanted: bool) -> Array | None:
        """Run one step and put its last `keep` new rows into the cache from `row` on; return logits if `wanted`."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


# The contract


class Contract:
    """What io.json says: names, sizes, element types, gears."""

    def __init__(self, folder: Path) -> None:
        """Read io.json; Failure when it is missing or says something else."""
        self.folder = folder
        try:
            data = json.loads((folder / CONTRACT).read_text(encoding="utf-8"))
            self.inputs: list[dict[str, Any]] = data["inputs"]
            self.outputs: list[dict[str, Any]] = data["outputs"]
            self.graphs: list[dict[str, Any]] = data["graphs"]
            self.gears: list[int] = sorted(data["gears"])
            self.cache: dict[str, Any] = data["cache"]
            self.long_after: int | None = data["rope"]["long_after"] if data["rope"] else None
            self.stop: frozenset[int] = frozenset(data["tokens"]["eos"])
            self.vocab = int(data["vocab"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise Failure(f"{folder / CONTRACT} cannot be used ({reason}); copy it from the export.") from error
        self.rows = int(self.cache["rows"])
        self.dtype = np.dtype(self.cache["dtype"])
        self.ids = np.dtype(self.inputs[0]["dtype"])

    def find_graph(self, gear: int) -> dict[str, Any]:
        """Return the graph that takes `gear` new tokens."""
        return next(graph for graph in self.graphs if gear in graph["gears"])

    def shape(self, value: dict[str, Any], gear: int) -> tuple[int, ...]:
        """Return the shape of an input or output in a gear: "S" is the gear, "C+S" cache and gear."""
        sizes = {"S": gear, "C+S": self.rows + gear}
        return tuple(sizes.get(axis, axis) for axis in value["shape"])

    def cache_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of the cache."""
        return (1, self.rows, int(self.cache["heads"]), int(self.cache["head_dim"]))

    def row_bytes(self) -> int:
        """Return the bytes of one token's keys and values."""
        return int(self.cache["heads"] * self.cache["head_dim"] * self.dtype.itemsize)


def plan_pieces(count: int, gears: Sequence[int]) -> list[tuple[int, int]]:
    """Cut `count` tokens into (gear, tokens): the largest gear while it is full, then the smallest that holds the rest.

    A padded step costs less than two steps: each one reads all weights.
    """
    pieces = []
    while count > 0:
        gear = next((size for size in gears if size >= count), gears[-1])
        pieces.append((gear, min(gear, count)))
        count -= pieces[-1][1]
    return pieces


def make_feeds(contract: Contract, ids: Sequence[int], gear: int, start: int, long: bool) -> Feeds:
    """Return the inputs of one step, the cache left out: `ids` stand at the end of the gear, padding before them.

    Token n of the text has position n, and its keys and values lie in row n of the cache; rows from `start` on are not
    valid yet, and neither is the padding.
    """
    used = len(ids)
    feeds = {name: np.zeros((1, gear), contract.ids) for name in ("input_ids", "position_ids")}
    feeds["input_ids"][0, gear - used :] = ids
    feeds["position_ids"][0, gear - used :] = np.arange(start, start + used)
    mask = np.zeros((1, contract.rows + gear), contract.ids)
    mask[0, :start] = 1
    mask[0, contract.rows + gear - used :] = 1
    feeds["attention_mask"] = mask
    if contract.long_after is not None:
        feeds["rope_ids"] = feeds["position_ids"] + contract.ids.type(contract.rows if long else 0)
    return feeds


class Engine:
    """Prefill and greedy decoding over any session; `length` tokens are in the cache."""

    def __init__(self, contract: Contract, session: Session) -> None:
        """Start with an empty cache."""
        self.contract, self.session, self.length = contract, session, 0

    def feed(self, ids: Sequence[int]) -> Array:
        """Run further tokens, a whole prompt or a single one, and return the logits `[vocab]` of the last one."""
        check_ids(ids, self.contract.vocab)
        total = self.length + len(ids)
        if total > self.contract.rows:
            raise Failure(
                f"{total} tokens do not fit into the cache of {self.contract.rows}; "
                "give a shorter prompt or export with a longer cache."
            )
        # As the model was trained: frequencies follow the length of the text when its tokens were run.
        long = self.contract.long_after is not None and total > self.contract.long_after
        logits, done = None, 0
        for gear, used in plan_pieces(len(ids), self.contract.gears):
            piece = ids[done : done + used]
            feeds = make_feeds(self.contract, piece, gear, self.length, long)
            done += used
            logits = self.session.step(feeds, used, self.length, done == len(ids))
            self.length += used
        assert logits is not None
        return np.asarray(logits[0, -1])

    def generate(self, ids: Sequence[int], count: int, stop: Collection[int] = frozenset()) -> list[int]:
        """Return up to `count` new ids, each the most likely; ends with a stop id, or when the cache is full."""
        logits = self.feed(ids)
        chosen: list[int] = []
        while len(chosen) < count:
            chosen.append(int(logits.argmax()))
            if chosen[-1] in stop or len(chosen) == count or self.length == self.contract.rows:
                break
            logits = self.feed(chosen[-1:])
        return chosen


def check_ids(ids: Sequence[int], vocab: int) -> None:
    """Raise Failure unless there are ids and all are tokens of the model."""
    if not ids:
        raise Failure("There is no token to run; give --prompt or --ids with at least one.")
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise Failure(f"Token ids must lie in 0 .. {vocab - 1}; one of {min(ids)} .. {max(ids)} does not.")


# ONNX Runtime, to check the folder without a device


class OnnxSession:
    """The graphs on ONNX Runtime's CPU provider, the cache in numpy."""

    def __init__(self, contract: Contract, threads: int = 0) -> None:
        """Open every graph with that many threads (0: all); Failure when onnxruntime or a graph is missing."""
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as state
        except ImportError as error:
            raise Failure("--onnx needs the Python package onnxruntime: pip install onnxruntime.") from error
        refusals = (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile, RuntimeError)
        self.contract = contract
        self.cache = np.zeros(contract.cache_shape(), contract.dtype)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it would log, it also raises
        options.intra_op_num_threads = threads
        self.sessions: dict[int, Any] = {}
        for graph in contract.graphs:
            path = find_file(contract.folder / graph["onnx"], "copy it from the exported folder")
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except refusals as error:
                reason = str(error).partition("\n")[0].rstrip(".")
                raise Failure(f"ONNX Runtime cannot open {path} ({reason}); copy it and its data again.") from error
            self.sessions |= dict.fromkeys(graph["gears"], session)

    def step(self, feeds: Feeds, keep: int, row: int, wanted: bool) -> Array | None:
        """Run one step and put its last `keep` new rows into the cache from `row` on; return logits if `wanted`."""
        gear = feeds["input_ids"].shape[1]
        logits, fresh = self.sessions[gear].run(None, {**feeds, self.contract.cache["input"]: self.cache})
        self.cache[:, row : row + keep] = fresh[:, gear - keep :]
        return np.asarray(logits) if wanted else None

    def close(self) -> None:
        """Give back what is held: nothing outside this process."""


def find_file(path: Path, remedy: str) -> Path:
    """Return the path of a file that must be there; else Failure with what to do."""
    if not path.is_file():
        raise Failure(f"{path} is missing; {remedy}.")
    return path


# The device


def import_acl() -> Any:
    """Return CANN's Python module acl; Failure with the way to get it."""
    try:
        import acl  # type: ignore[import-not-found] # part of CANN, never of a package index
    except ImportError as error:
        raise Failure(
            "CANN's Python module acl cannot be imported; install CANN on the machine with the NPU and source its "
            "set_env.sh, or add --onnx to try the graphs on this CPU."
        ) from error
    return acl


def check_code(code: int, what: str) -> None:
    """Raise Failure when a call of pyACL did not return 0."""
    if code != 0:
        raise Failure(
            f"{what} failed with error code {code}; look it up in CANN's log (~/ascend/log) and check that the .om was "
            "built for this chip."
        )


class AclModel:
    """One loaded .om: its inputs and outputs on the device, in the order of io.json."""

    def __init__(self, acl: Any, contract: Contract, graph: dict[str, Any], cache: int) -> None:
        """Load the model and reserve memory for its largest gear; `cache` is the device address of the shared cache."""
        self.acl, self.contract, self.gears = acl, contract, graph["gears"]
        path = find_file(contract.folder / graph["om"], "run build_om.sh where CANN is installed and copy the .om here")
        self.model, code = acl.mdl.load_from_file(str(path))
        check_code(code, f"loading {path}")
        self.description = acl.mdl.create_desc()
        check_code(acl.mdl.get_desc(self.description, self.model), "reading the description of the model")
        names = [value["name"] for value in contract.inputs]
        self.cache_index = names.index(contract.cache["input"])
        self.inputs, self.input_set = self._reserve("input", cache)
        self.outputs, self.output_set = self._reserve("output", 0)
        check_sizes(contract, max(self.gears), self.inputs, path)

    def _reserve(self, kind: str, cache: int) -> tuple[list[tuple[int, int]], Any]:
        """Return (address, bytes) of every input or output, and the dataset that holds them."""
        acl, buffers = self.acl, []
        dataset = acl.mdl.create_dataset()
        for index in range(getattr(acl.mdl, f"get_num_{kind}s")(self.description)):
            size = getattr(acl.mdl, f"get_{kind}_size_by_index")(self.description, index)
            address = cache
            if not cache or index != self.cache_index:
                address, code = acl.rt.malloc(size, MALLOC_HUGE_FIRST)
                check_code(code, f"reserving {size} bytes on the device")
            _, code = acl.mdl.add_dataset_buffer(dataset, acl.create_data_buffer(address, size))
            check_code(code, "adding a buffer to a dataset")
            buffers.append((address, size))
        return buffers, dataset

    def run(self, feeds: Feeds) -> None:
        """Copy the inputs to the device, choose the gear, and run."""
        for (address, size), value in zip(self.inputs, self.contract.inputs, strict=False):
            if value["name"] == self.contract.cache["input"]:
                continue
            host = np.ascontiguousarray(feeds[value["name"]])
            code = self.acl.rt.memcpy(address, size, host.ctypes.data, host.nbytes, HOST_TO_DEVICE)
            check_code(code, f"copying {value['name']} to the device")
        if len(self.gears) > 1:
            self._choose_gear(feeds["input_ids"].shape[1])
        check_code(self.acl.mdl.execute(self.model, self.input_set, self.output_set), "running the model")

    def close(self) -> None:
        """Unload the model."""
        self.acl.mdl.unload(self.model)
        self.acl.mdl.destroy_desc(self.description)

    def _choose_gear(self, gear: int) -> None:
        index, code = self.acl.mdl.get_input_index_by_name(self.description, GEAR_INPUT)
        check_code(code, "finding the input for gears")
        sizes = [size for value in self.contract.inputs for size in self.contract.shape(value, gear)]
        dims = {"name": "", "dimCount": len(sizes), "dims": sizes}
        code = self.acl.mdl.set_input_dynamic_dims(self.model, self.input_set, index, dims)
        check_code(code, f"choosing the gear of {gear} tokens")


def check_sizes(contract: Contract, gear: int, buffers: list[tuple[int, int]], path: Path) -> None:
    """Raise Failure when the compiled model has other inputs than io.json says."""
    for (_, size), value in zip(buffers, contract.inputs, strict=False):
        needed = int(np.prod(contract.shape(value, gear))) * np.dtype(value["dtype"]).itemsize
        if size < needed:
            raise Failure(
                f"{path} has {size} bytes for the input {value['name']} where {CONTRACT} says {needed}; "
                "compile it again from this folder."
            )


class AclSession:
    """The compiled models on one device; the cache stays there, and new rows move inside the device."""

    def __init__(self, contract: Contract, device: int = 0) -> None:
        """Start CANN and load every model; Failure when CANN, the device or a model is missing."""
        acl = self.acl = import_acl()
        self.contract, self.device = contract, device
        for graph in contract.graphs:  # before the slow start
            find_file(contract.folder / graph["om"], "run build_om.sh where CANN is installed and copy the .om here")
        check_code(acl.init(), "starting CANN")
        check_code(acl.rt.set_device(device), f"opening device {device}")
        self.context, code = acl.rt.create_context(device)
        check_code(code, "creating a context")
        size = contract.rows * contract.row_bytes()
        self.cache, code = acl.rt.malloc(size, MALLOC_HUGE_FIRST)
        check_code(code, f"reserving {size} bytes for the cache")
        # Masked rows still enter a product with weight 0, so they must be finite.
        check_code(acl.rt.memset(self.cache, size, 0, size), "clearing the cache")
        self.models: dict[int, AclModel] = {}
        for graph in contract.graphs:
            self.models |= dict.fromkeys(graph["gears"], AclModel(acl, contract, graph, self.cache))

    def step(self, feeds: Feeds, keep: int, row: int, wanted: bool) -> Array | None:
        """Run one step and put its last `keep` new rows into the cache from `row` on; return logits if `wanted`."""
        gear = feeds["input_ids"].shape[1]
        model = self.models[gear]
        model.run(feeds)
        each = self.contract.row_bytes()
        source, target = model.outputs[1][0] + (gear - keep) * each, self.cache + row * each
        room = (self.contract.rows - row) * each
        check_code(self.acl.rt.memcpy(target, room, source, keep * each, DEVICE_TO_DEVICE), "moving new cache rows")
        if not wanted:
            return None
        logits = np.empty(self.contract.shape(self.contract.outputs[0], gear), self.contract.outputs[0]["dtype"])
        code = self.acl.rt.memcpy(
            logits.ctypes.data, logits.nbytes, model.outputs[0][0], logits.nbytes, DEVICE_TO_HOST
        )
        check_code(code, "copying the logits")
        return logits

    def close(self) -> None:
        """Unload the models and leave the device; its memory goes with that."""
        for model in {id(model): model for model in self.models.values()}.values():
            model.close()
        self.acl.rt.destroy_context(self.context)
        self.acl.rt.reset_device(self.device)
        self.acl.finalize()


# The command


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Run the exported model in this folder, greedily.")
    parser.add_argument("--prompt", help="text to continue (needs the package tokenizers and tokenizer.json)")
    parser.add_argument("--ids", help="token ids to continue, separated by commas")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most (64)")
    parser.add_argument("--device", type=int, default=0, help="number of the NPU (0)")
    parser.add_argument("--onnx", action="store_true", help="run the .onnx on this CPU with ONNX Runtime instead")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="the exported folder")
    return parser.parse_args(words)


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of the folder; Failure with the way to do without."""
    try:
        import tokenizers
    except ImportError as error:
        raise Failure("--prompt needs the Python package tokenizers; install it, or give --ids.") from error
    path = find_file(folder / TOKENIZER, "give --ids instead of --prompt")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the package raises nothing narrower)
        raise Failure(f"{path} is no tokenizer ({error}); copy it from the exported folder, or give --ids.") from error
    tokenizer.no_truncation()  # a prompt is neither cut nor padded, whatever the file says
    tokenizer.no_padding()
    return tokenizer


def read_ids(text: str) -> list[int]:
    """Parse ids separated by commas."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise Failure("--ids takes whole numbers separated by commas, such as 1,15,27.") from error


def run(given: argparse.Namespace) -> None:
    """Generate and print; Failure for what the user can put right."""
    if (given.prompt is None) == (given.ids is None):
        raise Failure("Give either --prompt or --ids.")
    if given.new < 1:
        raise Failure("--new must be at least 1.")
    contract = Contract(given.folder)
    tokenizer = open_tokenizer(given.folder) if given.ids is None else None
    ids = read_ids(given.ids) if tokenizer is None else tokenizer.encode(given.prompt).ids
    check_ids(ids, contract.vocab)
    session: Session = OnnxSession(contract) if given.onnx else AclSession(contract, given.device)
    start = time.perf_counter()
    try:
        new = Engine(contract, session).generate(ids, given.new, contract.stop)
    finally:
        session.close()
    seconds = time.perf_counter() - start
    print(",".join(map(str, new)) if tokenizer is None else tokenizer.decode(new))
    print(f"{len(ids)} tokens in, {len(new)} out, {seconds:.2f} s", file=sys.stderr)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for what the user can put right."""
    try:
        run(read_arguments(sys.argv[1:] if words is None else words))
    except Failure as failure:
        print(f"run_om.py: {failure}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
