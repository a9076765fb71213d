"""Calibration text from the model itself: no data needed, and the statistics see what the model says."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.decoder import Past, Weights, compute_logits, make_frame, run_layer
from compress.errors import UserError
from compress.recipe import Recipe
from compress.spec import ModelSpec
from compress.text import Windows, boundary_ids
from compress.weights import embed_rows, read_head, read_layer

Progress = Callable[[str, int, int], None]
SOURCE = "sampled from the model itself"
GROUP = 32  # windows sampled together: bounds the key/value cache


def sample_windows(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, progress: Progress) -> Windows:
    """Sample `recipe.windows` windows of `recipe.length` tokens at temperature 1, each from a document's start.

    The whole model is held in float32, unlike in every other stage; raises UserError when that does not fit.
    """
    needed = 4 * spec.shape.parameters
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if needed > available:
        raise UserError(
            f"{checkpoint.folder}: sampling calibration text needs the whole model in memory "
            f"({needed / 2**30:.1f} GiB of {available / 2**30:.1f}); give text with --text FILE."
        )
    layers = [read_layer(checkpoint, spec, index, torch.float32) for index in range(len(spec.layers))]
    random = torch.Generator().manual_seed(recipe.seed)
    length = min(recipe.length, spec.max_positions)
    groups = []
    for start in range(0, recipe.windows, GROUP):
        size = (min(GROUP, recipe.windows - start), length)
        groups.append(sample_group(checkpoint, spec, layers, size, random))
        progress("sample", start + size[0], recipe.windows)
    return Windows(torch.cat(groups), SOURCE)


def sample_group(
    checkpoint: Checkpoint, spec: ModelSpec, layers: Sequence[Weights], size: tuple[int, int], random: torch.Generator
) -> Tensor:
    """Sample ids `[count, length]` step by step with a key/value cache."""
    count, length = size
    ends, start = read_head(checkpoint, spec, torch.float32), start_tokens(spec, count, random)
    stop = spec.config.get("eos_token_id")
    stops = torch.tensor(stop if isinstance(stop, list) else [stop if stop is not None else -1])
    pasts: list[Past | None] = [None] * len(layers)
    ids = [start]
    for place in range(length - 1):
        x = embed_rows(checkpoint, spec, ids[-1][:, None], torch.float32)
        frame = make_frame(spec, count, 1, place)
        for index, weights in enumerate(layers):
            x, pasts[index] = run_layer(spec, spec.layers[index], weights, x, frame, pasts[index])
        chances = compute_logits(spec, ends, x)[:, 0].softmax(-1)
        drawn = torch.multinomial(chances, 1, generator=random)[:, 0]
        # After the end of a document the next one starts.
        ids.append(torch.where(torch.isin(ids[-1], stops) & ~torch.isin(ids[-1], start), start, drawn))
    return torch.stack(ids, 1)


def start_tokens(spec: ModelSpec, count: int, random: torch.Generator) -> Tensor:
    """Return the first token of each window `[count]`: the document boundary, or random where there is none."""
    boundary = boundary_ids(dict(spec.config))
    if boundary and boundary[0] >= spec.shape.vocab:
        raise UserError(
            f"config.json: the start token {boundary[0]} lies outside the vocabulary of {spec.shape.vocab}; "
            "correct bos_token_id, or give text with --text FILE."
        )
    if boundary:
        return torch.full((count,), boundary[0])
    return torch.randint(spec.shape.vocab, (count,), generator=random)
