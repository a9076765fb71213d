"""Predicted damage against measured loss, axis by axis: how well the plan's currency predicts what cuts cost.

    python benchmarks/damage.py CHECKPOINT TEXT [--windows 128] [--test 64]

For each axis a light and a heavier cut, repaired; prints the damage, the excess loss in nats per token, and the
exponent p between the two cuts in loss ~ damage^p (the plan uses 1.2).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.evaluate import measure_quality
from compress.pipeline import Task, compress_checkpoint, find_units, new_config
from compress.plan import Candidate, axis_damage, fill_plan
from compress.recipe import Recipe
from compress.text import Windows, load_tokenizer, read_windows
from compress.weights import read_spec


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
    task = Task(checkpoint, spec, Windows(windows.ids[: -options.test], windows.source), Recipe())
    dense = measure_quality(checkpoint, spec, test).perplexity
    findings = find_units(task)
    layer, hidden = spec.shape.layers[0], spec.shape.hidden
    full = Candidate(0, layer.kv_heads, hidden, layer.ffn)
    cuts = {
        "ffn": (replace(full, ffn=int(layer.ffn * 0.85)), replace(full, ffn=int(layer.ffn * 0.65))),
        "kv": (replace(full, groups=layer.kv_heads - 1), replace(full, groups=max(1, layer.kv_heads - 2))),
        "hidden": (replace(full, hidden=int(hidden * 0.9)), replace(full, hidden=int(hidden * 0.8))),
        "layers": (replace(full, dropped=1), replace(full, dropped=2)),
    }
    print(f"dense perplexity {dense:.3f}")
    for axis, pair in cuts.items():
        points = []
        for cut in pair:
            plan = fill_plan(spec, findings, cut)
            with tempfile.TemporaryDirectory() as name:
                with CheckpointWriter(Path(name) / "out", new_config(spec, plan)) as writer:
                    compress_checkpoint(task, plan, writer)
                    writer.finish()
                written = open_checkpoint(Path(name) / "out")
                found = measure_quality(written, read_spec(written), test).perplexity
            points.append((axis_damage(findings, cut)[axis], math.log(found / dense)))
        (d1, l1), (d2, l2) = points
        power = math.log(max(l2, 1e-6) / max(l1, 1e-6)) / math.log(d2 / d1) if d2 > d1 > 0 else math.nan
        print(f"{axis:<7} damage {d1:.4f} -> {d2:.4f}, excess loss {l1:.4f} -> {l2:.4f} nats, p = {power:.2f}")


if __name__ == "__main__":
    main()
