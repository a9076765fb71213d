"""What pass 1 leaves behind: rankings and damage curves, a few numbers per unit; the Gram matrices are gone by then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.calibrate import LayerStats
from compress.importance import find_score
from compress.importance.branch import FFN, KV, Branch
from compress.importance.units import Ranking, group_scores
from compress.spec import ModelSpec
from compress.stats import ChannelSums
from compress.stats_norms import PostNormSums

# A layer that makes this share of a later layer's sink tokens is where sinks emerge: dropping it kills the model.
SINK_SHARE = 0.5
# Layer -> first-order importances of its KV groups and of its channels, as a gradient pass leaves them.
FirstOrder = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerFindings:
    """One layer: unit rankings with damage per token, its stream energy, its block influence.

    `groups`: output norm of each KV group, comparable across layers (methods 1.2); `post_norms`: what absorbing each
    post-norm would cost.
    """

    index: int
    kv: Ranking
    ffn: Ranking
    energy: float
    change: float
    influence: float
    sinks: int
    groups: tuple[float, ...] = ()
    post_norms: Mapping[str, PostNormSums] = field(default_factory=dict, hash=False, compare=False)

    def kv_damage(self, groups: int) -> float:
        """Return the predicted error of keeping `groups` KV groups, as a share of the stream's energy."""
        return self.kv.damage[len(self.kv.order) - groups] / self.energy

    def ffn_damage(self, channels: int) -> float:
        """Return the predicted error of keeping `channels` FFN channels, as a share of the stream's energy."""
        return self.ffn.damage[len(self.ffn.order) - channels] / self.energy

    @property
    def cosine(self) -> float:
        """Mean cosine between the stream before and after the layer (SlimLLM's layer ratio; methods 2.2)."""
        return 1.0 - self.influence

    @property
    def drop_damage(self) -> float:
        """Return the error of dropping the whole layer, as a share of the stream's energy."""
        return self.change / self.energy


@dataclass(frozen=True)
class Findings:
    """Everything the plan needs to know about a model."""

    layers: tuple[LayerFindings, ...]
    hidden_score: Tensor
    hidden_energy: Tensor
    drop_order: tuple[int, ...]
    pinned: tuple[int, ...]
    tokens: int
    sinks: int

    def keep_hidden(self, count: int) -> tuple[int, ...]:
        """Return the `count` hidden channels that stay: pinned ones, then the highest scores."""
        score = self.hidden_score.clone()
        score[list(self.pinned)] = float("inf")
        return tuple(sorted(torch.argsort(score, descending=True, stable=True)[:count].tolist()))

    def hidden_damage(self, count: int) -> float:
        """Return the share of the norm outputs' energy that goes with the channels not kept, summed over norms."""
        total = self.hidden_energy.sum(1)
        left = self.hidden_energy[:, list(self.keep_hidden(count))].sum(1)
        # Rounding could make the difference negative where dead channels go, and a norm may give out nothing at all.
        return float(((total - left).clamp(min=0) / total.clamp(min=1e-300)).sum())


def reduce_layer(
    spec: ModelSpec, stats: LayerStats, score: str, seed: int = 0, first_order: FirstOrder | None = None
) -> LayerFindings:
    """Turn one layer's moments into rankings and damage curves."""
    rank, block = find_score(score), stats.block
    kv_slopes, ffn_slopes = (first_order or {}).get(stats.index, (None, None))
    attention = make_kv_branch(spec, stats, seed, kv_slopes)
    return LayerFindings(
        index=stats.index,
        kv=rank(attention),
        ffn=rank(make_ffn_branch(spec, stats, seed, ffn_slopes)),
        energy=block.square_out,
        change=block.change,
        influence=block.influence,
        sinks=stats.sinks,
        groups=tuple(group_scores(attention.moments, attention.weight, attention.size)),
        post_norms=stats.post_norms,
    )


def make_kv_branch(spec: ModelSpec, stats: LayerStats, seed: int = 0, first_order: Tensor | None = None) -> Branch:
    """Return what scores may read about the attention of one layer."""
    shape = spec.layers[stats.index].shape
    return Branch(
        KV, stats.index, stats.attention, branch_weight(spec, stats, "o", "attn_out"), shape.group * shape.head_dim,
        stats.weights, stats.attention_reads, stats.attention_spread, seed, first_order,
    )  # fmt: skip


def make_ffn_branch(spec: ModelSpec, stats: LayerStats, seed: int = 0, first_order: Tensor | None = None) -> Branch:
    """Return what scores may read about the MLP of one layer."""
    return Branch(
        FFN, stats.index, stats.mlp, branch_weight(spec, stats, "down", "mlp_out"), 1,
        stats.weights, stats.mlp_reads, stats.mlp_spread, seed, first_order,
    )  # fmt: skip


def branch_weight(spec: ModelSpec, stats: LayerStats, role: str, norm: str) -> Tensor:
    """Return the last projection `[hidden, in]` as it acts on the stream: times post-norm weight and multiplier."""
    weight = stats.weights[role] * spec.residual_multiplier
    if norm in stats.weights:
        return weight * (stats.weights[norm] + spec.norm_offset)[:, None]
    return weight


def reduce_all(
    spec: ModelSpec, layers: Iterable[LayerStats], score: str, seed: int = 0, first_order: FirstOrder | None = None
) -> tuple[list[LayerFindings], HiddenSums]:
    """Consume the stream of layer statistics; only small results stay in memory."""
    found, sums = [], HiddenSums()
    for stats in layers:
        found.append(reduce_layer(spec, stats, score, seed, first_order))
        sums.add(stats.norms.values())
        sums.massive |= stats.massive
        sums.tokens = stats.block.count
        del stats  # else the next layer's statistics are made while this one's are still held
    return found, sums


class HiddenSums:
    """Running sums over the norms of all layers."""

    def __init__(self) -> None:
        """Start empty."""
        self.scores: list[Tensor] = []
        self.energies: list[Tensor] = []
        self.massive: set[int] = set()
        self.tokens = 0

    def add(self, norms: Iterable[ChannelSums]) -> None:
        """Add the norm outputs of one layer."""
        for sums in norms:
            self.scores.append(sums.absolute)
            self.energies.append(sums.square)


def collect_findings(layers: list[LayerFindings], sums: HiddenSums) -> Findings:
    """Join the layers' findings; hidden channels are scored by sum |norm output| over all norms (methods 1.2)."""
    return Findings(
        layers=tuple(layers),
        hidden_score=torch.stack(sums.scores).sum(0),
        hidden_energy=torch.stack(sums.energies),
        drop_order=order_layers(layers),
        pinned=tuple(sorted(sums.massive)),
        tokens=sums.tokens,
        sinks=max(layer.sinks for layer in layers),
    )


def order_layers(layers: list[LayerFindings]) -> tuple[int, ...]:
    """Return the layers that may go, least block influence first.

    The first and the last layer stay, and so does every layer in which sink tokens emerge (methods 1.3, 7.4).
    """
    most = max(layer.sinks for layer in layers)
    allowed = [
        layer
        for layer, following in zip(layers[1:], layers[2:], strict=False)
        if following.sinks - layer.sinks <= SINK_SHARE * most or most == 0
    ]
    return tuple(layer.index for layer in sorted(allowed, key=lambda layer: layer.influence))
