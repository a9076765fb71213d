"""Layer ratios of other pruners: how many units of each layer stay, from per-layer facts and a parameter budget.

All counts obey the budget (parameters of KV groups and channels; never exceeded) and keep at least one unit of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from compress.errors import UserError
from compress.importance.baselines import standardise
from compress.importance.findings import LayerFindings
from compress.shapes import LayerShape, ModelShape

Counts = tuple[int, int]  # (KV groups, FFN channels) of one layer
Costs = Sequence[Counts]  # parameters of one KV group and of one channel, per layer

CAP = 0.9  # no layer loses a larger share (methods 2.2)
# SlimLLM states two settings: (share of the model removed, share of layers pruned at all, sharpness of the softmax).
SETTINGS = ((0.2, 26 / 32, 10.0), (0.5, 30 / 32, 7.0))
TRIES = 20


def find_costs(layer: LayerShape, hidden: int) -> Counts:
    """Return the parameters of one KV group (with its query heads) and of one channel, biases included."""
    bare = layer.resize(0, 0).parameters(hidden)
    return layer.resize(1, 0).parameters(hidden) - bare, layer.resize(0, 1).parameters(hidden) - bare


def find_budget(shape: ModelShape, keep: float) -> int:
    """Return what is left for units when `keep` of the non-embedding parameters stay; norms and output biases stay."""
    units = sum(
        count * cost
        for layer in shape.layers
        for count, cost in zip((layer.kv_heads, layer.ffn), find_costs(layer, shape.hidden), strict=True)
    )
    return int(keep * shape.layer_parameters) - (shape.layer_parameters - units)


# SlimLLM (methods 2.2)


def slim_ratios(cosines: Sequence[float], remove: float, cap: float = CAP) -> tuple[float, ...]:
    """Return the share removed from each layer, `remove` on average: a softmax over the layers that do least.

    `cosines`: mean cosine of the stream before and after each layer. Raises UserError when `remove` exceeds the cap.
    Between and beyond the paper's settings for 20 % and 50 %, the share of pruned layers and the sharpness follow a
    straight line (our reconstruction); the scale r0 follows from the target, which is hit exactly.
    """
    if not 0 <= remove <= cap:
        raise UserError(
            f"layer ratios cannot remove {remove:.3g} of every layer on average: the most is {cap:g}; keep more."
        )
    share, sharpness = interpolate_settings(remove)
    fewest = math.ceil(remove * len(cosines) / cap - 1e-9)
    picked = min(max(round(share * len(cosines)), fewest, 1), len(cosines))
    order = sorted(range(len(cosines)), key=lambda layer: -cosines[layer])[:picked]
    weights = {layer: math.exp(sharpness * (cosines[layer] - cosines[order[0]])) for layer in order}
    ratios = share_out(weights, remove * len(cosines), cap)
    return tuple(ratios.get(layer, 0.0) for layer in range(len(cosines)))


def interpolate_settings(remove: float) -> tuple[float, float]:
    """Return the share of layers to prune and the sharpness on the line through the paper's two settings."""
    (low, low_share, low_sharpness), (high, high_share, high_sharpness) = SETTINGS
    place = (remove - low) / (high - low)
    share = low_share + place * (high_share - low_share)  # above 1 beyond 65 %: all layers
    return share, low_sharpness + place * (high_sharpness - low_sharpness)


def share_out(weights: Mapping[int, float], total: float, cap: float) -> dict[int, float]:
    """Share `total` out in proportion to `weights`, nobody above `cap`: what is cut off goes to the others."""
    free, shares = dict(weights), dict.fromkeys(weights, cap)
    while free:
        scale = max(total - cap * (len(shares) - len(free)), 0.0) / sum(free.values())
        full = [key for key, weight in free.items() if weight * scale > cap]
        if not full:
            return shares | {key: weight * scale for key, weight in free.items()}
        for key in full:
            del free[key]
    return shares


def slim_counts(layers: Sequence[LayerFindings], costs: Costs, budget: int, step: int = 1) -> tuple[Counts, ...]:
    """Return the kept units of each layer under SlimLLM's ratio, the same for both branches of a layer."""
    remove = 1 - share_kept(layers, costs, budget)
    ratios = slim_ratios([layer.cosine for layer in layers], max(remove, 0.0))
    return count_units(layers, [1 - ratio for ratio in ratios], costs, budget, step)


def uniform_counts(layers: Sequence[LayerFindings], costs: Costs, budget: int, step: int = 1) -> tuple[Counts, ...]:
    """Return the kept units of each layer when every layer and branch keeps the same share."""
    share = share_kept(layers, costs, budget)
    return count_units(layers, [share] * len(layers), costs, budget, step)


# Shares to counts


def share_kept(layers: Sequence[LayerFindings], costs: Costs, budget: int) -> float:
    """Return the budget as a share of what all units cost, at most 1; UserError when not even one unit each fits."""
    least = spend([(1, 1)] * len(layers), costs)
    if budget < least:
        raise UserError(
            f"the budget leaves {budget} parameters for units, but one KV group and one channel in each of the "
            f"{len(layers)} layers take {least}; keep more, or drop layers."
        )
    return min(budget / spend([size_of(layer) for layer in layers], costs), 1.0)


def size_of(layer: LayerFindings) -> Counts:
    """Return how many units of each kind the layer has."""
    return len(layer.kv.order), len(layer.ffn.order)


def spend(counts: Sequence[Counts], costs: Costs) -> int:
    """Return the parameters of these units."""
    return sum(kv * cost[0] + ffn * cost[1] for (kv, ffn), cost in zip(counts, costs, strict=True))


def count_units(
    layers: Sequence[LayerFindings], shares: Sequence[float], costs: Costs, budget: int, step: int = 1
) -> tuple[Counts, ...]:
    """Turn kept shares into counts: KV groups are rounded, and channels (multiples of `step`) take up what that leaves.

    Where the groups alone leave no room for channels, all shares of groups shrink together until they do.
    """
    sizes = [size_of(layer) for layer in layers]
    for tried in range(TRIES + 1):
        factor = 1 - tried / TRIES
        groups = [max(1, int(factor * share * kv + 0.5)) for share, (kv, _) in zip(shares, sizes, strict=True)]
        if spend(fill_channels(groups, shares, sizes, 0.0, step), costs) <= budget:
            return grow_channels(groups, shares, sizes, (costs, budget), step)
    raise refuse_step(step, budget)


def refuse_step(step: int, budget: int) -> UserError:
    """Return the refusal of a step too coarse for the budget."""
    return UserError(f"no counts in steps of {step} channels fit {budget} parameters; take a finer step or keep more.")


def grow_channels(
    groups: Sequence[int], shares: Sequence[float], sizes: Sequence[Counts], limit: tuple[Costs, int], step: int
) -> tuple[Counts, ...]:
    """Return the most channels in proportion to `shares` whose costs stay within the budget of `limit`."""
    costs, budget = limit
    low, high = 0.0, 1 / max(min(shares), 1e-9)  # at the upper end every layer has all channels
    found = fill_channels(groups, shares, sizes, high, step)
    if spend(found, costs) <= budget:
        return found
    for _ in range(60):
        factor = (low + high) / 2
        fits = spend(fill_channels(groups, shares, sizes, factor, step), costs) <= budget
        low, high = (factor, high) if fits else (low, factor)
    return fill_channels(groups, shares, sizes, low, step)


def fill_channels(
    groups: Sequence[int], shares: Sequence[float], sizes: Sequence[Counts], factor: float, step: int
) -> tuple[Counts, ...]:
    """Return counts with `factor` times the share of each layer's channels, all of them or a multiple of `step`."""
    counts = []
    for kv, share, (_, ffn) in zip(groups, shares, sizes, strict=True):
        wanted = factor * share * ffn
        channels = ffn if wanted >= ffn else max(int(wanted) // step * step, min(step, ffn))
        counts.append((kv, channels))
    return tuple(counts)


# FLAP (methods 8.3)


def flap_counts(
    layers: Sequence[LayerFindings], costs: Costs, budget: int, standard: bool = False, step: int = 1
) -> tuple[Counts, ...]:
    """Return the kept units of each layer under one threshold on the scores of all units (FLAP, AL-AM).

    Scores are standardised per layer and branch, unless `standard` says that they come so, as those of the score
    "flap" do. Units go in from the best down, at their cost in parameters; the best of each layer and branch always
    stays. One that no longer fits closes its branch, while cheaper ones elsewhere may still use what is left (ours).
    """
    share_kept(layers, costs, budget)
    counts = [[0, 0] for _ in layers]
    closed: set[tuple[int, int]] = set()
    left = budget
    for layer, branch, units in order_blocks(layers, standard, step):
        cost = units * costs[layer][branch]
        if (layer, branch) in closed:
            continue
        if cost > left:
            closed.add((layer, branch))
            continue
        counts[layer][branch] += units
        left -= cost
    if not all(kv and ffn for kv, ffn in counts):
        raise refuse_step(step, budget)
    return tuple((kv, ffn) for kv, ffn in counts)


def order_blocks(layers: Sequence[LayerFindings], standard: bool, step: int) -> list[tuple[int, int, int]]:
    """Return (layer, branch, units) of all blocks: the first of each branch, then the others by mean score.

    A block is one KV group, or `step` channels next to each other in the order of scores.
    """
    first, later = [], []
    for index, layer in enumerate(layers):
        for branch, (ranking, size) in enumerate(((layer.kv, 1), (layer.ffn, step))):
            scores = torch.tensor(ranking.score, dtype=torch.float64)
            scores = (scores if standard else standardise(scores)).sort(descending=True).values
            blocks = [(float(part.mean()), index, branch, len(part)) for part in torch.split(scores, size)]
            first.append(blocks[0])
            later += blocks[1:]
    later.sort(key=lambda block: -block[0])
    return [(layer, branch, units) for _, layer, branch, units in first + later]
