"""Post-norms folded into the projections before them, with a calibrated constant in the place of 1 / rms.

    y = g * (W x + b) / rms(W x + b)  ~  diag(c g) (W x + b)     the division goes (compress.stats_norms)

This is Pangu Light's absorption (arXiv 2505.20155; methods 1.5), whose formulas are our reconstruction. The residual
multiplier stays outside of it. Gains of pre-norms are folded, exactly, where the stream is turned (surgery/rotate.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import UserError
from compress.family import POST_NORMS, check_absorbable
from compress.spec import ModelSpec

Weights = dict[str, Tensor]


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor of at least float32, so that a product with it is rounded once."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def absorb_post_norm(spec: ModelSpec, weights: Mapping[str, Tensor], role: str, constant: float) -> Weights:
    """Return weights by role without the post-norm `role`: W' = diag(c g) W `[hidden, in]`, b' = c g b.

    g is the stored weight plus the family's offset, `constant` c comes from `fit_constant`. Exact on tokens whose raw
    output has rms 1 / c. Raises UserError for a norm that is not behind a branch, or without which nothing would
    normalise the stream.
    """
    check_absorbable(spec.family, role)
    if role not in weights:
        raise UserError(f"The norm '{role}' is gone from this layer already; leave it out of the plan.")
    projection = POST_NORMS[role][0]
    scale = (weights[role].double() + spec.norm_offset) * constant
    absorbed = {name: tensor for name, tensor in weights.items() if name != role}
    for name, factor in ((projection, scale[:, None]), (f"{projection}_bias", scale)):
        if name in weights:
            exact = widen(weights[name])
            absorbed[name] = (exact * factor.to(exact.dtype)).to(weights[name].dtype)
    return absorbed
