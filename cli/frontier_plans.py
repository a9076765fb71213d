"""One calibration for all points of a comparison: their plans, from one pass over the dense model.

Shapes are chosen at prices of the axes that are found once: from repaired cuts at the level in the middle on a small
model, from one probe otherwise (compress.trials, compress.probe). `--trials N` measures N plans at every level instead,
as `compress` does, which costs as much as so many repairs at each of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cli.console import Console
from cli.frontier_job import FrontierJob, Level
from cli.frontier_store import CALIBRATION, PLANS, POINT, POINTS, load_plan, write_json
from cli.prepare import Texts, warn_tokens
from compress.checkpoint_source import read_json
from compress.choose import Prices, choose_plan
from compress.errors import UserError
from compress.frontier import Curves, middle_level, sample_damage
from compress.importance.findings import Findings
from compress.pipeline import Task, find_units, open_bench, turn_task, write_plan
from compress.plan import Plan, keep_everything
from compress.probe import weigh_axes
from compress.recipe import Recipe
from compress.settle import absorb_rows, list_constants, report_absorption, settle_plan
from compress.surgery.absorbed_view import Constants
from compress.surgery.describe import new_config
from compress.surgery.rotate import collect_stream_gram, rotated_findings
from compress.trials import count_trials, make_prices, price_axes, search_plan


@dataclass(frozen=True)
class Survey:
    """What plans are made from: the task (rotated, where the recipe says so), its findings, the prices of the axes.

    `dense` and `seen` are the task and the findings before any rotation, `constants` what that absorbed.
    """

    task: Task
    findings: Findings
    prices: Prices
    dense: Task
    seen: Findings
    constants: Constants

    @property
    def turned(self) -> bool:
        """Whether the task is rotated."""
        return self.task is not self.dense


@dataclass
class Calibration:
    """The survey of a comparison, made when a first plan needs it and then used for all others, and plans it led to.

    `drafts`: level -> plan without trials; None where nothing allowed reaches the level and it may be left out.
    """

    made: FrontierJob
    texts: Texts
    console: Console
    found: Survey | None = None
    seconds: float = 0.0
    drafts: dict[str, Plan | None] = field(default_factory=dict)

    def survey(self) -> Survey:
        """Return the survey; its prices are those at the level in the middle of all, planned already or not."""
        if self.found is None:
            started = time.perf_counter()
            self.found = survey_model(self.made, self.made.levels, self.texts, self.console)
            self.seconds = time.perf_counter() - started
        return self.found

    def draft(self, level: Level) -> Plan | None:
        """Return a level's plan without trials; UserError where nothing reaches a level that has to be there."""
        if level.name not in self.drafts:
            self.drafts[level.name] = self.try_level(level)
        return self.drafts[level.name]

    def try_level(self, level: Level) -> Plan | None:
        """Plan a level; warn of one that may be left out."""
        quick = replace(level, recipe=replace(level.recipe, trials=0))
        try:
            return plan_checked(self.survey(), quick, self.console)
        except UserError as error:
            if self.made.request.levels.chosen or level == self.made.levels[0]:
                raise explain_refusal(self.made, error) from error
            self.console.warn(f"{level.name} is left out: {error}")
            return None


def explain_refusal(made: FrontierJob, error: UserError) -> UserError:
    """Return the refusal of a level, with how to go on in a folder that holds points already."""
    if made.request.overwrite or not any((made.folder / POINTS).glob(f"*/{POINT}")):
        return error
    return UserError(
        f"{str(error).rstrip('.')}; the points in {made.folder} stay, and other levels may join them, but other flags "
        "need another output or --overwrite."
    )


def check_levels(calibration: Calibration) -> None:
    """Raise UserError where a level that is still to be planned cannot be reached; nothing is written."""
    made = calibration.made
    for level in made.levels if made.request.overwrite else list_missing(made, list_wanted(made)):
        calibration.draft(level)


def list_wanted(made: FrontierJob) -> list[Level]:
    """Return the levels but for those that an earlier calibration found out of reach."""
    skipped = [] if made.request.levels.chosen else load_calibration(made).get("unreachable", [])
    return [level for level in made.levels if level.name not in skipped]


def list_missing(made: FrontierJob, levels: Sequence[Level]) -> list[Level]:
    """Return the levels that have no plan yet."""
    return [level for level in levels if not (made.folder / PLANS / f"{level.name}.json").is_file()]


def gather_plans(
    made: FrontierJob, texts: Texts, console: Console, calibration: Calibration | None = None
) -> dict[str, Plan]:
    """Return level -> plan; the dense model is calibrated on once, and not at all where all plans are there.

    A level that cannot be reached is left out with a warning where only a number of points was asked for.
    """
    folder, levels = made.folder / PLANS, list_wanted(made)
    missing = list_missing(made, levels)
    if missing:
        skipped = write_plans(made, missing, calibration or Calibration(made, texts, console))
        levels = [level for level in levels if level.name not in skipped]
    plans = {level.name: load_plan(folder / f"{level.name}.json", made.job.spec.shape) for level in levels}
    if missing:
        first = levels[0]
        warn_tokens(replace(made.job, recipe=first.recipe), plans[first.name], texts.calibration, console)
    return plans


def write_plans(made: FrontierJob, levels: Sequence[Level], calibration: Calibration) -> list[str]:
    """Calibrate and write a plan for each level; return the names of those that nothing allowed reaches.

    What the calibration found is written first: whoever finds all plans there calibrates no more.
    """
    survey = calibration.survey()
    drafts = {level.name: calibration.draft(level) for level in levels}
    unreachable = [name for name, plan in drafts.items() if plan is None]
    before = load_calibration(made).get("unreachable", [])
    found = {
        "damage": sample_damage(survey.seen, survey.prices), "tokens": survey.seen.tokens,
        "skipped_sink_tokens": survey.seen.sinks, "pinned_channels": len(survey.seen.pinned),
        "seconds": calibration.seconds, "unreachable": sorted({*before, *unreachable}),
    }  # fmt: skip
    write_json(made.folder / CALIBRATION, found)
    for level in levels:
        plan = drafts[level.name]
        if plan is not None:
            if has_trials(level.recipe):
                plan = plan_checked(survey, level, calibration.console)
            write_plan(plan, made.folder / PLANS / f"{level.name}.json")
    return unreachable


def load_calibration(made: FrontierJob) -> dict[str, Any]:
    """Return what an earlier calibration left; nothing where there was none."""
    path = made.folder / CALIBRATION
    return read_json(path) if path.is_file() else {}


def survey_model(made: FrontierJob, levels: Sequence[Level], texts: Texts, console: Console) -> Survey:
    """Run pass 1, rotate the model if the recipe says so, and find the prices of the axes."""
    names = {level.name: level.recipe.keep if level.goal is None else level.goal.share for level in levels}
    middle = next(level for level in levels if level.name == middle_level(names))
    dense = Task(made.job.checkpoint, made.job.spec, texts.calibration, middle.recipe, middle.goal)
    seen = find_units(dense, console.progress)
    task, findings, constants = dense, seen, {}
    if middle.recipe.rotate != "none":
        constants = list_constants(report_absorption(seen, middle.recipe))
        task = turn_task(dense, seen.pinned, constants)
        gram = collect_stream_gram(task.checkpoint, task.spec, task.windows, middle.recipe.spill_bytes)
        findings = rotated_findings(seen, gram.diagonal())
    return Survey(task, findings, price_task(task, findings, console), dense, seen, constants)


def price_task(task: Task, findings: Findings, console: Console) -> Prices:
    """Return what damage on each axis costs; nothing where no plan asks, or each finds its own."""
    recipe, bench = task.recipe, open_bench(task)
    measured = recipe.ratio == "loss" and count_trials(bench)  # refuses a text too short for them
    if recipe.ratio != "loss" or has_trials(recipe):
        return Prices({})
    if measured:
        return make_prices(findings, price_axes(bench, findings, console.progress))
    if len(recipe.axes) == 1:
        return Prices({})
    return Prices(weigh_axes(task.checkpoint, task.spec, findings, task.windows, recipe.axes))


def has_trials(recipe: Recipe) -> bool:
    """Tell whether several plans of a level are rebuilt and measured before one is chosen."""
    return recipe.ratio == "loss" and recipe.trials > 0


def plan_checked(survey: Survey, level: Level, console: Console) -> Plan:
    """Return the plan of one level; UserError where no stock class holds it."""
    plan = plan_level(survey, level, console)
    new_config(survey.dense.spec, plan, level.recipe)
    return plan


def plan_level(survey: Survey, level: Level, console: Console) -> Plan:
    """Return the plan of one level."""
    # What a rotation absorbed is gone from the task already.
    recipe = replace(level.recipe, absorb=survey.task.recipe.absorb)
    task = replace(survey.task, recipe=recipe, goal=level.goal)
    if level.goal is not None and level.goal.share == 1:
        return keep_everything(survey.dense.spec.shape)  # dense is as fast as was asked for
    if has_trials(recipe):
        plan = search_plan(open_bench(task), survey.findings, console.progress)
    else:
        plan = choose_plan(task.spec, survey.findings, recipe, survey.prices, goal=level.goal).plan
        plan = settle_plan(task.checkpoint, task.spec, survey.findings, recipe, plan)
    notes: dict[str, Any] = {"rotate": level.recipe.rotate if survey.turned else "none"}
    if survey.turned:
        notes["pinned_channels"] = list(survey.seen.pinned)  # from which compress_checkpoint rotates again
    plan = replace(plan, notes={**plan.notes, **notes})
    return absorb_rows(survey.dense.spec, survey.seen, level.recipe, plan) if survey.constants else plan


def load_damage(made: FrontierJob) -> Curves:
    """Return the damage curves that the calibration found."""
    data = load_calibration(made).get("damage", {})
    return {
        layer: {axis: tuple((kept, loss) for kept, loss in rows) for axis, rows in axes.items()}
        for layer, axes in data.items()
    }
