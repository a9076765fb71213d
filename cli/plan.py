"""`lightpress plan`: what `compress` would do, before a weight is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.distributed import CPU, join_run, open_console, speak_once
from cli.request import BenchSize, Request


@options.take_recipe("shard_bytes", "refine")  # neither has a part in the plan
def plan(
    *,
    source: options.Source,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write the plan to this JSON file; else nothing is written.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    flags: options.Flags,
    plan_file: options.PlanFile = None,
    recipe: options.RecipeFile = None,
    text: options.Text = None,
    no_export: Annotated[
        bool,
        typer.Option(
            "--no-export", help="Count no ONNX graph into the disk need.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a plan file that exists.", rich_help_panel=options.OUTPUT)
    ] = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show which layers, heads and channels would go, and what that costs; writes nothing unless -o is given.

    Example: lightpress plan ./model --keep 0.7 --text notes.txt -o plan.json
    """
    with speak_once():
        request = Request(
            source, options.settle_recipe(recipe, flags, plan_file), text,
            plan=plan_file, export=not no_export, speed=BenchSize(threads=threads),
        )  # fmt: skip
    with open_console(as_json, quiet) as console, join_run(CPU) as group:
        from cli.run import run_plan

        run_plan(request, output, overwrite, console, group)
