"""What replaces the division of a post-norm by a constant would cost: sums over tokens, constant, predicted error.

A post-norm (attn_out, mlp_out) makes y = g o / r of a branch's raw output o, with gain g and r = rms(o). Absorption
puts a calibrated constant c in the place of 1 / r, so that c g is folded into the projection (Pangu Light, arXiv
2505.20155; methods 1.5: the idea is the paper's, the formulas are our reconstruction). Everything below follows
exactly from a few sums per channel; no output is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError
from compress.family import BRANCHES, POST_NORMS
from compress.parallel import Group
from compress.spec import ModelSpec
from compress.stats import CHUNK

LEAST_SQUARES, MEAN_INVERSE = "least-squares", "mean-inverse"
CONSTANTS = (LEAST_SQUARES, MEAN_INVERSE)
CV_LIMIT = 0.15  # a guess between the 0.1 and 0.2 of methods 1.5; more is bearable where a repair or training follows
FP16_LARGEST = 65504.0


@dataclass
class BranchSums:
    """Sums over tokens of a raw branch output o and r = rms(o), float64; per channel `[hidden]` where a tensor.

    `square`, `cross`, `unit`: sums of o^2, o^2 / r and (o / r)^2; `peak`: the largest |o|.
    """

    square: Tensor
    cross: Tensor
    unit: Tensor
    peak: Tensor
    rms: float = 0.0
    rms_square: float = 0.0
    inverse: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, channels: int) -> BranchSums:
        """Start with no tokens."""
        square, cross, unit, peak = torch.zeros(4, channels, dtype=torch.float64)
        return cls(square, cross, unit, peak)

    def update(self, outputs: Tensor, eps: float) -> None:
        """Add tokens `[tokens, hidden]`; r holds the norm's `eps`, so that o / r is what the norm makes of o."""
        for start in range(0, len(outputs), CHUNK):
            rows = outputs[start : start + CHUNK]
            square = rows.double().pow(2)
            mean = square.mean(-1) + eps
            inverse = mean.rsqrt()
            self.square += square.sum(0)
            self.cross += inverse @ square
            self.unit += mean.reciprocal() @ square
            self.peak = torch.maximum(self.peak, rows.abs().amax(0).double())
            self.rms += float(mean.sqrt().sum())
            self.rms_square += float(mean.sum())
            self.inverse += float(inverse.sum())
            self.count += len(rows)

    def merge(self, other: BranchSums) -> BranchSums:
        """Return the sums of both token sets together."""
        return BranchSums(
            self.square + other.square, self.cross + other.cross, self.unit + other.unit,
            torch.maximum(self.peak, other.peak), self.rms + other.rms, self.rms_square + other.rms_square,
            self.inverse + other.inverse, self.count + other.count,
        )  # fmt: skip

    def reduce(self, group: Group) -> None:
        """Become the sums of all processes' tokens."""
        group.add((self.square, self.cross, self.unit))
        self.peak = torch.stack(group.gather(self.peak)).amax(0)
        self.rms, self.rms_square, self.inverse = group.total(self.rms, self.rms_square, self.inverse)
        self.count = int(group.total(self.count)[0])

    @property
    def variation(self) -> float:
        """Coefficient of variation of r: its standard deviation over its mean; 0 without tokens."""
        if not self.count:
            return 0.0
        mean = self.rms / self.count
        return math.sqrt(max(self.rms_square / self.count - mean**2, 0.0)) / mean

    def error(self, gain: Tensor, constant: float) -> float:
        """Return |c g o - g o / r| / |g o / r| over all tokens; exact. 0 where the branch is silent."""
        weight = gain.pow(2)
        target = float((weight * self.unit).sum())
        left = float((weight * (self.unit - 2 * constant * self.cross + constant**2 * self.square)).sum())
        return math.sqrt(max(left, 0.0) / target) if target else 0.0


@dataclass
class PostNormSums:
    """Sums for one post-norm of one layer: ordinary tokens decide, sink tokens (and the first) are kept apart.

    `gain` `[hidden]` is the stored weight plus the family's offset, in float64. A wrong branch at a sink destroys the
    attention that rests on it, hence the second account (methods 1.5, 7.4).
    """

    layer: int
    role: str
    gain: Tensor
    eps: float
    ordinary: BranchSums
    sinks: BranchSums

    @classmethod
    def start(cls, spec: ModelSpec, layer: int, role: str, weight: Tensor) -> PostNormSums:
        """Start with no tokens; `weight` `[hidden]` is the norm as stored."""
        gain, channels = weight.double() + spec.norm_offset, len(weight)
        return cls(layer, role, gain, spec.eps, BranchSums.empty(channels), BranchSums.empty(channels))

    def update(self, raw: Tensor, mask: Tensor) -> None:
        """Add what a branch's last projection gave out, `[..., hidden]`; `mask` `[...]` is True for ordinary tokens."""
        self.ordinary.update(raw[mask], self.eps)
        self.sinks.update(raw[~mask], self.eps)

    def merge(self, other: PostNormSums) -> PostNormSums:
        """Return the sums of both token sets together."""
        ordinary, sinks = self.ordinary.merge(other.ordinary), self.sinks.merge(other.sinks)
        return PostNormSums(self.layer, self.role, self.gain, self.eps, ordinary, sinks)

    def reduce(self, group: Group) -> None:
        """Become the sums of all processes' tokens."""
        self.ordinary.reduce(group)
        self.sinks.reduce(group)


def start_post_norms(spec: ModelSpec, layer: int, weights: Mapping[str, Tensor]) -> dict[str, PostNormSums]:
    """Return empty sums for each post-norm that the layer has, by role."""
    return {role: PostNormSums.start(spec, layer, role, weights[role]) for role in POST_NORMS if role in weights}


def observe_post_norm(sums: Mapping[str, PostNormSums], role: str, raw: Tensor, mask: Tensor) -> None:
    """Add one branch's raw outputs `[batch, sequence, hidden]` (before the norm) if its norm is observed."""
    if role in sums:
        sums[role].update(raw, mask)


@dataclass(frozen=True)
class AbsorbReport:
    """What absorbing one post-norm does to its branch; errors are relative L2 errors of the branch output.

    cv: coefficient of variation of rms(o). error: predicted, exact on the tokens summed. sink_error: the same constant
    on sink and first tokens. constant: what replaces 1 / rms. peak: the largest |c g o| of any token.
    """

    layer: int
    role: str
    cv: float
    error: float
    sink_error: float
    constant: float
    peak: float
    go: bool
    overflow: bool


def fit_constant(sums: PostNormSums, rule: str = LEAST_SQUARES) -> float:
    """Return the constant c in the place of 1 / rms.

    `least-squares` minimises |c g o - g o / r| (our derivation, methods 1.5). `mean-inverse` is E[1 / r], Pangu
    Light's form as far as it is known (low confidence), and known to come out too large: tokens of tiny rms drive it.
    Raises UserError without ordinary tokens and for an unknown rule.
    """
    seen = sums.ordinary
    if not seen.count:
        raise UserError(
            f"No ordinary token was seen behind the {BRANCHES[sums.role]} of layer {sums.layer}, so its norm has no "
            "constant to be absorbed with; give longer calibration text (--text)."
        )
    if rule not in CONSTANTS:
        raise UserError(f"The absorption constant '{rule}' is not one of {', '.join(CONSTANTS)}.")
    weight = sums.gain.pow(2)
    scale = float((weight * seen.square).sum())
    # A silent branch leaves nothing to fit; any constant is exact, and E[1 / r] is finite.
    if rule == MEAN_INVERSE or not scale > 0:
        return seen.inverse / seen.count
    return float((weight * seen.cross).sum()) / scale


def describe_absorption(sums: PostNormSums, rule: str = LEAST_SQUARES, limit: float = CV_LIMIT) -> AbsorbReport:
    """Predict what absorbing a post-norm costs; `go` where the coefficient of variation is below `limit`."""
    constant, cv = fit_constant(sums, rule), sums.ordinary.variation
    peak = torch.maximum(sums.ordinary.peak, sums.sinks.peak) * sums.gain.abs() * abs(constant)
    return AbsorbReport(
        layer=sums.layer,
        role=sums.role,
        cv=cv,
        error=sums.ordinary.error(sums.gain, constant),
        sink_error=sums.sinks.error(sums.gain, constant),
        constant=constant,
        peak=float(peak.max()),
        go=cv < limit,
        overflow=float(peak.max()) > FP16_LARGEST,
    )


def check_overflow(reports: Iterable[AbsorbReport]) -> list[str]:
    """Return one warning for each absorbed norm without which a branch outgrows float16 (methods 1.5)."""
    return [
        f"Without the norm behind its {BRANCHES[report.role]}, layer {report.layer} puts out values up to "
        f"{report.peak:.3g}, beyond float16's {FP16_LARGEST:.0f}; keep that norm, or run the model in bfloat16."
        for report in reports
        if report.overflow
    ]
