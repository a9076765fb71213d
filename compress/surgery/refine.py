"""Block-wise joint solve: all weights of a layer together, so that its output on the pruned stream is the dense one.

The closed forms solve one projection at a time. This minimises, over every tensor of the layer at once,

    mean over tokens of |layer(p) - d|^2 / |d|^2      (p: pruned stream before it, d: dense stream after it)

by stochastic gradient steps on calibration activations. It sees no labels and no loss of the whole model, and only
one layer's graph exists (block reconstruction as in BRECQ, arXiv 2102.05426, and methods 8.11; our form).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compress.decoder import make_frame, run_layer
from compress.surgery.job import Rebuild, Streams, Weights

WINDOWS = 4  # of the calibration text in one step
RATE = 0.03  # of a tensor's root mean square: one step moves a weight by about that share at most
DECAYS = (0.9, 0.98)


def refine_layer(job: Rebuild, streams: Streams, cut: Mapping[str, Tensor], place: int) -> Weights:
    """Return the layer's weights, float32, after `job.refine_steps` steps from `cut`, or `cut` where none helps."""
    usable = streams.counted.nonzero().flatten()
    refined = take_steps(job, streams, cut, place, usable)
    # Steps have the size of the weights, not of the error: a layer that lost nothing would be shaken by rounding noise.
    before, after = (total_error(job, streams, weights, place, usable) for weights in (cut, refined))
    return refined if after < before else dict(cut)


def take_steps(job: Rebuild, streams: Streams, cut: Mapping[str, Tensor], place: int, usable: Tensor) -> Weights:
    """Return the layer's weights after `job.refine_steps` steps from `cut` on windows drawn from `usable`."""
    steps = job.refine_steps
    random = torch.Generator().manual_seed(job.recipe.seed + place)
    with torch.enable_grad():
        weights = {role: tensor.clone().requires_grad_(True) for role, tensor in cut.items()}
        groups = [{"params": [w], "size": float(w.detach().pow(2).mean().sqrt())} for w in weights.values()]
        optimizer = torch.optim.Adam(groups, lr=RATE, betas=DECAYS)
        for step in range(steps):
            rate = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * max(group["size"], 1e-3)
            places = usable[torch.randperm(len(usable), generator=random)[:WINDOWS]]
            optimizer.zero_grad(set_to_none=True)
            block_error(job, streams, weights, place, places).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {role: tensor.detach() for role, tensor in weights.items()}


def total_error(
    job: Rebuild, streams: Streams, weights: Mapping[str, Tensor], place: int, usable: Tensor
) -> float:
    """Return the mean of the relative squared error over all windows `usable`, a few at a time."""
    groups = torch.split(usable, WINDOWS)
    return sum(len(group) * float(block_error(job, streams, weights, place, group)) for group in groups) / len(usable)


def block_error(
    job: Rebuild, streams: Streams, weights: Mapping[str, Tensor], place: int, places: Tensor
) -> Tensor:
    """Return the mean relative squared error of the layer's output over the windows `places`."""
    before = torch.cat([streams.before.read(i, i + 1) for i in places.tolist()])
    wanted = job.narrow(torch.cat([streams.dense.read(i, i + 1) for i in places.tolist()]))
    frame = make_frame(job.new, *before.shape[:2])
    after, _ = run_layer(job.new, job.new.layers[place], weights, before, frame)
    energy = wanted.pow(2).mean(-1)
    return ((after - wanted).pow(2).mean(-1) / (energy + 1e-3 * energy.mean())).mean()
