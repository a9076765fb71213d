"""Pass 2: cut one layer after the other on the pruned stream, repaired against the dense stream.

For every kept layer and each of its two branches, with p the pruned stream and d the dense stream around it:

    1. dense half:   d -> d'          (and on through layers that are dropped next, before the MLP is repaired)
    2. moments:      x = input of the branch's last projection on the pruned stream, y = d'[kept] - p
    3. repair:       W = argmin sum |W x - y|^2 + lam |W - W_cut|^2
    4. apply:        p -> p + W x

The target holds what earlier layers lost: the residual-corrected repair (reference/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.decoder import (
    Frame,
    apply_norm,
    attention_context,
    make_frame,
    mlp_activation,
    project,
    run_layer,
)
from compress.hidden import HiddenStore, batches, release_memory
from compress.plan import LayerPlan, Plan
from compress.solve import RIDGE, solve_projection
from compress.spec import ModelSpec
from compress.stats import Moments, ordinary_tokens
from compress.surgery.width import axis_rows, slice_weights
from compress.weights import read_layer

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Half:
    """One branch of a layer: its last projection, the norm behind it, and its name in reports."""

    projection: str
    norm: str


ATTENTION, MLP = Half("o", "attn_out"), Half("down", "mlp_out")
# A post-norm weight below this share of the median is not divided by: its channel cannot carry a correction.
SMALL_GAIN = 0.3


@dataclass
class Streams:
    """The two residual streams, room for a projection's inputs, and per-token facts of the dense half."""

    dense: HiddenStore
    pruned: HiddenStore
    inputs: HiddenStore
    mask: Tensor
    scale: Tensor

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield groups of windows."""
        return batches(*self.dense.shape[:2])


@dataclass(frozen=True)
class Rebuild:
    """What pass 2 works on: the dense model, the new model, the plan, and how to repair."""

    checkpoint: Checkpoint
    old: ModelSpec
    new: ModelSpec
    plan: Plan
    repair: bool
    types: Mapping[str, torch.dtype]

    @property
    def hidden(self) -> Tensor:
        """Kept hidden channels."""
        return torch.tensor(self.plan.hidden)

    def narrow(self, stream: Tensor) -> Tensor:
        """Return the kept channels of a dense stream `[..., hidden]`."""
        if len(self.plan.hidden) == stream.shape[-1]:
            return stream
        # Selecting from a matrix is twelve times faster than from the last of three dimensions.
        return stream.flatten(0, -2).index_select(1, self.hidden).view(*stream.shape[:-1], -1)


def rebuild_layers(job: Rebuild, streams: Streams) -> Iterator[Weights]:
    """Yield the weights by role of each layer of the new model, in order and in the storage type."""
    kept = job.plan.kept_layers
    run_dropped(job, streams, range(kept[0]))
    for place, layer_plan in enumerate(job.plan.layers):
        following = kept[place + 1] if place + 1 < len(kept) else len(job.old.layers)
        yield rebuild_layer(job, streams, place, range(layer_plan.layer + 1, following))
        release_memory()


def rebuild_layer(job: Rebuild, streams: Streams, place: int, dropped: range) -> Weights:
    """Cut and repair one layer, advancing both streams past it (the dense one past `dropped` too)."""
    layer_plan = job.plan.layers[place]
    dense = read_layer(job.checkpoint, job.old, layer_plan.layer, torch.float32)
    cut = cut_layer(job, layer_plan, dense)

    run_dense_half(job, streams, ATTENTION, dense, layer_plan.layer)
    repair_half(job, streams, ATTENTION, cut, place)
    run_dense_half(job, streams, MLP, dense, layer_plan.layer)
    del dense
    run_dropped(job, streams, dropped)
    repair_half(job, streams, MLP, cut, place)
    return {role: tensor.to(job.types[role]) for role, tensor in cut.items()}


def cut_layer(job: Rebuild, layer_plan: LayerPlan, dense: Mapping[str, Tensor]) -> Weights:
    """Slice a layer's weights by the plan, rounded to the storage type."""
    shape = job.old.layers[layer_plan.layer].shape
    rows = axis_rows(shape, job.hidden, torch.tensor(layer_plan.kv_groups), torch.tensor(layer_plan.ffn))
    return {role: round_to(job, role, tensor) for role, tensor in slice_weights(job.old, dense, rows).items()}


def round_to(job: Rebuild, role: str, tensor: Tensor) -> Tensor:
    """Round to the role's storage type and back, so that the stream sees exactly what is written."""
    return tensor.to(job.types[role]).to(torch.float32)


def run_dropped(job: Rebuild, streams: Streams, layers: range) -> None:
    """Advance only the dense stream, through layers that the new model does not have."""
    for index in layers:
        weights = read_layer(job.checkpoint, job.old, index, torch.float32)
        for start, stop in streams.spans():
            frame = make_frame(job.old, stop - start, streams.dense.shape[1])
            after, _ = run_layer(job.old, job.old.layers[index], weights, streams.dense.read(start, stop), frame)
            streams.dense.write(start, after)


def half_inputs(
    spec: ModelSpec, index: int, half: Half, weights: Mapping[str, Tensor], x: Tensor, frame: Frame
) -> Tensor:
    """Return the inputs of a branch's last projection on the stream `x`."""
    if half is ATTENTION:
        return attention_context(spec, spec.layers[index], weights, x, frame)[0]
    return mlp_activation(spec, weights, x)


def run_dense_half(job: Rebuild, streams: Streams, half: Half, weights: Weights, index: int) -> None:
    """Advance the dense stream by one branch; note which tokens count and the scale a post-norm gives them."""
    spec = job.old
    for start, stop in streams.spans():
        frame = make_frame(spec, stop - start, streams.dense.shape[1])
        x = streams.dense.read(start, stop)
        raw = project(weights, half.projection, half_inputs(spec, index, half, weights, x, frame))
        if half is ATTENTION:
            streams.mask[start:stop] = ordinary_tokens(x)[0]
        if half.norm in weights:
            streams.scale[start:stop] = torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + spec.eps)
        streams.dense.write(start, x + apply_norm(spec, weights, half.norm, raw) * spec.residual_multiplier)


def repair_half(job: Rebuild, streams: Streams, half: Half, cut: Weights, place: int) -> None:
    """Collect moments on the pruned stream, refit the branch's last projection in `cut`, advance the pruned stream."""
    collect = job.repair
    moments = gather_moments(job, streams, half, cut, place, collect)
    if collect:
        refit_projection(job, half, cut, moments)
        if half.norm in cut:
            cut[half.norm] = round_to(job, half.norm, refit_norm(job, streams, half, cut))
    for start, stop in streams.spans():
        raw = project(cut, half.projection, streams.inputs.read(start, stop))
        branch = apply_norm(job.new, cut, half.norm, raw) * job.new.residual_multiplier
        streams.pruned.write(start, streams.pruned.read(start, stop) + branch)


def gather_moments(
    job: Rebuild, streams: Streams, half: Half, cut: Weights, place: int, collect: bool
) -> Moments:
    """Run the pruned half up to its last projection, store those inputs, and sum moments when asked to."""
    width = cut[half.projection].shape[1]
    streams.inputs.resize(width)
    moments = Moments.empty(width, job.new.shape.hidden) if collect else Moments.empty(0)
    target = make_target(job, half, cut)
    for start, stop in streams.spans():
        frame = make_frame(job.new, stop - start, streams.dense.shape[1])
        x = streams.pruned.read(start, stop)
        inputs = half_inputs(job.new, place, half, cut, x, frame)
        streams.inputs.write(start, inputs)
        if collect:
            mask, scale = streams.mask[start:stop], streams.scale[start:stop]
            wanted = job.narrow(streams.dense.read(start, stop)) - x
            scaled = inputs * scale if half.norm in cut else inputs
            moments.update(scaled[mask], target(wanted, scaled, scale)[mask])
    return moments


def make_target(job: Rebuild, half: Half, cut: Weights) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function that turns the wanted change of the stream into the target of the last projection.

    Without a post-norm that is a division by the residual multiplier. Behind a post-norm with gain g the scaled
    projection z = W x / rms should satisfy g z = wanted; gains near zero cannot carry a correction, so it is damped:
    target = z_cut + (wanted - g z_cut) g / (g^2 + tau^2), our derivation.
    """
    factor = job.new.residual_multiplier
    if half.norm not in cut:
        return lambda wanted, scaled, scale: wanted / factor
    gain = (cut[half.norm] + job.new.norm_offset) * factor
    floor = (SMALL_GAIN * gain.abs().median()).clamp_min(torch.finfo(gain.dtype).tiny ** 0.5)
    damped = gain / (gain.pow(2) + floor**2)
    weight, bias = cut[half.projection].clone(), cut.get(f"{half.projection}_bias")

    def target(wanted: Tensor, scaled: Tensor, scale: Tensor) -> Tensor:
        now = scaled @ weight.T
        shift = bias * scale if bias is not None else torch.zeros(())
        return now + (wanted - gain * (now + shift)) * damped

    return target


def refit_projection(job: Rebuild, half: Half, cut: Weights, moments: Moments) -> None:
    """Replace the projection in `cut` by its least-squares repair; its bias too where no post-norm follows."""
    bias_role = f"{half.projection}_bias"
    bias = cut.get(bias_role) if half.norm not in cut else None
    weight, shift = solve_projection(moments, cut[half.projection], bias, RIDGE)
    cut[half.projection] = round_to(job, half.projection, weight)
    if shift is not None:
        cut[bias_role] = round_to(job, bias_role, shift)


def refit_norm(job: Rebuild, streams: Streams, half: Half, cut: Weights) -> Tensor:
    """Return the post-norm weight that fits the repaired projection best, per channel, damped towards the old."""
    gain = cut[half.norm].double() + job.new.norm_offset
    product, square, count = torch.zeros_like(gain), torch.zeros_like(gain), 0
    for start, stop in streams.spans():
        mask = streams.mask[start:stop]
        raw = project(cut, half.projection, streams.inputs.read(start, stop))[mask]
        unit = raw * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + job.new.eps)
        wanted = (job.narrow(streams.dense.read(start, stop)) - streams.pruned.read(start, stop))[mask]
        product += (unit * wanted).sum(0, dtype=torch.float64) / job.new.residual_multiplier
        square += unit.pow(2).sum(0, dtype=torch.float64)
        count += len(raw)
    damping = RIDGE * count
    return ((product + damping * gain) / (square + damping) - job.new.norm_offset).float()
