"""Norm weights after channels were removed (lossy re-scaling)."""

from __future__ import annotations

from torch import Tensor


def rescale_norm(weight: Tensor, kept: Tensor, offset: float) -> Tensor:
    """Return the kept norm weights times |g| / |g[kept]|, g being the stored weight plus `offset`.

    SLNP (Pangu Light, arXiv 2505.20155): the L2 norm of the weight vector is preserved. The formula is our
    reconstruction (methods 1.4).
    """
    full, part = (weight + offset).norm(), (kept + offset).norm()
    return (kept + offset) * (full / part) - offset if part > 0 else kept
