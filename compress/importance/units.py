"""Rankings of the units that feed a projection, with the damage of every possible keep-count after repair.

A unit is `size` neighbouring inputs of the projection: one FFN channel of `down`, or all query heads of one KV
group of `o`. Removing the inputs P and refitting the rest by least squares leaves the output error
tr(W_P (A_PP)^-1 W_P^T) with A the inverse Gram matrix (optimal brain surgeon, Hassibi and Stork 1993; SparseGPT).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.solve import invert_gram
from compress.stats import Moments


@dataclass(frozen=True)
class Ranking:
    """`order`: units, first to go first; `damage[k]`: predicted squared error over all tokens after k went."""

    order: tuple[int, ...]
    damage: tuple[float, ...]

    def keep(self, count: int) -> tuple[int, ...]:
        """Return the `count` units that stay, in their old order."""
        return tuple(sorted(self.order[len(self.order) - count :]))


def rank_by_activation(moments: Moments, weight: Tensor, size: int) -> Ranking:
    """Rank units by root mean square input times weight norm, least first (methods 1.2 and section 9).

    The paper's norm type was not readable: root mean square over tokens is our reading.
    """
    share = moments.gram.diagonal() * weight.double().pow(2).sum(0)
    score = share.view(-1, size).sum(1)
    order = torch.argsort(score, stable=True)
    return Ranking(tuple(order.tolist()), damage_of_order(moments, weight, order, size))


def damage_of_order(moments: Moments, weight: Tensor, order: Tensor, size: int) -> tuple[float, ...]:
    """Return the repaired output error after removing the first k units of `order`, for every k."""
    places = unit_inputs(order, size)
    inverse = invert_gram(moments.gram)[places][:, places]
    factor = torch.linalg.cholesky(inverse)
    steps = torch.linalg.solve_triangular(factor, weight.double().T[places], upper=False)
    per_unit = steps.pow(2).sum(1).view(-1, size).sum(1)
    return (0.0, *per_unit.cumsum(0).tolist())


def unit_inputs(units: Tensor, size: int) -> Tensor:
    """Return the inputs of `units`, unit after unit."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def rank_by_obs(moments: Moments, weight: Tensor, size: int) -> Ranking:
    """Rank units greedily by the output error that each removal adds after refitting the rest.

    Few units go one at a time (exact greedy); many go in batches of one per cent, whose members are chosen
    without regard to each other, while their joint error and the refit of the rest are exact.
    """
    inverse, left = invert_gram(moments.gram), weight.double().T.clone()
    units = torch.arange(len(left) // size)
    order: list[int] = []
    damage, batch = [0.0], max(1, len(units) // 100)
    while len(units) > 1:
        gone = pick_units(inverse, left, size, min(batch, len(units) - 1))
        inputs, rest = unit_inputs(gone, size), torch.ones(len(units), dtype=torch.bool)
        rest[gone] = False
        stay = unit_inputs(rest.nonzero().flatten(), size)
        factor = torch.linalg.cholesky(inverse[inputs][:, inputs])
        rows = torch.linalg.solve_triangular(factor, left[inputs], upper=False)
        steps = rows.pow(2).sum(1).view(-1, size).sum(1).cumsum(0)
        bridge = torch.linalg.solve_triangular(factor, inverse[inputs][:, stay], upper=False)
        left = left[stay] - bridge.T @ rows
        inverse = inverse[stay][:, stay] - bridge.T @ bridge
        order += units[gone].tolist()
        damage += [damage[-1] + step for step in steps.tolist()]
        units = units[rest]
    everything = float((weight.double() @ moments.gram * weight).sum())
    return Ranking((*order, *units.tolist()), (*damage, max(everything, damage[-1])))


def pick_units(inverse: Tensor, left: Tensor, size: int, count: int) -> Tensor:
    """Return the `count` units whose removal alone adds the least error, least first."""
    if size == 1:
        errors = left.pow(2).sum(1) / inverse.diagonal()
    else:
        blocks = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, len(left), size)])
        rows = torch.linalg.solve_triangular(
            torch.linalg.cholesky(blocks), left.view(-1, size, left.shape[1]), upper=False
        )
        errors = rows.pow(2).sum((1, 2))
    return torch.argsort(errors, stable=True)[:count]
