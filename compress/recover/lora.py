"""Low-rank adapters: a frozen matrix plus a trained product of two thin ones, merged before it is used.

The merged matrix goes into the one forward pass, so that any projection can carry an adapter, and what is written at
the end is to the bit what was trained. The price is the gradient of a whole matrix where the two-step product
B (A x) would need only thin ones; it lives for one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.recover.parallel import gather_whole

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LoraOptions:
    """Adapters of `rank` on the projections `roles`; the product counts `scale` times (alpha / rank of the paper)."""

    rank: int
    scale: float = 2.0
    roles: tuple[str, ...] = PROJECTIONS
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a rank below 1 and unknown projections."""
        if self.rank < 1:
            raise UserError(f"--lora {self.rank} is no rank; give 1 or more, or leave it out to train all weights.")
        unknown = sorted(set(self.roles) - set(PROJECTIONS))
        if unknown:
            raise UserError(f"'{unknown[0]}' is no projection; LoRA goes on any of {', '.join(PROJECTIONS)}.")


class Adapter(nn.Module):
    """The trained part `scale * b @ a` of one matrix `[out, in]`: `a` `[rank, in]` random, `b` `[out, rank]` zero.

    LoRA (arXiv 2106.09685, section 4.1): at the start the product is zero and the model is the one it was.
    """

    def __init__(self, shape: torch.Size, options: LoraOptions, random: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns = shape
        noise = torch.randn(options.rank, columns, generator=random, dtype=torch.float32)
        self.a = nn.Parameter((noise / columns**0.5).to(dtype))
        self.b = nn.Parameter(torch.zeros(rows, options.rank, dtype=dtype))
        self._scale = options.scale

    def merge(self, weight: Tensor) -> Tensor:
        """Return the matrix `[out, in]` that the forward pass uses, in the adapter's own type."""
        whole, a, b = (gather_whole(one) for one in (weight, self.a, self.b))
        return torch.addmm(whole.to(a.dtype), b, a, alpha=self._scale)


def seed_adapters(options: LoraOptions, layer: int) -> torch.Generator:
    """Return the source of a layer's random starts: its own, so that layers can be built in any order."""
    return torch.Generator().manual_seed(options.seed * 100_003 + layer)
