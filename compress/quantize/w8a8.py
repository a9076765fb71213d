"""Projections of 8-bit weights and 8-bit inputs, computed with exact integers as Ascend's servers do.

W8A8 (static): one grid for the inputs, y = (q_x q_w^T + quant_bias) * deq_scale. W8A8_DYNAMIC: a scale for each token,
y = (q_x q_w^T) * token scale * weight scale + bias. Weights have one scale per output channel and no offset
(reference/ascend.md, 4.3; vllm-ascend, quantization/methods/w8a8_static.py and w8a8_dynamic.py).

A `QuantisedLinear` stands in the place of a weight in `compress.decoder`: there is one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UserError
from compress.quantize.activations import HIGH, LOW, InputGrid, encode_tokens, round_scales
from compress.quantize.blocks import check_finite
from compress.quantize.gptq import check_gram
from compress.solve import damp_gram

STATIC, DYNAMIC, FLOAT = "W8A8", "W8A8_DYNAMIC", "FLOAT"
EXACT_INPUTS = 1024  # products of so many codes sum to less than 2^24: float32 holds them exactly in any order
SCALE_BITS = 0xFFFFE000  # what the cube reads of a float32 factor: 19 bits (aclnnTransQuantParam)
# Shares of a row's range that the search tries: at 8 bits clipping pays seldom, and never much.
ROW_SHARES = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82)
LAZY = 128  # columns that GPTQ rounds before the others hear of it
ROWS = 2048  # rows that GPTQ works on at once, in float64
RIDGE = 0.01  # of GPTQ, times the mean diagonal


@dataclass(frozen=True)
class LinearForm:
    """How projections are quantised for a server whose model runs in `dtype` (float16 or bfloat16).

    `kind`: static or dynamic inputs. `folds_bias`: the bias goes into the integers (AscendV1) or is added afterwards
    (compressed-tensors, which also has no input offset). `alpha`: strength of smoothing, None for none. `fallback`:
    what static projections become that lose more than `limit` (see compress.quantize.w8a8_stream); "" for nothing.
    `splits`: several devices share the model. Each then rounds its part of the sums of o and down before they are
    added, and only the first has quant_bias (vllm-ascend, w8a8_static.py): an input offset would fill the parts with
    large values that cancel too late, so those two get none (our derivation).
    """

    kind: str = STATIC
    dtype: torch.dtype = torch.bfloat16
    folds_bias: bool = True
    gptq: bool = True
    alpha: float | None = 0.5
    fallback: str = DYNAMIC
    limit: float = 0.02
    splits: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.kind not in (STATIC, DYNAMIC):
            raise UserError(f"Inputs cannot be quantised as {self.kind}: choose {STATIC} or {DYNAMIC}.")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"Smoothing of {self.alpha} is not between 0 and 1; 0.5 suits most models.")
        if self.fallback not in ("", DYNAMIC, FLOAT):
            raise UserError(f"What static inputs harm cannot become {self.fallback}; choose {DYNAMIC} or {FLOAT}.")


@dataclass(frozen=True)
class QuantisedLinear:
    """One projection: int8 `codes` `[out, in]`, float32 `weight_scale` `[out]`, and what its kind needs.

    Static: the inputs' `grid`, float32 `deq_scale` `[out]`, and int32 `quant_bias` `[out]` unless the bias is added
    afterwards. `bias` float32 `[out]` holds values of the model's type; where it is folded too, for the file.
    """

    kind: str
    codes: Tensor
    weight_scale: Tensor
    grid: InputGrid | None = None
    deq_scale: Tensor | None = None
    quant_bias: Tensor | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def step(self) -> Tensor:
        """What one weight code is worth, `[out]` in float64: for static inputs the factor says it, not the scale."""
        if self.grid is None or self.deq_scale is None:
            return self.weight_scale.double()
        return self.deq_scale.double() / self.grid.scale

    def dequantise(self) -> Tensor:
        """Return the weight's values, float32 `[out, in]`."""
        return (self.codes.double() * self.step[:, None]).float()

    def round_inputs(self, x: Tensor) -> Tensor:
        """Return the inputs `[..., in]` as the codes hold them."""
        if self.grid is not None:
            return self.grid.decode(self.grid.encode(x))
        codes, scale = encode_tokens(x)
        return codes * scale

    def apply(self, x: Tensor) -> Tensor:
        """Return the output `[..., out]` for float32 inputs, integers exact, one float32 rounding per factor."""
        if self.grid is None:
            codes, scale = encode_tokens(x)
            y = multiply_exactly(codes, self.codes).float() * scale * self.weight_scale
            return y if self.bias is None else y + self.bias
        assert self.deq_scale is not None
        sums = multiply_exactly(self.grid.encode(x), self.codes)
        if self.quant_bias is not None:
            return (sums + self.quant_bias).float() * self.deq_scale
        y = sums.float() * self.deq_scale
        return y if self.bias is None else y + self.bias

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), keywords: Any = None
    ) -> Any:
        """Stand in for a weight in F.linear; the bias given there is the one this object already has."""
        if function is F.linear and isinstance(args[1], QuantisedLinear):
            return args[1].apply(args[0])
        return NotImplemented


def as_weight(linear: QuantisedLinear) -> Tensor:
    """Return the projection as what `compress.decoder` takes for a weight (it only ever calls F.linear on it)."""
    return cast(Tensor, linear)


def multiply_exactly(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T as int32 `[..., out]` of integer codes within -128 .. 127, `[..., in]` and `[out, in]`."""
    total = torch.zeros(*left.shape[:-1], len(right), dtype=torch.int32)
    for start in range(0, left.shape[-1], EXACT_INPUTS):
        span = slice(start, start + EXACT_INPUTS)
        total += (left[..., span].float() @ right[:, span].float().T).to(torch.int32)
    return total


def cut_scale(scale: Tensor) -> Tensor:
    """Return positive float32 factors rounded to the 19 bits that the cube reads of them."""
    half = 1 << 12
    bits = scale.float().view(torch.int32) + half
    return (bits & (SCALE_BITS - (1 << 32))).view(torch.float32)


def quantise_linear(
    weight: Tensor, bias: Tensor | None, form: LinearForm, grid: InputGrid | None, gram: Tensor | None
) -> QuantisedLinear:
    """Quantise a projection `[out, in]` whose inputs have Gram matrix `gram` `[in, in]` (None: nearest codes).

    With a `grid` its inputs are static. Scales are those that the server will hold; codes are chosen for them.
    """
    check_finite(weight)
    importance = None if gram is None else gram.diagonal()
    wanted = search_rows(weight, importance)
    empty = QuantisedLinear(STATIC if grid else DYNAMIC, weight, wanted.float())
    made = set_scales(empty, wanted, form, grid)
    codes = round_nearest(weight, made.step) if gram is None else round_gptq(weight, gram, made.step)
    return fold_bias(replace(made, codes=codes), bias, form)


def search_rows(weight: Tensor, importance: Tensor | None) -> Tensor:
    """Return the scale of each row `[out]` (float64) of least squared error, weighted by `importance` `[in]`."""
    best, error = torch.ones(len(weight)).double(), torch.full((len(weight),), torch.inf).double()
    weights = torch.ones(weight.shape[1]).double() if importance is None else importance.double()
    peak = weight.abs().amax(1).double() / HIGH
    for share in ROW_SHARES:
        scales = torch.where(peak > 0, peak * share, 1.0)
        missed = ((round_nearest(weight, scales) * scales[:, None] - weight).square() * weights).sum(1)
        best, error = torch.where(missed < error, scales, best), torch.minimum(missed, error)
    return torch.where(peak > 0, best, 0.0)


def set_scales(linear: QuantisedLinear, wanted: Tensor, form: LinearForm, grid: InputGrid | None) -> QuantisedLinear:
    """Return the projection with scales near `wanted` `[out]` (0: a row of zeros) that files and servers hold exactly.

    AscendV1's static factor has the 19 bits that the hardware reads; servers that take compressed-tensors multiply
    input scale and weight scale in the model's type themselves.
    """
    if grid is None:
        return replace(linear, weight_scale=round_scales(wanted, form.dtype).float())
    if not form.folds_bias:
        scale = round_scales(wanted, form.dtype)
        factor = round_scales(scale * grid.scale, form.dtype).float()
        return replace(linear, grid=grid, weight_scale=scale.float(), deq_scale=factor)
    factor = cut_scale(torch.where(wanted > 0, wanted, 1.0) * grid.scale)
    return replace(linear, grid=grid, weight_scale=(factor.double() / grid.scale).float(), deq_scale=factor)


def fold_bias(linear: QuantisedLinear, bias: Tensor | None, form: LinearForm) -> QuantisedLinear:
    """Return the projection with its bias in the model's type, folded into integers where the form says so.

    quant_bias = round(bias / deq_scale - rowsum(codes) * offset) (reference/ascend.md, 4.3).
    """
    kept = None if bias is None else bias.to(form.dtype).float()
    if linear.grid is None or linear.deq_scale is None or not form.folds_bias:
        return replace(linear, bias=kept)
    exact = torch.zeros(len(linear.codes)).double() if bias is None else bias.double()
    folded = exact / linear.deq_scale.double() - linear.codes.double().sum(1) * linear.grid.offset
    return replace(linear, bias=kept, quant_bias=folded.round().to(torch.int32))


def round_nearest(weight: Tensor, steps: Tensor) -> Tensor:
    """Return the nearest int8 codes `[out, in]` for steps `[out]`."""
    return (weight.double() / steps[:, None]).round_().clamp_(LOW, HIGH).to(torch.int8)


def round_gptq(weight: Tensor, gram: Tensor, steps: Tensor) -> Tensor:
    """Return int8 codes `[out, in]` of least output error for steps `[out]`: GPTQ, the strongest input first.

    As compress.quantize.gptq, whose derivation holds; here a whole row has one scale, which is given.
    """
    damped = damp_gram(check_gram(gram, weight.shape[1]), RIDGE)
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    last = order.flip(0)
    factor = torch.linalg.cholesky(damped[last[:, None], last]).flip(0, 1)
    parts = zip(torch.split(weight, ROWS), torch.split(steps, ROWS), strict=True)
    codes = torch.cat([walk_columns(part.double().T[order], scales, factor) for part, scales in parts], 1)
    return codes[torch.argsort(order)].T.contiguous()


def walk_columns(columns: Tensor, steps: Tensor, factor: Tensor) -> Tensor:
    """Return codes `[in, rows]` of weights `[in, rows]`, column by column; H = factor factor^T, upper triangular."""
    errors, codes = torch.zeros_like(columns), torch.empty(columns.shape, dtype=torch.int8)
    pivots = factor.diagonal().tolist()
    for start in range(0, len(columns), LAZY):
        stop = min(start + LAZY, len(columns))
        pending = factor[:start, start:stop].T @ errors[:start]
        for place in range(start, stop):
            heard = torch.addmv(pending[place - start], errors[start:place].T, factor[start:place, place])
            target = columns[place] + heard / pivots[place]
            found = (target / steps).round_().clamp_(LOW, HIGH)
            codes[place], errors[place] = found.to(torch.int8), columns[place] - found * steps
    return codes


def fuse_linears(linears: Sequence[QuantisedLinear]) -> QuantisedLinear:
    """Return projections of one kind that read the same inputs as one, rows after rows; ValueError for mixed ones."""
    first = linears[0]
    if any((linear.kind, linear.grid) != (first.kind, first.grid) for linear in linears):
        raise ValueError("projections that are stored as one must be of one kind, with one input grid")
    return QuantisedLinear(
        first.kind, torch.cat([linear.codes for linear in linears]),
        torch.cat([linear.weight_scale for linear in linears]), first.grid,
        *(join_rows([getattr(linear, name) for linear in linears]) for name in ("deq_scale", "quant_bias", "bias")),
    )  # fmt: skip


def join_rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the parts as one vector, or None where none has any."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


Matrix = Tensor | QuantisedLinear


def as_weights(found: Mapping[str, Matrix]) -> dict[str, Tensor]:
    """Return a layer's weights by role for `compress.decoder`, quantised projections in the place of theirs."""
    return {role: as_weight(value) if isinstance(value, QuantisedLinear) else value for role, value in found.items()}
