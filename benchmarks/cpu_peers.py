"""The same weights through this exporter and through its peers, each in fresh processes, in turns.

    python benchmarks/cpu_peers.py [--model FOLDER] [--formats int4,int8,fp32] [--rounds 5] [--threads 2]
                                   [--only WORDS] [--work FOLDER] [--json FILE]

Without --model a synthetic decoder of 254 M parameters is written (hidden 1024, 16 layers, 16/8 heads, FFN 2816).
Peers: onnxruntime-genai with the folder of its own builder, llama.cpp (F32, Q8_0, Q4_0) and OpenVINO GenAI (int8 and
int4 by nncf), installed into an environment of their own (benchmarks/.peers/venv, ignored by git) the first time: that
needs the network, and five to ten minutes to compile llama.cpp. A peer that cannot be installed, built or run is left
out with its reason. Before anything is timed, each one's logits after a fixed prompt are compared with our decoder's.

Every round measures the bandwidth of memory and runs each runtime once: prefill of 512 tokens, 64 tokens after a prompt
of 64 (peer_runs.py). Tables: medians over the rounds with the least and the most; ours against each peer as the median
of the rounds' ratios. Limit: the bytes of weights that a token reads (no embedding) at the same round's bandwidth.
--only: runtimes whose title contains one of these words, by commas (`ours` is in all that are ours).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peer_runs import probe_ids

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers"
RUNS, BUILDS = HERE / "peer_runs.py", HERE / "peer_builds.py"
TOKENIZER = HERE.parents[1] / "shared/checkpoints/stories260K"
TORCH = "torch==2.13.0"
# What each peer needs, and the module that shows that it is there; torch goes first and alone.
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("torch", (TORCH,)),
    "transformers": ("transformers", ("transformers>=5.23", "onnx_ir")),
    "genai": ("onnxruntime_genai", ("onnxruntime-genai",)),
    "openvino": ("openvino_genai", ("openvino", "openvino-genai", "openvino-tokenizers")),
    "nncf": ("nncf", ("nncf",)),
    "llama": ("llama_cpp", ("llama-cpp-python", "gguf")),
}
OURS, OURS_GENAI, OURS_W8A8 = "ours, ONNX Runtime", "ours, onnxruntime-genai", "ours in w8a8, ONNX Runtime"
LLAMA = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
KEYS = ("prefill", "decode")
LEAST_COSINE = {"fp32": 0.9999, "int8": 0.99, "int4": 0.8}  # below it, it is another model
LONG = 24 * 3600.0
# How llama.cpp is compiled: without its part for pictures, which is a third of the work.
COMPILING = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}


@dataclass(frozen=True)
class Run:
    """One row: its title, the environment's python, the engine of peer_runs.py, the folder, OpenVINO's precision."""

    title: str
    python: Path
    engine: str
    folder: Path
    hint: str = "default"


@dataclass(frozen=True)
class Place:
    """Where things are: the checkpoint, the folder of what is built, the peers' python."""

    model: Path
    work: Path
    python: Path


class PeerError(Exception):
    """A peer could not be installed, built or run; the message is one line."""


def call(command: Sequence[str | Path], limit: float = LONG) -> str:
    """Run a command and return its output; PeerError with its last line when it fails or takes too long."""
    given = [str(part) for part in command]
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # --threads says how many
    env |= {"HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **COMPILING}
    try:
        done = subprocess.run(given, capture_output=True, text=True, env=env, cwd=HERE.parent, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"took longer than {limit:.0f} s") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PeerError(f"exit {done.returncode}: {lines[-1][:200] if lines else 'no message'}")
    return done.stdout


# What is needed


def prepare_peers() -> Path:
    """Return the python of the peers' environment, with whatever of them can be installed."""
    python = PEERS / "venv/bin/python"
    if not python.exists():
        call([sys.executable, "-m", "venv", PEERS / "venv"])
    bounds = PEERS / "constraints.txt"
    bounds.write_text(f"{TORCH}\n", encoding="utf-8")
    for name, (module, packages) in NEEDS.items():
        if not has_module(python, module):
            print(f"installing {name} into {PEERS}", file=sys.stderr, flush=True)
            try:
                call([python, "-m", "pip", "install", "-q", "-c", bounds, *packages])
            except PeerError as error:
                print(f"{name} is left out, pip cannot install it: {error}", flush=True)
    return python


def has_module(python: Path, name: str) -> bool:
    """Return whether an environment has a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([str(python), "-c", code]).returncode == 0


def prepare_model(folder: Path | None, work: Path) -> Path:
    """Return the checkpoint: the one given, or the synthetic one with a tokenizer that builders ask for."""
    if folder is not None:
        return folder.resolve()
    made = work / "dense"
    if not made.exists():
        import torch
        from synthetic import write_model

        write_model(made, 16, torch.float32)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (TOKENIZER / name).is_file():
                shutil.copy(TOKENIZER / name, made)
    return made


def build_folder(out: Path, last: str, build: Callable[[Path], Any]) -> Path:
    """Build a folder beside its place and move it there; nothing to do when it has its `last` file."""
    if not (out / last).exists():
        print(f"building {out.name}", file=sys.stderr, flush=True)
        draft = out.with_name(f"{out.name}.part")
        for old in (out, draft):
            shutil.rmtree(old, ignore_errors=True)
        try:
            build(draft)
        except PeerError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        draft.rename(out)
    return out


def build_ours(place: Place, name: str) -> Path:
    """Export our folder of one format; rounding to the nearest, as speed does not depend on the values."""
    method: list[str] = [] if name == "fp32" else ["--method", "nearest"]
    method += ["--ends", "4"] if name == "int4" else []  # as the peers' heads; what --ends auto takes is for quality

    def build(out: Path) -> None:
        given: list[str | Path] = ["export", place.model, "--format", name, "-o", out, "--overwrite", "-q", *method]
        call([sys.executable, "-m", "cli.app", *given])

    return build_folder(place.work / f"lightpress-{name}", "genai_config.json", build)


def build_genai(place: Place, name: str) -> Path:
    """Build the folder of onnxruntime-genai's own builder."""
    options: list[str] = ["--extra_options", "int4_accuracy_level=4"] if name == "int4" else []

    def build(out: Path) -> None:
        builder = ["-m", "onnxruntime_genai.models.builder", "-p", name, "-e", "cpu"]
        call([place.python, *builder, "-i", place.model, "-o", out, "-c", place.work / "builder-cache", *options])

    return build_folder(place.work / f"genai-{name}", "genai_config.json", build)


def build_other(place: Place, peer: str, name: str) -> Path:
    """Build llama.cpp's or OpenVINO's folder."""
    return build_folder(
        place.work / f"{peer}-{name}",
        "peer.json",
        lambda out: call([place.python, BUILDS, peer, place.model, out, name]),
    )


def list_runs(place: Place, name: str) -> list[tuple[str, Callable[[], Run]]]:
    """Return the title of every runtime of a format, and what builds its folder."""

    def ours(title: str, python: Path, engine: str) -> tuple[str, Callable[[], Run]]:
        return title, lambda: Run(title, python, engine, build_ours(place, name))

    def ours_w8a8() -> Run:
        return Run(OURS_W8A8, Path(sys.executable), "ours", build_ours(place, "w8a8"))

    def openvino(hint: str) -> tuple[str, Callable[[], Run]]:
        title = f"OpenVINO GenAI, computing in {hint}"
        return title, lambda: Run(title, place.python, "openvino-genai", build_other(place, "openvino", name), hint)

    genai, llama = "genai builder, onnxruntime-genai", f"llama.cpp {LLAMA[name]}"
    return [
        ours(OURS, Path(sys.executable), "ours"),
        ours(OURS_GENAI, place.python, "genai"),
        *([(OURS_W8A8, ours_w8a8)] if name == "int8" else []),
        (genai, lambda: Run(genai, place.python, "genai", build_genai(place, name))),
        (llama, lambda: Run(llama, place.python, "llama", build_other(place, "gguf", name))),
        openvino("f32"),
        openvino("bf16"),
    ]


# Sizes, and whether it is the same model


def count_bytes(folder: Path) -> int:
    """Return the bytes of weights that one decoded token reads: all but tables that rows are only picked from."""
    if (folder / "peer.json").exists():
        return int(json.loads((folder / "peer.json").read_text(encoding="utf-8"))["token_bytes"])
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    picking = ("Gather", "GatherBlockQuantized", "Reshape")  # a table of codes is reshaped before rows are picked
    used = {name for node in graph.node if node.op_type not in picking for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    return sum(count_tensor(tensor) for tensor in kept)


def count_tensor(tensor: Any) -> int:
    """Return the bytes of an ONNX tensor."""
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return int(tensor.ByteSize())


def count_disk(folder: Path) -> int:
    """Return the bytes of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def find_truth(model: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Return our decoder's logits after the fixed prompt, and its greedy tokens."""
    from backends.eager import load_eager
    from compress.checkpoint import open_checkpoint

    loaded = load_eager(open_checkpoint(model))
    return loaded.prefill(probe_ids()[None], every=False)[0][0, -1], loaded.generate(probe_ids(), 8)


def check_run(run: Run, name: str, truth: tuple[np.ndarray[Any, Any], list[int]], threads: int) -> str:
    """Say how near a runtime is to our decoder; PeerError when it runs another model."""
    file = run.folder.parent / "probe.npy"
    call([*command_run(run, threads), "--check", file], 600)
    found, (logits, tokens) = np.load(file), truth
    if len(found) == len(tokens):  # greedy tokens: the runtime shows no logits
        same = int((found == np.array(tokens)).sum())
        if not (found == tokens[: len(found)]).all() and name == "fp32" and run.hint == "f32":
            raise PeerError(f"it runs another model: tokens {found.tolist()} for {tokens}")
        return f"{same} of {len(tokens)} greedy tokens"
    cosine = float(found @ logits / np.linalg.norm(found) / np.linalg.norm(logits))
    if cosine < LEAST_COSINE[name]:
        raise PeerError(f"it runs another model: cosine of logits {cosine:.4f}")
    return f"cosine of logits {cosine:.5f}"


# Rounds


def command_run(run: Run, threads: int) -> list[str | Path]:
    """Return the command of one measurement."""
    return [run.python, RUNS, run.engine, run.folder, "--threads", str(threads), "--hint", run.hint]


def read_line(output: str) -> dict[str, float]:
    """Return the JSON object that is the last line."""
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def open_runs(place: Place, name: str, options: argparse.Namespace) -> list[tuple[Run, dict[str, Any]]]:
    """Build and check what can be; print a line for what cannot."""
    words = options.only.split(",") if options.only else [""]
    wanted = [pair for pair in list_runs(place, name) if any(word in pair[0] for word in words)]
    truth, kept = find_truth(place.model), []
    for title, make in wanted:
        try:
            run = make()
            checked = check_run(run, name, truth, options.threads)
            sizes = {"size_mb": count_disk(run.folder) / 1e6, "token_mb": count_bytes(run.folder) / 1e6}
            kept.append((run, {**sizes, "check": checked}))
        except PeerError as error:
            print(f"{name}: {title} is left out: {error}", flush=True)
    return kept


def run_rounds(runs: Sequence[Run], rounds: int, threads: int) -> tuple[list[float], dict[str, list[dict[str, float]]]]:
    """Return the bandwidth of every round and the rows by title; each round begins with another runtime.

    A runtime that fails in any round is left out.
    """
    bandwidths: list[float] = []
    rows: dict[str, list[dict[str, float]]] = {run.title: [] for run in runs}
    for turn in range(rounds):
        measured = call([sys.executable, RUNS, "bandwidth", "--threads", str(threads)])
        bandwidths.append(read_line(measured)["gb_per_s"])
        start = turn % max(1, len(runs))
        for run in (*runs[start:], *runs[:start]):
            if run.title not in rows:
                continue
            try:
                rows[run.title].append(read_line(call(command_run(run, threads), 900)))
            except PeerError as error:
                print(f"{run.title} is left out in round {turn + 1}: {error}", flush=True)
                del rows[run.title]
    return bandwidths, rows


def measure_format(place: Place, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one format."""
    opened = open_runs(place, name, options)
    bandwidths, rows = run_rounds([run for run, _ in opened], options.rounds, options.threads)
    runs = {run.title: {**facts, "rounds": rows[run.title]} for run, facts in opened if run.title in rows}
    return {"bandwidth_gb_per_s": bandwidths, "runs": runs}


# Tables


def spread(values: Sequence[float], digits: int) -> str:
    """Write a median with the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def find_shares(found: dict[str, Any], title: str) -> list[float]:
    """Return, per round, the bandwidth that decoding makes use of as a share of the measured one."""
    run = found["runs"][title]
    used = [row["decode"] * run["token_mb"] / 1e3 for row in run["rounds"]]
    return [one / most for one, most in zip(used, found["bandwidth_gb_per_s"], strict=True)]


def find_ratios(runs: dict[str, Any], first: str, second: str, key: str) -> list[float]:
    """Return the ratio of two runtimes in every round."""
    pairs = zip(runs[first]["rounds"], runs[second]["rounds"], strict=True)
    return [one[key] / other[key] for one, other in pairs]


def show_rates(results: dict[str, Any]) -> None:
    """Print the rows."""
    print("\n| format | runtime | prefill 512 tok/s | decode tok/s | of limit | load s | RSS MB | disk MB | MB/token |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, found in results.items():
        for title, run in found["runs"].items():
            values = {key: [row[key] for row in run["rounds"]] for key in run["rounds"][0]}
            print(
                f"| {name} | {title} | {spread(values['prefill'], 0)} | {spread(values['decode'], 1)} | "
                f"{spread(find_shares(found, title), 2)} | {statistics.median(values['load_s']):.1f} | "
                f"{statistics.median(values['rss_mb']):.0f} | {run['size_mb']:.0f} | {run['token_mb']:.0f} |"
            )


def show_ratios(results: dict[str, Any]) -> None:
    """Print each of ours against every peer."""
    print("\n| format | ours | peer | prefill: ours / peer | decode: ours / peer |")
    print("|---|---|---|---|---|")
    for name, found in results.items():
        runs = found["runs"]
        own = [title for title in (OURS, OURS_GENAI, OURS_W8A8) if title in runs]
        for one in own:
            for title in runs:
                if title not in own:
                    cells = " | ".join(spread(find_ratios(runs, one, title, key), 2) for key in KEYS)
                    print(f"| {name} | {one.removeprefix('ours, ')} | {title} | {cells} |")


def show_checks(results: dict[str, Any]) -> None:
    """Print how near each runtime is to our decoder, and the bandwidth of the rounds."""
    print()
    for name, found in results.items():
        near = "; ".join(f"{title}: {run['check']}" for title, run in found["runs"].items())
        print(f"{name}: read bandwidth {spread(found['bandwidth_gb_per_s'], 1)} GB/s. Against our decoder: {near}.")


def name_machine() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--formats", default="int4,int8,fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the tables and write the numbers."""
    options = read_options()
    work = (options.work or PEERS / ("synthetic" if options.model is None else options.model.resolve().name)).resolve()
    work.mkdir(parents=True, exist_ok=True)
    PEERS.mkdir(exist_ok=True)
    place = Place(prepare_model(options.model, work), work, prepare_peers())
    results = {name: measure_format(place, name, options) for name in options.formats.split(",")}
    results = {name: found for name, found in results.items() if found["runs"]}
    facts = {"machine": name_machine(), "threads": options.threads, "rounds": options.rounds, "model": str(place.model)}
    file = options.json or work / "results.json"
    file.write_text(json.dumps({**facts, "formats": results}, indent=1), encoding="utf-8")
    show_rates(results)
    show_ratios(results)
    show_checks(results)
    print(f"\n{facts['machine']}, {options.threads} threads, {options.rounds} rounds; all numbers in {file}")


if __name__ == "__main__":
    main()
