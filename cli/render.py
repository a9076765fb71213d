"""Results as text: the plan's table, the table of dense against compressed, the proofs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cli.console import align_table, format_bytes, format_count
from compress.plan import LayerPlan, Plan, describe_counts
from compress.report import (
    CLOSE,
    DIFFERENT,
    EQUAL,
    BenchProcess,
    BenchReport,
    BenchRow,
    BenchRun,
    BenchSpeed,
    Comparison,
    DeviceReport,
    LayerRow,
    Metrics,
    PlanReport,
    Proof,
    Spread,
)

SLOW = 100
LEAST_PADDING = 0.0005
WIDTH = 80  # columns of a plan's tables and notes
WIDE = 100  # columns of what `bench` prints
FEW, MILLION = 10, 1e6
Row = tuple[str, ...]


def render_plan(plan: PlanReport, made: Plan | None = None) -> str:
    """Return a plan as two tables and lines on what it costs; `made` tells what was measured and merged."""
    rows, notes = (made.layers, made.notes) if made else ((), {})
    taken = {row.layer: describe_taken(row) for row in rows if row.merged}
    head: Row = ("layers", "query heads", "KV groups", "FFN channels", *(("groups taken in",) if taken else ()))
    sizes: list[Row] = [
        ("", "dense", "planned", "ratio"),
        size_row("layers", len(plan.layers) + len(plan.dropped_layers), len(plan.layers), str),
        size_row("hidden width", plan.dense_hidden, plan.hidden, str),
        size_row("parameters", plan.dense_parameters, plan.parameters, format_count),
        size_row("bytes", plan.dense_bytes, plan.bytes, format_bytes),
    ]
    lines = [textwrap.fill(line, WIDTH) for line in list_plan_notes(plan, notes.get("measured_loss"))]
    device = [render_device(plan.device), ""] if plan.device else []
    return "\n".join([align_table([head, *list_layers(plan, taken)]), "", align_table(sizes), "", *device, *lines])


def render_device(device: DeviceReport) -> str:
    """Return the predicted times of a plan on its device by class of operation, slowest first."""
    names = sorted(device.dense_seconds, key=lambda name: -device.dense_seconds[name])
    rows: list[Row] = [("predicted time", "dense", "planned", "ratio")]
    for name in names:
        before, after = device.dense_seconds[name], device.seconds[name]
        if before > 0:
            rows.append(size_row(name, before, after, format_time))
    before, after = sum(device.dense_seconds.values()), sum(device.seconds.values())
    rows.append(size_row("all", before, after, format_time))
    rows.append(size_row("tokens/s", device.dense_tokens_per_s, device.tokens_per_s, format_rate))
    rows.append(size_row("memory of a device", device.dense_bytes, device.bytes, format_bytes))
    waste = f" Padding: {format_share(device.padding)} of its multiply-adds." if device.padding >= LEAST_PADDING else ""
    line = f"Predicted {device.speedup:.2f}x as fast on {device.profile}, {device.workload}.{waste}"
    return "\n".join([align_table(rows), textwrap.fill(line, WIDTH)])


def format_time(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def list_layers(plan: PlanReport, taken: Mapping[int, str]) -> list[Row]:
    """Return one row per kept layer, or one row for all when they are alike; `taken` is a last column."""
    dense = plan.dense_layer
    shapes = {(row.query_heads, row.kv_groups, row.ffn) for row in plan.layers}
    if taken:
        return [(*layer_row(str(row.layer), row, dense), taken.get(row.layer, "")) for row in plan.layers]
    if len(shapes) == 1:
        return [layer_row(f"all {len(plan.layers)}", plan.layers[0], dense)]
    return [layer_row(str(row.layer), row, dense) for row in plan.layers]


def describe_taken(row: LayerPlan) -> str:
    """Return how many groups a layer takes in from each dropped one."""
    return ", ".join(f"{len(groups.kv_groups)} of layer {groups.layer}" for groups in row.merged)


def layer_row(name: str, row: LayerRow, dense: LayerRow) -> Row:
    """Return the sizes of one layer, each with the dense one before it where they differ."""

    def arrow(before: int, after: int) -> str:
        return str(after) if before == after else f"{before} -> {after}"

    return (
        name,
        arrow(dense.query_heads, row.query_heads),
        arrow(dense.kv_groups, row.kv_groups),
        arrow(dense.ffn, row.ffn),
    )


def size_row(name: str, before: float, after: float, show: Callable[[float], str]) -> Row:
    """Return a row of a quantity before and after, with the ratio."""
    return (name, show(before), show(after), f"{after / before:.3f}")


def list_plan_notes(plan: PlanReport, measured: float | None) -> list[str]:
    """Return the lines below a plan's tables; `measured` is the loss of the plan where it was tried."""
    gone = ", ".join(map(str, plan.dropped_layers)) or "none"
    notes = [f"Layers dropped, by index: {gone}. Kept of the non-embedding parameters: {plan.kept_fraction:.3f}."]
    axes = {axis: value for axis, value in plan.predicted_loss.items() if value > 0}
    if axes:
        parts = ", ".join(f"{axis} {value:.3f}" for axis, value in axes.items())
        when = " before repair" if measured is None else ""  # prices of tried plans come from repaired cuts
        notes.append(f"Predicted loss{when}: {sum(axes.values()):.3f} nats per token ({parts}).")
    if measured is not None:
        notes.append(f"Measured loss: {measured:.3f} nats per token, repaired on a part of the text, not refined.")
    if plan.skipped_sinks or plan.pinned_channels:
        seen = f"{plan.skipped_sinks} sink tokens left out of the statistics"
        notes.append(f"Attention sinks: {seen}, {plan.pinned_channels} channels with massive activations pinned.")
    memory, disk = format_bytes(plan.peak_memory_bytes), format_bytes(plan.disk_bytes)
    spent = "" if plan.run_seconds is None else f", and about {format_duration(plan.run_seconds)} on this machine"
    notes.append(f"Compressing needs about {memory} of memory and {disk} of disk{spent}.")
    return notes


def format_duration(seconds: float) -> str:
    """Return a rough duration in words."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1.0, seconds):.0f} s"


def render_choices(plan: Plan) -> str:
    """Return what a plan notes of its making: the norms that may be absorbed, and groups that could not move."""
    parts = []
    reports = plan.notes.get("absorption", [])
    if reports:
        parts += [align_table(list_absorption(plan, reports)), textwrap.fill(ABSORPTION, WIDTH)]
    for layer, reason in plan.notes.get("not_merged", {}).items():
        parts.append(textwrap.fill(f"No attention group of layer {layer} lives on: {reason}.", WIDTH))
    return "\n".join(parts)


ABSORPTION = (
    "cv: coefficient of variation of the rms that the norm divides by, over tokens. error: predicted relative error "
    "of the branch without that division. goes, stays: what the plan does; a ! marks a norm that goes though it "
    "varies more than --absorb-limit."
)


def list_absorption(plan: Plan, reports: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return one row per layer: for each of its post-norms the variation, the predicted error, and whether it goes."""
    roles = list(dict.fromkeys(str(report["norm"]) for report in reports))
    found = {(report["layer"], report["norm"]): report for report in reports}
    gone = {(row.layer, role) for row in plan.layers for role, _ in row.absorbed}
    kept = set(plan.kept_layers)

    def list_cells(layer: int, role: str) -> Row:
        report = found.get((layer, role))
        if report is None:
            return "", "", ""
        fate = "goes" if (layer, role) in gone else "stays"
        mark = "!" if fate == "goes" and not report["go"] else ""
        return f"{report['variation']:.3f}", f"{report['error']:.3f}", fate + mark if layer in kept else "dropped"

    head = ("layer", *(cell for role in roles for cell in (f"{role} cv", "error", "")))
    layers = list(dict.fromkeys(report["layer"] for report in reports))
    return [head, *((str(layer), *(cell for role in roles for cell in list_cells(layer, role))) for layer in layers)]


def render_tried(plan: Plan) -> str:
    """Return one line per plan that was rebuilt and measured, with a star at the one that was taken; may be empty."""
    tried = plan.notes.get("tried", [])
    if not tried:
        return ""
    best = min(range(len(tried)), key=lambda place: tried[place]["loss"])
    lines = [f"{' *'[place == best]} {one['loss']:.4f}  {outline_sizes(one)}" for place, one in enumerate(tried)]
    return "\n".join(["Tried plans, and KL to the dense model in nats per token on text kept out:", *lines])


def outline_sizes(tried: Mapping[str, Any]) -> str:
    """Return the sizes of a tried plan in words."""
    groups, ffn = describe_counts(tried["kv_groups"]), describe_counts(tried["ffn"])
    return f"{tried['layers']} layers, hidden {tried['hidden']}, KV groups {groups}, FFN {ffn}"


def render_comparison(result: Comparison) -> str:
    """Return the table of dense against compressed, or of one model alone, with what was measured only."""
    dense, compressed = result.dense, result.compressed
    rows: list[Row] = [("", "dense", "compressed", "ratio")]
    for name, read, show in METRICS:
        after = read(compressed)
        if after is not None:
            rows.append(metric_row(name, read(dense) if dense else None, after, show))
    for kind, share in compressed.accuracy.items():
        rows.append(metric_row(f"accuracy: {kind}", dense.accuracy.get(kind) if dense else None, share, format_share))
    table = align_table(rows if dense else [(row[0], row[2]) for row in rows[1:]])
    return "\n".join([table, *(note for note in (result.quality_note, result.speed_note) if note)])


def metric_row(name: str, before: float | None, after: float, show: Callable[[float], str]) -> Row:
    """Return one measured quantity; one that compares both models has no dense value and no ratio."""
    ratio = "" if before is None or not before else f"{after / before:.3f}"
    return (name, "" if before is None else show(before), show(after), ratio)


def format_share(value: float) -> str:
    """Return a share in per cent."""
    return f"{value:.1%}".replace("%", " %")


def format_rate(value: float) -> str:
    """Return tokens per second, with a digit after the point for a slow model."""
    return f"{value:,.0f}" if value >= SLOW else f"{value:.1f}"


METRICS: Sequence[tuple[str, Callable[[Metrics], float | None], Callable[[float], str]]] = (
    ("parameters", lambda m: m.parameters, format_count),
    ("  without embeddings", lambda m: m.layer_parameters, format_count),
    ("bytes on disk", lambda m: m.bytes, format_bytes),
    ("perplexity", lambda m: m.perplexity, lambda value: f"{value:.4g}"),
    ("top-1 agreement", lambda m: m.agreement, format_share),
    ("KL divergence, nats", lambda m: m.divergence, lambda value: f"{value:.4f}"),
    ("prefill tokens/s", lambda m: m.prefill_tokens_per_s, format_rate),
    ("decode tokens/s", lambda m: m.decode_tokens_per_s, format_rate),
)


# What bench found


def render_bench(report: BenchReport) -> str:
    """Return tables of prefill, decode and its share of bandwidth, then of sizes, time to load and memory."""
    rows = [row for run in report.runs for row in run.rows]
    tables = [
        render_rates("prefill, tokens/s", rows, lambda side: side.prefill, lambda row: row.prefill_ratio),
        render_rates("decode, tokens/s", rows, lambda side: side.decode, lambda row: row.decode_ratio),
        render_rates("decode, share of read bandwidth", rows, lambda side: side.bandwidth_share, None),
        align_table(list_footprint(report)),
    ]
    notes = [textwrap.fill(note, WIDE) for note in (*list_bench_notes(report), *report.notes)]
    return "\n\n".join([*tables, "\n".join(notes)])


def render_rates(
    title: str,
    rows: Sequence[BenchRow],
    read: Callable[[BenchSpeed], Spread],
    ratio: Callable[[BenchRow], Spread | None] | None,
) -> str:
    """Return a table with a row for each combination of threads, batch and prompt."""
    show = format_rounded if ratio else format_share_rounded
    pair = rows[0].dense is not None
    head: Row = ("threads", "batch", "prompt", *(("dense", "compressed") if pair else ("",)))
    table: list[Row] = [(*head, "ratio") if pair and ratio else head]
    for row in rows:
        sides = [show_spread(read(side), show) for side in (row.dense, row.compressed) if side is not None]
        found = ratio(row) if pair and ratio else None
        last = (show_spread(found, format_rounded),) if found else ()
        table.append((str(row.threads or "all"), str(row.batch), str(row.prompt), *sides, *last))
    return f"{title}\n{align_table(table)}"


def show_spread(found: Spread, show: Callable[[float], str]) -> str:
    """Return the median with the least and the most behind it, where there were several rounds."""
    if len(found.values) == 1:
        return show(found.median)
    return f"{show(found.median)} ({show(found.low)}..{show(found.high)})"


def format_rounded(value: float) -> str:
    """Return a rate or a ratio with about three digits: 7.25, 72.5, 725, 7254, 72.5k, 725k, 7.25M."""
    if value >= MILLION:
        return f"{trim_digits(value / MILLION)}M"
    return f"{trim_digits(value / 1e3)}k" if value >= FEW * 1e3 else trim_digits(value)


def trim_digits(value: float) -> str:
    """Return a number with three digits, more where they stand before the point."""
    return f"{value:.0f}" if value >= SLOW else f"{value:.1f}" if value >= FEW else f"{value:.2f}"


def format_share_rounded(value: float) -> str:
    """Return a share in whole per cent, with a digit after the point below ten."""
    return f"{100 * value:.0f} %" if value >= FEW / 100 else f"{100 * value:.1f} %"


def name_threads(threads: int | None) -> str:
    """Return a number of threads in words."""
    return {None: "all threads", 1: "1 thread"}.get(threads, f"{threads} threads")


def list_footprint(report: BenchReport) -> list[Row]:
    """Return the rows of what does not depend on the prompt: format, sizes, and by threads load time and memory."""
    models = [model for model in (report.dense, report.compressed) if model is not None]
    table: list[Row] = [
        ("", "dense", "compressed", "ratio"),
        ("weights", *(model.format for model in models), ""),
        footprint_row("size on disk", [model.file_bytes for model in models], format_bytes),
        footprint_row("weights read per token", [model.weight_bytes for model in models], format_bytes),
    ]
    for run in report.runs:
        sides = [side for side in (run.dense, run.compressed) if side is not None]
        table += list_process_rows(run, sides)
    return table if len(models) > 1 else [(row[0], row[1]) for row in table[1:]]


def list_process_rows(run: BenchRun, sides: Sequence[BenchProcess]) -> list[Row]:
    """Return load time and peak memory with one number of threads."""
    where = f", {name_threads(run.threads)}"
    seconds = [side.load_seconds for side in sides]
    times = [show_spread(own, lambda value: f"{value:.2f}") + " s" for own in seconds]
    ratio = f"{seconds[-1].median / seconds[0].median:.3f}"
    return [
        (f"time to load{where}", *times, ratio),
        footprint_row(f"peak memory{where}", [side.peak_bytes for side in sides], format_bytes),
    ]


def footprint_row(name: str, values: Sequence[float], show: Callable[[float], str]) -> Row:
    """Return a row of one quantity of each model, with the ratio."""
    return (name, *map(show, values), f"{values[-1] / values[0]:.3f}" if values[0] else "")


def list_bench_notes(report: BenchReport) -> list[str]:
    """Return how it was measured, and the bandwidth that shares are of."""
    rounds = "one round" if report.rounds == 1 else f"{report.rounds} alternating rounds (least..most)"
    ratios = "; ratios are medians of each round's own" if report.dense else ""
    notes = [
        f"{report.runtime}, {report.new} new tokens, median of {rounds}{ratios}. All rows of a batch count together. "
        "Memory is that of the process, Python and its libraries with it."
    ]
    for run in report.runs:
        speed = show_spread(run.bandwidth, lambda value: f"{value / 1e9:.1f}")
        notes.append(
            f"Read bandwidth, {name_threads(run.threads)}: {speed} GB/s, "
            "measured between the rounds with one large float32 product; its median counts."
        )
    return notes


def render_proof(proof: Proof) -> str:
    """Return one proof as a sentence."""
    if proof.status == EQUAL:
        error = f"within {proof.max_error:.1e} of a largest {proof.scale:.3g}" if proof.max_error else "exactly"
        return f"Verified with {proof.runtime} in a fresh process: logits are equal {error}."
    if proof.status == CLOSE:
        assert proof.max_error is not None and proof.scale is not None and proof.agreement is not None
        return (
            f"Run with {proof.runtime} in a fresh process: logits come within {proof.max_error / proof.scale:.1%} of "
            "the largest to those of the quantised layers, whose inputs are not rounded; top-1 agreement "
            f"{proof.agreement:.1%}."
        )
    if proof.status == DIFFERENT:
        return f"NOT verified with {proof.runtime}: {proof.reason}."
    return f"Not checked with {proof.runtime}: {proof.reason}."
