"""Predicted damage against measured loss, axis by axis: how well the plan's currency predicts what cuts cost.

    python benchmarks/damage.py CHECKPOINT TEXT [--windows 128] [--test 64]

For each axis a light and a heavier cut, repaired in closed form; prints the priced damage (sum over layers of
damage^1.2), the excess loss in nats per token, what one unit of it costs, and the exponent p at which loss ~ damage^p
would fit both cuts (the plan uses 1.2).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.errors import UserError
from compress.evaluate import measure_quality
from compress.pipeline import Task, compress_checkpoint, find_units
from compress.plan import LOSS_EXPONENT, Plan
from compress.probe import probe_damage, probe_plans
from compress.recipe import AXES, Recipe
from compress.surgery.describe import new_config
from compress.text import Windows, load_tokenizer, read_windows
from compress.weights import read_spec

LIGHT = {"ffn": 0.15, "kv": 0.25, "hidden": 0.1, "layers": 0.1}
HEAVY = {"ffn": 0.35, "kv": 0.5, "hidden": 0.25, "layers": 0.35}


def main() -> None:
    """Measure two cuts per axis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--test", type=int, default=64)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(options.checkpoint)
    spec = read_spec(checkpoint)
    size = (options.windows + options.test, 256)
    windows = read_windows(options.text, load_tokenizer(options.checkpoint), checkpoint.config, size, "text")
    test = Windows(windows.ids[-options.test :], windows.source)
    task = Task(checkpoint, spec, Windows(windows.ids[: -options.test], windows.source), Recipe(refine=0))
    dense = measure_quality(checkpoint, spec, test).perplexity
    findings = find_units(task)
    light, heavy = (probe_plans(spec, findings, cuts) for cuts in (LIGHT, HEAVY))
    print(f"dense perplexity {dense:.3f}")
    for axis in (axis for axis in AXES if axis in light):
        try:
            pair = light[axis], heavy[axis]
            losses = [math.log(measure_cut(task, plan, test) / dense) for plan in pair]
        except UserError as error:
            print(f"{axis:<7} cannot: {error}")
            continue
        print_axis(axis, [probe_damage(findings, plan, axis) for plan in pair], losses)


def measure_cut(task: Task, plan: Plan, test: Windows) -> float:
    """Return the perplexity of the repaired model that a plan makes."""
    with tempfile.TemporaryDirectory() as name:
        with CheckpointWriter(Path(name) / "out", new_config(task.spec, plan, task.recipe)) as writer:
            compress_checkpoint(task, plan, writer)
            writer.finish()
        written = open_checkpoint(Path(name) / "out")
        return measure_quality(written, read_spec(written), test).perplexity


def print_axis(axis: str, damages: list[float], losses: list[float]) -> None:
    """Print one axis: priced damages, losses, prices and the exponent between the two cuts."""
    (d1, d2), (l1, l2) = damages, (max(loss, 1e-6) for loss in losses)
    power = LOSS_EXPONENT * math.log(l2 / l1) / math.log(d2 / d1) if d2 > d1 > 0 else math.nan
    print(
        f"{axis:<7} priced damage {d1:.4f} -> {d2:.4f}, excess loss {losses[0]:.4f} -> {losses[1]:.4f} nats, "
        f"price {l1 / max(d1, 1e-12):.2f} -> {l2 / max(d2, 1e-12):.2f}, p = {power:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
