"""Reference loops: each does by brute force what a fast algorithm of Lightpress does by algebra (float64)."""

from __future__ import annotations

import torch
from torch import Tensor


def stack_ridge(x: Tensor, wanted: Tensor, start: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Append one row per input that pulls the solution towards `start` `[out, n]` with weight `level`."""
    rows = level**0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.cat((x, rows)), torch.cat((wanted, rows @ start.T))


def ridge_level(x: Tensor, ridge: float) -> float:
    """`ridge` times the mean over inputs of the sum of squares over tokens."""
    return ridge * sum(float(column @ column) for column in x.T) / x.shape[1]


def fit_projection(x: Tensor, y: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Least squares on the stacked data, without a bias."""
    rows, wanted = stack_ridge(x, y, start, ridge_level(x, ridge))
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T


def fit_with_bias(x: Tensor, y: Tensor, start: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Least squares with a free bias: one more column, ones on the tokens and nothing on the ridge rows."""
    rows, wanted = stack_ridge(x, y, start, ridge_level(x - x.mean(0), ridge))
    ones = torch.cat((torch.ones(len(x), 1), torch.zeros(x.shape[1], 1))).double()
    solution = torch.linalg.lstsq(torch.cat((rows, ones), 1), wanted, driver="gelsd").solution.T
    return solution[:, :-1], solution[:, -1]


def sum_errors(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Sum |W x + b - y|^2 token by token."""
    shift = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias
    return sum(float((weight @ a + shift - b).pow(2).sum()) for a, b in zip(x, y, strict=True))


def refit_error(x: Tensor, weight: Tensor, kept: list[int], ridge: float) -> float:
    """Error of the best projection that reads only the inputs `kept`, ridge rows included."""
    rows, wanted = stack_ridge(x, x @ weight.T, weight, ridge_level(x, ridge))
    if not kept:
        return float(wanted.pow(2).sum())
    part = rows[:, kept]
    return float((part @ torch.linalg.lstsq(part, wanted, driver="gelsd").solution - wanted).pow(2).sum())


def inputs_of(units: list[int], size: int) -> list[int]:
    """The inputs of units of `size` neighbours."""
    return [unit * size + place for unit in units for place in range(size)]


def refit_curve(x: Tensor, weight: Tensor, order: list[int], size: int, ridge: float) -> list[float]:
    """Refit errors after the first k units of `order` went, for every k."""
    return [refit_error(x, weight, inputs_of(order[gone:], size), ridge) for gone in range(len(order) + 1)]


def remove_greedily(x: Tensor, weight: Tensor, size: int, ridge: float) -> list[int]:
    """Remove the unit whose loss hurts least after a refit from scratch, again and again."""
    left, order = list(range(x.shape[1] // size)), []
    while len(left) > 1:
        errors = [refit_error(x, weight, inputs_of([u for u in left if u != gone], size), ridge) for gone in left]
        order.append(left.pop(errors.index(min(errors))))
    return order + left


def score_activations(x: Tensor, weight: Tensor, size: int) -> list[float]:
    """Sum of (input times weight norm)^2 over tokens and over the inputs of each unit, value by value."""
    scores = [0.0] * (x.shape[1] // size)
    for token in x:
        for place, value in enumerate(token):
            scores[place // size] += float(value) ** 2 * float(weight[:, place].pow(2).sum())
    return scores


def fit_gain(unit: Tensor, wanted: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Per channel, the factor on `unit` that comes nearest to `wanted`, pulled towards `start` (one row per token)."""
    pull, fitted = (ridge * len(unit)) ** 0.5, []
    for column, target, old in zip(unit.T, wanted.T, start, strict=True):
        rows = torch.cat((column, torch.tensor([pull]).double()))[:, None]
        goal = torch.cat((target, (pull * old)[None]))[:, None]
        fitted.append(torch.linalg.lstsq(rows, goal, driver="gelsd").solution[0, 0])
    return torch.stack(fitted)
