"""Everything before the first weight is touched: open, check, read the text, plan. Imported only by running verbs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.ascend_om import request_for, resolve_request
from backends.ascend_rules import settle_soc
from backends.ascend_servers import check_kernels, open_chip
from cli.budget import Device, make_goal
from cli.console import Console, format_bytes
from cli.estimate import estimate_disk, estimate_memory, estimate_spill, free_memory
from cli.export_flags import OM
from cli.request import Request
from compress.checkpoint import Checkpoint, check_finite, open_checkpoint
from compress.checkpoint_writer import check_kept, check_output, check_space
from compress.errors import UserError
from compress.goal import Goal
from compress.importance import find_score
from compress.parallel import ALONE, Group
from compress.pipeline import Task, check_turnable, plan_checkpoint, storage_dtype
from compress.plan import Plan, keep_everything, plan_shape, read_plan
from compress.recipe import Recipe
from compress.sample import sample_windows
from compress.settle import check_absorb, read_guards
from compress.solve import TOKENS_PER_INPUT, raise_ridge, short_of_tokens
from compress.spec import ModelSpec
from compress.spec_change import add_biases
from compress.surgery.absorbed_view import check_rotation
from compress.surgery.depth import check_merges
from compress.surgery.describe import REPAIRED, describe_new, new_config
from compress.surgery.job import Rebuild
from compress.text import Windows, load_tokenizer, read_documents, read_windows
from compress.weights import read_spec

TOKENIZER = "tokenizer.json"
EVAL_WINDOWS = 32
EVAL_SHARE = 5  # of a text too short for everything, one window in so many is kept for evaluation


@dataclass(frozen=True)
class Job:
    """An opened and checked request: the recipe fits the model, a given plan is read, a needed tokenizer is there.

    `group`: the processes that calibrate together.
    """

    request: Request
    checkpoint: Checkpoint
    spec: ModelSpec
    recipe: Recipe
    tokenizer: Any
    plan: Plan | None
    goal: Goal | None = None
    device: Device | None = None
    group: Group = ALONE


@dataclass(frozen=True)
class Texts:
    """Calibration windows, and windows that calibration does not see (None when the text is too short for both)."""

    calibration: Windows
    evaluation: Windows | None


def prepare_job(request: Request, console: Console, group: Group = ALONE) -> Job:
    """Check everything that can be checked without running the model; raises UserError."""
    if request.output is not None:
        check_output(request.output, overwrite=request.overwrite)
        check_writable(request.output)
    checkpoint = open_checkpoint(request.source)
    if request.output is not None:
        check_output(request.output, checkpoint.folder, request.overwrite)
        if request.overwrite:
            texts = request.recovery.texts if request.recovery else ()
            check_kept(request.output, (request.text, request.eval_text, request.plan, *texts))
    spec = read_spec(checkpoint)
    recipe = replace(request.recipe, length=min(request.recipe.length, spec.max_positions))
    plan = read_plan(request.plan, spec.shape) if request.plan else None
    if plan is None:
        check_choices(spec, recipe)
        check_biases(checkpoint, spec, recipe)
    else:
        check_plan(checkpoint, spec, plan, request)
    goal, device = make_goal(recipe, spec, storage_dtype(checkpoint, spec).itemsize, planned=plan is not None)
    check_goal(goal, recipe, console)
    tokenizer = check_texts(request, checkpoint, recipe)
    job = Job(request, checkpoint, spec, recipe, tokenizer, plan, goal, device, group)
    check_runtime(job)
    check_disk(job)
    check_memory(job)
    check_weights(checkpoint, console)
    return job


def check_runtime(job: Job) -> None:
    """Raise UserError where the device's runtime could not open the model however it was compressed."""
    device, request = job.device, job.request
    if device is None or request.output is None or not request.export or not writes_ascend(device):
        return
    try:
        if device.profile.runtime.export == OM:
            resolve_request(request_for(device.profile), job.spec)
        else:
            check_kernels(job.spec, open_chip(settle_soc(device.profile)))
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; or add --no-export to compress all the same.") from error


def check_choices(spec: ModelSpec, recipe: Recipe) -> None:
    """Raise UserError for a recipe from which no plan can be made for this model."""
    find_score(recipe.score)
    check_absorb(spec, recipe)
    check_rotation(spec, recipe)
    axes = f"--axes {','.join(recipe.axes)}"
    if recipe.rotate != "none" and "hidden" not in recipe.axes:
        raise UserError(
            f"--rotate {recipe.rotate} turns the hidden width before it is cut, and {axes} leaves it whole: "
            "add hidden to --axes, or leave --rotate out."
        )
    if recipe.depth == "clap" and "layers" not in recipe.axes:
        raise UserError(
            f"--depth clap moves attention groups of dropped layers, and {axes} drops none: "
            "add layers to --axes, or leave --depth out."
        )
    if recipe.absorb != "none" and recipe.budget == "keep" and recipe.keep == 1:
        raise UserError(f"--absorb {recipe.absorb} is part of a plan, and --keep 1 makes none: keep less than 1.")


def check_goal(goal: Goal | None, recipe: Recipe, console: Console) -> None:
    """Say when the dense model meets a budget already; UserError where norms were to be absorbed all the same."""
    if goal is None or goal.share < 1 or recipe.budget == "keep":
        return
    if recipe.absorb != "none":
        raise UserError(
            f"--absorb {recipe.absorb} is part of a plan, and the dense model already meets {goal.asked}, so that none "
            "is made: ask for more."
        )
    console.note(f"The dense model already meets {goal.asked}: nothing is removed.")


def check_biases(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> None:
    """Raise UserError where the model has no place for the biases that the recipe adds, or no use for them."""
    # Norms that are absorbed may change the family, and with it the places of biases.
    if recipe.biases != "none" and recipe.absorb == "none":
        add_biases(spec, spec.shape, REPAIRED, extend=recipe.biases == "own")
        Rebuild(checkpoint, spec, spec, keep_everything(spec.shape), recipe, {})


def check_plan(checkpoint: Checkpoint, spec: ModelSpec, plan: Plan, request: Request) -> None:
    """Raise UserError for a plan file that this model, or the rest of the recipe, cannot follow."""
    recipe = request.recipe
    Rebuild(checkpoint, spec, describe_new(spec, plan, recipe), plan, recipe, {})  # refuses what has nothing to do
    check_merges(spec, plan, lambda layer: read_guards(checkpoint, spec, layer))
    made = plan.notes.get("rotate", recipe.rotate)
    if made != recipe.rotate and len(plan.hidden) < spec.shape.hidden:
        raise UserError(
            f"{request.plan}: its hidden channels were chosen with --rotate {made}; give --rotate {made} here too."
        )
    check_turnable(plan, spec, recipe)


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
        kept = recipe.keep if job.plan is None and recipe.budget == "keep" else 1.0
        ascend = writes_ascend(job.device)
        check_space(request.output, estimate_disk(spec.shape, kept, itemsize, request.export, ascend))
    dense_graph = estimate_disk(spec.shape, 1.0, 0, request.export) if request.bench and request.output else 0
    check_space(Path(tempfile.gettempdir()), estimate_spill(spec.shape, recipe) + dense_graph)


def writes_ascend(device: Device | None) -> bool:
    """Tell whether the device gets a folder of its own beside the graph."""
    return device is not None and device.profile.runtime.export.startswith("ascend")


def check_memory(job: Job) -> None:
    """Raise UserError where the run would need more memory than this machine has free."""
    itemsize = storage_dtype(job.checkpoint, job.spec).itemsize
    share = replace(job.recipe, windows=-(-job.recipe.windows // job.group.size))
    # Every process of this machine holds a layer and its statistics, and its own part of the hidden states.
    free, needed = free_memory(), job.group.local * estimate_memory(job.spec.shape, share, itemsize)
    if free is not None and needed > free:
        raise UserError(
            f"Compressing needs about {format_bytes(needed)} of memory, and {format_bytes(free)} are free: give a "
            "smaller --spill-bytes or fewer --windows, or use a larger machine."
        )


def check_weights(checkpoint: Checkpoint, console: Console) -> None:
    """Raise UserError for the first tensor that holds NaN or infinite values."""
    for done, name in enumerate(checkpoint.tensors, 1):
        check_finite(checkpoint, [name])
        console.progress("check", done, len(checkpoint.tensors))


def check_tokenizer(folder: Path, console: Console) -> None:
    """Raise UserError for a tokenizer that cannot be read; say when there is none to go with what is written."""
    if (folder / TOKENIZER).is_file():
        load_tokenizer(folder)
    else:
        console.note(f"{folder} has no {TOKENIZER}: what is written takes token ids only.")


def gather_texts(job: Job, console: Console) -> Texts:
    """Read or sample the windows of calibration and of evaluation, which share no token."""
    request, recipe = job.request, job.recipe
    evaluation = read_evaluation(job, request.eval_text) if request.eval_text else None
    count = recipe.windows if evaluation or request.output is None else recipe.windows + EVAL_WINDOWS
    if request.text is None:
        console.note("No --text given: the model samples its own calibration text.")
        size = replace(recipe, windows=count)
        first = job.group.first  # the others wait: what is drawn depends on every logit
        drawn = sample_windows(job.checkpoint, job.spec, size, console.progress) if first else None
        windows: Windows = job.group.tell(drawn)
    else:
        config = dict(job.spec.config)
        windows = read_windows(request.text, job.tokenizer, config, (count, recipe.length), recipe.field)
    if evaluation or request.output is None:
        warn_short(len(windows.ids), recipe, console)
        return Texts(windows, evaluation)
    return split_windows(windows, recipe, console)


def gather_calibration(text: Path | None, count: int, checkpoint: Checkpoint, console: Console) -> Windows:
    """Return `count` windows of a text, or of what the model itself samples where there is none."""
    spec = read_spec(checkpoint)
    recipe = Recipe(windows=count, length=min(Recipe().length, spec.max_positions))
    if text is None:
        console.note("No --text given: the model samples its own calibration text.")
        return sample_windows(checkpoint, spec, recipe, console.progress)
    size = (recipe.windows, recipe.length)
    return read_windows(text, load_tokenizer(checkpoint.folder), dict(spec.config), size, recipe.field)


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
    plan = job.plan
    if plan is None:
        task = Task(job.checkpoint, job.spec, windows, job.recipe, job.goal, job.group)
        plan = plan_checkpoint(task, console.progress)
        new_config(job.spec, plan, job.recipe)
    warn_tokens(job, plan, windows, console)
    return plan


def warn_tokens(job: Job, plan: Plan, windows: Windows, console: Console) -> None:
    """Say when the text is too short for the least squares, which then hold on to the weights as they were cut."""
    tokens, inputs = windows.tokens - len(windows.ids), count_inputs(job, plan)  # first tokens teach nothing
    if job.recipe.repair == "lstsq" and not keeps_everything(job, plan) and short_of_tokens(tokens, inputs):
        console.warn(
            f"{tokens} tokens to refit projections that keep up to {inputs} inputs, and least squares needs "
            f"{TOKENS_PER_INPUT} for each ({TOKENS_PER_INPUT * inputs}): the ridge is raised up to "
            f"{raise_ridge(1.0, tokens, inputs):.1f} times, so the repair is weaker; give more text, or more --windows."
        )


def count_inputs(job: Job, plan: Plan) -> int:
    """Return the most inputs that a refitted projection keeps."""
    shape = plan_shape(plan, job.spec.shape)
    narrows = shape.hidden < job.spec.shape.hidden
    reads = job.recipe.inputs == "lstsq" or (job.recipe.inputs == "auto" and narrows)
    return max(shape.hidden if reads else 0, *(max(layer.query, layer.ffn) for layer in shape.layers))


def keeps_everything(job: Job, plan: Plan) -> bool:
    """Tell whether a plan removes nothing."""
    return plan == keep_everything(job.spec.shape)


def require_file(path: Path, overwrite: bool) -> None:
    """Raise UserError unless a file can be created at `path`; one that is there may hold someone's edits."""
    if path.is_file() and not overwrite:
        raise UserError(f"{path} exists; choose another file or add --overwrite.")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file.")
    if path.exists() and not path.is_file():  # the file is put in place by a rename, which would replace /dev/null
        raise UserError(f"{path}: is a device or a pipe; give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}; create it first.")
