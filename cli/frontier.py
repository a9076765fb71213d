"""One whole comparison: one calibration, all points, their speeds, what follows. Imported only by running verbs."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from cli.console import Console
from cli.figures import write_figures
from cli.frontier_job import APART, EXACT, FrontierJob, Variant, check_jobs, list_profiles, prepare_frontier, read_texts
from cli.frontier_place import Place, open_place
from cli.frontier_plans import Calibration, check_levels, gather_plans, load_damage
from cli.frontier_points import Bench, Scorer, make_point
from cli.frontier_request import LOSS, SAMPLES, SPEEDUP, CompareRequest
from cli.frontier_search import Found, gather_found, search_points
from cli.frontier_shared import share_work
from cli.frontier_speed import add_speeds
from cli.frontier_store import POINT, POINTS, RESULTS, WORK, write_json, write_whole
from cli.frontier_study import check_study, hide_password
from cli.frontier_table import render_frontier, write_csv
from cli.manifest import list_versions
from cli.measure import limit_threads
from cli.page import join_words, write_frontier_page
from cli.version import read_version
from compress.frontier import answer_device
from compress.recipe import Recipe, flag
from compress.report_frontier import Frontier, Point
from compress.text import Windows

JSON, CSV, PAGE = RESULTS


def run_compare(request: CompareRequest, console: Console, scorer: Scorer | None = None) -> Frontier:
    """Check, calibrate once, make and measure every point, write the results and print them.

    `scorer` adds accuracies of tasks, which `request.scorer` names. Raises UserError before anything is written; an
    interrupt keeps the points that are complete, and the same command goes on from there.
    """
    if scorer is not None and request.jobs > 1:
        raise ValueError("a scorer cannot be sent to other processes")
    limit_threads(request.speed.threads)
    started = time.perf_counter()
    made = prepare_frontier(request, console)
    texts = read_texts(made, console)
    check_jobs(made, texts)
    check_study(made)
    calibration = Calibration(made, texts, console)
    bench = Bench(made, texts, {}, console, scorer)
    try:
        with open_place(made, lambda: check_levels(calibration), console) as place:
            frontier = compare_points(bench, calibration, place, started)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(describe_stop(made)) from stop
    console.show(render_frontier(frontier))
    return frontier


def describe_stop(made: FrontierJob) -> str:
    """Return how far a run came that was interrupted."""
    request, points = made.request, made.folder / POINTS
    done = sum((points / one.name / POINT).is_file() for one in made.list_variants())
    done += len(list(points.glob(f"search-*/{POINT}")))
    total = len(list(made.list_variants())) + request.search
    again = "the same command without --overwrite" if request.overwrite else "the same command"
    return f"stopped; {done} of {total} points are complete in {made.folder}, and {again} goes on from there"


def compare_points(bench: Bench, calibration: Calibration, place: Place, started: float) -> Frontier:
    """Make all points, find their speeds, and write the results."""
    made, texts, console = bench.made, bench.texts, bench.console
    with place.hold(console):
        bench.plans |= gather_plans(made, texts, console, calibration)
        bench.made = replace(made, levels=tuple(level for level in made.levels if level.name in bench.plans))
        points = make_points(bench, console)
    search = search_points(bench, calibration, place) if made.request.search else None
    with place.hold(console):
        found = gather_found(search) if search else Found()
        rated, notes = add_speeds(bench, [*points, *found.points], console)
        notes += (*explain_levels(made), *((found.note,) if found.note else ()))
        frontier = join_results(bench, rated, notes, time.perf_counter() - started)
        if found.rows:
            frontier = replace(frontier, manifest={**frontier.manifest, "search": found.rows})
        write_results(frontier, made.request)
        if place.is_alone():
            shutil.rmtree(made.folder / WORK, ignore_errors=True)
    return frontier


def make_points(bench: Bench, console: Console) -> list[tuple[Variant, Point]]:
    """Make the points of all levels."""
    if bench.made.request.jobs > 1:
        share_work(bench, console)
    points: list[tuple[Variant, Point]] = []
    variants = list(bench.made.list_variants())
    for place, variant in enumerate(variants):
        points.append((variant, make_point(bench, variant)))
        console.progress("points", place + 1, len(variants))
    return points


def join_results(bench: Bench, points: tuple[Point, ...], notes: tuple[str, ...], seconds: float) -> Frontier:
    """Return the results with the answers for every device."""
    made, request = bench.made, bench.made.request
    answers = {
        target.name: answer_device(points, target.name, request.loss, request.speedup) for target in made.targets
    }
    evaluation = bench.evaluation
    manifest = {
        "settings": made.settings, "versions": {"lightpress": read_version(), **list_versions()},
        "source": str(request.source), "text": bench.texts.calibration.source,
        "calibration_tokens": bench.texts.calibration.tokens, "evaluation_tokens": evaluation.tokens,
        "seed": made.job.recipe.seed,
    }  # fmt: skip
    return Frontier(
        str(request.source), name_title(request.source), points, answers,
        describe_quality(points, evaluation), notes, load_damage(made),
        (describe_run(request),), manifest, seconds,
    )  # fmt: skip


def describe_quality(points: tuple[Point, ...], evaluation: Windows) -> str:
    """Return what quality was measured on, and with what where that is not the checkpoint."""
    words = f"Quality: on {evaluation.tokens} tokens; text: {evaluation.source}."
    formats = list(dict.fromkeys(point.format for point in points if point.format != EXACT))
    if not formats:
        return words
    graphs = "is that of our ONNX graph, also beside speeds of other runtimes"
    return f"{words} Quality in {join_words(formats)} {graphs}."


def explain_levels(made: FrontierJob) -> Iterator[str]:
    """Yield what the speed-ups of the points' names are measured by, where points have several formats."""
    request, target = made.request, made.targets[0]
    if not request.levels.speedup or request.formats == (EXACT,) or target.device is None:
        return
    form = made.job.recipe.format or target.device.workload.weights
    yield (
        f"speedup-N: cut until {target.name} predicts N times the speed of the dense model, both in {form}; in other "
        "formats these are the same shapes. Times dense in the tables are over the dense model in "
        "each device's plain format."
    )


def name_title(source: str) -> str:
    """Return the heading of the page."""
    return f"{Path(source).name or source}: accuracy against speed"


def describe_run(request: CompareRequest) -> str:
    """Return the command of the whole comparison."""
    levels, tasks = request.levels, request.tasks
    parts: list[tuple[str, object]] = [("--profile", name) for name in list_profiles(request)]
    parts += [("--keep", ",".join(f"{share:g}" for share in levels.keep))] if levels.keep else []
    parts += [("--speedup", ",".join(levels.speedup))] if levels.speedup else []
    parts += [("--points", levels.points)] if not (levels.keep or levels.speedup) else []
    parts += [("--formats", ",".join(request.formats))] if request.formats != ("fp32",) else []
    parts += [("--recover-tokens", request.recover_tokens)] if request.recover_tokens else []
    parts += [("--eval-text", request.eval_text)] if request.eval_text else []
    parts += [("--tasks", ",".join(tasks.names))] if tasks.names else []
    parts += [*(("--pairs", path) for path in tasks.pairs), *(("--choices", path) for path in tasks.choices)]
    own = {
        "--task-folder": tasks.folder, "--limit": tasks.limit, "--shots": tasks.shots,
        "--samples": request.samples if request.samples != SAMPLES else None,
        "--loss": f"{100 * request.loss:g}%" if request.loss != LOSS else None,
        "--at-least": f"{request.speedup:g}x" if request.speedup != SPEEDUP else None,
        "--search": request.search or None,
        "--storage": hide_password(request.storage) if request.storage else None,
    }  # fmt: skip
    parts += [("--text", request.text), *((name, value) for name, value in own.items() if value is not None)]
    parts += list_recipe(request.recipe)
    given = "".join(f" {name} {shlex.quote(str(value))}" for name, value in parts)
    return f"lightpress compare {shlex.quote(str(request.source))}{given} -o {shlex.quote(str(request.output))}"


def list_recipe(recipe: Recipe) -> Iterator[tuple[str, object]]:
    """Yield the flags of what a recipe says otherwise than by default, but for what each point or device has."""
    for item in fields(Recipe):
        value = getattr(recipe, item.name)
        if value != item.default and item.name not in APART:
            yield flag(item.name), ",".join(value) if isinstance(value, tuple) else value


def write_results(frontier: Frontier, request: CompareRequest) -> None:
    """Write what was found as JSON, as CSV, as a page, and as figures where they are asked for."""
    write_json(request.output / JSON, frontier)
    write_whole(request.output / CSV, write_csv(frontier))
    write_frontier_page(frontier, request.output / PAGE)
    if request.figures is not None:
        write_figures(frontier, request.figures)
