"""`lightpress bench`: tokens per second, memory and load time of a model, alone or against another."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from cli import options
from cli.console import Console
from cli.device import CPU, DeviceOption, bench_on
from cli.request import BenchPlan, BenchSize
from compress.errors import UserError


def bench(
    *,
    source: Annotated[
        str,
        typer.Argument(metavar="FOLDER", help="Checkpoint folder, hub id, Lightpress output or exported ONNX folder."),
    ],
    against: Annotated[
        str | None, typer.Option("--against", metavar="DENSE", help="Measure this one too, in alternating rounds.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="N,...",
            help=f"Tokens of the prompt. [default: {BenchSize.prompt}, less in a short context]",
        ),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N,...", help="Prompts of that length at once.")] = "1",
    threads: Annotated[
        str | None, typer.Option("--threads", metavar="N,...", help="CPU threads. [default: all]")
    ] = None,
    new: Annotated[
        int | None, typer.Option("--new", min=1, help=f"Tokens decoded after it. [default: {BenchSize.new}]")
    ] = None,
    rounds: options.Rounds = BenchSize.rounds,
    device: DeviceOption = CPU,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure prefill and decode on ONNX Runtime, by prompt length, batch and threads, each folder in its own process.

    Example: lightpress bench ./model-70 --against ./model --prompt 32,512 --batch 1,4 --threads 2
    """
    counts = read_counts("--threads", threads)
    plan = BenchPlan(read_counts("--prompt", prompt), read_counts("--batch", batch), counts or (None,), new, rounds)
    with Console(as_json, quiet) as console:
        if device != CPU:
            console.finish(bench_on(device, (source, against), plan, console))
            return
        from cli.render import render_bench
        from cli.speed import bench_folders
        from compress.report import make_plain

        found = bench_folders((source, against), plan, console)
        console.show(render_bench(found))
        console.finish(make_plain(found))


def read_counts(name: str, text: str | None) -> tuple[int, ...]:
    """Return the numbers of a list such as 32,128, each once; UserError unless all are whole and at least 1."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise UserError(f"{name} {text} is not a list of whole numbers of at least 1; write it like {name} 1,2,4.")
    return tuple(dict.fromkeys(map(int, parts)))
