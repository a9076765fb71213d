"""The one forward pass: a decoder layer at a time, shapes per layer, prefill and cached decode.

Residual order; a norm that a layer does not have is the identity, so that pre-norm, post-norm and sandwich
layouts are all this one picture (m: the residual multiplier):

    x --+--------------------------------------------(+)--+----------------------------------------(+)-- x'
        |                                              |   |                                          |
        +-> attn_in -> q,k,v -> attend -> o -> attn_out *m +-> mlp_in -> act(gate)*up -> down -> mlp_out *m

Each branch has two halves that callers may run apart: up to the input of its last projection
(`attention_context`, `mlp_activation`), and from there on (`attention_branch`, `mlp_branch`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.rope import RopeSpec, compute_tables, rotate
from compress.spec import LayerSpec, ModelSpec

Weights = Mapping[str, Tensor]
Past = tuple[Tensor, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Frame:
    """What all layers share for one call: positions `[batch, sequence]` and rotary tables by RopeSpec."""

    positions: Tensor
    tables: dict[RopeSpec, tuple[Tensor, Tensor]]


def make_frame(spec: ModelSpec, batch: int, length: int, start: int = 0, dtype: torch.dtype = torch.float32) -> Frame:
    """Prepare positions `start .. start + length` and their rotary tables."""
    positions = torch.arange(start, start + length).expand(batch, length)
    ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
    return Frame(positions, {rope: compute_tables(rope, positions[:1], dtype) for rope in ropes})


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Scale `x` `[..., n]` to unit root mean square, times `weight + offset`."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


def apply_norm(spec: ModelSpec, weights: Weights, role: str, x: Tensor) -> Tensor:
    """Apply the norm of `role` if the layer has it."""
    return rms_norm(x, weights[role], spec.eps, spec.norm_offset) if role in weights else x


def project(weights: Weights, role: str, x: Tensor) -> Tensor:
    """Apply the linear map of `role` with its bias if there is one; `x` `[..., in]`."""
    return F.linear(x, weights[role], weights.get(f"{role}_bias"))


def project_heads(spec: ModelSpec, weights: Weights, role: str, x: Tensor, size: int) -> Tensor:
    """Project to heads `[batch, heads, sequence, size]`, with the qk-norm of the role if there is one."""
    flat = project(weights, role, x)
    norm, span = f"{role}_norm", spec.family.attention.qk_norm
    if span == "all":
        flat = apply_norm(spec, weights, norm, flat)
    heads = flat.reshape(*flat.shape[:-1], -1, size)
    if span == "head":
        heads = apply_norm(spec, weights, norm, heads)
    return heads.transpose(1, 2)


def attention_context(
    spec: ModelSpec, layer: LayerSpec, weights: Weights, x: Tensor, frame: Frame, past: Past | None = None
) -> tuple[Tensor, Past]:
    """Return the input of `o` `[batch, sequence, heads * head_dim]` and the keys and values so far."""
    inputs = apply_norm(spec, weights, "attn_in", x)
    size = layer.shape.head_dim
    query, key, value = (project_heads(spec, weights, role, inputs, size) for role in ("q", "k", "v"))
    if layer.rope is not None:
        cos, sin = frame.tables[layer.rope]
        query = rotate(query, cos, sin, layer.rope.interleaved)
        key = rotate(key, cos, sin, layer.rope.interleaved)
    if past is not None:
        key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
    mixed = attend(spec, layer, query, key, value)
    return mixed.transpose(1, 2).flatten(2), (key, value)


def attend(spec: ModelSpec, layer: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Mix values by causal softmax scores, `[batch, heads, sequence, head_dim]`; keys may be longer than queries."""
    length, total = query.shape[2], key.shape[2]
    narrow = layer.window is not None and layer.window < total
    if spec.attention_softcap is not None:
        return attend_capped(spec, layer, query, key, value)
    mask = None if length in (1, total) and not narrow else causal_mask(length, total, layer.window)
    causal = mask is None and length > 1
    grouped = layer.shape.group > 1
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=spec.attention_scale, enable_gqa=grouped
    )


def attend_capped(spec: ModelSpec, layer: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with soft-capped scores: cap * tanh(score / cap)."""
    cap = spec.attention_softcap
    assert cap is not None
    key, value = (heads.repeat_interleave(layer.shape.group, 1) for heads in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * (spec.attention_scale / cap)) * cap
    mask = causal_mask(query.shape[2], key.shape[2], layer.window)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


def causal_mask(length: int, total: int, window: int | None) -> Tensor:
    """Return `[length, total]`, True where a query may look; queries are the last `length` positions."""
    query = torch.arange(total - length, total)[:, None]
    key = torch.arange(total)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def attention_branch(spec: ModelSpec, weights: Weights, context: Tensor) -> Tensor:
    """Return what attention adds to the residual stream, `[..., hidden]`."""
    return apply_norm(spec, weights, "attn_out", project(weights, "o", context)) * spec.residual_multiplier


def mlp_activation(spec: ModelSpec, weights: Weights, x: Tensor) -> Tensor:
    """Return the input of `down`, `[..., ffn]`: act(gate) * up of the normed stream."""
    inputs = apply_norm(spec, weights, "mlp_in", x)
    return ACTIVATIONS[spec.activation](project(weights, "gate", inputs)) * project(weights, "up", inputs)


def mlp_branch(spec: ModelSpec, weights: Weights, activation: Tensor) -> Tensor:
    """Return what the MLP adds to the residual stream, `[..., hidden]`."""
    return apply_norm(spec, weights, "mlp_out", project(weights, "down", activation)) * spec.residual_multiplier


def run_layer(
    spec: ModelSpec, layer: LayerSpec, weights: Weights, x: Tensor, frame: Frame, past: Past | None = None
) -> tuple[Tensor, Past]:
    """Run one decoder layer over the stream `x` `[batch, sequence, hidden]`."""
    context, present = attention_context(spec, layer, weights, x, frame, past)
    x = x + attention_branch(spec, weights, context)
    return x + mlp_branch(spec, weights, mlp_activation(spec, weights, x)), present


def compute_logits(spec: ModelSpec, weights: Weights, x: Tensor) -> Tensor:
    """Return logits `[..., vocab]` of the last layer's stream."""
    normed = rms_norm(x, weights["final_norm"], spec.eps, spec.norm_offset)
    logits = F.linear(normed, weights["head"]) / spec.logit_divisor
    cap = spec.logit_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap
