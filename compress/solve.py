"""Ridge least squares from second moments: the repair of a projection whose inputs were cut (methods 2.5, 8.10)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.stats import Moments

RIDGE = 1e-3  # times the mean diagonal of the Gram matrix (reference/quality.md)


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

    The bias is free where the projection has one, else it stays absent; lam is `ridge` times the mean diagonal.
    """
    gram, cross = moments.gram, moments.cross
    mean, target = moments.total / moments.count, moments.target_total / moments.count
    if bias is not None:
        gram = gram - moments.count * torch.outer(mean, mean)
        cross = cross - moments.count * torch.outer(mean, target)
    damped = damp_gram(gram, ridge)
    factor = torch.linalg.cholesky(damped)
    solved = torch.cholesky_solve(cross + ridge_level(gram, ridge) * weight.double().T, factor).T
    if bias is None:
        return solved.to(weight.dtype), None
    return solved.to(weight.dtype), (target - solved @ mean).to(weight.dtype)


def residual_error(moments: Moments, weight: Tensor, bias: Tensor | None = None) -> float:
    """Return sum |W x + b - y|^2 over the tokens in `moments`."""
    exact = weight.double()
    error = moments.target_square - 2 * float((exact.T * moments.cross).sum())
    error += float(((exact @ moments.gram) * exact).sum())
    if bias is not None:
        shift = bias.double()
        drift = exact @ moments.total - moments.target_total
        error += moments.count * float(shift @ shift) + 2 * float(shift @ drift)
    return error
