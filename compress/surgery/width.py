"""Slicing every tensor of a model along the axes that are pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compress.family import NORM_ROLES
from compress.shapes import LayerShape
from compress.spec import ModelSpec, role_axes
from compress.surgery.norms import rescale_norm

Weights = dict[str, Tensor]
# Norms over the hidden width. A qk-norm over all heads keeps its weights: heads go by what they put out, so those
# that go carry average energy in q and k, and the mean square of the rest stays what it was.
NORMS = (*NORM_ROLES, "final_norm")


def head_rows(groups: Tensor, heads: int, head_dim: int) -> Tensor:
    """Return the rows of `heads` neighbouring heads for each group: `heads` is 1 for k and v, the group size for q."""
    size = heads * head_dim
    return (groups[:, None] * size + torch.arange(size)).flatten()


def axis_rows(shape: LayerShape, hidden: Tensor, groups: Tensor, ffn: Tensor) -> dict[str, Tensor]:
    """Return the kept indices along each axis of a layer."""
    return {
        "hidden": hidden,
        "query": head_rows(groups, shape.group, shape.head_dim),
        "kv": head_rows(groups, 1, shape.head_dim),
        "ffn": ffn,
        "head": torch.arange(shape.head_dim),
    }


def slice_weights(
    spec: ModelSpec, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], norms: str = "slnp"
) -> Weights:
    """Cut every tensor along its axes; a norm whose width shrinks is re-scaled (SLNP, methods 1.4) unless `none`."""
    span = spec.family.attention.qk_norm
    cut: Weights = {}
    for role, tensor in weights.items():
        sliced = tensor
        for dim, axis in enumerate(role_axes(role, span)):
            if axis in kept and len(kept[axis]) < sliced.shape[dim]:
                sliced = sliced.index_select(dim, kept[axis])
        if norms != "none" and role in NORMS and sliced.shape != tensor.shape:
            sliced = rescale_norm(tensor, sliced, spec.norm_offset)
        cut[role] = sliced
    return cut


def fold_embedding_scale(old: ModelSpec, new: ModelSpec, ends: Weights) -> Weights:
    """Keep embeddings and logits as they were when the multiplier on embeddings follows the hidden size.

    The stored embedding takes the ratio of the multipliers; a tied head would take it too, so the final norm gives
    it back. Exact up to rounding.
    """
    ratio = old.embedding_multiplier / new.embedding_multiplier
    if math.isclose(ratio, 1.0):
        return ends
    folded = dict(ends)
    if "embed" in ends:
        folded["embed"] = ends["embed"] * ratio
    if new.shape.tied and "final_norm" in ends:
        folded["final_norm"] = (ends["final_norm"] + new.norm_offset) / ratio - new.norm_offset
    return folded
