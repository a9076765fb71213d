"""What a run will need, from shapes alone: memory, disk, temporary disk."""

from __future__ import annotations

import time

from compress.recipe import Recipe
from compress.shapes import ModelShape
from compress.surgery.job import SMALL_MODEL

HALF, FLOAT, DOUBLE = 2, 4, 8
# Passes over the text in units of one dense forward pass: scoring, selection and probes, both streams, solves
# (benchmarks/cost.py: 4.7 for a large model), and what refining and trying plans adds on a small one.
PASSES, SMALL_PASSES = 5.0, 40.0
TRAINING_SLOWNESS = 2.0
STATES = 3  # of a training run on disk: the last two, and one being written
# Interpreter, torch and its libraries, measured on Linux; the rest of the estimate is about the model.
BASE_BYTES = 350 * 2**20
SMALL_FILES = 16 * 2**20  # tokenizer, configuration, manifest, graph without weights
BATCH_TOKENS = 2048  # the forward runs over so many tokens at once


def estimate_disk(shape: ModelShape, keep: float, itemsize: int, export: bool, ascend: bool = False) -> int:
    """Return bytes of the weights in the stored type, of the ONNX data (float32 at most), and of an Ascend folder."""
    parameters = int(keep * shape.layer_parameters) + shape.embedding_parameters
    return parameters * (itemsize + (FLOAT if export else 0) + (HALF if export and ascend else 0)) + SMALL_FILES


def list_streams(shape: ModelShape, recipe: Recipe) -> list[int]:
    """Return the bytes of each stream over all windows: dense, pruned, a projection's inputs, and others if needed."""
    widest = max(max(layer.query, layer.ffn) for layer in shape.layers)
    tokens = recipe.windows * recipe.length
    others = (recipe.target != "corrected") + may_refine(shape, recipe)
    return [FLOAT * tokens * width for width in (shape.hidden, shape.hidden, widest, *[shape.hidden] * others)]


def may_refine(shape: ModelShape, recipe: Recipe) -> bool:
    """Tell whether layers are refined, which needs the stream before each and a gradient's worth of memory."""
    return recipe.refine > 0 or (recipe.refine < 0 and shape.layer_parameters <= SMALL_MODEL)


def estimate_spill(shape: ModelShape, recipe: Recipe) -> int:
    """Return bytes of hidden states that go to temporary files."""
    return sum(size for size in list_streams(shape, recipe) if size > recipe.spill_bytes)


def estimate_memory(shape: ModelShape, recipe: Recipe, itemsize: int) -> int:
    """Return about the peak bytes of planning and rebuilding: one layer, its statistics, streams, embeddings."""
    hidden = shape.hidden
    largest = max(layer.parameters(hidden) for layer in shape.layers)
    widest = max(max(layer.query, layer.ffn) for layer in shape.layers)
    # Dense and cut weights; refined ones with their gradient and the two moments of the optimiser.
    layer = (6 if may_refine(shape, recipe) else 2) * FLOAT * largest
    # The Gram matrix, its part for the kept units, a factor of that, and the cross products with the target.
    statistics = DOUBLE * (3 * widest * widest + 2 * widest * hidden)
    streams = sum(size for size in list_streams(shape, recipe) if size <= recipe.spill_bytes)
    batch = FLOAT * BATCH_TOKENS * (3 * widest + 6 * hidden)
    embeddings = shape.embedding_parameters * (itemsize + FLOAT)
    return BASE_BYTES + layer + statistics + streams + batch + embeddings


def estimate_seconds(shape: ModelShape, recipe: Recipe) -> float:
    """Return about the seconds of calibrating, planning and rebuilding here, from a short matrix product."""
    tokens = recipe.windows * recipe.length
    passes = SMALL_PASSES if may_refine(shape, recipe) else PASSES
    return passes * 2 * tokens * shape.layer_parameters / measure_flops()


def estimate_training(parameters: int, stored: int, kept: int, ema: bool = False) -> tuple[int, int]:
    """Return bytes of memory and of disk for training all of a model's `parameters` in float32.

    In memory are weights, gradients, two moments (and a running mean, with `ema`), and what the backward pass has
    `kept`; on disk the saved states and the `stored` bytes of the written model.
    """
    weights = FLOAT * parameters
    return kept + (4 + ema) * weights, stored + STATES * (3 + ema) * weights


def estimate_recovery(student: int, teacher: int, tokens: float) -> float:
    """Return about the seconds of training a model of `student` parameters here with one of `teacher` beside it."""
    return TRAINING_SLOWNESS * (6 * student + 2 * teacher) * tokens / measure_flops()


def measure_flops(size: int = 768) -> float:
    """Return floating-point operations per second of a float32 product, with torch's threads."""
    import torch

    a, times = torch.ones(size, size), []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - started)
    return 2 * float(size) ** 3 / min(times)


def free_memory() -> int | None:
    """Return the bytes of memory that a new process can have; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
