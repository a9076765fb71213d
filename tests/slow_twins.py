"""Reference loops: each does by brute force what a fast algorithm of Lightpress does by algebra (float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.decoder import attention_branch, attention_context, make_frame, mlp_activation, mlp_branch
from compress.quantize.blocks import Quantised
from compress.spec import ModelSpec
from compress.weights import Weights


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


# Scores


def unit_outputs(x: Tensor, weight: Tensor, size: int) -> list[Tensor]:
    """What each unit adds to the output, one tensor `[tokens, out]` per unit."""
    return [x[:, at : at + size] @ weight[:, at : at + size].T for at in range(0, x.shape[1], size)]


def sum_likeness(part: Tensor, whole: Tensor, floors: Tensor, explained: bool = False) -> float:
    """Sum over channels of |Pearson|, or of the variance that a line through `part` explains, channel by channel."""
    total = 0.0
    for a, b, floor in zip(part.T, whole.T, floors, strict=True):
        a, b = a - a.mean(), b - b.mean()
        flat_a, flat_b = bool((a @ a) / len(a) <= floor), bool((b @ b) / len(b) <= floor)
        if flat_a or flat_b:
            rho = 1.0 if flat_a and flat_b else 0.0
        else:
            rho = float((a @ b) / (a.norm() * b.norm()))
        total += rho**2 * float(b @ b) / len(b) if explained else abs(rho)
    return total


def noise_floors(parts: list[Tensor]) -> Tensor:
    """Per channel, a millionth of the units' mean squares: a variance below is no variance."""
    return torch.stack([1e-6 * sum((part[:, i] ** 2).mean() for part in parts) for i in range(parts[0].shape[1])])


def kept_likeness(parts: list[Tensor], kept: list[int], explained: bool = False) -> float:
    """Likeness of the sum over the units `kept` to the sum over all."""
    left = sum((parts[unit] for unit in kept), torch.zeros_like(parts[0]))
    return sum_likeness(left, torch.stack(parts).sum(0), noise_floors(parts), explained)


def score_removals(parts: list[Tensor], explained: bool = False) -> list[float]:
    """What likeness goes with each unit."""
    everyone = list(range(len(parts)))
    best = kept_likeness(parts, everyone, explained)
    return [best - kept_likeness(parts, [u for u in everyone if u != gone], explained) for gone in everyone]


def swap_units(parts: list[Tensor], order: list[int], count: int, explained: bool = False) -> list[int]:
    """Greedy swaps, every value computed from scratch: what stays of `count` units."""
    gone, kept = order[: len(order) - count], order[len(order) - count :]
    best, fixed = kept_likeness(parts, kept, explained), set()
    for new in gone:
        tries = [(kept_likeness(parts, [new if u == old else u for u in kept], explained), old)
                 for old in kept if old not in fixed]  # fmt: skip
        if tries and max(tries)[0] > best:
            best, out = max(tries)
            kept = [new if unit == out else unit for unit in kept]
            fixed.add(new)
    return sorted(kept)


def score_features(y: Tensor, x: Tensor, weight: Tensor) -> list[float]:
    """Norm of each input's weight column along the principal directions of `y`, weighted, times the input's norm."""
    centred = y - y.mean(0)
    sizes, directions = torch.linalg.eigh(sum(torch.outer(row, row) for row in centred) / len(y))
    mean, scores = sum(abs(float(size)) for size in sizes) / len(sizes), []
    for place, column in enumerate(weight.T):
        total = 0.0
        for size, direction in zip(sizes, directions.T, strict=True):
            total += float((column @ direction) / (1 + torch.exp(-size.abs() / mean))) ** 2
        scores.append(total**0.5 * float(x[:, place].norm()))
    return scores


def score_rows(rows: Tensor, read: Tensor) -> list[float]:
    """Norm over inputs of each row's weights times the inputs' norms over tokens."""
    return [sum(float(w * x.norm()) ** 2 for w, x in zip(row, read.T, strict=True)) ** 0.5 for row in rows]


def score_mean_products(x: Tensor, weight: Tensor, size: int) -> list[float]:
    """Sum over a unit's inputs of mean over outputs of |weight| times the input's norm."""
    single = [sum(abs(float(w)) for w in weight[:, j]) / len(weight) * float(x[:, j].norm()) for j in range(x.shape[1])]
    return [sum(single[at : at + size]) for at in range(0, len(single), size)]


def score_fluctuations(x: Tensor, weight: Tensor, size: int, power: int) -> list[float]:
    """Mean over a unit's inputs of the standardised (variance times squared weight norm) to a power."""
    single = []
    for j in range(x.shape[1]):
        mean = sum(float(v) for v in x[:, j]) / len(x)
        variance = sum((float(v) - mean) ** 2 for v in x[:, j]) / len(x)
        single.append((variance * float(weight[:, j] @ weight[:, j])) ** power)
    values = torch.tensor(single, dtype=torch.float64)
    values = (values - values.mean()) / values.std()
    return [float(values[at : at + size].mean()) for at in range(0, len(values), size)]


def spread_windows(windows: list[Tensor]) -> list[float]:
    """Per input, the sum over windows of the squared mean of |x| over the window's tokens."""
    means = [[sum(abs(float(v)) for v in column) / len(column) for column in window.T] for window in windows]
    return [sum(value**2 for value in column) for column in zip(*means, strict=True)]


def fit_lines(z: Tensor, y: Tensor, through_origin: bool) -> list[tuple[float, float]]:
    """Per channel, slope and shift of the line through (z, y) that least squares finds."""
    lines = []
    for a, b in zip(z.T, y.T, strict=True):
        columns = a[:, None] if through_origin else torch.stack((a, torch.ones_like(a)), 1)
        found = torch.linalg.lstsq(columns, b[:, None], driver="gelsd").solution[:, 0].tolist()
        lines.append((found[0], 0.0 if through_origin else found[1]))
    return lines


def fill_best(scores: list[list[list[float]]], costs: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Units of each layer and branch: the best of each, then always the best that is left and fits.

    `scores[layer][branch][unit]`; a branch whose next unit does not fit gets no more.
    """
    counts = [[1, 1] for _ in scores]
    left = budget - sum(kv + ffn for kv, ffn in costs)
    waiting = {(i, j): sorted(scores[i][j], reverse=True)[1:] for i in range(len(scores)) for j in (0, 1)}
    while waiting := {key: units for key, units in waiting.items() if units}:
        key = max(waiting, key=lambda key: waiting[key][0])
        cost = costs[key[0]][key[1]]
        if cost > left:
            waiting[key] = []
            continue
        waiting[key] = waiting[key][1:]
        counts[key[0]][key[1]] += 1
        left -= cost
    return counts


def branch_energies(spec: ModelSpec, weights: Weights, index: int, x: Tensor) -> list[float]:
    """Sum of squares that attention and MLP of a layer add to the stream `x`, without each window's first token."""
    context, _ = attention_context(spec, spec.layers[index], weights, x, make_frame(spec, *x.shape[:2]))
    attention = attention_branch(spec, weights, context)
    mlp = mlp_branch(spec, weights, mlp_activation(spec, weights, x + attention))
    return [float(branch[:, 1:].double().pow(2).sum()) for branch in (attention, mlp)]


def output_error(weight: Tensor, quantised: Quantised, gram: Tensor) -> float:
    """tr(E G E^T), E what quantising changed in `weight` `[out, in]`: the squared error of the outputs."""
    missed = weight.double() - quantised.dequantise().double()
    return float((missed @ gram.double()).mul_(missed).sum())
