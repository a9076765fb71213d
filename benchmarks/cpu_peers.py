"""The same weights through this exporter and through onnxruntime-genai's builder, in fresh processes, in turns.

    python benchmarks/cpu_peers.py [--model FOLDER] [--formats int4,int8,fp32] [--rounds 3] [--threads 2]

Without --model a synthetic decoder of 254 M parameters is written (hidden 1024, 16 layers, 16/8 heads, FFN 2816). The
peer is installed into an environment of its own (benchmarks/.peers, ignored by git) the first time; it needs the
network. Both folders are run by onnxruntime-genai and ours by plain ONNX Runtime too: prefill of 512 tokens, then 64
decoded after a prompt of 64; load time, memory, size. Each round is a fresh process per runtime; medians of the rounds.
llama.cpp and OpenVINO are not measured here yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers"
TOKENIZER = HERE.parents[1] / "shared/checkpoints/stories260K"
PACKAGES = ("onnxruntime-genai", "onnx_ir", "transformers>=5", "torch")
PREFILL, PROMPT, NEW = 512, 64, 64

RUN_GENAI = """
import json, sys, time, resource, numpy as np
started = time.perf_counter()
import onnxruntime_genai as og
folder, prefill, prompt, new, threads = sys.argv[1], *map(int, sys.argv[2:6])
config = og.Config(folder)
config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
model = og.Model(config)
loaded = time.perf_counter() - started
ids = np.random.default_rng(0).integers(3, 500, prefill).astype(np.int32)
def generator(length):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length + new + 8, do_sample=False, min_length=length + new)
    return og.Generator(model, parameters)
times = []
for _ in range(4):
    one = generator(prefill); t = time.perf_counter(); one.append_tokens(ids[None])
    times.append(time.perf_counter() - t)
rates = []
for _ in range(4):
    one = generator(prompt); one.append_tokens(ids[None, :prompt]); t = time.perf_counter()
    for _ in range(new): one.generate_next_token()
    rates.append(new / (time.perf_counter() - t))
print(json.dumps({"load_s": loaded, "prefill": prefill / min(times[1:]), "decode": max(rates[1:]),
    "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""
RUN_OURS = """
import json, sys, time, resource
sys.path.insert(0, sys.argv[6])
started = time.perf_counter()
import numpy as np
from pathlib import Path
from backends.ort import open_onnx
folder, prefill, prompt, new, threads = sys.argv[1], *map(int, sys.argv[2:6])
model = open_onnx(Path(folder), threads)
loaded = time.perf_counter() - started
ids = np.random.default_rng(0).integers(3, 500, (1, prefill))
times, rates = [], []
for _ in range(4):
    t = time.perf_counter(); model.prefill(ids, every=False); times.append(time.perf_counter() - t)
for _ in range(4):
    logits, cache = model.prefill(ids[:, :prompt], every=False); t = time.perf_counter()
    for _ in range(new):
        logits, cache = model.decode(np.array([[int(logits[0, -1].argmax())]]), cache)
    rates.append(new / (time.perf_counter() - t))
print(json.dumps({"load_s": loaded, "prefill": prefill / min(times[1:]), "decode": max(rates[1:]),
    "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def prepare_peers() -> Path:
    """Return the python of the peers' environment, made the first time."""
    python = PEERS / "venv/bin/python"
    if not python.exists():
        print("installing the peer into benchmarks/.peers", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEERS / "venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def prepare_model(folder: Path | None) -> Path:
    """Return the checkpoint: the one given, or the synthetic one with a tokenizer that builders ask for."""
    if folder is not None:
        return folder
    import torch
    from synthetic import write_model

    made = PEERS / "dense"
    if not made.exists():
        PEERS.mkdir(exist_ok=True)
        write_model(made, 16, torch.float32)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (TOKENIZER / name).is_file():
                shutil.copy(TOKENIZER / name, made)
    return made


def build_peer(python: Path, model: Path, name: str) -> Path:
    """Build the peer's folder of one format."""
    out = PEERS / f"genai-{name}"
    if not (out / "genai_config.json").exists():
        command = ["-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out), "-p", name, "-e", "cpu"]
        options = ["--extra_options", "int4_accuracy_level=4"] if name == "int4" else []
        subprocess.run([str(python), *command, *options], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return out


def build_ours(model: Path, name: str) -> Path:
    """Export our folder of one format; rounding to the nearest, as speed does not depend on the values."""
    out = PEERS / f"lightpress-{name}"
    if not (out / "genai_config.json").exists():
        options = [] if name == "fp32" else ["--method", "nearest"]
        given = ["export", str(model), "--format", name, "-o", str(out), "--overwrite", "-q", *options]
        subprocess.run([sys.executable, "-m", "cli.app", *given], check=True, cwd=HERE.parent)
    return out


def run_once(python: str | Path, code: str, folder: Path, threads: int) -> dict[str, float]:
    """Measure one folder in a fresh process."""
    numbers = [str(number) for number in (PREFILL, PROMPT, NEW, threads)]
    command = [str(python), "-c", code, str(folder), *numbers, str(HERE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--formats", default="int4,int8,fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model, peers = prepare_model(options.model), prepare_peers()
    print("| format | runtime | prefill 512 tok/s | decode tok/s | load s | RSS MB | size MB |")
    print("|---|---|---|---|---|---|---|")
    for name in options.formats.split(","):
        ours = build_ours(model, name)
        runs = {
            "ours, ONNX Runtime": (sys.executable, RUN_OURS, ours),
            "ours, onnxruntime-genai": (peers, RUN_GENAI, ours),
            "genai builder, onnxruntime-genai": (peers, RUN_GENAI, build_peer(peers, model, name)),
        }
        turns = [{title: run_once(*run, options.threads) for title, run in runs.items()} for _ in range(options.rounds)]
        for title, (_, _, folder) in runs.items():
            row = {key: statistics.median(turn[title][key] for turn in turns) for key in turns[0][title]}
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            print(
                f"| {name} | {title} | {row['prefill']:.0f} | {row['decode']:.1f} | {row['load_s']:.1f} | "
                f"{row['rss_mb']:.0f} | {size:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
