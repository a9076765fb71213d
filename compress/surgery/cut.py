"""One layer of the new model before any repair: absorbed, merged, sliced and re-scaled by the plan (methods 9)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.plan import LayerPlan
from compress.surgery.absorb import absorb_post_norm
from compress.surgery.biases import fill_biases
from compress.surgery.depth import ATTENTION_ROLES, merge_attention
from compress.surgery.job import Rebuild, Weights
from compress.surgery.width import axis_rows, slice_weights
from compress.weights import read_roles


def cut_layer(job: Rebuild, place: int, dense: Mapping[str, Tensor]) -> tuple[Weights, Weights]:
    """Return layer `place` of the new model, rounded to the storage type, and its rows before hidden channels went.

    The second serves as the reference that refitted inputs aim at. Layers merged into this one lose the same
    post-norms before they join it, each by a constant of its own.
    """
    row = job.plan.layers[place]
    merged = merge_sources(job, row, dense) if row.merged else absorb_norms(job, row, dense)
    rows = kept_rows(job, row)
    reference = slice_weights(job.old, merged, rows, job.recipe.norms)
    cut = slice_weights(job.old, reference, {"hidden": job.hidden}, job.recipe.norms)
    cut = fill_biases(job.new.layers[place].shape, cut)
    return {role: job.round_to(role, tensor) for role, tensor in cut.items()}, reference


def merge_sources(job: Rebuild, row: LayerPlan, dense: Mapping[str, Tensor]) -> Weights:
    """Return the kept layer with the attention of those merged into it, all without the norms that go."""
    scales = {source.layer: source.scale for source in row.sources}
    sources = {row.layer: absorb_norms(job, row, dense)}
    for groups in row.merged:
        attention = read_roles(job.checkpoint, job.old, groups.layer, ATTENTION_ROLES, torch.float32)
        sources[groups.layer] = absorb_norms(job, row, attention, groups.scale)
    return merge_attention(job.old, row, sources, scales)


def absorb_norms(job: Rebuild, row: LayerPlan, weights: Mapping[str, Tensor], scale: float = 1.0) -> Weights:
    """Fold the post-norms that the plan absorbs into the projections before them, with `scale` times its constants."""
    changed = dict(weights)
    for role, constant in row.absorbed:
        if role in changed:
            changed = absorb_post_norm(job.old, changed, role, scale * constant)
    return changed


def kept_rows(job: Rebuild, row: LayerPlan) -> dict[str, Tensor]:
    """Return the kept indices along the axes other than the hidden one; a merge has chosen its groups already."""
    shape = job.old.layers[row.layer].shape
    every = torch.arange(job.old.shape.hidden)
    rows = axis_rows(shape, every, torch.tensor(row.kv_groups, dtype=torch.int64), torch.tensor(row.ffn))
    gone = ("query", "kv") if row.merged else ()
    return {axis: kept for axis, kept in rows.items() if axis not in gone}
