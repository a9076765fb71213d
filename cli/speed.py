"""What `bench` does: folders in processes of their own, measured in turns. Imported only by the running verb.

A process of its own shows each folder's memory, and leaves nothing of one model in the way of the other. Only one of
them works at any time: a turn begins when the threads of the one before have gone to sleep.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import onnxruntime

from backends.footprint import STREAM, Footprint, read_footprint
from backends.machine import count_cores, find_cache
from backends.ort import GRAPH_NAME
from backends.verify import find_error, make_environment
from cli.console import Console, RunFailure
from cli.measure import NOISY, export_scratch
from cli.render import name_threads
from cli.request import BenchPlan, BenchSize
from cli.stream import TORCH, Artifact, check_folder, find_artifact, find_context
from compress.checkpoint import open_checkpoint
from compress.errors import UserError
from compress.report import BenchModel, BenchProcess, BenchReport, BenchRow, BenchRun, BenchSpeed, Spread
from compress.weights import read_spec

PAUSE = 0.1  # seconds before a turn: idle threads of ONNX Runtime spin for up to half of that
LEAST = 0.25  # seconds of one turn at least: shorter rounds are repeated
LOADS = 3  # fresh processes that open a model, to tell how long that takes
MIB = 2**20


def bench_folders(sources: tuple[str, str | None], plan: BenchPlan, console: Console) -> BenchReport:
    """Measure the first source, in turns with the second if there is one.

    Raises UserError before any work for folders without a model and for prompts that the shorter context cannot hold.
    """
    names = [name for name in (sources[1], sources[0]) if name is not None]
    artifacts = [find_source(name) for name in names]
    length = Lengths.fit(plan, find_shortest(artifacts, names))
    warn_threads(plan, console)
    with ExitStack() as stack:
        folders = [find_graph(stack, artifact, console) for artifact in artifacts]
        models = [
            Measured(name, folder, read_footprint(folder), artifact.runtime == TORCH)
            for name, folder, artifact in zip(names, folders, artifacts, strict=True)
        ]
        runs = tuple(Bench(models, plan, length, threads, console).measure() for threads in plan.threads)
    sides = [model.describe() for model in models]
    dense = sides[0] if len(sides) > 1 else None
    notes = (*length.notes, *list_exports(models), *note_cache(models), *note_noise(runs))
    runtime = f"ONNX Runtime {onnxruntime.__version__}"
    return BenchReport(dense, sides[-1], length.new, plan.rounds, runtime, runs, notes)


# What is measured


@dataclass(frozen=True)
class Measured:
    """A folder with a graph, the name the user gave it, its bytes, and whether it is a temporary export."""

    source: str
    folder: Path
    footprint: Footprint
    exported: bool

    def describe(self) -> BenchModel:
        """Return what the report says of it."""
        own = self.footprint
        graph = None if self.exported else self.folder / GRAPH_NAME
        return BenchModel(self.source, graph, own.format, own.file_bytes, own.weight_bytes)


@dataclass(frozen=True)
class Lengths:
    """Prompts and new tokens that fit the context, and a sentence where they are fewer than the defaults."""

    prompts: tuple[int, ...]
    new: int
    notes: tuple[str, ...] = ()

    @classmethod
    def fit(cls, plan: BenchPlan, limit: tuple[int, str] | None) -> Self:
        """Fit the defaults to a context of (tokens, folder); UserError for what was asked for and does not fit."""
        prompts, new = plan.prompts or (BenchSize.prompt,), plan.new or BenchSize.new
        if limit is None or max(prompts) + new <= limit[0]:
            return cls(prompts, new)
        context, folder = limit
        least = (max(plan.prompts, default=1), plan.new or 1)  # what the user insists on
        if sum(least) > context:
            given = [("--prompt", least[0], plan.prompts), ("--new", least[1], plan.new)]
            flags = " and ".join(f"{name} {count}" for name, count, own in given if own)
            raise UserError(
                f"{flags or 'A prompt token and a new one'} cannot be measured: the context of {folder} holds "
                f"{context} tokens, prompt and new ones together; give fewer."
            )
        new = plan.new or max(1, min(new, context - least[0] if plan.prompts else context // 2))
        prompts = plan.prompts or (min(prompts[0], context - new),)
        return cls(prompts, new, (f"Fitted to the context of {context} tokens: {new} new after {max(prompts)}.",))


def find_source(source: str) -> Artifact:
    """Return what a folder or a hub id holds; UserError where there is no model."""
    folder = Path(source)
    if not folder.exists():
        folder = open_checkpoint(source).folder
    check_folder(folder)
    return find_artifact(folder)


def find_shortest(artifacts: Sequence[Artifact], names: Sequence[str]) -> tuple[int, str] | None:
    """Return the shortest context in tokens and whose it is; None where no config says one."""
    found = []
    for artifact, name in zip(artifacts, names, strict=True):
        is_graph = artifact.runtime != TORCH
        context = find_context(artifact) if is_graph else read_spec(open_checkpoint(artifact.folder)).max_positions
        if context is not None:
            found.append((context, name))
    return min(found, default=None)


def find_graph(stack: ExitStack, artifact: Artifact, console: Console) -> Path:
    """Return the folder of an artifact's graph, a temporary export where it has none."""
    if artifact.runtime != TORCH:
        return artifact.folder
    return export_scratch(stack, open_checkpoint(artifact.folder), console)


def warn_threads(plan: BenchPlan, console: Console) -> None:
    """Say so when more threads are asked for than there are cores."""
    cores, most = count_cores(), max(threads or 0 for threads in plan.threads)
    if most > cores:
        console.warn(f"{most} threads share {cores} cores: they wait for each other, and rates come out low.")


# Processes


class Process:
    """A worker, which is killed when the block ends; it survives no interrupt and sees none from the terminal."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile()
        # A session of its own: an interrupt from the keyboard goes to all processes of the terminal's.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "backends.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env=make_environment(), start_new_session=True, text=True, encoding="utf-8",
        )  # fmt: skip

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the process: it holds nothing that is worth keeping."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass  # a request that nobody read
        self.errors.close()

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Return the answer; UserError for the user's mistake, RunFailure when the process is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **values}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RunFailure(self._explain_end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _explain_end(self) -> str:
        if self.process.wait() == -signal.SIGKILL:
            return "the process that ran the model was killed, probably for lack of memory; free some, or bench less."
        self.errors.seek(0)
        text = self.errors.read().decode("utf-8", "replace")
        return f"the process that ran the model ended ({find_error(text)})."


# Measuring


@dataclass
class Bench:
    """All measurements with one number of threads; `seconds` by case and model are those of each round."""

    models: Sequence[Measured]
    plan: BenchPlan
    length: Lengths
    threads: int | None
    console: Console
    seconds: dict[tuple[int, int, int], list[dict[str, float]]] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Batch and prompt of each combination."""
        return list(product(self.plan.batches, self.length.prompts))

    def measure(self) -> BenchRun:
        """Open the models, run all rounds, and return medians."""
        with ExitStack() as stack:
            loads, processes = self._open(stack)
            vocab = min(int(load["vocab"]) for own in loads for load in own)
            probe = stack.enter_context(Process())
            self._probe(probe)
            self._run_round(processes, vocab, 0, 0.0)  # the first of each pays for memory and caches; not counted
            self.seconds.clear()
            for number in range(1, self.plan.rounds + 1):
                self._run_round(processes, vocab, number, LEAST)
                self._probe(probe)
            self._show_progress((self.plan.rounds + 1) * len(self.cases))
            peaks = [process.ask("memory")["peak_bytes"] for process in processes]
        sides = [
            BenchProcess(spread([load["seconds"] for load in own]), peak, int(own[-1]["before_bytes"]))
            for own, peak in zip(loads, peaks, strict=True)
        ]
        bandwidth = spread(self.bandwidths)
        rows = tuple(self._describe_row(*case, bandwidth.median) for case in self.cases)
        return BenchRun(self.threads, bandwidth, sides[0] if len(sides) > 1 else None, sides[-1], rows)

    def _open(self, stack: ExitStack) -> tuple[list[list[dict[str, float]]], list[Process]]:
        """Open each model in a few fresh processes in turn; return what they said, and the last of each, still open."""
        loads: list[list[dict[str, float]]] = [[] for _ in self.models]
        kept: list[Process] = []
        count = min(self.plan.rounds, LOADS)
        for number in range(count):
            for model, own in zip(self.models, loads, strict=True):
                process = Process()
                with ExitStack() as own_stack:
                    own_stack.enter_context(process)
                    own.append(process.ask("open", folder=str(model.folder.absolute()), threads=self.threads))
                    if number == count - 1:
                        kept.append(process)
                        stack.push(own_stack.pop_all())
        return loads, kept

    def _probe(self, probe: Process) -> None:
        time.sleep(PAUSE)
        found = probe.ask("bandwidth", threads=self.threads, least=LEAST, sides=STREAM)
        self.bandwidths.append(found["bytes_per_s"])

    def _run_round(self, processes: Sequence[Process], vocab: int, number: int, least: float) -> None:
        """Give each model its turn at each case; every other round begins with the other model."""
        for place, (batch, prompt) in enumerate(self.cases):
            self._show_progress(number * len(self.cases) + place)
            order = range(len(processes))
            for index in order if number % 2 == 0 else reversed(order):
                time.sleep(PAUSE)
                shape = (batch, prompt, self.length.new)
                taken = processes[index].ask("time", shape=shape, vocab=vocab, least=least)
                self.seconds.setdefault((batch, prompt, index), []).append(taken)

    def _show_progress(self, done: int) -> None:
        stage = f"bench, {name_threads(self.threads)}"
        self.console.progress(stage, done, (self.plan.rounds + 1) * len(self.cases))

    def _describe_row(self, batch: int, prompt: int, bandwidth: float) -> BenchRow:
        last = len(self.models) - 1
        speeds = [self._describe_speed(batch, prompt, index, bandwidth) for index in range(last + 1)]
        if not last:
            return BenchRow(self.threads, batch, prompt, None, speeds[0], None, None)
        ratios = [
            spread([after / before for before, after in zip(first.values, second.values, strict=True)])
            for first, second in ((speeds[0].prefill, speeds[1].prefill), (speeds[0].decode, speeds[1].decode))
        ]
        return BenchRow(self.threads, batch, prompt, speeds[0], speeds[1], *ratios)

    def _describe_speed(self, batch: int, prompt: int, index: int, bandwidth: float) -> BenchSpeed:
        rounds, new = self.seconds[batch, prompt, index], self.length.new
        read = self.models[index].footprint.count_read(prompt, new, batch)
        return BenchSpeed(
            spread([batch * prompt / one["prefill"] for one in rounds]),
            spread([batch * new / one["decode"] for one in rounds]),
            spread([read * new / one["decode"] / bandwidth for one in rounds]),
            read,
        )


def spread(values: Sequence[float]) -> Spread:
    """Return median, least and most of what several rounds gave."""
    return Spread(statistics.median(values), min(values), max(values), tuple(values))


# Notes


def list_exports(models: Sequence[Measured]) -> list[str]:
    """Say which folders had no graph of their own."""
    made = dict.fromkeys(model.source for model in models if model.exported)
    return [f"{name} has no graph that Lightpress wrote: a temporary fp32 export was measured." for name in made]


def note_cache(models: Sequence[Measured]) -> list[str]:
    """Say so when a model's weights may stay in the processor's cache: memory then is not what limits decoding."""
    cache = find_cache() * MIB
    small = any(model.footprint.weight_bytes < cache for model in models)
    text = f"Weights smaller than the processor's cache ({cache / MIB:.0f} MiB) can be read faster than memory."
    return [text] if small else []


def note_noise(runs: Sequence[BenchRun]) -> list[str]:
    """Say so when the rounds of some number differ by much."""
    sides = [side for run in runs for row in run.rows for side in (row.dense, row.compressed) if side is not None]
    spreads = [own for side in sides for own in (side.prefill, side.decode)] + [run.bandwidth for run in runs]
    worst = max(own.high / own.low for own in spreads)
    return [f"Noisy machine: rounds differ by up to {worst:.1f}x; trust the ratios more."] if worst > NOISY else []
