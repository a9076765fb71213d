"""Wall time of compressing against two calibration forward passes of the same model, in one process.

    python benchmarks/cost.py [--layers 6] [--windows 128] [--length 256] [--threads 2] [--rounds 1]

Target: (scores + plan + rebuild + writing) / (2 forward passes over the same tokens) <= 1.5. Both sides are measured
in the same process, forward passes before and after, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from synthetic import make_windows, write_model

from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.evaluate import fill_hidden
from compress.hidden import HiddenStore
from compress.pipeline import Task, compress_checkpoint, new_config, plan_checkpoint
from compress.recipe import Recipe
from compress.weights import read_spec


def time_forward(task: Task) -> float:
    """Return the seconds of one calibration forward pass, streamed as pass 1 streams it."""
    started = time.perf_counter()
    with HiddenStore((*task.windows.ids.shape, task.spec.shape.hidden)) as store:
        fill_hidden(task.checkpoint, task.spec, task.windows, store)
    return time.perf_counter() - started


def time_compress(task: Task, folder: Path) -> tuple[float, float]:
    """Return the seconds until the plan is made, and until the folder is written."""
    started = time.perf_counter()
    plan = plan_checkpoint(task)
    planned = time.perf_counter() - started
    with CheckpointWriter(folder, new_config(task.spec, plan)) as writer:
        compress_checkpoint(task, plan, writer)
        writer.finish()
    return planned, time.perf_counter() - started


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("windows", 128), ("length", 256), ("threads", 2), ("rounds", 1)):
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
            planned, total = time_compress(task, Path(name) / f"out{index}")
            after = time_forward(task)
            ratios.append(total / (before + after))
            print(
                f"{options.layers} layers, {windows.tokens} tokens: forward {before:.1f} s and {after:.1f} s, "
                f"compress {total:.1f} s (plan {planned:.1f} s): ratio {ratios[-1]:.2f} (target <= 1.50)",
                flush=True,
            )
        print(f"median ratio {statistics.median(ratios):.2f}, target 1.50")


if __name__ == "__main__":
    main()
