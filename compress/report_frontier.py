"""Frozen results of `compare`: what each amount of compression buys and costs. Pages, tables and files read these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compress.report import LayerRow

DENSE = "dense"


@dataclass(frozen=True)
class Interval:
    """A measured number with the ends of its 95 % bootstrap interval; None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class PointSpeed:
    """One model on one device: tokens per second, seconds of the workload by class of operation, bytes there.

    `measured`: on this machine; otherwise predicted by the profile's cost model. `low`, `high`: of measured rounds.
    `seconds` are always the cost model's, and empty where this machine has no profile yet. `speedup` is over the dense
    model in the profile's first format, measured beside it where it is measured.
    """

    profile: str
    workload: str
    measured: bool
    tokens_per_s: float
    speedup: float
    seconds: Mapping[str, float]
    memory_bytes: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class CurveRow:
    """One row of a recovery's loss curve."""

    tokens: int
    loss: float
    heldout: float | None = None


@dataclass(frozen=True)
class Sample:
    """One greedy continuation: how many tokens equal the dense one's from the start, and the share of repeats.

    `repetition`: share of 4-grams of the continuation that occurred in it before.
    """

    prompt: str
    text: str
    agreed: int
    tokens: int
    repetition: float


@dataclass(frozen=True)
class Point:
    """One model of the frontier: `dense`, or one made with `keep` and a number `format`.

    `layers` are the kept layers' sizes; `task` names map to accuracies in 0 .. 1; `speeds` to profiles by name.
    `folder`: where the model lies; `command`: what makes it again. `ratio`: perplexity over dense's, its interval from
    the same windows of both, which is narrower than those of the two. `speeds` lacks devices that do not read `format`.
    """

    name: str
    keep: float
    format: str
    recovered_tokens: int
    layers: tuple[LayerRow, ...]
    hidden: int
    parameters: int
    bytes: int
    perplexity: Interval
    divergence: Interval | None
    agreement: Interval | None
    speeds: Mapping[str, PointSpeed]
    accuracy: Mapping[str, Interval] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    curve: tuple[CurveRow, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    command: str = ""
    ratio: Interval | None = None


@dataclass(frozen=True)
class Answers:
    """What helps to choose on one device, by point name; None where no point fits.

    `frontier`: points that no other beats on both axes, fastest last; `knee`: where a further step costs more than it
    buys; `fastest`: the fastest whose perplexity is at most `loss` above dense; `best`: the best of those that are
    at least `speedup` times as fast.
    """

    frontier: tuple[str, ...]
    knee: str | None
    fastest: str | None
    best: str | None
    loss: float
    speedup: float


@dataclass(frozen=True)
class Frontier:
    """Everything `compare` found out; `points` begins with dense.

    `damage`: layer ("0", "1", ... of the dense model) -> axis ("kv", "ffn") -> rows of (kept share, predicted nats per
    token), the widest first.
    """

    source: str
    title: str
    points: tuple[Point, ...]
    answers: Mapping[str, Answers]
    text_note: str
    speed_notes: tuple[str, ...]
    damage: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    manifest: Mapping[str, object] = field(default_factory=dict)
    seconds: float = 0.0
