"""Pass 2: cut one layer after the other on the pruned stream, repaired against the dense model.

For every kept layer and each of its two branches, with p the pruned stream and d the dense stream around it:

    1. inputs:       what reads the stream is fitted to p                              (surgery/inputs.py)
    2. dense half:   d -> d'          (and on through layers that are dropped next, before the MLP is repaired)
    3. moments:      x = input of the branch's last projection on the pruned stream, y = d'[kept] - p
    4. repair:       W = argmin sum |W x - y|^2 + lam |W - W_cut|^2
    5. apply:        p -> p + W x

and then, on small models, all weights of the layer together (surgery/refine.py). The target holds what earlier
layers lost: the residual-corrected repair (reference/quality.md). Other targets are those of the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compress.decoder import apply_norm, make_frame, project, run_layer
from compress.hidden import release_memory
from compress.solve import RIDGE, solve_bias, solve_diagonal, solve_projection
from compress.stats import Moments, ordinary_tokens
from compress.surgery.cut import cut_layer
from compress.surgery.inputs import fit_inputs
from compress.surgery.job import ATTENTION, MLP, Half, Rebuild, Streams, Weights, half_inputs
from compress.surgery.refine import refine_layer
from compress.weights import read_layer

# A post-norm weight below this share of the median is not divided by: its channel cannot carry a correction.
SMALL_GAIN = 0.3


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
    index = job.plan.layers[place].layer
    dense = read_layer(job.checkpoint, job.old, index, torch.float32)
    pair = cut_layer(job, place, dense)
    cut = pair[0]
    if job.refine_steps:
        copy_stream(streams)
    for half in (ATTENTION, MLP):
        fit_inputs(job, streams, half, pair)
        if job.recipe.target == "own":
            run_own_half(job, streams, half, dense, index)
        run_dense_half(job, streams, half, dense, index)
        if half is MLP:
            run_dropped(job, streams, dropped)
        repair_half(job, streams, half, cut, place)
    if job.refine_steps:
        refined = refine_layer(job, streams, cut, place)
        cut = {role: job.round_to(role, tensor) for role, tensor in refined.items()}
        run_again(job, streams, cut, place)
    return {role: tensor.to(job.types[role]) for role, tensor in cut.items()}


def copy_stream(streams: Streams) -> None:
    """Keep the pruned stream as it stands."""
    for start, stop in streams.spans():
        streams.before.write(start, streams.pruned.read(start, stop))


def run_again(job: Rebuild, streams: Streams, cut: Weights, place: int) -> None:
    """Advance the pruned stream through the finished layer from where it stood before it."""
    for start, stop in streams.spans():
        frame = make_frame(job.new, stop - start, streams.dense.shape[1])
        x = streams.before.read(start, stop)
        streams.pruned.write(start, run_layer(job.new, job.new.layers[place], cut, x, frame)[0])


def run_dropped(job: Rebuild, streams: Streams, layers: range) -> None:
    """Advance only the dense stream, through layers that the new model does not have."""
    for index in layers:
        weights = read_layer(job.checkpoint, job.old, index, torch.float32)
        for start, stop in streams.spans():
            frame = make_frame(job.old, stop - start, streams.dense.shape[1])
            after, _ = run_layer(job.old, job.old.layers[index], weights, streams.dense.read(start, stop), frame)
            streams.dense.write(start, after)


def run_dense_half(job: Rebuild, streams: Streams, half: Half, weights: Weights, index: int) -> None:
    """Advance the dense stream by one branch; note which tokens count and the scale a post-norm gives them."""
    spec = job.old
    for start, stop in streams.spans():
        frame = make_frame(spec, stop - start, streams.dense.shape[1])
        x = streams.dense.read(start, stop)
        raw = project(weights, half.projection, half_inputs(spec, index, half, weights, x, frame))
        if half is ATTENTION:
            streams.mask[start:stop] = ordinary_tokens(x)[0] & streams.counted[start:stop, None]
        if half.norm in weights:
            streams.scale[start:stop] = torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + spec.eps)
        branch = apply_norm(spec, weights, half.norm, raw) * spec.residual_multiplier
        streams.dense.write(start, x + branch)
        if job.recipe.target == "dense":
            streams.branch.write(start, job.narrow(branch))


def run_own_half(job: Rebuild, streams: Streams, half: Half, weights: Weights, index: int) -> None:
    """Store what the unpruned branch gives on the pruned stream: SlimLLM's target (methods 2.1)."""
    spec = job.old
    for start, stop in streams.spans():
        frame = make_frame(spec, stop - start, streams.dense.shape[1])
        x = streams.pruned.read(start, stop)
        raw = project(weights, half.projection, half_inputs(spec, index, half, weights, x, frame))
        streams.branch.write(start, apply_norm(spec, weights, half.norm, raw) * spec.residual_multiplier)


def repair_half(job: Rebuild, streams: Streams, half: Half, cut: Weights, place: int) -> None:
    """Collect moments on the pruned stream, refit the branch's last projection in `cut`, advance the pruned stream."""
    collect = job.recipe.repair != "none"
    moments = gather_moments(job, streams, half, cut, place, collect)
    if collect:
        refit_projection(job, half, cut, moments)
        if half.norm in cut and job.recipe.repair == "lstsq":
            cut[half.norm] = job.round_to(half.norm, refit_norm(job, streams, half, cut))
    for start, stop in streams.spans():
        raw = project(cut, half.projection, streams.inputs.read(start, stop))
        branch = apply_norm(job.new, cut, half.norm, raw) * job.new.residual_multiplier
        streams.pruned.write(start, streams.pruned.read(start, stop) + branch)


def wanted_change(job: Rebuild, streams: Streams, start: int, stop: int, x: Tensor) -> Tensor:
    """Return what the branch should add to the pruned stream `x`, `[batch, sequence, hidden]`."""
    if job.recipe.target == "corrected":
        return job.narrow(streams.dense.read(start, stop)) - x
    return streams.branch.read(start, stop)


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
            wanted = wanted_change(job, streams, start, stop, x)
            scaled = inputs * scale if half.norm in cut else inputs
            moments.update(scaled[mask], target(wanted, scaled, scale)[mask])
    moments.reduce(job.group)
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
    """Replace the projection in `cut` by its repair; its bias too where no post-norm follows."""
    bias_role = f"{half.projection}_bias"
    bias = cut.get(bias_role) if half.norm not in cut else None
    weight: Tensor = cut[half.projection]
    shift = bias
    if job.recipe.repair == "lstsq":
        weight, shift = solve_projection(moments, weight, bias, RIDGE)
    elif job.recipe.repair == "diagonal":
        weight, shift = solve_diagonal(moments, weight, bias)
    elif bias is not None:
        _, shift = solve_bias(moments, weight, bias)
    cut[half.projection] = job.round_to(half.projection, weight)
    if shift is not None:
        cut[bias_role] = job.round_to(bias_role, shift)


def refit_norm(job: Rebuild, streams: Streams, half: Half, cut: Weights) -> Tensor:
    """Return the post-norm weight that fits the repaired projection best, per channel, damped towards the old."""
    gain = cut[half.norm].double() + job.new.norm_offset
    product, square, count = torch.zeros_like(gain), torch.zeros_like(gain), 0
    for start, stop in streams.spans():
        mask = streams.mask[start:stop]
        raw = project(cut, half.projection, streams.inputs.read(start, stop))[mask]
        unit = raw * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + job.new.eps)
        wanted = wanted_change(job, streams, start, stop, streams.pruned.read(start, stop))[mask]
        product += (unit * wanted).sum(0, dtype=torch.float64) / job.new.residual_multiplier
        square += unit.pow(2).sum(0, dtype=torch.float64)
        count += len(raw)
    job.group.add((product, square))
    damping = RIDGE * job.group.total(count)[0]
    return ((product + damping * gain) / (square + damping) - job.new.norm_offset).float()
