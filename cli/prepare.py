"""Everything before the first weight is touched: open, check, read the text, plan. Imported only by running verbs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cli.console import Console
from cli.estimate import estimate_disk, estimate_spill
from cli.request import Request
from compress.checkpoint import Checkpoint, check_finite, open_checkpoint
from compress.checkpoint_writer import check_output, check_space
from compress.errors import UserError
from compress.importance import find_score
from compress.pipeline import Task, new_config, plan_checkpoint, storage_dtype
from compress.plan import Plan, keep_everything, read_plan
from compress.recipe import Recipe
from compress.sample import sample_windows
from compress.spec import ModelSpec
from compress.text import Windows, load_tokenizer, read_documents, read_windows
from compress.weights import read_spec

EVAL_WINDOWS = 32
EVAL_SHARE = 5  # of a text too short for everything, one window in so many is kept for evaluation


@dataclass(frozen=True)
class Job:
    """An opened and checked request: the recipe fits the model, a given plan is read, a needed tokenizer is there."""

    request: Request
    checkpoint: Checkpoint
    spec: ModelSpec
    recipe: Recipe
    tokenizer: Any
    plan: Plan | None


@dataclass(frozen=True)
class Texts:
    """Calibration windows, and windows that calibration does not see (None when the text is too short for both)."""

    calibration: Windows
    evaluation: Windows | None


def prepare_job(request: Request, console: Console) -> Job:
    """Check everything that can be checked without running the model; raises UserError."""
    if request.output is not None:
        check_output(request.output, overwrite=request.overwrite)
        check_writable(request.output)
    checkpoint = open_checkpoint(request.source)
    if request.output is not None:
        check_output(request.output, checkpoint.folder, request.overwrite)
    spec = read_spec(checkpoint)
    find_score(request.recipe.score)
    recipe = replace(request.recipe, length=min(request.recipe.length, spec.max_positions))
    plan = read_plan(request.plan, spec.shape) if request.plan else None
    if plan is not None:
        new_config(spec, plan)
    tokenizer = check_texts(request, checkpoint, recipe)
    job = Job(request, checkpoint, spec, recipe, tokenizer, plan)
    check_disk(job)
    check_weights(checkpoint, console)
    return job


def check_writable(folder: Path) -> None:
    """Raise UserError unless a folder can be made where the output will be; trying is the only sure way to know."""
    parents = folder.absolute().parents
    place = next(parent for parent in parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".lightpress-", dir=place))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"The output {folder} cannot be written ({place}: {reason}); choose another folder.") from error


def check_texts(request: Request, checkpoint: Checkpoint, recipe: Recipe) -> Any:
    """Return the tokenizer if any text is given, after a look at the first document of each text."""
    given = [path for path in (request.text, request.eval_text) if path is not None]
    for path in given:
        next(read_documents(path, recipe.field))
    return load_tokenizer(checkpoint.folder) if given else None


def check_disk(job: Job) -> None:
    """Raise UserError where the output or the temporary folder cannot hold what the run writes there."""
    request, spec, recipe = job.request, job.spec, job.recipe
    itemsize = storage_dtype(job.checkpoint, spec).itemsize
    if request.output is not None:
        kept = recipe.keep if job.plan is None else 1.0
        check_space(request.output, estimate_disk(spec.shape, kept, itemsize, request.export))
    dense_graph = estimate_disk(spec.shape, 1.0, 0, request.export) if request.bench and request.output else 0
    check_space(Path(tempfile.gettempdir()), estimate_spill(spec.shape, recipe) + dense_graph)


def check_weights(checkpoint: Checkpoint, console: Console) -> None:
    """Raise UserError for the first tensor that holds NaN or infinite values."""
    for done, name in enumerate(checkpoint.tensors, 1):
        check_finite(checkpoint, [name])
        console.progress("check", done, len(checkpoint.tensors))


def gather_texts(job: Job, console: Console) -> Texts:
    """Read or sample the windows of calibration and of evaluation, which share no token."""
    request, recipe = job.request, job.recipe
    evaluation = read_evaluation(job, request.eval_text) if request.eval_text else None
    count = recipe.windows if evaluation or request.output is None else recipe.windows + EVAL_WINDOWS
    if request.text is None:
        console.note("No --text given: the model samples its own calibration text.")
        windows = sample_windows(job.checkpoint, job.spec, replace(recipe, windows=count), console.progress)
    else:
        config = dict(job.spec.config)
        windows = read_windows(request.text, job.tokenizer, config, (count, recipe.length), recipe.field)
    if evaluation or request.output is None:
        warn_short(len(windows.ids), recipe, console)
        return Texts(windows, evaluation)
    return split_windows(windows, recipe, console)


def read_evaluation(job: Job, path: Path) -> Windows:
    """Read the windows of a text that is only evaluated on."""
    size = (EVAL_WINDOWS, job.recipe.length)
    return read_windows(path, job.tokenizer, dict(job.spec.config), size, job.recipe.field)


def split_windows(windows: Windows, recipe: Recipe, console: Console) -> Texts:
    """Give the last windows to evaluation: EVAL_WINDOWS of them, or a share of a text that is too short for all."""
    total = len(windows.ids)
    held = min(EVAL_WINDOWS, max(1, total // EVAL_SHARE)) if total > 1 else 0
    warn_short(total - held, recipe, console)
    if not held:
        console.warn("the text is one window, too short to keep a part for evaluation; give --eval-text FILE.")
        return Texts(windows, None)
    return Texts(windows.take(total - held), Windows(windows.ids[total - held :], f"{windows.source}, a part kept out"))


def warn_short(count: int, recipe: Recipe, console: Console) -> None:
    """Say when calibration gets fewer windows than the recipe asks for."""
    if count < recipe.windows:
        console.warn(f"the text gives {count} of {recipe.windows} calibration windows; more text gives better results.")


def decide_plan(job: Job, windows: Windows, console: Console) -> Plan:
    """Return the plan of a file, or make one; raises UserError when no stock configuration takes its shape."""
    if job.plan is not None:
        return job.plan
    plan = plan_checkpoint(Task(job.checkpoint, job.spec, windows, job.recipe), console.progress)
    new_config(job.spec, plan)
    return plan


def keeps_everything(job: Job, plan: Plan) -> bool:
    """Tell whether a plan removes nothing."""
    return plan == keep_everything(job.spec.shape)


def require_file(path: Path, overwrite: bool) -> None:
    """Raise UserError unless a file can be created at `path`; one that is there may hold someone's edits."""
    if path.is_file() and not overwrite:
        raise UserError(f"{path} exists; choose another file or add --overwrite.")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}; create it first.")
