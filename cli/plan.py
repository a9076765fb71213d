"""`lightpress plan`: what `compress` would do, before a weight is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import Console
from cli.request import BenchSize, Request


def plan(
    *,
    source: options.Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this JSON file; else nothing is written.")
    ] = None,
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
    recipe: options.RecipeFile = None,
    plan_file: options.PlanFile = None,
    no_export: Annotated[bool, typer.Option("--no-export", help="Count no ONNX graph into the disk need.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a plan file that exists.")] = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show which layers, heads and channels would go, and what that costs; writes nothing unless -o is given.

    Example: lightpress plan ./model --keep 0.7 --text notes.txt -o plan.json
    """
    flags = {
        "keep": keep, "axes": axes, "multiple": multiple, "score": score, "repair": repair,
        "windows": windows, "length": length, "field": field, "seed": seed,
    }  # fmt: skip
    options.refuse_plan_flags(plan_file, flags)
    request = Request(
        source, options.read_recipe(recipe, flags), text,
        plan=plan_file, export=not no_export, speed=BenchSize(threads=threads),
    )  # fmt: skip
    with Console(as_json, quiet) as console:
        from cli.run import run_plan

        run_plan(request, output, overwrite, console)
