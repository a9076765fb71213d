"""How much faster are structurally pruned twins of a dense model in the same format? As `bench` measures it.

    python benchmarks/cpu_pruned.py [--plan shares|planner] [--formats int4,int8,fp32] [--rounds 9] [--threads 2]
                                    [--layers 16] [--work FOLDER]

The dense model is the synthetic decoder of 254 M parameters; its twins keep 0.7 and 0.5 of the parameters outside the
embeddings. `shares` (the default) writes them by shape only, with random weights: hidden, layers and heads at the third
root of the share, the FFN at what then fits, widths in whole blocks of 128. `planner` takes the shape that the real
planner chooses on the dense model from random windows, and cuts it, unrepaired: speed does not depend on the values.
Exported without a search (`--method nearest`), run by plain ONNX Runtime: prefill of 512 tokens, 64 tokens after a
prompt of 64, twin and dense model in turns; the ratio is the median of the rounds' ratios. Targets: at keep 0.7 at
least 1.3x, at 0.5 at least 1.8x, in both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_peers import PEERS, Place, build_folder, build_ours
from synthetic import make_config, make_windows, write_model

from backends.machine import write_random
from cli.budget import make_goal
from cli.console import Console
from cli.request import BenchPlan
from cli.speed import bench_folders
from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.pipeline import Task, compress_checkpoint, find_units
from compress.plan import describe_counts
from compress.recipe import Recipe
from compress.shapes import ModelShape
from compress.spec import resolve_model
from compress.surgery.describe import new_config
from compress.trials import Bench, search_plan
from compress.weights import read_spec

DENSE = "dense"
TARGETS = {0.7: 1.3, 0.5: 1.8}
STEP = 128
PREFILL, PROMPT, NEW = 512, 64, 64


def share_config(layers: int, keep: float) -> dict[str, Any]:
    """Return the config of a twin whose axes are all cut alike, with the FFN as wide as the share then allows."""
    config, share = make_config(layers), keep ** (1 / 3)
    size, total = config["head_dim"], resolve_model(config, None).shape.layer_parameters
    hidden = STEP * round(config["hidden_size"] * share / STEP)
    left, groups = round(layers * share), round(config["num_key_value_heads"] * share)
    query = groups * config["num_attention_heads"] // config["num_key_value_heads"]
    each = keep * total / left / hidden - 2 * (query + groups) * size
    sizes = {"hidden_size": hidden, "num_hidden_layers": left, "intermediate_size": STEP * round(each / 3 / STEP)}
    return {**config, **sizes, "num_attention_heads": query, "num_key_value_heads": groups}


def write_planned(dense: Path, folder: Path, keep: float) -> None:
    """Cut the dense model to the plan that the planner finds for a share."""
    checkpoint = open_checkpoint(dense)
    spec = read_spec(checkpoint)
    recipe = Recipe(repair="none", inputs="none", norms="slnp", refine=0, trials=0, keep=keep)
    task = Task(checkpoint, spec, make_windows(24, 256), recipe)
    goal, _ = make_goal(recipe, spec, 4)
    plan = search_plan(Bench(checkpoint, spec, task.windows, recipe, goal), find_units(task), lambda *_: None)
    with CheckpointWriter(folder, new_config(spec, plan)) as writer:
        compress_checkpoint(task, plan, writer)
        writer.finish()


def build_model(options: argparse.Namespace, keep: float | None) -> Path:
    """Return the dense model, or the twin of a share."""
    work: Path = options.work
    name = f"{DENSE}-{options.layers}" if keep is None else f"{options.plan}-{options.layers}-{keep:g}"

    def build(out: Path) -> None:
        if keep is None:
            write_model(out, options.layers, torch.float32)
        elif options.plan == "shares":
            write_random(out, share_config(options.layers, keep))
        else:
            write_planned(build_model(options, None), out, keep)

    return build_folder(work / name / "model", "config.json", make_parent(build))


def make_parent(build: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return the builder with the folder around it made first."""

    def made(out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        build(out)

    return made


def describe_shape(shape: ModelShape, dense: ModelShape) -> str:
    """Return the sizes of a model and the share of the dense one that they are."""
    heads, groups, ffn = (
        describe_counts([getattr(layer, key) for layer in shape.layers]) for key in ("query_heads", "kv_heads", "ffn")
    )
    kept = shape.layer_parameters / dense.layer_parameters
    return f"hidden {shape.hidden}, {len(shape.layers)} layers, heads {heads}/{groups}, FFN {ffn}: {kept:.3f}"


def measure_format(models: dict[str, Path], name: str, options: argparse.Namespace) -> None:
    """Measure each twin against the dense model in one format, and print its row."""
    folders = {
        title: build_ours(Place(model, model.parent, Path(sys.executable)), name) for title, model in models.items()
    }
    plan = BenchPlan((PROMPT, PREFILL), (1,), (options.threads,), NEW, options.rounds)
    for keep, least in TARGETS.items():
        found = bench_folders((str(folders[f"keep {keep:g}"]), str(folders[DENSE])), plan, Console(quiet=True))
        short, long = found.runs[0].rows
        ratios = long.prefill_ratio, short.decode_ratio
        assert ratios[0] is not None and ratios[1] is not None and found.dense is not None
        met = "met" if min(ratio.median for ratio in ratios) >= least else "**missed**"
        rates = f"{long.compressed.prefill.median:.0f} | {short.compressed.decode.median:.1f}"
        shown = " | ".join(f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" for ratio in ratios)
        bytes_say = found.dense.weight_bytes / found.compressed.weight_bytes
        print(f"| {name} | keep {keep:g} | {rates} | {shown} | {bytes_say:.2f} | {least} {met} |", flush=True)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=("shares", "planner"), default="shares")
    parser.add_argument("--formats", default="int4,int8,fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--work", type=Path, default=PEERS / "pruned")
    return parser.parse_args()


def main() -> None:
    """Print the table and write the numbers."""
    options = read_options()
    options.work = options.work.resolve()
    torch.set_grad_enabled(False)
    models = {DENSE: build_model(options, None), **{f"keep {keep:g}": build_model(options, keep) for keep in TARGETS}}
    shapes = {title: read_spec(open_checkpoint(model)).shape for title, model in models.items()}
    for title, shape in shapes.items():
        print(f"{title}: {describe_shape(shape, shapes[DENSE])}")
    print("\n| format | model | prefill 512 tok/s | decode tok/s | prefill x | decode x | bytes say x | target |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.formats.split(","):
        measure_format(models, name, options)


if __name__ == "__main__":
    main()
