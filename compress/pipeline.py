"""The order of the stages: check, calibrate, plan, rebuild, write; importable without the command line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibrate import (
    ATTENTION,
    MLP,
    NORMS,
    LayerStats,
    fill_embeddings,
    observe_final,
    share_text,
    stream_dense,
)
from compress.checkpoint import Checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.decoder import compute_logits
from compress.errors import UserError
from compress.evaluate import fill_hidden
from compress.goal import Goal
from compress.gradients import BackwardOptions, first_order_scores, stream_backward
from compress.hidden import HiddenStore
from compress.importance.findings import Findings, collect_findings, reduce_all
from compress.parallel import ALONE, Group
from compress.plan import Plan, keep_everything
from compress.recipe import Recipe
from compress.settle import absorb_rows, list_constants, planned_constants, report_absorption
from compress.spec import LayerSpec, ModelSpec
from compress.spec_change import resolve_absorbed
from compress.surgery.absorbed_view import Constants, absorb_checkpoint, check_rotation
from compress.surgery.describe import describe_new
from compress.surgery.ends import cut_ends, finish_norm, read_new_head, storage_types
from compress.surgery.job import Rebuild, open_streams, start_pruned
from compress.surgery.rebuild import rebuild_layers
from compress.surgery.rotate import (
    choose_rotation,
    collect_stream_gram,
    require_rotatable,
    rotate_checkpoint,
    rotated_findings,
)
from compress.text import Windows
from compress.trials import Bench, search_plan
from compress.weights import Weights, fuse_parts, read_head, read_spec

Progress = Callable[[str, int, int], None]
SAMPLE = (2, 64)  # windows and tokens whose logits prove the written model; a large vocabulary makes them big
NEEDS = frozenset({ATTENTION, MLP, NORMS})
NEED_SLOPES = ("taylor",)
SLOPE_WINDOWS = 10  # calibration samples of LLM-Pruner (methods 8.6)


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Task:
    """One compression: the open dense checkpoint, its description, the calibration text and the recipe.

    `goal`: what the plan must meet, where that is not the recipe's `keep`. `group`: the processes that share the text;
    each is given all of it, and runs its own windows.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    windows: Windows
    recipe: Recipe
    goal: Goal | None = None
    group: Group = ALONE


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
    checkpoint, spec, recipe, group = task.checkpoint, task.spec, task.recipe, task.group
    tokens = recipe.score_tokens or count_score_tokens(spec)
    used = share_text(group, task.windows.take(math.ceil(tokens / task.windows.ids.shape[1])))
    slopes = find_slopes(task) if recipe.score in NEED_SLOPES else None
    with HiddenStore((*used.ids.shape, spec.shape.hidden), recipe.spill_bytes) as store:
        layers = stream_dense(checkpoint, spec, used, store, NEEDS, group)
        watched = watch(layers, "calibrate", len(spec.layers), progress)
        found, sums = reduce_all(spec, watched, recipe.score, recipe.seed, slopes)
        final = observe_final(checkpoint, spec, store, group)
    sums.add([final])
    return collect_findings(found, sums)


def find_slopes(task: Task) -> dict[int, tuple[Tensor, Tensor]]:
    """Return layer -> first-order importances of its units, from a backward pass over a few windows (methods 8.6)."""
    options = BackwardOptions(weights=True, spill_bytes=task.recipe.spill_bytes, group=task.group)
    slopes = {}
    for found in stream_backward(task.checkpoint, task.spec, task.windows.take(SLOPE_WINDOWS), options):
        slopes[found.index] = first_order_scores(found.weights, found.values, task.spec, found.index)
        del found
    return slopes


def turn_task(task: Task, pinned: Sequence[int], constants: Constants) -> Task:
    """Return the task on the rotated model, whose post-norms are absorbed with `constants` before (methods 8.5).

    Raises UserError where a post-norm is left: a rotated stream cannot pass it.
    """
    recipe = task.recipe
    if constants:
        absorbed = absorb_checkpoint(task.checkpoint, task.spec, constants)
        recipe = replace(recipe, absorb="none")  # nothing is left to absorb
        task = replace(task, checkpoint=absorbed, spec=read_spec(absorbed), recipe=recipe)
    gram = collect_stream_gram(task.checkpoint, task.spec, task.windows, recipe.spill_bytes, task.group)
    rotated = rotate_checkpoint(task.checkpoint, task.spec, choose_rotation(gram, pinned))
    return replace(task, checkpoint=rotated, spec=read_spec(rotated))


def turn_planned(task: Task, plan: Plan) -> Task:
    """Return the task in the basis that the plan's hidden channels are counted in."""
    check_turnable(plan, task.spec, task.recipe)
    if task.recipe.rotate == "none" or len(plan.hidden) == task.spec.shape.hidden:
        return task
    return turn_task(task, plan.notes.get("pinned_channels", ()), planned_constants(plan))


def check_turnable(plan: Plan, spec: ModelSpec, recipe: Recipe) -> None:
    """Raise UserError where the recipe rotates what the plan cuts, but the plan leaves a post-norm in some layer."""
    if recipe.rotate != "none" and len(plan.hidden) < spec.shape.hidden:
        require_rotatable(resolve_absorbed(spec, planned_constants(plan)))


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
    task: Task, plan: Plan, writer: CheckpointWriter | None, progress: Progress = ignore_progress
) -> Result:
    """Write the model that `plan` makes of the task's checkpoint through `writer` (which the caller finishes).

    Of a group, one process has a writer; the others, without, only take their part in the work. Raises UserError where
    the text has fewer windows than the group has processes.
    """
    started = time.perf_counter()
    if plan == keep_everything(task.spec.shape):
        ids, stream, new = *copy_checkpoint(task, writer), task.spec
        ends = read_head(task.checkpoint, task.spec, torch.float32)
    else:
        check_share(task)
        task = turn_planned(task, plan)
        new = describe_new(task.spec, plan, task.recipe)
        ids, stream, final = rebuild_checkpoint(task, plan, new, writer, progress)
        job = Rebuild(task.checkpoint, task.spec, new, plan, task.recipe, {}, task.group)
        ends = {"final_norm": final.to(torch.float32), "head": read_new_head(job)}
    logits = compute_logits(new, ends, stream)
    return Result(plan, new, ids, logits, {"rebuild": time.perf_counter() - started})


def copy_checkpoint(task: Task, writer: CheckpointWriter | None) -> tuple[Tensor, Tensor]:
    """Write every tensor as it is stored; return sample ids and the dense model's last stream for them."""
    for name in task.checkpoint.tensors if writer else ():
        write_tensor(writer, name, task.checkpoint.read_one(name))
    ids = task.windows.ids[: SAMPLE[0], : SAMPLE[1]]
    with HiddenStore((*ids.shape, task.spec.shape.hidden)) as store:
        fill_hidden(task.checkpoint, task.spec, Windows(ids, task.windows.source), store)
        return ids, store.read(0, len(ids))


def rebuild_checkpoint(
    task: Task, plan: Plan, new: ModelSpec, writer: CheckpointWriter | None, progress: Progress
) -> tuple[Tensor, Tensor, Tensor]:
    """Run pass 2, writing each layer as it is done; return sample ids, their last stream, and the final norm."""
    checkpoint, spec, windows = task.checkpoint, task.spec, share_text(task.group, task.windows)
    types = storage_types(checkpoint, spec, new)
    with ExitStack() as stack:
        job = Rebuild(checkpoint, spec, new, plan, task.recipe, types, task.group)
        streams = open_streams(stack, job, windows)
        fill_embeddings(checkpoint, spec, windows, streams.dense)
        for role in ("embed", "head"):
            for name, tensor in cut_ends(job, (role,)).items():
                if name == "embed":
                    start_pruned(new, windows, streams, tensor)
                write_tensor(writer, new.names[name], tensor)
                del tensor
        progress("rebuild", 0, len(new.layers))
        layers = rebuild_layers(job, streams)
        for place, layer in enumerate(new.layers):
            write_layer(writer, layer, next(layers))
            progress("rebuild", place + 1, len(new.layers))
        final = finish_norm(job, streams)
        write_tensor(writer, new.names["final_norm"], final)
        ids = windows.ids[: SAMPLE[0], : SAMPLE[1]]
        return ids, streams.pruned.read(0, len(ids))[:, : SAMPLE[1]], final


def write_layer(writer: CheckpointWriter | None, layer: LayerSpec, weights: Weights) -> None:
    """Write one layer; nothing of it is held when the next is made."""
    for role, tensor in fuse_parts(layer, weights).items():
        write_tensor(writer, layer.names[role], tensor)


def write_tensor(writer: CheckpointWriter | None, name: str, tensor: Tensor) -> None:
    """Write one tensor in the process that writes."""
    if writer is not None:
        writer.add(name, tensor)


def storage_dtype(checkpoint: Checkpoint, spec: ModelSpec) -> torch.dtype:
    """Return the type that the checkpoint stores its matrices in."""
    return storage_types(checkpoint, spec)["down"]


def plan_checkpoint(task: Task, progress: Progress = ignore_progress) -> Plan:
    """Run pass 1 and return the plan, the same in every process (keeping everything needs no pass).

    Raises UserError where the text has fewer windows than the group has processes.
    """
    # Told: a budget in seconds is as fast as each process finds its machine.
    if task.group.tell(task.recipe.keep == 1 if task.goal is None else task.goal.share == 1):
        return keep_everything(task.spec.shape)
    check_share(task)
    check_rotation(task.spec, task.recipe)
    findings = find_units(task, progress)
    turns = task.recipe.rotate != "none" and "hidden" in task.recipe.axes
    plan = plan_turned(task, findings, progress) if turns else search_plan(open_bench(task), findings, progress)
    plan = replace(plan, notes={**plan.notes, "rotate": task.recipe.rotate if turns else "none"})
    # All made the same one from the same sums; machines that round differently must not go on with two.
    told: Plan = task.group.tell(plan)
    return told


def check_share(task: Task) -> None:
    """Raise UserError where a process would have no window of the text."""
    count, size = len(task.windows.ids), task.group.size
    if count < size:
        raise UserError(
            f"{task.windows.source}: {size} processes cannot share {count} calibration window{'s' * (count > 1)}; "
            f"start at most {count} (--nproc-per-node {count}), or give more text, more --windows or a smaller "
            "--length."
        )


def plan_turned(task: Task, findings: Findings, progress: Progress) -> Plan:
    """Return the plan made on the rotated model; where that took post-norms away, the plan takes them away too."""
    constants = list_constants(report_absorption(findings, task.recipe))
    turned = turn_task(task, findings.pinned, constants)
    gram = collect_stream_gram(turned.checkpoint, turned.spec, task.windows, task.recipe.spill_bytes, task.group)
    plan = search_plan(open_bench(turned), rotated_findings(findings, gram.diagonal()), progress)
    # The rotation is made again from the pinned channels of the dense model when the plan is carried out.
    plan = replace(plan, notes={**plan.notes, "pinned_channels": list(findings.pinned)})
    return absorb_rows(task.spec, findings, task.recipe, plan) if constants else plan


def open_bench(task: Task) -> Bench:
    """Return where the task's plans are tried."""
    return Bench(task.checkpoint, task.spec, task.windows, task.recipe, task.goal, task.group)


def describe_run(recipe: Recipe, windows: Windows) -> dict[str, Any]:
    """Return the part of the manifest that says what was asked for."""
    return {"recipe": {**recipe.__dict__, "axes": list(recipe.axes)}, "text": windows.source, "tokens": windows.tokens}


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan file, in one rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(plan.to_json()) + "\n", encoding="utf-8")
    partial.replace(path)
