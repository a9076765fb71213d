"""`lightpress bench`: tokens per second of a checkpoint, alone or against another."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import options
from cli.console import Console
from cli.request import BenchSize


def bench(
    *,
    source: options.Source,
    against: Annotated[
        str | None, typer.Option("--against", metavar="DENSE", help="Measure this one too, in alternating rounds.")
    ] = None,
    prompt: options.Prompt = BenchSize.prompt,
    new: options.New = BenchSize.new,
    rounds: options.Rounds = BenchSize.rounds,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure prefill and decode speed on ONNX Runtime, from CKPT/onnx or a temporary export.

    Example: lightpress bench ./model-70 --against ./model --threads 2
    """
    with Console(as_json, quiet) as console:
        from cli.compare import bench_folders
        from cli.render import render_comparison
        from compress.report import make_plain

        found = bench_folders((source, against), BenchSize(prompt, new, rounds, threads), console)
        console.show(render_comparison(found))
        console.finish(make_plain(found))
