"""What damage on each axis costs at the end: one cut model per axis, run without repair over a few windows.

Damage curves predict the error a cut leaves in the residual stream; how much loss that error makes differs from
model to model and axis to axis. One streamed pass runs the dense model and one moderately cut model per axis side
by side, and the loss that each adds fixes that axis's weight in the plan's loss = weight x damage^1.2 (our method).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.decoder import compute_logits, make_frame, run_layer
from compress.hidden import batches, release_memory
from compress.importance.findings import Findings
from compress.plan import LOSS_EXPONENT, LayerPlan, Plan, keep_everything, plan_shape
from compress.recipe import AXES
from compress.spec import ModelSpec
from compress.surgery.width import axis_rows, slice_weights
from compress.text import Windows
from compress.weights import embed_rows, read_head, read_layer

# Few tokens steady a paired difference of losses; small models, where they cost nothing, get more.
LEAST_TOKENS, MOST_TOKENS, PARAMETER_TOKENS = 512, 4096, 2**33
# Share of an axis that its probe removes: about what plans remove, so that the exponent has little to bridge.
CUTS = {"ffn": 0.25, "kv": 0.25, "hidden": 0.15, "layers": 0.15}
LEAST = 0.002  # nats: below this the loss a probe adds is noise of so few tokens
NOTHING = 1e-9  # priced damage of units that do nothing: rounding, or the damping of the least squares


Shares = Mapping[int, tuple[float, float]]
NO_SHARES: Shares = {}


@dataclass
class Probe:
    """One cut model: its plan, its description and the stream of the probe windows."""

    plan: Plan
    spec: ModelSpec
    stream: Tensor


def weigh_axes(
    checkpoint: Checkpoint, spec: ModelSpec, findings: Findings, windows: Windows, axes: Sequence[str] = AXES
) -> dict[str, float]:
    """Return axis -> loss in nats at one unit of priced damage, measured on 512 to 4096 tokens without repair."""
    tokens = min(max(LEAST_TOKENS, PARAMETER_TOKENS // spec.shape.parameters), MOST_TOKENS)
    ids = windows.ids[-max(1, tokens // windows.ids.shape[1]) :]
    plans = {axis: plan for axis, plan in probe_plans(spec, findings, CUTS).items() if axis in axes}
    losses = run_probes(checkpoint, spec, {**plans, "dense": keep_everything(spec.shape)}, ids)
    return {
        axis: price_damage(losses[axis] - losses["dense"], probe_damage(findings, plan, axis))
        for axis, plan in plans.items()
    }


def price_damage(added: float, damage: float) -> float:
    """Return the loss in nats at one unit of priced damage; 1 where a probe did no damage, and so tells nothing."""
    return max(added, LEAST) / damage if damage > NOTHING else 1.0


def probe_plans(spec: ModelSpec, findings: Findings, cuts: Mapping[str, float]) -> dict[str, Plan]:
    """Return one plan per axis that can be cut at all, each without the share `cuts` of that axis alone."""
    groups = min(layer.kv_heads for layer in spec.shape.layers)
    ffn = min(layer.ffn for layer in spec.shape.layers)
    hidden = spec.shape.hidden
    full = keep_everything(spec.shape)
    less_ffn, less_hidden = max(1, int(ffn * (1 - cuts["ffn"]))), max(1, int(hidden * (1 - cuts["hidden"])))
    found = {
        "ffn": replace_rows(full, lambda row: replace(row, ffn=findings.layers[row.layer].ffn.keep(less_ffn))),
        "hidden": replace(full, hidden=findings.keep_hidden(less_hidden)),
    }
    if groups > 1:
        less = groups - max(1, min(groups - 1, round(cuts["kv"] * groups)))
        found["kv"] = replace_rows(full, lambda row: replace(row, kv_groups=findings.layers[row.layer].kv.keep(less)))
    if findings.drop_order:
        count = min(max(1, round(cuts["layers"] * len(spec.layers))), len(findings.drop_order))
        gone = findings.drop_order[:count]
        found["layers"] = replace(full, layers=tuple(row for row in full.layers if row.layer not in gone))
    return found


def replace_rows(plan: Plan, change: Callable[[LayerPlan], LayerPlan]) -> Plan:
    """Return the plan with every layer's row changed."""
    return replace(plan, layers=tuple(change(row) for row in plan.layers))


def probe_damage(findings: Findings, plan: Plan, axis: str, layers: Shares = NO_SHARES) -> float:
    """Return what the price of an axis multiplies: its damage to the power 1.2, summed over layers.

    `layers` holds each layer's (attention, MLP) price relative to the axis's, 1 where absent.
    """
    if axis == "hidden":
        return float(findings.hidden_damage(len(plan.hidden)) ** LOSS_EXPONENT)
    rows = {row.layer: row for row in plan.layers}
    if axis == "layers":
        return float(sum(layer.drop_damage**LOSS_EXPONENT for layer in findings.layers if layer.index not in rows))
    damages = {
        "kv": lambda layer: layer.kv_damage(len(rows[layer.index].kv_groups)),
        "ffn": lambda layer: layer.ffn_damage(len(rows[layer.index].ffn)),
    }
    branch = ("kv", "ffn").index(axis)
    shares = {layer.index: layers.get(layer.index, (1.0, 1.0))[branch] for layer in findings.layers}
    priced = (shares[layer.index] * max(damages[axis](layer), 0.0) ** LOSS_EXPONENT for layer in findings.layers)
    return float(sum(priced))


def run_probes(checkpoint: Checkpoint, spec: ModelSpec, plans: Mapping[str, Plan], ids: Tensor) -> dict[str, float]:
    """Run all cut models side by side, a layer at a time; return each one's loss in nats per token."""
    stream = embed_rows(checkpoint, spec, ids, torch.float32)
    probes = {
        name: Probe(plan, cut_spec(spec, plan), stream[..., list(plan.hidden)]) for name, plan in plans.items()
    }
    for index in range(len(spec.layers)):
        weights = read_layer(checkpoint, spec, index, torch.float32)
        for probe in probes.values():
            advance_probe(spec, probe, weights, index)
        del weights
        release_memory()
    ends = read_head(checkpoint, spec, torch.float32)
    return {name: measure_loss(spec, probe, ends, ids) for name, probe in probes.items()}


def cut_spec(spec: ModelSpec, plan: Plan) -> ModelSpec:
    """Return the description of a cut model for running only: tensor names and config stay those of the dense one."""
    shape = plan_shape(plan, spec.shape)
    layers = tuple(
        replace(spec.layers[row.layer], shape=layer) for row, layer in zip(plan.layers, shape.layers, strict=True)
    )
    return replace(spec, shape=shape, layers=layers)


def advance_probe(spec: ModelSpec, probe: Probe, weights: Mapping[str, Tensor], index: int) -> None:
    """Run one layer of a cut model, unless that layer was dropped."""
    place = next((i for i, row in enumerate(probe.plan.layers) if row.layer == index), None)
    if place is None:
        return
    row = probe.plan.layers[place]
    kept = axis_rows(
        spec.layers[index].shape, torch.tensor(probe.plan.hidden), torch.tensor(row.kv_groups), torch.tensor(row.ffn)
    )
    cut = slice_weights(spec, weights, kept)
    for start, stop in batches(*probe.stream.shape[:2]):
        frame = make_frame(probe.spec, stop - start, probe.stream.shape[1])
        layer = probe.spec.layers[place]
        probe.stream[start:stop] = run_layer(probe.spec, layer, cut, probe.stream[start:stop], frame)[0]


def measure_loss(spec: ModelSpec, probe: Probe, ends: Mapping[str, Tensor], ids: Tensor) -> float:
    """Return the mean next-token loss of a cut model, in nats."""
    kept = {"hidden": torch.tensor(probe.plan.hidden)}
    cut = slice_weights(spec, ends, kept)
    total = 0.0
    for stream, window in zip(probe.stream, ids, strict=True):
        total += float(F.cross_entropy(compute_logits(probe.spec, cut, stream[:-1]), window[1:], reduction="sum"))
    return total / ids[:, 1:].numel()
