"""`lightpress evaluate`: perplexity of a checkpoint, alone or against another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import Console


def evaluate(
    *,
    source: options.Source,
    text: Annotated[Path, typer.Option("--text", help="Text to evaluate on: .txt, .jsonl or .parquet.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="DENSE", help="The model to compare with: agreement and KL.")
    ] = None,
    windows: Annotated[int | None, options.recipe_option("windows", "Windows of text.")] = None,
    length: options.Length = None,
    field: options.Field = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure perplexity on a text, and agreement with another model.

    Example: lightpress evaluate ./model-70 --against ./model --text held-out.txt
    """
    recipe = options.read_recipe(None, {"windows": windows, "length": length, "field": field})
    with Console(as_json, quiet) as console:
        from cli.compare import evaluate_folders
        from cli.measure import limit_threads
        from cli.render import render_comparison
        from compress.report import make_plain

        limit_threads(threads)
        found = evaluate_folders((source, against), text, recipe, console)
        console.show(render_comparison(found))
        console.finish(make_plain(found))
