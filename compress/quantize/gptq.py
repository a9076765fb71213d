"""GPTQ: rounding column by column, with the columns still to come making up for the error (Frantar et al. 2022).

With the damped Gram matrix H = R R^T, R upper triangular, the error tr(E H E^T) of E = W - Q is the sum over columns
k of R_kk^2 |E_k + sum_{j<k} E_j R_jk / R_kk|^2: rounding W_k + sum_{j<k} E_j R_jk / R_kk makes each term least. That
is the same as the paper's algorithm with the Cholesky factor of the inverse (QuIP, Chee et al. 2023, on LDLQ),
without inverting H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError
from compress.quantize.blocks import (
    Format,
    Grid,
    Quantised,
    check_finite,
    search_grid,
    search_scales,
    stack_rows,
    store_codes,
)
from compress.solve import ridge_level

RIDGE = 0.01  # times the mean diagonal, as in the paper
ROWS = 2048  # rows worked on at once, so that the head of a large vocabulary is never held in float64
PANEL = 256  # columns factored at once
LAZY = 128  # columns rounded before the others hear of it, where scales are given


@dataclass(frozen=True)
class Walk:
    """The order of the columns `[in]`, the factor R of the damped Gram matrix in that order, and its diagonal.

    R is the upper triangle of `factor` `[in, in]`; what lies below it means nothing. `importance` `[in]` is in the
    order of the inputs.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor


@dataclass(frozen=True)
class Rounding:
    """Rows being rounded, all columns in the walk's order: weights, errors and codes (uint8) `[in, rows]`.

    `scales` and `zeros` `[blocks, rows]` are in the order of the inputs; `loss` `[rows]` is tr(E H E^T) so far.
    """

    weights: Tensor
    errors: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Rounded:
    """Rows rounded on one walk: codes uint8 `[in, rows]` in the order of the inputs, scales, zeros, loss as above."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    loss: Tensor


Walker = Callable[[Tensor, Walk, Format], Rounding]


def quantise_gptq(
    weight: Tensor, gram: Tensor, bits: int, block: int, symmetric: bool, ridge: float = RIDGE
) -> Quantised:
    """Quantise `weight` `[out, in]` for least output error on inputs with Gram matrix `gram` `[in, in]` (float64).

    Every row keeps the better of two orders: neighbours first to last, with the scales of a block searched on its
    current weights when its first column is reached; or the strongest input first, with scales from the original
    weights, because blocks are of neighbours. Raises UserError for bits and blocks that the operator does not have,
    and for values that are not finite.
    """
    return quantise_readers([weight], gram, Format(bits, block, symmetric), ridge)[0]


def quantise_readers(
    weights: Sequence[Tensor], gram: Tensor, form: Format, ridge: float = RIDGE
) -> list[Quantised]:
    """Quantise weights `[out, in]` that read the same inputs as `quantise_gptq` does each; raises what it raises.

    The Gram matrix is factored once an order for all of them, one order after the other: beside `gram` there is one
    matrix of its size at a time.
    """
    for weight in weights:
        check_finite(weight)
    parts = [part for weight in weights for part in torch.split(weight, ROWS)]
    exact = check_gram(gram, weights[0].shape[1])
    second = round_parts(parts, plan_walk(exact, sort_inputs(exact), ridge), round_by_activation, form)
    first = round_parts(parts, plan_walk(exact, torch.arange(len(exact)), ridge), round_in_place, form)
    pieces = (choose_rows(*pair, form) for pair in zip(first, second, strict=True))
    return [stack_rows((next(pieces) for _ in torch.split(weight, ROWS)), len(weight)) for weight in weights]


def check_gram(gram: Tensor, inputs: int) -> Tensor:
    """Return the Gram matrix in float64; raises UserError unless it is finite and of `inputs` inputs."""
    if gram.shape != (inputs, inputs) or not torch.isfinite(gram.sum()):
        raise UserError(
            f"GPTQ needs a finite Gram matrix of {inputs} x {inputs} inputs and was given one of {list(gram.shape)}; "
            "calibrate again with this checkpoint."
        )
    return gram.double()


def sort_inputs(gram: Tensor) -> Tensor:
    """Return the inputs by falling mean square."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def plan_walks(gram: Tensor, ridge: float = RIDGE) -> tuple[Walk, Walk]:
    """Return both walks at once, for a weight whose rows come block by block (`quantise_part`)."""
    exact = check_gram(gram, len(gram))
    return plan_walk(exact, torch.arange(len(exact)), ridge), plan_walk(exact, sort_inputs(exact), ridge)


def plan_walk(gram: Tensor, order: Tensor, ridge: float) -> Walk:
    """Damp the Gram matrix and factor it with its inputs in `order`."""
    level = ridge_level(gram, ridge)
    copy = gram[order[:, None], order]
    copy.diagonal().add_(level)
    return Walk(order, factor_upper(copy), gram.diagonal() + level)


def factor_upper(matrix: Tensor) -> Tensor:
    """Overwrite the upper triangle of a positive definite `[n, n]` with R, where R R^T was the matrix; return it.

    Panels of columns from the last to the first, in place (a blocked Cholesky factorisation from the other end).
    """
    for stop in range(len(matrix), 0, -PANEL):
        start = max(0, stop - PANEL)
        panel = matrix[:stop, start:stop]
        panel -= matrix[:stop, stop:] @ matrix[start:stop, stop:].T
        corner = torch.linalg.cholesky(panel[start:].flip(0, 1)).flip(0, 1)
        panel[start:] = corner
        panel[:start] = torch.linalg.solve_triangular(corner.T, panel[:start], upper=False, left=False)
    return matrix


def quantise_part(weight: Tensor, walks: tuple[Walk, Walk], form: Format) -> Quantised:
    """Quantise some rows `[rows, in]` on both walks and keep the better one of each row; UserError unless finite."""
    check_finite(weight)
    plain, by_activation = walks
    first = round_parts([weight], plain, round_in_place, form)
    second = round_parts([weight], by_activation, round_by_activation, form)
    return choose_rows(first[0], second[0], form)


def round_parts(parts: Sequence[Tensor], walk: Walk, walker: Walker, form: Format) -> list[Rounded]:
    """Round parts one by one."""
    back, done = torch.argsort(walk.order), []
    for part in parts:
        state = walker(part.double(), walk, form)
        done.append(Rounded(state.codes[back], state.scales, state.zeros, state.loss))
    return done


def choose_rows(first: Rounded, second: Rounded, form: Format) -> Quantised:
    """Return the better one of each row."""
    better = second.loss < first.loss
    codes, scales, zeros = (
        torch.where(better, new, old)
        for new, old in ((second.codes, first.codes), (second.scales, first.scales), (second.zeros, first.zeros))
    )
    return store_rounding(codes, (scales.T.contiguous(), zeros.T.contiguous()), form)


def store_rounding(codes: Tensor, grid: Grid, form: Format) -> Quantised:
    """Return codes `[in, rows]` and a grid `[rows, blocks]` as the operator has them; padding holds the zero."""
    rows, inputs = codes.shape[1], len(codes)
    padded = grid[1].to(torch.uint8).repeat_interleave(form.block, 1)
    padded[:, :inputs] = codes.T
    return store_codes(padded.view(rows, -1, form.block), grid, form, inputs)


def start_rounding(values: Tensor, order: Tensor, form: Format) -> Rounding:
    """Start with no column rounded; `values` `[rows, in]`."""
    weights = values.T[order].contiguous()
    scales = values.new_ones(-(-len(weights) // form.block), len(values))
    return Rounding(
        weights, torch.empty_like(weights), torch.empty_like(weights, dtype=torch.uint8), scales,
        torch.full_like(scales, form.middle), values.new_zeros(len(values)),
    )  # fmt: skip


def round_in_place(values: Tensor, walk: Walk, form: Format) -> Rounding:
    """Round block after block; a block is also the span of columns after which the others hear of its errors."""
    state = start_rounding(values, walk.order, form)
    for start in range(0, len(walk.order), form.block):
        span = slice(start, min(start + form.block, len(walk.order)))
        pending = sum_errors(state, walk, span)
        set_grid(state, walk, span, pending, form)
        round_span(state, walk, span, pending, form)
    return state


def round_by_activation(values: Tensor, walk: Walk, form: Format) -> Rounding:
    """Round the strongest inputs first, with the scales that suit the original weights."""
    state = start_rounding(values, walk.order, form)
    given = search_scales(values, form.bits, form.block, form.symmetric, walk.importance)
    state.scales.copy_(given.scales.T)
    if given.zeros is not None:
        state.zeros.copy_(given.zeros.T)
    for start in range(0, len(walk.order), LAZY):
        span = slice(start, min(start + LAZY, len(walk.order)))
        round_span(state, walk, span, sum_errors(state, walk, span), form)
    return state


def sum_errors(state: Rounding, walk: Walk, span: slice) -> Tensor:
    """Return sum_j E_j R_jk over the columns before `span`, `[span, rows]`."""
    return walk.factor[: span.start, span].T @ state.errors[: span.start]


def set_grid(state: Rounding, walk: Walk, span: slice, pending: Tensor, form: Format) -> None:
    """Search the grid of the block `span` on its weights as compensated for all columns before it."""
    moved = torch.linalg.solve_triangular(walk.factor[span, span].T, pending, upper=False)
    current = (state.weights[span] + moved).T[:, None].contiguous()
    scales, zeros = search_grid(current, walk.importance[span][None, None], form)
    place = span.start // form.block
    state.scales[place], state.zeros[place] = scales[:, 0], zeros[:, 0]


def round_span(state: Rounding, walk: Walk, span: slice, pending: Tensor, form: Format) -> None:
    """Round the columns of `span` one by one; `pending` `[span, rows]` are the errors of those before it."""
    start, places = span.start, (walk.order[span] // form.block).tolist()
    pivots = walk.factor.diagonal()[span].tolist()
    for column, (place, pivot) in enumerate(zip(places, pivots, strict=True), start):
        heard = torch.addmv(pending[column - start], state.errors[start:column].T, walk.factor[start:column, column])
        target = state.weights[column].add(heard, alpha=1 / pivot)
        scales, zeros = state.scales[place], state.zeros[place]
        codes = (target / scales).add_(zeros).round_().clamp_(0, form.top)
        state.codes[column] = codes
        values = codes.sub_(zeros).mul_(scales)
        state.errors[column] = state.weights[column] - values
        missed = target.sub_(values)
        state.loss.addcmul_(missed, missed, value=pivot**2)
