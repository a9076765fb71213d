"""Perplexity, divergence from the dense model and agreement with it, streamed a layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calibrate import Progress, fill_embeddings
from compress.checkpoint import Checkpoint
from compress.decoder import compute_logits, make_frame, run_layer
from compress.hidden import HiddenStore, batches, release_memory
from compress.spec import ModelSpec
from compress.text import Windows
from compress.weights import read_head, read_layer


@dataclass(frozen=True)
class Quality:
    """Perplexity over next tokens; agreement and divergence only against another model."""

    perplexity: float
    tokens: int
    agreement: float | None = None
    divergence: float | None = None


def fill_hidden(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, store: HiddenStore, progress: Progress | None = None
) -> None:
    """Run all layers over the windows, leaving the last stream in `store`; one layer's weights in memory."""
    fill_embeddings(checkpoint, spec, windows, store)
    for index, layer in enumerate(spec.layers):
        weights = read_layer(checkpoint, spec, index, torch.float32)
        for start, stop in batches(*windows.ids.shape):
            frame = make_frame(spec, stop - start, windows.ids.shape[1])
            store.write(start, run_layer(spec, layer, weights, store.read(start, stop), frame)[0])
        del weights
        release_memory()
        if progress is not None:
            progress("evaluate", index + 1, len(spec.layers))


def stream_logits(checkpoint: Checkpoint, spec: ModelSpec, store: HiddenStore) -> Iterator[Tensor]:
    """Yield logits `[length - 1, vocab]` of one window after the other, for the tokens that have a successor."""
    ends = read_head(checkpoint, spec, torch.float32)
    for place in range(store.shape[0]):
        yield compute_logits(spec, ends, store.read(place, place + 1)[0, :-1])


def measure_quality(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, progress: Progress | None = None
) -> Quality:
    """Return the perplexity of one model on the windows."""
    with HiddenStore((*windows.ids.shape, spec.shape.hidden)) as store:
        fill_hidden(checkpoint, spec, windows, store, progress)
        losses = [
            float(F.cross_entropy(logits, ids[1:], reduction="sum"))
            for logits, ids in zip(stream_logits(checkpoint, spec, store), windows.ids, strict=True)
        ]
    count = windows.ids[:, 1:].numel()
    return Quality(math.exp(sum(losses) / count), count)


def compare_quality(
    dense: tuple[Checkpoint, ModelSpec], other: tuple[Checkpoint, ModelSpec], windows: Windows,
    progress: Progress | None = None,
) -> tuple[Quality, Quality]:  # fmt: skip
    """Return the quality of both models on the same windows, the second with agreement and KL(dense || other)."""
    shapes = [(*windows.ids.shape, spec.shape.hidden) for _, spec in (dense, other)]
    with HiddenStore(shapes[0]) as one, HiddenStore(shapes[1]) as two:
        fill_hidden(*dense, windows, one, progress)
        fill_hidden(*other, windows, two, progress)
        sums = torch.zeros(4, dtype=torch.float64)
        for first, second, ids in zip(
            stream_logits(*dense, one), stream_logits(*other, two), windows.ids, strict=True
        ):
            sums += compare_logits(first, second, ids[1:])
    count = windows.ids[:, 1:].numel()
    loss_one, loss_two, divergence, agreed = (sums / count).tolist()
    return (
        Quality(math.exp(loss_one), count),
        Quality(math.exp(loss_two), count, agreement=agreed, divergence=divergence),
    )


def compare_logits(dense: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Return sums over tokens `[4]`: loss of dense, loss of other, KL(dense || other), equal top-1."""
    first, second = dense.log_softmax(-1), other.log_softmax(-1)
    divergence = F.kl_div(second, first, reduction="sum", log_target=True)
    agreed = (dense.argmax(-1) == other.argmax(-1)).sum()
    losses = [F.nll_loss(values, targets, reduction="sum") for values in (first, second)]
    return torch.stack([*losses, divergence, agreed.float()]).double()
