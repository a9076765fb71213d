"""How fast the points run: measured on this machine, predicted by a profile's cost model elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime

from backends.export_onnx import DATA_NAME, GRAPH_NAME
from backends.machine import count_cores
from backends.ort import open_onnx
from backends.runtime import Speed, measure_all
from cli.budget import Device, describe_workload
from cli.console import Console
from cli.estimate import free_memory
from cli.frontier_job import FrontierJob, Target, Variant, open_format
from cli.frontier_points import Bench
from cli.frontier_store import SPEEDS, write_json
from cli.measure import describe_speed
from cli.request import BenchSize
from compress.checkpoint_source import read_json
from compress.report_frontier import Point, PointSpeed
from profiles.cost import DECODE, PREFILL, Workload

MEMORY_SHARE = 0.4  # of the free memory that open graphs may take together
Rates = dict[str, tuple[Speed, float]]


@dataclass(frozen=True)
class Measured:
    """Each point's speed here, and its ratio to the dense model's of the same rounds."""

    rates: Rates
    size: BenchSize


def add_speeds(
    bench: Bench, points: Sequence[tuple[Variant, Point]], console: Console
) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """Return the points with their speeds on every device, and a note on each device."""
    made, notes, found = bench.made, [], [dict[str, PointSpeed]() for _ in points]
    for target in made.targets:
        speeds, note = rate_target(bench, target, [variant for variant, _ in points], console)
        notes.append(note)
        for own, speed in zip(found, speeds, strict=True):
            if speed is not None:
                own[target.name] = speed
    rated = (replace(point, speeds=own) for (_, point), own in zip(points, found, strict=True))
    return tuple(rated), tuple(notes)


def rate_target(
    bench: Bench, target: Target, variants: Sequence[Variant], console: Console
) -> tuple[list[PointSpeed | None], str]:
    """Return every point's speed on one device (None: it does not read the format) and how it was found."""
    devices = [find_device(bench.made, target, variant) for variant in variants]
    if not target.measured:
        unread = {variant.format for variant, device in zip(variants, devices, strict=True) if device is None}
        limit = f" It does not read {', '.join(sorted(unread))}." if unread else ""
        return [
            predict_point(bench, target, device, variant) if device else None
            for device, variant in zip(devices, variants, strict=True)
        ], f"{target.name}: predicted by its profile, {describe_target(target)}.{limit}"
    # What its profile does not know of, this machine can be measured with all the same.
    measured = measure_points(bench, target, variants, console)
    dense = next(iter(measured.rates.values()))[0]
    speeds: list[PointSpeed | None] = [
        rate_measured(bench, target, measured, pair) for pair in zip(variants, devices, strict=True)
    ]
    note = describe_speed(dense, measured.size, "ONNX Runtime").removeprefix("Speed: ")
    return speeds, f"{target.name}: measured, {note}"


def find_device(made: FrontierJob, target: Target, variant: Variant) -> Device | None:
    """Return a device with the workload in a point's format."""
    return open_format(target, variant.format, made.job, made.request.recipe)


def describe_target(target: Target) -> str:
    """Return the workload of a device in words."""
    if target.device is not None:
        return describe_workload(target.device)
    work = target.workload
    return f"{work.phase} of {work.prompt} prompt and {work.output} new tokens"


def predict_point(bench: Bench, target: Target, device: Device, variant: Variant) -> PointSpeed:
    """Return a speed by the cost model."""
    assert target.device is not None
    cost = device.estimate(bench.open(variant)[1].shape)
    dense = target.device.estimate(bench.made.job.spec.shape)
    return PointSpeed(
        target.name, describe_workload(device), False, cost.tokens_per_s, dense.total / cost.total,
        dict(cost.seconds), cost.memory_bytes,
    )  # fmt: skip


def rate_measured(
    bench: Bench, target: Target, measured: Measured, point: tuple[Variant, Device | None]
) -> PointSpeed:
    """Return a measured speed; where the time goes, and memory, are by the profile if there is one."""
    variant, device = point
    speed, ratio = measured.rates[variant.name]
    rate, low, high = read_rate(speed, target.workload, measured.size)
    cost = device.estimate(bench.open(variant)[1].shape) if device else None
    memory = cost.memory_bytes if cost else 0.0
    words = describe_workload(device) if device else describe_target(target)
    seconds = dict(cost.seconds) if cost else {}
    return PointSpeed(target.name, words, True, rate, ratio, seconds, memory, low, high)


def read_rate(speed: Speed, work: Workload, size: BenchSize) -> tuple[float, float, float]:
    """Return tokens per second of a workload, and of the slowest and the fastest round."""
    if work.phase == PREFILL:
        return speed.prefill_tokens_per_s, *speed.prefill_range
    if work.phase == DECODE:
        return speed.decode_tokens_per_s, *speed.decode_range

    def answer(prefill: float, decode: float) -> float:
        return size.new / (size.prompt / prefill + size.new / decode)

    low, high = (answer(*pair) for pair in zip(speed.prefill_range, speed.decode_range, strict=True))
    return answer(speed.prefill_tokens_per_s, speed.decode_tokens_per_s), low, high


# Measuring


def measure_points(bench: Bench, target: Target, variants: Sequence[Variant], console: Console) -> Measured:
    """Measure all points in alternating rounds, dense among them; what an earlier run measured here is reused."""
    size = fit_workload(bench, target)
    graphs = [list_graph(bench.graph(one)) for one in variants]
    key = {"graphs": graphs, "size": asdict(size), "phase": target.workload.phase, "machine": describe_machine()}
    path = bench.made.folder / SPEEDS
    found = read_json(path) if path.is_file() else {}
    if found.get("key") == key:
        return Measured({name: (revive_speed(own), own["ratio"]) for name, own in found["rates"].items()}, size)
    console.note("Measuring speed.")
    rates: Rates = {}
    for group in group_variants(bench, variants):
        models = [open_onnx(bench.graph(one), size.threads) for one in group]
        speeds = measure_all(models, size.prompt, size.new, size.rounds)
        base = read_rate(speeds[0], target.workload, size)[0]
        for one, speed in zip(group, speeds, strict=True):
            rates.setdefault(one.name, (speed, read_rate(speed, target.workload, size)[0] / base))
    stored = {name: {**asdict(own), "ratio": ratio} for name, (own, ratio) in rates.items()}
    write_json(path, {"key": key, "rates": stored})
    return Measured(rates, size)


def describe_machine() -> dict[str, Any]:
    """Return what tells this machine from others that models run at another speed on."""
    return {"cpu": read_cpu(), "cores": count_cores(), "onnxruntime": onnxruntime.__version__}


def read_cpu(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the names of this machine's kinds of processor; of its architecture where the system tells no more."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows = (line.partition(":") for line in lines)
    # Arm has numbers instead of a name.
    kinds = dict.fromkeys(value.strip() for name, _, value in rows if name.strip() in ("model name", "CPU part"))
    return ", ".join(kinds) or platform.processor() or platform.machine()


def fit_workload(bench: Bench, target: Target) -> BenchSize:
    """Return how much is measured: the workload's tokens, as far as the model's context holds them."""
    asked, work = bench.made.request.speed, target.workload
    longest = bench.made.job.spec.max_positions
    new = max(1, min(work.output, longest // 2))
    return replace(asked, prompt=max(1, min(work.prompt, longest - new)), new=new)


def group_variants(bench: Bench, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
    """Yield groups of points whose graphs fit into memory together, each with the dense model first."""
    free = free_memory()
    room = MEMORY_SHARE * free if free is not None else float("inf")
    dense, *others = variants
    base = sum(measure_files(bench.graph(dense)))
    group, held = [dense], base
    for one in others:
        size = sum(measure_files(bench.graph(one)))
        if held + size > room and len(group) > 1:
            yield group
            group, held = [dense], base
        group, held = [*group, one], held + size
    yield group


def measure_files(folder: Path) -> list[int]:
    """Return the bytes of a graph's files."""
    return [(folder / name).stat().st_size for name in (GRAPH_NAME, DATA_NAME) if (folder / name).is_file()]


def list_graph(folder: Path) -> list[Any]:
    """Return what tells one graph from another."""
    return [str(folder.parent.name), *measure_files(folder), (folder / GRAPH_NAME).stat().st_mtime_ns]


def revive_speed(data: Mapping[str, Any]) -> Speed:
    """Return a speed that plain data describe."""
    values = {name: value for name, value in data.items() if name != "ratio"}
    for name in ("prefill_range", "decode_range"):
        low, high = values[name]
        values[name] = (low, high)
    return Speed(**values)
