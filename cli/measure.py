"""Speed and quality of folders, dense beside compressed. Imported only by running verbs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.eager import load_eager
from backends.export_onnx import GRAPH_NAME, export_onnx
from backends.ort import open_onnx
from backends.runtime import Speed, measure_all
from cli.console import Console
from cli.request import BenchSize
from compress.checkpoint import Checkpoint
from compress.checkpoint_writer import MANIFEST_NAME
from compress.errors import UserError
from compress.evaluate import Quality, compare_quality
from compress.report import Metrics
from compress.spec import ModelSpec
from compress.text import Windows
from compress.weights import read_spec

ONNX_FOLDER = "onnx"
NOISY = 1.5  # fastest over slowest round
Model = tuple[Checkpoint, ModelSpec]


def limit_threads(threads: int | None) -> None:
    """Give torch that many threads, if a number was asked for; no verb needs gradients but where it says so."""
    import torch

    torch.set_grad_enabled(False)
    if threads is not None:
        torch.set_num_threads(threads)


def measure_eager(models: Sequence[Model], size: BenchSize) -> list[Speed]:
    """Measure models with torch, all their layers in memory, round by round."""
    return measure_all([load_eager(checkpoint) for checkpoint, _ in models], size.prompt, size.new, size.rounds)


def measure_onnx(models: Sequence[Model], size: BenchSize, console: Console) -> list[Speed]:
    """Measure models with ONNX Runtime, round by round; one without an export gets a temporary one."""
    with ExitStack() as stack:
        folders = [find_export(stack, checkpoint, console) for checkpoint, _ in models]
        return measure_all([open_onnx(path, size.threads) for path in folders], size.prompt, size.new, size.rounds)


def find_export(stack: ExitStack, checkpoint: Checkpoint, console: Console) -> Path:
    """Return the folder of a checkpoint's ONNX graph, exporting to a temporary one where there is none."""
    folder = checkpoint.folder / ONNX_FOLDER
    # Many published folders ship a graph of their own, quantised or stale: only one that Lightpress wrote is measured.
    if (folder / GRAPH_NAME).is_file() and (checkpoint.folder / MANIFEST_NAME).is_file():
        return folder
    return export_scratch(stack, checkpoint, console)


def export_scratch(stack: ExitStack, checkpoint: Checkpoint, console: Console) -> Path:
    """Export a checkpoint to a temporary folder, which goes with the stack."""
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lightpress-bench-")))
    export_onnx(checkpoint, scratch, lambda done, total: console.progress("export", done, total))
    return scratch


def fit_size(size: BenchSize, models: Sequence[Model]) -> BenchSize:
    """Return the size with prompt and new tokens cut so that they fit the shortest context among the models."""
    longest = min(spec.max_positions for _, spec in models)
    new = max(1, min(size.new, longest // 2))
    return replace(size, new=new, prompt=max(1, min(size.prompt, longest - new)))


def describe_speed(speed: Speed, size: BenchSize, runtime: str) -> str:
    """Return how speed was measured, as a line below the table."""
    threads = {None: "all threads", 1: "1 thread"}.get(size.threads, f"{size.threads} threads")
    spread = max(high / low for low, high in (speed.prefill_range, speed.decode_range))
    noise = f"; noisy machine, rounds differ by up to {spread:.1f}x" if spread > NOISY else ""
    return (
        f"Speed: {runtime}, batch 1, {size.prompt} prompt and {size.new} new tokens, {threads}, "
        f"median of {speed.rounds} alternating rounds{noise}."
    )


def compare_models(dense: Model, other: Model, windows: Windows, console: Console) -> tuple[Quality, Quality]:
    """Return the quality of two models on the same windows; UserError when their vocabularies differ."""
    sizes = dense[1].shape.vocab, other[1].shape.vocab
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{dense[0].folder} has {sizes[0]} tokens and {other[0].folder} has {sizes[1]}; "
            "only models with the same vocabulary can be compared."
        )
    return compare_quality(dense, other, windows, console.progress)


def count_model(model: Model) -> dict[str, int]:
    """Return the size entries of a model's metrics."""
    checkpoint, spec = model
    shape = spec.shape
    return {"parameters": shape.parameters, "layer_parameters": shape.layer_parameters, "bytes": checkpoint.nbytes}


def merge_metrics(model: Model, quality: Quality | None, speed: Speed | None) -> Metrics:
    """Join what is known about one model."""
    values: dict[str, Any] = dict(count_model(model))
    if quality is not None:
        values |= {
            "perplexity": quality.perplexity, "agreement": quality.agreement, "divergence": quality.divergence,
        }  # fmt: skip
    if speed is not None:
        values |= {
            "prefill_tokens_per_s": speed.prefill_tokens_per_s, "decode_tokens_per_s": speed.decode_tokens_per_s,
        }  # fmt: skip
    return Metrics(**values)


def pair_checkpoint(checkpoint: Checkpoint) -> Model:
    """Return a checkpoint with its description."""
    return checkpoint, read_spec(checkpoint)
