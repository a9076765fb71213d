"""`lightpress inspect`: what a checkpoint is, without loading it."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import options
from cli.console import Console


def inspect(
    *,
    source: options.Source,
    check: Annotated[bool, typer.Option("--check", help="Read all tensors and look for NaN and Inf.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a checkpoint's family, shapes, parameters, files and conventions.

    Example: lightpress inspect ./model --check
    """
    with Console(as_json, quiet) as console:
        from cli.facts import describe_checkpoint, render_facts
        from cli.prepare import check_weights
        from compress.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(source)
        facts = describe_checkpoint(checkpoint)
        if check:
            check_weights(checkpoint, console)
            facts["finite"] = True
        console.show(render_facts(facts))
        console.finish(facts)
