"""Gradients of the loss, streamed: the weights and the graph of one layer in memory at a time.

    forward:   embeddings -> layer 0 -> ... -> last layer       each layer's input stream is stored
    head:      last stream -> logits of a few hundred tokens    gradient of the loss by the last stream
    backward:  last layer -> ... -> layer 0                     weights read again, layer run again from its input

That costs three forward passes (forward, once more, gradients by the streams), and a fourth for gradients by the
weights. The loss is the SUM over all tokens that have a successor: a token's gradient does not shrink with the text.

What the gradients are for: first-order scores of units (LLM-Pruner), and the Fisher information of the stream, which
turns an error in the stream into loss at the end. With labels drawn from the model's own predictions the gradients g of
single tokens have mean zero, E[g g^T] is the Fisher matrix, and an error e of the stream costs KL(dense || damaged)
~ 1/2 E[(g . e)^2], summed over tokens whose errors are independent of each other (second order; our derivation). Of an
isotropic e over d channels that is 1/2 E|g|^2 E|e|^2 / d: the trace of the matrix is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calibrate import fill_embeddings, share_text
from compress.checkpoint import Checkpoint
from compress.decoder import (
    attention_branch,
    attention_context,
    compute_logits,
    make_frame,
    mlp_activation,
    mlp_branch,
    run_layer,
)
from compress.errors import UserError
from compress.hidden import HiddenStore, batches, release_memory
from compress.parallel import ALONE, Group
from compress.spec import ModelSpec, role_axes
from compress.stats import ordinary_tokens
from compress.text import Windows
from compress.weights import Weights, read_head, read_layer

TEXT, SAMPLED = "text", "sampled"
TOKENS = 1024  # tokens whose graph through one layer exists at once; at least one window
# Tokens whose logits exist at once, and fewer where the vocabulary is large: 2^24 values are 64 MiB.
PIECE_TOKENS, PIECE_VALUES = 512, 2**24


@dataclass(frozen=True)
class BackwardOptions:
    """How to run backward: `labels` (`text`: the true next tokens, `sampled`: the model's own), seed of the samples.

    `weights` asks for gradients by the weights; `spill_bytes` bounds the streams held in memory. The processes of a
    `group` run their shares of the windows, which takes the text's labels: samples are drawn in one sequence.
    """

    labels: str = TEXT
    weights: bool = False
    seed: int = 0
    spill_bytes: int = 2**30
    group: Group = ALONE

    def __post_init__(self) -> None:
        """Refuse unknown labels, and sampled ones in a group."""
        if self.labels not in (TEXT, SAMPLED):
            raise UserError(f"labels '{self.labels}' of a backward pass are not one of {TEXT}, {SAMPLED}.")
        if self.labels == SAMPLED and self.group.size > 1:
            raise ValueError("processes cannot share a backward pass whose labels are drawn in one sequence")


@dataclass(frozen=True)
class LayerGradients:
    """Float32 gradients of the summed loss around one layer, with the layer's weights.

    `before`, `middle`, `after`: by the stream before the layer, after its attention branch, after its MLP branch, each
    `[windows, length, hidden]`; `values`: the weights by role; `weights`: gradients by them, empty unless asked for;
    `ordinary` `[windows, length]`: tokens that count; `energy`: their sum of |stream after the layer|^2.
    """

    index: int
    before: Tensor
    middle: Tensor
    after: Tensor
    values: Weights
    weights: Weights
    ordinary: Tensor
    energy: float


def stream_backward(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, options: BackwardOptions
) -> Iterator[LayerGradients]:
    """Yield the gradients of one layer after the other, from the last to the first.

    Let go of each before asking for the next, or two layers are in memory. In a group the streams are this process's
    share, and gradients by the weights are those of all windows. Raises UserError for windows without a next token to
    predict.
    """
    if windows.ids[:, 1:].numel() == 0:
        raise UserError(f"{windows.source}: gradients need windows of at least 2 tokens; give more text.")
    windows = share_text(options.group, windows)
    count, length = windows.ids.shape
    with HiddenStore(((len(spec.layers) + 1) * count, length, spec.shape.hidden), options.spill_bytes) as store:
        fill_inputs(checkpoint, spec, windows, store)
        gradient = differentiate_loss(checkpoint, spec, windows, store, options)
        for index in reversed(range(len(spec.layers))):
            found = backward_layer(checkpoint, spec, index, store, gradient, options.weights)
            gradient = found.before
            options.group.add(found.weights.values())
            yield found
            del found
            release_memory()


def fill_inputs(checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, store: HiddenStore) -> None:
    """Run all layers forward; rows `index * windows` on of `store` take a layer's input, the last rows its output."""
    fill_embeddings(checkpoint, spec, windows, store)
    count, length = windows.ids.shape
    for index, layer in enumerate(spec.layers):
        weights = read_layer(checkpoint, spec, index, torch.float32)
        for start, stop in batches(count, length):
            frame, offset = make_frame(spec, stop - start, length), index * count
            x = store.read(offset + start, offset + stop)
            store.write(offset + count + start, run_layer(spec, layer, weights, x, frame)[0])
        del weights
        release_memory()


def differentiate_loss(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, store: HiddenStore, options: BackwardOptions
) -> Tensor:
    """Return the gradient of the summed loss by the last stream, `[windows, length, hidden]`."""
    count, length = windows.ids.shape
    ends, random = read_head(checkpoint, spec, torch.float32), torch.Generator().manual_seed(options.seed)
    step = max(1, min(PIECE_TOKENS, PIECE_VALUES // spec.shape.vocab))
    gradient = torch.zeros(count, length, spec.shape.hidden)
    for place, ids in enumerate(windows.ids):
        x = store.read(len(spec.layers) * count + place, len(spec.layers) * count + place + 1)[0]
        for start in range(0, length - 1, step):
            piece = slice(start, min(start + step, length - 1))
            labels = ids[1:][piece] if options.labels == TEXT else None
            gradient[place, piece] = differentiate_head(spec, ends, x[piece], labels, random)
    return gradient


def differentiate_head(
    spec: ModelSpec, ends: Weights, x: Tensor, labels: Tensor | None, random: torch.Generator
) -> Tensor:
    """Return the gradient of the summed cross entropy by the last stream `x` `[tokens, hidden]`; no labels: sampled."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = compute_logits(spec, ends, leaf)
        if labels is None:
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
        loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


def backward_layer(
    checkpoint: Checkpoint, spec: ModelSpec, index: int, store: HiddenStore, after: Tensor, differentiate: bool
) -> LayerGradients:
    """Run one layer again from its stored input and back-propagate `after`; by the weights if `differentiate`."""
    count, length = after.shape[:2]
    values = read_layer(checkpoint, spec, index, torch.float32)
    leaves = {role: tensor.detach().requires_grad_(differentiate) for role, tensor in values.items()}
    stream = store.read(index * count, (index + 1) * count)
    before, middle, energy = torch.empty_like(after), torch.empty_like(after), 0.0
    ordinary = mark_tokens(stream)
    for span in (slice(*pair) for pair in batches(count, length, TOKENS)):
        before[span], middle[span], output = backward_batch(spec, index, leaves, stream[span], after[span])
        energy += float(output[ordinary[span]].pow(2).sum(dtype=torch.float64))
    # Batches add up in float32: they are few, and a float64 copy would be twice the layer.
    weights = {role: leaf.grad for role, leaf in leaves.items() if leaf.grad is not None}
    if differentiate and not count:  # a process without windows has nothing to add to the others' sums
        weights = {role: torch.zeros_like(tensor) for role, tensor in values.items()}
    return LayerGradients(index, before, middle, after, values, weights, ordinary, energy)


def backward_batch(
    spec: ModelSpec, index: int, leaves: Weights, x: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by the stream before and amid one layer, and the stream after it; leaves add theirs up."""
    frame = make_frame(spec, *x.shape[:2])
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        context, _ = attention_context(spec, spec.layers[index], leaves, start, frame)
        middle = start + attention_branch(spec, leaves, context)
        middle.retain_grad()
        output = middle + mlp_branch(spec, leaves, mlp_activation(spec, leaves, middle))
    output.backward(after)  # type: ignore[no-untyped-call]
    assert start.grad is not None and middle.grad is not None
    return start.grad, middle.grad, output.detach()


def mark_tokens(x: Tensor) -> Tensor:
    """Return the tokens `[windows, length]` of a layer's input that moments count: no first, no sinks, no last.

    The last token of a window predicts nothing here, so that it has no gradient.
    """
    mask = ordinary_tokens(x)[0]
    mask[:, -1] = False
    return mask


def first_order_scores(
    gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], spec: ModelSpec, layer: int
) -> tuple[Tensor, Tensor]:
    """Return LLM-Pruner's first-order importance of KV groups `[groups]` and FFN channels `[channels]`, in float64.

    The paper's parameter-wise form: the sum of |gradient x weight| over all weights of a unit. Coupled tensors (q, k,
    v, o and gate, up, down, biases included) add up, the paper's `sum`; norms do not count. (arXiv 2305.11627, section
    3.2; methods 8.6.)
    """
    shape, span = spec.layers[layer].shape, spec.family.attention.qk_norm
    sizes = {"query": shape.group * shape.head_dim, "kv": shape.head_dim, "ffn": 1}
    kv, ffn = (torch.zeros(units, dtype=torch.float64) for units in (shape.kv_heads, shape.ffn))
    for role, weight in weights.items():
        for dim, axis in enumerate(role_axes(role, span)):
            if axis in sizes and not role.endswith("_norm"):
                rows = sum_products(gradients[role].movedim(dim, 0), weight.movedim(dim, 0))
                (ffn if axis == "ffn" else kv).add_(rows.view(-1, sizes[axis]).sum(1))
    return kv, ffn


def sum_products(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of |g w| per row, `[rows]` in float64; a vector's rows are its entries."""
    return (gradient * weight).abs().reshape(len(weight), -1).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class Sensitivity:
    """Loss in nats per token that an error as large as the stream after the layer would add, by branch.

    The prediction is linear: an error of a share s of the stream's energy |stream|^2 adds s times as much. It is exact
    to second order for errors that know nothing of the gradients (isotropic) and of each other. A pruned branch errs
    most where the model is unsure or least where it is: on trained models this predicted 0.13 to 2.4 times what was
    measured. Use it to compare layers and cuts of one branch, not for what they cost.
    """

    layer: int
    attention: float
    mlp: float


def measure_sensitivity(found: LayerGradients, source: str) -> Sensitivity:
    """Return one layer's sensitivity from the gradients of its ordinary tokens; UserError where there are none."""
    tokens = int(found.ordinary.sum())
    if tokens == 0:
        raise UserError(f"{source}: holds no token that is not first, last or a sink; give longer windows.")
    attention, mlp = (
        float(slopes[found.ordinary].pow(2).sum(dtype=torch.float64)) / tokens for slopes in (found.middle, found.after)
    )
    scale = 0.5 * found.energy / tokens / found.after.shape[-1]
    return Sensitivity(found.index, scale * attention, scale * mlp)


def sensitivities(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, options: BackwardOptions | None = None
) -> tuple[Sensitivity, ...]:
    """Return each layer's sensitivity, first layer first; `sensitivity x damage / energy` of a layer is loss.

    Labels are sampled unless `options` says otherwise; with the text's labels the Fisher information is the empirical
    one, which equals the true one only where the model predicts as often wrong as it expects to. Sinks are left out
    (methods 7.4). Raises UserError for windows that hold no ordinary token.
    """
    rows = []
    for found in stream_backward(checkpoint, spec, windows, options or BackwardOptions(SAMPLED)):
        rows.append(measure_sensitivity(found, windows.source))
        del found  # else two layers are in memory
    return tuple(reversed(rows))
