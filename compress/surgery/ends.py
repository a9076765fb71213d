"""What stands outside the layers: embedding, final norm and head of the new model, and the types of storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.spec import ModelSpec
from compress.surgery.finish import fit_final_norm
from compress.surgery.job import Rebuild, Streams
from compress.surgery.width import fold_embedding_scale, slice_weights
from compress.weights import read_head

END_ROLES = ("embed", "final_norm", "head")


def cut_ends(job: Rebuild, roles: Sequence[str] = END_ROLES) -> dict[str, Tensor]:
    """Return embedding, final norm and (untied) head cut to the kept channels, each in its storage type.

    Matrices are cut as they are stored, one at a time: with a large vocabulary float32 copies would be the peak.
    """
    kept, ends, stored = {"hidden": job.hidden}, {}, job.checkpoint.tensors
    for role in roles:
        if role == "head" and job.old.shape.tied:
            continue
        tensor = job.checkpoint.read_one(job.old.names[role])
        exact = tensor if tensor.dim() > 1 else tensor.to(torch.float32)
        ends[role] = slice_weights(job.old, {role: exact}, kept, job.recipe.norms)[role]
    folded = fold_embedding_scale(job.old, job.new, ends)
    return {role: tensor.to(stored[job.old.names[role]].dtype) for role, tensor in folded.items()}


def storage_types(checkpoint: Checkpoint, spec: ModelSpec, new: ModelSpec | None = None) -> dict[str, torch.dtype]:
    """Return the type that the checkpoint stores each role of a layer in (norms may differ from matrices).

    The first layer that has a role decides: layers may lack norms that were absorbed. A role that only the `new` model
    has, such as a bias, takes the type of its projection.
    """
    types: dict[str, torch.dtype] = {}
    for layer in spec.layers:
        for role, name in layer.names.items():
            types = dict.fromkeys(layer.parts.get(role, (role,)), checkpoint.tensors[name].dtype) | types
    added = [] if new is None else [role for role in new.layers[0].names if role.endswith("_bias")]
    return {role: types[role.removesuffix("_bias")] for role in added} | types


def finish_norm(job: Rebuild, streams: Streams) -> Tensor:
    """Return the final norm in its storage type, fitted to the last stream when the recipe calibrates norms."""
    final = cut_ends(job, ("final_norm",))["final_norm"]
    if job.recipe.norms != "calibrated":
        return final
    dense = read_head(job.checkpoint, job.old, torch.float32)
    new = {"final_norm": final.to(torch.float32), "head": read_new_head(job)}
    return fit_final_norm(job, streams, dense, new).to(final.dtype)


def read_new_head(job: Rebuild) -> Tensor:
    """Return the new model's output head, float32, as it is written."""
    output = "embed" if job.new.shape.tied else "head"
    return cut_ends(job, (output,))[output].to(torch.float32)
