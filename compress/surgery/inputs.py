"""What reads the stream, fitted to the pruned stream: norms by one constant, projections by least squares.

With n the dense model's normed stream and m the pruned model's, a projection W that used to see n is replaced by
argmin sum |W' m - W n|^2 + lam |W' - W_cut|^2: it makes up for hidden channels that went and for the noise that
earlier layers left (our derivation; the constant alone is the `calibrated` rule of methods 1.4).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from compress.decoder import apply_norm
from compress.hidden import batches
from compress.parallel import Group
from compress.solve import RIDGE, invert_gram, raise_ridge, ridge_level
from compress.stats import Moments, ordinary_tokens
from compress.surgery.job import Half, Rebuild, Streams, Weights

# Tokens of the least squares, for each input and at least: more would take time and change little (see RESULTS.md).
TOKENS_PER_INPUT, TOKENS_TIMES_INPUTS = 4, 2**22
STRIDE = 4
# A cut layer, and its reference: the rows that it keeps, over all hidden channels.
Pair = tuple[Weights, Weights]
Maps = tuple[Tensor, Tensor]


@dataclass
class ScaleSums:
    """Sums over tokens and channels of the wanted norm output times the present one, and of its square."""

    product: float = 0.0
    square: float = 0.0

    def update(self, wanted: Tensor, present: Tensor) -> None:
        """Add tokens `[tokens, hidden]`."""
        self.product += float((wanted * present).sum(dtype=torch.float64))
        self.square += float(present.pow(2).sum(dtype=torch.float64))

    def reduce(self, group: Group) -> None:
        """Become the sums of all processes' tokens."""
        self.product, self.square = group.total(self.product, self.square)

    @property
    def constant(self) -> float:
        """The factor on the present output that comes nearest to the wanted one."""
        return self.product / self.square if self.square > 0 else 1.0


def fit_inputs(job: Rebuild, streams: Streams, half: Half, pair: Pair) -> None:
    """Fit the norm and the projections in `pair[0]` that read the stream; both streams stand before the half."""
    cut, reference = pair
    refits = job.refits_inputs and job.recipe.repair == "lstsq"
    if job.narrows and job.recipe.norms == "calibrated" and half.reads in cut and not refits:  # a refit scales too
        sums = gather_scale(job, streams, half, pair)
        gain = (cut[half.reads] + job.new.norm_offset) * sums.constant
        cut[half.reads] = job.round_to(half.reads, gain - job.new.norm_offset)
    if refits:
        moments = gather_inputs(job, streams, half, pair)
        maps: dict[bool, Maps] = {}
        for role in half.readers:
            refit_reader(job, role, pair, moments, maps)


def gather_scale(job: Rebuild, streams: Streams, half: Half, pair: Pair) -> ScaleSums:
    """Compare the norm's output on both streams, token by token."""
    sums = ScaleSums()
    for wanted, present in normed_tokens(job, streams, half, pair, order_spans(streams)):
        sums.update(job.narrow(wanted), present)
    sums.reduce(job.group)
    return sums


def gather_inputs(job: Rebuild, streams: Streams, half: Half, pair: Pair) -> Moments:
    """Return the moments of the pruned model's normed stream with the dense one's as targets."""
    moments = Moments.empty(job.new.shape.hidden, job.old.shape.hidden)
    enough = max(TOKENS_PER_INPUT * job.new.shape.hidden, TOKENS_TIMES_INPUTS // job.new.shape.hidden)
    for wanted, present in normed_tokens(job, streams, half, pair, choose_spans(job, streams, enough)):
        moments.update(present, wanted)
    moments.reduce(job.group)
    return moments


def order_spans(streams: Streams) -> list[tuple[int, int]]:
    """Return groups of all processes' windows in strides: whoever stops early has seen all parts of the text."""
    spans = list(batches(streams.total, streams.dense.shape[1]))
    return [span for first in range(STRIDE) for span in spans[first::STRIDE]]


def choose_spans(job: Rebuild, streams: Streams, enough: int) -> list[tuple[int, int]]:
    """Return the first of the ordered groups of windows that hold `enough` ordinary tokens together, or all."""
    spans = order_spans(streams)
    if streams.total * streams.dense.shape[1] <= enough:
        return spans
    masks = [read_ordinary(streams, start, stop)[1].sum(1) for start, stop in streams.spans()]
    counts = torch.cat(job.group.gather(torch.cat([torch.zeros(0, dtype=torch.int64), *masks])))
    seen = list(accumulate(int(counts[start:stop].sum()) for start, stop in spans))
    return spans[: bisect_left(seen, enough) + 1]


def read_ordinary(streams: Streams, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return windows of the dense stream, and a mask `[windows, length]` of the tokens that count."""
    x = streams.dense.read(start, stop)
    return x, ordinary_tokens(x)[0] & streams.counted[start:stop, None]


def normed_tokens(
    job: Rebuild, streams: Streams, half: Half, pair: Pair, spans: Iterable[tuple[int, int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ordinary tokens `[tokens, hidden]` of what the half reads: the dense model's, the pruned model's.

    `spans` count the windows of all processes; this one gives what it holds of them.
    """
    cut, reference = pair
    for start, stop in (streams.clip(*span) for span in spans):
        if start < stop:
            x, mask = read_ordinary(streams, start, stop)
            wanted = apply_norm(job.old, reference, half.reads, x[mask])
            yield wanted, apply_norm(job.new, cut, half.reads, streams.pruned.read(start, stop)[mask])


def refit_reader(job: Rebuild, role: str, pair: Pair, moments: Moments, maps: dict[bool, Maps]) -> None:
    """Replace one projection (and its bias) by the fit to what the dense model's rows gave on the dense stream.

    `maps` keeps what all readers of a stream share: the solves with and without a free bias.
    """
    cut, reference = pair
    rows, bias_role = reference[role], f"{role}_bias"
    bias = cut.get(bias_role)
    centered = bias is not None
    if centered not in maps:
        maps[centered] = solve_maps(moments, centered)
    carry, hold = maps[centered]
    weight = rows @ carry + cut[role] @ hold
    cut[role] = job.round_to(role, weight)
    if bias is not None:
        shift = rows.double() @ moments.target_total - weight.double() @ moments.total
        wanted = reference[bias_role] if bias_role in reference else torch.zeros_like(bias)
        cut[bias_role] = job.round_to(bias_role, (wanted + shift / moments.count).to(bias.dtype))


def solve_maps(moments: Moments, centered: bool) -> Maps:
    """Return C^T S `[old, new]` and lam S `[new, new]`, with S = (G + lam I)^-1 and C the products with the targets.

    The ridge solution for a projection W, held to its cut, is then W C^T S + lam W_cut S: one factorisation serves
    all readers. `centered` moments leave the mean to a free bias.
    """
    gram, cross = moments.gram, moments.cross
    if centered:
        mean, target = moments.total / moments.count, moments.target_total / moments.count
        gram = gram - moments.count * torch.outer(mean, mean)
        cross = cross - moments.count * torch.outer(mean, target)
    ridge = raise_ridge(RIDGE, moments.count, len(gram))
    inverse = invert_gram(gram, ridge)
    return (inverse @ cross).T.to(torch.float32), (ridge_level(gram, ridge) * inverse).to(torch.float32)
