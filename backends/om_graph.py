"""One step of a decoder as ONNX nodes that Ascend's ATC converts: primitive operators, fixed sizes, a fixed cache.

What differs from `backends.onnx_layers`, whose functions do the rest, and why:

- The cache is one tensor `[1, C, H, D]`, C tokens and H the keys and then the values of all layers side by side (the
  pattern that ran on a 310B1, ascend.md 2.7). Rows of a token lie together, so that a step's new rows, the second
  output `[1, S, H, D]`, go into it by one copy of contiguous bytes; a layer of any number of heads takes its own range
  of H, and the head size D is one number per model here, so uneven layers need no other layout.
- Nothing is computed from shapes, no tensor has five axes, and no axis is empty.
- Causality and windows follow from positions by arithmetic in float32 (no booleans, no integers): a cached token lies
  in the row of its position.
- In a float16 graph the residual stream, the norms and the softmax are float32 (`wide`), everything that meets a large
  matrix is float16. The stream costs nothing that way: what the norms need wide need not be widened again.
- Neighbouring pairs of a rotary embedding are moved apart in the rows of q and k when weights are stored: products of
  queries and keys do not change, and the graph needs no strided slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from onnx import TensorProto

from backends.onnx_graph import GraphBuilder
from backends.onnx_layers import ACTIVATIONS, Names, emit_capped, emit_linear, emit_rotation, emit_scaled
from compress.rope import RopeSpec, compute_frequencies, compute_scale
from compress.spec import LayerSpec, ModelSpec
from compress.weights import Weights

IDS, MASK, POSITIONS, ROPE_IDS, PAST = (
    "input_ids", "attention_mask", "position_ids", "rope_ids", "past_key_values",
)  # fmt: skip
LOGITS, FRESH = "logits", "new_key_values"
# Added to float32 scores; float16 holds it and its sum with any score down to -35000, so that nothing becomes infinite
# should a compiler choose float16 after all.
MASKED = 30000.0
MOST_JOINED = 32  # CANN's concatenation takes at most 63 tensors
LAST = 2**31 - 1
SAFE_IN_HALF = ("silu", "relu")  # the others cube or subtract
HALF_TYPES = {torch.float16: TensorProto.FLOAT16}


@dataclass
class OmGraph(GraphBuilder):
    """A graph of `dtype` float16 or float32 that knows which nodes of a float16 graph compute in float32."""

    wide_nodes: list[tuple[str, str]] = field(default_factory=list)  # name, operator
    _wide: bool = False

    @property
    def element_type(self) -> int:
        """ONNX's code of the float type."""
        return HALF_TYPES.get(self.dtype) or super().element_type

    @contextmanager
    def wide(self) -> Iterator[None]:
        """Add nodes, constants and tensors of float32 inside the block."""
        before = self.dtype, self._wide
        self._wide = self._wide or self.dtype != torch.float32
        self.dtype = torch.float32
        try:
            yield
        finally:
            self.dtype, self._wide = before

    def widen(self, value: str) -> str:
        """Append a cast from the graph's float type to float32, if that is another."""
        return value if self.dtype == torch.float32 else self.add("Cast", value, to=TensorProto.FLOAT)

    def narrow(self, value: str) -> str:
        """Append a cast from float32 to the graph's float type, if that is another."""
        return value if self.dtype == torch.float32 else self.add("Cast", value, to=self.element_type)

    def add_node(
        self, operator: str, inputs: Sequence[str], outputs: list[str], attributes: dict[str, Any]
    ) -> list[str]:
        """Append a node named after its first output and return its outputs."""
        if self._wide:
            self.wide_nodes.append((outputs[0], operator))
        return super().add_node(operator, inputs, outputs, attributes)

    def _constant(self, kind: str, element_type: int, values: tuple[float, ...], shape: list[int]) -> str:
        return super()._constant(f"{kind}.{element_type}", element_type, values, shape)


@dataclass(frozen=True)
class StepForm:
    """Sizes of one graph: tokens in the cache, new tokens (None: a named axis), type of ids, and which logits."""

    cache: int
    rows: int | None
    ids: int = TensorProto.INT64
    every: bool = False

    @property
    def new(self) -> int | str:
        """The axis of new tokens."""
        return self.rows or "new_tokens"

    @property
    def total(self) -> int | str:
        """The axis of cached and new tokens."""
        return self.cache + self.rows if self.rows else "cached_and_new_tokens"


@dataclass(frozen=True)
class RopeTable:
    """Names of a rotary embedding's cosines and sines `[positions, dim / 2]`; `chosen`: rows follow rope_ids."""

    cos: str
    sin: str
    chosen: bool


@dataclass(frozen=True)
class StoredModel:
    """Names of all stored tensors: ends, layers by role, rotary tables, and the position of each row of the cache."""

    embed: str
    head: str
    final_norm: str
    layers: tuple[Names, ...]
    ropes: dict[RopeSpec, RopeTable]
    places: str


@dataclass(frozen=True)
class StepFrame:
    """What all layers share: C, rotary tables `[1, S, 1, dim / 2]`, masks `[1, 1, S * G, C + S]` by window and G."""

    cache: int
    tables: dict[RopeSpec, tuple[str, str]]
    masks: dict[tuple[int | None, int], str]


# What is stored


def count_rows(spec: ModelSpec) -> int:
    """Return H, the key and value heads of all layers."""
    return sum(2 * layer.shape.kv_heads for layer in spec.layers)


def needs_rope_ids(spec: ModelSpec, cache: int) -> bool:
    """Tell whether a cache of that many tokens passes the context at which longrope changes its frequencies."""
    return any(layer.rope is not None and crosses_context(layer.rope, cache) for layer in spec.layers)


def crosses_context(rope: RopeSpec, cache: int) -> bool:
    """Tell whether a rotary embedding has two sets of frequencies and the cache needs both."""
    return rope.long_after is not None and cache > rope.long_after


def store_tables(graph: OmGraph, spec: ModelSpec, cache: int) -> dict[RopeSpec, RopeTable]:
    """Store cosines and sines of all positions `[C, dim / 2]`, once for each rotary embedding.

    Tables, because a device's cosine of a large float16 angle would be noise. Angles are float32 as in
    `compress.rope`, only the values are rounded to the graph's type: by 2^-12, as all it multiplies. Where longrope
    changes its frequencies inside the cache, the rows of the second set follow those of the first.
    """
    tables = {}
    for number, rope in enumerate(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope is not None)):
        chosen = crosses_context(rope, cache)
        angles = torch.cat([list_angles(rope, cache, long) for long in ((False, True) if chosen else (False,))])
        scale = compute_scale(rope)
        names = [
            graph.store(f"rope.{number}.{name}", function(angles) * scale)
            for name, function in (("cos", torch.cos), ("sin", torch.sin))
        ]
        tables[rope] = RopeTable(names[0], names[1], chosen)
    return tables


def list_angles(rope: RopeSpec, count: int, long: bool) -> torch.Tensor:
    """Return the angles `[count, dim / 2]` of positions 0 .. count - 1 in float32."""
    return torch.arange(count, dtype=torch.float32)[:, None] * compute_frequencies(rope, torch.float32, long)


def part_pairs(layer: LayerSpec, weights: Weights) -> None:
    """Reorder the rows of queries and keys so that a rotation of neighbours becomes one of halves; else do nothing."""
    rope, size = layer.rope, layer.shape.head_dim
    if rope is None or not rope.interleaved:
        return
    order = torch.cat((torch.arange(0, rope.dim, 2), torch.arange(1, rope.dim, 2), torch.arange(rope.dim, size)))
    for role in ("q", "k", "q_bias", "k_bias", "q_norm", "k_norm"):
        if role in weights:
            rows = weights[role]
            weights[role] = rows.reshape(-1, size, *rows.shape[1:])[:, order].reshape(rows.shape)


# The graph around the layers


def emit_step(graph: OmGraph, spec: ModelSpec, stored: StoredModel, form: StepForm) -> None:
    """Append the whole graph: interface, embedding, layers, logits, and the new rows of the cache.

    Inputs: input_ids, position_ids (and rope_ids where longrope changes inside the cache) `[1, S]`, attention_mask
    `[1, C + S]`, past_key_values `[1, C, H, D]`. Outputs: logits float32 of the last of the S tokens `[1, 1, vocab]`
    (or of all, `[1, S, vocab]`), and new_key_values `[1, S, H, D]`.
    """
    declare_step(graph, spec, form)
    frame = emit_step_frame(graph, spec, stored, form)
    graph.scope = "embed"
    rows = graph.widen(graph.add("Gather", stored.embed, IDS))
    with graph.wide():
        stream = emit_scaled(graph, rows, spec.embedding_multiplier)
    start, fresh = 0, []
    for index, layer in enumerate(spec.layers):
        place = LayerPlace(index, layer, stored.layers[index], start)
        stream, own = emit_om_layer(graph, spec, place, stream, frame)
        start += 2 * layer.shape.kv_heads
        fresh.append(own)
    graph.scope = "cache"
    emit_joined(graph, fresh)
    emit_step_logits(graph, spec, stored, stream, form)


def declare_step(graph: OmGraph, spec: ModelSpec, form: StepForm) -> None:
    """Declare inputs and outputs, in the order that io.json names and the compiled model keeps."""
    size = spec.layers[0].shape.head_dim
    graph.add_input(IDS, (1, form.new), form.ids)
    graph.add_input(MASK, (1, form.total), form.ids)
    graph.add_input(POSITIONS, (1, form.new), form.ids)
    if needs_rope_ids(spec, form.cache):
        graph.add_input(ROPE_IDS, (1, form.new), form.ids)
    graph.add_input(PAST, (1, form.cache, count_rows(spec), size))
    with graph.wide():
        graph.add_output(LOGITS, (1, form.new if form.every else 1, spec.shape.vocab))
    graph.add_output(FRESH, (1, form.new, count_rows(spec), size))


def emit_step_frame(graph: OmGraph, spec: ModelSpec, stored: StoredModel, form: StepForm) -> StepFrame:
    """Append rotary tables and masks, once for each that some layer needs."""
    graph.scope = "frame"
    tables = {rope: emit_rows(graph, table) for rope, table in stored.ropes.items()}
    masks: dict[tuple[int | None, int], str] = {}
    with graph.wide():
        positions = graph.add("Cast", POSITIONS, to=TensorProto.FLOAT)
        keys = graph.add("Concat", stored.places, positions, axis=1)
        keys = graph.add("Reshape", keys, graph.integers(1, 1, 1, -1))
        present = graph.add("Reshape", graph.add("Cast", MASK, to=TensorProto.FLOAT), graph.integers(1, 1, 1, -1))
        for layer in spec.layers:
            key = (find_window(layer, form.cache), layer.shape.group)
            if key not in masks:
                ahead = graph.add("Sub", emit_query_places(graph, positions, key[1]), keys)
                masks[key] = emit_step_mask(graph, present, ahead, key[0])
    return StepFrame(form.cache, tables, masks)


def emit_rows(graph: OmGraph, table: RopeTable) -> tuple[str, str]:
    """Append cosine and sine `[1, S, 1, dim / 2]` of the new tokens."""
    ids = ROPE_IDS if table.chosen else POSITIONS
    rows = [graph.add("Gather", name, ids) for name in (table.cos, table.sin)]
    cos, sin = (graph.add("Unsqueeze", row, graph.integers(2)) for row in rows)
    return cos, sin


def find_window(layer: LayerSpec, cache: int) -> int | None:
    """Return a layer's window unless it is as long as the cache, which then binds first."""
    return layer.window if layer.window is not None and layer.window < cache else None


def emit_query_places(graph: OmGraph, positions: str, group: int) -> str:
    """Append the position of each query `[1, 1, S * group, 1]`: a token's heads that share a key stand together."""
    places = graph.add("Unsqueeze", positions, graph.integers(-1))
    if group > 1:
        places = graph.add("Tile", places, graph.integers(1, 1, group))
    return graph.add("Reshape", places, graph.integers(1, 1, -1, 1))


def emit_step_mask(graph: OmGraph, present: str, ahead: str, window: int | None) -> str:
    """Append 0 where a query may look and -MASKED elsewhere; `ahead`: query position less key position."""
    zero, one = graph.number(0.0), graph.number(1.0)
    allowed = graph.add("Mul", present, graph.add("Clip", graph.add("Add", ahead, one), zero, one))
    if window is not None:
        inside = graph.add("Clip", graph.add("Sub", graph.number(float(window)), ahead), zero, one)
        allowed = graph.add("Mul", allowed, inside)
    return graph.add("Mul", graph.add("Sub", allowed, one), graph.number(MASKED))


def emit_joined(graph: OmGraph, parts: list[str]) -> None:
    """Append the new rows of all layers side by side, in as many steps as concatenations may have inputs."""
    while len(parts) > MOST_JOINED:
        chunks = [parts[start : start + MOST_JOINED] for start in range(0, len(parts), MOST_JOINED)]
        parts = [graph.add("Concat", *chunk, axis=2) if len(chunk) > 1 else chunk[0] for chunk in chunks]
    if len(parts) == 1:
        graph.add("Identity", parts[0], output=FRESH)
    else:
        graph.add("Concat", *parts, axis=2, output=FRESH)


def emit_step_logits(graph: OmGraph, spec: ModelSpec, stored: StoredModel, stream: str, form: StepForm) -> None:
    """Append the final norm and the output head as float32 logits.

    A Gemm reads the head as it is stored, `[vocab, hidden]`, so that a tied model stores it once and no runtime has to
    transpose it: ATC need not fold the Transpose of a constant that lies outside the model.
    """
    graph.scope = "head"
    if not form.every and form.rows != 1:
        stream = graph.add("Slice", stream, graph.integers(-1), graph.integers(LAST), graph.integers(1))
    normed = graph.narrow(emit_wide_norm(graph, spec, stored.final_norm, stream))
    rows = graph.add("Reshape", normed, graph.integers(-1, spec.shape.hidden))
    product = graph.widen(graph.add("Gemm", rows, stored.head, transB=1))
    with graph.wide():
        if spec.logit_divisor != 1.0 or spec.logit_softcap is not None:
            product = emit_capped(graph, product, 1.0 / spec.logit_divisor, spec.logit_softcap)
        graph.add("Reshape", product, graph.integers(1, -1, spec.shape.vocab), output=LOGITS)


# A layer


@dataclass(frozen=True)
class LayerPlace:
    """A layer, its stored weights by role, and the first of its rows in the cache."""

    index: int
    layer: LayerSpec
    names: Names
    start: int


def emit_om_layer(
    graph: OmGraph, spec: ModelSpec, place: LayerPlace, stream: str, frame: StepFrame
) -> tuple[str, str]:
    """Append one decoder layer over the float32 stream `[1, S, hidden]`; return it and the layer's new cache rows."""
    graph.scope = f"layers.{place.index}.attention"
    context, fresh = emit_om_context(graph, spec, place, stream, frame)
    stream = emit_om_branch_end(graph, spec, place.names, ("o", "attn_out"), (stream, context))
    graph.scope = f"layers.{place.index}.mlp"
    activation = emit_om_mlp(graph, spec, place.names, stream)
    return emit_om_branch_end(graph, spec, place.names, ("down", "mlp_out"), (stream, activation)), fresh


def emit_wide_norm(graph: OmGraph, spec: ModelSpec, weight: str, value: str) -> str:
    """Append value / sqrt(mean(value^2) + eps) * weight over the last axis in float32, which `value` is already.

    The square is a Mul: of a Pow, ATC makes an operator of its own that its mixed precision turns to float16.
    """
    with graph.wide():
        square = graph.add("Mul", value, value)
        mean = graph.add("ReduceMean", square, graph.integers(-1), keepdims=1)
        root = graph.add("Sqrt", graph.add("Add", mean, graph.number(spec.eps)))
        return graph.add("Mul", graph.add("Div", value, root), weight)


def emit_branch_start(graph: OmGraph, spec: ModelSpec, names: Names, role: str, stream: str) -> str:
    """Append what a branch reads, in the graph's float type: the normed stream, or the stream itself."""
    return graph.narrow(emit_wide_norm(graph, spec, names[role], stream) if role in names else stream)


def emit_om_heads(graph: OmGraph, spec: ModelSpec, place: LayerPlace, role: str, value: str) -> str:
    """Append a projection to heads `[1, S, heads, D]`, with the qk-norm of the role if there is one."""
    shape, norm = place.layer.shape, place.names.get(f"{role}_norm")
    heads = graph.integers(1, -1, shape.query_heads if role == "q" else shape.kv_heads, shape.head_dim)
    flat = emit_linear(graph, place.names, role, value)
    if norm is None:
        return graph.add("Reshape", flat, heads)
    if spec.family.attention.qk_norm == "all":
        return graph.add("Reshape", graph.narrow(emit_wide_norm(graph, spec, norm, graph.widen(flat))), heads)
    parted = graph.widen(graph.add("Reshape", flat, heads))
    return graph.narrow(emit_wide_norm(graph, spec, norm, parted))


def emit_om_context(
    graph: OmGraph, spec: ModelSpec, place: LayerPlace, stream: str, frame: StepFrame
) -> tuple[str, str]:
    """Append attention up to the input of `o` `[1, S, heads * D]`, and the new rows `[1, S, 2 * kv_heads, D]`."""
    layer, shape = place.layer, place.layer.shape
    inputs = emit_branch_start(graph, spec, place.names, "attn_in", stream)
    query, key, value = (emit_om_heads(graph, spec, place, role, inputs) for role in ("q", "k", "v"))
    if layer.rope is not None:
        halves, tables = replace(layer.rope, interleaved=False), frame.tables[layer.rope]
        query, key = (emit_rotation(graph, heads, halves, tables, shape.head_dim) for heads in (query, key))
    fresh = graph.add("Concat", key, value, axis=2)
    middle, end = place.start + shape.kv_heads, place.start + 2 * shape.kv_heads
    keys = emit_all_rows(graph, (place.start, middle), key)
    values = emit_all_rows(graph, (middle, end), value)
    mask = frame.masks[find_window(layer, frame.cache), shape.group]
    return emit_om_attention(graph, spec, layer, (query, keys, values), mask), fresh


def emit_all_rows(graph: OmGraph, rows: tuple[int, int], fresh: str) -> str:
    """Append a layer's cached keys or values with the new ones behind them, `[1, C + S, kv_heads, D]`."""
    cached = graph.add("Slice", PAST, graph.integers(rows[0]), graph.integers(rows[1]), graph.integers(2))
    return graph.add("Concat", cached, fresh, axis=1)


def emit_om_attention(
    graph: OmGraph, spec: ModelSpec, layer: LayerSpec, heads: tuple[str, str, str], mask: str
) -> str:
    """Append the mix of values `[1, S, heads * D]`.

    Queries that share a key become rows of one matrix product, `[1, K, S * G, D]`: no axis more, nothing repeated.
    Queries are scaled by the power of two next to the scale, which is exact and keeps float16 products in range; the
    rest of the scale, the soft cap, the mask and the softmax are float32.
    """
    shape, (query, keys, values) = layer.shape, heads
    scaled = emit_scaled(graph, query, nearest_power(spec.attention_scale))
    parted = graph.add("Reshape", scaled, graph.integers(-1, shape.kv_heads, shape.group, shape.head_dim))
    turned = graph.add("Transpose", parted, perm=[1, 0, 2, 3])
    rows = graph.add("Reshape", turned, graph.integers(1, shape.kv_heads, -1, shape.head_dim))
    scores = graph.add("MatMul", rows, graph.add("Transpose", keys, perm=[0, 2, 3, 1]))
    weights = emit_weights(graph, spec, graph.widen(scores), mask)
    mixed = graph.add("MatMul", graph.narrow(weights), graph.add("Transpose", values, perm=[0, 2, 1, 3]))
    apart = graph.add("Reshape", mixed, graph.integers(shape.kv_heads, -1, shape.group, shape.head_dim))
    back = graph.add("Transpose", apart, perm=[1, 0, 2, 3])
    return graph.add("Reshape", back, graph.integers(1, -1, shape.query))


def nearest_power(scale: float) -> float:
    """Return the power of two next to a positive scale; 1 for any other."""
    return 2.0 ** round(math.log2(scale)) if scale > 0 else 1.0


def emit_weights(graph: OmGraph, spec: ModelSpec, scores: str, mask: str) -> str:
    """Append the softmax of scores that still lack the part of the scale that is no power of two, in float32."""
    rest = spec.attention_scale / nearest_power(spec.attention_scale)
    with graph.wide():
        if spec.attention_softcap is None:
            scores = emit_scaled(graph, scores, rest)
        else:
            scores = emit_capped(graph, scores, rest, spec.attention_softcap)
        return graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)


def emit_om_branch_end(
    graph: OmGraph, spec: ModelSpec, names: Names, roles: tuple[str, str], values: tuple[str, str]
) -> str:
    """Append a branch's last projection, its norm and the residual multiplier, and the sum with the stream.

    `roles`: projection and norm; `values`: the stream, and what the projection reads.
    """
    projected = graph.widen(emit_linear(graph, names, roles[0], values[1]))
    if roles[1] in names:
        projected = emit_wide_norm(graph, spec, names[roles[1]], projected)
    with graph.wide():
        return graph.add("Add", values[0], emit_scaled(graph, projected, spec.residual_multiplier))


def emit_om_mlp(graph: OmGraph, spec: ModelSpec, names: Names, stream: str) -> str:
    """Append the input of `down` in the graph's float type: act(gate) * up of the normed stream."""
    inputs = emit_branch_start(graph, spec, names, "mlp_in", stream)
    gate, up = (emit_linear(graph, names, role, inputs) for role in ("gate", "up"))
    activation = ACTIVATIONS[spec.activation]
    if spec.activation in SAFE_IN_HALF:
        return graph.add("Mul", activation(graph, gate), up)
    wide = graph.widen(gate)
    with graph.wide():
        curved = activation(graph, wide)
    return graph.add("Mul", graph.narrow(curved), up)
