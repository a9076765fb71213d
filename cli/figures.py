"""The figures of a frontier as Vega-Lite charts: for the page, and as PNG, SVG, CSV and JSON files.

A chart is a plain Vega-Lite specification with its data inside; vl-convert draws it here, vega in the page.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.report import LayerRow
from compress.report_frontier import DENSE, Frontier, Point, PointSpeed

Spec = dict[str, Any]
Row = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
# Colours of at least 3:1 against a white and a near-black page, told apart with any colour vision.
COLOURS = ("#3b82c4", "#c96a12", "#2a9170", "#a05fb4", "#c8433a", "#7a7f87", "#9a8412")
STEEP = 4.0  # largest over smallest perplexity from which its axis is logarithmic
HEIGHT, ROW, WIDTH = 280, 26, 680  # pixels: of a chart, of one bar or row, and of a chart in a file
MEBI = 2**20
# A label that points share is long: it goes below them and to the right, where there is room.
SHARED = "indexof(datum.label, ',') > 0"
NEAR = {"tokens_per_s": 0.14, "perplexity": 0.07}  # shares of an axis within which labels would overlap


@dataclass(frozen=True)
class Figure:
    """One chart: `name` is a file's, `alt` says in a sentence what it shows, `spec` is Vega-Lite with `values`."""

    name: str
    section: str
    title: str
    alt: str
    spec: Spec

    @property
    def rows(self) -> Sequence[Row]:
        """The data that the chart draws."""
        found: Sequence[Row] = self.spec["data"]["values"]
        return found


def list_figures(frontier: Frontier) -> list[Figure]:
    """Return all figures that the frontier has data for, in the order of the page."""
    profiles = list(frontier.points[0].speeds)
    found = [draw_frontier(frontier, profile) for profile in profiles]
    found += draw_accuracies(frontier)
    found += [figure for kind in ("ffn", "kv_groups") for figure in draw_shapes(frontier, kind)]
    found += [figure for profile in profiles for figure in draw_time(frontier, profile)]
    found += [draw_memory(frontier, profile) for profile in profiles if frontier.points[0].speeds[profile].memory_bytes]
    axes = dict.fromkeys(axis for curves in frontier.damage.values() for axis in curves)
    found += [
        draw_damage(axis, {layer: curves[axis] for layer, curves in frontier.damage.items() if axis in curves})
        for axis in axes
    ]
    return found + draw_recovery(frontier)


# Parts of specifications


def make_spec(rows: Iterable[Row], height: int, **rest: Any) -> Spec:
    """Return a chart of `rows` as wide as its place."""
    values = list(rows)
    return {
        "$schema": SCHEMA, "data": {"values": values}, "width": "container", "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"}, **rest,
    }  # fmt: skip


def field(name: str, kind: str, title: str | None = None, **rest: Any) -> Row:
    """Return the encoding of a field; `kind` is quantitative, nominal or ordinal."""
    return {"field": name, "type": kind, "title": title or name.replace("_", " "), **rest}


def number(name: str, title: str, shown: str = ",.4~g", **rest: Any) -> Row:
    """Return the encoding of a quantity for a hover text."""
    return field(name, "quantitative", title, format=shown, **rest)


def name_figure(kind: str, profile: str) -> str:
    """Return a name that is also a file's."""
    return f"{kind}-" + re.sub(r"[^A-Za-z0-9._]+", "-", profile).strip("-")


def list_points(frontier: Frontier, profile: str) -> list[Point]:
    """Return the points that a device can run: one that does not know a number format has no speed in it."""
    return [point for point in frontier.points if profile in point.speeds]


def order_names(frontier: Frontier) -> list[str]:
    """Return the names of the points in the order in which they are listed."""
    return [point.name for point in frontier.points]


def kind_of(point: Point) -> str:
    """Return dense, pruned, or pruned and trained."""
    if point.name.startswith(DENSE):  # in one number format or another
        return DENSE
    return "pruned, recovered" if point.recovered_tokens else "pruned"


# Accuracy against speed


def draw_frontier(frontier: Frontier, profile: str) -> Figure:
    """Draw perplexity against tokens per second on one device, the points that nothing beats joined by a line."""
    rows = [describe_point(frontier, point, point.speeds[profile]) for point in list_points(frontier, profile)]
    measured = rows[0]["source"] == "measured"
    values = [row["perplexity"] for row in rows]
    steep = max(values) > STEEP * min(values)
    x = field("tokens_per_s", "quantitative", "tokens per second", scale={"zero": False, "padding": 24})
    y = field("perplexity", "quantitative", "perplexity (lower is better)",
              scale={"zero": False, "type": "log" if steep else "linear", "padding": 16})  # fmt: skip
    join_labels(rows)
    text = {"x": x, "y": y, "text": {"field": "label"}}
    marks = {
        "x": x, "y": y, "tooltip": list_hover(rows),
        "color": colour("format", "number format", rows), "shape": shape_scale(rows),
        "opacity": {"condition": {"test": "datum.frontier" if frontier.answers else "true", "value": 1}, "value": 0.45},
    }  # fmt: skip
    layers = [
        {"transform": [{"filter": "datum.frontier"}],
         "mark": {"type": "line", "color": COLOURS[5], "strokeDash": [4, 3]},
         "encoding": {"x": x, "y": y, "order": {"field": "tokens_per_s"}}},
        {"transform": [{"filter": "isValid(datum.low)"}], "mark": {"type": "rule", "color": COLOURS[5]},
         "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}},
        {"mark": {"type": "point", "size": 110, "filled": measured, "strokeWidth": 2}, "encoding": marks},
        {"mark": {"type": "text", "fontSize": 11, "align": {"expr": f"{SHARED} ? 'left' : 'center'"},
                  "dx": {"expr": f"{SHARED} ? 4 : 0"}, "dy": {"expr": f"{SHARED} ? 16 : -14"}}, "encoding": text},
    ]  # fmt: skip
    if any(row["slowest"] is not None for row in rows):
        ends = {"x": {**x, "field": "slowest"}, "x2": {"field": "quickest"}, "y": y}
        known = [{"filter": "isValid(datum.slowest)"}]
        layers.insert(1, {"transform": known, "mark": {"type": "rule", "color": COLOURS[5]}, "encoding": ends})
    title = ", ".join(part for part in (profile, rows[0]["workload"]) if part) + f": {rows[0]['source']}"
    alt = f"Perplexity against {rows[0]['source']} tokens per second on {profile}, for " + ", ".join(
        f"{row['point']} ({row['tokens_per_s']:,.4g} tokens/s, perplexity {row['perplexity']:.4g})" for row in rows
    )
    return Figure(name_figure("frontier", profile), "frontier", title, alt, make_spec(rows, HEIGHT, layer=layers))


def join_labels(rows: Sequence[Row]) -> None:
    """Give each row its label; points too near for labels of their own share one."""
    spans = {name: max(row[name] for row in rows) - min(row[name] for row in rows) for name in NEAR}
    held: list[Row] = []
    for row in rows:
        close = [one for one in held if all(abs(row[name] - one[name]) <= NEAR[name] * spans[name] for name in NEAR)]
        row["label"] = "" if close else row["point"]
        if close:
            close[0]["label"] += f", {row['point']}"
        else:
            held.append(row)


def describe_point(frontier: Frontier, point: Point, speed: PointSpeed) -> Row:
    """Return one point as a row."""
    dense = frontier.points[0]
    answers = frontier.answers.get(speed.profile)
    return {
        "point": point.name, "kind": kind_of(point), "format": point.format,
        "source": "measured" if speed.measured else "predicted", "workload": speed.workload,
        "tokens_per_s": speed.tokens_per_s, "slowest": speed.low, "quickest": speed.high, "speedup": speed.speedup,
        "perplexity": point.perplexity.value, "low": point.perplexity.low, "high": point.perplexity.high,
        "rise": point.perplexity.value / dense.perplexity.value - 1,
        "size_mib": point.bytes / MEBI, "memory_mib": speed.memory_bytes / MEBI,
        "frontier": answers is not None and point.name in answers.frontier,
    }  # fmt: skip


def list_hover(rows: Sequence[Row]) -> list[Row]:
    """Return what a point says when the pointer is over it."""
    return [
        field("point", "nominal"), field("kind", "nominal"), field("format", "nominal", "number format"),
        number("tokens_per_s", f"tokens/s, {rows[0]['source']}"), number("speedup", "times dense", ".2f"),
        number("perplexity", "perplexity"), number("rise", "against dense", "+.1%"),
        number("size_mib", "on disk, MiB", ",.1f"),
        *([number("memory_mib", "memory on the device, MiB", ",.1f")] if rows[0]["memory_mib"] else []),
    ]  # fmt: skip


def colour(name: str, title: str, rows: Sequence[Row]) -> Row:
    """Return a colour for each value of a field; no legend where there is one value."""
    known = list(dict.fromkeys(row[name] for row in rows))
    legend = {"legend": {"orient": "top", "title": title} if len(known) > 1 else None}
    return {"field": name, "type": "nominal", "scale": {"domain": known, "range": repeat_colours(len(known))}, **legend}


def repeat_colours(count: int) -> list[str]:
    """Return that many colours, from the start again where they run out."""
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def shape_scale(rows: Sequence[Row]) -> Row:
    """Return a shape for each kind of point."""
    shapes = {DENSE: "diamond", "pruned": "circle", "pruned, recovered": "triangle-up"}
    known = [kind for kind in shapes if any(row["kind"] == kind for row in rows)]
    scale = {"domain": known, "range": [shapes[kind] for kind in known]}
    return {"field": "kind", "type": "nominal", "scale": scale, "legend": {"orient": "top", "title": None}}


def draw_accuracies(frontier: Frontier) -> list[Figure]:
    """Draw the accuracy of each task by point, with its interval; nothing without tasks."""
    rows = [
        {"point": point.name, "task": task, "accuracy": found.value, "low": found.low, "high": found.high}
        for point in frontier.points for task, found in point.accuracy.items()
    ]  # fmt: skip
    if not rows:
        return []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    x = field("point", "nominal", " ", sort=order_names(frontier), axis={"labelAngle": -35})
    y = field("accuracy", "quantitative", "accuracy", axis={"format": ".0%"}, scale={"zero": False})
    offset = {"field": "task", "type": "nominal", "sort": tasks}
    hover = [field("point", "nominal"), field("task", "nominal"), number("accuracy", "accuracy", ".1%"),
             number("low", "from", ".1%"), number("high", "to", ".1%")]  # fmt: skip
    shade = colour("task", "task", rows)
    layers = [
        {"transform": [{"filter": "isValid(datum.low)"}], "mark": {"type": "rule"},
         "encoding": {"x": x, "xOffset": offset, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": shade}},
        {"mark": {"type": "point", "filled": True, "size": 70},
         "encoding": {"x": x, "xOffset": offset, "y": y, "color": shade, "tooltip": hover}},
    ]  # fmt: skip
    alt = f"Accuracy of {len(tasks)} tasks for each point, with 95 % intervals: " + "; ".join(
        f"{row['point']} {row['task']} {row['accuracy']:.0%}" for row in rows
    )
    return [Figure("accuracy", "accuracy", "Accuracy by task", alt, make_spec(rows, HEIGHT, layer=layers))]


# Shapes, time and memory

SHAPES = {"ffn": ("FFN channels", "ffn"), "kv_groups": ("KV groups", "kv-groups")}


def draw_shapes(frontier: Frontier, kind: str) -> list[Figure]:
    """Draw what each point keeps of each layer of the dense model; a dropped layer is an empty place."""
    dense, title = frontier.points[0], SHAPES[kind][0]
    full = {row.layer: getattr(row, kind) for row in dense.layers}
    rows = [cell for point in frontier.points for cell in describe_layers(point, full, kind)]
    if all(row["share"] == 1 for row in rows):
        return []
    hover = [field("point", "nominal"), field("layer", "ordinal"), number("size", title, ",d"),
             number("share", "of dense", ".0%")]  # fmt: skip
    spec = make_spec(
        rows, ROW * len(frontier.points), mark={"type": "rect", "stroke": "#7a7f87", "strokeWidth": 0.5},
        encoding={
            "x": field("layer", "ordinal", "layer", axis={"labelOverlap": True, "labelAngle": 0}),
            "y": field("point", "nominal", " ", sort=order_names(frontier)),
            "color": field("share", "quantitative", "kept", scale={"scheme": "viridis", "domain": [0, 1]},
                           legend={"format": ".0%", "orient": "top", "gradientLength": 160}),
            "tooltip": hover,
        },
    )  # fmt: skip
    alt = f"{title} that each point keeps of each layer: " + "; ".join(
        f"{point.name} {describe_range(point.layers, kind)} in {len(point.layers)} layers" for point in frontier.points
    )
    return [Figure(f"shapes-{SHAPES[kind][1]}", "shapes", f"{title} by layer", alt, spec)]


def describe_layers(point: Point, full: Mapping[int, int], kind: str) -> list[Row]:
    """Return one row for each layer of the dense model that a point still has."""
    return [
        {"point": point.name, "layer": row.layer, "size": getattr(row, kind),
         "share": getattr(row, kind) / full[row.layer] if full[row.layer] else 1.0}
        for row in point.layers
    ]  # fmt: skip


def describe_range(layers: Sequence[LayerRow], kind: str) -> str:
    """Return the smallest and the largest size."""
    sizes = [getattr(row, kind) for row in layers] or [0]
    return str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def draw_time(frontier: Frontier, profile: str) -> list[Figure]:
    """Draw the seconds of the workload by class of operation, as the profile's cost model has them, if it does."""
    rows = [
        {"point": point.name, "operation": name, "milliseconds": 1000 * seconds}
        for point in list_points(frontier, profile)
        for name, seconds in point.speeds[profile].seconds.items() if seconds > 0
    ]  # fmt: skip
    if not rows:
        return []
    hover = [field("point", "nominal"), field("operation", "nominal"), number("milliseconds", "ms", ",.3~g")]
    spec = make_spec(
        rows, ROW * len(frontier.points), mark={"type": "bar"},
        encoding={
            "x": field("milliseconds", "quantitative", "predicted milliseconds of the workload"),
            "y": field("point", "nominal", " ", sort=order_names(frontier)),
            "color": colour("operation", "operation", rows), "tooltip": hover,
        },
    )  # fmt: skip
    points = list_points(frontier, profile)
    totals = {point.name: 1000 * sum(point.speeds[profile].seconds.values()) for point in points}
    alt = f"Predicted time by class of operation on {profile}: " + ", ".join(
        f"{name} {total:.3g} ms" for name, total in totals.items()
    )
    return [Figure(name_figure("time", profile), "time", f"Where the time goes on {profile}", alt, spec)]


def draw_memory(frontier: Frontier, profile: str) -> Figure:
    """Draw the bytes on the device."""
    rows = [
        {"point": point.name, "mebibytes": point.speeds[profile].memory_bytes / MEBI, "weights": point.bytes / MEBI}
        for point in list_points(frontier, profile)
    ]
    hover = [field("point", "nominal"), number("mebibytes", "on the device, MiB", ",.1f"),
             number("weights", "weights on disk, MiB", ",.1f")]  # fmt: skip
    spec = make_spec(
        rows, ROW * len(frontier.points), mark={"type": "bar", "color": COLOURS[0]},
        encoding={
            "x": field("mebibytes", "quantitative", "predicted MiB on the device: weights, keys and values"),
            "y": field("point", "nominal", " ", sort=order_names(frontier)), "tooltip": hover,
        },
    )  # fmt: skip
    alt = f"Predicted memory on {profile}: " + ", ".join(f"{row['point']} {row['mebibytes']:.4g} MiB" for row in rows)
    return Figure(name_figure("memory", profile), "memory", f"Memory on {profile}", alt, spec)


# Damage and recovery


def draw_damage(axis: str, layers: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draw the predicted loss of every layer by what is kept of it."""
    rows = [
        {"layer": int(layer), "kept": share, "nats": nats} for layer, curve in layers.items() for share, nats in curve
    ]
    hover = [field("layer", "ordinal"), number("kept", "kept", ".0%"), number("nats", "nats per token", ".3~g")]
    spec = make_spec(
        rows, HEIGHT, mark={"type": "line", "point": {"size": 18}},
        encoding={
            "x": field("kept", "quantitative", "kept share", axis={"format": ".0%"}),
            "y": field("nats", "quantitative", "predicted loss, nats per token"),
            "color": field("layer", "quantitative", "layer", scale={"scheme": "viridis"},
                           legend={"orient": "top", "gradientLength": 160, "tickMinStep": 1, "format": "d"}),
            "detail": {"field": "layer"}, "tooltip": hover,
        },
    )  # fmt: skip
    worst = max(rows, key=lambda row: row["nats"])
    alt = (
        f"Predicted loss of cutting {axis} in each of {len(layers)} layers; the most is {worst['nats']:.3g} nats in "
        f"layer {worst['layer']} at {worst['kept']:.0%}"
    )
    return Figure(f"damage-{axis}", "damage", f"Damage by {axis}", alt, spec)


def draw_recovery(frontier: Frontier) -> list[Figure]:
    """Draw the training and the held-out loss of every point that was trained."""
    rows = [
        {"point": point.name, "tokens": row.tokens, "loss": loss, "kind": kind}
        for point in frontier.points for row in point.curve
        for kind, loss in (("training", row.loss), ("held-out", row.heldout))
        if loss is not None and math.isfinite(loss)
    ]  # fmt: skip
    if not rows:
        return []
    kinds = [kind for kind in ("training", "held-out") if any(row["kind"] == kind for row in rows)]
    hover = [field("point", "nominal"), field("kind", "nominal", "loss of"), number("tokens", "tokens", ",d"),
             number("loss", "nats per token")]  # fmt: skip
    spec = make_spec(
        rows, HEIGHT, mark={"type": "line", "point": {"size": 12}},
        encoding={
            "x": field("tokens", "quantitative", "tokens", axis={"format": "~s"}),
            "y": field("loss", "quantitative", "nats per token", scale={"zero": False}),
            "color": colour("point", "point", rows), "tooltip": hover,
            "strokeDash": {"field": "kind", "type": "nominal", "scale": {"domain": kinds}, "legend": {"orient": "top"}},
        },
    )  # fmt: skip
    trained = [point.name for point in frontier.points if point.curve]
    alt = f"Loss by tokens trained on, of {', '.join(trained)}"
    return [Figure("recovery", "recovery", "Training back", alt, spec)]


# Files


def write_figures(frontier: Frontier, folder: Path) -> list[Path]:
    """Write every figure as NAME.png, .svg, .csv (its data) and .json (Vega-Lite); return the files.

    UserError where the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--figures {folder} cannot be made ({error.strerror}); choose another folder.") from error
    return [path for figure in list_figures(frontier) for path in write_figure(figure, folder)]


def write_figure(figure: Figure, folder: Path) -> list[Path]:
    """Write one figure in its four forms."""
    import vl_convert

    spec = {**figure.spec, "width": WIDTH, "autosize": {"type": "pad"}, "background": "white", "title": figure.title}
    forms: dict[str, bytes] = {
        "png": vl_convert.vegalite_to_png(spec, scale=2),
        "svg": vl_convert.vegalite_to_svg(spec).encode(),
        "csv": encode_rows(figure.rows).encode(),
        "json": json.dumps(spec, indent=1).encode(),
    }
    paths = [folder / f"{figure.name}.{ending}" for ending in forms]
    for path, data in zip(paths, forms.values(), strict=True):
        path.write_bytes(data)
    return paths


def encode_rows(rows: Sequence[Row]) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
