"""SlimLLM's scores (arXiv 2505.22689; methods 2.3 to 2.5) from second moments: no tensor over tokens is ever held.

With O_u = W_u x_u what unit u adds to the branch's output, the covariance of O_u and O_v in output channel i is
w_ui^T Cov(x_u, x_v) w_vi; every Pearson correlation of sums of units follows from those numbers. The papers' heads
are KV groups here (our extension to grouped attention), and the statistics are the dense model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.importance.branch import KV, Branch
from compress.importance.units import Ranking, damage_of_sets, rank_by_score
from compress.solve import CONSTANT
from compress.stats import Moments

# Above this many units the greedy swaps would need `[hidden, units, units]` numbers; the plain order is used.
MOST_SWAPPED = 64


@dataclass(frozen=True)
class Terms:
    """Per output channel: covariances of the units' outputs with each other and with the sum S of all.

    `own`, `shared` `[hidden, units]`: var(O_u), cov(O_u, S); `total` `[hidden]`: var(S); `floor` `[hidden]`: a variance
    at or below counts as none.
    """

    own: Tensor
    shared: Tensor
    total: Tensor
    floor: Tensor


# Correlations and variances of S, both `[hidden, candidates]`, to one value per candidate (high: nearer to S).
Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Swaps:
    """What greedy swaps read: `pairs` `[hidden, units, units]` are the covariances of the units' outputs."""

    terms: Terms
    pairs: Tensor
    objective: Objective


def sum_correlations(correlation: Tensor, variance: Tensor) -> Tensor:
    """Return sum over channels of |Pearson|: the paper's objective."""
    return correlation.abs().sum(0)


def sum_explained(correlation: Tensor, variance: Tensor) -> Tensor:
    """Return the variance of S that a regression per channel explains: objective `explained_variance` (methods 2.5)."""
    return (correlation.pow(2) * variance).sum(0)


def find_covariance(moments: Moments) -> Tensor:
    """Return the covariance of the inputs `[n, n]`."""
    mean = moments.total / moments.count
    return moments.gram / moments.count - torch.outer(mean, mean)


def find_terms(moments: Moments, weight: Tensor, size: int) -> Terms:
    """Compute each unit's variance and its covariance with the sum of all, per output channel of `weight`."""
    cov, rows = find_covariance(moments), weight.double()
    shared = (rows @ cov * rows).view(len(rows), -1, size).sum(2)
    own = unit_squares(cov, rows, size)
    energy = unit_squares(moments.gram / moments.count, rows, size).sum(1)
    return Terms(own, shared, shared.sum(1), CONSTANT * energy)


def unit_squares(matrix: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return w_u^T M_uu w_u for each row and each unit u, `[rows, units]`."""
    squares = []
    for start in range(0, len(matrix), size):
        part = slice(start, start + size)
        squares.append((rows[:, part] @ matrix[part, part] * rows[:, part]).sum(1))
    return torch.stack(squares, 1)


def find_pairs(moments: Moments, weight: Tensor, size: int) -> Tensor:
    """Return the covariance of O_u and O_v in every output channel, `[hidden, units, units]`."""
    cov, rows = find_covariance(moments), weight.double()
    pairs = [
        (rows[:, start : start + size] @ cov[start : start + size] * rows).view(len(rows), -1, size).sum(2)
        for start in range(0, len(cov), size)
    ]
    return torch.stack(pairs, 1)


def correlate(terms: Terms, covariance: Tensor, variance: Tensor, objective: Objective) -> Tensor:
    """Return the objective `[candidates]` of sums whose covariance with S and variance are `[hidden, candidates]`.

    Pearson with a constant is 1 where both are constant, else 0 (methods 2.10).
    """
    total, floor = terms.total[:, None], terms.floor[:, None]
    flat, flat_total = variance <= floor, total <= floor
    scale = (torch.where(flat, 1.0, variance) * torch.where(flat_total, 1.0, total)).sqrt()
    constant = (flat & flat_total).double()
    correlation = torch.where(flat | flat_total, constant, covariance / scale)
    return objective(correlation.clamp(-1, 1), total.clamp(min=0))


def score_without(terms: Terms, objective: Objective) -> Tensor:
    """Return the objective `[units]` of S without each unit: high means that the unit can go."""
    covariance = terms.total[:, None] - terms.shared
    return correlate(terms, covariance, covariance - terms.shared + terms.own, objective)


def score_all(terms: Terms, objective: Objective) -> float:
    """Return the objective of S itself: the most there is."""
    return float(correlate(terms, terms.total[:, None], terms.total[:, None], objective))


def rank_groups(branch: Branch, objective: Objective, greedy: bool = True) -> Ranking:
    """Rank units by what the objective loses without each; `greedy` swaps then refine the choice of every count."""
    terms = find_terms(branch.moments, branch.weight, branch.size)
    importance = score_all(terms, objective) - score_without(terms, objective)
    ranking = rank_by_score(branch.moments, branch.weight, branch.size, importance)
    if branch.units > MOST_SWAPPED or not greedy:
        return ranking
    swaps = Swaps(terms, find_pairs(branch.moments, branch.weight, branch.size), objective)
    return pick_greedily(branch, ranking, swaps)


def pick_greedily(branch: Branch, ranking: Ranking, swaps: Swaps) -> Ranking:
    """Refine what `ranking` keeps at every count by swaps; the damage becomes that of the refined choice."""
    picks, units = {}, len(ranking.order)
    for gone in range(1, units):
        kept = swap_greedily(swaps, list(ranking.order[gone:]), ranking.order[:gone])
        if kept != ranking.keep(units - gone):
            picks[units - gone] = kept
    removed = [tuple(sorted(set(ranking.order) - set(kept))) for kept in picks.values()]
    damage = list(ranking.damage)
    for count, found in zip(picks, damage_of_sets(branch.moments, branch.weight, removed, branch.size), strict=True):
        damage[units - count] = found
    return replace(ranking, picks=picks, damage=tuple(damage))


def swap_greedily(swaps: Swaps, kept: list[int], gone: tuple[int, ...]) -> tuple[int, ...]:
    """Swap units of `gone`, in order, for those of `kept` that are worth least, while the objective rises.

    A unit swapped in stays, one swapped out is not reconsidered (methods 2.3): the objective never falls.
    """
    terms, old = swaps.terms, list(kept)
    covariance = terms.shared[:, kept].sum(1)
    mix = swaps.pairs[:, kept].sum(1)  # cov(O_u, sum of what is kept), [hidden, units]
    variance = mix[:, kept].sum(1)
    best = float(correlate(terms, covariance[:, None], variance[:, None], swaps.objective))
    for new in gone:
        if not old:
            break
        covariances = covariance[:, None] - terms.shared[:, old] + terms.shared[:, [new]]
        variances = variance[:, None] + change_variance(swaps, mix, old, new)
        values = correlate(terms, covariances, variances, swaps.objective)
        place = int(values.argmax())
        if float(values[place]) > best * (1 + 1e-12):  # more than rounding
            best, covariance, variance = float(values[place]), covariances[:, place], variances[:, place]
            out = old.pop(place)
            mix = mix - swaps.pairs[:, out] + swaps.pairs[:, new]
            kept = [unit for unit in kept if unit != out] + [new]
    return tuple(sorted(kept))


def change_variance(swaps: Swaps, mix: Tensor, old: list[int], new: int) -> Tensor:
    """Return what var(sum) gains when `new` takes the place of each unit of `old`, `[hidden, old]`."""
    own, pair = swaps.terms.own, swaps.pairs[:, new][:, old]
    return own[:, old] + own[:, [new]] - 2 * mix[:, old] + 2 * mix[:, [new]] - 2 * pair


def score_channels(branch: Branch) -> Tensor:
    """Return I_down + I_gate + I_up per FFN channel, `[n]`: PCA feature space and Wanda-type reads (methods 2.4)."""
    reads = branch.reads.square.clamp(min=0)
    total = score_projected(branch.moments, branch.weight)
    for role in ("gate", "up"):
        total = total + (branch.weights[role].double().pow(2) @ reads).sqrt()
    return total


def score_projected(moments: Moments, weight: Tensor) -> Tensor:
    """Return I_down `[n]`: |columns of `weight` along the principal directions, weighted| times |inputs|.

    Directions are eigenvectors of cov(W x); each weighs sigmoid(|m| / mean |m|) with m its eigenvalue.
    """
    rows = weight.double()
    sizes, directions = torch.linalg.eigh(rows @ find_covariance(moments) @ rows.T)
    share = torch.sigmoid(sizes.abs() / sizes.abs().mean().clamp(min=torch.finfo(torch.float64).tiny))
    turned: Tensor = (directions.T @ rows) * share[:, None]
    return turned.pow(2).sum(0).sqrt() * moments.gram.diagonal().clamp(min=0).sqrt()


def rank_channels(branch: Branch) -> Ranking:
    """Rank FFN channels by `score_channels`, least first.

    The paper's code spares the very lowest hundredth, a quirk that it shares with LoRAP (methods 2.4); we do not.
    """
    return rank_by_score(branch.moments, branch.weight, branch.size, score_channels(branch))


def rank_slim(branch: Branch) -> Ranking:
    """Rank as SlimLLM does: Pearson scores with greedy swaps for KV groups, PCA importance for channels."""
    return rank_groups(branch, sum_correlations) if branch.kind == KV else rank_channels(branch)


def rank_explained(branch: Branch) -> Ranking:
    """Rank as `rank_slim`, but KV groups by the variance that a regression per channel would explain (methods 2.5)."""
    return rank_groups(branch, sum_explained) if branch.kind == KV else rank_channels(branch)


def rank_plain(branch: Branch) -> Ranking:
    """Rank as `rank_slim` without its greedy swaps: the paper's ablation (methods 2.8)."""
    return rank_groups(branch, sum_correlations, greedy=False) if branch.kind == KV else rank_channels(branch)
