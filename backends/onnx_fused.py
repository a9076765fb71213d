"""The decoder's forward pass with the fused operators of ONNX Runtime (com.microsoft): fewer and larger operations.

GroupQueryAttention turns the heads, appends to the cache (in place where past and present are one buffer) and attends
without storing scores; SkipSimplifiedLayerNormalization adds a branch to the stream and norms the sum in one pass;
query, key and value are one product. A product is a MatMul, a MatMulNBits where the weights are quantised, or a
DynamicQuantizeMatMul where its inputs have 8 bits as well. Names in comments: B batch, S new tokens, T tokens in all,
K key/value heads, D head size.

The stream is carried as a pair (x, what a branch adds to it), so that the addition falls into the next norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto
from torch import Tensor

from backends.onnx_graph import GraphBuilder
from backends.onnx_layers import ACTIVATIONS, NORMS, emit_rotation, emit_scaled, emit_tables
from compress.quantize.blocks import Quantised
from compress.quantize.w8a8 import QuantisedLinear
from compress.rope import RopeSpec, compute_frequencies, compute_scale
from compress.spec import LayerSpec, ModelSpec

MICROSOFT = "com.microsoft"
# MatMulNBits computes in int8 on the CPU (activations quantised block by block): the fast path of every x86 and ARM.
ACCURACY_LEVEL = 4
HEAD_STEP = 16  # GroupQueryAttention turns heads and parts of heads of a multiple of this
FULL_SPAN = -1  # GroupQueryAttention's local_window_size of full attention
BYTE_BITS = 8
Matrix = Tensor | Quantised | QuantisedLinear
Weights = dict[str, Matrix]
Names = Mapping[str, str]
QKV = ("q", "k", "v")  # read the same inputs and are packed into one product, which the attention takes as it is


@dataclass(frozen=True)
class Stored:
    """A product's weight in the graph: its initializers, its sizes, and its bits (0: float).

    `block`: inputs that share a scale; 0 where a whole row of 8-bit weights does, and inputs have 8 bits too.
    """

    names: tuple[str, ...]
    inputs: int
    outputs: int
    bits: int = 0
    block: int = 0
    bias: str = ""


@dataclass(frozen=True)
class FusedFrame:
    """What all layers share: the index of each row's last token, T, and rotary tables by RopeSpec.

    A table is (cosines, sines `[positions, dim / 2]`, positions `[B, S]` or nothing where they simply count up); where
    heads are turned outside the operator it is (cosines, sines `[B, S, 1, dim / 2]`).
    """

    last: str
    total: str
    tables: Mapping[RopeSpec, tuple[str, str, str]]
    outside: Mapping[RopeSpec, tuple[str, str]]


@dataclass(frozen=True)
class Stream:
    """The residual stream x and what is still to be added to it (may be empty)."""

    value: str
    added: str = ""


# Weights


def store_product(graph: GraphBuilder, name: str, parts: Sequence[Matrix], biases: Sequence[Tensor | None]) -> Stored:
    """Store weights `[out, in]` that read the same inputs as one product, with their biases if any has one."""
    bias = store_bias(graph, name, parts, biases)
    if all(isinstance(part, Quantised) for part in parts):
        return store_quantised(graph, name, [part for part in parts if isinstance(part, Quantised)], bias)
    if all(isinstance(part, QuantisedLinear) for part in parts):
        return store_linears(graph, name, [part for part in parts if isinstance(part, QuantisedLinear)], bias)
    joined = torch.cat([part for part in parts if isinstance(part, Tensor)])
    outputs, inputs = joined.shape
    return Stored((graph.store(f"{name}.weight", joined.t()),), inputs, outputs, bias=bias)


def store_bias(graph: GraphBuilder, name: str, parts: Sequence[Matrix], biases: Sequence[Tensor | None]) -> str:
    """Store the joined biases, zeros for a part without one; nothing where none has one."""
    if all(bias is None for bias in biases):
        return ""
    rows = [count_rows(part) for part in parts]
    filled = [torch.zeros(n) if bias is None else bias for n, bias in zip(rows, biases, strict=True)]
    return graph.store(f"{name}.bias", torch.cat([bias.to(torch.float32) for bias in filled]))


def count_rows(matrix: Matrix) -> int:
    """Return the outputs of a weight."""
    return len(matrix) if isinstance(matrix, Tensor) else len(matrix.codes)


def store_quantised(graph: GraphBuilder, name: str, parts: Sequence[Quantised], bias: str) -> Stored:
    """Store quantised weights in the layout of MatMulNBits."""
    packed = [part.pack() for part in parts]
    names = [
        graph.store_array(f"{name}.codes", torch.cat([codes for codes, _ in packed]), TensorProto.UINT8),
        graph.store(f"{name}.scales", torch.cat([part.scales for part in parts])),
    ]
    zeros = [zero for _, zero in packed if zero is not None]
    if zeros:
        names.append(graph.store_array(f"{name}.zeros", torch.cat(zeros), TensorProto.UINT8))
    first = parts[0]
    outputs = sum(len(part.codes) for part in parts)
    return Stored(tuple(names), first.inputs, outputs, first.bits, first.block, bias)


def store_linears(graph: GraphBuilder, name: str, parts: Sequence[QuantisedLinear], bias: str) -> Stored:
    """Store 8-bit weights in the layout of DynamicQuantizeMatMul: int8 codes `[in, out]`, scales `[out]`.

    int8, not uint8 around 128, which is multiplied half as fast (measured with VNNI). On x86 without VNNI the sums of
    uint8 and int8 saturate at 16 bits unless the session turns such weights into uint8 (`session.x64quantprecision`,
    microsoft/onnxruntime, pull request 12088).
    """
    rows = [len(part.codes) for part in parts]
    codes = torch.empty(parts[0].codes.shape[1], sum(rows), dtype=torch.int8)
    for part, span in zip(parts, torch.split(codes, rows, 1), strict=True):
        span.copy_(part.codes.T)
    names = (
        graph.store_array(f"{name}.codes", codes, TensorProto.INT8),
        graph.store(f"{name}.scales", torch.cat([part.weight_scale for part in parts])),
    )
    return Stored(names, len(codes), sum(rows), BYTE_BITS, bias=bias)


def emit_product(graph: GraphBuilder, stored: Stored, value: str) -> str:
    """Append a product with its bias."""
    if not stored.bits:
        product = graph.add("MatMul", value, stored.names[0])
        return graph.add("Add", product, stored.bias) if stored.bias else product
    if not stored.block:
        bias = ["", stored.bias] if stored.bias else []  # without zero points
        return graph.add("DynamicQuantizeMatMul", value, *stored.names, *bias, domain=MICROSOFT)
    zeros = stored.names[2] if len(stored.names) > 2 else ""  # noqa: PLR2004 (codes, scales, zeros)
    inputs = [value, *stored.names[:2], zeros, "", stored.bias]
    while not inputs[-1]:
        inputs.pop()
    return graph.add(
        "MatMulNBits", *inputs, domain=MICROSOFT, K=stored.inputs, N=stored.outputs, bits=stored.bits,
        block_size=stored.block, accuracy_level=ACCURACY_LEVEL,
    )  # fmt: skip


@dataclass(frozen=True)
class FusedLayer:
    """One layer's stored weights: products by name, norms by role."""

    products: Mapping[str, Stored]
    norms: Names


def store_fused(graph: GraphBuilder, spec: ModelSpec, prefix: str, weights: Weights) -> FusedLayer:
    """Store one layer's weights; empties `weights`, so that memory shrinks as the file grows."""
    norms = {}
    for role in [role for role in weights if role in NORMS]:
        tensor = weights.pop(role)
        assert isinstance(tensor, Tensor)
        norms[role] = graph.store(f"{prefix}.{role}.weight", tensor + spec.norm_offset)
    products = {}
    for name, roles in (("qkv", QKV), *((role, (role,)) for role in ("o", "gate", "up", "down"))):
        parts = [weights.pop(role) for role in roles]
        biases = [weights.pop(f"{role}_bias", None) for role in roles]
        floats = [bias if isinstance(bias, Tensor) else None for bias in biases]
        products[name] = store_product(graph, f"{prefix}.{name}", parts, floats)
    return FusedLayer(products, norms)


# What all layers share


def emit_fused_frame(graph: GraphBuilder, spec: ModelSpec) -> FusedFrame:
    """Append lengths from the attention mask, and store the rotary tables that some layer needs."""
    graph.scope = "frame"
    counted = graph.add("ReduceSum", "attention_mask", graph.integers(1), keepdims=0)
    last = graph.add("Cast", graph.add("Sub", counted, graph.integer(1)), to=TensorProto.INT32)
    length = graph.add("Gather", graph.add("Shape", "attention_mask"), graph.integer(1))
    total = graph.add("Cast", length, to=TensorProto.INT32)
    tables: dict[RopeSpec, tuple[str, str, str]] = {}
    outside: dict[RopeSpec, tuple[str, str]] = {}
    for layer in spec.layers:
        rope = layer.rope
        if rope is None or rope in tables or rope in outside:
            continue
        if turns_inside(layer):
            tables[rope] = store_tables(graph, spec, rope, len(tables), length)
        else:
            outside[rope] = emit_tables(graph, rope, emit_positions(graph, length))
    return FusedFrame(last, total, tables, outside)


def turns_inside(layer: LayerSpec) -> bool:
    """Tell whether GroupQueryAttention itself can turn the heads: it takes whole vectors only."""
    rope = layer.rope
    return rope is not None and layer.shape.head_dim % HEAD_STEP == 0 and rope.dim % HEAD_STEP == 0


def store_tables(graph: GraphBuilder, spec: ModelSpec, rope: RopeSpec, place: int, total: str) -> tuple[str, str, str]:
    """Store cosines and sines of all positions; longrope has both of its tables on top of each other."""
    sets = [False] if rope.long_after is None else [False, True]
    places = torch.arange(spec.max_positions, dtype=torch.float32)[:, None]
    angles = torch.cat([places * compute_frequencies(rope, torch.float32, long) for long in sets])
    scale = compute_scale(rope)
    names = [
        graph.store(f"rope.{place}.{name}", values * scale)
        for name, values in (("cos", angles.cos()), ("sin", angles.sin()))
    ]
    if rope.long_after is None:
        return names[0], names[1], ""
    # Positions point into the second table once more tokens are there than the first is meant for.
    beyond = graph.add("Cast", graph.add("Greater", total, graph.integer(rope.long_after)), to=TensorProto.INT64)
    moved = graph.add("Mul", beyond, graph.integer(spec.max_positions))
    return names[0], names[1], graph.add("Add", emit_positions(graph, total), moved)


def emit_positions(graph: GraphBuilder, total: str) -> str:
    """Append the positions `[B, S]` of the new tokens."""
    length = graph.add("Gather", graph.add("Shape", "input_ids"), graph.integer(1))
    places = graph.add("Range", graph.add("Sub", total, length), total, graph.integer(1))
    return graph.add("Expand", graph.add("Unsqueeze", places, graph.integers(0)), graph.add("Shape", "input_ids"))


# Layers


def emit_plain_norm(graph: GraphBuilder, value: str, weight: str, eps: float) -> str:
    """Append an RMSNorm over the last axis."""
    return graph.add("SimplifiedLayerNormalization", value, weight, epsilon=eps, axis=-1, stash_type=1)


def emit_stream_norm(graph: GraphBuilder, spec: ModelSpec, stream: Stream, weight: str) -> tuple[str, Stream]:
    """Append what a module reads and return it with the stream; `weight` is empty where no norm stands before it."""
    if not weight:
        value = graph.add("Add", stream.value, stream.added) if stream.added else stream.value
        return value, Stream(value)
    if not stream.added:
        return emit_plain_norm(graph, stream.value, weight, spec.eps), stream
    normed, total = graph.name("normed"), graph.name("stream")
    graph.add_node(
        "SkipSimplifiedLayerNormalization", (stream.value, stream.added, weight), [normed, "", "", total],
        {"domain": MICROSOFT, "epsilon": spec.eps},
    )  # fmt: skip
    return normed, Stream(total)


def emit_fused_attention(
    graph: GraphBuilder, spec: ModelSpec, index: int, stored: FusedLayer, value: str, frame: FusedFrame
) -> str:
    """Append attention up to the input of `o` `[B, S, heads * D]`, and the layer's present keys and values."""
    layer = spec.layers[index]
    shape = layer.shape
    packed = emit_product(graph, stored.products["qkv"], value)
    heads = emit_heads(graph, spec, layer, stored, packed, frame)
    inside = turns_inside(layer)
    tables = frame.tables[layer.rope] if inside and layer.rope is not None else ("", "", "")
    past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
    inputs = [*heads, *past, frame.last, frame.total, *tables]
    while not inputs[-1]:
        inputs.pop()
    output = graph.name("attended")
    graph.add_node(
        "GroupQueryAttention", inputs, [output, *(f"present.{index}.{part}" for part in ("key", "value"))],
        {
            "domain": MICROSOFT, "num_heads": shape.query_heads, "kv_num_heads": shape.kv_heads,
            "scale": spec.attention_scale, "softcap": spec.attention_softcap or 0.0,
            "local_window_size": layer.window or FULL_SPAN, "do_rotary": int(inside),
            "rotary_interleaved": int(inside and layer.rope is not None and layer.rope.interleaved),
        },
    )  # fmt: skip
    return output


def emit_heads(
    graph: GraphBuilder, spec: ModelSpec, layer: LayerSpec, stored: FusedLayer, packed: str, frame: FusedFrame
) -> list[str]:
    """Return query, key and value for the attention: packed in the first, or apart where something is done to them."""
    outside = layer.rope is not None and not turns_inside(layer)
    if "q_norm" not in stored.norms and not outside:
        return [packed, "", ""]
    shape = layer.shape
    query, key, value = graph.split(packed, [shape.query, shape.kv, shape.kv])
    turned = []
    for role, flat, rows in (("q_norm", query, shape.query), ("k_norm", key, shape.kv)):
        heads = emit_normed_heads(graph, spec, stored.norms.get(role, ""), flat, shape.head_dim)
        if outside and layer.rope is not None:
            heads = emit_rotation(graph, heads, layer.rope, frame.outside[layer.rope], shape.head_dim)
        turned.append(graph.add("Reshape", heads, graph.integers(0, 0, rows)))
    return [*turned, value]


def emit_normed_heads(graph: GraphBuilder, spec: ModelSpec, weight: str, flat: str, size: int) -> str:
    """Append heads `[B, S, heads, D]`, with the qk-norm if there is one: over all heads together, or over each."""
    whole = weight and spec.family.attention.qk_norm == "all"
    flat = emit_plain_norm(graph, flat, weight, spec.eps) if whole else flat
    heads = graph.add("Reshape", flat, graph.integers(0, 0, -1, size))
    return emit_plain_norm(graph, heads, weight, spec.eps) if weight and not whole else heads


def emit_fused_silu(graph: GraphBuilder, value: str) -> str:
    """Append x * sigmoid(x)."""
    return graph.add("QuickGelu", value, domain=MICROSOFT, alpha=1.0)


FUSED_ACTIVATIONS: dict[str, Callable[[GraphBuilder, str], str]] = {**ACTIVATIONS, "silu": emit_fused_silu}


def emit_branch(graph: GraphBuilder, spec: ModelSpec, product: Stored, norm: str, value: str) -> str:
    """Append a branch's last projection, its norm and the residual multiplier."""
    projected = emit_product(graph, product, value)
    normed = emit_plain_norm(graph, projected, norm, spec.eps) if norm else projected
    return emit_scaled(graph, normed, spec.residual_multiplier)


def emit_fused_layer(
    graph: GraphBuilder, spec: ModelSpec, index: int, stored: FusedLayer, stream: Stream, frame: FusedFrame
) -> Stream:
    """Append one decoder layer; return the stream with what its MLP adds still apart."""
    norms, products = stored.norms, stored.products
    graph.scope = f"layers.{index}.attention"
    value, stream = emit_stream_norm(graph, spec, stream, norms.get("attn_in", ""))
    context = emit_fused_attention(graph, spec, index, stored, value, frame)
    stream = Stream(stream.value, emit_branch(graph, spec, products["o"], norms.get("attn_out", ""), context))
    graph.scope = f"layers.{index}.mlp"
    value, stream = emit_stream_norm(graph, spec, stream, norms.get("mlp_in", ""))
    # Apart, as packed ones would have to be split again: a copy of all of them (measured: 1 to 8 % slower).
    gate, up = (emit_product(graph, products[name], value) for name in ("gate", "up"))
    active = graph.add("Mul", FUSED_ACTIVATIONS[spec.activation](graph, gate), up)
    return Stream(stream.value, emit_branch(graph, spec, products["down"], norms.get("mlp_out", ""), active))
