"""`lightpress compress`: from a checkpoint to a verified artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import Console
from cli.request import BenchSize, Request


def compress(
    *,
    source: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    text: options.Text = None,
    keep: options.Keep = None,
    axes: options.Axes = None,
    multiple: options.Multiple = None,
    score: options.Score = None,
    repair: options.Repair = None,
    windows: options.WindowCount = None,
    length: options.Length = None,
    field: options.Field = None,
    seed: options.Seed = None,
    shard_bytes: options.ShardBytes = None,
    spill_bytes: options.SpillBytes = None,
    recipe: options.RecipeFile = None,
    plan: options.PlanFile = None,
    eval_text: options.EvalText = None,
    overwrite: options.Overwrite = False,
    no_export: Annotated[bool, typer.Option("--no-export", help="Write no ONNX graph.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not re-open the output to prove it.")] = False,
    no_bench: Annotated[bool, typer.Option("--no-bench", help="Do not measure speed.")] = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune and repair a checkpoint, write it, export it, prove it, and compare it with the dense one.

    Example: lightpress compress ./model --keep 0.7 --text notes.txt -o ./model-70
    """
    flags = {
        "keep": keep, "axes": axes, "multiple": multiple, "score": score, "repair": repair,
        "windows": windows, "length": length, "field": field, "seed": seed,
        "shard_bytes": shard_bytes, "spill_bytes": spill_bytes,
    }  # fmt: skip
    options.refuse_plan_flags(plan, flags)
    request = Request(
        source, options.read_recipe(recipe, flags), text, eval_text, plan, output, overwrite,
        export=not no_export, verify=not no_verify, bench=not no_bench, speed=BenchSize(threads=threads),
    )  # fmt: skip
    with Console(as_json, quiet) as console:
        from cli.run import run_compress
        from compress.report import make_plain

        report = run_compress(request, console)
        console.show(f"\nWritten to {output}.")
        console.finish(make_plain(report))
