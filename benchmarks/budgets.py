"""Is a speed budget met by the exported model itself? Plans under --speedup, cut, exported, and measured here.

    python benchmarks/budgets.py [--layers 6] [--rounds 9] [--fresh]

Shipped demo and a synthetic model of hidden 1024, each under --speedup 1.3 and 1.8, decode and prefill. The cut is not
repaired: speed does not depend on the weights' values. Target: measured speed-up within 10 % of the one asked for. The
profile is `this-machine` (made first with --fresh, else that of `lightpress profiles measure`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from synthetic import make_windows, write_model

from backends.export_onnx import export_onnx
from backends.machine import time_decode, time_prefill
from backends.ort import OrtModel, open_onnx
from cli.budget import make_goal
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.pipeline import Task, compress_checkpoint, find_units
from compress.plan import describe_counts, plan_shape
from compress.recipe import Recipe
from compress.surgery.describe import new_config
from compress.text import Windows
from compress.trials import Bench, search_plan
from compress.weights import read_spec

DEMO = Path(__file__).resolve().parents[1] / "compress/demo/checkpoint"
PROMPT, OUTPUT = 128, 32
QUICK = Recipe(repair="none", inputs="none", norms="slnp", refine=0, trials=0)


def open_models(folder: Path, layers: int) -> dict[str, Checkpoint]:
    """Return the dense models."""
    written = write_model(folder / "dense", layers, torch.float32)
    return {"demo": open_checkpoint(DEMO), "hidden 1024": open_checkpoint(written)}


def ignore(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def show_model(name: str, checkpoint: Checkpoint, folder: Path, rounds: int) -> list[float]:
    """Cut, export and measure one model under all budgets, one round after the other; return the errors."""
    spec = read_spec(checkpoint)
    ids = make_windows(24, 256).ids % spec.shape.vocab
    task = Task(checkpoint, spec, Windows(ids, "random"), QUICK)
    findings = find_units(task)
    rows, folders = [], [folder / "dense"]
    export_onnx(checkpoint, folders[0])
    for phase in ("decode", "prefill"):
        for speedup in (1.3, 1.8):
            work = f"{phase}:{PROMPT}+{OUTPUT}"
            recipe = replace(QUICK, speedup=f"{speedup}x", workload=work, profile="this-machine")
            goal, device = make_goal(recipe, spec, 4)
            assert device is not None
            plan = search_plan(Bench(checkpoint, spec, task.windows, recipe, goal), findings, ignore)
            shape = plan_shape(plan, spec.shape)
            place = folder / f"{phase}{speedup}"
            with CheckpointWriter(place, new_config(spec, plan)) as writer:
                compress_checkpoint(replace(task, recipe=recipe), plan, writer)
                writer.finish()
            folders.append(place / "onnx")
            export_onnx(open_checkpoint(place), folders[-1])
            predicted = device.estimate(spec.shape).total / device.estimate(shape).total
            groups, ffn = (describe_counts([getattr(x, key) for x in shape.layers]) for key in ("kv_heads", "ffn"))
            sizes = f"{len(shape.layers)} layers, hidden {shape.hidden}, KV {groups}, FFN {ffn}"
            rows.append((phase, speedup, predicted, sizes))
    models = [open_onnx(place) for place in folders]
    turns = [[time_model(model) for model in models] for _ in range(rounds)]
    errors = []
    for place, (phase, asked, predicted, sizes) in enumerate(rows, 1):
        # Dense and cut are neighbours in every turn: the median of the turns' ratios.
        measured = statistics.median(turn[0][phase] / turn[place][phase] for turn in turns)
        errors.append(measured / asked - 1)
        print(
            f"| {name} | {phase} | {asked} | {predicted:.2f} | {measured:.2f} | {errors[-1]:+.1%} | {sizes} |",
            flush=True,
        )
    return errors


def time_model(model: OrtModel) -> dict[str, float]:
    """Return the seconds of one prefill, and of one decode step."""
    return {"prefill": time_prefill(model, PROMPT, 0.2), "decode": time_decode(model, PROMPT, OUTPUT, 0.2)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.fresh:
        from cli.console import Console
        from cli.machine import run_measure

        run_measure("this-machine", None, None, True, Console())
    print("| model | phase | asked | predicted | measured | error | shape |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        root, errors = Path(name), []
        for place, (title, checkpoint) in enumerate(open_models(root, options.layers).items()):
            (root / str(place)).mkdir()
            errors += show_model(title, checkpoint, root / str(place), options.rounds)
    print(f"\nlargest error {max(map(abs, errors)):.1%} (target 10 %)")


if __name__ == "__main__":
    main()
