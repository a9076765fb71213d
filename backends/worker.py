"""A process that holds one open graph, or the probe of this machine's bandwidth, and measures when it is told to.

Memory is a process's own, so each measured folder has one. Requests and answers are lines of JSON on standard input
and output: {"do": NAME, ...} gets the method's answer, or {"error": SENTENCE} for what the user can mend.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from backends.footprint import STREAM, open_stream
from backends.ort import OrtModel, open_onnx
from backends.runtime import make_ids, time_turn
from compress.errors import UserError

Answer = dict[str, float]
STATUS = Path("/proc/self/status")


class Worker:
    """What this process has open, and what it can be asked."""

    def __init__(self) -> None:
        self.model: OrtModel | None = None
        self.stream: Callable[[float], float] | None = None

    def open(self, folder: str, threads: int | None) -> Answer:
        """Open a folder's graph; return the seconds, the vocabulary, and the peak memory in bytes before it."""
        before, started = read_peak(), time.perf_counter()
        self.model = open_onnx(Path(folder), threads)
        return {"seconds": time.perf_counter() - started, "vocab": self.model.vocab, "before_bytes": before}

    def time(self, shape: tuple[int, int, int], vocab: int, least: float) -> Answer:
        """Return the seconds of one prefill and of all decode steps; `shape`: batch, prompt and new tokens."""
        assert self.model is not None
        batch, prompt, new = shape
        prefill, decode = time_turn(self.model, make_ids(vocab, batch, prompt + new), prompt, least)
        return {"prefill": prefill, "decode": decode}

    def bandwidth(self, threads: int | None, least: float, sides: tuple[int, int] = STREAM) -> Answer:
        """Return the bytes per second at which this machine reads a large weight."""
        if self.stream is None:
            self.stream = open_stream(threads, (sides[0], sides[1]))
        return {"bytes_per_s": self.stream(least)}

    def memory(self) -> Answer:
        """Return the highest resident size of this process so far, in bytes."""
        return {"peak_bytes": read_peak()}


def read_peak() -> int:
    """Return the highest resident size of this process, in bytes.

    Not getrusage where it can be helped: on Linux its number begins with the parent's size at the time of the fork.
    """
    if STATUS.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="ascii", errors="replace"))
        if found:
            return 1024 * int(found.group(1))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def answer_line(worker: Worker, line: str) -> dict[str, Any]:
    """Do what one line asks for."""
    request = json.loads(line)
    methods: dict[str, Callable[..., Answer]] = {
        "open": worker.open, "time": worker.time, "bandwidth": worker.bandwidth, "memory": worker.memory,
    }  # fmt: skip
    try:
        return methods[request.pop("do")](**request)
    except UserError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "There is not enough memory for so large a batch and prompt; give smaller ones."}


def take_output() -> TextIO:
    """Return standard output for answers alone: what libraries print goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Answer line by line until the input ends."""
    answers, worker = take_output(), Worker()
    for line in sys.stdin:
        print(json.dumps(answer_line(worker, line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
