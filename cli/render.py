"""Results as text: the plan's table, the table of dense against compressed, the proofs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cli.console import align_table, format_bytes, format_count
from compress.report import DIFFERENT, EQUAL, Comparison, LayerRow, Metrics, PlanReport, Proof

SLOW = 100
Row = tuple[str, str, str, str]


def render_plan(plan: PlanReport) -> str:
    """Return a plan as two tables and a line on what carrying it out needs."""
    rows = [("layers", "query heads", "KV groups", "FFN channels"), *list_layers(plan)]
    sizes: list[Row] = [
        ("", "dense", "planned", "ratio"),
        size_row("layers", len(plan.layers) + len(plan.dropped_layers), len(plan.layers), str),
        size_row("hidden width", plan.dense_hidden, plan.hidden, str),
        size_row("parameters", plan.dense_parameters, plan.parameters, format_count),
        size_row("bytes", plan.dense_bytes, plan.bytes, format_bytes),
    ]
    return "\n".join([align_table(rows), "", align_table(sizes), "", *list_plan_notes(plan)])


def list_layers(plan: PlanReport) -> list[Row]:
    """Return one row per kept layer, or one row for all when they are alike."""
    dense = plan.dense_layer
    shapes = {(row.query_heads, row.kv_groups, row.ffn) for row in plan.layers}
    if len(shapes) == 1:
        return [layer_row(f"all {len(plan.layers)}", plan.layers[0], dense)]
    return [layer_row(str(row.layer), row, dense) for row in plan.layers]


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


def list_plan_notes(plan: PlanReport) -> list[str]:
    """Return the lines below a plan's tables."""
    gone = ", ".join(map(str, plan.dropped_layers)) or "none"
    notes = [f"Layers dropped: {gone}. Kept of the non-embedding parameters: {plan.kept_fraction:.3f}."]
    axes = {axis: value for axis, value in plan.predicted_loss.items() if value > 0}
    if axes:
        parts = ", ".join(f"{axis} {value:.3f}" for axis, value in axes.items())
        notes.append(f"Predicted loss before repair: {sum(axes.values()):.3f} nats per token ({parts}).")
    if plan.skipped_sinks or plan.pinned_channels:
        seen = f"{plan.skipped_sinks} sink tokens left out of the statistics"
        notes.append(f"Attention sinks: {seen}, {plan.pinned_channels} channels with massive activations pinned.")
    memory, disk = format_bytes(plan.peak_memory_bytes), format_bytes(plan.disk_bytes)
    notes.append(f"Compressing needs about {memory} of memory and {disk} of disk.")
    return notes


def render_comparison(result: Comparison) -> str:
    """Return the table of dense against compressed, or of one model alone, with what was measured only."""
    dense, compressed = result.dense, result.compressed
    rows = [("", "dense", "compressed", "ratio")]
    for name, read, show in METRICS:
        after = read(compressed)
        if after is not None:
            rows.append(metric_row(name, read(dense) if dense else None, after, show))
    for kind, share in compressed.accuracy.items():
        rows.append(metric_row(f"accuracy: {kind}", dense.accuracy.get(kind) if dense else None, share, format_share))
    table = align_table(rows if dense else [(name, after) for name, _, after, _ in rows[1:]])
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


def render_proof(proof: Proof) -> str:
    """Return one proof as a sentence."""
    if proof.status == EQUAL:
        error = f"within {proof.max_error:.1e} of a largest {proof.scale:.3g}" if proof.max_error else "exactly"
        return f"Verified with {proof.runtime} in a fresh process: logits are equal {error}."
    if proof.status == DIFFERENT:
        return f"NOT verified with {proof.runtime}: {proof.reason}."
    return f"Not checked with {proof.runtime}: {proof.reason}."
