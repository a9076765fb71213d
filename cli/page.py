"""The report: one HTML page that needs no network, with the figures, the table, the samples and the commands."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from cli.figures import Figure, list_figures
from cli.version import read_version
from compress.checkpoint_writer import write_atomically
from compress.report import make_plain
from compress.report_frontier import DENSE, Frontier, Point

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "report.html.j2"
# What the page runs when it opens: vl-convert puts vega, vega-lite and vega-embed in front of it.
PAIR = 2  # points of a page on one model: it and dense
MOUNT = "window.mountCharts(vegaEmbed);"
JOINED = " The dashed line joins the points that no other beats on both axes; the rest is faint."
SECTIONS = {
    "frontier": ("Accuracy against speed", "Lower and further right is better."),
    "accuracy": ("Tasks", "Share of right answers; lines are 95 % bootstrap intervals, where they were made."),
    "shapes": ("Shapes", "What is kept of each layer of the dense model; a layer that is gone has no box."),
    "time": ("Where the time goes", "As the cost model of each profile has it, for the workload named above."),
    "memory": ("Memory", "Weights, keys and values of the workload on one device, predicted."),
    "damage": ("Damage curves", "What cutting one axis of one layer is predicted to cost; the plan takes from where it "
               "costs least."),
    "recovery": ("Training back", "Loss while the cut models were trained towards the dense one."),
}  # fmt: skip


def write_frontier_page(frontier: Frontier, path: Path) -> None:
    """Write the report of a frontier, or of one point beside dense, as one self-contained HTML file, by one rename."""
    write_atomically(path, render_page(frontier).encode())


def render_page(frontier: Frontier) -> str:
    """Return the page as HTML."""
    import jinja2

    figures = list_figures(frontier)
    place = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    place.filters.update(count=format_number, share=format_share, bytes=format_mib)
    return place.get_template(PAGE).render(
        frontier=frontier, dense=frontier.points[0], points=frontier.points, dense_name=DENSE,
        profiles=list(frontier.points[0].speeds), summary=summarise(frontier), version=read_version(),
        sections=group_figures(figures, bool(frontier.answers)), tasks=list_tasks(frontier),
        samples=pair_samples(frontier),
        charts={figure.name: figure.spec for figure in figures}, library=bundle_library(),
        manifest=json.dumps(make_plain(frontier.manifest), indent=1), one=len(frontier.points) <= PAIR,
    )  # fmt: skip


@cache
def bundle_library() -> str:
    """Return vega, vega-lite and vega-embed with the line that starts them, as one script."""
    import vl_convert

    library: str = vl_convert.javascript_bundle(MOUNT)
    return library.replace("</script", "<\\/script")


def group_figures(figures: list[Figure], joined: bool) -> list[tuple[str, str, str, list[Figure]]]:
    """Return (name, title, note, figures) of each section that has figures."""
    found = [
        (name, title, note + JOINED * (joined and name == "frontier"), [one for one in figures if one.section == name])
        for name, (title, note) in SECTIONS.items()
    ]
    return [section for section in found if section[3]]


def list_tasks(frontier: Frontier) -> list[str]:
    """Return the names of the tasks that any point was scored on."""
    return list(dict.fromkeys(task for point in frontier.points for task in point.accuracy))


def pair_samples(frontier: Frontier) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return (prompt, [(point, sample), ...]) for each prompt that dense continued."""
    rows = []
    for place, first in enumerate(frontier.points[0].samples):
        sides = [(point.name, point.samples[place]) for point in frontier.points if place < len(point.samples)]
        rows.append((first.prompt, sides))
    return rows


# Sentences


def summarise(frontier: Frontier) -> str:
    """Return what the page says in one or two sentences."""
    dense = frontier.points[0]
    if len(frontier.points) == PAIR:
        return describe_trade(frontier.points[1], dense, list(dense.speeds))
    chosen: dict[str | None, list[str]] = {}
    for profile, answers in frontier.answers.items():
        chosen.setdefault(answers.fastest, []).append(profile)
    said = [describe_choice(frontier, name, profiles) for name, profiles in chosen.items()]
    return " ".join(said) or "Nothing was compared with the dense model."


def describe_choice(frontier: Frontier, name: str | None, profiles: list[str]) -> str:
    """Return the answer for the devices whose fastest point within the allowed loss is `name`."""
    dense, loss = frontier.points[0], frontier.answers[profiles[0]].loss
    limit = f"{100 * loss:.2g} %"
    if name is None or name == DENSE:
        return f"On {join_words(profiles)} no point is faster and within {limit} of the dense model's perplexity."
    point = next(point for point in frontier.points if point.name == name)
    return f"With at most {limit} more perplexity: {describe_trade(point, dense, profiles)}"


def describe_trade(point: Point, dense: Point, profiles: list[str]) -> str:
    """Return what a point buys and costs, as a sentence."""
    gains = [
        f"{point.speeds[name].speedup:.2f} times as fast on {name} "
        f"({'measured' if point.speeds[name].measured else 'predicted'})"
        for name in profiles
    ]
    change = point.perplexity.value / dense.perplexity.value - 1
    cost = f"its perplexity is {abs(change):.1%} {'higher' if change > 0 else 'lower'}"
    size = f"{point.bytes / dense.bytes:.0%} of the bytes"
    return f"{point.name} has {size}, is {join_words(gains)}, and {cost} than the dense model's." if gains else (
        f"{point.name} has {size}, and {cost} than the dense model's."
    )


def join_words(words: list[str]) -> str:
    """Return `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# Numbers


def format_number(value: float | None) -> str:
    """Return a number with four figures, or a dash."""
    return "–" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"  # noqa: PLR2004


def format_share(value: float | None) -> str:
    """Return a share in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"


def format_mib(value: float) -> str:
    """Return bytes as MiB or GiB."""
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
