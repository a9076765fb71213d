"""A student's answers to prompts: batches of them together, with a key/value cache and no padding.

Prompts of a batch may differ in length. All rows run from the shortest one's length on, a token at a time, and a row
whose prompt goes on takes its next token from there instead of drawing one: every row stands at the same position, so
that no mask is needed. A row that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.decoder import Past, compute_logits, run_layer
from compress.errors import UserError
from compress.recover.functional import Model, embed_tokens
from compress.recover.losses import widen
from compress.recover.model import Student, StudentLayer, make_frame_at
from compress.spec import ModelSpec

CACHE_BYTES, MOST_ROWS = 2**28, 64  # of the keys and values of prompts that are answered together


COLDEST = 1e-3  # temperature: logits over less leave float32


@dataclass(frozen=True)
class SampleOptions:
    """How to draw: `most` new tokens for each prompt, `temperature` (0: the likeliest), nucleus `top_p`, end tokens."""

    most: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what draws nothing."""
        if not (self.temperature == 0 or COLDEST <= self.temperature < float("inf")):
            raise UserError(f"--temperature {self.temperature:g} is none; give 0 for the likeliest token, or about 1.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g} is no share of the probability; give more than 0 and at most 1.")
        if self.most < 1:
            raise UserError(f"--answer-tokens {self.most} is no answer; give at least 1.")


def view_student(student: Student) -> Model:
    """Return the student's weights as they are now, adapters merged, for running without gradients.

    Of a student that processes share, each gets all of it: they gather it together.
    """
    layers = []
    with torch.no_grad(), student.open_ends():
        for layer in student.layers:
            assert isinstance(layer, StudentLayer)
            layers.append({role: tensor.detach() for role, tensor in layer.collect().items()})
        ends = {role: student.end(role).detach() for role in ("embed", "final_norm", "head")}
    return Model(student.spec, tuple(layers), ends)


def make_generator(seed: Sequence[int]) -> torch.Generator:
    """Return a source of random numbers that some numbers decide together."""
    (state,) = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


def count_rows(spec: ModelSpec, tokens: int) -> int:
    """Return how many rows of `tokens` tokens are answered together, by the float32 bytes of their cache."""
    each = 4 * 2 * tokens * sum(layer.kv for layer in spec.shape.layers)
    return max(1, min(MOST_ROWS, CACHE_BYTES // each))


@torch.no_grad()
def answer_prompts(
    model: Model, prompts: Sequence[Sequence[int]], options: SampleOptions, random: torch.Generator
) -> list[list[int]]:
    """Return each prompt followed by up to `most` new tokens; an end token is the last one."""
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    text = torch.zeros(len(prompts), int(sizes.max()) + options.most, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = torch.tensor(prompt)
    ends, stop = sizes + options.most, torch.tensor(options.stop, dtype=torch.long)
    alive, past, width = torch.arange(len(prompts)), list[Past](), int(sizes.min())
    while len(alive):
        logits, past = run_new(model, text[alive, :width], past)
        drawn = draw_tokens(logits, options, random)
        prompted = sizes[alive] > width
        text[alive, width] = torch.where(prompted, text[alive, width], drawn)
        width += 1
        over = ~prompted & (torch.isin(drawn, stop) | (ends[alive] == width))
        ends[alive[over]] = width
        if bool(over.any()):
            rows = torch.nonzero(~over)[:, 0].to(logits.device)
            alive, past = alive[~over], [(key[rows], value[rows]) for key, value in past]
    return [row[:end].tolist() for row, end in zip(text, ends.tolist(), strict=True)]


def run_new(model: Model, ids: Tensor, past: Sequence[Past]) -> tuple[Tensor, list[Past]]:
    """Run what a cache lacks of `ids` `[rows, length]`; return logits `[rows, vocab]` after the last, and the cache."""
    spec, table = model.spec, model.ends["embed"]
    start = past[0][0].shape[2] if past else 0
    if any(start <= limit < ids.shape[1] for limit in list_limits(spec)):
        start = 0  # the other rotary frequencies hold from here on, for the tokens before too
    positions = torch.arange(start, ids.shape[1], device=table.device).expand(len(ids), -1)
    frame, x = make_frame_at(spec, positions, table.dtype), embed_tokens(model, ids[:, start:].to(table.device))
    present = []
    for index, (layer, weights) in enumerate(zip(spec.layers, model.layers, strict=True)):
        x, own = run_layer(spec, layer, weights, x, frame, past[index] if start else None)
        present.append(own)
    return compute_logits(spec, model.ends, x[:, -1]), present


def list_limits(spec: ModelSpec) -> set[int]:
    """Return the lengths above which rotary embeddings change their frequencies."""
    limits = {layer.rope.long_after for layer in spec.layers if layer.rope is not None}
    return {limit for limit in limits if limit is not None}


def draw_tokens(logits: Tensor, options: SampleOptions, random: torch.Generator) -> Tensor:
    """Draw a token for each row of logits `[rows, vocab]`; `[rows]` on the CPU, where the random numbers are."""
    if options.temperature == 0:
        return logits.argmax(-1).cpu()
    chances = (widen(logits) / options.temperature).softmax(-1).cpu()
    if options.top_p < 1:
        chances = keep_nucleus(chances, options.top_p)
    return torch.multinomial(chances, 1, generator=random)[:, 0]


def keep_nucleus(chances: Tensor, share: float) -> Tensor:
    """Return probabilities `[rows, vocab]` with 0 for all but the likeliest tokens that reach `share` together.

    Nucleus sampling (arXiv 1904.09751, section 3.1).
    """
    ranked, ids = chances.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    return torch.zeros_like(chances).scatter(-1, ids, ranked.where(before < share, 0))
