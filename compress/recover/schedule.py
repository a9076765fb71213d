"""Learning rates over a run: a linear warm-up, then a cosine, or a plateau and a short decay (WSD)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.errors import UserError

COSINE, WSD = "cosine", "wsd"
KINDS = (COSINE, WSD)


@dataclass(frozen=True)
class Schedule:
    """The shape of a run of `steps`: `warmup` steps up; `floor` is the last rate, as a share of the highest.

    wsd: full rate until the last `decay` share of the run, then down by 1 - sqrt (arXiv 2405.18392, section 3).
    """

    steps: int
    kind: str = COSINE
    warmup: int = 0
    floor: float = 0.1
    decay: float = 0.2

    def __post_init__(self) -> None:
        """Refuse an unknown kind and a run without steps."""
        if self.kind not in KINDS:
            raise UserError(f"--schedule {self.kind} is not one of {', '.join(KINDS)}.")
        if self.steps < 1:
            raise UserError("The run has no step; give more --tokens.")
        if not 0 <= self.warmup < self.steps:
            raise UserError(
                f"--warmup {self.warmup} leaves nothing of {self.steps} steps; give a smaller one, or more --tokens."
            )


def rate_factor(schedule: Schedule, step: int) -> float:
    """Return the rate of step 0, 1, ... as a share of the highest; the first is above 0, the last is near the floor."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    share = (step - schedule.warmup) / (schedule.steps - schedule.warmup)
    if schedule.kind == COSINE:
        fall = 0.5 * (1 + math.cos(math.pi * share))
    else:
        late = (share - (1 - schedule.decay)) / schedule.decay
        fall = 1 - math.sqrt(max(0.0, late))
    return schedule.floor + (1 - schedule.floor) * fall


def choose_warmup(steps: int) -> int:
    """Return the default warm-up: 5 % of the run, at most 200 steps."""
    return min(200, steps // 20)
