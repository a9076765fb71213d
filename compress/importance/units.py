"""Rankings of the units that feed a projection, with the damage of every possible keep-count after repair.

A unit is `size` neighbouring inputs of the projection: one FFN channel of `down`, or all query heads of one KV
group of `o`. Removing the inputs P and refitting the rest by least squares leaves the output error
tr(W_P (A_PP)^-1 W_P^T) with A the inverse Gram matrix (optimal brain surgeon, Hassibi and Stork 1993; SparseGPT).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from compress.solve import damp_gram, invert_gram, ridge_level
from compress.stats import Moments

QUICK_INPUTS = 1024  # inputs from which greedy selection works in float32


@dataclass(frozen=True)
class Ranking:
    """What a score says about the units of one branch.

    `order`: units, first to go first. `damage[k]`: predicted squared output error over all tokens when k units went
    and the rest was refitted by least squares. `score`: importance of each unit, in unit order (high stays).
    `picks`: kept units by count, for counts at which a score that depends on the count keeps others than the tail
    of `order`; `damage` is then that of the picked units, and need not rise with every step.
    """

    order: tuple[int, ...]
    damage: tuple[float, ...]
    score: tuple[float, ...] = ()
    picks: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def keep(self, count: int) -> tuple[int, ...]:
        """Return the `count` units that stay, in their old order."""
        if count in self.picks:
            return self.picks[count]
        return tuple(sorted(self.order[len(self.order) - count :]))


def rank_by_score(moments: Moments, weight: Tensor, size: int, score: Tensor) -> Ranking:
    """Rank units by importances `[units]`, least first; the damage is that of the refitted rest."""
    order = torch.argsort(score, stable=True)
    damage = damage_of_order(moments, weight, order, size)
    return Ranking(tuple(order.tolist()), damage, tuple(score.tolist()))


def rank_by_activation(moments: Moments, weight: Tensor, size: int) -> Ranking:
    """Rank units by root mean square input times weight norm, least first (methods 1.2 and section 9).

    The paper's norm type was not readable: root mean square over tokens is our reading.
    """
    share = moments.gram.diagonal() * weight.double().pow(2).sum(0)
    return rank_by_score(moments, weight, size, share.view(-1, size).sum(1))


def damage_of_order(moments: Moments, weight: Tensor, order: Tensor, size: int) -> tuple[float, ...]:
    """Return the repaired output error after removing the first k units of `order`, for every k."""
    places = unit_inputs(order, size)
    inverse = invert_gram(moments.gram)[places][:, places]
    factor = torch.linalg.cholesky(inverse)
    steps = torch.linalg.solve_triangular(factor, weight.double().T[places], upper=False)
    per_unit = steps.pow(2).sum(1).view(-1, size).sum(1)
    return sum_steps(moments, weight, [0.0, *per_unit.tolist()])


def damage_of_sets(moments: Moments, weight: Tensor, sets: Iterable[tuple[int, ...]], size: int) -> list[float]:
    """Return the repaired output error after removing each of `sets` (some units, never all of them)."""
    inverse, rows, damage = invert_gram(moments.gram), weight.double().T, []
    for gone in sets:
        places = unit_inputs(torch.tensor(gone), size)
        factor = torch.linalg.cholesky(inverse[places][:, places])
        damage.append(float(torch.linalg.solve_triangular(factor, rows[places], upper=False).pow(2).sum()))
    return damage


def unit_inputs(units: Tensor, size: int) -> Tensor:
    """Return the inputs of `units`, unit after unit."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def group_scores(moments: Moments, weight: Tensor, size: int) -> list[float]:
    """Return the root mean square output norm of each KV group, comparable across layers (S_group, methods 1.2).

    `moments` are of the inputs of `o` `[tokens, heads * head_dim]`, `weight` `[hidden, heads * head_dim]` is `o` as it
    acts on the stream, `size` the inputs of one group. For group u: sqrt(tr(W_u G_uu W_u^T) / tokens). That the
    norm is L2 over tokens and over the group's heads together is our reading.
    """
    exact = weight.double()
    scores = []
    for start in range(0, len(moments.gram), size):
        part = exact[:, start : start + size]
        energy = (part @ moments.gram[start : start + size, start : start + size] * part).sum()
        scores.append(float(energy.clamp(min=0) / max(moments.count, 1)) ** 0.5)
    return scores


def rank_by_obs(moments: Moments, weight: Tensor, size: int) -> Ranking:
    """Rank units greedily by the output error that each removal adds after refitting the rest: that is their score.

    Few units go one at a time (exact greedy); from 128 on they go in batches of 1/64, whose members are chosen
    without regard to each other, while their joint error and the refit of the rest are exact.
    """
    inverse = invert_quickly(moments.gram)
    state = Elimination(inverse, weight.T.to(inverse.dtype, copy=True), size)
    batch = max(1, len(state.units) // 64)
    order: list[int] = []
    steps = [0.0]
    while state.units:
        gone = pick_units(state, min(batch, len(state.units)))
        steps += eliminate_units(state, gone)
        order += gone
    damage = sum_steps(moments, weight, steps)
    added = dict(zip(order, (after - before for before, after in pairwise(damage)), strict=True))
    return Ranking(tuple(order), damage, tuple(added[unit] for unit in range(len(order))))


def invert_quickly(gram: Tensor) -> Tensor:
    """Return the inverse of the damped Gram matrix: in float32 where that halves the time of a large selection.

    The damping bounds the condition; on spectra from flat to 1/i^2 with 2816 inputs, curves agree to 1e-5. A matrix
    that float32 cannot factor is inverted in float64.
    """
    if len(gram) < QUICK_INPUTS:
        return invert_gram(gram)
    damped = damp_gram(gram)
    level = damped.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex((damped / level).to(torch.float32))
    if failed or not torch.isfinite(factor).all():
        return invert_gram(gram)
    return torch.cholesky_inverse(factor).div_(level)


def sum_steps(moments: Moments, weight: Tensor, steps: list[float]) -> tuple[float, ...]:
    """Return the damage curve of single steps; with nothing left to refit the damping has no share in the error."""
    damage = list(accumulate(steps))
    damage[-1] = max(damage[-1] - ridge_level(moments.gram) * float(weight.double().pow(2).sum()), damage[-2])
    return tuple(damage)


class Elimination:
    """The inverse Gram matrix and the refitted projection of the units that are left, changed in place.

    Eliminated rows stay in the matrices (their values no longer matter) until a quarter of them is dead, because
    gathering a large matrix anew costs more than updating it.
    """

    def __init__(self, inverse: Tensor, left: Tensor, size: int) -> None:
        """Start with all units; `inverse` `[n, n]`, `left` `[n, out]`."""
        self.inverse, self.left, self.size = inverse, left, size
        self.units = list(range(len(left) // size))
        self.places = {unit: place for place, unit in enumerate(self.units)}

    def inputs(self, units: list[int]) -> Tensor:
        """Return the rows that hold `units`."""
        return unit_inputs(torch.tensor([self.places[unit] for unit in units]), self.size)

    def drop(self, gone: list[int]) -> None:
        """Forget `gone`, and gather what is left when a quarter of the rows is dead."""
        dead = set(gone)
        self.units = [unit for unit in self.units if unit not in dead]
        if self.units and len(self.units) * self.size <= 0.75 * len(self.left):
            rows = self.inputs(self.units)
            self.inverse, self.left = self.inverse[rows][:, rows], self.left[rows]
            self.places = {unit: place for place, unit in enumerate(self.units)}


def eliminate_units(state: Elimination, gone: list[int]) -> list[float]:
    """Remove units, refit the rest, and return the output error that each removal added."""
    inputs = state.inputs(gone)
    rows = state.inverse[inputs]
    factor = torch.linalg.cholesky(rows[:, inputs])
    moved = torch.linalg.solve_triangular(factor, state.left[inputs], upper=False)
    bridge = torch.linalg.solve_triangular(factor, rows, upper=False)
    state.left.addmm_(bridge.T, moved, alpha=-1)
    state.inverse.addmm_(bridge.T, bridge, alpha=-1)
    state.drop(gone)
    errors: list[float] = moved.pow(2).sum(1).view(-1, state.size).sum(1).tolist()
    return errors


def pick_units(state: Elimination, count: int) -> list[int]:
    """Return the `count` units whose removal alone adds the least error, least first."""
    rows = state.inputs(state.units)
    if state.size == 1:
        norms = torch.linalg.vector_norm(state.left, dim=1)
        errors = norms[rows].pow(2) / state.inverse.diagonal()[rows]
    else:
        blocks = rows.view(-1, state.size)
        parts = torch.stack([state.inverse[block][:, block] for block in blocks])
        moved = torch.linalg.solve_triangular(torch.linalg.cholesky(parts), state.left[blocks], upper=False)
        errors = moved.pow(2).sum((1, 2))
    return [state.units[place] for place in torch.argsort(errors, stable=True)[:count].tolist()]
