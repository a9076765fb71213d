"""GPTQ: rounding column by column, with the columns still to come making up for the error (Frantar et al. 2022).

With the damped Gram matrix H = R R^T, R upper triangular, the error tr(E H E^T) of E = W - Q is the sum over columns
k of R_kk^2 |E_k + sum_{j<k} E_j R_jk / R_kk|^2: rounding W_k + sum_{j<k} E_j R_jk / R_kk makes each term least. That
is the same as the paper's algorithm with the Cholesky factor of the inverse (QuIP, Chee et al. 2023, on LDLQ),
without inverting H.
"""

from __future__ import annotations

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
from compress.solve import damp_gram

RIDGE = 0.01  # times the mean diagonal, as in the paper
ROWS = 2048  # rows worked on at once, so that the head of a large vocabulary is never held in float64
LAZY = 128  # columns rounded before the others hear of it, where scales are given


@dataclass(frozen=True)
class Walk:
    """The order of the columns `[in]`, the factor R of the damped Gram matrix in that order, and its diagonal."""

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


def quantise_gptq(
    weight: Tensor, gram: Tensor, bits: int, block: int, symmetric: bool, ridge: float = RIDGE
) -> Quantised:
    """Quantise `weight` `[out, in]` for least output error on inputs with Gram matrix `gram` `[in, in]` (float64).

    Every row keeps the better of two orders: neighbours first to last, with the scales of a block searched on its
    current weights when its first column is reached; or the strongest input first, with scales from the original
    weights, because blocks are of neighbours. Raises UserError for bits and blocks that the operator does not have,
    and for values that are not finite.
    """
    form = Format(bits, block, symmetric)
    check_finite(weight)
    damped = damp_gram(check_gram(gram, weight.shape[1]), ridge)
    walks = plan_walk(damped, torch.arange(len(damped))), plan_walk(damped, sort_inputs(damped))
    return stack_rows([quantise_part(part, walks, form) for part in torch.split(weight, ROWS)])


def check_gram(gram: Tensor, inputs: int) -> Tensor:
    """Return the Gram matrix in float64; raises UserError unless it is finite and of `inputs` inputs."""
    if gram.shape != (inputs, inputs) or not torch.isfinite(gram.sum()):
        raise UserError(
            f"GPTQ needs a finite Gram matrix of {inputs} x {inputs} inputs and was given one of {list(gram.shape)}; "
            "calibrate again with this checkpoint."
        )
    return gram.double()


def sort_inputs(damped: Tensor) -> Tensor:
    """Return the inputs by falling mean square."""
    return torch.argsort(damped.diagonal(), descending=True, stable=True)


def plan_walk(damped: Tensor, order: Tensor) -> Walk:
    """Factor the damped Gram matrix with its inputs in `order`."""
    last = order.flip(0)
    factor = torch.linalg.cholesky(damped[last[:, None], last]).flip(0, 1)
    return Walk(order, factor, damped.diagonal())


def quantise_part(weight: Tensor, walks: tuple[Walk, Walk], form: Format) -> Quantised:
    """Quantise some rows in both orders and keep the better one of each row."""
    values = weight.double()
    plain, by_activation = walks
    first, second = round_in_place(values, plain, form), round_by_activation(values, by_activation, form)
    better = second.loss < first.loss
    codes = torch.where(better, second.codes[torch.argsort(by_activation.order)], first.codes)
    scales, zeros = torch.where(better, second.scales, first.scales), torch.where(better, second.zeros, first.zeros)
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


def output_error(weight: Tensor, quantised: Quantised, gram: Tensor) -> float:
    """Return tr(E G E^T), E what quantising changed in `weight` `[out, in]`: the squared output error (float64)."""
    error, parts = 0.0, zip(torch.split(weight, ROWS), torch.split(quantised.dequantise(), ROWS), strict=True)
    for exact, rounded in parts:
        missed = exact.double() - rounded.double()
        error += float((missed @ gram.double()).mul_(missed).sum())
    return error
