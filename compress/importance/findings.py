"""What pass 1 leaves behind: rankings and damage curves, a few numbers per unit; the Gram matrices are gone by then."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calibrate import LayerStats
from compress.importance import find_score
from compress.importance.units import Ranking
from compress.spec import ModelSpec
from compress.stats import ChannelSums

# A layer that makes this share of a later layer's sink tokens is where sinks emerge: dropping it kills the model.
SINK_SHARE = 0.5


@dataclass(frozen=True)
class LayerFindings:
    """One layer: unit rankings with damage per token, its stream energy, its block influence."""

    index: int
    kv: Ranking
    ffn: Ranking
    energy: float
    change: float
    influence: float
    sinks: int

    def kv_damage(self, groups: int) -> float:
        """Return the predicted error of keeping `groups` KV groups, as a share of the stream's energy."""
        return self.kv.damage[len(self.kv.order) - groups] / self.energy

    def ffn_damage(self, channels: int) -> float:
        """Return the predicted error of keeping `channels` FFN channels, as a share of the stream's energy."""
        return self.ffn.damage[len(self.ffn.order) - channels] / self.energy

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


def reduce_layer(spec: ModelSpec, stats: LayerStats, score: str) -> LayerFindings:
    """Turn one layer's moments into rankings and damage curves."""
    rank, layer, block = find_score(score), spec.layers[stats.index].shape, stats.block
    return LayerFindings(
        index=stats.index,
        kv=rank(stats.attention, branch_weight(spec, stats, "o", "attn_out"), layer.group * layer.head_dim),
        ffn=rank(stats.mlp, branch_weight(spec, stats, "down", "mlp_out"), 1),
        energy=block.square_out,
        change=block.change,
        influence=block.influence,
        sinks=stats.sinks,
    )


def branch_weight(spec: ModelSpec, stats: LayerStats, role: str, norm: str) -> Tensor:
    """Return the last projection `[hidden, in]` as it acts on the stream: times post-norm weight and multiplier."""
    weight = stats.weights[role] * spec.residual_multiplier
    if norm in stats.weights:
        return weight * (stats.weights[norm] + spec.norm_offset)[:, None]
    return weight


def reduce_all(spec: ModelSpec, layers: Iterable[LayerStats], score: str) -> tuple[list[LayerFindings], HiddenSums]:
    """Consume the stream of layer statistics; only small results stay in memory."""
    found, sums = [], HiddenSums()
    for stats in layers:
        found.append(reduce_layer(spec, stats, score))
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
