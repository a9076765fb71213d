"""What a verb was asked to do, gathered from its flags (no heavy imports)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.recipe import Recipe


@dataclass(frozen=True)
class BenchSize:
    """How speed is measured: prompt tokens, new tokens, rounds, CPU threads (None: all)."""

    prompt: int = 128
    new: int = 32
    rounds: int = 5
    threads: int | None = None


@dataclass(frozen=True)
class BenchPlan:
    """What `bench` measures: each prompt with each batch and each number of threads (None: ONNX Runtime's choice).

    No prompts, or no number of new tokens: those of BenchSize, as far as the model's context holds them.
    """

    prompts: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    threads: tuple[int | None, ...] = (None,)
    new: int | None = None
    rounds: int = BenchSize.rounds


@dataclass(frozen=True)
class Recovery:
    """Training after the rebuild: on how many tokens, such as `2M`, of which files (none: calibration text), and how.

    `rate`: highest learning rate (None: as `recover` chooses it). `resume`: go on with the run that stopped.
    """

    tokens: str
    texts: tuple[Path, ...] = ()
    offline: bool = False
    rate: float | None = None
    resume: bool = False


@dataclass(frozen=True)
class Request:
    """One `compress` or `plan`: what to read, how, and which later stages to run."""

    source: str
    recipe: Recipe
    text: Path | None = None
    eval_text: Path | None = None
    plan: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    export: bool = True
    verify: bool = True
    bench: bool = True
    speed: BenchSize = BenchSize()
    recovery: Recovery | None = None
