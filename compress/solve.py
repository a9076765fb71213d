"""Repairs of a projection whose inputs were cut, all from second moments (methods 2.5, 8.3, 8.10).

`solve_projection` moves the whole matrix (ridge least squares), `solve_diagonal` one factor and shift per output
channel, `solve_bias` the bias alone. Their moments hold the kept inputs x and the wanted outputs y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UserError
from compress.stats import Moments

RIDGE = 1e-3  # times the mean diagonal of the Gram matrix (reference/quality.md)
TOKENS_PER_INPUT = 4  # with fewer tokens, least squares fits the calibration text rather than the model
# A variance below this share of the mean square counts as none: float32 products cannot tell it from rounding.
CONSTANT = 1e-6


def short_of_tokens(count: int, inputs: int) -> bool:
    """Tell whether `count` tokens are too few to refit `inputs` kept dims without a raised ridge (fewer than 4x)."""
    return count < TOKENS_PER_INPUT * inputs


def raise_ridge(ridge: float, count: int, inputs: int) -> float:
    """Return the ridge for a fit with `count` tokens: larger by as much as they fall short of 4 per input."""
    return ridge * max(1.0, TOKENS_PER_INPUT * inputs / max(count, 1))


def ridge_level(gram: Tensor, ridge: float = RIDGE) -> float:
    """Return what damping adds to the diagonal: `ridge` times its mean, at least a tiny number."""
    return max(ridge * float(gram.diagonal().mean()), 1e-12)


def damp_gram(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the damped Gram matrix `[n, n]`."""
    damped = gram.clone()
    damped.diagonal().add_(ridge_level(gram, ridge))
    return damped


def invert_gram(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the inverse of the damped Gram matrix, `[n, n]` in float64."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damp_gram(gram, ridge)))


def solve_projection(
    moments: Moments, weight: Tensor, bias: Tensor | None = None, ridge: float = RIDGE
) -> tuple[Tensor, Tensor | None]:
    """Return `W [out, n]` (and bias) minimising sum |W x + b - y|^2 + lam |W - weight|^2 over the tokens in `moments`.

    The bias is free where the projection has one, else it stays absent; lam is `ridge` times the mean diagonal, raised
    where tokens are short (`short_of_tokens`).
    """
    ridge = raise_ridge(ridge, moments.count, len(moments.gram))
    gram, cross = moments.gram, moments.cross
    mean, target = moments.total / moments.count, moments.target_total / moments.count
    if bias is not None:
        gram = gram - moments.count * torch.outer(mean, mean)
        cross = cross - moments.count * torch.outer(mean, target)
    damped = damp_gram(gram, ridge)
    factor = torch.linalg.cholesky(damped, out=damped)  # in place: the matrix is the largest thing here
    solved = torch.cholesky_solve(cross + ridge_level(gram, ridge) * weight.double().T, factor).T
    if bias is None:
        return solved.to(weight.dtype), None
    return solved.to(weight.dtype), (target - solved @ mean).to(weight.dtype)


def solve_diagonal(moments: Moments, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return diag(a) W and a new bias: per output channel the least-squares fit y_i ~ a_i (W x)_i + b_i (methods 2.5).

    Without a bias the fit goes through the origin. A channel whose output is constant keeps its factor, 1.
    """
    count, exact = moments.count, weight.double()
    product = (exact.T * moments.cross).sum(0) / count
    square = ((exact @ moments.gram) * exact).sum(1) / count
    if bias is None:
        factor = torch.where(square > 0, product / square.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
        return (factor[:, None] * exact).to(weight.dtype), None
    mean, target = exact @ (moments.total / count), moments.target_total / count
    variance = square - mean.pow(2)
    varies = variance > CONSTANT * square
    factor = torch.where(varies, (product - mean * target) / torch.where(varies, variance, 1.0), 1.0)
    return (factor[:, None] * exact).to(weight.dtype), (target - factor * mean).to(bias.dtype)


def solve_bias(moments: Moments, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `weight` as it is and the bias mean(y) - mean(W x): FLAP's compensation (methods 8.3).

    Raises UserError without a bias: there is nothing to move.
    """
    if bias is None:
        raise UserError(
            "--repair bias moves only biases, and this projection has none that could take it; use --repair lstsq or "
            "diagonal, or a family whose projections have biases."
        )
    shift = (moments.target_total - weight.double() @ moments.total) / moments.count
    return weight, shift.to(bias.dtype)
