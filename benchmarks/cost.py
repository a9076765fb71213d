"""Wall time of compressing against two calibration forward passes of the same model, in one process, by stage.

    python benchmarks/cost.py [--layers 16] [--windows 32] [--length 256] [--threads 2] [--rounds 1]

Target: (calibrate + score + plan + repair) / (2 forward passes over the same tokens) <= 1.6 for hidden 1024, FFN 2816,
16 layers and 8192 tokens. Both sides are measured in the same process, forward passes before and after, so that a busy
machine slows both. Such a model is above the size up to which the recipe refines layers and tries plans by itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from operator import sub
from pathlib import Path

import torch
from synthetic import make_windows, write_model

from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.evaluate import fill_hidden
from compress.hidden import HiddenStore
from compress.pipeline import Task, compress_checkpoint, find_units, ignore_progress
from compress.recipe import Recipe
from compress.surgery.describe import new_config
from compress.trials import Bench, outline_plan, search_plan
from compress.weights import read_spec

TARGET = 1.6


def time_forward(task: Task) -> float:
    """Return the seconds of one calibration forward pass, streamed as pass 1 streams it."""
    started = time.perf_counter()
    with HiddenStore((*task.windows.ids.shape, task.spec.shape.hidden)) as store:
        fill_hidden(task.checkpoint, task.spec, task.windows, store)
    return time.perf_counter() - started


def time_compress(task: Task, folder: Path) -> dict[str, float]:
    """Return the seconds of each stage; the last writes the folder."""
    clock = [time.perf_counter()]
    findings = find_units(task)
    clock.append(time.perf_counter())
    bench = Bench(task.checkpoint, task.spec, task.windows, task.recipe)
    plan = search_plan(bench, findings, ignore_progress)
    clock.append(time.perf_counter())
    with CheckpointWriter(folder, new_config(task.spec, plan)) as writer:
        compress_checkpoint(task, plan, writer)
        writer.finish()
    clock.append(time.perf_counter())
    print(f"  plan: {outline_plan(plan)}", flush=True)
    return dict(zip(("calibrate and score", "plan", "rebuild and write"), map(sub, clock[1:], clock), strict=False))


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 16), ("windows", 32), ("length", 256), ("threads", 2), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = open_checkpoint(write_model(Path(name) / "dense", options.layers))
        windows = make_windows(options.windows, options.length)
        task = Task(checkpoint, read_spec(checkpoint), windows, Recipe(keep=0.7))
        ratios = []
        for index in range(options.rounds):
            before = time_forward(task)
            stages = time_compress(task, Path(name) / f"out{index}")
            after = time_forward(task)
            total = sum(stages.values())
            ratios.append(total / (before + after))
            parts = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items())
            print(
                f"{options.layers} layers, {windows.tokens} tokens: forward {before:.1f} s and {after:.1f} s, "
                f"compress {total:.1f} s ({parts}): ratio {ratios[-1]:.2f} (target <= {TARGET})",
                flush=True,
            )
        print(f"median ratio {statistics.median(ratios):.2f}, target {TARGET}")


if __name__ == "__main__":
    main()
