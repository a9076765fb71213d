"""Frozen results of a run: what is printed, and what `lightpress.json` and `--json` hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

EQUAL, CLOSE, DIFFERENT, SKIPPED = "equal", "close", "different", "skipped"


@dataclass(frozen=True)
class Metrics:
    """One model in numbers: weights, then quality, then speed; what was not measured is None."""

    parameters: int
    layer_parameters: int
    bytes: int
    perplexity: float | None = None
    agreement: float | None = None
    divergence: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Dense against compressed (or one model alone), on one text and one runtime; the two notes say which."""

    dense: Metrics | None
    compressed: Metrics
    quality_note: str = ""
    speed_note: str = ""


@dataclass(frozen=True)
class Proof:
    """Logits of a written artifact, run in a fresh process, against the model that was in memory.

    `max_error` and `scale` are the largest difference and the largest logit; `reason` says why a proof is missing
    or failed.
    """

    runtime: str
    status: str
    max_error: float | None = None
    scale: float | None = None
    agreement: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One kept layer of a plan: its index in the dense model and its sizes afterwards."""

    layer: int
    query_heads: int
    kv_groups: int
    ffn: int


@dataclass(frozen=True)
class DeviceReport:
    """What a profile predicts of a plan: seconds of the workload by class of operation, and bytes on each device.

    `padding`: share of the planned model's multiply-adds that are padding; `warnings`: rules of the device it breaks.
    """

    profile: str
    workload: str
    dense_seconds: Mapping[str, float]
    seconds: Mapping[str, float]
    dense_tokens_per_s: float
    tokens_per_s: float
    dense_bytes: float
    bytes: float
    padding: float
    warnings: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model."""
        return sum(self.dense_seconds.values()) / sum(self.seconds.values())


@dataclass(frozen=True)
class PlanReport:
    """A plan in numbers: memory and disk are estimates in bytes, the predicted loss is nats per token by axis.

    `run_seconds`: estimated time of calibrating, planning, rebuilding and training back on this machine.
    """

    layers: tuple[LayerRow, ...]
    dense_layer: LayerRow
    dropped_layers: tuple[int, ...]
    hidden: int
    dense_hidden: int
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    kept_fraction: float
    peak_memory_bytes: int
    disk_bytes: int
    predicted_loss: Mapping[str, float] = field(default_factory=dict)
    skipped_sinks: int = 0
    pinned_channels: int = 0
    run_seconds: float | None = None
    device: DeviceReport | None = None


@dataclass(frozen=True)
class RunReport:
    """Everything `compress` found out: where the output is, its plan, the proofs, dense against compressed.

    `graph_format`: weights of the ONNX graph; `next_steps`: what to copy to the device and to run there;
    `artifact_error`: why nothing was written for it; `recovery`: what the training after the rebuild did.
    """

    output: Path
    plan: PlanReport
    proofs: tuple[Proof, ...]
    comparison: Comparison
    seconds: Mapping[str, float] = field(default_factory=dict)
    graph_format: str = ""
    next_steps: tuple[str, ...] = ()
    artifact_error: str | None = None
    recovery: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Spread:
    """A number that was measured in several rounds: the median, the least, the most, and all in order."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class BenchModel:
    """One measured graph: number format of most weights, bytes of its files, bytes of weights read for a token.

    `graph`: None where a temporary export was measured.
    """

    source: str
    graph: Path | None
    format: str
    file_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class BenchProcess:
    """The process that ran a graph: seconds to open it (each in a fresh process), peak resident bytes at the end.

    `before_bytes`: the peak when Python and its libraries were there, but no model yet.
    """

    load_seconds: Spread
    peak_bytes: int
    before_bytes: int


@dataclass(frozen=True)
class BenchSpeed:
    """Tokens per second of all rows of a batch together, and the share of read bandwidth that decoding reaches.

    `step_bytes`: weights and cache that a decode step reads on average.
    """

    prefill: Spread
    decode: Spread
    bandwidth_share: Spread
    step_bytes: float


@dataclass(frozen=True)
class BenchRow:
    """One combination of batch and prompt, dense against compressed; ratios are those of each round."""

    threads: int | None
    batch: int
    prompt: int
    dense: BenchSpeed | None
    compressed: BenchSpeed
    prefill_ratio: Spread | None
    decode_ratio: Spread | None


@dataclass(frozen=True)
class BenchRun:
    """All that was measured with one number of threads (None: ONNX Runtime's choice).

    `bandwidth`: bytes per second read by one product with a large weight, measured before and after each round.
    """

    threads: int | None
    bandwidth: Spread
    dense: BenchProcess | None
    compressed: BenchProcess
    rows: tuple[BenchRow, ...]


@dataclass(frozen=True)
class BenchReport:
    """Everything `bench` found out; without a dense side, one model alone."""

    dense: BenchModel | None
    compressed: BenchModel
    new: int
    rounds: int
    runtime: str
    runs: tuple[BenchRun, ...]
    notes: tuple[str, ...] = ()


def make_plain(value: Any) -> Any:
    """Return dataclasses, paths and tuples as what JSON knows; numbers that JSON does not know become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return make_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): make_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [make_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
