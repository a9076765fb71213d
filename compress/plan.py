"""The plan: which layers, groups and channels stay, decided from damage curves under a budget, before any surgery."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.family import POST_NORMS
from compress.importance.findings import Findings
from compress.recipe import Recipe
from compress.shapes import LayerShape, ModelShape
from compress.spec import ModelSpec

VERSION = 1
OBSERVED = ("dense_shape", "rotate", "pinned_channels", "scored_tokens", "skipped_sink_tokens", "absorption")
# Accelerators and vector units work on tiles of 16 (reference: ascend tiles, AVX-512 lanes of float32).
DEFAULT_MULTIPLE = 16
# Loss grows faster than damage: 1.15 to 1.3 on FFN, KV and depth of the models we measured (benchmarks/damage.py).
LOSS_EXPONENT = 1.2


@dataclass(frozen=True)
class MergedGroups:
    """KV groups of one dense layer; in a plan, groups of a dropped layer that live on in a kept one (CLAP).

    `scale`, where a norm follows attention: the layer's calibrated 1 / rms over that of the layer it joins.
    """

    layer: int
    kv_groups: tuple[int, ...]
    scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        scale = {"scale": self.scale} if self.scale != 1 else {}
        return {"layer": self.layer, "kv_groups": list(self.kv_groups), **scale}


@dataclass(frozen=True)
class LayerPlan:
    """One kept layer: its index in the dense model, what stays of it, and the dropped layers' groups it takes in.

    `absorbed` names the post-norms that go, each with the constant that takes the place of its 1 / rms.
    """

    layer: int
    kv_groups: tuple[int, ...]
    ffn: tuple[int, ...]
    merged: tuple[MergedGroups, ...] = ()
    absorbed: tuple[tuple[str, float], ...] = ()

    @property
    def sources(self) -> tuple[MergedGroups, ...]:
        """All groups of the new layer's attention in their order there: its own, then those taken in."""
        return (MergedGroups(self.layer, self.kv_groups), *self.merged)

    @property
    def group_count(self) -> int:
        """KV groups of the new layer."""
        return sum(len(source.kv_groups) for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        merged = {"merged": [groups.to_json() for groups in self.merged]} if self.merged else {}
        absorbed = {"absorbed": dict(self.absorbed)} if self.absorbed else {}
        return {"layer": self.layer, "kv_groups": list(self.kv_groups), **merged, "ffn": list(self.ffn), **absorbed}


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
        rows = [layer.to_json() for layer in self.layers]
        return {"version": VERSION, **self.notes, "hidden": list(self.hidden), "layers": rows}


def plan_shape(plan: Plan, shape: ModelShape) -> ModelShape:
    """Return the shape that a plan makes of a dense shape."""
    return replace(shape, hidden=len(plan.hidden), layers=tuple(row_shape(row, shape) for row in plan.layers))


def row_shape(row: LayerPlan, shape: ModelShape) -> LayerShape:
    """Return the shape of one kept layer."""
    sized = shape.layers[row.layer].resize(row.group_count, len(row.ffn))
    gone = dict(row.absorbed)
    return replace(sized, norms=tuple(role for role in sized.norms if role not in gone))


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
    kept = check_indices(places, len(shape.layers), f"{path}: layers")
    layers = tuple(read_layer_plan(row, shape, kept, path) for row in data["layers"])
    # What was predicted for the plan as it was made does not hold for an edited one; what was seen does.
    notes = {key: data[key] for key in OBSERVED if key in data}
    check_absorption(notes.get("absorption", []), shape, f"{path}: absorption")
    if notes.get("pinned_channels"):
        check_indices(notes["pinned_channels"], shape.hidden, f"{path}: pinned_channels")
    return Plan(hidden, layers, notes)


def outline_shape(shape: ModelShape) -> dict[str, int]:
    """Return the sizes by which a plan knows the model that it was made for."""
    layer = shape.layers[0]
    sizes = {"layers": len(shape.layers), "hidden": shape.hidden, "kv_groups": layer.kv_heads, "ffn": layer.ffn}
    return {**sizes, "vocabulary": shape.vocab}


def read_layer_plan(row: dict[str, Any], shape: ModelShape, kept: tuple[int, ...], path: Path) -> LayerPlan:
    """Read the entry of one layer; `kept` are all layers that the plan keeps."""
    index, where = row["layer"], f"{path}: layer {row['layer']}"
    merged = read_merged(row.get("merged", []), index, shape, kept, where)
    groups: tuple[int, ...] = ()
    if not (merged and row.get("kv_groups") == []):  # a layer may live on borrowed groups alone
        groups = check_indices(row.get("kv_groups"), shape.layers[index].kv_heads, f"{where} kv_groups")
    ffn = check_indices(row.get("ffn"), shape.layers[index].ffn, f"{where} ffn")
    return LayerPlan(index, groups, ffn, merged, read_absorbed(row.get("absorbed", {}), shape.layers[index], where))


def read_absorbed(entries: Any, layer: LayerShape, where: str) -> tuple[tuple[str, float], ...]:
    """Read the post-norms that go from a layer, with their constants."""
    known = [role for role in POST_NORMS if role in layer.norms]
    if not isinstance(entries, dict) or any(role not in known for role in entries):
        have = " and ".join(known) or "none"
        raise UserError(f"{where} absorbed must name norms behind branches (this layer has {have}), each a number.")
    return tuple((role, check_positive(constant, f"{where} absorbed: {role}")) for role, constant in entries.items())


def check_absorption(entries: Any, shape: ModelShape, where: str) -> None:
    """Raise UserError unless each entry names a layer, a norm behind one of its branches and that norm's constant."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where} must be the list that `lightpress plan` wrote; make the plan anew.")
    for entry in entries:
        layer = entry.get("layer")
        if type(layer) is not int or not 0 <= layer < len(shape.layers):
            raise UserError(f"{where} names layer {layer!r}, but the model has layers 0 to {len(shape.layers) - 1}.")
        read_absorbed({str(entry.get("norm")): entry.get("constant")}, shape.layers[layer], f"{where}: layer {layer}")


def read_merged(
    entries: Any, index: int, shape: ModelShape, kept: tuple[int, ...], where: str
) -> tuple[MergedGroups, ...]:
    """Read the groups that the kept layer `index` takes in from the layers dropped right after it."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f'{where} merged must be a list of entries such as {{"layer": 6, "kv_groups": [0, 2]}}.')
    merged: dict[int, MergedGroups] = {}
    for entry in entries:
        layer = entry.get("layer")
        check_merged_layer(layer, index, len(shape.layers), kept, f"{where} merged")
        if layer in merged:
            raise UserError(f"{where} merged names layer {layer} twice; list all its groups in one entry.")
        place = f"{where} merged: layer {layer}"
        groups = check_indices(entry.get("kv_groups"), shape.layers[layer].kv_heads, f"{place} kv_groups")
        merged[layer] = MergedGroups(layer, groups, read_scale(entry, shape.layers[index], place))
    return tuple(merged.values())


def read_scale(entry: Mapping[str, Any], layer: LayerShape, where: str) -> float:
    """Read what the outputs of merged groups are scaled by; 1 where the entry does not say."""
    if "scale" not in entry:
        return 1.0
    if "attn_out" not in layer.norms:
        raise UserError(f"{where} has a scale, which only models with a norm behind attention take; remove it.")
    return check_positive(entry["scale"], f"{where} scale")


def check_positive(value: Any, where: str) -> float:
    """Return a finite number above 0; raises UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where} must be a number above 0, got {value!r}.")
    return float(value)


def check_merged_layer(layer: Any, index: int, count: int, kept: tuple[int, ...], where: str) -> None:
    """Raise UserError unless `layer` was dropped after the kept layer `index` and before the next kept one."""
    if type(layer) is not int or not 0 <= layer < count:
        raise UserError(f"{where} names layer {layer!r}, but the model has layers 0 to {count - 1}.")
    if layer in kept:
        raise UserError(f"{where} names layer {layer}, which the plan keeps; take it out of 'merged' or of 'layers'.")
    before = max((other for other in kept if other < layer), default=None)
    if before != index:
        hint = "no kept layer stands before it" if before is None else f"it can live on in layer {before} only"
        raise UserError(f"{where} names layer {layer}, but {hint}; move or remove that entry.")


def check_indices(values: Any, size: int, where: str) -> tuple[int, ...]:
    """Return a list of rising indices below `size`; raises UserError otherwise."""
    if not isinstance(values, list) or not values or not all(type(value) is int for value in values):
        raise UserError(f"{where} must be a list of at least one whole number.")
    if sorted(set(values)) != values or values[0] < 0 or values[-1] >= size:
        raise UserError(f"{where} must be rising numbers from 0 to {size - 1}, each at most once.")
    return tuple(values)


def step_size(size: int, recipe: Recipe, device: int = 0) -> int:
    """Return the multiple that a channel count keeps to: what the recipe says, else what the device wants, else 16.

    Where nothing is said it is never a coarser one than the dense model keeps itself.
    """
    return recipe.multiple or (device if device > 1 else math.gcd(size, DEFAULT_MULTIPLE))


def grid(size: int, step: int, least: int) -> tuple[int, ...]:
    """Return `size` and the multiples of `step` below it, down to `least`."""
    return (size, *range((size - 1) // step * step, least - 1, -step))


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
