"""What 8-bit inputs of projections need: ranges, the static grid of least error, and smoothing that changes nothing.

Smoothing divides input channels by factors s and multiplies the weight columns that read them by s (SmoothQuant, Xiao
et al. 2022, section 4). The division goes into what makes the input: the norm before q, k, v and gate, up; the rows of
v before o; the rows of up before down. All of it is exact; factors follow from the norm weights as they are stored
(our addition), so that rounding those costs nothing either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.spec import LayerSpec, ModelSpec
from compress.surgery.job import ATTENTION, Half

LOW, HIGH = -128, 127  # codes of int8
BINS = 2048
# Shares of the range that the search tries at each end: 0.97^k down to a tenth of it.
SHARES = tuple(0.97**power for power in range(76))
# Stronger smoothing than this would move a problem, not solve it: one channel would then own the weights' range.
STRONGEST = 2.0**6
# What carries the channels into the last projection of a half: scaled rows of it scale them, exactly.
PRODUCERS: Mapping[str, str] = {"o": "v", "down": "up"}
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class InputGrid:
    """How inputs become codes: q = round(x / scale + offset), cut to -128 .. 127 (reference/ascend.md, 4.3)."""

    scale: float
    offset: int
    dtype: torch.dtype

    @property
    def inverse(self) -> float:
        """1 / scale as servers keep it: rounded to the model's type (vllm-ascend, w8a8_static.py)."""
        return float(1.0 / torch.tensor(self.scale, dtype=self.dtype))

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of `x` as whole float32 numbers."""
        return (x * self.inverse + self.offset).round_().clamp_(LOW, HIGH)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""
        return (codes - self.offset) * self.scale


def encode_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of `x` `[..., in]` with a scale for each token `[..., 1]`: max |x| / 127, symmetric."""
    scale = x.abs().amax(-1, keepdim=True) / HIGH
    return (x / torch.where(scale > 0, scale, 1.0)).round_().clamp_(LOW, HIGH), scale


@dataclass
class ChannelRange:
    """Least and greatest value of every channel `[n]` over the tokens seen; both start at 0, which codes must hold."""

    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, channels: int) -> ChannelRange:
        """Start with no tokens."""
        return cls(torch.zeros(channels), torch.zeros(channels))

    def update(self, x: Tensor) -> None:
        """Add tokens `[tokens, n]`."""
        if len(x):
            self.low = torch.minimum(self.low, x.amin(0))
            self.high = torch.maximum(self.high, x.amax(0))

    @property
    def peak(self) -> Tensor:
        """Greatest magnitude of every channel `[n]`."""
        return torch.maximum(-self.low, self.high)

    @property
    def span(self) -> tuple[float, float]:
        """Ends of the range of all channels together."""
        return float(self.low.min()), float(self.high.max())


class Histogram:
    """How much weight values of a range carry, in 2048 bins of equal width; weights `[n]` belong to channels."""

    def __init__(self, span: tuple[float, float], importance: Tensor) -> None:
        """Start with no tokens; `importance` says what an error in a channel costs (mean square of its column)."""
        self.low, self.high = span
        self.importance = importance.double()
        self.mass = torch.zeros(BINS, dtype=torch.float64)

    @property
    def centres(self) -> Tensor:
        """Middle of every bin."""
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.high - self.low) / BINS

    def update(self, x: Tensor) -> None:
        """Add tokens `[tokens, n]`; what lies outside of the range counts in its outermost bins."""
        width = max((self.high - self.low) / BINS, 1e-30)
        places = ((x.double() - self.low) / width).floor_().clamp_(0, BINS - 1).long()
        shares = self.importance.expand_as(places)
        self.mass += torch.bincount(places.flatten(), shares.flatten(), BINS)


def clip_errors(histogram: Histogram, lows: Tensor, highs: Tensor) -> Tensor:
    """Return the expected squared error `[lows, highs]` of codes that cover low .. high only.

    Inside, rounding costs step^2 / 12; outside, what is cut off, squared.
    """
    mass, centre = histogram.mass, histogram.centres
    moments = torch.stack([mass, mass * centre, mass * centre.square()])
    sums = torch.cat([torch.zeros(3, 1, dtype=torch.float64), moments.cumsum(1)], 1)
    below = torch.searchsorted(centre, lows)
    above = torch.searchsorted(centre, highs, right=True)
    left, right = sums[:, below], sums[:, -1:] - sums[:, above]
    lost_left = lows.square() * left[0] - 2 * lows * left[1] + left[2]
    lost_right = highs.square() * right[0] - 2 * highs * right[1] + right[2]
    inside = (sums[0, above][None] - sums[0, below][:, None]).clamp(min=0)
    step = (highs[None] - lows[:, None]) / (HIGH - LOW)
    return lost_left[:, None] + lost_right[None] + inside * step.square() / 12


def search_grid(histogram: Histogram, dtype: torch.dtype, symmetric: bool = False) -> InputGrid:
    """Return the grid of least expected error; its scale is a value of `dtype`, as servers keep it.

    All pairs of shares of the two ends are tried (symmetric: of the greater one). Exhaustive over them.
    """
    shares = torch.tensor(SHARES, dtype=torch.float64)
    if symmetric:
        ends = shares * max(-histogram.low, histogram.high)
        best = int(clip_errors(histogram, -ends, ends).diagonal().argmin())
        return make_grid(-float(ends[best]), float(ends[best]), dtype, symmetric)
    errors = clip_errors(histogram, shares * histogram.low, shares * histogram.high)
    lower, upper = divmod(int(errors.argmin()), len(SHARES))
    return make_grid(SHARES[lower] * histogram.low, SHARES[upper] * histogram.high, dtype)


def make_grid(low: float, high: float, dtype: torch.dtype, symmetric: bool = False) -> InputGrid:
    """Return the grid that covers low .. high, 0 included; an input that is always 0 gets scale 1."""
    wanted = max(-low, high) / HIGH if symmetric else (high - low) / (HIGH - LOW)
    scale = settle_scale(wanted, dtype)
    offset = 0 if symmetric else round(LOW - low / scale)
    return InputGrid(scale, max(LOW, min(HIGH, offset)), dtype)


def settle_scale(wanted: float, dtype: torch.dtype) -> float:
    """Return a value of `dtype` up to 2 % above `wanted` whose rounded inverse is nearest to the true one.

    Servers multiply by the inverse and rescale by the scale, both in `dtype`: what they differ by is an error of every
    output (up to 0.4 % in bf16).
    """
    near = torch.linspace(1.0, 1.02, 33, dtype=torch.float64) * wanted
    scales = round_scales(near, dtype)
    missed = ((1.0 / scales.to(dtype)).double() * scales - 1).abs()
    return float(scales[int(missed.argmin())])


def round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 scales that `dtype` holds, never rounded to 0; 1 for a scale that is 0."""
    least = torch.finfo(dtype).smallest_normal
    rounded = scales.clamp(min=least).to(dtype).double()
    return torch.where(scales > 0, rounded, 1.0)


# Smoothing


def smoothing_factors(peak: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Return s `[n]` (float64) = max|x|^alpha / max|w|^(1 - alpha), of geometric mean 1 (SmoothQuant, equation 4).

    Channels that are never used, and columns that are 0, keep 1.
    """
    used = (peak > 0) & (columns > 0)
    logs = alpha * peak.double().log() - (1 - alpha) * columns.double().log()
    logs = torch.where(used, logs, 0.0)
    logs = torch.where(used, logs - logs.sum() / used.sum().clamp(min=1), 0.0)
    return logs.exp().clamp(1 / STRONGEST, STRONGEST)


def column_peaks(weights: Sequence[Tensor]) -> Tensor:
    """Return max |w| of every column `[in]` over matrices `[out, in]`."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def fold_norm(gain: Tensor, offset: float, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a norm's stored weight with `factors` divided out, rounded to `dtype`, and the factors that this makes.

    (g + offset) = (g' + offset) s holds exactly for the factors returned (float64); a gain of 0 keeps its value and 1.
    """
    exact = gain.double() + offset
    stored = (exact / factors - offset).to(dtype).double()
    usable = (exact != 0) & (stored + offset != 0)
    stored = torch.where(usable, stored, gain.to(dtype).double())
    made = torch.where(usable, exact / (stored + offset), 1.0)
    return stored.to(gain.dtype), made


def smooth_reads(spec: ModelSpec, half: Half, weights: Weights, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Fold factors `[hidden]` into a half's norm and readers, in place; return the factors made.

    Without a norm before the half nothing can carry them, and they are 1.
    """
    if half.reads not in weights:
        return torch.ones_like(factors)
    weights[half.reads], made = fold_norm(weights[half.reads], spec.norm_offset, factors, dtype)
    for role in half.readers:
        weights[role] = scale_columns(weights[role], made)
    return made


def smooth_inputs(layer: LayerSpec, half: Half, weights: Weights, factors: Tensor) -> Tensor:
    """Fold factors `[rows of v or up]` into those rows (and biases) and the last projection's columns, in place.

    Return the factors of the projection's inputs `[in]`: query heads of a group share the value head's.
    """
    producer, shape = PRODUCERS[half.projection], layer.shape
    wide = factors
    if half is ATTENTION:
        wide = factors.view(shape.kv_heads, shape.head_dim).repeat_interleave(shape.group, 0).flatten()
    weights[half.projection] = scale_columns(weights[half.projection], wide)
    weights[producer] = scale_columns(weights[producer].T, 1 / factors).T.contiguous()
    if f"{producer}_bias" in weights:
        weights[f"{producer}_bias"] = scale_columns(weights[f"{producer}_bias"], 1 / factors)
    return wide


def share_heads(layer: LayerSpec, half: Half, values: Tensor) -> Tensor:
    """Return the greatest of `values` `[in]` over the inputs that one row of v or up feeds."""
    if half is not ATTENTION:
        return values
    shape = layer.shape
    return values.view(shape.kv_heads, shape.group, shape.head_dim).amax(1).flatten()


def scale_columns(weight: Tensor, factors: Tensor) -> Tensor:
    """Return a tensor `[..., n]` times float64 factors `[n]`, rounded once."""
    return (weight.double() * factors).to(weight.dtype)
