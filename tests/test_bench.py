"""`lightpress bench`: bytes are counted as they lie in the graph, every combination is a row, nothing outlives it."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper
from refusals import refused
from tiny import make_checkpoint
from typer.testing import CliRunner

from backends import runtime
from backends.export_onnx import FUSED, STANDARD, GraphForm, export_onnx
from backends.footprint import CacheLayer, Footprint, open_stream, read_footprint
from backends.runtime import make_ids, time_turn
from backends.worker import Worker, answer_line
from cli import speed
from cli.app import app
from cli.bench import read_counts
from cli.console import Console, RunFailure
from cli.render import format_rounded, render_bench
from cli.request import BenchPlan
from cli.speed import Lengths, Process, note_noise, warn_threads
from compress.checkpoint import open_checkpoint
from compress.quantize.stream import LayerQuantiser, WeightForm
from compress.report import BenchModel, BenchProcess, BenchReport, BenchRow, BenchRun, BenchSpeed, Spread
from compress.weights import read_spec

Maker = Callable[[str, str], tuple[Path, Path]]
ROOT = Path(__file__).resolve().parents[1]
BITS = {"int8": 8, "int4": 4}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Return a function from a case and a format to a checkpoint and its graph, which tests must not change."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def write(case: str, kind: str) -> tuple[Path, Path]:
        if (case, kind) not in made:
            root = tmp_path_factory.mktemp("bench")
            checkpoint = open_checkpoint(make_checkpoint(root / "model", case))
            form = {"fp32": FUSED, "standard": STANDARD}.get(kind)
            if form is not None:
                export_onnx(checkpoint, root / "graph", form=form)
            else:
                weights = WeightForm(BITS[kind], 32, False, "nearest")
                with LayerQuantiser(checkpoint, read_spec(checkpoint), weights, None) as quantiser:
                    export_onnx(checkpoint, root / "graph", form=GraphForm(quantiser=quantiser))
            made[case, kind] = root / "model", root / "graph"
        return made[case, kind]

    return write


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting, and a small product for the bandwidth."""
    monkeypatch.setattr(speed, "PAUSE", 0.0)
    monkeypatch.setattr(speed, "LEAST", 0.0)
    monkeypatch.setattr(speed, "STREAM", (64, 64))
    monkeypatch.setattr(speed, "LOADS", 1)


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


# Bytes


def load_arrays(graph: Path) -> dict[str, np.ndarray]:
    """All stored arrays but shapes and switches, read from the data file."""
    model = onnx.load(graph / "model.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: array for name, array in arrays.items() if array.dtype.kind not in "ib" or array.itemsize == 1}


COUNTED = [
    *(("llama", kind) for kind in ("fp32", "standard", "int8", "int4")),
    *(("llama-tied", kind) for kind in ("fp32", "int4")),
    *product(("gemma2", "phi3-longrope", "qwen3"), ("fp32", "int4")),
]


@pytest.mark.parametrize(("case", "kind"), COUNTED)
def test_weights_read_are_all_arrays_but_tables_that_are_looked_up(make: Maker, case: str, kind: str) -> None:
    checkpoint, graph = make(case, kind)
    tied = read_spec(open_checkpoint(checkpoint)).shape.tied
    wanted = 0
    for name, array in load_arrays(graph).items():
        looked_up = name.startswith("rope.") or (name.startswith("embed.") and not tied)
        wanted += 0 if looked_up else array.nbytes
    found = read_footprint(graph)
    assert found.weight_bytes == wanted
    assert found.format == ("fp32" if kind == "standard" else kind)
    assert found.file_bytes == sum((graph / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


@pytest.mark.parametrize("case", ["llama", "gemma2", "mistral", "phi3-partial"])
def test_read_bytes_equal_a_loop_over_steps_layers_and_rows(make: Maker, case: str) -> None:
    checkpoint, graph = make(case, "fp32")
    found, spec = read_footprint(graph), read_spec(open_checkpoint(checkpoint))
    for prompt, new, batch in ((3, 5, 1), (9, 4, 3), (40, 1, 2)):
        total = 0
        for step in range(new):
            total += found.weight_bytes
            for _ in range(batch):
                for layer in spec.layers:
                    seen = prompt + step + 1
                    seen = min(seen, layer.window) if layer.window else seen
                    total += seen * 2 * layer.shape.kv_heads * layer.shape.head_dim * 4
        assert found.count_read(prompt, new, batch) == pytest.approx(total / new, rel=1e-12)


def test_folders_without_a_whole_graph_are_refused(make: Maker, tmp_path: Path) -> None:
    refused(lambda: read_footprint(tmp_path), "model.onnx", "export")
    data = (make("llama", "fp32")[1] / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(data[: len(data) // 2])
    refused(lambda: read_footprint(tmp_path), "cut short")
    (tmp_path / "model.onnx").write_bytes(data)
    refused(lambda: read_footprint(tmp_path), "model.onnx.data", "missing")


def test_bandwidth_counts_the_bytes_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 24)
    monkeypatch.setattr("backends.footprint.time_calls", lambda call, least: least if call()[0].shape == shape else 0.0)
    assert open_stream(1, (16, 24))(0.5) == 16 * 24 * 4 / 0.5


# Turns


class Counter:
    """A runtime that only counts."""

    vocab = 10

    def __init__(self) -> None:
        self.prefills, self.decodes = [], []

    def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None, every: bool = True) -> tuple[np.ndarray, None]:
        self.prefills.append(ids.shape)
        return np.zeros((1, 1, 10)), None

    def decode(self, ids: np.ndarray, cache: None) -> tuple[np.ndarray, None]:
        self.decodes.append(ids.shape)
        return np.zeros((1, 1, 10)), None


def test_a_turn_repeats_short_rounds_and_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(0.5, 0.0), (0.25, 0.125), (0.25, 0.25), (0.0, 0.5)])
    monkeypatch.setattr(runtime, "time_round", lambda *_: next(seconds))
    found = time_turn(Counter(), make_ids(10, 1, 4), 2, 1.0)
    assert found == (pytest.approx(0.5 / 3), pytest.approx(0.875 / 3))  # without the first, which wakes threads
    monkeypatch.setattr(runtime, "time_round", lambda *_: (3.0, 4.0))
    assert time_turn(Counter(), make_ids(10, 1, 4), 2, 1.0) == (3.0, 4.0)


def test_a_round_prefills_once_and_decodes_the_rest_for_all_rows() -> None:
    model = Counter()
    time_turn(model, make_ids(10, 3, 7), 5, 0.0)
    assert model.prefills == [(3, 5)]
    assert model.decodes == [(3, 1), (3, 1)]


def test_ids_are_the_same_in_every_process(make: Maker) -> None:
    code = "from backends.runtime import make_ids; print(make_ids(96, 2, 3).tolist())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == make_ids(96, 2, 3).tolist()
    assert len({tuple(row) for row in make_ids(96, 2, 8).tolist()}) == 2


# Worker processes


def test_a_worker_answers_or_says_what_is_wrong(make: Maker, tmp_path: Path) -> None:
    graph, worker = make("llama", "int4")[1], Worker()
    opened = answer_line(worker, json.dumps({"do": "open", "folder": str(graph), "threads": 1}))
    assert opened["vocab"] == 96
    for batch in (1, 3):
        request = {"do": "time", "shape": (batch, 6, 2), "vocab": 96, "least": 0.0}
        assert min(answer_line(worker, json.dumps(request)).values()) > 0
    huge = {"do": "time", "shape": (2**36, 6, 2), "vocab": 96, "least": 0.0}
    error = answer_line(worker, json.dumps({"do": "open", "folder": str(tmp_path), "threads": 1}))["error"]
    assert "model.onnx" in error and "Traceback" not in error
    assert set(answer_line(worker, json.dumps(huge))) == {"error"}


def test_memory_is_the_workers_own() -> None:
    ballast = np.ones(400 * 2**20, np.uint8)
    with Process() as process:
        peak = process.ask("memory")["peak_bytes"]
    assert 10 * 2**20 < peak < len(ballast)
    assert process.process.poll() is not None


def test_a_worker_that_dies_is_one_sentence() -> None:
    with Process() as process:
        process.ask("memory")
        process.process.kill()
        with pytest.raises(RunFailure, match="killed, probably for lack of memory"):
            process.ask("memory")
    with Process() as process, pytest.raises(RunFailure, match=r"ended \(KeyError: 'nothing'\)\.$"):
        process.ask("nothing")


def test_a_worker_ends_with_its_input() -> None:
    """So that it does not outlive a parent that was killed."""
    command = [sys.executable, "-m", "backends.worker"]
    request = json.dumps({"do": "memory"}) + "\n"
    ran = subprocess.run(command, input=request, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert set(json.loads(ran.stdout)) == {"peak_bytes"}


# The verb


def test_every_combination_is_a_row(make: Maker, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, ...]] = []
    ask = Process.ask

    def watch(self: Process, do: str, **values: Any) -> dict[str, Any]:
        if do == "time":
            turns.append((self.process.pid, *values["shape"]))
        return ask(self, do, **values)

    steps: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Process, "ask", watch)
    monkeypatch.setattr(Console, "progress", lambda self, *step: steps.append(step))
    checkpoint, graph = make("llama", "int4")
    ran = bench(
        graph, "--against", checkpoint, "--prompt", "4,7", "--batch", "1,3", "--threads", "1,2", "--new", 2,
        "--rounds", 2, "--json",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.stderr
    found = json.loads(ran.stdout)
    rows = [row for run in found["runs"] for row in run["rows"]]
    assert [(row["threads"], row["batch"], row["prompt"]) for row in rows] == list(product((1, 2), (1, 3), (4, 7)))
    assert (found["dense"]["format"], found["compressed"]["format"]) == ("fp32", "int4")
    assert (found["dense"]["graph"], found["compressed"]["graph"]) == (None, str(graph / "model.onnx"))
    assert any("temporary fp32 export" in note for note in found["notes"])
    for run in found["runs"]:
        check_run(run, 2)
    # Fresh processes for each number of threads; each case in turn, and every other round the other way round.
    order = [turn[1:] for turn in turns[: len(turns) // 2]]
    cases = [(batch, prompt, 2) for batch, prompt in product((1, 3), (4, 7)) for _ in range(2)]
    assert order == cases * 3
    first, second = turns[0][0], turns[1][0]
    assert [turn[0] for turn in turns[:24:2]] == [first] * 4 + [second] * 4 + [first] * 4
    assert not {first, second} & {turn[0] for turn in turns[24:]}
    assert not any(psutil.pid_exists(turn[0]) for turn in turns)
    bars = [step for step in steps if step[0] != "export"]
    assert bars == [(f"bench, {name}", done, 12) for name in ("1 thread", "2 threads") for done in range(13)]


def check_run(run: dict[str, Any], rounds: int) -> None:
    """What is derived follows from the rounds, and the memory of the model shows."""
    for side in ("dense", "compressed"):
        assert run[side]["peak_bytes"] > run[side]["before_bytes"] > 0
    assert len(run["bandwidth"]["values"]) == rounds + 1
    for row in run["rows"]:
        for kind in ("prefill", "decode"):
            before, after = row["dense"][kind]["values"], row["compressed"][kind]["values"]
            assert len(before) == rounds
            assert row[f"{kind}_ratio"]["median"] == statistics.median(
                b / a for a, b in zip(before, after, strict=True)
            )
        for side in (row["dense"], row["compressed"]):
            for share, rate in zip(side["bandwidth_share"]["values"], side["decode"]["values"], strict=True):
                assert share * run["bandwidth"]["median"] == pytest.approx(rate / row["batch"] * side["step_bytes"])


def test_folders_of_each_kind_are_measured(make: Maker, quick: None, tmp_path: Path) -> None:
    """A checkpoint with a graph inside, a standard graph, each alone; the weights of the first are not opened."""
    checkpoint, graph = make("gemma2", "int8")
    left = set(Path(speed.tempfile.gettempdir()).glob("lightpress-bench-*"))
    (tmp_path / "model" / "onnx").mkdir(parents=True)
    for source, target in ((checkpoint, tmp_path / "model"), (graph, tmp_path / "model" / "onnx")):
        for path in source.iterdir():
            (target / path.name).symlink_to(path)
    few = ("--prompt", 3, "--new", 1, "--rounds", 1, "--threads", 1)
    inside = bench(tmp_path / "model", *few, "--json", "-q")
    assert json.loads(inside.stdout)["compressed"]["graph"] == str(tmp_path / "model" / "onnx" / "model.onnx")
    alone = bench(make("llama", "standard")[1], *few, "--batch", 2)
    assert alone.exit_code == 0, alone.stderr
    assert "dense" not in alone.stdout and "ratio" not in alone.stdout
    assert re.search(r"^1 +2 +3 +[0-9.k]+$", alone.stdout, re.MULTILINE)
    assert set(Path(speed.tempfile.gettempdir()).glob("lightpress-bench-*")) <= left


def test_too_many_threads_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warn_threads(BenchPlan(threads=(None, 1)), Console())
    assert capsys.readouterr().err == ""
    warn_threads(BenchPlan(threads=(1, 4096)), Console(quiet=True))
    assert "4096 threads share" in capsys.readouterr().err


def test_external_data_cut_short_is_the_workers_sentence(make: Maker, tmp_path: Path) -> None:
    for path in make("llama", "fp32")[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: -64 if path.suffix == ".data" else None])
    ran = bench(tmp_path, "--prompt", 3, "--new", 1)
    assert ran.exit_code == 2
    assert "cut short" in ran.stderr and "Traceback" not in ran.stderr


def test_a_stopped_bench_leaves_no_process_and_no_export(make: Maker, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    command = [sys.executable, "-m", "cli.app", "bench", str(make("llama", "fp32")[0]), "--rounds", "10000", "-q"]
    child = subprocess.Popen(command, env=environment, preexec_fn=listen, stderr=subprocess.PIPE, text=True)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not workers and child.poll() is None and time.monotonic() < deadline:
        workers = psutil.Process(child.pid).children()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert workers
    assert child.returncode == 1
    assert errors == "lightpress: stopped; nothing was kept\n"
    assert not any(worker.is_running() for worker in workers)
    assert list(tmp_path.glob("lightpress-*")) == []


# What was asked for


@pytest.mark.parametrize(
    ("prompts", "new", "context", "wanted"),
    [
        ((), None, 1024, ((128,), 32)),
        ((), None, None, ((128,), 32)),
        ((), None, 100, ((68,), 32)),
        ((), None, 40, ((20,), 20)),
        ((), None, 2, ((1,), 1)),
        ((30, 8), None, 40, ((30, 8), 10)),
        ((39,), None, 40, ((39,), 1)),
        ((), 30, 40, ((10,), 30)),
        ((8, 30), 10, 40, ((8, 30), 10)),
    ],
)
def test_defaults_are_fitted_to_the_context(
    prompts: tuple[int, ...], new: int | None, context: int | None, wanted: tuple[tuple[int, ...], int]
) -> None:
    found = Lengths.fit(BenchPlan(prompts, new=new), None if context is None else (context, "here"))
    assert (found.prompts, found.new) == wanted
    asked = (prompts or (128,), new or 32)
    assert bool(found.notes) == (asked != wanted)


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [((4, 40), None, ("--prompt 40",)), ((), 40, ("--new 40",)), ((30, 2), 11, ("--prompt 30 and --new 11",))],
)
def test_what_was_asked_for_must_fit_the_context(
    prompts: tuple[int, ...], new: int | None, words: tuple[str, ...]
) -> None:
    refused(lambda: Lengths.fit(BenchPlan(prompts, new=new), (40, "here")), "here holds 40 tokens", *words)


def test_the_shorter_context_counts(make: Maker, tmp_path: Path) -> None:
    short = make_checkpoint(tmp_path / "short", "llama", max_position_embeddings=16)
    for pair in ((short, make("llama", "fp32")[1]), (make("llama", "fp32")[1], short)):
        ran = bench(pair[0], "--against", pair[1], "--prompt", 16)
        assert (ran.exit_code, "short holds 16 tokens" in ran.stderr) == (2, True)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "a", "1,2,", "-1", "1.5", "1 2", "9999999999", "²"])
def test_bad_lists_are_refused(text: str) -> None:
    refused(lambda: read_counts("--batch", text), "--batch", "whole numbers")


def test_lists_are_read_in_order_and_each_number_once() -> None:
    assert read_counts("--batch", "4") == (4,)
    assert read_counts("--batch", " 4, 1,04,2") == (4, 1, 2)
    assert read_counts("--batch", None) == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "0"), "--batch 0 is not a list"),
        (("--prompt", "300"), "--prompt 300 cannot be measured"),
        (("--against", "empty"), "empty holds no model"),
    ],
)
def test_mistakes_are_one_sentence(
    make: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    ran = bench(make("llama", "fp32")[1], *arguments)
    assert ran.exit_code == 2
    assert words in ran.stderr and ran.stderr.count("\n") == 1


# The table


def spread(*values: float) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), values)


def make_report(scale: float) -> BenchReport:
    """A report of extreme numbers."""
    rates = spread(scale * 0.9999, scale * 0.99999, scale)
    side = BenchSpeed(rates, rates, spread(0.1234, 0.9999, 1.2345), 1e9)
    row = BenchRow(128, 1024, 131072, side, side, spread(0.1111, 12.3456, 99.9999), spread(1.0, 1.0, 1.0))
    process = BenchProcess(spread(100.111, 222.222, 333.333), 1023 * 2**30, 2**26)
    run = BenchRun(128, spread(1e9, 2e9, 3e9), process, process, (row,))
    model = BenchModel("folder", Path("folder"), "int4", 1023 * 2**30, 1022 * 2**30)
    return BenchReport(model, model, 64, 3, "ONNX Runtime", (run,), ("A note " * 40,))


@pytest.mark.parametrize("scale", [1.0, 99.99, 9999.0, 99999.0, 999999.0, 9.9e6])
def test_tables_fit_a_hundred_columns(scale: float) -> None:
    lines = render_bench(make_report(scale)).splitlines()
    assert max(map(len, lines)) <= 100
    assert re.match("128 +1024 +131072 ", lines[2])


def test_rates_have_three_digits_or_more() -> None:
    values = (0.004, 7.254, 72.54, 725.4, 7254, 72540, 725400, 7254000)
    assert [format_rounded(value) for value in values] == [
        "0.00", "7.25", "72.5", "725", "7254", "72.5k", "725k", "7.25M",
    ]  # fmt: skip


def test_noise_is_said_where_rounds_differ() -> None:
    report = make_report(100.0)
    assert note_noise(report.runs) != []  # the bandwidth: 1 to 3 GB/s
    calm = [BenchRun(1, spread(1.0, 1.4), run.dense, run.compressed, run.rows) for run in report.runs]
    assert note_noise(calm) == []


def test_small_models_are_said_to_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "find_cache", lambda: 1.0)
    layers = (CacheLayer(4),)
    models = [
        speed.Measured("a", Path("a"), Footprint("fp32", size, size, layers), False) for size in (2**20 - 1, 2**20)
    ]
    assert "1 MiB" in speed.note_cache(models)[0]
    assert speed.note_cache(models[1:]) == []
