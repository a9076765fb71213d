"""The order in which `recover` reads its documents: flags, and the order of a run, kept for when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.console import Console
from compress.errors import UserError

if TYPE_CHECKING:
    from cli.training_job import Job
    from compress.recover.curriculum import Curriculum, CurriculumOptions, Stage

ORDER_NAME = "order.json"
PANEL = options.CURRICULUM

Kind = Annotated[
    str | None,
    typer.Option(
        "--curriculum", help="Read by difficulty: easy, medium or hard first. [default: shuffled]",
        rich_help_panel=PANEL,
    ),
]
Measure = Annotated[
    str | None,
    typer.Option(
        "--difficulty", help="The student's own loss, or failures: tokens of the answer it gets wrong. [default: loss]",
        rich_help_panel=PANEL,
    ),
]
Label = Annotated[
    str | None,
    typer.Option(
        "--label", metavar="FIELD", help="Field of a row that names its kind: one kind after another is read.",
        rich_help_panel=PANEL,
    ),
]
LabelOrder = Annotated[
    str | None,
    typer.Option(
        "--label-order", metavar="A,B,...", help="All its kinds in order. [default: long answers before short ones]",
        rich_help_panel=PANEL,
    ),
]


def refuse_idle_order(asked: Mapping[str, Any]) -> None:
    """Raise UserError for flags of the order that do nothing without another."""
    if asked["difficulty"] is not None and asked["curriculum"] is None:
        raise UserError("--difficulty does nothing without --curriculum: leave it out, or add --curriculum easy.")
    if asked["label_order"] is not None and asked["label"] is None:
        raise UserError("--label-order does nothing without --label: leave it out, or name the rows' field.")


def read_options(asked: Mapping[str, Any]) -> CurriculumOptions | None:
    """Return what the flags ask for, None where they ask for no order; UserError for unknown names."""
    from compress.recover.curriculum import LOSS, CurriculumOptions

    refuse_idle_order(asked)
    if asked["curriculum"] is None and asked["label"] is None:
        return None
    labels = tuple(name.strip() for name in (asked["label_order"] or "").split(",") if name.strip())
    if asked["label_order"] is not None and not labels:
        raise UserError(f"--label-order names no value of '{asked['label']}'; give all in order, such as long,short.")
    return CurriculumOptions(
        asked["curriculum"], asked["difficulty"] or LOSS, asked["label"], labels, asked["seed"]
    )


def settle_order(job: Job, console: Console) -> tuple[int, ...] | None:
    """Return the documents of the whole run in order, None for a shuffle; a resumed run has the one it began with.

    The student is read for it, layer by layer, and gone when this returns.
    """
    options = read_options(job.asked)
    if options is None:
        return None
    if not job.text_steps:
        raise UserError("--curriculum orders the text, and --policy-share 1 leaves none to train on: leave one out.")
    path = job.work / ORDER_NAME
    if path.is_file():
        return read_order(path, job)
    found = measure_order(job, options, console)
    console.note(describe_order(found, options))
    save_order(path, found)
    return found.order


def measure_order(job: Job, options: CurriculumOptions, console: Console) -> Curriculum:
    """Ask the student, and lay the order out."""
    from compress.hidden import release_memory
    from compress.recover.curriculum import make_curriculum
    from compress.recover.model import Frozen

    model = None if options.kind is None else Frozen(*job.student)
    rows = job.count_batches(job.text_steps) * job.asked["batch"]
    try:
        found = make_curriculum(
            job.stream, options, rows, model, lambda done, total: console.progress("measure difficulty", done, total)
        )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            "stopped while measuring difficulty: give the same command with --resume to start that again"
        ) from stop
    del model
    release_memory()
    return found


def save_order(path: Path, found: Curriculum) -> None:
    """Write the order and its stages by one rename."""
    from compress.checkpoint_writer import write_atomically

    stages = [
        {"label": stage.label, "documents": len(stage.documents), "span": stage.span} for stage in found.stages
    ]
    text = json.dumps({"passes": found.passes, "stages": stages, "order": found.order})
    write_atomically(path, f"{text}\n".encode())


def read_order(path: Path, job: Job) -> tuple[int, ...]:
    """Return the order of the run that goes on; UserError where the file is damaged."""
    try:
        order = tuple(json.loads(path.read_text(encoding="utf-8"))["order"])
        fits = all(type(number) is int and 0 <= number < len(job.stream.index) for number in order)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete {job.work} to start again.") from error
    if not fits:
        raise UserError(f"{path} is the order of another text; delete {job.work} to start again.")
    return order


def describe_order(found: Curriculum, options: CurriculumOptions) -> str:
    """Return what comes first, in a sentence."""
    how = "at random" if options.kind is None else f"{options.kind} first"
    stages = ", then ".join(describe_stage(stage, options) for stage in found.stages)
    return f"Curriculum, {how}: {stages}."


def describe_stage(stage: Stage, options: CurriculumOptions) -> str:
    """Return a stage as a few words: its label, its documents and how difficult they are."""
    name = "" if options.label is None else f" without {options.label}" if stage.label is None else f" {stage.label}"
    said = f"{len(stage.documents)}{name} documents" if stage.label else f"{len(stage.documents)} documents{name}"
    if stage.span is None:
        return said
    low, high = stage.span
    if options.measure == "loss":
        return f"{said} with the student's loss from {low:.3g} to {high:.3g} nats"
    return f"{said} with {100 * low:.0f} to {100 * high:.0f} % of their tokens wrong"
