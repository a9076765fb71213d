"""Rotary position embedding: inverse frequencies of the scaling variants and the tables made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VARIANTS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding: `dim` of each head's values rotate, paired as halves or as neighbours."""

    dim: int
    theta: float
    variant: str = "default"
    interleaved: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def long_after(self) -> int | None:
        """Sequence length above which the second frequency set holds (longrope), else None."""
        return int(self.options["original_max_position_embeddings"]) if self.variant == "longrope" else None


def compute_frequencies(rope: RopeSpec, dtype: torch.dtype = torch.float32, long: bool = False) -> Tensor:
    """Return the inverse frequencies `[dim / 2]` of one rotary embedding.

    Sources: RoFormer (default), position interpolation (linear), Llama 3.1 (llama3), arXiv 2309.00071 (yarn),
    arXiv 2402.13753 (longrope; `long` picks the second of its two factor sets).
    """
    exponent = torch.arange(0, rope.dim, 2, dtype=dtype) / rope.dim
    base: Tensor = rope.theta**exponent
    if rope.variant == "linear":
        return divide_frequencies(base, rope.options["factor"])
    if rope.variant == "llama3":
        return smooth_frequencies(1.0 / base, rope.options)
    if rope.variant == "yarn":
        return blend_frequencies(base, rope)
    if rope.variant == "longrope":
        factors = rope.options["long_factor" if long else "short_factor"]
        return 1.0 / (torch.tensor(factors, dtype=dtype) * base)
    return 1.0 / base


def divide_frequencies(base: Tensor, factor: float) -> Tensor:
    """Apply position interpolation: every frequency divided by `factor`."""
    inverse: Tensor = 1.0 / (base * factor)
    return inverse


def smooth_frequencies(inverse: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Apply the Llama 3.1 scaling: long waves divided by `factor`, short ones kept, a smooth ramp between."""
    context = options["original_max_position_embeddings"]
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = context * inverse / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    blended: Tensor = (1 - ramp) * inverse / options["factor"] + ramp * inverse
    return blended


def blend_frequencies(base: Tensor, rope: RopeSpec) -> Tensor:
    """Apply YaRN: interpolate slow dimensions, keep fast ones (arXiv 2309.00071, section 3.2)."""
    options, context = rope.options, rope.options["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return rope.dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(options.get("beta_fast") or 32), dimension(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    steps = torch.arange(rope.dim // 2, dtype=base.dtype)
    ramp = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    blended: Tensor = ramp / (rope.options["factor"] * base) + (1 - ramp) / base
    return blended


def compute_scale(rope: RopeSpec) -> float:
    """Return the factor on the cosine and sine tables (1 except for yarn and longrope)."""
    options = rope.options
    if rope.variant not in ("yarn", "longrope"):
        return 1.0
    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])
    factor = options["factor"]
    if rope.variant == "longrope":
        context = options["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    scale, every = options.get("mscale"), options.get("mscale_all_dim")
    if scale and every:
        return yarn_scale(factor, scale) / yarn_scale(factor, every)
    return yarn_scale(factor, 1.0)


def yarn_scale(factor: float, weight: float) -> float:
    """Return YaRN's attention temperature 0.1 w ln(s) + 1 (arXiv 2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def compute_tables(rope: RopeSpec, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine `[batch, sequence, dim]` for integer `positions` `[batch, sequence]`.

    Angles are computed in float32 as the reference implementations do (float64 when `dtype` is float64); for
    longrope the whole sequence switches to the long factors once any position passes the original context.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    long = rope.long_after is not None and int(positions.max()) + 1 > rope.long_after
    angles = positions[..., None].to(exact) * compute_frequencies(rope, exact, long)
    angles = angles.repeat_interleave(2, -1) if rope.interleaved else torch.cat((angles, angles), -1)
    scale = compute_scale(rope)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first `dim` values of each head; `heads` `[batch, heads, sequence, head_dim]`."""
    dim = cos.shape[-1]
    turned, passed = heads[..., :dim], heads[..., dim:]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    else:
        partner = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), -1)
    rotated = turned * cos[:, None] + partner * sin[:, None]
    return torch.cat((rotated, passed), -1) if passed.shape[-1] else rotated
