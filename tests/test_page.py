"""The report page and its figures: what they hold, and how they behave in a real browser."""

import csv
import html
import json
import re
import shutil
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cli.figures import list_figures, write_figures
from cli.page import render_page, write_frontier_page
from compress.errors import UserError
from compress.report import LayerRow
from compress.report_frontier import Answers, CurveRow, Frontier, Interval, Point, PointSpeed, Sample

vl_convert = pytest.importorskip("vl_convert")
PROFILES = {"this-machine": True, "ascend-310p3": False, "ascend-910b4": False}
EVIL = "</script><script>alert(1)</script>"


def make_point(place, count, layers):
    keep = 1 - 0.5 * place / max(count - 1, 1)
    rows = tuple(
        LayerRow(layer, 8, 4 if (layer + place) % 3 else 2, 1024 - 64 * place if place else 1024)
        for layer in range(layers)
        if place == 0 or (layer + place) % 7
    )
    value = 12 * (1 + 0.02 * place**2)
    speeds = {
        name: PointSpeed(
            name, "decode:512+64@1", measured, 100 * (1 + 0.25 * place), 1 + 0.25 * place,
            {"projections": 0.01 / (1 + place), "attention": 0.003}, 3e9 / (1 + place),
        )
        for name, measured in PROFILES.items()
    }  # fmt: skip
    return Point(
        "dense" if place == 0 else f"keep {keep:.2f}", keep, "fp32", 0 if place < 2 else 400_000, rows, 512,
        int(4e6 * keep), int(16e6 * keep), Interval(value, 0.97 * value, 1.03 * value),
        Interval(0.01 * place) if place else None, Interval(1 - 0.03 * place) if place else None, speeds,
        {"facts": Interval(0.9 - 0.02 * place, 0.85 - 0.02 * place, 0.95 - 0.02 * place)},
        (Sample(f"Once <upon> a time {EVIL}", " there was a fox.", 12, 48, 0.125),),
        tuple(CurveRow(4000 * at, 3 - 0.01 * at, 2.9 if at % 10 == 0 else None) for at in range(50 * (place > 1))),
        command=f"lightpress compress MODEL --keep {keep:.2f} --text notes.txt -o out",
    )  # fmt: skip


def make_frontier(count=6, layers=6):
    points = tuple(make_point(place, count, layers) for place in range(count))
    names = tuple(point.name for point in points)
    answers = {name: Answers(names, names[-1], names[1], names[-1], 0.02, 1.5) for name in PROFILES}
    curve = tuple((share / 8, (1 - share / 8) ** 2 * 0.1) for share in range(9))
    damage = {str(layer): {"ffn": curve, "kv": curve} for layer in range(layers)}
    return Frontier(
        "/models/demo", "Lightpress: demo", points, answers, "Quality on 12,000 tokens.", ("Batch 1.",), damage,
        ("lightpress compare MODEL -o OUT",), {"seed": 0, "evil": EVIL}, 12.0,
    )  # fmt: skip


class Links(HTMLParser):
    """Collects what a page would load, the open tags, and what it shows as text."""

    def __init__(self):
        super().__init__()
        self.loads, self.labels, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [found[name] for name in ("src", "href") if name in found and not found[name].startswith("data:")]
        if found.get("role") == "img":
            self.labels.append(found["aria-label"])

    def handle_data(self, data):
        self.text.append(data)


def read_links(page):
    links = Links()
    links.feed(page)
    return links


def test_page_loads_nothing_and_describes_every_chart():
    frontier = make_frontier()
    links = read_links(render_page(frontier))
    assert links.loads == []
    assert links.labels == [figure.alt for figure in list_figures(frontier)]
    assert all(len(label) > 40 for label in links.labels)


def test_text_of_others_stays_text():
    page = render_page(make_frontier())
    assert EVIL not in page
    assert html.escape(EVIL) in page
    assert page.count("<script") == page.count("</script>") == 2


def test_page_says_every_number_of_the_table():
    frontier = make_frontier()
    words = " ".join(read_links(render_page(frontier)).text)
    for point in frontier.points:
        assert f"{point.parameters:,}" in words
        assert f"{point.perplexity.value:,.4g}" in words
        for speed in point.speeds.values():
            assert f"{speed.tokens_per_s:,.4g}" in words
    assert "measured" in words and "predicted" in words
    assert frontier.commands[0] in words and frontier.points[1].command in words


def test_page_of_one_point_has_no_answers():
    frontier = make_frontier(2)
    words = " ".join(read_links(render_page(frontier)).text)
    assert "Knee" not in words
    assert "times as fast on this-machine (measured)" in words


def test_summary_names_the_answer_and_where_there_is_none():
    frontier = make_frontier()
    assert "With at most 2 % more perplexity: keep 0.90 has 90% of the bytes" in render_page(frontier)
    none = {name: replace(found, fastest=None) for name, found in frontier.answers.items()}
    assert "no point is faster and within 2 %" in html.unescape(render_page(replace(frontier, answers=none)))


def test_figures_leave_out_what_there_is_no_data_for():
    frontier = make_frontier()
    bare = [replace(point, accuracy={}, curve=(), layers=frontier.points[0].layers) for point in frontier.points]
    sections = {figure.section for figure in list_figures(replace(frontier, points=tuple(bare), damage={}))}
    assert sections == {"frontier", "time", "memory"}


def test_large_model_gives_a_small_page():
    page = render_page(make_frontier(12, 48))
    assert len(page.encode()) < 3e6


def test_files_of_figures(tmp_path):
    frontier = replace(make_frontier(3), damage={})
    paths = write_figures(frontier, tmp_path / "figures")
    figures = list_figures(frontier)
    assert len(paths) == 4 * len(figures)
    for figure in figures:
        png = (tmp_path / "figures" / f"{figure.name}.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG") and width >= 1360 and height > 100
        assert (tmp_path / "figures" / f"{figure.name}.svg").read_text().startswith("<svg")
        with (tmp_path / "figures" / f"{figure.name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [list(row) for row in figure.rows]
        spec = json.loads((tmp_path / "figures" / f"{figure.name}.json").read_text())
        assert spec["data"]["values"] == json.loads(json.dumps(figure.rows))


def test_figures_into_a_file_are_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        write_figures(make_frontier(2), tmp_path / "taken")


def test_frontier_figure_marks_predicted_and_beaten_points():
    frontier = make_frontier()
    answers = {name: replace(found, frontier=found.frontier[:-1]) for name, found in frontier.answers.items()}
    figures = {figure.name: figure for figure in list_figures(replace(frontier, answers=answers))}
    for profile, measured in PROFILES.items():
        figure = figures[f"frontier-{profile}"]
        marks = next(layer for layer in figure.spec["layer"] if layer["mark"]["type"] == "point")
        assert marks["mark"]["filled"] is measured
        assert [row["frontier"] for row in figure.rows] == [True] * 5 + [False]
        assert ("measured" if measured else "predicted") in figure.title


def test_dropped_layers_have_no_box():
    frontier = make_frontier()
    figure = next(figure for figure in list_figures(frontier) if figure.name == "shapes-ffn")
    for point in frontier.points:
        layers = [row["layer"] for row in figure.rows if row["point"] == point.name]
        assert layers == [row.layer for row in point.layers]


# In a browser


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on this machine: make test-browser says how to install it")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=quiet)
        yield found
        found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of a frontier; notes of what went wrong and of requests come back with it."""
    contexts = []

    def open_page(frontier, width=1280, **rest):
        path = tmp_path / "report.html"
        write_frontier_page(frontier, path)
        context = browser.new_context(viewport={"width": width, "height": 900}, **rest)
        contexts.append(context)
        page, errors, requests = context.new_page(), [], []
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        return page, errors, [url for url in requests if not url.startswith(("file:", "data:"))]

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(opened, width, scheme):
    frontier = make_frontier()
    page, errors, requests = opened(frontier, width, color_scheme=scheme)
    assert errors == [] and requests == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = page.locator("figure svg.marks").count()
    assert drawn == len(list_figures(frontier))
    for place in range(drawn):
        assert page.locator("figure svg.marks").nth(place).locator("path, rect").count() > 3
    boxes = page.evaluate(
        "Array.from(document.querySelectorAll('figure'), (f) => [f.clientWidth, f.querySelector('svg').clientWidth])"
    )
    assert all(svg <= figure for figure, svg in boxes)


def test_pointer_over_a_point_shows_its_values(opened):
    page, _, _ = opened(make_frontier())
    marks = page.locator("[data-chart='frontier-this-machine'] .mark-symbol path[aria-roledescription='point']")
    assert marks.count() == 6
    marks.nth(1).hover(force=True)
    words = page.locator("#vg-tooltip-element").inner_text(timeout=5000)
    assert "keep 0.90" in words and "1.25" in words


def test_colours_follow_the_scheme(opened):
    page, _, _ = opened(make_frontier(2), color_scheme="light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_large_page_draws_every_box(opened):
    page, errors, _ = opened(make_frontier(12, 48))
    assert errors == []
    assert page.locator("[data-chart='shapes-ffn'] .mark-rect path").count() > 400


def test_contrast_of_words(opened):
    page, _, _ = opened(make_frontier(3), color_scheme="dark")
    found = page.evaluate(
        """Array.from(document.querySelectorAll('p, small, th, td, dt, dd, h1, h2, h3'), (e) => {
             const s = getComputedStyle(e); let b = e; let back = 'rgba(0, 0, 0, 0)';
             for (; b && back === 'rgba(0, 0, 0, 0)'; b = b.parentElement) back = getComputedStyle(b).backgroundColor;
             return [s.color, back]; })"""
    )
    assert found and min(contrast(*pair) for pair in found) >= 4.5


def contrast(first, second):
    """The ratio of luminances of WCAG 2.1."""
    lights = sorted(luminance(colour) for colour in (first, second))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_template_ships_with_the_package():
    import cli.page

    assert (Path(cli.page.__file__).parent / "templates" / cli.page.PAGE).is_file()
