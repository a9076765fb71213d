"""The order of the stages: check, calibrate, plan, rebuild, write; importable without the command line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibrate import ATTENTION, MLP, NORMS, LayerStats, fill_embeddings, observe_final, stream_dense
from compress.checkpoint import Checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.decoder import compute_logits
from compress.evaluate import fill_hidden
from compress.hidden import HiddenStore
from compress.importance.findings import Findings, collect_findings, reduce_all
from compress.plan import Plan, keep_everything, make_plan, plan_shape
from compress.probe import weigh_axes
from compress.recipe import Recipe
from compress.spec import LayerSpec, ModelSpec, resolve_model
from compress.spec_writer import write_config
from compress.surgery.rebuild import Rebuild, Streams, rebuild_layers
from compress.surgery.width import fold_embedding_scale, slice_weights
from compress.text import Windows
from compress.weights import Weights, fuse_parts

Progress = Callable[[str, int, int], None]
END_ROLES = ("embed", "final_norm", "head")
SAMPLE = (2, 64)  # windows and tokens whose logits prove the written model; a large vocabulary makes them big
NEEDS = frozenset({ATTENTION, MLP, NORMS})


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Task:
    """One compression: the open dense checkpoint, its description, the calibration text and the recipe."""

    checkpoint: Checkpoint
    spec: ModelSpec
    windows: Windows
    recipe: Recipe


@dataclass(frozen=True)
class Result:
    """What a compression leaves in memory: the plan, the new model's description, a sample to compare with."""

    plan: Plan
    spec: ModelSpec
    sample_ids: Tensor
    sample_logits: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


def find_units(task: Task, progress: Progress = ignore_progress) -> Findings:
    """Run pass 1 on the dense model and return its findings; uses about `recipe.score_tokens` tokens."""
    checkpoint, spec, windows, recipe = task.checkpoint, task.spec, task.windows, task.recipe
    used = windows.take(math.ceil((recipe.score_tokens or count_score_tokens(spec)) / windows.ids.shape[1]))
    with HiddenStore((*used.ids.shape, spec.shape.hidden), recipe.spill_bytes) as store:
        layers = stream_dense(checkpoint, spec, used, store, NEEDS)
        found, sums = reduce_all(spec, watch(layers, "calibrate", len(spec.layers), progress), recipe.score)
        final = observe_final(checkpoint, spec, store)
    sums.add([final])
    return collect_findings(found, sums)


def count_score_tokens(spec: ModelSpec) -> int:
    """Return how many tokens score units: 1.5 for each input of the widest Gram matrix; small models get more."""
    widest = max(layer.ffn for layer in spec.shape.layers)
    return max(4096, 3 * widest // 2, min(16384, 2**35 // spec.shape.parameters))


def watch(layers: Iterator[LayerStats], stage: str, total: int, progress: Progress) -> Iterator[LayerStats]:
    """Pass items through, reporting each."""
    progress(stage, 0, total)
    done = 0  # enumerate would hold the layer that it gave out last
    for layer in layers:
        yield layer
        del layer
        done += 1
        progress(stage, done, total)


def compress_checkpoint(
    task: Task, plan: Plan, writer: CheckpointWriter, progress: Progress = ignore_progress
) -> Result:
    """Write the model that `plan` makes of the task's checkpoint through `writer` (which the caller finishes)."""
    started = time.perf_counter()
    if plan == keep_everything(task.spec.shape):
        ids, stream, new = *copy_checkpoint(task, writer), task.spec
    else:
        new = resolve_model(new_config(task.spec, plan), None)
        ids, stream = rebuild_checkpoint(task, plan, new, writer, progress)
    logits = compute_sample(task, plan, new, stream)
    return Result(plan, new, ids, logits, {"rebuild": time.perf_counter() - started})


def copy_checkpoint(task: Task, writer: CheckpointWriter) -> tuple[Tensor, Tensor]:
    """Write every tensor as it is stored; return sample ids and the dense model's last stream for them."""
    for name in task.checkpoint.tensors:
        writer.add(name, task.checkpoint.read_one(name))
    ids = task.windows.ids[: SAMPLE[0], : SAMPLE[1]]
    with HiddenStore((*ids.shape, task.spec.shape.hidden)) as store:
        fill_hidden(task.checkpoint, task.spec, Windows(ids, task.windows.source), store)
        return ids, store.read(0, len(ids))


def rebuild_checkpoint(
    task: Task, plan: Plan, new: ModelSpec, writer: CheckpointWriter, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Run pass 2, writing each layer as it is done; return sample ids and the pruned model's last stream for them."""
    checkpoint, spec, windows = task.checkpoint, task.spec, task.windows
    with ExitStack() as stack:
        streams = open_streams(stack, spec, new, windows, task.recipe)
        ends = cut_ends(checkpoint, spec, new, plan)
        fill_embeddings(checkpoint, spec, windows, streams.dense)
        start_pruned(new, windows, streams, ends["embed"])
        for role in list(ends):
            writer.add(new.names[role], ends.pop(role))
        job = Rebuild(checkpoint, spec, new, plan, task.recipe.repair == "lstsq", storage_types(checkpoint, spec))
        progress("rebuild", 0, len(new.layers))
        layers = rebuild_layers(job, streams)
        for place, layer in enumerate(new.layers):
            write_layer(writer, layer, next(layers))
            progress("rebuild", place + 1, len(new.layers))
        ids = windows.ids[: SAMPLE[0], : SAMPLE[1]]
        return ids, streams.pruned.read(0, len(ids))[:, : SAMPLE[1]]


def write_layer(writer: CheckpointWriter, layer: LayerSpec, weights: Weights) -> None:
    """Write one layer; nothing of it is held when the next is made."""
    for role, tensor in fuse_parts(layer, weights).items():
        writer.add(layer.names[role], tensor)


def compute_sample(task: Task, plan: Plan, new: ModelSpec, stream: Tensor) -> Tensor:
    """Return the new model's logits `[windows, tokens, vocab]` on its last stream."""
    output = "embed" if new.shape.tied else "head"
    ends = cut_ends(task.checkpoint, task.spec, new, plan, ("final_norm", output))
    head = ends[output].to(torch.float32)
    return compute_logits(new, {"final_norm": ends["final_norm"].to(torch.float32), "head": head}, stream)


def open_streams(stack: ExitStack, old: ModelSpec, new: ModelSpec, windows: Windows, recipe: Recipe) -> Streams:
    """Allocate both streams and the room for a projection's inputs."""
    count, length = windows.ids.shape
    widest = max(max(layer.shape.query, layer.shape.ffn) for layer in new.layers)
    dense, pruned, inputs = (
        stack.enter_context(HiddenStore((count, length, width), recipe.spill_bytes))
        for width in (old.shape.hidden, new.shape.hidden, widest)
    )
    return Streams(dense, pruned, inputs, torch.ones(count, length, dtype=torch.bool), torch.ones(count, length, 1))


def start_pruned(new: ModelSpec, windows: Windows, streams: Streams, embed: Tensor) -> None:
    """Fill the pruned stream with the embeddings as they are written, rounding included."""
    for start, stop in streams.spans():
        rows = embed[windows.ids[start:stop]].to(torch.float32)
        streams.pruned.write(start, rows * new.embedding_multiplier)


def cut_ends(
    checkpoint: Checkpoint, old: ModelSpec, new: ModelSpec, plan: Plan, roles: Sequence[str] = END_ROLES
) -> dict[str, Tensor]:
    """Return embedding, final norm and (untied) head cut to the kept channels, each in its storage type.

    Matrices are cut as they are stored, one at a time: with a large vocabulary float32 copies would be the peak.
    """
    kept, ends = {"hidden": torch.tensor(plan.hidden)}, {}
    for role in roles:
        if role == "head" and old.shape.tied:
            continue
        stored = checkpoint.read_one(old.names[role])
        exact = stored if stored.dim() > 1 else stored.to(torch.float32)
        ends[role] = slice_weights(old, {role: exact}, kept)[role]
    folded = fold_embedding_scale(old, new, ends)
    return {role: tensor.to(checkpoint.tensors[old.names[role]].dtype) for role, tensor in folded.items()}


def storage_types(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, torch.dtype]:
    """Return the type that the checkpoint stores each role of a layer in (norms may differ from matrices)."""
    layer = spec.layers[0]
    types: dict[str, torch.dtype] = {}
    for role, name in layer.names.items():
        types |= dict.fromkeys(layer.parts.get(role, (role,)), checkpoint.tensors[name].dtype)
    return types


def storage_dtype(checkpoint: Checkpoint, spec: ModelSpec) -> torch.dtype:
    """Return the type that the checkpoint stores its matrices in."""
    return storage_types(checkpoint, spec)["down"]


def plan_checkpoint(task: Task, progress: Progress = ignore_progress) -> Plan:
    """Run pass 1 and return the plan (keeping everything needs no pass)."""
    if task.recipe.keep == 1:
        return keep_everything(task.spec.shape)
    findings = find_units(task, progress)
    weights = weigh_axes(task.checkpoint, task.spec, findings, task.windows, task.recipe.axes)
    return make_plan(task.spec, findings, task.recipe, weights)


def new_config(spec: ModelSpec, plan: Plan) -> dict[str, Any]:
    """Return the config.json of the compressed model; UserError when no stock class accepts the shape."""
    return write_config(spec, plan_shape(plan, spec.shape), plan.kept_layers)


def describe_run(recipe: Recipe, windows: Windows) -> dict[str, Any]:
    """Return the part of the manifest that says what was asked for."""
    return {"recipe": {**recipe.__dict__, "axes": list(recipe.axes)}, "text": windows.source, "tokens": windows.tokens}


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan file, in one rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(plan.to_json()) + "\n", encoding="utf-8")
    partial.replace(path)
