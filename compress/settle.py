"""What a plan still needs once its shape is chosen: norms to absorb, and groups of dropped layers that live on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import UserError
from compress.family import POST_NORMS, check_absorbable
from compress.importance.findings import Findings, LayerFindings
from compress.plan import LayerPlan, Plan
from compress.recipe import Recipe
from compress.spec import ModelSpec
from compress.stats_norms import AbsorbReport, check_overflow, describe_absorption, fit_constant
from compress.surgery.depth import GUARD_ROLES, choose_groups, unlike_layers
from compress.weights import read_roles


def settle_plan(checkpoint: Checkpoint, spec: ModelSpec, findings: Findings, recipe: Recipe, plan: Plan) -> Plan:
    """Return the plan with absorbed norms and merged groups as the recipe asks for them."""
    settled = absorb_rows(spec, findings, recipe, plan) if recipe.absorb != "none" else plan
    return merge_rows(checkpoint, spec, findings, recipe, settled) if recipe.depth == "clap" else settled


def check_absorb(spec: ModelSpec, recipe: Recipe) -> None:
    """Raise UserError where the recipe absorbs norms that the model has not, or cannot do without."""
    if recipe.absorb == "none":
        return
    roles = [role for role in POST_NORMS if any(role in layer.shape.norms for layer in spec.layers)]
    if not roles:
        raise UserError(
            f"--absorb {recipe.absorb}: family '{spec.family.name}' has no norms behind its branches; leave it out."
        )
    for role in roles:
        check_absorbable(spec.family, role)


def absorb_rows(spec: ModelSpec, findings: Findings, recipe: Recipe, plan: Plan) -> Plan:
    """Mark the post-norms that go, each with its constant; raises UserError for a model that has none."""
    check_absorb(spec, recipe)
    reports = report_absorption(findings, recipe)
    gone = [report for report in reports if recipe.absorb == "all" or report.go]
    constants = list_constants(gone)
    rows = tuple(replace(row, absorbed=tuple(constants.get(row.layer, {}).items())) for row in plan.layers)
    kept = set(plan.kept_layers)
    overflow = check_overflow(report for report in gone if report.layer in kept)
    notes = {"absorption": [outline_report(report) for report in reports], "overflow": overflow}
    return replace(plan, layers=rows, notes={**plan.notes, **notes})


def list_constants(reports: Iterable[AbsorbReport]) -> dict[int, dict[str, float]]:
    """Return layer -> post-norm role -> constant."""
    constants: dict[int, dict[str, float]] = {}
    for report in reports:
        constants.setdefault(report.layer, {})[report.role] = report.constant
    return constants


def planned_constants(plan: Plan) -> dict[int, dict[str, float]]:
    """Return layer -> post-norm role -> constant: of kept layers as the plan's rows say, of dropped ones as noted.

    A rotated run needs those of dropped layers too: the dense model runs through them without its post-norms.
    """
    constants: dict[int, dict[str, float]] = {}
    for entry in plan.notes.get("absorption", ()):
        constants.setdefault(entry["layer"], {})[entry["norm"]] = entry["constant"]
    constants |= {row.layer: dict(row.absorbed) for row in plan.layers}
    return {layer: own for layer, own in constants.items() if own}


def report_absorption(findings: Findings, recipe: Recipe) -> list[AbsorbReport]:
    """Return what absorbing each post-norm would cost."""
    return [
        describe_absorption(sums, recipe.absorb_constant, recipe.absorb_limit)
        for layer in findings.layers
        for sums in layer.post_norms.values()
    ]


def outline_report(report: AbsorbReport) -> dict[str, Any]:
    """Return one report as the plan's notes hold it."""
    return {
        "layer": report.layer,
        "norm": report.role,
        "constant": report.constant,
        "variation": round(report.cv, 4),
        "error": round(report.error, 4),
        "sink_error": round(report.sink_error, 4),
        "peak": round(report.peak, 2),
        "go": report.go,
    }


def merge_rows(checkpoint: Checkpoint, spec: ModelSpec, findings: Findings, recipe: Recipe, plan: Plan) -> Plan:
    """Let the best groups of dropped layers live on in the kept layer before them (CLAP, methods 1.3)."""
    kept = plan.kept_layers
    if len(kept) == len(spec.layers):
        return plan
    rows: list[LayerPlan] = []
    reasons: dict[str, str] = {}
    for place, row in enumerate(plan.layers):
        following = kept[place + 1] if place + 1 < len(kept) else len(spec.layers)
        dropped = range(row.layer + 1, following)
        unlike = find_unlike(checkpoint, spec, row.layer, dropped)
        reasons |= {str(layer): reason for layer, reason in unlike.items()}
        merged = merge_row(findings.layers, row, [layer for layer in dropped if layer not in unlike])
        rows.append(scale_merged(findings.layers, recipe, merged))
    notes = {"not_merged": reasons} if reasons else {}
    return replace(plan, layers=tuple(rows), notes={**plan.notes, **notes})


def find_unlike(checkpoint: Checkpoint, spec: ModelSpec, kept: int, dropped: Sequence[int]) -> dict[int, str]:
    """Return the dropped layers that cannot merge with the kept one, each with the reason."""
    if not dropped:
        return {}
    guards = {layer: read_guards(checkpoint, spec, layer) for layer in (kept, *dropped)}
    reasons = {layer: unlike_layers(spec, kept, layer, guards[kept], guards[layer]) for layer in dropped}
    return {layer: reason for layer, reason in reasons.items() if reason}


def read_guards(checkpoint: Checkpoint, spec: ModelSpec, layer: int) -> Mapping[str, Tensor]:
    """Read the vectors by which layers are judged alike."""
    return read_roles(checkpoint, spec, layer, GUARD_ROLES, torch.float32)


def merge_row(layers: Sequence[LayerFindings], row: LayerPlan, dropped: Sequence[int]) -> LayerPlan:
    """Return the row with the best groups of one pool; the layer's own ranking stays where nothing moves."""
    if not dropped:
        return row
    scores = {layer: layers[layer].groups for layer in (row.layer, *dropped)}
    own, merged = choose_groups(scores, row.layer, dropped, len(row.kv_groups))
    return replace(row, kv_groups=own, merged=merged) if merged else row


def scale_merged(layers: Sequence[LayerFindings], recipe: Recipe, row: LayerPlan) -> LayerPlan:
    """Return the row with what each source's attention is scaled by where a norm follows it (methods 1.3 and 1.5).

    The norm of the row divides by the row's own rms, or by its constant: groups of another layer take the ratio.
    """
    if not row.merged or "attn_out" not in layers[row.layer].post_norms:
        return row
    sums = {source.layer: layers[source.layer].post_norms["attn_out"] for source in row.sources}
    constants = {layer: float(fit_constant(own, recipe.absorb_constant)) for layer, own in sums.items()}
    scaled = [replace(groups, scale=constants[groups.layer] / constants[row.layer]) for groups in row.merged]
    return replace(row, merged=tuple(scaled))
