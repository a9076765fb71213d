"""A small model whole in memory, run with any parameters: what per-document gradients and trajectories need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.decoder import PLAIN, Frame, Kernels, causal_mask, compute_logits, make_frame, run_layer
from compress.recover.data import Document
from compress.spec import ModelSpec
from compress.weights import Weights, read_head, read_layer


@dataclass(frozen=True)
class Model:
    """Float32 weights of each layer by role, and those at the ends: embed, final_norm, head."""

    spec: ModelSpec
    layers: tuple[Weights, ...]
    ends: Weights


def load_model(checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Model:
    """Read all weights of a model; a tied head is the embedding itself."""
    ends = read_head(checkpoint, spec, dtype)
    ends["embed"] = ends["head"] if spec.shape.tied else checkpoint.read_one(spec.names["embed"], dtype)
    return Model(spec, tuple(read_layer(checkpoint, spec, index, dtype) for index in range(len(spec.layers))), ends)


def mix_plainly(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Mix values by causal softmax scores in plain operations: fused kernels have no second derivative."""
    group = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(group, 1) for heads in (key, value))
    mask = causal_mask(query.shape[2], key.shape[2], window, query.device)
    return (query @ key.transpose(2, 3) * scale).masked_fill(~mask, float("-inf")).softmax(-1) @ value


TWICE = Kernels(mix=mix_plainly)  # kernels that can be differentiated twice


def embed_tokens(model: Model, ids: Tensor) -> Tensor:
    """Return the stream before the first layer, `[rows, length, hidden]`."""
    return F.embedding(ids, model.ends["embed"]) * model.spec.embedding_multiplier


def run_layers(model: Model, x: Tensor, layers: Sequence[Weights], first: int = 0, kernels: Kernels = PLAIN) -> Tensor:
    """Run the stream `x` `[rows, length, hidden]` through these layers, of which the first is the model's `first`."""
    plain = make_frame(model.spec, x.shape[0], x.shape[1], dtype=x.dtype)
    frame = Frame(plain.positions, plain.tables, kernels)
    for layer, weights in zip(model.spec.layers[first:], layers, strict=False):
        x = run_layer(model.spec, layer, weights, x, frame)[0]
    return x


def sum_losses(model: Model, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return each row's sum of weighted cross entropies `[rows]` from the last stream; weights as in a `Batch`."""
    logits = compute_logits(model.spec, model.ends, x[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return (losses * weights[:, 1:]).sum(1)


def stack_documents(documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Return ids and weights `[documents, longest]`, padded with 0 on the right, where a causal model never looks."""
    longest = max(len(one.ids) for one in documents)
    ids, weights = torch.zeros(len(documents), longest, dtype=torch.long), torch.zeros(len(documents), longest)
    for row, one in enumerate(documents):
        ids[row, : len(one.ids)] = torch.tensor(one.ids, dtype=torch.long)
        weights[row, : len(one.ids)] = torch.tensor(one.weights, dtype=torch.float32)
    return ids, weights
