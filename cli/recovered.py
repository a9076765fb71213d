"""Training between the rebuild and the export: `compress --recover`. Imported only by running verbs.

    OUT.compressed/            the rebuilt model with its manifest, its plan, and its text (cli/recovered_text.py)
    OUT.recovered.training/    the states of the training (cli/training.py)
    OUT.recovered/             the trained model
    OUT/                       the trained model with its graphs, proved; then the others go

Each folder gets its name when it is whole, so that --resume goes on with the first one that is missing, whatever
stopped the run.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cli.budget import COUNTS, read_amount
from cli.console import Console, RunFailure, format_bytes
from cli.estimate import estimate_recovery, estimate_training, free_memory
from cli.manifest import encode_manifest
from cli.prepare import Job, Texts, keeps_everything
from cli.recover import recover
from cli.recovered_text import TRAIN_NAME, check_apart, find_training_text, list_whole, write_training_text
from cli.trained import open_model, read_manifest
from cli.training import run_recover
from cli.training_job import ACTIVATION_BYTES
from cli.training_output import CURVE_OUT
from cli.written import Clock, Made, describe_manifest, open_folder, prepare_artifact
from compress.checkpoint_writer import MANIFEST_NAME, check_space, remove_folder
from compress.errors import UserError
from compress.hidden import release_memory
from compress.pipeline import SAMPLE, Result, Task, compress_checkpoint, storage_dtype
from compress.plan import Plan, plan_shape, read_plan
from compress.recover.data import StreamOptions, check_documents, make_options, open_stream
from compress.recover.model import Frozen, estimate_activations
from compress.recover.state import RUN_NAME
from compress.recover.teacher import BUDGET_BYTES
from compress.report import PlanReport, make_plain
from compress.surgery.describe import new_config
from compress.text import load_tokenizer, read_documents

COMPRESSED, RECOVERED, TRAINING = "compressed", "recovered", "recovered.training"
PLAN_NAME = "plan.json"
# Of a manifest, what must be the same for a run to go on.
SAME = ("source", "recipe", "text", "tokens", "plan_file")


def name_sibling(job: Job, kind: str) -> Path:
    """Return a folder beside the output."""
    assert job.request.output is not None
    output = job.request.output.absolute()
    return output.with_name(f"{output.name}.{kind}")


# Checks


def check_recovery(job: Job) -> None:
    """Raise UserError for what would stop the training once the model is rebuilt."""
    recovery = job.request.recovery
    assert recovery is not None
    read_amount(recovery.tokens, COUNTS, "--recover", "2M")
    check_siblings(job)
    check_removal(job)
    load_tokenizer(job.checkpoint.folder)
    check_apart(job)
    whole = list_whole(job)
    if whole:
        fit_batch(whole, job)
    check_room(job)
    check_lines(job, whole)


def check_siblings(job: Job) -> None:
    """Raise UserError where an earlier run left something, unless it is to go on, and then where it left nothing."""
    recovery, first = job.request.recovery, name_sibling(job, COMPRESSED)
    assert recovery is not None
    if recovery.resume and not first.is_dir():
        raise UserError(f"There is no run to resume at {first}; leave --resume out to start one.")
    left = [path for path in (name_sibling(job, kind) for kind in (COMPRESSED, TRAINING, RECOVERED)) if path.exists()]
    if left and not recovery.resume:
        raise UserError(f"{left[0]} is of a run that did not finish: go on with --resume, or delete that folder.")


def check_removal(job: Job) -> None:
    """Raise UserError where nothing will be removed, so that training would have nothing to bring back."""
    share = job.recipe.keep if job.goal is None else job.goal.share
    if keeps_everything(job, job.plan) if job.plan is not None else share == 1:
        raise UserError(
            "--recover trains back what was removed, and nothing is removed here: leave it out, or keep less."
        )


def check_lines(job: Job, whole: tuple[Path, ...]) -> None:
    """Raise UserError for the first line that training could not read, however far down: it would be met much later."""
    request = job.request
    held = (request.eval_text,) if request.eval_text is not None else ()
    if whole or held:
        check_documents((*whole, *held), make_stream_options(job))
    if request.text is not None and not held:  # is written anew, without what is kept out
        for _ in read_documents(request.text, job.recipe.field):
            pass


def check_room(job: Job) -> None:
    """Raise UserError where the disk or the memory is too small for training and its states."""
    shape = job.spec.shape
    share = job.recipe.keep if job.goal is None else job.goal.share
    count = int(share * shape.layer_parameters) + shape.embedding_parameters
    parameters = plan_shape(job.plan, shape).parameters if job.plan is not None else count
    memory, disk = estimate_needs(job, parameters)
    assert job.request.output is not None
    check_space(job.request.output, disk)
    free = free_memory()
    if free is not None and memory > free:
        raise UserError(
            f"--recover needs about {format_bytes(memory)} of memory, and {format_bytes(free)} are free: compress "
            "without it and train adapters (`lightpress recover OUT --lora 16`), or use a larger machine."
        )


def estimate_needs(job: Job, parameters: int) -> tuple[int, int]:
    """Return bytes of memory and of disk that training a model of so many parameters needs, with its two folders."""
    default, recovery = read_defaults(), job.request.recovery
    assert recovery is not None
    kept = min(estimate_activations(job.spec, default["batch"] * default["length"]), ACTIVATION_BYTES)
    stored = parameters * storage_dtype(job.checkpoint, job.spec).itemsize
    memory, disk = estimate_training(parameters, 2 * stored, kept)
    tokens = read_amount(recovery.tokens, COUNTS, "--recover", "2M")
    return memory, disk + math.ceil(BUDGET_BYTES * tokens) * recovery.offline


def add_needs(job: Job, summary: PlanReport) -> PlanReport:
    """Return the report of a plan with the memory, disk and time of the training."""
    recovery = job.request.recovery
    assert recovery is not None
    memory, disk = estimate_needs(job, summary.parameters)
    tokens = read_amount(recovery.tokens, COUNTS, "--recover", "2M")
    seconds = estimate_recovery(summary.parameters, summary.dense_parameters, tokens)
    return replace(
        summary,
        peak_memory_bytes=max(summary.peak_memory_bytes, memory),
        disk_bytes=summary.disk_bytes + disk,
        run_seconds=(summary.run_seconds or 0.0) + seconds,
    )


def resume_plan(job: Job, texts: Texts, console: Console) -> Plan:
    """Return the plan of the run that goes on; UserError where that was another one."""
    folder = name_sibling(job, COMPRESSED)
    plan = read_plan(folder / PLAN_NAME, job.spec.shape)
    made, now = read_manifest(folder), make_plain(describe_manifest(job, job.plan or plan, texts))
    for name in (*SAME, *(["plan"] if job.plan else [])):
        other = find_difference(name, made.get(name), now.get(name))
        if other:
            raise UserError(f"{folder} was made with another {other}; resume with the same, or delete it.")
    if job.request.eval_text is None and job.request.text is not None and not (folder / TRAIN_NAME).is_file():
        raise UserError(
            f"{folder} was made with an --eval-text, so that training sees all of {job.request.text}; resume with "
            "it, or delete that folder."
        )
    console.note(f"Going on with {folder}: the model is rebuilt already.")
    if name_sibling(job, RECOVERED).is_dir():
        check_trained(job)
    return plan


def check_trained(job: Job) -> None:
    """Raise UserError where the trained model that waits for its export was trained in another way than asked."""
    folder, asked = name_sibling(job, RECOVERED), make_plain(fill_request(job))
    facts = read_manifest(folder)["recovery"][-1]
    made = {**facts["settings"], "rate": facts["rate"]}
    for name in ("text", "field", "tokens", "batch", "length", "seed", "offline", *(["rate"] if asked["rate"] else [])):
        if made.get(name) != asked[name]:
            raise UserError(
                f"{folder} was trained with another {name} ({made.get(name)}, now {asked[name]}); resume with the "
                "same, or delete it to train again."
            )


def find_difference(name: str, made: Any, now: Any) -> str:
    """Return the name of the first thing that differs; empty where nothing does."""
    if made == now:
        return ""
    if isinstance(made, dict) and isinstance(now, dict) and name == "recipe":
        key = next(key for key in sorted({*made, *now}) if made.get(key) != now.get(key))
        return f"{key} ({made.get(key)}, now {now.get(key)})"
    return {"source": "model", "plan": "plan", "tokens": "number of windows"}.get(name, f"{name} ({made}, now {now})")


# Rows


def fit_batch(paths: tuple[Path, ...], job: Job) -> tuple[int, int]:
    """Return rows and length of a batch: those of `recover`, cut to the windows of this run and to the text.

    Raises UserError for files that are no training text, or hold less than one row.
    """
    options = make_stream_options(job)
    rows, length = options.rows, options.length
    options = replace(options, most_tokens=rows * length)
    stream = open_stream(list(paths), load_tokenizer(job.checkpoint.folder), options)
    tokens = stream.facts.tokens
    stream.close()
    if tokens < length:
        raise UserError(
            f"{', '.join(map(str, paths))}: gives {tokens} tokens, less than one row of {length} to train on; give "
            "more with --recover-text, or a smaller --length."
        )
    return min(rows, tokens // length), length


def make_stream_options(job: Job) -> StreamOptions:
    """Return how `recover` reads a text, in rows no longer than the windows of this run."""
    default, recipe = read_defaults(), job.recipe
    size = (default["batch"], min(default["length"], recipe.length))
    folder, config = job.checkpoint.folder, dict(job.spec.config)
    return make_options(folder, config, size, field=recipe.field, seed=recipe.seed)


# Stages


def write_recovered(job: Job, plan: Plan, texts: Texts, clock: Clock, console: Console) -> tuple[Path, Made]:
    """Rebuild, train, export and prove the model, each stage from the folder of the one before."""
    folder, trained = name_sibling(job, COMPRESSED), name_sibling(job, RECOVERED)
    try:
        if not folder.is_dir():
            write_compressed(job, plan, texts, clock, console)
        if not trained.is_dir():
            release_memory()
            with clock.time("recover"):
                train_back(job, console)
        output, made = write_trained(job, plan, texts, clock, console)
    except KeyboardInterrupt as stop:
        left = f"stopped; {folder} keeps the rebuilt model: give the same command with --resume to go on"
        raise KeyboardInterrupt(str(stop) or (left if folder.is_dir() else "")) from stop
    for kind in (TRAINING, RECOVERED, COMPRESSED):  # the one that --resume looks for goes last
        remove_folder(name_sibling(job, kind))
    return output, made


def write_compressed(job: Job, plan: Plan, texts: Texts, clock: Clock, console: Console) -> None:
    """Rebuild the model into its own folder, beside the text that it will be trained on."""
    check_removal(replace(job, plan=plan))
    task = Task(job.checkpoint, job.spec, texts.calibration, job.recipe)
    with open_folder(job, new_config(job.spec, plan, job.recipe), name_sibling(job, COMPRESSED)) as writer:
        fit_batch(write_training_text(writer.work, job, texts).paths, job)
        with clock.time("rebuild"):
            compress_checkpoint(task, plan, writer, console.progress)
        writer.add_text(PLAN_NAME, json.dumps(plan.to_json()) + "\n")
        with clock.time("hash"):
            writer.add_text(MANIFEST_NAME, encode_manifest(describe_manifest(job, plan, texts)))
        writer.finish()


def train_back(job: Job, console: Console) -> None:
    """Train the rebuilt model as `recover` does; RunFailure where it diverges, with the last good state kept."""
    try:
        with Console(as_json=True, quiet=console.quiet) as silent:  # its result is a part of ours
            run_recover(fill_request(job), silent)
    except RunFailure as failure:
        raise RunFailure(str(failure).replace("--lr", "--recover-lr")) from failure


def read_defaults() -> dict[str, Any]:
    """Return the defaults of the flags of `recover`."""
    given = inspect.signature(recover).parameters.values()
    return {item.name: item.default for item in given if item.default is not inspect.Parameter.empty}


def fill_request(job: Job) -> dict[str, Any]:
    """Return what `recover` would be asked for by hand."""
    request, recipe, folder = job.request, job.recipe, name_sibling(job, COMPRESSED)
    recovery, text = request.recovery, find_training_text(folder, job)
    assert recovery is not None
    rows, length = fit_batch(text.paths, job)
    return {
        **read_defaults(),
        "student": str(folder), "teacher": request.source, "output": name_sibling(job, RECOVERED),
        "text": list(text.paths), "eval_text": text.heldout, "field": recipe.field, "seed": recipe.seed,
        "tokens": recovery.tokens, "batch": rows, "length": length, "rate": recovery.rate,
        "offline": recovery.offline, "threads": request.speed.threads,
        "no_verify": True,  # the output is proved, with its graph
        "resume": (name_sibling(job, TRAINING) / RUN_NAME).is_file(),
    }  # fmt: skip


def write_trained(job: Job, plan: Plan, texts: Texts, clock: Clock, console: Console) -> tuple[Path, Made]:
    """Write the trained model into the output, with its graphs and proofs."""
    folder = name_sibling(job, RECOVERED)
    checkpoint, spec = open_model(str(folder))
    manifest = read_manifest(folder)
    facts = describe_recovery(job, manifest["recovery"][-1])
    assert job.request.output is not None
    with open_folder(job, checkpoint.config, job.request.output) as writer:
        for name in checkpoint.tensors:
            writer.add(name, checkpoint.read_one(name))
        writer.add_file(folder / CURVE_OUT)
        ids = texts.calibration.ids[: SAMPLE[0], : SAMPLE[1]]
        model = Frozen(checkpoint, spec)
        logits = model.logits(model.streams([(ids, torch.zeros_like(ids))])[0][0])
        result = Result(plan, spec, ids, logits)
        made = replace(
            prepare_artifact(writer.seal(), job, (result, texts.calibration), clock, console), recovery=facts
        )
        entries = {**manifest, "recovery": [facts], "proofs": made.proofs}
        writer.add_text(MANIFEST_NAME, encode_manifest(entries))
        return writer.finish(), made


def describe_recovery(job: Job, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training did, with where its text came from instead of a folder that is gone."""
    request = job.request
    assert request.recovery is not None
    names = request.recovery.texts or ((request.text,) if request.text else ())
    kept = {name: value for name, value in facts.items() if name not in ("student", "proofs")}
    return {**kept, "text": [str(name) for name in names] or ["sampled from the dense model"]}
