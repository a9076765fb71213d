"""One branch of one layer: all that a score may read about its units."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.stats import ChannelSums, Moments
from compress.weights import Weights

KV, FFN = "kv", "ffn"


@dataclass(frozen=True)
class Branch:
    """What a score may read about one branch of one layer: its units feed the branch's last projection.

    `kind`: "kv" (units are KV groups, inputs of `o`) or "ffn" (units are channels, inputs of `down`).
    `moments`: of the inputs of the last projection, `[n]`; behind a post-norm scaled by its 1 / rms per token.
    `weight` `[hidden, n]`: the last projection as it acts on the stream, with post-norm gain and residual multiplier.
    `size`: inputs per unit, 1 for a channel and group * head_dim for a KV group.
    `weights`: all dense weights of the layer by role.
    `reads`: sums of the normed module input `[hidden]` that q, k, v or gate, up read.
    `spread` `[n]`: sum over windows of (mean over the window's counted tokens of |x|)^2 (methods 8.1).
    `first_order` `[units]`: what a gradient pass found, for the score "taylor"; else None.
    """

    kind: str
    layer: int
    moments: Moments
    weight: Tensor
    size: int
    weights: Weights
    reads: ChannelSums
    spread: Tensor
    seed: int
    first_order: Tensor | None = None

    @property
    def units(self) -> int:
        """Number of units."""
        return self.weight.shape[1] // self.size
