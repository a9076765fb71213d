"""The plan: which layers, groups and channels stay, decided from damage curves under a budget, before any surgery."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.importance.findings import Findings
from compress.recipe import Recipe
from compress.shapes import LayerShape, ModelShape
from compress.spec import ModelSpec
from compress.spec_writer import find_writer

VERSION = 1
OBSERVED = ("dense_shape", "pinned_channels", "scored_tokens", "skipped_sink_tokens")
# Accelerators and vector units work on tiles of 16 (reference: ascend tiles, AVX-512 lanes of float32).
DEFAULT_MULTIPLE = 16
# Loss grows faster than damage: 1.15 to 1.3 on FFN, KV and depth of the models we measured (benchmarks/damage.py).
LOSS_EXPONENT = 1.2


@dataclass(frozen=True)
class LayerPlan:
    """One kept layer: its index in the dense model and what stays of it."""

    layer: int
    kv_groups: tuple[int, ...]
    ffn: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Kept indices of every axis; `notes` holds predictions and provenance, which reading ignores."""

    hidden: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    notes: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Indices of the kept layers in the dense model."""
        return tuple(layer.layer for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        rows = [{"layer": x.layer, "kv_groups": list(x.kv_groups), "ffn": list(x.ffn)} for x in self.layers]
        return {"version": VERSION, **self.notes, "hidden": list(self.hidden), "layers": rows}


def plan_shape(plan: Plan, shape: ModelShape) -> ModelShape:
    """Return the shape that a plan makes of a dense shape."""
    layers = tuple(shape.layers[x.layer].resize(len(x.kv_groups), len(x.ffn)) for x in plan.layers)
    return replace(shape, hidden=len(plan.hidden), layers=layers)


def keep_everything(shape: ModelShape) -> Plan:
    """Return the plan that removes nothing."""
    layers = tuple(LayerPlan(i, tuple(range(x.kv_heads)), tuple(range(x.ffn))) for i, x in enumerate(shape.layers))
    return Plan(tuple(range(shape.hidden)), layers)


def read_plan(path: Path, shape: ModelShape) -> Plan:
    """Read a (possibly edited) plan file; raises UserError naming the first entry that does not fit the model."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such plan file; make one with `lightpress plan CKPT -o {path}`.") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: is not a readable plan file ({error}).") from error
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("layers"), list):
        raise UserError(f"{path}: is not a plan of version {VERSION}; make one with `lightpress plan`.")
    made_for = data.get("dense_shape")
    if made_for is not None and made_for != outline_shape(shape):
        raise UserError(f"{path}: was made for another model ({made_for}, this one is {outline_shape(shape)}).")
    hidden = check_indices(data.get("hidden"), shape.hidden, f"{path}: hidden")
    places = [row.get("layer") if isinstance(row, dict) else None for row in data["layers"]]
    check_indices(places, len(shape.layers), f"{path}: layers")
    layers = tuple(read_layer_plan(row, shape.layers[row["layer"]], path) for row in data["layers"])
    # What was predicted for the plan as it was made does not hold for an edited one; what was seen does.
    notes = {key: data[key] for key in OBSERVED if key in data}
    return Plan(hidden, layers, notes)


def outline_shape(shape: ModelShape) -> dict[str, int]:
    """Return the sizes by which a plan knows the model that it was made for."""
    layer = shape.layers[0]
    sizes = {"layers": len(shape.layers), "hidden": shape.hidden, "kv_groups": layer.kv_heads, "ffn": layer.ffn}
    return {**sizes, "vocabulary": shape.vocab}


def read_layer_plan(row: dict[str, Any], layer: LayerShape, path: Path) -> LayerPlan:
    """Read the entry of one layer."""
    where = f"{path}: layer {row['layer']}"
    groups = check_indices(row.get("kv_groups"), layer.kv_heads, f"{where} kv_groups")
    return LayerPlan(row["layer"], groups, check_indices(row.get("ffn"), layer.ffn, f"{where} ffn"))


def check_indices(values: Any, size: int, where: str) -> tuple[int, ...]:
    """Return a list of rising indices below `size`; raises UserError otherwise."""
    if not isinstance(values, list) or not values or not all(type(value) is int for value in values):
        raise UserError(f"{where} must be a list of at least one whole number.")
    if sorted(set(values)) != values or values[0] < 0 or values[-1] >= size:
        raise UserError(f"{where} must be rising numbers from 0 to {size - 1}, each at most once.")
    return tuple(values)


@dataclass(frozen=True)
class Candidate:
    """A uniform shape: layers dropped, KV groups, hidden width and FFN channels that stay."""

    dropped: int
    groups: int
    hidden: int
    ffn: int


def make_plan(spec: ModelSpec, findings: Findings, recipe: Recipe, weights: Mapping[str, float]) -> Plan:
    """Choose the uniform shape of least predicted loss within the budget, then the units that stay.

    `weights` says what damage costs on each axis (1 where absent). Raises UserError when no shape on the
    grid fits the budget.
    """
    budget = int(recipe.keep * spec.shape.layer_parameters)
    candidates = list_candidates(spec, findings, recipe, budget)
    if not candidates:
        raise UserError(
            f"--keep {recipe.keep:g} cannot be met by pruning {','.join(recipe.axes)} in allowed steps; "
            "allow more --axes, a smaller --multiple, or keep more."
        )
    # The damage of a hidden width is a sum over all norms: once per width, not once per candidate.
    hidden = {width: findings.hidden_damage(width) for width in {candidate.hidden for candidate in candidates}}
    losses = [
        predict_loss(axis_damage(findings, candidate, hidden[candidate.hidden]), weights) for candidate in candidates
    ]
    best, predicted = min(zip(candidates, losses, strict=True), key=lambda pair: sum(pair[1].values()))
    plan = fill_plan(spec, findings, best)
    return replace(plan, notes=describe_choice(spec, findings, plan, predicted))


def step_size(size: int, recipe: Recipe) -> int:
    """Return the multiple that a channel count keeps to: never a coarser one than the dense model keeps itself."""
    return recipe.multiple or math.gcd(size, DEFAULT_MULTIPLE)


def list_candidates(spec: ModelSpec, findings: Findings, recipe: Recipe, budget: int) -> list[Candidate]:
    """List shapes on the grid that fit the budget, each with as many FFN channels as it allows."""
    shape = spec.shape
    step, ffn_step = step_size(shape.hidden, recipe), step_size(shape.layers[0].ffn, recipe)
    groups = min(layer.kv_heads for layer in shape.layers)
    drops = range(len(findings.drop_order) + 1) if "layers" in recipe.axes else range(1)
    group_counts = range(groups, 0, -1) if "kv" in recipe.axes else (groups,)
    pinned = max(len(findings.pinned), step)
    widths = grid(shape.hidden, step, pinned) if "hidden" in recipe.axes else (shape.hidden,)
    found = []
    for dropped in drops:
        kept = [i for i in range(len(shape.layers)) if i not in findings.drop_order[:dropped]]
        for count in group_counts:
            for width in widths:
                sized = replace(shape.keep_layers(kept), hidden=width)
                ffn = fit_ffn(sized, count, ffn_step if "ffn" in recipe.axes else 0, budget)
                if ffn and writable(spec, sized, count, ffn):
                    found.append(Candidate(dropped, count, width, ffn))
    return found


def grid(size: int, step: int, least: int) -> tuple[int, ...]:
    """Return `size` and the multiples of `step` below it, down to `least`."""
    return (size, *range((size - 1) // step * step, least - 1, -step))


def fit_ffn(shape: ModelShape, groups: int, step: int, budget: int) -> int:
    """Return the most FFN channels that fit the budget (all or none when `step` is 0); 0 when nothing fits."""
    full = min(layer.ffn for layer in shape.layers)
    bare = replace(shape, layers=tuple(layer.resize(groups, 0) for layer in shape.layers))
    each = replace(shape, layers=tuple(layer.resize(groups, 1) for layer in shape.layers))
    per_channel = each.layer_parameters - bare.layer_parameters
    fitting = (budget - bare.layer_parameters) // per_channel
    if fitting >= full:
        return full
    return max(fitting // step * step, 0) if step else 0


def writable(spec: ModelSpec, shape: ModelShape, groups: int, ffn: int) -> bool:
    """Tell whether some stock configuration class accepts the shape."""
    sized = replace(shape, layers=tuple(layer.resize(groups, ffn) for layer in shape.layers))
    return find_writer(spec, sized) is not None


def axis_damage(findings: Findings, candidate: Candidate, hidden: float | None = None) -> dict[str, float]:
    """Return the predicted damage of each axis's cuts: stream error per stream energy, summed over layers.

    `hidden` is the damage of the candidate's width where the caller has it already.
    """
    gone = set(findings.drop_order[: candidate.dropped])
    kept = [layer for layer in findings.layers if layer.index not in gone]
    return {
        "ffn": sum(layer.ffn_damage(candidate.ffn) for layer in kept),
        "kv": sum(layer.kv_damage(candidate.groups) for layer in kept),
        "hidden": findings.hidden_damage(candidate.hidden) if hidden is None else hidden,
        "layers": sum(layer.drop_damage for layer in findings.layers if layer.index in gone),
    }


def predict_loss(damage: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the predicted loss of each axis's cuts: what the axis costs times its damage to the power 1.2."""
    return {axis: weights.get(axis, 1.0) * value**LOSS_EXPONENT for axis, value in damage.items()}


def fill_plan(spec: ModelSpec, findings: Findings, chosen: Candidate) -> Plan:
    """Pick the units of a chosen shape by their rankings."""
    gone = set(findings.drop_order[: chosen.dropped])
    layers = tuple(
        LayerPlan(layer.index, layer.kv.keep(chosen.groups), layer.ffn.keep(chosen.ffn))
        for layer in findings.layers
        if layer.index not in gone
    )
    return Plan(findings.keep_hidden(chosen.hidden), layers)


def describe_choice(spec: ModelSpec, findings: Findings, plan: Plan, predicted: Mapping[str, float]) -> dict[str, Any]:
    """Return the notes of a plan: sizes, predictions and what the statistics saw."""
    shape = plan_shape(plan, spec.shape)
    return {
        "dense_shape": outline_shape(spec.shape),
        "dense_parameters": spec.shape.parameters,
        "parameters": shape.parameters,
        "kept_fraction": shape.layer_parameters / spec.shape.layer_parameters,
        "predicted_loss": {axis: round(value, 5) for axis, value in predicted.items()},
        "dropped_layers": sorted(set(range(len(spec.layers))) - set(plan.kept_layers)),
        "pinned_channels": list(findings.pinned),
        "scored_tokens": findings.tokens,
        "skipped_sink_tokens": findings.sinks,
    }


def describe_counts(values: Sequence[int]) -> str:
    """Return '3' or '2-4' for a list of counts."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"
