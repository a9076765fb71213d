"""Scores of units (KV groups, FFN channels, hidden channels) and of blocks, all from second moments and sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from compress.errors import UserError
from compress.importance import baselines
from compress.importance.branch import Branch
from compress.importance.slim import rank_explained, rank_plain, rank_slim
from compress.importance.units import Ranking, rank_by_activation, rank_by_obs, rank_by_score

Score = Callable[[Branch], Ranking]


def rank_by(importance: Callable[[Branch], Tensor]) -> Score:
    """Return the score that ranks units by importances `[units]`, least first."""
    return lambda branch: rank_by_score(branch.moments, branch.weight, branch.size, importance(branch))


SCORES: Mapping[str, Score] = {
    "obs": lambda branch: rank_by_obs(branch.moments, branch.weight, branch.size),
    "activation": lambda branch: rank_by_activation(branch.moments, branch.weight, branch.size),
    "random": rank_by(baselines.score_random),
    "magnitude": rank_by(baselines.score_magnitude),
    "wanda": rank_by(baselines.score_wanda),
    "flap": rank_by(baselines.score_flap),
    "minitron": rank_by(baselines.score_minitron),
    "taylor": rank_by(baselines.score_taylor),
    "slimllm": rank_slim,
    "slimllm-plain": rank_plain,
    "slimllm-explained": rank_explained,
}


def find_score(name: str) -> Score:
    """Return a score by name; raises UserError naming those that exist."""
    if name not in SCORES:
        raise UserError(f"--score {name} is not one of {', '.join(SCORES)}.")
    return SCORES[name]
