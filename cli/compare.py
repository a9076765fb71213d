"""`lightpress compare`: what each amount of compression buys and costs, on the devices that are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import Console
from cli.evaluate import read_names
from cli.frontier_request import LOSS, POINTS, SAMPLES, SPEEDUP, CompareRequest, Levels, TaskFlags
from cli.request import BenchSize
from compress.errors import UserError

# What other flags of this verb say for each point or device, and what has another default here.
ELSEWHERE = ("keep", "params", "memory", "speedup", "latency", "profile", "format", "trials")

Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Folder of all points and of the report; points in it are used again.",
        rich_help_panel=options.OUTPUT,
    ),
]
Profile = Annotated[
    list[str] | None,
    typer.Option(
        "--profile", rich_help_panel=options.DEVICE,
        help="Device to compare on; may be repeated. The first one's rules decide shapes. this-machine is "
        "measured, others are predicted. [default: this-machine]",
    ),
]
Points = Annotated[
    int | None,
    typer.Option(
        "--points", min=1, max=50, rich_help_panel=options.BUDGET,
        help=f"Cut models, evenly from nearly all parameters down to 0.4 of them. [default: {POINTS}]",
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        "--keep", metavar="SHARE,...", help="Fractions of the non-embedding parameters to keep, such as 0.9,0.7.",
        rich_help_panel=options.BUDGET,
    ),
]
Speedup = Annotated[
    str | None,
    typer.Option(
        "--speedup", metavar="TIMES,...", rich_help_panel=options.BUDGET,
        help="Times as fast as the dense model in the same format (the first of --formats, or fp32 if that is among "
        "them), as the first profile predicts it, such as 1.2,1.5,2; a point's other formats have the same shapes.",
    ),
]
Trials = Annotated[
    int | None,
    typer.Option(
        "--trials", min=0, rich_help_panel=options.BUDGET,
        help="Plans that are rebuilt and measured at each point before one is chosen; each costs about a repair. "
        "[default: none]",
    ),
]
Formats = Annotated[
    str,
    typer.Option(
        "--formats", metavar="NAME,...", rich_help_panel=options.DEVICE,
        help="Number formats of every point, of fp32, int8, w8a8 and int4; fp32 is the plain one of each device.",
    ),
]
RecoverTokens = Annotated[
    str | None,
    typer.Option(
        "--recover-tokens", metavar="COUNT", rich_help_panel=options.REPAIR,
        help="Train each point back too, on so many tokens of --text, such as 200k; dense is the teacher.",
    ),
]
Tasks = Annotated[
    str | None, typer.Option("--tasks", metavar="NAME,...", help="Tasks of lm-eval (extra `eval`), offline.")
]
TaskFolder = Annotated[
    Path | None, typer.Option("--task-folder", help="Folder with YAML files of more lm-eval tasks.")
]
Pairs = Annotated[
    list[Path] | None,
    typer.Option("--pairs", help="Minimal pairs: .jsonl with sentence_good and sentence_bad. May be repeated."),
]
Choices = Annotated[
    list[Path] | None,
    typer.Option("--choices", help="Multiple choice: .jsonl with question (or context), choices and answer."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Examples of each task, from the first.")]
Shots = Annotated[
    int | None, typer.Option("--shots", min=0, help="Solved examples before each question, for --tasks.")
]
Samples = Annotated[
    int, typer.Option("--samples", min=0, max=20, help="Prompts of the evaluation text that each point continues.")
]
Loss = Annotated[
    str, typer.Option("--loss", help="The fastest point within this share of dense's perplexity is named.")
]
AtLeast = Annotated[
    str, typer.Option("--at-least", help="The best point that is so many times as fast as dense is named.")
]
Figures = Annotated[
    Path | None,
    typer.Option("--figures", help="Folder for the figures as PNG and SVG.", rich_help_panel=options.OUTPUT),
]
Search = Annotated[
    int,
    typer.Option(
        "--search", metavar="TRIALS", min=0, rich_help_panel=options.BUDGET,
        help="More points besides: so many trials of other amounts, axes and formats, which Optuna proposes (extra "
        "`search`). The same command, started again anywhere, takes its part of them. [default: none]",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage", metavar="FILE|URL", rich_help_panel=options.BUDGET,
        help="Where the trials of --search are kept: a file, or a database such as sqlite:///search.db. "
        "[default: OUT/search.log]",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Begin anew where OUT holds another comparison.", rich_help_panel=options.OUTPUT
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify", rich_help_panel=options.OUTPUT,
        help="Re-open each point in a fresh process to prove it, one that an earlier run made too.",
    ),
]
Jobs = Annotated[
    int, typer.Option("--jobs", min=1, help="Processes that make points at the same time, each in its own memory.")
]


@options.take_recipe(*ELSEWHERE)
def compare(
    *,
    source: options.Source,
    output: Output,
    flags: options.Flags,
    recipe: options.RecipeFile = None,
    text: options.Text = None,
    eval_text: options.EvalText = None,
    profile: Profile = None,
    points: Points = None,
    keep: Keep = None,
    speedup: Speedup = None,
    trials: Trials = None,
    search: Search = 0,
    storage: Storage = None,
    formats: Formats = "fp32",
    recover_tokens: RecoverTokens = None,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    pairs: Pairs = None,
    choices: Choices = None,
    limit: Limit = None,
    shots: Shots = None,
    samples: Samples = SAMPLES,
    loss: Loss = f"{100 * LOSS:g}%",
    at_least: AtLeast = f"{SPEEDUP:g}x",
    figures: Figures = None,
    overwrite: Overwrite = False,
    verify: Verify = False,
    jobs: Jobs = 1,
    rounds: options.Rounds = BenchSize.rounds,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare accuracy against speed for several amounts of compression, on the devices that you name.

    Example: lightpress compare ./model --profile this-machine --profile ascend-910b3 --text notes.txt -o ./frontier
    """
    asked = TaskFlags(
        read_names(tasks or ""), task_folder, tuple(pairs or ()), tuple(choices or ()), limit, shots
    )  # fmt: skip
    refuse_idle(asked)
    refuse_idle_storage(search, storage)
    settled = options.settle_recipe(recipe, {**flags, "trials": trials}, None)
    request = CompareRequest(
        source, settled, output, text, eval_text, tuple(profile or ()),
        read_levels(points, keep, speedup), tuple(dict.fromkeys(split_names(formats))), recover_tokens or "", asked,
        samples, read_share(loss), read_ratio(at_least), figures, overwrite, verify, jobs,
        BenchSize(rounds=rounds, threads=threads), search=search, storage=storage or "",
    )  # fmt: skip
    with Console(as_json, quiet) as console:
        from cli.frontier import run_compare
        from compress.report import make_plain

        frontier = run_compare(request, console)
        console.show(f"\nWritten to {output}: report.html, frontier.json, frontier.csv and a folder for each point.")
        console.finish(make_plain(frontier))


def refuse_idle(tasks: TaskFlags) -> None:
    """Raise UserError for flags about tasks where there are none."""
    if tasks.limit is not None and not tasks:
        raise UserError("--limit does nothing without --tasks, --pairs or --choices: leave it out, or give one too.")
    for name, value in (("--task-folder", tasks.folder), ("--shots", tasks.shots)):
        if value is not None and not tasks.names:
            raise UserError(f"{name} does nothing without --tasks: leave it out, or give that too.")


def refuse_idle_storage(search: int, storage: str | None) -> None:
    """Raise UserError for a place to keep trials where there are none, and for an empty one."""
    if storage is not None and not search:
        raise UserError("--storage does nothing without --search: leave it out, or give that too.")
    if storage is not None and not storage.strip():
        raise UserError("--storage is empty: give a file or a URL, or leave it out.")


def read_levels(points: int | None, keep: str | None, speedup: str | None) -> Levels:
    """Return which points are wanted; UserError for more than one way of saying it, and for what is no number."""
    ways = (("--points", points), ("--keep", keep), ("--speedup", speedup))
    given = [name for name, value in ways if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each say which points are made: give one of them.")
    levels = Levels(points or POINTS, read_shares(keep), tuple(split_names(speedup or "")))
    if given and points is None and not levels.chosen:
        raise UserError(f"{given[0]} is empty; give it like 1.5 or 0.9,0.7.")
    return levels


def read_shares(text: str | None) -> tuple[float, ...]:
    """Return the shares of a list such as 0.9,0.7."""
    try:
        shares = tuple(float(part) for part in split_names(text or ""))
    except ValueError as error:
        raise UserError(f"--keep {text}: is not a list of numbers; give it like 0.9,0.7,0.5.") from error
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"--keep {share:g} must be above 0 and below 1, such as 0.7.")
    return shares


def split_names(text: str) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_share(text: str) -> float:
    """Return a share that is given in per cent; UserError otherwise."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", text)
    if found is None:
        raise UserError(f"--loss {text}: is not a share in per cent; give it like 2%.")
    return float(found[1]) / 100


def read_ratio(text: str) -> float:
    """Return a speed over the dense model's, above 0; UserError otherwise."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x?\s*", text)
    if found is None or not float(found[1]):
        raise UserError(f"--at-least {text}: is not a ratio; give it like 1.5x.")
    return float(found[1])
