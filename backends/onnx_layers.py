"""The decoder's forward pass as ONNX nodes of the standard domain: what `compress.decoder` computes, op for op.

Names in comments and docstrings: B batch, S new tokens, P tokens in the cache, T = P + S, K key/value heads, G query
heads per key/value head, D head size. Causality and windows follow the index of a key in the cache, never
`position_ids`, which only turn the rotary tables; so left padding costs nothing but the masked places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnx import TensorProto

from backends.onnx_graph import GraphBuilder
from compress.family import NORM_ROLES
from compress.rope import RopeSpec, compute_frequencies, compute_scale
from compress.spec import LayerSpec, ModelSpec
from compress.weights import Weights

# Finite, so that a row without any key (left padding) stays finite; far below any score, and nothing is added to it
# that could overflow float32.
MASKED = -1e30
GROUPED_RANK = 5  # scores [B, K, G, S, T]; plain attention has [B, heads, S, T]
MATRIX_RANK = 2
# Weights are named after their role: a qk-norm scales heads, the others the residual stream.
NORMS = (*NORM_ROLES, "q_norm", "k_norm", "final_norm")
Names = Mapping[str, str]


@dataclass(frozen=True)
class GraphFrame:
    """What all layers share: rotary tables `[B, S, 1, dim / 2]` by RopeSpec, and masks by window and rank."""

    tables: dict[RopeSpec, tuple[str, str]]
    masks: dict[tuple[int | None, int], str]


def store_layer(graph: GraphBuilder, spec: ModelSpec, prefix: str, weights: Weights) -> dict[str, str]:
    """Store one layer's weights and return role -> name; empties `weights`, so that memory shrinks as the file grows.

    Matrices are stored `[in, out]`, so that MatMul needs no Transpose; norms with the family's offset added.
    """
    names = {}
    for role in list(weights):
        tensor = weights.pop(role)
        if role in NORMS:
            tensor = tensor + spec.norm_offset
        suffix = "bias" if role.endswith("_bias") else "weight"
        name = f"{prefix}.{role.removesuffix('_bias')}.{suffix}"
        names[role] = graph.store(name, tensor.t() if tensor.dim() == MATRIX_RANK else tensor)
    return names


def emit_frame(graph: GraphBuilder, spec: ModelSpec) -> GraphFrame:
    """Append rotary tables and masks, once for each that some layer needs."""
    graph.scope = "frame"
    ropes = dict.fromkeys(layer.rope for layer in spec.layers if layer.rope is not None)
    tables = {rope: emit_tables(graph, rope) for rope in ropes}
    allowed: dict[int | None, str] = {}
    masks: dict[tuple[int | None, int], str] = {}
    for layer in spec.layers:
        if layer.window not in allowed:
            allowed[layer.window] = emit_allowed(graph, layer.window)
        key = (layer.window, score_rank(layer))
        if key not in masks:
            masks[key] = emit_mask(graph, allowed[layer.window], score_rank(layer))
    return GraphFrame(tables, masks)


def score_rank(layer: LayerSpec) -> int:
    """Return the rank of a layer's attention scores."""
    return GROUPED_RANK if layer.shape.group > 1 else GROUPED_RANK - 1


def emit_tables(graph: GraphBuilder, rope: RopeSpec, ids: str = "position_ids") -> tuple[str, str]:
    """Append cosine and sine `[B, S, 1, dim / 2]` of one rotary embedding at the positions `ids` `[B, S]`."""
    positions = graph.add("Cast", ids, to=graph.element_type)
    places = graph.add("Unsqueeze", positions, graph.integers(-2, -1))
    angles = graph.add("Mul", places, emit_frequencies(graph, rope, ids))
    scale = compute_scale(rope)
    tables = [graph.add(function, angles) for function in ("Cos", "Sin")]
    cos, sin = (emit_scaled(graph, table, scale) for table in tables)
    return cos, sin


def emit_frequencies(graph: GraphBuilder, rope: RopeSpec, ids: str) -> str:
    """Append the inverse frequencies `[dim / 2]`; longrope chooses between two sets by the largest position."""
    short = graph.numbers(compute_frequencies(rope, graph.dtype))
    if rope.long_after is None:
        return short
    last = graph.add("ReduceMax", ids, keepdims=0)
    beyond = graph.add("GreaterOrEqual", last, graph.integer(rope.long_after))
    return graph.add("Where", beyond, graph.numbers(compute_frequencies(rope, graph.dtype, long=True)), short)


def emit_allowed(graph: GraphBuilder, window: int | None) -> str:
    """Append the truth values `[B, S, T]`: key not padded, not in the future, inside the window."""
    total = graph.add("Gather", graph.add("Shape", "attention_mask"), graph.integer(1))
    length = graph.add("Gather", graph.add("Shape", "input_ids"), graph.integer(1))
    key = graph.add("Range", graph.integer(0), total, graph.integer(1))
    last = graph.add("Range", graph.add("Sub", total, length), total, graph.integer(1))
    query = graph.add("Unsqueeze", last, graph.integers(1))
    allowed = graph.add("LessOrEqual", key, query)
    if window is not None:
        oldest = graph.add("Sub", query, graph.integer(window))
        allowed = graph.add("And", allowed, graph.add("Greater", key, oldest))
    present = graph.add("Cast", "attention_mask", to=TensorProto.BOOL)
    return graph.add("And", graph.add("Unsqueeze", present, graph.integers(1)), allowed)


def emit_mask(graph: GraphBuilder, allowed: str, rank: int) -> str:
    """Append what is added to scores of that rank: 0 where a query may look, a large negative number elsewhere."""
    bias = graph.add("Where", allowed, graph.number(0.0), graph.number(MASKED))
    return graph.add("Unsqueeze", bias, graph.integers(*range(1, rank - 2)))


def emit_scaled(graph: GraphBuilder, value: str, factor: float) -> str:
    """Append a multiplication, unless it would change nothing."""
    return value if factor == 1.0 else graph.add("Mul", value, graph.number(factor))


def emit_capped(graph: GraphBuilder, value: str, factor: float, cap: float | None, output: str = "") -> str:
    """Append x = value * factor, then cap * tanh(x / cap) where there is a cap; the last node's output is `output`."""
    if cap is None:
        return graph.add("Mul", value, graph.number(factor), output=output)
    squashed = graph.add("Tanh", graph.add("Mul", value, graph.number(factor / cap)))
    return graph.add("Mul", squashed, graph.number(cap), output=output)


def emit_norm(graph: GraphBuilder, value: str, weight: str, eps: float) -> str:
    """Append value / sqrt(mean(value^2) + eps) * weight over the last axis, in the form that runtimes fuse."""
    square = graph.add("Pow", value, graph.number(2.0))
    mean = graph.add("ReduceMean", square, graph.integers(-1), keepdims=1)
    root = graph.add("Sqrt", graph.add("Add", mean, graph.number(eps)))
    return graph.add("Mul", graph.add("Div", value, root), weight)


def emit_role_norm(graph: GraphBuilder, spec: ModelSpec, names: Names, role: str, value: str) -> str:
    """Append the norm of `role` if the layer has it."""
    return emit_norm(graph, value, names[role], spec.eps) if role in names else value


def emit_linear(graph: GraphBuilder, names: Names, role: str, value: str) -> str:
    """Append the linear map of `role` with its bias if there is one."""
    product = graph.add("MatMul", value, names[role])
    bias = names.get(f"{role}_bias")
    return product if bias is None else graph.add("Add", product, bias)


def emit_heads(graph: GraphBuilder, spec: ModelSpec, names: Names, role: str, value: str, size: int) -> str:
    """Append a projection to heads `[B, S, heads, D]`, with the qk-norm of the role if there is one."""
    norm, span = f"{role}_norm", spec.family.attention.qk_norm
    flat = emit_linear(graph, names, role, value)
    if span == "all":
        flat = emit_role_norm(graph, spec, names, norm, flat)
    heads = graph.add("Reshape", flat, graph.integers(0, 0, -1, size))
    return emit_role_norm(graph, spec, names, norm, heads) if span == "head" else heads


def emit_rotation(graph: GraphBuilder, heads: str, rope: RopeSpec, tables: tuple[str, str], size: int) -> str:
    """Append the rotation of the first `dim` values of each head, `[B, S, heads, D]`."""
    half = rope.dim // 2
    if rope.interleaved:
        turned, *passed = graph.split(heads, [rope.dim, size - rope.dim]) if size > rope.dim else [heads]
        first, second = (emit_every_second(graph, turned, start) for start in (0, 1))
    else:
        first, second, *passed = graph.split(heads, [half, half] + [size - rope.dim] * (size > rope.dim))
    cos, sin = tables
    left = graph.add("Sub", graph.add("Mul", first, cos), graph.add("Mul", second, sin))
    right = graph.add("Add", graph.add("Mul", second, cos), graph.add("Mul", first, sin))
    rotated = [emit_interleaved(graph, left, right, rope.dim)] if rope.interleaved else [left, right]
    joined = [*rotated, *passed]
    return graph.add("Concat", *joined, axis=-1) if len(joined) > 1 else joined[0]


def emit_every_second(graph: GraphBuilder, value: str, start: int) -> str:
    """Append the values of the last axis at start, start + 2, ..."""
    vectors = (graph.integers(number) for number in (start, 2**31 - 1, -1, 2))
    return graph.add("Slice", value, *vectors)


def emit_interleaved(graph: GraphBuilder, even: str, odd: str, size: int) -> str:
    """Append the weave of two `[B, S, heads, size / 2]` into `[B, S, heads, size]`."""
    pair = [graph.add("Unsqueeze", part, graph.integers(-1)) for part in (even, odd)]
    return graph.add("Reshape", graph.add("Concat", *pair, axis=-1), graph.integers(0, 0, 0, size))


def emit_context(graph: GraphBuilder, spec: ModelSpec, index: int, names: Names, value: str, frame: GraphFrame) -> str:
    """Append attention up to the input of `o` `[B, S, heads * D]`, and the layer's present keys and values."""
    layer = spec.layers[index]
    size = layer.shape.head_dim
    inputs = emit_role_norm(graph, spec, names, "attn_in", value)
    query, key, values = (emit_heads(graph, spec, names, role, inputs, size) for role in ("q", "k", "v"))
    if layer.rope is not None:
        query, key = (emit_rotation(graph, x, layer.rope, frame.tables[layer.rope], size) for x in (query, key))
    present = [emit_present(graph, index, part, x) for part, x in (("key", key), ("value", values))]
    mixed = emit_attention(graph, spec, layer, query, present, frame.masks[layer.window, score_rank(layer)])
    return graph.add("Reshape", mixed, graph.integers(0, 0, layer.shape.query))


def emit_present(graph: GraphBuilder, index: int, part: str, heads: str) -> str:
    """Append new heads `[B, S, K, D]` to the cache and return all of them, `[B, K, T, D]`."""
    fresh = graph.add("Transpose", heads, perm=[0, 2, 1, 3])
    return graph.add("Concat", f"past_key_values.{index}.{part}", fresh, axis=2, output=f"present.{index}.{part}")


def emit_attention(
    graph: GraphBuilder, spec: ModelSpec, layer: LayerSpec, query: str, present: list[str], mask: str
) -> str:
    """Append the mix of values, `[B, S, heads, D]` or `[B, S, K, G, D]`.

    Query heads that share keys get an axis of their own, and the keys an axis of length 1 that MatMul broadcasts:
    repeated keys never exist in memory.
    """
    key, value = present
    if layer.shape.group > 1:
        sizes = graph.integers(0, 0, layer.shape.kv_heads, layer.shape.group, layer.shape.head_dim)
        query = graph.add("Transpose", graph.add("Reshape", query, sizes), perm=[0, 2, 3, 1, 4])
        key, value = (graph.add("Unsqueeze", heads, graph.integers(2)) for heads in (key, value))
        swap, back = [0, 1, 2, 4, 3], [0, 3, 1, 2, 4]
    else:
        query = graph.add("Transpose", query, perm=[0, 2, 1, 3])
        swap, back = [0, 1, 3, 2], [0, 2, 1, 3]
    scores = graph.add("MatMul", query, graph.add("Transpose", key, perm=swap))
    capped = emit_capped(graph, scores, spec.attention_scale, spec.attention_softcap)
    weights = graph.add("Softmax", graph.add("Add", capped, mask), axis=-1)
    return graph.add("Transpose", graph.add("MatMul", weights, value), perm=back)


def emit_branch_end(graph: GraphBuilder, spec: ModelSpec, names: Names, roles: tuple[str, str], value: str) -> str:
    """Append a branch's last projection, its norm and the residual multiplier; `roles` are projection and norm."""
    projected = emit_linear(graph, names, roles[0], value)
    return emit_scaled(graph, emit_role_norm(graph, spec, names, roles[1], projected), spec.residual_multiplier)


def emit_mlp(graph: GraphBuilder, spec: ModelSpec, names: Names, value: str) -> str:
    """Append the input of `down`: act(gate) * up of the normed stream."""
    inputs = emit_role_norm(graph, spec, names, "mlp_in", value)
    gate, up = (emit_linear(graph, names, role, inputs) for role in ("gate", "up"))
    return graph.add("Mul", ACTIVATIONS[spec.activation](graph, gate), up)


def emit_layer(graph: GraphBuilder, spec: ModelSpec, index: int, names: Names, value: str, frame: GraphFrame) -> str:
    """Append one decoder layer over the stream `[B, S, hidden]`."""
    graph.scope = f"layers.{index}.attention"
    context = emit_context(graph, spec, index, names, value, frame)
    value = graph.add("Add", value, emit_branch_end(graph, spec, names, ("o", "attn_out"), context))
    graph.scope = f"layers.{index}.mlp"
    activation = emit_mlp(graph, spec, names, value)
    return graph.add("Add", value, emit_branch_end(graph, spec, names, ("down", "mlp_out"), activation))


def emit_silu(graph: GraphBuilder, value: str) -> str:
    """Append x * sigmoid(x)."""
    return graph.add("Mul", value, graph.add("Sigmoid", value))


def emit_gelu(graph: GraphBuilder, value: str) -> str:
    """Append x / 2 * (1 + erf(x / sqrt(2)))."""
    bell = graph.add("Erf", graph.add("Div", value, graph.number(math.sqrt(2.0))))
    return graph.add("Mul", graph.add("Mul", value, graph.add("Add", bell, graph.number(1.0))), graph.number(0.5))


def emit_gelu_tanh(graph: GraphBuilder, value: str) -> str:
    """Append x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    cubic = graph.add("Mul", graph.add("Mul", value, graph.add("Mul", value, value)), graph.number(0.044715))
    inner = graph.add("Mul", graph.add("Add", value, cubic), graph.number(math.sqrt(2.0 / math.pi)))
    bell = graph.add("Add", graph.add("Tanh", inner), graph.number(1.0))
    return graph.add("Mul", graph.add("Mul", value, bell), graph.number(0.5))


def emit_relu(graph: GraphBuilder, value: str) -> str:
    """Append max(x, 0)."""
    return graph.add("Relu", value)


ACTIVATIONS: dict[str, Callable[[GraphBuilder, str], str]] = {
    "silu": emit_silu,
    "gelu": emit_gelu,
    "gelu_pytorch_tanh": emit_gelu_tanh,
    "relu": emit_relu,
}
