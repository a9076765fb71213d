"""Scores of units (KV groups, FFN channels, hidden channels) and of blocks, all from second moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from compress.errors import UserError
from compress.importance.units import Ranking, rank_by_activation, rank_by_obs
from compress.stats import Moments

Score = Callable[[Moments, Tensor, int], Ranking]

# Name -> score; each reads the Gram matrix of the projection's inputs and the projection's weight.
SCORES: Mapping[str, Score] = {"activation": rank_by_activation, "obs": rank_by_obs}


def find_score(name: str) -> Score:
    """Return a score by name; raises UserError naming those that exist."""
    if name not in SCORES:
        raise UserError(f"--score {name} is not one of {', '.join(SCORES)}.")
    return SCORES[name]
