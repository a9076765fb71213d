"""Embedding and output head in 8 or 4 bits, whichever the model bears: measured on text held out from calibration.

Going from 8 to 4 bits costs predictions and saves bytes. The layers pay a price for each byte they save: the
Kullback-Leibler divergence of the quantised layers from the dense ones over the bytes saved. The head, which every
decoded token reads as it reads the layers, follows where it pays no more than they do for a byte; the embedding, of
which a token reads one row, so that only memory is saved, where it pays no more than a tenth of that (our rule; the
divergence is the sensitivity, as in the mixed precision of HAWQ and ZeroQ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.decoder import compute_logits
from compress.hidden import HiddenStore, batches
from compress.quantize.blocks import Quantised, stack_rows
from compress.spec import ModelSpec
from compress.text import Windows
from compress.weights import Weights

ENDS = ("auto", "8", "4")
HIGH, LOW = 8, 4
HEAD_PRICE, EMBEDDING_PRICE = 1.0, 0.1  # of what the layers pay for a byte
HELD_TOKENS = 1024  # enough to tell divergences apart; the head sees each of them four times
HELD_SHARE = 8  # at most one window in so many is held out
Quantise = Callable[[Tensor], Quantised]


@dataclass(frozen=True)
class Sensitivity:
    """Mean divergences in nats per token: of the quantised layers, with ends in 8 bits, from the dense model; and from
    that of a head in 4 bits, and of an embedding in 4 bits.
    """

    layers: float
    head: float
    embedding: float


@dataclass(frozen=True)
class EndChoice:
    """Bits of embedding and head, and what they were chosen by (None: nothing was measured)."""

    embedding: int
    head: int
    measured: Sensitivity | None = None


def choose_bits(spec: ModelSpec, found: Sensitivity) -> EndChoice:
    """Return 4 bits for what pays little enough for a byte."""
    share = spec.shape.vocab * spec.shape.hidden / max(spec.shape.layer_parameters, 1)
    embedding, head = (
        LOW if lost <= price * found.layers * share else HIGH
        for lost, price in ((found.embedding, EMBEDDING_PRICE), (found.head, HEAD_PRICE))
    )
    return EndChoice(embedding, head, found)


# Text


def split_windows(windows: Windows) -> tuple[Windows, Windows | None]:
    """Return windows to learn from and to measure on; none where there are too few to spare one."""
    count, length = windows.ids.shape
    held = min(max(1, HELD_TOKENS // length), max(1, count // HELD_SHARE))
    if count < 2:  # noqa: PLR2004 (one for each purpose)
        return windows, None
    # Evenly spread: a file may change its subject on the way.
    places = torch.linspace(0, count - 1, held + 2)[1:-1].round().long()
    kept = torch.ones(count, dtype=torch.bool)
    kept[places] = False
    return Windows(windows.ids[kept], windows.source), Windows(windows.ids[places], windows.source)


def fill_quantised(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, store: HiddenStore, quantise: Quantise
) -> None:
    """Write the scaled embeddings of all windows into `store` as a quantised embedding gives them (row by row)."""
    for start, stop in batches(*windows.ids.shape):
        unique, places = torch.unique(windows.ids[start:stop], return_inverse=True)
        rows = quantise(checkpoint.read_rows(spec.names["embed"], unique, torch.float32)).dequantise()
        store.write(start, rows[places] * spec.embedding_multiplier)


# Matrices, block by block


def quantise_matrix(checkpoint: Checkpoint, name: str, quantise: Quantise) -> Quantised:
    """Quantise a stored matrix with a block of its rows in float32 at a time; `quantise` must treat rows apart."""
    pieces = (quantise(block) for block in checkpoint.read_blocks(name, torch.float32))
    return stack_rows(pieces, checkpoint.tensors[name].shape[0])


def slice_rows(matrix: Quantised, start: int, stop: int) -> Quantised:
    """Return some rows of a quantised matrix."""
    zeros = None if matrix.zeros is None else matrix.zeros[start:stop]
    return Quantised(
        matrix.codes[start:stop], matrix.scales[start:stop], zeros, matrix.bits, matrix.block, matrix.inputs
    )


# Divergence


class Divergence:
    """Sum over tokens of KL(p || q) of two softmaxes whose logits come as blocks `[tokens, part of the vocabulary]`.

    With A = sum e^a and C = sum e^a (a - b): KL = C / A - log A + log sum e^b, each sum relative to its largest logit
    so far (the online softmax of Milakov and Gimelshein 2018).
    """

    def __init__(self, tokens: int) -> None:
        """Start with no logits."""
        self.top_p, self.top_q = (torch.full((tokens,), -torch.inf, dtype=torch.float64) for _ in range(2))
        self.mass_p, self.mass_q, self.cross = (torch.zeros(tokens, dtype=torch.float64) for _ in range(3))

    def update(self, p: Tensor, q: Tensor) -> None:
        """Add the logits of further entries."""
        p, q = p.double(), q.double()
        top_p, top_q = torch.maximum(self.top_p, p.amax(-1)), torch.maximum(self.top_q, q.amax(-1))
        shares, fade = (p - top_p[:, None]).exp_(), (self.top_p - top_p).exp()
        self.cross = self.cross * fade + (shares * (p - q)).sum(-1)
        self.mass_p = self.mass_p * fade + shares.sum(-1)
        self.mass_q = self.mass_q * (self.top_q - top_q).exp() + (q - top_q[:, None]).exp_().sum(-1)
        self.top_p, self.top_q = top_p, top_q

    def mean(self) -> float:
        """Return the mean over tokens, in nats."""
        normal = self.top_q - self.top_p + (self.mass_q / self.mass_p).log()
        return float((self.cross / self.mass_p + normal).mean())


@dataclass(frozen=True)
class Trial:
    """Held-out streams `[windows, length, hidden]`: dense, and behind quantised layers with embeddings in 8, 4 bits."""

    dense: HiddenStore
    high: HiddenStore
    low: HiddenStore

    def read(self) -> list[Tensor]:
        """Return all three as `[tokens, hidden]`."""
        return [store.read(0, store.shape[0]).flatten(0, 1) for store in (self.dense, self.high, self.low)]


def measure_ends(
    checkpoint: Checkpoint, spec: ModelSpec, trial: Trial, high: Quantise, low: Quantised
) -> Sensitivity:
    """Measure what 4 bits cost; `high` makes 8 bits of some of the head's rows, `low` is the head in 4 bits."""
    norm = checkpoint.read_one(spec.names["final_norm"], torch.float32)
    streams, start = trial.read(), 0
    layers, head, embedding = (Divergence(len(streams[0])) for _ in range(3))
    for exact in checkpoint.read_blocks(spec.names["head"], torch.float32):
        small = slice_rows(low, start, start + len(exact)).dequantise()
        rounded = high(exact).dequantise()
        logits = compute_all(spec, norm, streams, (exact, rounded, small))
        layers.update(logits[0, 0], logits[1, 1])
        head.update(logits[1, 1], logits[1, 2])
        embedding.update(logits[1, 1], logits[2, 1])
        start += len(exact)
    return Sensitivity(layers.mean(), head.mean(), embedding.mean())


PAIRS = ((0, 0), (1, 1), (1, 2), (2, 1))  # streams and heads, each: dense, 8 bits, 4 bits


def compute_all(
    spec: ModelSpec, norm: Tensor, streams: Sequence[Tensor], heads: Sequence[Tensor]
) -> dict[tuple[int, int], Tensor]:
    """Return the logits of the pairs (stream, head) that are compared."""
    found = {}
    for stream, head in PAIRS:
        weights: Weights = {"final_norm": norm, "head": heads[head]}
        found[stream, head] = compute_logits(spec, weights, streams[stream])
    return found
