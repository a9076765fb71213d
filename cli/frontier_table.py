"""A comparison as tables of 80 columns, as sentences, and as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cli.console import align_table, format_bytes
from cli.render import WIDTH, format_rate, format_share, format_share_rounded
from compress.report_frontier import DENSE, Answers, Frontier, Interval, Point, PointSpeed

Row = tuple[str, ...]
ON, KNEE = "*", "K"
WORTH = 1.05  # times as fast as dense: below this on all points a device has no use for smaller models of this kind
LEGEND = f"{ON} not beaten on both axes, {KNEE} the knee of those"


def render_frontier(frontier: Frontier) -> str:
    """Return all tables with their notes, and the answers for each device."""
    quality = render_quality(frontier.points)
    parts = [quality, *render_blocks(list_speeds(frontier))]
    interval = ", with its 95 % interval" if "95 %" in quality else ""
    tasks = list_tasks(frontier.points)
    parts += render_blocks(tasks) if len(tasks[0]) > 1 else []
    notes = [
        f"{frontier.text_note} Of dense: perplexity above the dense model's{interval}.",
        f"Speed: tokens/s, times dense; {LEGEND}.", *frontier.speed_notes,
    ]  # fmt: skip
    parts.append("\n".join(fill(note) for note in notes))
    parts.append("\n".join(fill(line) for name in frontier.answers for line in explain_answers(frontier, name)))
    return "\n\n".join(parts)


def fill(text: str) -> str:
    """Return a sentence in lines of the terminal's width."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


# Tables


def render_quality(points: Sequence[Point]) -> str:
    """Return the table of sizes and quality, as wide as fits: intervals go first, then the divergence."""
    head: Row = ("point", "size", "perplexity", "of dense", "95 %", "KL", "agrees")
    rows = [head, *(quality_row(point) for point in points)]
    for left_out in ((), ("95 %",), ("95 %", "KL")):
        kept = [place for place, name in enumerate(head) if name not in left_out]
        table = align_table([tuple(row[place] for place in kept) for row in rows])
        if max(map(len, table.splitlines())) <= WIDTH:
            break
    return table


def quality_row(point: Point) -> Row:
    """Return one point's size and quality."""
    ratio = point.ratio
    return (
        point.name, format_bytes(point.bytes), f"{point.perplexity.value:.4g}",
        format_change(ratio.value) if ratio else "", format_range(ratio),
        f"{point.divergence.value:.3f}" if point.divergence else "",
        format_share(point.agreement.value) if point.agreement else "",
    )  # fmt: skip


def format_change(ratio: float) -> str:
    """Return a ratio as what it is above or below 1, in per cent."""
    change = ratio - 1
    return f"{'+' if change >= 0 else '-'}{format_share_rounded(abs(change))}"


def format_range(ratio: Interval | None) -> str:
    """Return the ends of a ratio's interval."""
    if ratio is None or ratio.low is None or ratio.high is None:
        return ""
    low, high = (format_change(end).removesuffix(" %") for end in (ratio.low, ratio.high))
    return f"{low} .. {high}"


def list_speeds(frontier: Frontier) -> list[Row]:
    """Return rows of every point's speed on each device, marked where it is one to take."""
    names = list(frontier.answers)
    rows = [("point", *names)]
    for point in frontier.points:
        cells = (speed_cell(point.speeds.get(name), point.name, frontier.answers[name]) for name in names)
        rows.append((point.name, *cells))
    return rows


def speed_cell(speed: PointSpeed | None, point: str, answers: Answers) -> str:
    """Return a speed with its marks."""
    if speed is None:
        return "-  "
    mark = (ON if point in answers.frontier else " ") + (KNEE if point == answers.knee else " ")
    return f"{format_rate(speed.tokens_per_s)} {speed.speedup:.2f}x {mark}"


def list_tasks(points: Sequence[Point]) -> list[Row]:
    """Return rows of every point's accuracies, those of dense in per cent, the others in per cent of them."""
    dense = points[0].accuracy
    rows = [("accuracy", *dense)]
    for point in points:
        if point.accuracy:
            rows.append((point.name, *(task_cell(point, name, dense) for name in dense)))
    return rows


def task_cell(point: Point, task: str, dense: Mapping[str, Interval]) -> str:
    """Return an accuracy, for a cut model with its share of the dense one's."""
    found, base = point.accuracy.get(task), dense[task].value
    if found is None:
        return ""
    shown = format_share(found.value)
    return shown if point.name == DENSE or not base else f"{shown} ({found.value / base:.0%})"


def render_blocks(rows: Sequence[Row]) -> list[str]:
    """Return a table, cut into as many as it takes to keep to the terminal's width; each begins with the names."""
    blocks: list[str] = []
    kept: list[int] = []
    for place in range(1, len(rows[0])):
        wider = align_table([(row[0], *(row[one] for one in (*kept, place))) for row in rows])
        if kept and max(map(len, wider.splitlines())) > WIDTH:
            blocks.append(align_table([(row[0], *(row[one] for one in kept)) for row in rows]))
            kept = []
        kept.append(place)
    return [*blocks, align_table([(row[0], *(row[one] for one in kept)) for row in rows])]


# Sentences


def explain_answers(frontier: Frontier, profile: str) -> Iterator[str]:
    """Yield the two answers for a device, and its knee."""
    answers = frontier.answers[profile]
    points = {point.name: point for point in frontier.points}
    loss = f"{100 * answers.loss:g} %"
    most = max(point.speeds[profile].speedup for point in frontier.points if profile in point.speeds)
    if most < WORTH:
        yield (
            f"{profile}: no point is more than {most:.2f}x as fast as dense: there the time goes into what each "
            "operation costs whatever its size, or into what no cut removes."
        )
        return
    if answers.fastest is None:
        yield f"{profile}: no point is faster and within {loss} of the dense model's perplexity."
    else:
        yield f"{profile}: the fastest within {loss} of dense is {describe(points[answers.fastest], profile)}."
    if answers.best is None:
        yield f"{profile}: no point is {answers.speedup:g}x as fast as the dense model."
    else:
        yield f"{profile}: the best at {answers.speedup:g}x or more is {describe(points[answers.best], profile)}."
    if answers.knee is not None and answers.knee not in (answers.fastest, answers.best):
        yield f"{profile}: beyond {describe(points[answers.knee], profile)}, more speed costs more than it did before."


def describe(point: Point, profile: str) -> str:
    """Return a point's name with what it costs and buys."""
    if point.ratio is None:
        return f"{point.name} (the dense model)"
    return f"{point.name} ({point.speeds[profile].speedup:.2f}x, perplexity {format_change(point.ratio.value)})"


# Files

COLUMNS = (
    "point", "keep", "format", "recovered_tokens", "parameters", "bytes", "profile", "workload", "measured",
    "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "speedup", "memory_bytes", "frontier", "knee",
)  # fmt: skip
QUALITIES = ("perplexity", "ratio", "divergence", "agreement")


def write_csv(frontier: Frontier) -> str:
    """Return one row for each point and device, with every interval's ends in columns of their own."""
    tasks = list(frontier.points[0].accuracy)
    text = io.StringIO()
    names = [*QUALITIES, *(f"accuracy {task}" for task in tasks)]
    head = [*COLUMNS, *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))]
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    for point in frontier.points:
        for profile in point.speeds:
            writer.writerow(csv_row(point, profile, frontier.answers[profile]))
    return text.getvalue()


def csv_row(point: Point, profile: str, answers: Answers) -> dict[str, Any]:
    """Return one point on one device."""
    speed = point.speeds[profile]
    row: dict[str, Any] = {
        "point": point.name, "keep": point.keep, "format": point.format, "recovered_tokens": point.recovered_tokens,
        "parameters": point.parameters, "bytes": point.bytes, "profile": profile, "workload": speed.workload,
        "measured": speed.measured, "tokens_per_s": speed.tokens_per_s, "tokens_per_s_low": speed.low,
        "tokens_per_s_high": speed.high, "speedup": speed.speedup, "memory_bytes": speed.memory_bytes,
        "frontier": point.name in answers.frontier, "knee": point.name == answers.knee,
    }  # fmt: skip
    found = {name: getattr(point, name) for name in QUALITIES}
    found |= {f"accuracy {task}": value for task, value in point.accuracy.items()}
    for name, value in found.items():
        if value is not None:
            row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    return row
