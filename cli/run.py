"""One whole run of `compress`, from the checks to the final table. Imported only by running verbs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import cli.measure as speeds
from backends.runtime import Speed
from backends.verify import verify_folder
from cli import options
from cli.artifact import EXACT, Artifact, measure_graph, write_artifacts
from cli.budget import THIS_MACHINE, Device, describe_workload
from cli.console import Console, RunFailure
from cli.estimate import estimate_disk, estimate_memory, estimate_seconds
from cli.measure import Model
from cli.prepare import (
    Job,
    Texts,
    decide_plan,
    gather_texts,
    keeps_everything,
    prepare_job,
    require_file,
    writes_ascend,
)
from cli.render import render_choices, render_comparison, render_plan, render_proof, render_tried
from cli.request import BenchSize, Request
from cli.version import read_version
from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import MANIFEST_NAME, CheckpointWriter
from compress.evaluate import Quality
from compress.family import explain_not_stock
from compress.goal import sum_costs
from compress.pipeline import Result, Task, compress_checkpoint, describe_run, storage_dtype, write_plan
from compress.plan import Plan
from compress.recipe import Recipe, flag
from compress.report import DIFFERENT, Comparison, DeviceReport, LayerRow, PlanReport, Proof, RunReport, make_plain
from compress.shapes import LayerShape, ModelShape
from compress.spec import expected_tensors, resolve_model
from compress.surgery.describe import new_config
from compress.text import Windows
from profiles.rules import check_shape, padding_loss

LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime", "safetensors", "tokenizers")
UNDERSHOOT = 0.05  # share of the parameters that a plan may remove beyond what was asked for without a word
Scorer = Callable[[Model], dict[str, float]]
Made = tuple[Artifact, tuple[Proof, ...]]


@dataclass
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def run_compress(request: Request, console: Console, scorer: Scorer | None = None) -> RunReport:
    """Check, calibrate, plan, rebuild, write, export, verify and compare; `scorer` adds task accuracies.

    Raises UserError before anything is written, and RunFailure when the written model is not the one in memory.
    """
    speeds.limit_threads(request.speed.threads)
    clock = Clock()
    with clock.time("check"):
        job = prepare_job(request, console)
    with clock.time("text"):
        texts = gather_texts(job, console)
    with clock.time("plan"):
        plan = decide_plan(job, texts.calibration, console)
    summary = show_plan(job, plan, console)
    output, made = write_model(job, plan, texts, clock, console)
    try:
        return finish_run(job, (texts, summary, made), clock, console, scorer)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped; {output} is complete, but not yet compared with the dense model") from stop


def show_plan(job: Job, plan: Plan, console: Console) -> PlanReport:
    """Print a plan, with how it was found, and warn of what the user should know before going on."""
    summary = report_plan(job, plan)
    # What was found on the way to a plan says nothing of one that was edited since.
    tried, choices = (render_tried(plan), render_choices(plan)) if job.plan is None else ("", "")
    if tried:
        console.note(tried)
    console.show(render_plan(summary, plan))
    if choices:
        console.show(f"\n{choices}")
    reason = explain_not_stock(new_config(job.spec, plan, job.recipe))
    if reason and not explain_not_stock(job.spec.config):
        console.note(f"The result will be for ONNX and Lightpress only: {reason}.")
    for sentence in plan.notes.get("overflow", []):
        console.warn(sentence[0].lower() + sentence[1:])
    for sentence in summary.device.warnings if summary.device else ():
        console.warn(sentence[0].lower() + sentence[1:])
    warn_unspent(job, plan, console)
    asked = job.request.plan is None and job.recipe.budget == "keep"
    if asked and job.recipe.keep - summary.kept_fraction > UNDERSHOOT:
        console.warn(
            f"the allowed steps go down to {summary.kept_fraction:.2f} instead of {job.recipe.keep:g}; "
            "a smaller --multiple or more --axes come closer."
        )
    return summary


def warn_unspent(job: Job, plan: Plan, console: Console) -> None:
    """Say when the allowed steps leave much of a budget of bytes or time unused."""
    goal = job.goal
    if goal is None or job.recipe.budget == "keep" or keeps_everything(job, plan):
        return
    shape = resolve_model(new_config(job.spec, plan, job.recipe), None).shape
    spent = goal.measure(shape) if goal.measure else sum_costs(goal.costs, shape)
    if spent < (1 - 2 * UNDERSHOOT) * goal.limit:
        console.warn(
            f"the allowed steps leave {1 - spent / goal.limit:.0%} of {goal.asked} unused; a smaller --multiple, more "
            "--axes or --shapes per-layer come closer."
        )


def report_plan(job: Job, plan: Plan) -> PlanReport:
    """Put a plan into numbers."""
    new = resolve_model(new_config(job.spec, plan, job.recipe), None)
    dense, shape = job.spec.shape, new.shape  # with what the recipe adds: biases, or a rotated model's own head
    itemsize = storage_dtype(job.checkpoint, job.spec).itemsize
    kept = set(plan.kept_layers)
    return PlanReport(
        layers=tuple(make_row(row.layer, layer) for row, layer in zip(plan.layers, shape.layers, strict=True)),
        dense_layer=make_row(0, dense.layers[0]),
        dropped_layers=tuple(index for index in range(len(dense.layers)) if index not in kept),
        hidden=shape.hidden,
        dense_hidden=dense.hidden,
        parameters=shape.parameters,
        dense_parameters=dense.parameters,
        bytes=itemsize * sum(math.prod(size) for size in expected_tensors(new).values()),
        dense_bytes=job.checkpoint.nbytes,
        kept_fraction=shape.layer_parameters / dense.layer_parameters,
        peak_memory_bytes=estimate_memory(dense, job.recipe, itemsize),
        disk_bytes=estimate_disk(shape, 1.0, itemsize, job.request.export, writes_ascend(job.device)),
        predicted_loss=read_prediction(plan),
        skipped_sinks=read_count(plan, "skipped_sink_tokens"),
        pinned_channels=read_count(plan, "pinned_channels"),
        run_seconds=estimate_seconds(dense, job.recipe),
        device=report_device(job.device, dense, shape) if job.device else None,
    )


def report_device(device: Device, dense: ModelShape, shape: ModelShape) -> DeviceReport:
    """Put what a device makes of a plan into numbers."""
    before, after = device.estimate(dense), device.estimate(shape)
    return DeviceReport(
        device.profile.name, describe_workload(device), before.seconds, after.seconds,
        before.tokens_per_s, after.tokens_per_s, before.memory_bytes, after.memory_bytes,
        padding_loss(shape, device.profile, device.workload),
        tuple(check_shape(shape, device.profile, device.workload)),
    )  # fmt: skip


def read_prediction(plan: Plan) -> dict[str, float]:
    """Return the predicted loss by axis; a plan edited by hand may hold anything, or nothing, in its place."""
    noted = plan.notes.get("predicted_loss")
    pairs = noted.items() if isinstance(noted, dict) else ()
    return {str(axis): float(value) for axis, value in pairs if isinstance(value, int | float)}


def read_count(plan: Plan, key: str) -> int:
    """Return a number, or the length of a list, that a plan notes."""
    noted = plan.notes.get(key)
    return noted if isinstance(noted, int) else len(noted) if isinstance(noted, list) else 0


def make_row(index: int, layer: LayerShape) -> LayerRow:
    """Return the sizes of one layer."""
    return LayerRow(index, layer.query_heads, layer.kv_heads, layer.ffn)


def write_model(
    job: Job, plan: Plan, texts: Texts, clock: Clock, console: Console
) -> tuple[Path, Made]:
    """Rebuild, export and prove the model in a hidden folder, which becomes the output by one rename."""
    request, recipe = job.request, job.recipe
    assert request.output is not None
    # A model that stays as it is needs no calibration, only a sample to prove it with.
    windows = texts.calibration.take(2) if keeps_everything(job, plan) else texts.calibration
    task = Task(job.checkpoint, job.spec, windows, recipe)
    writer = CheckpointWriter(
        request.output, new_config(job.spec, plan, job.recipe), recipe.shard_bytes,
        overwrite=request.overwrite, source=job.checkpoint.folder,
    )  # fmt: skip
    try:
        with writer:
            for path in job.checkpoint.side_files():
                writer.add_file(path)
            with clock.time("rebuild"):
                result = compress_checkpoint(task, plan, writer, console.progress)
            with clock.time("hash"):
                manifest = describe_manifest(job, plan, texts)
            hidden = writer.seal()
            made = prepare_artifact(hidden, job, (result, texts.calibration), clock, console)
            writer.add_text(MANIFEST_NAME, encode_manifest({**manifest, "proofs": made[1]}))
            return writer.finish(), made
    finally:  # an interrupt can fall between the making of the writer's folder and the block that removes it
        shutil.rmtree(writer.work, ignore_errors=True)


def prepare_artifact(
    folder: Path, job: Job, made: tuple[Result, Windows], clock: Clock, console: Console
) -> Made:
    """Export the sealed folder for its runtime and prove it; RunFailure on a mismatch, and then nothing is kept."""
    request, (result, windows) = job.request, made
    artifact = Artifact(EXACT)
    if request.export:
        assert request.output is not None
        with clock.time("export"):
            artifact = write_artifacts(folder, request.output, job.device, windows, console)
    return artifact, prove_folder(folder, request, result, artifact, clock, console)


def describe_manifest(job: Job, plan: Plan, texts: Texts) -> dict[str, Any]:
    """Return where the model came from and how it was made."""
    source = {"path": str(job.request.source), "sha256": job.checkpoint.sha256()}
    run = describe_run(job.recipe, texts.calibration)
    if job.request.plan is not None:  # what would have made a plan was not used
        run["recipe"] = {key: value for key, value in run["recipe"].items() if key not in options.PLAN_KEYS}
        run["plan_file"] = str(job.request.plan)
    return {
        "source": source,
        **run,
        "seed": job.recipe.seed,
        "skipped_sink_tokens": plan.notes.get("skipped_sink_tokens", 0),
        "versions": {"lightpress": read_version(), **list_versions()},
        "plan": plan.to_json(),
    }


def list_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def encode_manifest(data: dict[str, Any]) -> str:
    """Return a manifest as text."""
    return json.dumps(make_plain(data), indent=2, allow_nan=False) + "\n"


def extend_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Add entries to a folder's manifest, in one rename."""
    path = folder / MANIFEST_NAME
    data = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(encode_manifest(data), encoding="utf-8")
    partial.replace(path)


def finish_run(
    job: Job, found: tuple[Texts, PlanReport, Made], clock: Clock, console: Console, scorer: Scorer | None
) -> RunReport:
    """Measure the written folder against the dense model, and add what was found to its manifest."""
    texts, summary, (artifact, proofs) = found
    request = job.request
    assert request.output is not None
    folder = request.output
    written = speeds.pair_checkpoint(open_checkpoint(folder))
    comparison = compare_run(job, written, (texts, artifact), clock, console)
    if scorer is not None:
        with clock.time("score"):
            comparison = add_accuracy(comparison, scorer((job.checkpoint, job.spec)), scorer(written))
    report = RunReport(
        folder, summary, proofs, comparison, clock.seconds, artifact.format, artifact.lines, artifact.error
    )
    made = {"graph_format": artifact.format, "artifact_error": artifact.error}
    extend_manifest(folder, {"metrics": comparison, "seconds": clock.seconds, **made})
    console.show("\n" + render_comparison(comparison))
    for line in (*map(render_proof, proofs), *artifact.lines):
        console.show(line)
    return report


def prove_folder(
    folder: Path, request: Request, result: Result, artifact: Artifact, clock: Clock, console: Console
) -> tuple[Proof, ...]:
    """Verify the written folder in fresh processes; RunFailure on a mismatch."""
    if not request.verify:
        return ()
    console.note("Verifying the output in fresh processes.")
    with clock.time("verify"):
        proofs = verify_folder(folder, result.sample_ids, result.sample_logits, request.export, artifact.sample)
    wrong = [proof for proof in proofs if proof.status == DIFFERENT]
    if wrong:
        raise RunFailure(
            f"The output failed its verification with {wrong[0].runtime}: {wrong[0].reason}; nothing was kept. "
            "Please report this with the plan (`lightpress plan`); --no-verify writes the folder all the same."
        )
    return tuple(proofs)


def compare_run(
    job: Job, written: Model, made: tuple[Texts, Artifact], clock: Clock, console: Console
) -> Comparison:
    """Measure dense against compressed, as far as the request asks for it."""
    request, dense, (texts, artifact) = job.request, (job.checkpoint, job.spec), made
    qualities: tuple[Quality | None, ...] = (None, None)
    rates: list[Speed] | list[None] = [None, None]
    notes = ["Quality: not measured, as no text was left to evaluate on.", ""]
    if texts.evaluation is not None:
        with clock.time("evaluate"):
            qualities = speeds.compare_models(dense, written, texts.evaluation, console)
        notes[0] = f"Quality: on {texts.evaluation.tokens} tokens; text: {texts.evaluation.source}."
        notes[0] += describe_graph(written, artifact, texts.evaluation, request.speed.threads)
    if request.bench:
        console.note("Measuring speed.")
        runtime = "ONNX Runtime" if request.export else "torch (eager)"
        size = speeds.fit_size(request.speed, [dense, written])
        with clock.time("bench"):
            rates = measure_run([dense, written], request.export, size, console)
        notes[1] = speeds.describe_speed(rates[1], size, runtime) + describe_place(job.device)
    sides = [
        speeds.merge_metrics(model, quality, rate)
        for model, quality, rate in zip((dense, written), qualities, rates, strict=True)
    ]
    return Comparison(sides[0], sides[1], *notes)


def describe_graph(written: Model, artifact: Artifact, windows: Windows, threads: int | None) -> str:
    """Return a sentence on the perplexity of a graph with other weights than the checkpoint's."""
    if not artifact.quantised:
        return ""
    perplexity = measure_graph(written[0].folder / speeds.ONNX_FOLDER, windows, threads)
    return (
        f" That is the checkpoint's; its {artifact.format} graph has a perplexity of {perplexity:.4g}, and its speed "
        "is compared with that of the dense model's float32 graph."
    )


def describe_place(device: Device | None) -> str:
    """Return a sentence where the speed was measured on another machine than the one planned for."""
    if device is None or device.profile.name == THIS_MACHINE:
        return ""
    return f" Measured on this machine, not on {device.profile.name}, for which the plan was made."


def measure_run(models: list[Model], export: bool, size: BenchSize, console: Console) -> list[Speed]:
    """Measure speed on ONNX Runtime, or with torch when nothing is exported."""
    if export:
        return speeds.measure_onnx(models, size, console)
    return speeds.measure_eager(models, size)


def add_accuracy(comparison: Comparison, dense: dict[str, float], compressed: dict[str, float]) -> Comparison:
    """Return the comparison with task accuracies."""
    assert comparison.dense is not None
    return replace(
        comparison,
        dense=replace(comparison.dense, accuracy=dense),
        compressed=replace(comparison.compressed, accuracy=compressed),
    )


def run_plan(request: Request, output: Path | None, overwrite: bool, console: Console) -> None:
    """Make or read a plan, print it, and write it if a file is named."""
    speeds.limit_threads(request.speed.threads)
    if output is not None:
        require_file(output, overwrite)
    job = prepare_job(request, console)
    plan = job.plan or decide_plan(job, gather_texts(job, console).calibration, console)
    summary = show_plan(job, plan, console)
    if output is not None:
        write_plan(plan, output)
        console.show(
            f"Plan written to {output}. Edit the lists of kept indices if you like, then:\n"
            f"  lightpress compress {shlex.quote(request.source)} --plan {shlex.quote(str(output))}"
            f"{list_flags(request)} -o OUT"
        )
    console.finish(make_plain({**make_plain(summary), "plan": plan.to_json(), "output": output}))


def list_flags(request: Request) -> str:
    """Return the flags that the command which follows a plan needs: the text, and what a plan file does not decide."""
    given = [("--text", request.text)] if request.text else []
    values = {item.name: (item.default, getattr(request.recipe, item.name)) for item in fields(Recipe)}
    given += [
        (flag(name), value)
        for name, (default, value) in values.items()
        if value != default and name not in options.PLAN_KEYS
    ]
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in given)
