"""One whole run of `compress`, from the checks to the final table. Imported only by running verbs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cli.measure as speeds
from backends.runtime import Speed
from cli import options, recovered
from cli.artifact import Artifact, measure_graph
from cli.budget import THIS_MACHINE, Device
from cli.console import Console, format_count
from cli.manifest import extend_manifest
from cli.measure import Model
from cli.page_run import write_run_page
from cli.planned import show_plan
from cli.prepare import Job, Texts, decide_plan, gather_texts, keeps_everything, prepare_job, require_file
from cli.render import render_comparison, render_proof
from cli.request import BenchSize, Recovery, Request
from cli.written import Clock, Made, make_task, write_model
from compress.checkpoint import open_checkpoint
from compress.evaluate import Quality
from compress.parallel import ALONE, Group
from compress.pipeline import compress_checkpoint, write_plan
from compress.recipe import Recipe, flag
from compress.report import Comparison, PlanReport, RunReport, make_plain
from compress.text import Windows

Scorer = Callable[[Model], dict[str, float]]


def run_compress(
    request: Request, console: Console, scorer: Scorer | None = None, group: Group = ALONE
) -> RunReport:
    """Check, calibrate, plan, rebuild, recover, write, export, verify and compare; `scorer` adds task accuracies.

    Only the first process of a `group` runs this, while the others take their part (`join_compress`). Raises UserError
    before anything is written, and RunFailure when the written model is not the one in memory.
    """
    speeds.limit_threads(request.speed.threads)
    clock, again = Clock(), None
    with clock.time("check"):
        job = prepare_job(request, console, group)
        if request.recovery:
            recovered.check_recovery(job)
    with clock.time("text"):
        texts = gather_texts(job, console)
        group.wait()  # all have looked at the output folder before it is there
        if request.recovery and request.recovery.resume:
            again = recovered.resume_plan(job, texts, console)
    with clock.time("plan"):
        plan = again or decide_plan(job, texts.calibration, console)
    summary = show_plan(replace(job, plan=again or job.plan), plan, console)
    write = recovered.write_recovered if request.recovery else write_model
    output, made = write(job, plan, texts, clock, console)
    try:
        return finish_run(job, (texts, summary, made), clock, console, scorer)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped; {output} is complete, but not yet compared with the dense model") from stop


def join_compress(request: Request, console: Console, group: Group) -> None:
    """Calibrate, plan and rebuild with the first process, which alone writes, exports, proves and measures."""
    speeds.limit_threads(request.speed.threads)
    job = prepare_job(request, console, group)
    texts = gather_texts(job, console)
    group.wait()
    plan = decide_plan(job, texts.calibration, console)
    if not keeps_everything(job, plan):
        compress_checkpoint(make_task(job, plan, texts), plan, None)


def finish_run(
    job: Job, found: tuple[Texts, PlanReport, Made], clock: Clock, console: Console, scorer: Scorer | None
) -> RunReport:
    """Measure the written folder against the dense model, and add what was found to its manifest."""
    texts, summary, made = found
    artifact, proofs, request = made.artifact, made.proofs, job.request
    assert request.output is not None
    folder = request.output
    written = speeds.pair_checkpoint(open_checkpoint(folder))
    comparison = compare_run(job, written, (texts, artifact), clock, console)
    if scorer is not None:
        with clock.time("score"):
            comparison = add_accuracy(comparison, scorer((job.checkpoint, job.spec)), scorer(written))
    report = RunReport(
        folder, summary, proofs, comparison, clock.seconds, artifact.format, artifact.lines, artifact.error,
        made.recovery,
    )  # fmt: skip
    facts = {"graph_format": artifact.format, "artifact_error": artifact.error}
    manifest = extend_manifest(folder, {"metrics": comparison, "seconds": clock.seconds, **facts})
    page = write_run_page(report, request.source, name_command(request), manifest)
    if made.recovery is not None:
        console.show(f"\n{render_recovery(made.recovery)}")
    console.show("\n" + render_comparison(comparison))
    for line in (*map(render_proof, proofs), *artifact.lines):
        console.show(line)
    if page is not None:
        console.show(f"Report: {page}")
    return report


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


def render_recovery(facts: Mapping[str, Any]) -> str:
    """Return what training did, in one line."""
    held = facts["heldout_loss"]
    moved = "" if held["before"] is None else (
        f": held-out loss {held['before']:.4f} before, {held['after']:.4f} after, in nats per token"
    )  # fmt: skip
    return f"Recovery on {format_count(facts['tokens'])} tokens in {facts['seconds']:.0f} s{moved}."


def add_accuracy(comparison: Comparison, dense: dict[str, float], compressed: dict[str, float]) -> Comparison:
    """Return the comparison with task accuracies."""
    assert comparison.dense is not None
    return replace(
        comparison,
        dense=replace(comparison.dense, accuracy=dense),
        compressed=replace(comparison.compressed, accuracy=compressed),
    )


def run_plan(
    request: Request, output: Path | None, overwrite: bool, console: Console, group: Group = ALONE
) -> None:
    """Make or read a plan, print it, and write it if a file is named; only the first process prints and writes."""
    speeds.limit_threads(request.speed.threads)
    if output is not None:
        require_file(output, overwrite)
    job = prepare_job(request, console, group)
    plan = job.plan or decide_plan(job, gather_texts(job, console).calibration, console)
    group.wait()  # all have looked at the plan file before it is there
    if not group.first:
        return
    summary = show_plan(job, plan, console)
    if output is not None:
        write_plan(plan, output)
        console.show(
            f"Plan written to {output}. Edit the lists of kept indices if you like, then:\n"
            f"  lightpress compress {shlex.quote(request.source)} --plan {shlex.quote(str(output))}"
            f"{list_flags(request)} -o OUT"
        )
    console.finish(make_plain({**make_plain(summary), "plan": plan.to_json(), "output": output}))


def name_command(request: Request) -> str:
    """Return the command that makes the same again."""
    flags = list_flags(request, () if request.plan is None else options.PLAN_KEYS)
    plan = f" --plan {shlex.quote(str(request.plan))}" if request.plan else ""
    training, graph = list_training(request.recovery), "" if request.export else " --no-export"
    source, output = shlex.quote(request.source), shlex.quote(str(request.output))
    return f"lightpress compress {source}{plan}{flags}{training}{graph} -o {output}"


def list_training(recovery: Recovery | None) -> str:
    """Return the flags of the training after the rebuild."""
    if recovery is None:
        return ""
    given: list[tuple[str, object]] = [("--recover", recovery.tokens)]
    given += [("--recover-text", path) for path in recovery.texts]
    given += [("--recover-lr", recovery.rate)] if recovery.rate is not None else []
    flags = "".join(f" {name} {shlex.quote(str(value))}" for name, value in given)
    return flags + " --recover-offline" * recovery.offline


def list_flags(request: Request, decided: Collection[str] = options.PLAN_KEYS) -> str:
    """Return the text and all of the recipe that is not the default, but what is `decided`: by a plan file, say."""
    texts = (("--text", request.text), ("--eval-text", request.eval_text))
    given: list[tuple[str, object]] = [(name, path) for name, path in texts if path]
    values = {item.name: (item.default, getattr(request.recipe, item.name)) for item in fields(Recipe)}
    given += [
        (flag(name), value)
        for name, (default, value) in values.items()
        if value != default and name not in decided
    ]
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in given)
