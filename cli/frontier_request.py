"""What `compare` was asked to do, gathered from its flags (no heavy imports)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cli.request import BenchSize
from compress.recipe import Recipe

POINTS = 6
LOSS, SPEEDUP = 0.02, 1.5
SAMPLES = 3


@dataclass(frozen=True)
class TaskFlags:
    """What models are asked beside the text: names of lm-eval tasks, local files, and how many of their examples."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    pairs: tuple[Path, ...] = ()
    choices: tuple[Path, ...] = ()
    limit: int | None = None
    shots: int | None = None

    def __bool__(self) -> bool:
        """Tell whether there is anything to answer."""
        return bool(self.names or self.pairs or self.choices)


@dataclass(frozen=True)
class Levels:
    """How much is removed: a number of points, shares to keep, or speed-ups on the first profile; one of them."""

    points: int = POINTS
    keep: tuple[float, ...] = ()
    speedup: tuple[str, ...] = ()

    @property
    def chosen(self) -> bool:
        """Whether the levels were given one by one, so that none may be left out."""
        return bool(self.keep or self.speedup)


@dataclass(frozen=True)
class CompareRequest:
    """One `compare`: what to read, which points, on which devices, what to measure, what to answer.

    `recover_tokens`: text to train each point on, such as 200k (empty: none). `samples`: prompts that are continued.
    `loss`, `speedup`: bounds of the two answers. `scorer`: the name of tasks that the caller scores itself. `jobs`:
    processes that make points at the same time. `search`: trials over amounts, axes and formats besides, of the Optuna
    study in `storage` (empty: a journal in `output`).
    """

    source: str
    recipe: Recipe
    output: Path
    text: Path | None = None
    eval_text: Path | None = None
    profiles: tuple[str, ...] = ()
    levels: Levels = Levels()
    formats: tuple[str, ...] = ("fp32",)
    recover_tokens: str = ""
    tasks: TaskFlags = TaskFlags()
    samples: int = SAMPLES
    loss: float = LOSS
    speedup: float = SPEEDUP
    figures: Path | None = None
    overwrite: bool = False
    verify: bool = False
    jobs: int = 1
    speed: BenchSize = field(default_factory=BenchSize)
    scorer: str = ""
    search: int = 0
    storage: str = ""
