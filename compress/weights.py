"""Weights by role: a layer read from a checkpoint with fused tensors split, and fused again for writing."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import UserError
from compress.spec import LayerSpec, ModelSpec, resolve_model, role_shape

Weights = dict[str, Tensor]


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Resolve the model of an open checkpoint; raises UserError when config.json and tensors do not fit."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    spec = resolve_model(checkpoint.config, shapes, str(checkpoint.folder))
    check_tied(checkpoint, spec)
    return spec


def check_tied(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise UserError when a model said to be tied stores two different matrices."""
    embed, head = spec.names["embed"], spec.names["head"]
    if not spec.shape.tied or embed == head:
        return
    step = 4096
    for start in range(0, spec.shape.vocab, step):
        stop = min(start + step, spec.shape.vocab)
        if not torch.equal(checkpoint.read_slice(embed, start, stop), checkpoint.read_slice(head, start, stop)):
            raise UserError(
                f"{checkpoint.folder}: tie_word_embeddings is true but '{embed}' and '{head}' differ; "
                "set tie_word_embeddings to false in config.json if both are meant."
            )


def read_layer(checkpoint: Checkpoint, spec: ModelSpec, index: int, dtype: torch.dtype | None = None) -> Weights:
    """Read one layer's tensors by role (float matrices as stored, `[out, in]`), cast when `dtype` is given."""
    layer = spec.layers[index]
    stored = checkpoint.read(layer.names.values(), dtype)
    return split_fused(spec, layer, {role: stored[name] for role, name in layer.names.items()})


def read_roles(
    checkpoint: Checkpoint, spec: ModelSpec, index: int, roles: Collection[str], dtype: torch.dtype
) -> Weights:
    """Read some roles of one layer; a fused tensor is read whole and split."""
    layer = spec.layers[index]
    wanted = {role: name for role, name in layer.names.items() if {role, *layer.parts.get(role, ())} & set(roles)}
    stored = checkpoint.read(wanted.values(), dtype)
    split = split_fused(spec, layer, {role: stored[name] for role, name in wanted.items()})
    return {role: tensor for role, tensor in split.items() if role in roles}


def split_fused(spec: ModelSpec, layer: LayerSpec, stored: Weights) -> Weights:
    """Split fused tensors into their parts along the first axis."""
    weights: Weights = {}
    for role, tensor in stored.items():
        parts = layer.parts.get(role)
        if parts is None:
            weights[role] = tensor
            continue
        rows = [role_shape(spec.shape, layer.shape, part)[0] for part in parts]
        weights |= dict(zip(parts, torch.split(tensor, rows), strict=True))
    return weights


def fuse_parts(layer: LayerSpec, weights: Mapping[str, Tensor]) -> Weights:
    """Return stored role -> tensor: the inverse of `split_fused`."""
    return {
        role: torch.cat([weights[part] for part in layer.parts[role]]) if role in layer.parts else weights[role]
        for role in layer.names
    }


def embed_rows(checkpoint: Checkpoint, spec: ModelSpec, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scaled embeddings `[..., hidden]` of token `ids`, reading only the rows in use."""
    unique, places = torch.unique(ids, return_inverse=True)
    rows = checkpoint.read_rows(spec.names["embed"], unique, dtype)
    return rows[places] * spec.embedding_multiplier


def read_head(checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype) -> Weights:
    """Read the final norm and the output head."""
    return {
        "final_norm": checkpoint.read_one(spec.names["final_norm"], dtype),
        "head": checkpoint.read_one(spec.names["head"], dtype),
    }


def read_norm(checkpoint: Checkpoint, spec: ModelSpec, role: str) -> Tensor:
    """Read a norm outside the layers as float32 `[hidden]`."""
    return checkpoint.read_one(spec.names[role], torch.float32)
