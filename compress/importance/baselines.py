"""Scores of other pruners, as importances per unit: the baselines that a default must beat (methods section 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UserError
from compress.importance.branch import FFN, KV, Branch

# The projections whose rows belong to a unit, and the one whose columns do.
READERS = {KV: ("q", "k", "v"), FFN: ("gate", "up")}
WRITER = {KV: "o", FFN: "down"}


def score_random(branch: Branch) -> Tensor:
    """Return random importances `[units]`, the same for the same seed, layer and kind."""
    place = 2 * branch.layer + (branch.kind == FFN)
    random = torch.Generator().manual_seed(branch.seed * 1_000_003 + place)
    return torch.rand(branch.units, generator=random, dtype=torch.float64)


def score_magnitude(branch: Branch) -> Tensor:
    """Return the L2 norm `[units]` of all weights that go with a unit: its rows of the readers, its output columns.

    Stored weights as they are: no norm gain is folded in, biases do not count.
    """
    total = branch.weights[WRITER[branch.kind]].double().pow(2).sum(0).view(branch.units, -1).sum(1)
    for role in READERS[branch.kind]:
        total += branch.weights[role].double().pow(2).sum(1).view(branch.units, -1).sum(1)
    return total.sqrt()


def score_wanda(branch: Branch) -> Tensor:
    """Return mean_i |W_ij| * ||x_j|| summed over the inputs of each unit, `[units]` (Wanda-sp; methods 8.4).

    The weight is the projection as it acts on the stream; scores come from the dense model, not layer after layer.
    """
    norms = branch.moments.gram.diagonal().clamp(min=0).sqrt()
    return (branch.weight.double().abs().mean(0) * norms).view(branch.units, -1).sum(1)


def score_flap(branch: Branch) -> Tensor:
    """Return the standardised fluctuation `[units]`: var(x_j) * sum_i W_ij^2 (FLAP, WIFV; methods 8.3).

    As in the code of its authors: squared for attention, standardised over the inputs of this layer and branch,
    then the mean over the inputs of each unit; so scores of all layers and both branches share one scale.
    """
    moments = branch.moments
    mean = moments.total / moments.count
    metric = (moments.gram.diagonal() / moments.count - mean.pow(2)).clamp(min=0)
    metric = metric * branch.weight.double().pow(2).sum(0)
    if branch.kind == KV:
        metric = metric.pow(2)
    return standardise(metric).view(branch.units, -1).mean(1)


def standardise(values: Tensor) -> Tensor:
    """Return (values - mean) / standard deviation (n - 1 in its denominator); zeros where all values are alike."""
    centred = values - values.mean()
    spread = centred.pow(2).sum() / max(len(values) - 1, 1)
    return torch.zeros_like(values) if spread == 0 else centred / spread.sqrt()


def score_minitron(branch: Branch) -> Tensor:
    """Return the L2 norm over a unit's inputs of Minitron's statistic, `[units]` (arXiv 2408.11796; methods 8.1).

    The statistic of one input is sqrt(sum over windows of (mean over tokens of |x|)^2); it ignores the projection.
    """
    return branch.spread.double().view(branch.units, -1).sum(1).sqrt()


def score_taylor(branch: Branch) -> Tensor:
    """Return the first-order importances `[units]` of a gradient pass (LLM-Pruner; methods 8.6); UserError without."""
    found = branch.first_order
    where = f"layer {branch.layer} ({branch.kind})"
    if found is None:
        raise UserError(
            f"--score taylor needs gradients, and none were computed for {where}; run the gradient pass first or "
            "choose a score that does without, such as obs."
        )
    if found.shape != (branch.units,):
        raise UserError(
            f"--score taylor: {where} has {branch.units} units but the gradient pass left {list(found.shape)} values; "
            "run it again on this model."
        )
    return found.double()
