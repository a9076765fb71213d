"""CLAP, cross-layer attention pruning: the best KV groups of dropped layers live on in the kept layer before them.

Pangu Light (arXiv 2505.20155); the algorithm follows methods 1.3, whose exactness conditions are our reconstruction.
With every group of all its source layers the merged attention equals the sum of their attentions run in parallel on
one input, for layers that are alike (`unlike_layers`) and whose attention no post-norm follows. What merging cannot
keep is that a dropped layer used to read the stream one or more layers later.

    x --+-- attn_in (kept layer's) -- q,k,v of kept and moved groups -- attend -- o -- (+)     moved q,k,v: times
        |                                                                               |      g_source / g_kept
        +-------------------------------------------------------------------------------+
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compress.errors import UserError
from compress.plan import LayerPlan, MergedGroups, Plan
from compress.rope import RopeSpec, rotate
from compress.shapes import LayerShape
from compress.spec import LayerSpec, ModelSpec, role_axes
from compress.surgery.width import head_rows, slice_weights

Weights = dict[str, Tensor]

# The vectors by which `unlike_layers` judges; cheap to read for all layers before any surgery.
GUARD_ROLES = ("attn_in", "attn_out", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias")
# All that a merge reads of a source layer.
ATTENTION_ROLES = ("q", "k", "v", "o", *GUARD_ROLES)
# A gain below this share of the median is not divided by (methods 1.3).
WEAK_GAIN = 1e-3
# qk-norm products that differ by less than this share of the largest are rounding.
SAME_GAIN = 1e-6


# Which groups


def choose_groups(
    scores: Mapping[int, Sequence[float]], kept_layer: int, dropped_layers: Sequence[int], count: int
) -> tuple[tuple[int, ...], tuple[MergedGroups, ...]]:
    """Return the groups that the kept layer keeps and those it takes in: the best `count` of one pool (methods 1.3).

    `scores` holds the dense model's score of every group by layer; `dropped_layers` are those right after the kept
    layer that may merge with it. Equal scores favour the kept layer. Raises ValueError when the pool is too small.
    """
    pool = [(layer, group) for layer in (kept_layer, *dropped_layers) for group in range(len(scores[layer]))]
    if not 1 <= count <= len(pool):
        raise ValueError(f"{count} groups cannot be chosen from a pool of {len(pool)}")
    best = sorted(pool, key=lambda unit: -scores[unit[0]][unit[1]])[:count]
    groups = {layer: tuple(sorted(group for own, group in best if own == layer)) for layer, _ in pool}
    merged = tuple(MergedGroups(layer, groups[layer]) for layer in dropped_layers if groups[layer])
    return groups[kept_layer], merged


# Which layers


def unlike_layers(
    spec: ModelSpec, kept: int, dropped: int, weights_kept: Mapping[str, Tensor], weights_dropped: Mapping[str, Tensor]
) -> str:
    """Return why attention groups of layer `dropped` cannot live on in layer `kept`, or "" when they can.

    The weights need hold the tensors of GUARD_ROLES only.
    """
    pair = weights_kept, weights_dropped
    return (
        compare_attention(spec.layers[kept], spec.layers[dropped])
        or compare_roles(*pair)
        or compare_qk_norms(spec, spec.layers[kept].rope, *pair)
    )


def compare_attention(kept: LayerSpec, dropped: LayerSpec) -> str:
    """Return how two layers attend differently: window, rotation, head size, group size."""
    if (kept.shape.attention, kept.window) != (dropped.shape.attention, dropped.window):
        return f"it attends to {describe_window(dropped)}, the other to {describe_window(kept)}"
    if (kept.rope is None) != (dropped.rope is None):
        return "only one of them rotates its queries and keys"
    if kept.rope != dropped.rope:
        return "their rotary embeddings differ"
    if kept.shape.head_dim != dropped.shape.head_dim:
        return f"its heads have size {dropped.shape.head_dim}, the other's {kept.shape.head_dim}"
    if kept.shape.group != dropped.shape.group:
        return f"{dropped.shape.group} of its query heads share a KV head, {kept.shape.group} of the other's"
    return ""


def describe_window(layer: LayerSpec) -> str:
    """Return what a layer attends to, in words."""
    return "all tokens before" if layer.window is None else f"the last {layer.window} tokens"


def compare_roles(kept: Mapping[str, Tensor], dropped: Mapping[str, Tensor]) -> str:
    """Return which norm or bias only one of two layers has."""
    lone = [role for role in GUARD_ROLES if (role in kept) != (role in dropped)]
    return f"only one of them has the tensor {lone[0]}" if lone else ""


def compare_qk_norms(
    spec: ModelSpec, rope: RopeSpec | None, kept: Mapping[str, Tensor], dropped: Mapping[str, Tensor]
) -> str:
    """Return why qk-norms forbid a merge.

    A layer stores one q_norm and one k_norm for all its heads, and the norm stands behind the projection, so that no
    factor can be folded into q or k: the projection's own scale is divided out. Merging is exact where both layers
    give equal scores for equal unit-rms queries and keys, which only needs equal products (our derivation).
    """
    if "q_norm" not in kept:
        return ""
    if spec.family.attention.qk_norm == "all":
        return "their qk-norms span all heads at once, so that moved heads would change the scale of the others"
    one, two = score_gains(spec, rope, kept), score_gains(spec, rope, dropped)
    difference = float((one - two).abs().max() / torch.maximum(one.abs().max(), two.abs().max()).clamp(min=1e-300))
    if difference <= SAME_GAIN:
        return ""
    return (
        f"their qk-norm weights differ (products of q_norm and k_norm by up to {difference:.1%} of the largest), "
        "a layer has one such pair for all its heads, and no projection before the norm can make up for it"
    )


def score_gains(spec: ModelSpec, rope: RopeSpec | None, weights: Mapping[str, Tensor]) -> Tensor:
    """Return all products of a q gain and a k gain that scores hold, `[2, head_dim]` in float64.

    With a rotary pair (1, 2) turned by the angle between two tokens, a score holds q1 k1 and q2 k2 times its cosine,
    q1 k2 and q2 k1 times its sine. Thus a factor that both dimensions of a pair share may move from q to k.
    """
    query, key = (weights[role].double() + spec.norm_offset for role in ("q_norm", "k_norm"))
    if rope is None:
        return torch.stack((query * key, query * key))
    quarter = torch.zeros(1, 1, rope.dim, dtype=torch.float64), torch.ones(1, 1, rope.dim, dtype=torch.float64)
    partner = rotate(key[None, None, None], *quarter, rope.interleaved)[0, 0, 0]
    return torch.stack((query * key, query * partner))


def check_merges(spec: ModelSpec, plan: Plan, read: Callable[[int], Mapping[str, Tensor]]) -> None:
    """Raise UserError for the first pair of unlike layers that a plan merges; `read` gives a layer's GUARD_ROLES."""
    for row in plan.layers:
        if row.merged:
            refuse_unlike(spec, row, {source.layer: read(source.layer) for source in row.sources})


def refuse_unlike(spec: ModelSpec, row: LayerPlan, weights: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Raise UserError when a dropped layer of one plan row is unlike the kept layer."""
    for groups in row.merged:
        reason = unlike_layers(spec, row.layer, groups.layer, weights[row.layer], weights[groups.layer])
        if reason:
            raise UserError(
                f"Attention groups of layer {groups.layer} cannot live on in layer {row.layer}: {reason}; take layer "
                f"{groups.layer} out of the plan's 'merged' entries, or keep it."
            )


# The merge


def merge_attention(
    spec: ModelSpec,
    row: LayerPlan,
    weights: Mapping[int, Mapping[str, Tensor]],
    constants: Mapping[int, float] | None = None,
) -> Weights:
    """Return the kept layer's weights with the attention of its plan row: its own groups, then those taken in.

    `weights` holds the dense layer by role for the kept layer, ATTENTION_ROLES for the merged ones. The moved q, k
    and v take the ratio of the pre-norms' gains; biases go with their rows and the biases of `o` add up. Behind a
    post-norm that is still there the merge is approximate (both parts are normed together): moved outputs take the
    ratio of post-norm gains times that of `constants`, each layer's calibrated 1 / rms (taken as equal where none is
    given); the refit settles the rest. Without merged groups this only slices. Raises UserError for unlike layers.
    """
    refuse_unlike(spec, row, weights)
    kept, shape = weights[row.layer], spec.layers[row.layer].shape
    parts = [take_groups(spec, shape, weights[source.layer], source.kv_groups) for source in row.sources]
    if not row.merged:
        return {**kept, **parts[0]}
    gains: Weights = {}
    if "attn_in" in kept:
        gains["attn_in"], factors = share_gain(spec, "attn_in", parts)
        parts = [scale_inputs(spec, part, factor) for part, factor in zip(parts, factors, strict=True)]
    if "attn_out" in kept:
        gains["attn_out"], factors = share_gain(spec, "attn_out", parts)
        scales = compare_constants(row, constants or {})
        parts = [scale_outputs(part, f * scale) for part, f, scale in zip(parts, factors, scales, strict=True)]
    return {**kept, **join_parts(spec, parts), **gains}


def compare_constants(row: LayerPlan, constants: Mapping[int, float]) -> list[float]:
    """Return each source's post-norm constant over the kept layer's, 1 where either is missing."""
    own = constants.get(row.layer)
    return [constants.get(source.layer, own) / own if own else 1.0 for source in row.sources]


def take_groups(
    spec: ModelSpec, shape: LayerShape, weights: Mapping[str, Tensor], groups: Sequence[int]
) -> Weights:
    """Return a layer's attention tensors with only the rows (and columns of `o`) of some KV groups, maybe none."""
    chosen = torch.tensor(groups, dtype=torch.int64)
    rows = {
        "query": head_rows(chosen, shape.group, shape.head_dim),
        "kv": head_rows(chosen, 1, shape.head_dim),
    }
    return slice_weights(spec, {role: weights[role] for role in ATTENTION_ROLES if role in weights}, rows)


def share_gain(spec: ModelSpec, norm: str, parts: Sequence[Weights]) -> tuple[Tensor, list[Tensor]]:
    """Return the stored weight `[hidden]` of the one norm that all parts share, and each part's factor g / g_shared.

    The shared norm is the kept layer's (the first part). Where its gain is too weak to divide by, it takes the
    strongest part's, and the kept layer's own factor makes up for it: exact before a projection, where clipping the
    ratio (methods 1.3) would not be.
    """
    gains = torch.stack([part[norm].double() + spec.norm_offset for part in parts])
    chosen = gains.abs().argmax(0) * find_weak(gains[0])
    stored = torch.stack([part[norm] for part in parts]).gather(0, chosen[None])[0]
    shared = gains.gather(0, chosen[None])[0]
    # A gain of zero in all parts: nothing passes whatever the columns hold.
    factors = torch.where(shared == 0, 1.0, gains / torch.where(shared == 0, 1.0, shared))
    return stored, list(factors.unbind())


def find_weak(gain: Tensor) -> Tensor:
    """Return the channels `[hidden]` whose gain is below 1e-3 of the median (or zero)."""
    size = gain.abs()
    return size <= WEAK_GAIN * size.median()


def scale_inputs(spec: ModelSpec, part: Weights, factor: Tensor) -> Weights:
    """Return attention tensors with the columns of whatever reads the pre-norm times `factor` `[hidden]`."""
    readers = spec.family.feeds["attn_in"]
    return {**part, **{role: part[role] * factor.to(part[role].dtype) for role in readers}}


def scale_outputs(part: Weights, factor: Tensor) -> Weights:
    """Return attention tensors with the output of `o` times `factor` `[hidden]`."""
    scaled = {"o": part["o"] * factor.to(part["o"].dtype)[:, None]}
    if "o_bias" in part:
        scaled["o_bias"] = part["o_bias"] * factor.to(part["o_bias"].dtype)
    return {**part, **scaled}


def join_parts(spec: ModelSpec, parts: Sequence[Weights]) -> Weights:
    """Return one attention of all parts: head axes one after the other, biases of `o` added, the rest the first's."""
    joined: Weights = {}
    for role, tensor in parts[0].items():
        axes = role_axes(role, spec.family.attention.qk_norm)
        heads = [dim for dim, axis in enumerate(axes) if axis in ("query", "kv")]
        if heads:
            joined[role] = torch.cat([part[role] for part in parts], heads[0])
        elif role == "o_bias":
            joined[role] = torch.stack([part[role] for part in parts]).sum(0)
        else:
            joined[role] = tensor
    return joined
