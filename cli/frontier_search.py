"""A wider search of a comparison, over `--keep`, axes and formats, by the trials of one Optuna study.

Optuna (Akiba et al. 2019) keeps the trials and proposes them by TPE (Bergstra et al. 2011; for two objectives Ozaki et
al. 2020): perplexity over dense's goes down, tokens/s as the first profile predicts them go up. A trial's point is made
as all others are. Any number of processes and machines share a study (cli/frontier_turns.py). A trial is numbered by
its place among those that were not given up, and its proposal is seeded by that number, so that one process makes the
same trials however often it was stopped. The trial of a process that died is tried again.

Imported only by running verbs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cli.console import RunFailure
from cli.frontier_job import FrontierJob, Level, Variant, name_keep, open_format, open_level
from cli.frontier_place import Place
from cli.frontier_plans import Calibration, plan_checked
from cli.frontier_points import Bench, make_point
from cli.frontier_store import PLANS, load_plan, load_point
from cli.frontier_study import Space, make_sampler, open_space, open_study
from cli.frontier_turns import claim_trial, give_back, keep_alive, list_active
from compress.errors import UserError
from compress.pipeline import write_plan
from compress.plan import Plan
from compress.recipe import Recipe
from compress.report_frontier import Point

DIGITS = 2  # of a proposed --keep: finer steps make plans that hardly differ
FEW = 2  # choices that a sentence names
MOST_TRIES = 3  # a trial that ends its process so often is left out


# Trials


@dataclass(frozen=True)
class Search:
    """A study at work: what its trials are made with."""

    study: Any
    space: Space
    bench: Bench
    calibration: Calibration

    @property
    def made(self) -> FrontierJob:
        """What was asked for."""
        return self.bench.made


def search_points(bench: Bench, calibration: Calibration, place: Place) -> Search:
    """Make trials until as many as were asked for are done or taken by other processes; return the search."""
    made, console = calibration.made, bench.console
    search = Search(open_study(made), open_space(made), bench, calibration)
    wanted = made.request.search
    while (trial := claim_trial(search.study, wanted)) is not None:
        console.progress("search", trial.user_attrs["place"], wanted)
        try:
            run_trial(search, trial, place)
        except BaseException:
            give_back(search.study, trial)
            raise
    console.progress("search", wanted, wanted)
    return search


def run_trial(search: Search, trial: Any, place: Place) -> None:
    """Make one trial and tell the study how it went."""
    from optuna.trial import TrialState

    console, number = search.bench.console, trial.user_attrs["place"] + 1
    try:
        with keep_alive(trial):
            with place.hold(console):
                search.bench.look()  # what all points are compared with is computed once
            values = try_trial(search, trial)
        state = TrialState.COMPLETE if values else TrialState.PRUNED
        search.study.tell(trial, values, state=state, skip_if_finished=True)
    except RuntimeError:  # Optuna's, of a trial that is finished
        if not search.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            raise
        console.warn(f"trial {number} of the search paused for so long that another machine makes it again.")


def try_trial(search: Search, trial: Any) -> tuple[float, float] | None:
    """Return a trial's values; None where it has no plan, or its model no numbers, and the trial notes why."""
    try:
        if trial.user_attrs.get("tries", 1) > MOST_TRIES:
            raise RunFailure(f"the process that made it ended {MOST_TRIES} times.")
        return make_trial(search, trial)
    except (UserError, RunFailure) as error:
        trial.set_user_attr("reason", str(error))
        if isinstance(error, RunFailure):
            search.bench.console.warn(f"trial {trial.user_attrs['place'] + 1} of the search is left out: {error}")
        return None


def make_trial(search: Search, trial: Any) -> tuple[float, float]:
    """Make a trial's point, or find another of the same plan; return perplexity over dense's, and tokens/s."""
    bench = search.bench
    level, form = propose_level(search, trial)
    plan = plan_checked(search.calibration.survey(), level, bench.console)
    key = [hash_plan(plan), form]
    for other in search.study.get_trials(deepcopy=False):
        if other.values is not None and other.user_attrs.get("plan") == key:
            trial.set_user_attr("same", other.user_attrs["point"])
            return other.values[0], other.values[1]
    variant = Variant(adopt_level(bench, level, plan), search.made.recovers, form)
    point = make_point(bench, variant)
    assert point.ratio is not None
    trial.set_user_attr("plan", key)
    trial.set_user_attr("point", variant.name)
    return point.ratio.value, predict_rate(search, variant)


def propose_level(search: Search, trial: Any) -> tuple[Level, str]:
    """Return the amount and the axes of a trial as a level, and its format."""
    space, place = search.space, int(trial.user_attrs["place"])
    search.study.sampler = make_sampler(search.made.job.recipe.seed, place)
    trial.suggest_float("keep", space.low, space.high)
    trial.suggest_categorical("axes", space.axes)
    form = str(trial.suggest_categorical("format", space.formats))
    return open_trial_level(search, trial.params, place), form


def open_trial_level(search: Search, params: Mapping[str, Any], place: int) -> Level:
    """Return the level of a trial's parameters."""
    space, made = search.space, search.made
    keep = min(max(round(params["keep"], DIGITS), space.low), space.high)
    axes = tuple(params["axes"].split("+"))
    recipe: Recipe = replace(made.levels[0].recipe, keep=keep, axes=axes)
    name = f"search-{place + 1:02d}-{name_keep(keep)}{name_axes(axes, made.job.recipe.axes)}"
    return open_level(name, recipe, made.job, search.bench.console)


def name_axes(axes: tuple[str, ...], allowed: tuple[str, ...]) -> str:
    """Return what a name says of axes: nothing of all, and what is left out of many, as tables are narrow."""
    missing = [axis for axis in allowed if axis not in axes]
    if not missing:
        return ""
    return f"-no-{missing[0]}" if len(missing) < len(axes) - 1 else f"-{'+'.join(axes)}"


def adopt_level(bench: Bench, level: Level, plan: Plan) -> Level:
    """Return the level that has this plan already, or this one with its plan written."""
    for own in bench.made.levels:
        if bench.plans[own.name] == plan:
            return own
    path = bench.made.folder / PLANS / f"{level.name}.json"
    write_plan(plan, path)
    bench.plans[level.name] = load_plan(path, bench.made.job.spec.shape)
    return level


def hash_plan(plan: Plan) -> str:
    """Return what tells a plan from others, whatever it notes."""
    return hashlib.sha256(json.dumps(replace(plan, notes={}).to_json()).encode()).hexdigest()


def predict_rate(search: Search, variant: Variant) -> float:
    """Return tokens per second by the first profile, so that no noise of a measurement leads the search."""
    made = search.made
    device = open_format(made.targets[0], variant.format, made.job, made.request.recipe)
    assert device is not None
    return device.estimate(search.bench.open(variant)[1].shape).tokens_per_s


# What came of it


@dataclass(frozen=True)
class Found:
    """The points of a search that lie in this folder, a sentence on all its trials, and the trials as rows."""

    points: tuple[tuple[Variant, Point], ...] = ()
    note: str = ""
    rows: tuple[dict[str, Any], ...] = ()


def gather_found(search: Search) -> Found:
    """Return what all processes have made so far, in the order of the trials."""
    trials = sorted(list_active(search.study), key=lambda one: (one.user_attrs.get("place", one.number), one.number))
    known = {variant.name for variant in search.made.list_variants()}
    points, missing = [], 0
    for trial in trials:
        name = trial.user_attrs.get("point")
        if trial.values is None or name is None or name in known:
            continue
        found = open_found(search, trial)
        missing += found is None
        points += [found] if found else []
    rows = tuple(describe_trial(trial) for trial in trials)
    return Found(tuple(points), describe_found(search, rows, missing), rows)


def open_found(search: Search, trial: Any) -> tuple[Variant, Point] | None:
    """Return a trial's point; None where it was made in another folder."""
    bench, made = search.bench, search.made
    level = open_trial_level(search, trial.params, trial.user_attrs["place"])
    variant, path = Variant(level, made.recovers, trial.params["format"]), made.folder / PLANS / f"{level.name}.json"
    point = load_point(bench.place(variant))
    if point is None or not path.is_file():
        return None
    bench.plans.setdefault(level.name, load_plan(path, made.job.spec.shape))
    return variant, point


def describe_trial(trial: Any) -> dict[str, Any]:
    """Return one trial as plain data."""
    attributes = trial.user_attrs
    ratio, rate = trial.values or (None, None)
    return {
        "trial": attributes.get("place", trial.number) + 1, "state": trial.state.name.lower(), **trial.params,
        "point": attributes.get("point") or attributes.get("same"), "again": "same" in attributes,
        "ratio": ratio, "tokens_per_s": rate, "reason": attributes.get("reason"),
    }  # fmt: skip


def describe_found(search: Search, rows: tuple[dict[str, Any], ...], missing: int) -> str:
    """Return what was searched and what came of it, as a sentence."""
    space = search.space
    done = [row for row in rows if row["state"] in ("complete", "pruned")]
    counts = {
        "with the plan of another": sum(row["again"] for row in done),
        "impossible": sum(row["state"] == "pruned" for row in done),
        "with points in other folders": missing,
        "not finished (the same command shows them later)": len(rows) - len(done),
    }
    sets, formats = (
        " or ".join(names) if len(names) <= FEW else f"{len(names)} {what}"
        for names, what in ((space.axes, "sets of axes"), (space.formats, "formats"))
    )
    told = "".join(f"; {count} {words}" for words, count in counts.items() if count)
    return f"Search: {len(rows)} trials over --keep {space.low:g} to {space.high:g}, {sets}, {formats}{told}."
