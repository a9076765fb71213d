"""A plan in numbers, printed before a weight is touched. Imported only by running verbs."""

from __future__ import annotations

import math

from cli.budget import Device, describe_workload
from cli.console import Console
from cli.estimate import estimate_disk, estimate_memory, estimate_seconds
from cli.prepare import Job, keeps_everything, writes_ascend
from cli.recovered import add_needs
from cli.render import render_choices, render_plan, render_tried
from compress.family import explain_not_stock
from compress.goal import sum_costs
from compress.pipeline import storage_dtype
from compress.plan import Plan
from compress.report import DeviceReport, LayerRow, PlanReport
from compress.shapes import LayerShape, ModelShape
from compress.spec import expected_tensors, resolve_model
from compress.surgery.describe import new_config
from profiles.rules import check_shape, padding_loss

UNDERSHOOT = 0.05  # share of the parameters that a plan may remove beyond what was asked for without a word


def show_plan(job: Job, plan: Plan, console: Console) -> PlanReport:
    """Print a plan, with how it was found, and warn of what the user should know before going on."""
    summary = report_plan(job, plan)
    if job.request.recovery:
        summary = add_needs(job, summary)
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
