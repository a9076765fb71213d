"""`lightpress evaluate`: perplexity of a checkpoint and its answers to tasks, alone or against another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.console import Console
from cli.device import CPU, DeviceOption, evaluate_on
from compress.errors import UserError

# lm-eval's libraries read these when they are imported: nothing is downloaded unless the user's environment says so,
# the console shows the progress, and standard errors take no processes of their own.
SURROUNDINGS = (
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE", "DISABLE_MULTIPROC",
)  # fmt: skip
# What can be evaluated on, and the flags that do nothing without one of those behind them.
KINDS = ("text", "tasks", "pairs", "choices")
NEEDS: Mapping[str, tuple[str, ...]] = {
    "windows": ("text",),
    "length": ("text",),
    "field": ("text",),
    "task-folder": ("tasks",),
    "shots": ("tasks",),
    "limit": ("tasks", "pairs", "choices"),
}


def evaluate(
    *,
    source: Annotated[
        str,
        typer.Argument(metavar="FOLDER", help="Checkpoint folder or hub id; for tasks also an exported ONNX folder."),
    ],
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to measure perplexity on: .txt, .jsonl or .parquet.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAME,...", help="Tasks of lm-eval (extra `eval`), offline.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="Folder with YAML files of more lm-eval tasks.")
    ] = None,
    pairs: Annotated[
        list[Path] | None,
        typer.Option("--pairs", help="Minimal pairs: .jsonl with sentence_good and sentence_bad. May be repeated."),
    ] = None,
    choices: Annotated[
        list[Path] | None,
        typer.Option("--choices", help="Multiple choice: .jsonl with question (or context), choices and answer."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples of each task, from the first.")] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Solved examples before each question, for --tasks.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="DENSE", help="Compare with this model: agreement, KL, scores.")
    ] = None,
    windows: Annotated[int | None, options.recipe_option("windows", "Windows of text.")] = None,
    length: options.Length = None,
    field: options.Field = None,
    device: DeviceOption = CPU,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure perplexity on a text, answers to tasks, and agreement with another model.

    Example: lightpress evaluate ./model-70 --against ./model --text held-out.txt --choices questions.jsonl
    """
    recipe = options.read_recipe(None, {"windows": windows, "length": length, "field": field})
    names = read_names(tasks or "")
    check_flags({
        "text": text, "tasks": names, "pairs": pairs, "choices": choices, "windows": windows, "length": length,
        "field": field, "task-folder": task_folder, "shots": shots, "limit": limit,
    })  # fmt: skip
    with Console(as_json, quiet) as console:
        if device != CPU:
            asked = bool(tasks or pairs or choices)
            console.finish(evaluate_on(device, (source, against), (text, recipe), asked, console))
            return
        from backends.harness import TaskRequest
        from cli.tasks import evaluate_all, gather_questions

        request = TaskRequest(names, task_folder, limit, shots)
        questions = gather_questions(request, pairs or [], choices or [], console)
        console.finish(evaluate_all((source, against), (text, recipe), questions, threads, console))


def read_names(tasks: str) -> tuple[str, ...]:
    """Return the names of lm-eval tasks, and prepare its surroundings if there are any."""
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    for name in SURROUNDINGS if names else ():
        os.environ.setdefault(name, "1")
    return names


def check_flags(given: Mapping[str, Any]) -> None:
    """Raise UserError where there is nothing to evaluate on, or a flag that does nothing."""
    if not any(given[kind] for kind in KINDS):
        raise UserError("Nothing to evaluate on: give --text FILE, --tasks NAMES, --pairs FILE or --choices FILE.")
    for name, kinds in NEEDS.items():
        if given[name] is not None and not any(given[kind] for kind in kinds):
            raise UserError(f"--{name} does nothing without --{' or --'.join(kinds)}: leave it out, or give that too.")
