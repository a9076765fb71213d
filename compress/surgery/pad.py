"""The zero-padded uniform copy of an uneven model: exactly equal, loadable by stock code, no faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.errors import UserError
from compress.family import POST_NORMS
from compress.shapes import LayerShape, ModelShape
from compress.spec import ModelSpec, resolve_model, role_axes
from compress.spec_writer import write_config
from compress.weights import Weights, fuse_parts, read_layer


def uniform_shape(spec: ModelSpec) -> ModelShape:
    """Return the shape whose layers all have the largest head and channel counts.

    Raises UserError for qk-norms over all heads, whose mean square the padding would change.
    """
    layers = spec.shape.layers
    if any(role in spec.family.layer and role not in layer.norms for layer in layers for role in POST_NORMS):
        raise UserError(
            "Some layers have lost the norm behind a branch, so a padded copy would not open in stock code either; "
            "use `lightpress export --target onnx`."
        )
    groups, ffn = max(layer.kv_heads for layer in layers), max(layer.ffn for layer in layers)
    if spec.family.attention.qk_norm == "all" and any(layer.kv_heads != groups for layer in layers):
        raise UserError(
            f"Models of family '{spec.family.name}' norm all heads together, so layers with unequal head counts have "
            "no equal padded copy; edit the plan so that all layers keep the same number of KV groups."
        )
    return replace(spec.shape, layers=tuple(layer.resize(groups, ffn) for layer in layers))


def pad_weights(spec: ModelSpec, weights: Mapping[str, Tensor], shape: LayerShape) -> Weights:
    """Append zeros along heads and channels: their gate, value and output columns are zero, so they add nothing."""
    sizes = {"query": shape.query, "kv": shape.kv, "ffn": shape.ffn}
    padded: Weights = {}
    for role, tensor in weights.items():
        axes = role_axes(role, spec.family.attention.qk_norm)
        missing = [sizes.get(axis, size) - size for axis, size in zip(axes, tensor.shape, strict=True)]
        # F.pad counts dimensions from the last one, two numbers (before, after) for each.
        padded[role] = F.pad(tensor, [n for extra in reversed(missing) for n in (0, extra)])
    return padded


def uniform_config(spec: ModelSpec) -> dict[str, object]:
    """Return the config.json of the padded copy."""
    return write_config(spec, uniform_shape(spec), range(len(spec.layers)))


def write_padded(checkpoint: Checkpoint, spec: ModelSpec, writer: CheckpointWriter) -> None:
    """Write the padded copy, a layer at a time, every tensor in its storage type."""
    new = resolve_model(uniform_config(spec), None)
    for role in ["embed", "final_norm"] + ([] if spec.shape.tied else ["head"]):
        writer.add(new.names[role], checkpoint.read_one(spec.names[role]))
    for index, layer in enumerate(new.layers):
        weights = pad_weights(spec, read_layer(checkpoint, spec, index), layer.shape)
        for role, tensor in fuse_parts(layer, weights).items():
            writer.add(layer.names[role], tensor)
