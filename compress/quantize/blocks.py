"""Weight-only block quantisation as ONNX Runtime's operator com.microsoft.MatMulNBits defines it.

A weight `[out, in]` is cut along `in` into blocks; value = (code - zero) * scale, with one scale (and zero) per row
and block. Symmetric blocks have the middle code as zero, and their scale may be negative: the end of greatest
magnitude then takes the code that only one sign has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.errors import UserError

BITS = (4, 8)
SMALLEST_BLOCK = 16
# Shares of the full range that the search tries. With the scale refitted afterwards, six do as well as thirty.
FACTORS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
REFITS = 2
PIECE = 1 << 16  # values worked on at once: they stay in the cache, and a large vocabulary is never held in float64
TINY = torch.finfo(torch.float32).tiny

# Scales and zeros of blocks, both float64 (the scales hold float32 values). Zero and codes are integers >= 0.
Grid = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Format:
    """How blocks are written; raises UserError for bits and blocks that the operator does not have."""

    bits: int
    block: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(
                f"Weights cannot be quantised to {self.bits} bits: ONNX Runtime's MatMulNBits runs 4 and 8 on CPUs; "
                "choose one of them."
            )
        if self.block < SMALLEST_BLOCK or self.block & (self.block - 1):
            raise UserError(
                f"Weights cannot be quantised in blocks of {self.block} inputs: ONNX Runtime's MatMulNBits takes "
                f"powers of two from {SMALLEST_BLOCK} on; choose 32 or 128."
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of symmetric blocks."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Quantised:
    """A quantised weight `[out, inputs]`.

    `codes` uint8 `[out, blocks * block]` (padding holds the zero), `scales` float32 `[out, blocks]`, `zeros` uint8
    `[out, blocks]`, or None where all are 2^(bits - 1).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int
    inputs: int

    def dequantise(self) -> Tensor:
        """Return the values, float32 `[out, inputs]`."""
        values = self.codes.view(*self.scales.shape, self.block).float()
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[..., None].float()
        return values.sub_(zeros).mul_(self.scales[..., None]).flatten(1)[:, : self.inputs].contiguous()

    def pack(self) -> tuple[Tensor, Tensor | None]:
        """Return the operator's inputs: codes uint8 `[out, blocks, block * bits / 8]`, zeros `[out, ceil(.)]` or None.

        With 4 bits the first of two codes is the low half of the byte; each row of zeros ends with a whole byte.
        """
        codes = self.codes.view(*self.scales.shape, self.block)
        if self.bits != BITS[0]:
            return codes, self.zeros
        return join_halves(codes), None if self.zeros is None else join_halves(self.zeros)

    @property
    def bytes(self) -> int:
        """Size of the packed codes, scales and zeros."""
        rows, blocks = self.scales.shape
        zeros = 0 if self.zeros is None else rows * -(-blocks * self.bits // 8)
        return self.codes.numel() * self.bits // 8 + 4 * self.scales.numel() + zeros


def join_halves(codes: Tensor) -> Tensor:
    """Return uint8 `[..., ceil(n / 2)]` with two 4-bit codes a byte, the first one low."""
    odd = codes.shape[-1] % 2
    even = pad(codes, (0, odd)) if odd else codes
    return (even[..., 1::2] << 4).bitwise_or_(even[..., ::2])


def round_to_nearest(weight: Tensor, bits: int, block: int, symmetric: bool) -> Quantised:
    """Quantise `weight` `[out, in]` with the smallest steps that cover the range of each block.

    Raises UserError for bits and blocks that the operator does not have, and for weights that are not finite.
    """
    form = Format(bits, block, symmetric)
    return quantise_rows(weight, form, lambda values: span_range(*find_range(values), form))


def search_scales(
    weight: Tensor, bits: int, block: int, symmetric: bool, importance: Tensor | None = None
) -> Quantised:
    """Quantise `weight` `[out, in]` with the scales of least squared error, weighted by `importance` `[in]` (mean x^2).

    Never worse than `round_to_nearest` by that measure (our reconstruction of the range search that llama.cpp and
    AWQ's clipping do). Raises UserError as `round_to_nearest` does.
    """
    form = Format(bits, block, symmetric)
    if importance is None:
        importance = torch.ones(weight.shape[1])
    shares = cut_blocks(importance.double()[None], block)
    return quantise_rows(weight, form, lambda values: search_grid(values, shares, form))


def quantise_rows(weight: Tensor, form: Format, find: Callable[[Tensor], Grid]) -> Quantised:
    """Quantise `weight` piece by piece; `find` gives the grid of values `[rows, blocks, block]`."""
    check_finite(weight)
    blocks = -(-weight.shape[1] // form.block)
    rows = max(1, PIECE // (blocks * form.block))
    return stack_rows((quantise_piece(part, form, find) for part in torch.split(weight, rows)), len(weight))


def quantise_piece(part: Tensor, form: Format, find: Callable[[Tensor], Grid]) -> Quantised:
    """Quantise a few rows at once."""
    values = cut_blocks(part.double(), form.block)
    grid = find(values)
    return store_codes(encode(values, grid, form), grid, form, part.shape[1])


def check_finite(weight: Tensor) -> None:
    """Raise UserError unless every weight is finite."""
    if not torch.isfinite(weight.sum(dtype=torch.float64)):
        raise UserError(
            f"A weight of shape {list(weight.shape)} holds NaN or infinite values and cannot be quantised; "
            "get a sound copy of the checkpoint."
        )


def cut_blocks(values: Tensor, block: int) -> Tensor:
    """Return `[rows, in]` as `[rows, blocks, block]`, the last block padded with zeros."""
    return pad(values, (0, -values.shape[1] % block)).view(len(values), -1, block)


def store_codes(codes: Tensor, grid: Grid, form: Format, inputs: int) -> Quantised:
    """Return the codes `[rows, blocks, block]` of a grid `[rows, blocks]` in the types of the operator."""
    scales, zeros = grid
    stored = None if form.symmetric else zeros.to(torch.uint8)
    return Quantised(codes.to(torch.uint8).flatten(1), scales.float(), stored, form.bits, form.block, inputs)


def stack_rows(pieces: Iterable[Quantised], rows: int) -> Quantised:
    """Return pieces of rows, `rows` in all, as one weight; a piece can go as soon as the next one comes."""
    start, whole = 0, None
    for piece in pieces:
        whole = whole or start_rows(piece, rows)
        span = slice(start, start + len(piece.codes))
        whole.codes[span], whole.scales[span] = piece.codes, piece.scales
        if whole.zeros is not None and piece.zeros is not None:
            whole.zeros[span] = piece.zeros
        start = span.stop
    if whole is None or start != rows:
        raise ValueError(f"the pieces have {start} rows, not {rows}")
    return whole


def start_rows(piece: Quantised, rows: int) -> Quantised:
    """Return room for `rows` rows like those of `piece`."""
    tensors = [
        None if one is None else one.new_empty(rows, one.shape[1]) for one in (piece.codes, piece.scales, piece.zeros)
    ]
    codes, scales, zeros = tensors
    assert codes is not None and scales is not None
    return Quantised(codes, scales, zeros, piece.bits, piece.block, piece.inputs)


def encode(values: Tensor, grid: Grid, form: Format) -> Tensor:
    """Return the nearest codes (float64) of values `[..., n]` in blocks with the grid `[...]`."""
    scales, zeros = grid
    return (values / scales[..., None]).add_(zeros[..., None]).round_().clamp_(0, form.top)


def find_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of each block's range, which always holds 0: the padding is 0, and 0 must stay 0."""
    return values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)


def span_range(low: Tensor, high: Tensor, form: Format) -> Grid:
    """Return the grid of the smallest steps that has every value from `low` to `high` within half a step."""
    if form.symmetric:
        lower = -low >= high
        far, near = torch.where(lower, low, high).abs(), torch.where(lower, high, low).abs()
        steps = torch.maximum(far / form.middle, near / (form.middle - 1))
        scales = round_scales(torch.where(lower, steps, -steps))
        return scales, torch.full_like(scales, form.middle)
    scales = round_scales((high - low) / form.top)
    return scales, (-low / scales).round()


def round_scales(scales: Tensor) -> Tensor:
    """Return float64 scales that float32 holds exactly; 1 for a block that is all zero (or too small for float32)."""
    rounded = scales.float().double()
    return torch.where(rounded.abs() < TINY, 1.0, rounded)


def search_grid(values: Tensor, importance: Tensor, form: Format) -> Grid:
    """Return the best grid of each block of values `[rows, blocks, block]`, importance `[1, blocks, block]`.

    First the share of the range, then the scale again by least squares for the codes found, as long as that helps.
    """
    low, high = find_range(values)
    grid = span_range(low, high, form)
    codes, error = try_grid(values, grid, importance, form)
    best = (*grid, error, codes)
    for factor in FACTORS[1:]:
        best = keep_better(best, span_range(factor * low, factor * high, form), values, importance, form)
    for _ in range(REFITS):
        best = keep_better(best, refit_grid(best, values, importance), values, importance, form)
    return best[0], best[1]


Trial = tuple[Tensor, Tensor, Tensor, Tensor]  # scales, zeros, weighted squared error, codes


def try_grid(values: Tensor, grid: Grid, importance: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Return the codes and the weighted squared error `[rows, blocks]` of a grid."""
    codes = encode(values, grid, form)
    missed = (codes - grid[1][..., None]).mul_(grid[0][..., None]).sub_(values)
    return codes, missed.square_().mul_(importance).sum(-1)


def keep_better(best: Trial, grid: Grid, values: Tensor, importance: Tensor, form: Format) -> Trial:
    """Return for each block the best trial so far or the new grid, whichever has less error."""
    codes, error = try_grid(values, grid, importance, form)
    better = error < best[2]
    scales, zeros, error = (torch.where(better, new, old) for new, old in zip((*grid, error), best, strict=False))
    return scales, zeros, error, torch.where(better[..., None], codes, best[3])


def refit_grid(best: Trial, values: Tensor, importance: Tensor) -> Grid:
    """Return the grid whose scales are the least-squares fit of the values by the codes found."""
    scales, zeros, _, codes = best
    steps = codes - zeros[..., None]
    weighted = steps * importance
    energy = (weighted * steps).sum(-1)
    # A block without energy has nothing to fit: only zeros, or inputs that never fire.
    fitted = (weighted * values).sum(-1) / torch.where(energy > 0, energy, 1.0)
    rounded = fitted.float().double()
    return torch.where(rounded.abs() < TINY, scales, rounded), zeros
