"""CLAP: merged attention equals its sources in parallel (float64, every tensor perturbed); which layers may merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import CASES, make_checkpoint, make_config, make_tensors
from torch import Tensor

from compress.checkpoint import open_checkpoint
from compress.decoder import attention_branch, attention_context, compute_logits, make_frame, project, run_layer
from compress.family import NORM_ROLES
from compress.importance.units import group_scores
from compress.plan import LayerPlan, MergedGroups, Plan, keep_everything, plan_shape
from compress.probe import cut_spec
from compress.spec import ModelSpec, resolve_model
from compress.stats import Moments
from compress.surgery.depth import (
    ATTENTION_ROLES,
    GUARD_ROLES,
    check_merges,
    choose_groups,
    merge_attention,
    score_gains,
    unlike_layers,
)
from compress.surgery.width import axis_rows, head_rows, slice_weights
from compress.weights import read_layer, read_spec, split_fused

EXACT = 1e-10  # attention outputs of order 1 to 10 in float64
Weights = dict[str, Tensor]
MERGEABLE = [case for case in CASES if case != "olmo2"]  # its qk-norms span all heads
POST_NORMED = [case for case in MERGEABLE if "attn_out" in resolve_model(make_config(case), None).layers[0].names]
# Layers of four that are alike, by case; all four where nothing is said.
ALIKE = {
    "qwen2-window": [{0, 1}, {2, 3}],
    "gemma2": [{0, 2}, {1, 3}],
    "gemma3_text": [{0, 2}, {1, 3}],
    "gemma3_text-linear": [{0, 1, 3}, {2}],
    "smollm3": [{0, 2}, {1, 3}],
    "smollm3-window": [{0, 3}, {1, 2}],
}


def load(case: str, **changes: Any) -> tuple[ModelSpec, list[Weights]]:
    """A tiny model's layers by role in float64; per-head qk-norms are made equal in all of them."""
    config = make_config(case, **changes)
    spec = resolve_model(config, None)
    stored = make_tensors(spec)
    layers = []
    for layer in spec.layers:
        weights = split_fused(spec, layer, {role: stored[name].double() for role, name in layer.names.items()})
        layers.append(weights)
    if spec.family.attention.qk_norm == "head":
        for weights in layers:
            weights |= {role: layers[0][role].clone() for role in ("q_norm", "k_norm")}
    return spec, layers


def absorb(spec: ModelSpec, layers: Sequence[Weights]) -> None:
    """Take post-norms for absorbed: constants of their own for every layer stand in `o` (methods 1.5)."""
    for index, weights in enumerate(layers):
        if "attn_out" in weights:
            gain = (weights.pop("attn_out") + spec.norm_offset) * (0.5 + index)
            weights["o"] = gain[:, None] * weights["o"]
            if "o_bias" in weights:
                weights["o_bias"] = gain * weights["o_bias"]


def random_stream(spec: ModelSpec, seed: int = 3) -> Tensor:
    """Two windows longer than every sliding window."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, 40, spec.shape.hidden, generator=random, dtype=torch.float64) + 0.3


def context_of(spec: ModelSpec, index: int, weights: Weights, x: Tensor, groups: int | None = None) -> Tensor:
    layer = replace(spec.layers[index], shape=spec.layers[index].shape.resize(groups))
    frame = make_frame(spec, len(x), x.shape[1], 0, torch.float64)
    return attention_context(spec, layer, weights, x, frame)[0]


def run_attention(spec: ModelSpec, index: int, weights: Weights, x: Tensor, groups: int | None = None) -> Tensor:
    return attention_branch(spec, weights, context_of(spec, index, weights, x, groups))


def keep_only(spec: ModelSpec, weights: Weights, groups: Sequence[int]) -> Weights:
    """The slow twin of moving groups: the layer as it is, with all other groups' columns of `o` at zero."""
    shape = spec.layers[0].shape
    silent = torch.ones(weights["o"].shape[1], dtype=torch.bool)
    silent[head_rows(torch.tensor(groups, dtype=torch.int64), shape.group, shape.head_dim)] = False
    return {**weights, "o": weights["o"].masked_fill(silent, 0.0)}


def make_row(layer: int, merged: Mapping[int, Sequence[int]], own: Sequence[int] = (0, 1, 2)) -> LayerPlan:
    return LayerPlan(layer, tuple(own), (0,), tuple(MergedGroups(i, tuple(groups)) for i, groups in merged.items()))


def gap(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def alike_after(spec: ModelSpec, layers: Sequence[Weights], kept: int) -> list[int]:
    others = range(kept + 1, len(layers))
    return [i for i in others if not unlike_layers(spec, kept, i, layers[kept], layers[i])]


def find_pair(spec: ModelSpec, layers: Sequence[Weights]) -> tuple[int, int]:
    """A layer and the next one like it, not the first layer where that can be."""
    return next((kept, alike[0]) for kept in (1, 0, 2) if (alike := alike_after(spec, layers, kept)))


# Parity


@pytest.mark.parametrize("case", MERGEABLE)
def test_only_alike_layers_may_merge(case: str) -> None:
    spec, layers = load(case)
    found = {pair for pair in combinations(range(4), 2) if pair[1] in alike_after(spec, layers, pair[0])}
    wanted = {pair for alike in ALIKE.get(case, [{0, 1, 2, 3}]) for pair in combinations(sorted(alike), 2)}
    assert found == wanted


@pytest.mark.parametrize("case", MERGEABLE)
def test_all_groups_of_a_run_equal_its_attentions_in_parallel(case: str) -> None:
    """Methods 1.10: 2 G groups and more (3 G and 4 G where so many layers are alike)."""
    spec, layers = load(case)
    absorb(spec, layers)
    x, sizes = random_stream(spec), set()
    for kept in range(3):
        alike = alike_after(spec, layers, kept)
        for count in range(1, len(alike) + 1):
            row = make_row(kept, dict.fromkeys(alike[:count], (0, 1, 2)))
            merged = merge_attention(spec, row, dict(enumerate(layers)))
            apart = sum(run_attention(spec, i, layers[i], x) for i in (kept, *alike[:count]))
            assert isinstance(apart, Tensor)
            assert gap(run_attention(spec, kept, merged, x, row.group_count), apart) <= EXACT
            assert gap(apart, run_attention(spec, kept, layers[kept], x)) > 0.01
            sizes.add(row.group_count)
    most = max(len(alike) for alike in ALIKE.get(case, [{0, 1, 2, 3}]))
    assert sizes == {3 * count for count in range(2, most + 1)}


@pytest.mark.parametrize("own", [(0, 2), (1,), ()])
@pytest.mark.parametrize("case", MERGEABLE)
def test_some_groups_equal_the_same_groups_in_parallel(case: str, own: tuple[int, ...]) -> None:
    """Only `o` decides what a group puts out, so the others are silenced there; biases of `o` stay whole."""
    spec, layers = load(case)
    absorb(spec, layers)
    kept = next(i for i in range(3) if alike_after(spec, layers, i))
    alike, groups = alike_after(spec, layers, kept), [(2,), (0, 1), (1,)]
    row = make_row(kept, dict(zip(alike, groups, strict=False)), own)
    merged = merge_attention(spec, row, dict(enumerate(layers)))
    x = random_stream(spec)
    apart = torch.stack(
        [run_attention(spec, s.layer, keep_only(spec, layers[s.layer], s.kv_groups), x) for s in row.sources]
    ).sum(0)
    assert row.group_count == len(own) + sum(len(g) for g, _ in zip(groups, alike, strict=False))
    assert gap(run_attention(spec, kept, merged, x, row.group_count), apart) <= EXACT


@pytest.mark.parametrize("case", POST_NORMED)
def test_behind_a_post_norm_the_raw_outputs_add_up_in_the_kept_layers_units(case: str) -> None:
    """Branch l is c g o: with moved outputs times (c' g') / (c g), c g (o + moved) is the sum of both branches."""
    spec, layers = load(case)
    kept, other = find_pair(spec, layers)
    for index, weights in enumerate(layers):  # no such family has one, but a repair may add it
        weights["o_bias"] = torch.arange(48, dtype=torch.float64) / 48 - 0.3 * index
    row, constants = make_row(kept, {other: (0, 1, 2)}), {kept: 0.7, other: 1.9}
    merged = merge_attention(spec, row, dict(enumerate(layers)), constants)
    x = random_stream(spec)
    gains = {i: (layers[i]["attn_out"] + spec.norm_offset) * constants[i] for i in (kept, other)}
    apart = torch.stack([gains[i] * project(layers[i], "o", context_of(spec, i, layers[i], x)) for i in gains]).sum(0)
    together = gains[kept] * project(merged, "o", context_of(spec, kept, merged, x, 6))
    assert gap(together, apart) <= EXACT * 10
    assert torch.equal(merged["attn_out"], layers[kept]["attn_out"])
    # One constant alone says nothing about the ratio, as none does.
    plain = merge_attention(spec, row, dict(enumerate(layers)))
    assert torch.equal(merge_attention(spec, row, dict(enumerate(layers)), {other: 5.0})["o"], plain["o"])
    assert torch.equal(merge_attention(spec, row, dict(enumerate(layers)), {kept: 5.0})["o"], plain["o"])


@pytest.mark.parametrize("case", CASES)
def test_own_groups_only_changes_no_bit(case: str) -> None:
    """Methods 1.10: the zero-change identity; fewer own groups are what slicing gives."""
    spec, layers = load(case)
    merged = merge_attention(spec, make_row(1, {}), {1: layers[1]})
    assert merged.keys() == layers[1].keys()
    for role, tensor in layers[1].items():
        assert torch.equal(merged[role], tensor), role
    fewer = merge_attention(spec, make_row(1, {}, (0, 2)), {1: layers[1]})
    whole = torch.arange(48), torch.tensor((0, 2)), torch.arange(56)
    for role, tensor in slice_weights(spec, layers[1], axis_rows(spec.layers[1].shape, *whole)).items():
        assert torch.equal(fewer[role], tensor), role


@pytest.mark.parametrize("case", MERGEABLE)
def test_the_rest_of_the_layer_and_its_own_groups_stay_as_they_are(case: str) -> None:
    spec, layers = load(case)
    before = [{role: tensor.clone() for role, tensor in weights.items()} for weights in layers]
    kept, other = find_pair(spec, layers)
    attention_only = {kept: layers[kept], other: {r: t for r, t in layers[other].items() if r in ATTENTION_ROLES}}
    merged = merge_attention(spec, make_row(kept, {other: (1,)}), attention_only)
    assert merged.keys() == layers[kept].keys()
    for role, tensor in layers[kept].items():
        if role in ("q", "k", "v", "q_bias", "k_bias", "v_bias"):
            assert torch.equal(merged[role][: len(tensor)], tensor), role
        elif role == "o":
            assert torch.equal(merged[role][:, : tensor.shape[1]], tensor)
        elif role != "o_bias":
            assert torch.equal(merged[role], tensor), role
    for weights, old in zip(layers, before, strict=True):  # data in, data out
        assert all(torch.equal(weights[role], tensor) for role, tensor in old.items())


@pytest.mark.parametrize("case", MERGEABLE)
def test_groups_moved_into_a_silent_layer_keep_the_whole_model(case: str) -> None:
    """The kept layer does nothing and the dropped one only attends: then the merged model is the dense one."""
    spec, layers = load(case)
    kept, other = find_pair(spec, layers)
    for index in range(kept, other + 1):
        gone = {"down", "down_bias"} if index == other else {"o", "down", "o_bias", "down_bias"}
        for role in gone & layers[index].keys():
            layers[index][role].zero_()
    if "attn_out" in layers[kept]:  # both parts are normed together, which is exact when one is nothing
        layers[kept]["attn_out"] = layers[other]["attn_out"].clone()
    rows = list(keep_everything(spec.shape).layers)
    rows[kept : other + 1] = [replace(rows[kept], kv_groups=(), merged=(MergedGroups(other, (0, 1, 2)),))]
    plan = Plan(tuple(range(48)), tuple(rows))
    merged = [merge_attention(spec, row, {x.layer: layers[x.layer] for x in row.sources}) for row in plan.layers]
    assert gap(run_model(cut_spec(spec, plan), merged), run_model(spec, layers)) <= EXACT


def run_model(spec: ModelSpec, layers: Sequence[Weights]) -> Tensor:
    x = random_stream(spec)
    frame = make_frame(spec, len(x), x.shape[1], 0, torch.float64)
    for layer, weights in zip(spec.layers, layers, strict=True):
        x, _ = run_layer(spec, layer, weights, x, frame)
    random = torch.Generator().manual_seed(8)
    head = torch.randn(20, spec.shape.hidden, generator=random, dtype=torch.float64) * 0.1
    return compute_logits(spec, {"final_norm": torch.ones(spec.shape.hidden).double(), "head": head}, x)


def test_slicing_follows_the_merge() -> None:
    """After it the attention holds exactly the plan's groups, in the plan's order: only hidden and FFN are left."""
    spec, layers = load("llama-biases")
    row = replace(make_row(1, {2: (0, 2)}, (1,)), ffn=(3, 9))
    hidden = torch.arange(0, 48, 2)
    merged = merge_attention(spec, row, dict(enumerate(layers)))
    rows = axis_rows(spec.layers[1].shape, hidden, torch.arange(row.group_count), torch.tensor(row.ffn))
    cut = slice_weights(spec, merged, rows)
    shape = plan_shape(Plan(tuple(hidden.tolist()), (row,)), spec.shape).layers[0]
    assert (shape.query, shape.kv, shape.ffn) == (48, 24, 2)
    assert cut["q"].shape == (48, 24)
    assert cut["k"].shape == cut["v"].shape == (24, 24)
    assert cut["o"].shape == (24, 48)
    assert cut["q_bias"].shape == (48,)
    assert cut["o_bias"].shape == (24,)
    assert cut["down"].shape == (24, 2)
    ratio = layers[2]["attn_in"] / layers[1]["attn_in"]
    torch.testing.assert_close(cut["k"][8:16], (layers[2]["k"][:8] * ratio)[:, hidden], rtol=1e-14, atol=0)
    torch.testing.assert_close(cut["k"][16:], (layers[2]["k"][16:] * ratio)[:, hidden], rtol=1e-14, atol=0)
    assert torch.equal(cut["k"][:8], layers[1]["k"][8:16][:, hidden])
    assert torch.equal(cut["o_bias"], (layers[1]["o_bias"] + layers[2]["o_bias"])[hidden])


# Gains that cannot be divided by


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3_text", "granite"])
def test_a_weak_gain_is_replaced_exactly_and_reported(case: str) -> None:
    spec, layers = load(case)
    absorb(spec, layers)
    other = alike_after(spec, layers, 1)[0]
    gains = {i: layers[i]["attn_in"] + spec.norm_offset for i in (1, other)}
    median = float(gains[1].abs().median())
    for channel, own in ((3, 0.0), (7, 1e-5 * median), (8, -5e-4 * median), (11, 0.0), (12, 2e-3 * median)):
        gains[1][channel] = own
    gains[other][11] = 0.0
    for i, gain in gains.items():
        layers[i]["attn_in"] = gain - spec.norm_offset
    row = make_row(1, {other: (0, 2)})
    merged = merge_attention(spec, row, dict(enumerate(layers)))
    x = random_stream(spec)
    x[..., 7] *= 1000  # such gains hold down channels of massive activations: clipping would lose them
    moved = keep_only(spec, layers[other], (0, 2))
    apart = run_attention(spec, 1, layers[1], x) + run_attention(spec, other, moved, x)
    assert gap(run_attention(spec, 1, merged, x, row.group_count), apart) <= EXACT * 10
    weak = [3, 7, 8, 11]
    assert torch.equal(merged["attn_in"][weak], layers[other]["attn_in"][weak])  # as stored: no rounding when written
    others = [i for i in range(48) if i not in weak]
    assert torch.equal(merged["attn_in"][others], layers[1]["attn_in"][others])
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())


def test_gains_that_are_mostly_zero_are_replaced_too() -> None:
    """Then the median is zero, and so is a thousandth of it."""
    spec, layers = load("llama")
    layers[1]["attn_in"][:30] = 0.0
    row = make_row(1, {2: (0, 1, 2)})
    merged = merge_attention(spec, row, dict(enumerate(layers)))
    x = random_stream(spec)
    apart = run_attention(spec, 1, layers[1], x) + run_attention(spec, 2, layers[2], x)
    assert gap(run_attention(spec, 1, merged, x, 6), apart) <= EXACT
    assert torch.equal(merged["attn_in"], torch.cat((layers[2]["attn_in"][:30], layers[1]["attn_in"][30:])))


def test_a_weak_post_norm_gain_does_not_blow_up_moved_outputs() -> None:
    spec, layers = load("glm4")
    layers[1]["attn_out"][5] = 0.0
    row = make_row(1, {2: (0, 1, 2)})
    merged = merge_attention(spec, row, dict(enumerate(layers)))
    assert float(merged["attn_out"][5]) == float(layers[2]["attn_out"][5])
    moved = merged["o"][5, layers[2]["o"].shape[1] :]
    assert torch.equal(moved, layers[2]["o"][5])
    assert not merged["o"][5, : layers[1]["o"].shape[1]].any()  # the gain of zero let nothing pass
    others = [channel for channel in range(48) if channel != 5]
    assert torch.equal(merged["attn_out"][others], layers[1]["attn_out"][others])


# Layers that are not alike


def change_layer(spec: ModelSpec, index: int, **changes: Any) -> ModelSpec:
    """The spec with other rope or window in one layer, or other sizes there."""
    layer = spec.layers[index]
    own = {key: value for key, value in changes.items() if key in ("rope", "window")}
    shape = replace(layer.shape, **{key: value for key, value in changes.items() if key not in own})
    layers = (*spec.layers[:index], replace(layer, shape=shape, **own), *spec.layers[index + 1 :])
    return replace(spec, layers=layers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope": None}, ["rotates"]),
        ({"window": 9}, ["the last 9 tokens", "the last 12 tokens"]),
        ({"window": None, "attention": "full_attention"}, ["all tokens", "the last 12 tokens"]),
        ({"head_dim": 8}, ["size 8", "16"]),
        ({"query_heads": 9}, ["3 of its query heads", "2 of the other"]),
    ],
)
def test_layers_that_attend_differently_are_unlike(change: dict[str, Any], words: list[str]) -> None:
    spec, layers = load("mistral")
    assert not unlike_layers(spec, 1, 2, layers[1], layers[2])
    reason = unlike_layers(change_layer(spec, 2, **change), 1, 2, layers[1], layers[2])
    assert reason
    for word in words:
        assert word in reason, reason


def test_another_rotary_base_or_scaling_is_unlike() -> None:
    spec, layers = load("llama-llama3")
    rope = spec.layers[2].rope
    assert rope is not None
    for other in (replace(rope, theta=2.0), replace(rope, options={**rope.options, "factor": 4.0})):
        assert "rotary embeddings differ" in unlike_layers(change_layer(spec, 2, rope=other), 1, 2, *layers[1:3])


def test_more_heads_of_the_same_kind_are_alike() -> None:
    """Layers of an uneven model merge; what counts is the group, not how many there are."""
    spec, layers = load("llama", per_layer_config={"2": {"num_attention_heads": 10, "num_key_value_heads": 5}})
    row = make_row(1, {2: (0, 4)}, (1,))
    merged = merge_attention(spec, row, dict(enumerate(layers)))
    x = random_stream(spec)
    apart = [run_attention(spec, s.layer, keep_only(spec, layers[s.layer], s.kv_groups), x) for s in row.sources]
    assert gap(run_attention(spec, 1, merged, x, 3), apart[0] + apart[1]) <= EXACT


@pytest.mark.parametrize("role", ["q_bias", "o_bias", "attn_in"])
def test_a_tensor_that_only_one_has_is_unlike(role: str) -> None:
    spec, layers = load("llama-biases")
    bare = {name: tensor for name, tensor in layers[2].items() if name != role}
    assert role in unlike_layers(spec, 1, 2, layers[1], bare)
    assert role in unlike_layers(spec, 1, 2, bare, layers[1])


def test_one_absorbed_post_norm_is_unlike() -> None:
    spec, layers = load("glm4")
    absorb(spec, layers[2:])
    assert "attn_out" in unlike_layers(spec, 1, 2, layers[1], layers[2])
    assert not unlike_layers(spec, 2, 3, layers[2], layers[3])


def test_qk_norms_over_all_heads_are_unlike() -> None:
    spec, layers = load("olmo2")
    assert "all heads" in unlike_layers(spec, 1, 2, layers[1], layers[2])
    layers[2] |= {role: layers[1][role] for role in ("q_norm", "k_norm")}
    assert "all heads" in unlike_layers(spec, 1, 2, layers[1], layers[2])


@pytest.mark.parametrize("case", ["qwen3", "gemma3_text"])
def test_other_qk_norms_are_unlike_and_would_not_be_exact(case: str) -> None:
    spec, layers = load(case)
    other = alike_after(spec, layers, 1)[0]
    row, x = make_row(1, {other: (0, 1, 2)}), random_stream(spec)
    absorb(spec, layers)
    for size, alike in ((1e-7, True), (1e-4, False)):
        changed = dict(enumerate(layers))
        changed[other] = {**layers[other], "q_norm": layers[other]["q_norm"] + size * torch.arange(16) / 16}
        reason = unlike_layers(spec, 1, other, layers[1], changed[other])
        assert (not reason) == alike
        if alike:
            merged = run_attention(spec, 1, merge_attention(spec, row, changed), x, 6)
            apart = run_attention(spec, 1, layers[1], x) + run_attention(spec, other, changed[other], x)
            assert gap(merged, apart) < 1e-5
        else:
            assert "q_norm" in reason
            refused(lambda changed=changed: merge_attention(spec, row, changed), f"layer {other}", "layer 1", "q_norm")


@pytest.mark.parametrize("case", ["qwen3", "gemma3_text"])
def test_a_factor_that_moves_between_q_and_k_norms_is_alike_and_exact(case: str) -> None:
    """One per rotary pair (halves here), any sign; one per dimension would turn with the angle between tokens."""
    spec, layers = load(case)
    absorb(spec, layers)
    offset, other = spec.norm_offset, alike_after(spec, layers, 1)[0]
    pairs = torch.tensor([0.5, 2.0, -1.0, 3.0, 1.5, 1.0, -0.2, 0.9], dtype=torch.float64)

    def shift(factor: Tensor) -> Weights:
        query, key = ((layers[other][role] + offset) for role in ("q_norm", "k_norm"))
        return {**layers[other], "q_norm": query * factor - offset, "k_norm": key / factor - offset}

    changed = {1: layers[1], other: shift(pairs.repeat(2))}
    assert not unlike_layers(spec, 1, other, layers[1], changed[other])
    x, row = random_stream(spec), make_row(1, {other: (0, 1, 2)})
    merged = run_attention(spec, 1, merge_attention(spec, row, changed), x, 6)
    apart = run_attention(spec, 1, layers[1], x) + run_attention(spec, other, changed[other], x)
    assert gap(merged, apart) <= EXACT
    assert "q_norm" in unlike_layers(spec, 1, other, layers[1], shift(pairs.repeat_interleave(2)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [4, 8, 0])
def test_score_gains_are_the_products_that_a_score_holds(dim: int, interleaved: bool) -> None:
    """Slow twin: dimension by dimension with its rotary partner; dimensions past `dim` do not turn."""
    spec, layers = load("qwen3", head_dim=8)
    rope = spec.layers[0].rope
    assert rope is not None
    found = score_gains(spec, replace(rope, dim=dim, interleaved=interleaved) if dim else None, layers[0])
    query, key = layers[0]["q_norm"].tolist(), layers[0]["k_norm"].tolist()
    for i in range(8):
        partner = i ^ 1 if interleaved else (i + dim // 2) % max(dim, 1)
        assert float(found[0, i]) == pytest.approx(query[i] * key[i])
        assert float(found[1, i].abs()) == pytest.approx(abs(query[i] * key[partner if i < dim else i]))


def test_a_plan_across_unlike_layers_is_refused_before_any_surgery() -> None:
    spec, layers = load("gemma2")
    everything = keep_everything(spec.shape)
    guards: list[int] = []

    def read(index: int) -> Weights:
        guards.append(index)
        return {role: tensor for role, tensor in layers[index].items() if role in GUARD_ROLES}

    def plan(merged: int) -> Plan:
        row = replace(everything.layers[0], merged=(MergedGroups(merged, (0,)),))
        return replace(everything, layers=(row, everything.layers[3]))

    check_merges(spec, plan(2), read)
    assert guards == [0, 2]  # a row that takes nothing in is not read
    refused(lambda: check_merges(spec, plan(1), read), "layer 1", "layer 0", "all tokens", "'merged'")
    row = plan(1).layers[0]
    refused(lambda: merge_attention(spec, row, dict(enumerate(layers))), "layer 1", "layer 0", "'merged'")


@pytest.mark.parametrize("case", ["phi3", "glm4", "llama-biases", "qwen3"])
def test_guards_are_vectors(case: str, tmp_path: Path) -> None:
    """So that reading them for all layers costs nothing; everything else that attention has is in ATTENTION_ROLES."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, case))
    weights = read_layer(checkpoint, read_spec(checkpoint), 0)
    assert all(weights[role].dim() == 1 for role in GUARD_ROLES if role in weights)
    mlp = {"gate", "up", "down", "gate_bias", "up_bias", "down_bias", *NORM_ROLES[2:]}
    assert weights.keys() - mlp == weights.keys() & set(ATTENTION_ROLES)


# Scores and the choice


@pytest.mark.parametrize("size", [1, 4, 6])
def test_group_scores_equal_a_loop_over_tokens(size: int) -> None:
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 12, generator=random, dtype=torch.float64) + 0.2
    weight = torch.randn(7, 12, generator=random, dtype=torch.float64)
    moments = Moments.empty(12)
    moments.update(inputs)
    wanted = []
    for start in range(0, 12, size):
        total = 0.0
        for token in inputs:
            output = weight[:, start : start + size] @ token[start : start + size]
            total += float(output @ output)
        wanted.append(math.sqrt(total / 50))
    found = group_scores(moments, weight, size)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert group_scores(Moments.empty(12), weight, size) == [0.0] * (12 // size)


def choose_by_loop(
    scores: Mapping[int, Sequence[float]], kept: int, dropped: Sequence[int], count: int
) -> dict[int, list[int]]:
    """Slow twin: take the best group that is left, the kept layer's first among equals, `count` times."""
    taken: dict[int, list[int]] = {layer: [] for layer in (kept, *dropped)}
    for _ in range(count):
        best: tuple[int, int] | None = None
        for layer in (kept, *dropped):
            for group, score in enumerate(scores[layer]):
                if group not in taken[layer] and (best is None or score > scores[best[0]][best[1]]):
                    best = layer, group
        assert best is not None
        taken[best[0]].append(best[1])
    return {layer: sorted(groups) for layer, groups in taken.items()}


@pytest.mark.parametrize("count", range(1, 13))
def test_the_best_groups_of_one_pool_stay(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    scores = {layer: torch.randint(0, 6, (4,), generator=random).tolist() for layer in (2, 3, 5)}
    own, merged = choose_groups(scores, 2, (3, 5), count)
    wanted = choose_by_loop(scores, 2, (3, 5), count)
    assert list(own) == wanted[2]
    assert [(x.layer, list(x.kv_groups)) for x in merged] == [(i, wanted[i]) for i in (3, 5) if wanted[i]]
    assert len(own) + sum(len(groups.kv_groups) for groups in merged) == count


def test_the_choice_by_example() -> None:
    scores = {4: [1.0, 5.0], 5: [9.0, 0.5], 6: [0.1, 7.0]}
    assert choose_groups(scores, 4, (5, 6), 2) == ((), (MergedGroups(5, (0,)), MergedGroups(6, (1,))))
    assert choose_groups(scores, 4, (5, 6), 3) == ((1,), (MergedGroups(5, (0,)), MergedGroups(6, (1,))))
    assert choose_groups(scores, 4, (), 2) == ((0, 1), ())
    ties: dict[int, list[float]] = {0: [1.0, 1.0], 1: [1.0, 1.0]}
    assert choose_groups(ties, 0, (1,), 2) == ((0, 1), ())


@pytest.mark.parametrize("count", [0, 7])
def test_a_pool_that_is_too_small_is_an_error(count: int) -> None:
    choose: Callable[[], object] = lambda: choose_groups({0: [1.0] * 3, 1: [1.0] * 3}, 0, (1,), count)  # noqa: E731
    with pytest.raises(ValueError, match="pool of 6"):
        choose()
