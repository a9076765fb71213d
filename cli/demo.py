"""`lightpress demo`: the whole tool on the small model that ships with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import Console
from cli.request import BenchSize

# Less than the default does on so small a model, which would take twice as long for little more quality.
SHORTER = {"trials": 4, "refine": 100}


def demo(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("demo-out"),
    keep: options.Keep = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compress the shipped demo model, in about four minutes on two cores, and show what that costs and gains.

    Example: lightpress demo
    """
    recipe = options.read_recipe(None, {"keep": keep, **SHORTER})
    with Console(as_json, quiet) as console:
        from cli.tour import run_demo
        from compress.report import make_plain

        report = run_demo(output, recipe, BenchSize(threads=threads), console)
        console.finish(make_plain(report))
