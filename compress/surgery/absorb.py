"""Norm weights folded into projections: pre-norm gains exactly, post-norms with a calibrated constant.

    pre-norm   y = W (g * n(x))  =  (W diag(g)) n(x)         exact; the division by the rms stays
    post-norm  y = g * (W x + b) / rms(W x + b)  ~  diag(c g) (W x + b)     the division goes (compress.stats_norms)

The first is known algebra; the second is Pangu Light's absorption (arXiv 2505.20155; methods 1.5), whose formulas are
our reconstruction. The residual multiplier stays outside of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compress.decoder import project
from compress.errors import UserError
from compress.family import POST_NORMS, check_absorbable
from compress.spec import ModelSpec
from compress.stats_norms import PostNormSums

Weights = dict[str, Tensor]


def fold_norm(spec: ModelSpec, weights: Mapping[str, Tensor], role: str) -> Weights:
    """Return weights by role with a pre-norm's gain in the projections that read it, and the norm neutral; exact.

    The neutral norm is 1 less the family's offset. Works for the final norm and an untied head too. Raises UserError
    where no projection reads the norm, the weights lack it, or the head is tied to the embedding.
    """
    readers = spec.family.feeds.get(role, ())
    if not readers or role not in weights:
        raise UserError(
            f"The norm '{role}' feeds no projection here, so its weight cannot be folded; what can be folded are "
            "norms before a branch and the final norm."
        )
    if spec.shape.tied and "head" in readers:
        raise UserError(
            f"The weight of '{role}' cannot be folded into an output head that is tied to the embedding, which would "
            "change too; leave that norm as it is, or untie the head."
        )
    gain = widen(weights[role]) + spec.norm_offset
    folded = dict(weights)
    folded |= {reader: (weights[reader] * gain).to(weights[reader].dtype) for reader in readers}
    folded[role] = torch.full_like(weights[role], 1 - spec.norm_offset)
    return folded


def fold_layer(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Weights:
    """Return one layer's weights with the gains of all its pre-norms folded; exact."""
    folded = dict(weights)
    for role, readers in spec.family.feeds.items():
        if readers and role in folded:
            folded = fold_norm(spec, folded, role)
    return folded


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor of at least float32, so that a product with it is rounded once."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def absorb_post_norm(spec: ModelSpec, weights: Mapping[str, Tensor], role: str, constant: float | Tensor) -> Weights:
    """Return weights by role without the post-norm `role`: W' = diag(c g) W `[hidden, in]`, b' = c g b.

    `constant` is a scalar or one number per channel `[hidden]` (`fit_constant`); g is the stored weight plus the
    family's offset. Exact on tokens whose raw output has rms 1 / c. Raises UserError for a norm that is not behind a
    branch, or without which nothing would normalise the stream.
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


def sum_post_norm(
    spec: ModelSpec, weights: Mapping[str, Tensor], role: str, layer: int, batches: Iterable[tuple[Tensor, Tensor]]
) -> PostNormSums:
    """Sum what the projection before the post-norm `role` gives out for pairs of its inputs and token masks.

    `weights` may be cut already: methods 1.5 asks for the constant to be measured again on the pruned stream. Inputs
    `[..., in]`, masks `[...]`, True for ordinary tokens.
    """
    sums = PostNormSums.start(spec, layer, role, weights[role])
    for inputs, mask in batches:
        sums.update(project(weights, POST_NORMS[role][0], inputs), mask)
    return sums
