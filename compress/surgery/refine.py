"""Block-wise joint solve: all weights of a layer together, so that its output on the pruned stream is the dense one.

The closed forms solve one projection at a time. This minimises, over every tensor of the layer at once,

    mean over tokens of |layer(p) - d|^2 / |d|^2      (p: pruned stream before it, d: dense stream after it)

by stochastic gradient steps on calibration activations. It sees no labels and no loss of the whole model, and only
one layer's graph exists (block reconstruction as in BRECQ, arXiv 2102.05426, and methods 8.11; our form).

Processes that share the text take each step together: all draw the same windows, each differentiates those it holds,
and the gradients are summed. A step's few windows may lie with one process; the others wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.decoder import make_frame, run_layer
from compress.hidden import HiddenStore
from compress.parallel import Group
from compress.surgery.job import Rebuild, Streams, Weights

WINDOWS = 4  # of the calibration text in one step
RATE = 0.03  # of a tensor's root mean square: one step moves a weight by about that share at most
DECAYS = (0.9, 0.98)


def refine_layer(job: Rebuild, streams: Streams, cut: Mapping[str, Tensor], place: int) -> Weights:
    """Return the layer's weights, float32, after `job.refine_steps` steps from `cut`, or `cut` where none helps."""
    usable = torch.cat(job.group.gather(streams.counted.nonzero().flatten() + streams.first))
    refined = take_steps(job, streams, cut, place, usable)
    # Steps have the size of the weights, not of the error: a layer that lost nothing would be shaken by rounding noise.
    before, after = (total_error(job, streams, weights, place, usable) for weights in (cut, refined))
    return refined if after < before else dict(cut)


def take_steps(job: Rebuild, streams: Streams, cut: Mapping[str, Tensor], place: int, usable: Tensor) -> Weights:
    """Return the layer's weights after `job.refine_steps` steps from `cut` on windows drawn from `usable`.

    Windows are counted over all processes.
    """
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
            error = block_error(job, streams, weights, place, places)
            if error.requires_grad:
                error.backward()  # type: ignore[no-untyped-call]
            add_gradients(job.group, weights)
            optimizer.step()
    return {role: tensor.detach() for role, tensor in weights.items()}


def add_gradients(group: Group, weights: Mapping[str, Tensor]) -> None:
    """Give every process the sum of all gradients; one that held none of a step's windows has none of its own."""
    if group.size > 1:
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            group.add((weight.grad,))


def total_error(
    job: Rebuild, streams: Streams, weights: Mapping[str, Tensor], place: int, usable: Tensor
) -> float:
    """Return the mean of the relative squared error over all windows `usable`, a few at a time."""
    parts = [len(few) * float(block_error(job, streams, weights, place, few)) for few in torch.split(usable, WINDOWS)]
    return job.group.total(sum(parts))[0] / len(usable)


def block_error(
    job: Rebuild, streams: Streams, weights: Mapping[str, Tensor], place: int, places: Tensor
) -> Tensor:
    """Return this process's part of the mean relative squared error of the layer's output over windows `places`.

    `places` are counted over all processes, whose parts add up to the mean.
    """
    spans = [span for span in (streams.clip(i, i + 1) for i in places.tolist()) if span[0] < span[1]]
    wanted = job.narrow(read_spans(streams.dense, spans))
    energy, tokens = wanted.pow(2).mean(-1), len(places) * wanted.shape[1]
    mean = energy.sum()
    job.group.add((mean,))
    if not spans:
        return torch.zeros(())
    before = read_spans(streams.before, spans)
    frame = make_frame(job.new, *before.shape[:2])
    after, _ = run_layer(job.new, job.new.layers[place], weights, before, frame)
    return ((after - wanted).pow(2).mean(-1) / (energy + 1e-3 * (mean / tokens))).sum() / tokens


def read_spans(store: HiddenStore, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return some windows of a stream, one after the other; maybe none."""
    return torch.cat([store.read(start, stop) for start, stop in spans]) if spans else store.read(0, 0)
