"""The report of one `compress`: its result as a frontier of two points, dense and the model that was made."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cli.page import write_frontier_page
from compress.report import Comparison, DeviceReport, LayerRow, Metrics, RunReport
from compress.report_frontier import DENSE, CurveRow, Frontier, Interval, Point, PointSpeed

REPORT_NAME, CURVE_OUT = "report.html", "recovery.csv"
CURVE_ROWS = 200  # of a picture
DECODE, PREFILL = "decode", "prefill"
PLAIN = "fp32"  # what the dense model is measured in


def write_run_page(report: RunReport, source: str, command: str, manifest: Mapping[str, Any]) -> Path | None:
    """Write the report beside the model; return its path, or None where quality was not measured."""
    found = pair_run(report, source, command, manifest)
    if found is None:
        return None
    write_frontier_page(found, report.output / REPORT_NAME)
    return report.output / REPORT_NAME


def pair_run(report: RunReport, source: str, command: str, manifest: Mapping[str, Any]) -> Frontier | None:
    """Return dense and compressed as a frontier, or None where quality was not measured.

    `manifest`: of the written folder; its recipe names the point, its metrics are in the report.
    """
    comparison, plan = report.comparison, report.plan
    dense, other = comparison.dense, comparison.compressed
    if dense is None or dense.perplexity is None or other.perplexity is None:
        return None
    full = tuple(
        LayerRow(layer, plan.dense_layer.query_heads, plan.dense_layer.kv_groups, plan.dense_layer.ffn)
        for layer in range(len(plan.layers) + len(plan.dropped_layers))
    )
    speeds = [pair_speeds(plan.device, comparison, side) for side in (False, True)]
    graph, curve = report.graph_format or PLAIN, read_curve(report.output)
    first = make_point((DENSE, 1.0), dense, speeds[0], full, plan.dense_hidden)
    kept = plan.kept_fraction
    second = make_point((f"keep {kept:.2f}", kept), other, speeds[1], plan.layers, plan.hidden)
    tokens = curve[-1].tokens if curve else 0
    second = replace(second, format=graph, recovered_tokens=tokens, curve=curve, command=command)
    notes = tuple(note for note in (comparison.speed_note,) if note)
    return Frontier(
        source, f"{Path(source).name or source}: dense and compressed", (first, second), {},
        comparison.quality_note, notes,
        manifest=dict(manifest), seconds=sum(report.seconds.values()),
    )  # fmt: skip


def make_point(
    named: tuple[str, float], metrics: Metrics, speeds: Mapping[str, PointSpeed], layers: tuple[LayerRow, ...],
    hidden: int,
) -> Point:  # fmt: skip
    """Return one side of a comparison as a point; `named`: its name and what it keeps."""
    assert metrics.perplexity is not None
    return Point(
        *named, PLAIN, 0, layers, hidden, metrics.parameters, metrics.bytes, Interval(metrics.perplexity),
        measured(metrics.divergence), measured(metrics.agreement), speeds,
        {name: Interval(value) for name, value in metrics.accuracy.items()},
    )  # fmt: skip


def measured(value: float | None) -> Interval | None:
    """Return a number without an interval, or None where there is none."""
    return None if value is None else Interval(value)


def pair_speeds(device: DeviceReport | None, comparison: Comparison, after: bool) -> dict[str, PointSpeed]:
    """Return the measured speeds of one side on this machine, and what the profile predicts of it."""
    side, dense = (comparison.compressed if after else comparison.dense), comparison.dense
    assert side is not None and dense is not None
    rates = {
        f"this machine, {PREFILL}": (side.prefill_tokens_per_s, dense.prefill_tokens_per_s),
        f"this machine, {DECODE}": (side.decode_tokens_per_s, dense.decode_tokens_per_s),
    }
    found = {
        name: PointSpeed(name, "", True, own, own / base, {}, 0.0)
        for name, (own, base) in rates.items() if own is not None and base
    }  # fmt: skip
    if device is not None:
        found[device.profile] = predict_speed(device, after)
    return found


def predict_speed(device: DeviceReport, after: bool) -> PointSpeed:
    """Return what a profile predicts of one side."""
    rate, seconds = (
        (device.tokens_per_s, device.seconds) if after else (device.dense_tokens_per_s, device.dense_seconds)
    )
    return PointSpeed(
        device.profile, device.workload, False, rate, device.speedup if after else 1.0, seconds,
        device.bytes if after else device.dense_bytes,
    )  # fmt: skip


def read_curve(folder: Path) -> tuple[CurveRow, ...]:
    """Return the loss curve beside a trained model, thinned to what a picture shows; its last row stays.

    Empty where the model was not trained.
    """
    path = folder / CURVE_OUT
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8", newline="") as text:
        rows = [
            CurveRow(int(row["tokens"]), float(row["loss"]), float(row["heldout"]) if row["heldout"] else None)
            for row in csv.DictReader(text)
        ]
    step, last = -(-len(rows) // CURVE_ROWS), len(rows) - 1
    return tuple(row for place, row in enumerate(rows) if row.heldout is not None or (last - place) % step == 0)
