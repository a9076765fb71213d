"""Perplexity after compressing without training, under the protocol of the project's first measurement.

    python benchmarks/quality.py [--checkpoint FOLDER] [--text FILE]

Windows of 256 tokens of the raw text (its separators are tokenised as text); the first 200 windows are the test, the
last 128 the calibration; only FFN channels and KV groups go. Targets: 14.8 at --keep 0.75 and 39.4 at 0.5.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.evaluate import measure_quality
from compress.pipeline import Task, compress_checkpoint, new_config, plan_checkpoint
from compress.plan import plan_shape
from compress.recipe import AXES, Recipe
from compress.shapes import ModelShape
from compress.text import Windows, load_tokenizer
from compress.weights import read_spec

SHARED = Path(__file__).resolve().parents[2] / "shared"
TARGETS = {0.75: 14.8, 0.5: 39.4}
RECIPES = (
    Recipe(keep=0.75, axes=("ffn", "kv")),
    Recipe(keep=0.5, axes=("ffn", "kv")),
    Recipe(keep=0.75, axes=("ffn", "kv"), score="activation"),
    Recipe(keep=0.5, axes=("ffn", "kv"), score="activation"),
    Recipe(keep=0.75, axes=("ffn", "kv"), repair="none"),
    Recipe(keep=0.5, axes=("ffn", "kv"), repair="none"),
    Recipe(keep=0.75, axes=AXES),
    Recipe(keep=0.5, axes=AXES),
)


def main() -> None:
    """Compress by each recipe and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHARED / "checkpoints/stories260K")
    parser.add_argument("--text", type=Path, default=SHARED / "data/tinystories_1910stories_1p6MB.txt")
    options = parser.parse_args()
    if not options.checkpoint.is_dir() or not options.text.is_file():
        print(f"skipped: {options.checkpoint} and {options.text} are not both here; name yours with the options")
        return
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(options.checkpoint)
    spec = read_spec(checkpoint)
    ids = load_tokenizer(options.checkpoint).encode(options.text.read_text(), add_special_tokens=False).ids
    windows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    test, calibration = Windows(windows[:200], "test"), Windows(windows[-128:], "calibration")
    dense = measure_quality(checkpoint, spec, test).perplexity
    print(f"dense perplexity {dense:.3f}")
    for recipe in RECIPES:
        task = Task(checkpoint, spec, calibration, recipe)
        plan = plan_checkpoint(task)
        with tempfile.TemporaryDirectory() as name:
            with CheckpointWriter(Path(name) / "out", new_config(spec, plan)) as writer:
                compress_checkpoint(task, plan, writer)
                writer.finish()
            written = open_checkpoint(Path(name) / "out")
            found = measure_quality(written, read_spec(written), test).perplexity
        print(describe(recipe, plan_shape(plan, spec.shape), found, dense), flush=True)


def describe(recipe: Recipe, shape: ModelShape, found: float, dense: float) -> str:
    """Return the line of one recipe; the default recipe over FFN and KV groups has a target."""
    line = (
        f"keep {recipe.keep:.2f} of {','.join(recipe.axes):<20} score {recipe.score:<10} repair {recipe.repair:<6}: "
        f"{len(shape.layers)} layers, hidden {shape.hidden}, KV {shape.layers[0].kv_heads}, "
        f"FFN {shape.layers[0].ffn}: perplexity {found:.2f} (excess {math.log(found / dense):.3f} nats)"
    )
    if recipe != Recipe(keep=recipe.keep, axes=("ffn", "kv")):
        return line
    target = TARGETS[recipe.keep]
    return f"{line}  target {target}: {'met' if found <= target else 'MISSED'}"


if __name__ == "__main__":
    main()
