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


HALVES = (torch.float16, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Scale `x` `[..., n]` to unit root mean square, times `weight + offset`; 16-bit values are squared in float32."""
    wide = x.float() if x.dtype in HALVES else x  # a square overflows float16 from 256 on
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * (weight + offset)


def rotate_heads(heads: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec) -> Tensor:
    """Rotate the first values of each head as `rope` pairs them; `heads` `[batch, heads, sequence, head_dim]`."""
    return rotate(heads, cos, sin, rope.interleaved)


def mix_values(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Mix values by causal softmax scores, `[batch, heads, sequence, head_dim]`; keys may be longer than queries."""
    length, total = query.shape[2], key.shape[2]
    narrow = window is not None and window < total
    mask = None if length in (1, total) and not narrow else causal_mask(length, total, window, query.device)
    causal = mask is None and length > 1
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def causal_mask(length: int, total: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Return `[length, total]`, True where a query may look; queries are the last `length` positions."""
    query = torch.arange(total - length, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


@dataclass(frozen=True)
class Kernels:
    """The operations that a device may have fused kernels for; the defaults are plain torch and define the result."""

    norm: Callable[[Tensor, Tensor, float, float], Tensor] = rms_norm
    rotate: Callable[[Tensor, Tensor, Tensor, RopeSpec], Tensor] = rotate_heads
    mix: Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor] = mix_values


PLAIN = Kernels()


@dataclass(frozen=True)
class Frame:
    """What all layers share for one call: positions `[batch, sequence]`, rotary tables by RopeSpec, the kernels."""

    positions: Tensor
    tables: dict[RopeSpec, tuple[Tensor, Tensor]]
    kernels: Kernels = PLAIN


def make_frame(spec: ModelSpec, batch: int, length: int, start: int = 0, dtype: torch.dtype = torch.float32) -> Frame:
    """Prepare positions `start .. start + length` and their rotary tables."""
    positions = torch.arange(start, start + length).expand(batch, length)
    ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
    return Frame(positions, {rope: compute_tables(rope, positions[:1], dtype) for rope in ropes})


def apply_norm(spec: ModelSpec, weights: Weights, role: str, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
    """Apply the norm of `role` if the layer has it."""
    return kernels.norm(x, weights[role], spec.eps, spec.norm_offset) if role in weights else x


def project(weights: Weights, role: str, x: Tensor) -> Tensor:
    """Apply the linear map of `role` with its bias if there is one; `x` `[..., in]`."""
    return F.linear(x, weights[role], weights.get(f"{role}_bias"))


def project_heads(
    spec: ModelSpec, weights: Weights, role: str, x: Tensor, size: int, kernels: Kernels = PLAIN
) -> Tensor:
    """Project to heads `[batch, heads, sequence, size]`, with the qk-norm of the role if there is one."""
    flat = project(weights, role, x)
    norm, span = f"{role}_norm", spec.family.attention.qk_norm
    if span == "all":
        flat = apply_norm(spec, weights, norm, flat, kernels)
    heads = flat.reshape(*flat.shape[:-1], -1, size)
    if span == "head":
        heads = apply_norm(spec, weights, norm, heads, kernels)
    return heads.transpose(1, 2)


def attention_context(
    spec: ModelSpec, layer: LayerSpec, weights: Weights, x: Tensor, frame: Frame, past: Past | None = None
) -> tuple[Tensor, Past]:
    """Return the input of `o` `[batch, sequence, heads * head_dim]` and the keys and values so far."""
    kernels, size = frame.kernels, layer.shape.head_dim
    inputs = apply_norm(spec, weights, "attn_in", x, kernels)
    query, key, value = (project_heads(spec, weights, role, inputs, size, kernels) for role in ("q", "k", "v"))
    if layer.rope is not None:
        cos, sin = frame.tables[layer.rope]
        query, key = (kernels.rotate(heads, cos, sin, layer.rope) for heads in (query, key))
    if past is not None:
        key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
    mixed = attend(spec, layer, query, key, value, kernels)
    return mixed.transpose(1, 2).flatten(2), (key, value)


def attend(
    spec: ModelSpec, layer: LayerSpec, query: Tensor, key: Tensor, value: Tensor, kernels: Kernels = PLAIN
) -> Tensor:
    """Mix values by causal scores, soft-capped or not, `[batch, heads, sequence, head_dim]`."""
    if spec.attention_softcap is not None:  # no fused kernel has it
        return attend_capped(spec, layer, query, key, value)
    return kernels.mix(query, key, value, spec.attention_scale, layer.window)


def attend_capped(spec: ModelSpec, layer: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with soft-capped scores: cap * tanh(score / cap)."""
    cap = spec.attention_softcap
    assert cap is not None
    key, value = (heads.repeat_interleave(layer.shape.group, 1) for heads in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * (spec.attention_scale / cap)) * cap
    mask = causal_mask(query.shape[2], key.shape[2], layer.window, query.device)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


def attention_branch(spec: ModelSpec, weights: Weights, context: Tensor, kernels: Kernels = PLAIN) -> Tensor:
    """Return what attention adds to the residual stream, `[..., hidden]`."""
    return apply_norm(spec, weights, "attn_out", project(weights, "o", context), kernels) * spec.residual_multiplier


def mlp_activation(spec: ModelSpec, weights: Weights, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
    """Return the input of `down`, `[..., ffn]`: act(gate) * up of the normed stream."""
    inputs = apply_norm(spec, weights, "mlp_in", x, kernels)
    return ACTIVATIONS[spec.activation](project(weights, "gate", inputs)) * project(weights, "up", inputs)


def mlp_branch(spec: ModelSpec, weights: Weights, activation: Tensor, kernels: Kernels = PLAIN) -> Tensor:
    """Return what the MLP adds to the residual stream, `[..., hidden]`."""
    raw = project(weights, "down", activation)
    return apply_norm(spec, weights, "mlp_out", raw, kernels) * spec.residual_multiplier


def run_layer(
    spec: ModelSpec, layer: LayerSpec, weights: Weights, x: Tensor, frame: Frame, past: Past | None = None
) -> tuple[Tensor, Past]:
    """Run one decoder layer over the stream `x` `[batch, sequence, hidden]`."""
    kernels = frame.kernels
    context, present = attention_context(spec, layer, weights, x, frame, past)
    x = x + attention_branch(spec, weights, context, kernels)
    return x + mlp_branch(spec, weights, mlp_activation(spec, weights, x, kernels), kernels), present


def compute_logits(spec: ModelSpec, weights: Weights, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
    """Return logits `[..., vocab]` of the last layer's stream."""
    normed = kernels.norm(x, weights["final_norm"], spec.eps, spec.norm_offset)
    logits = F.linear(normed, weights["head"]) / spec.logit_divisor
    cap = spec.logit_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap
