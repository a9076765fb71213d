"""`lightpress compress`: from a checkpoint to a verified artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.distributed import CPU, join_run, open_console, speak_once
from cli.request import BenchSize, Request
from compress.errors import UserError


@options.take_recipe()
def compress(
    *,
    source: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=options.OUTPUT)],
    flags: options.Flags,
    plan: options.PlanFile = None,
    recipe: options.RecipeFile = None,
    text: options.Text = None,
    eval_text: options.EvalText = None,
    recover: options.Recover = None,
    recover_text: options.RecoverText = None,
    recover_offline: options.RecoverOffline = None,
    recover_lr: options.RecoverRate = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    no_export: Annotated[
        bool, typer.Option("--no-export", help="Write no ONNX graph.", rich_help_panel=options.OUTPUT)
    ] = False,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify", help="Do not re-open the output to prove it.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    no_bench: Annotated[
        bool, typer.Option("--no-bench", help="Do not measure speed.", rich_help_panel=options.OUTPUT)
    ] = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune, repair and maybe train a checkpoint, write it, export it, prove it, and compare it with the dense one.

    Example: lightpress compress ./model --keep 0.7 --text notes.txt -o ./model-70
    """
    lessons = {
        "recover": recover, "recover_text": recover_text, "recover_offline": recover_offline, "recover_lr": recover_lr,
    }  # fmt: skip
    with speak_once():
        request = Request(
            source, options.settle_recipe(recipe, flags, plan), text, eval_text, plan, output, overwrite,
            export=not no_export, verify=not no_verify, bench=not no_bench, speed=BenchSize(threads=threads),
            recovery=options.settle_recovery(recipe, lessons, resume),
        )  # fmt: skip
    with open_console(as_json, quiet) as console, join_run(CPU) as group:
        from cli.run import join_compress, run_compress
        from compress.report import make_plain

        if group.size > 1 and request.recovery:
            raise UserError(
                "--recover trains in one process: compress without it, then give the result to `lightpress recover`, "
                "which torchrun starts in several too."
            )
        if not group.first:
            join_compress(request, console, group)
            return
        report = run_compress(request, console, group=group)
        console.show(f"\nWritten to {output}.")
        console.finish(make_plain(report))
