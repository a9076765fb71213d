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
from compress.hidden import HiddenStore, batches, release_memory, share_windows
from compress.parallel import ALONE, Group
from compress.spec import ModelSpec
from compress.stats import SINK_RATIO, BlockSums, ChannelSums, Moments, ordinary_tokens
from compress.stats_norms import PostNormSums, observe_post_norm, start_post_norms
from compress.text import Windows
from compress.weights import Weights, embed_rows, read_layer, read_norm

Progress = Callable[[str, int, int], None]
ATTENTION, MLP, NORMS = "attention_gram", "mlp_gram", "norm_outputs"


@dataclass
class LayerStats:
    """Statistics of one dense layer and its float32 weights; what was not asked for stays empty.

    `*_reads`: sums of what q, k, v and gate, up read, `[hidden]`: the normed stream, or the stream itself where the
    layer has no norm there. `*_spread` `[n]`: sum over windows of (mean over counted tokens of |input|)^2 of the
    branch's last projection (Minitron's statistic; methods 8.1).
    """

    index: int
    weights: Weights
    attention: Moments
    mlp: Moments
    norms: dict[str, ChannelSums]
    block: BlockSums = field(default_factory=BlockSums)
    sinks: int = 0
    massive: set[int] = field(default_factory=set)
    attention_reads: ChannelSums = field(default_factory=lambda: ChannelSums.empty(0))
    mlp_reads: ChannelSums = field(default_factory=lambda: ChannelSums.empty(0))
    attention_spread: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    mlp_spread: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    post_norms: dict[str, PostNormSums] = field(default_factory=dict)

    def reduce(self, group: Group) -> None:
        """Become the statistics of all processes' windows."""
        # By identity: an input norm's sums and what the module reads are one object.
        sums = {id(each): each for each in (self.attention_reads, self.mlp_reads, *self.norms.values())}
        parts: list[Moments | BlockSums | ChannelSums | PostNormSums] = [self.attention, self.mlp, self.block]
        for part in (*parts, *sums.values(), *self.post_norms.values()):
            part.reduce(group)
        group.add((self.attention_spread, self.mlp_spread))
        self.sinks = int(group.total(self.sinks)[0])
        self.massive = set().union(*group.gather(self.massive))


def share_text(group: Group, windows: Windows) -> Windows:
    """Return this process's share of a text."""
    own = share_windows(group, *windows.ids.shape)
    return Windows(windows.ids[own.start : own.stop], windows.source)


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
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, store: HiddenStore, needs: frozenset[str],
    group: Group = ALONE,
) -> Iterator[LayerStats]:  # fmt: skip
    """Yield the statistics of one layer after the other; `store` holds the embeddings and is advanced in place.

    `windows` are this process's; what is yielded covers those of the whole `group`.
    """
    fill_embeddings(checkpoint, spec, windows, store)
    for index, layer in enumerate(spec.layers):
        weights = read_layer(checkpoint, spec, index, torch.float32)
        stats = start_stats(spec, index, weights, needs)
        for start, stop in batches(*windows.ids.shape):
            frame = make_frame(spec, stop - start, windows.ids.shape[1])
            x = store.read(start, stop)
            store.write(start, observe_layer(spec, stats, x, frame, needs))
        stats.reduce(group)
        yield stats
        del layer, weights, stats
        release_memory()


def start_stats(spec: ModelSpec, index: int, weights: Weights, needs: frozenset[str]) -> LayerStats:
    """Allocate what is asked for."""
    shape, hidden = spec.layers[index].shape, spec.shape.hidden
    reads = {"attn_in": ChannelSums.empty(hidden), "mlp_in": ChannelSums.empty(hidden)}
    # What an input norm gives out is what the module reads: one object, summed once.
    norms = {role: reads.get(role) or ChannelSums.empty(hidden) for role in shape.norms} if NORMS in needs else {}
    query, ffn = shape.query if ATTENTION in needs else 0, shape.ffn if MLP in needs else 0
    return LayerStats(
        index, weights, Moments.empty(query), Moments.empty(ffn), norms,
        attention_reads=reads["attn_in"], mlp_reads=reads["mlp_in"],
        attention_spread=torch.zeros(query, dtype=torch.float64), mlp_spread=torch.zeros(ffn, dtype=torch.float64),
        post_norms=start_post_norms(spec, index, weights),
    )  # fmt: skip


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
        add_inputs(spec, stats, ATTENTION, context, mask)
    activation = mlp_activation(spec, weights, middle)
    after = middle + mlp_branch(spec, weights, activation)
    if MLP in needs:
        add_inputs(spec, stats, MLP, activation, mask)
    stats.attention_reads.update(apply_norm(spec, weights, "attn_in", x[mask]))
    stats.mlp_reads.update(apply_norm(spec, weights, "mlp_in", middle[mask]))
    add_post_norms(stats, (x, middle, after), mask)
    stats.block.update(x[mask], after[mask])
    return after


def massive_channels(sinks: Tensor) -> set[int]:
    """Return the channels that make tokens `[tokens, hidden]` sinks; they act as constant biases (methods 7.4)."""
    size = sinks.abs()
    massive = size > SINK_RATIO * size.median(-1, keepdim=True).values
    return set(massive.any(0).nonzero().flatten().tolist())


def add_inputs(spec: ModelSpec, stats: LayerStats, kind: str, inputs: Tensor, mask: Tensor) -> None:
    """Add the inputs of a branch's last projection, scaled as its post-norm scales them."""
    moments, spread, projection, norm = {
        ATTENTION: (stats.attention, stats.attention_spread, "o", "attn_out"),
        MLP: (stats.mlp, stats.mlp_spread, "down", "mlp_out"),
    }[kind]
    if norm in stats.weights:
        raw = project(stats.weights, projection, inputs)
        observe_post_norm(stats.post_norms, norm, raw, mask)
        scale = output_scale(spec, stats.weights, norm, raw)
        inputs = inputs if scale is None else inputs * scale
    moments.update(inputs[mask])
    spread += average_windows(inputs, mask).pow(2).sum(0)


def average_windows(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of |x| over the counted tokens of each window, `[batch, n]` in float64; 0 where none counts."""
    total = mask.to(x.dtype)[:, None] @ x.abs()
    return total[:, 0].double() / mask.sum(1, keepdim=True).clamp(min=1)


def add_post_norms(stats: LayerStats, streams: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
    """Add what the post-norms asked for give out: what their branches added to the stream."""
    before, middle, after = streams
    if "attn_out" in stats.norms:
        stats.norms["attn_out"].update((middle - before)[mask])
    if "mlp_out" in stats.norms:
        stats.norms["mlp_out"].update((after - middle)[mask])


def observe_final(checkpoint: Checkpoint, spec: ModelSpec, store: HiddenStore, group: Group = ALONE) -> ChannelSums:
    """Sum the final norm's output over the windows in the `store` of every process."""
    weight, sums = read_norm(checkpoint, spec, "final_norm"), ChannelSums.empty(spec.shape.hidden)
    for start, stop in batches(*store.shape[:2]):
        x = store.read(start, stop)
        mask, _ = ordinary_tokens(x)
        sums.update(rms_norm(x, weight, spec.eps, spec.norm_offset)[mask])
    sums.reduce(group)
    return sums
