"""Pass 1: stream the layers of the dense model over the calibration tokens and collect the statistics asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.decoder import (
    Frame,
    apply_norm,
    attention_branch,
    attention_context,
    make_frame,
    mlp_activation,
    mlp_branch,
    project,
    rms_norm,
)
from compress.hidden import HiddenStore, batches, release_memory
from compress.spec import ModelSpec
from compress.stats import SINK_RATIO, BlockSums, ChannelSums, Moments, ordinary_tokens
from compress.text import Windows
from compress.weights import Weights, embed_rows, read_layer, read_norm

Progress = Callable[[str, int, int], None]
ATTENTION, MLP, NORMS = "attention_gram", "mlp_gram", "norm_outputs"


@dataclass
class LayerStats:
    """Statistics of one dense layer and its float32 weights; what was not asked for stays empty."""

    index: int
    weights: Weights
    attention: Moments
    mlp: Moments
    norms: dict[str, ChannelSums]
    block: BlockSums = field(default_factory=BlockSums)
    attention_block: BlockSums = field(default_factory=BlockSums)
    mlp_block: BlockSums = field(default_factory=BlockSums)
    sinks: int = 0
    massive: set[int] = field(default_factory=set)


def fill_embeddings(checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, store: HiddenStore) -> None:
    """Write the scaled embeddings of all windows into `store`."""
    for start, stop in batches(*windows.ids.shape):
        store.write(start, embed_rows(checkpoint, spec, windows.ids[start:stop], torch.float32))


def output_scale(spec: ModelSpec, weights: Weights, role: str, raw: Tensor) -> Tensor | None:
    """Return 1 / rms per token `[..., 1]` of a raw projection that a post-norm follows, else None.

    With that scale on its inputs, a post-normed branch is linear in the projection's weights (our derivation).
    """
    if role not in weights:
        return None
    return torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + spec.eps)


def stream_dense(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, store: HiddenStore, needs: frozenset[str]
) -> Iterator[LayerStats]:
    """Yield the statistics of one layer after the other; `store` holds the embeddings and is advanced in place."""
    fill_embeddings(checkpoint, spec, windows, store)
    for index, layer in enumerate(spec.layers):
        weights = read_layer(checkpoint, spec, index, torch.float32)
        stats = start_stats(spec, index, weights, needs)
        for start, stop in batches(*windows.ids.shape):
            frame = make_frame(spec, stop - start, windows.ids.shape[1])
            x = store.read(start, stop)
            store.write(start, observe_layer(spec, stats, x, frame, needs))
        yield stats
        del layer, weights, stats
        release_memory()


def start_stats(spec: ModelSpec, index: int, weights: Weights, needs: frozenset[str]) -> LayerStats:
    """Allocate what is asked for."""
    shape = spec.layers[index].shape
    norms = {role: ChannelSums.empty(spec.shape.hidden) for role in shape.norms} if NORMS in needs else {}
    return LayerStats(
        index,
        weights,
        Moments.empty(shape.query if ATTENTION in needs else 0),
        Moments.empty(shape.ffn if MLP in needs else 0),
        norms,
    )


def observe_layer(spec: ModelSpec, stats: LayerStats, x: Tensor, frame: Frame, needs: frozenset[str]) -> Tensor:
    """Run one layer over `x` `[batch, sequence, hidden]`, add its statistics, return the stream after it."""
    weights, layer = stats.weights, spec.layers[stats.index]
    mask, sinks = ordinary_tokens(x, skip_first=False)
    stats.sinks += sinks
    stats.massive |= massive_channels(x[~mask])
    mask[:, 0] &= x.shape[1] == 1  # the first token is left out even where it is no sink
    context, _ = attention_context(spec, layer, weights, x, frame)
    middle = x + attention_branch(spec, weights, context)
    if ATTENTION in needs:
        add_inputs(spec, stats.attention, weights, ("o", "attn_out"), context, mask)
    activation = mlp_activation(spec, weights, middle)
    after = middle + mlp_branch(spec, weights, activation)
    if MLP in needs:
        add_inputs(spec, stats.mlp, weights, ("down", "mlp_out"), activation, mask)
    if NORMS in needs:
        add_norms(spec, stats, (x, middle, after), mask)
    stats.attention_block.update(x[mask], middle[mask])
    stats.mlp_block.update(middle[mask], after[mask])
    stats.block.update(x[mask], after[mask])
    return after


def massive_channels(sinks: Tensor) -> set[int]:
    """Return the channels that make tokens `[tokens, hidden]` sinks; they act as constant biases (methods 7.4)."""
    size = sinks.abs()
    massive = size > SINK_RATIO * size.median(-1, keepdim=True).values
    return set(massive.any(0).nonzero().flatten().tolist())


def add_inputs(
    spec: ModelSpec, moments: Moments, weights: Weights, roles: tuple[str, str], inputs: Tensor, mask: Tensor
) -> None:
    """Add the inputs of a branch's last projection, scaled as its post-norm scales them."""
    projection, norm = roles
    scale = None
    if norm in weights:
        scale = output_scale(spec, weights, norm, project(weights, projection, inputs))
    moments.update((inputs if scale is None else inputs * scale)[mask])


def add_norms(spec: ModelSpec, stats: LayerStats, streams: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
    """Add what each norm of the layer gives out; a post-norm's output is what its branch added to the stream."""
    before, middle, after = streams
    outputs = {
        "attn_in": lambda: apply_norm(spec, stats.weights, "attn_in", before),
        "attn_out": lambda: middle - before,
        "mlp_in": lambda: apply_norm(spec, stats.weights, "mlp_in", middle),
        "mlp_out": lambda: after - middle,
    }
    for role, sums in stats.norms.items():
        sums.update(outputs[role]()[mask])


def observe_final(checkpoint: Checkpoint, spec: ModelSpec, store: HiddenStore) -> ChannelSums:
    """Sum the final norm's output over the windows in `store`."""
    weight, sums = read_norm(checkpoint, spec, "final_norm"), ChannelSums.empty(spec.shape.hidden)
    for start, stop in batches(*store.shape[:2]):
        x = store.read(start, stop)
        mask, _ = ordinary_tokens(x)
        sums.update(rms_norm(x, weight, spec.eps, spec.norm_offset)[mask])
    return sums
