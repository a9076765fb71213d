"""A wider search of a comparison, over `--keep`, axes and formats, by the trials of one Optuna study.

Optuna (Akiba et al. 2019) keeps the trials and proposes them by TPE (Bergstra et al. 2011; for two objectives Ozaki et
al. 2020): perplexity over dense's goes down, tokens/s as the first profile predicts them go up. A trial's point is made
as all others are. Any number of processes and machines share a study. A trial is numbered by its place among those that
were not given up, and its proposal is seeded by that number, so that one process makes the same trials however often it
was stopped. The trial of a process that died is tried again.

    OUT/search.log      Optuna's journal, unless --storage says otherwise
    OUT/.search.lock    byte 0: who is at work in OUT; byte 1: who makes what all of them share

Imported only by running verbs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from cli.console import Console, RunFailure
from cli.frontier_job import FrontierJob, Level, Variant, name_keep, open_format, open_level
from cli.frontier_plans import Calibration, plan_level
from cli.frontier_points import Bench, make_point
from cli.frontier_request import CompareRequest
from cli.frontier_store import PLANS, SETTINGS, load_plan, load_point, open_store, refuse_others
from cli.manifest import encode_manifest
from cli.prepare import check_choices
from compress.checkpoint_source import read_json
from compress.errors import UserError
from compress.pipeline import write_plan
from compress.plan import Plan
from compress.recipe import Recipe
from compress.report_frontier import Point
from compress.surgery.describe import new_config

LOG, LOCK = "search.log", ".search.lock"
STUDY, KEY = "lightpress", "lightpress"
STARTUP = 6  # trials that are drawn at random before TPE has anything to go by
DIGITS = 2  # of a proposed --keep: finer steps make plans that hardly differ
FEW = 2  # choices that a sentence names
MOST_TRIES = 3  # a trial that ends its process so often is left out
BEAT_SECONDS, DEAD_SECONDS = 60.0, 900.0  # signs of life of a trial for other machines, and none for so long is death
# What of a folder's settings decides the results of trials.
SHARED = ("checkpoint", "recipe", "text", "evaluation text", "number of recovery tokens")


# The folder, which several processes may work in


@dataclass(frozen=True)
class Place:
    """A comparison's folder as one process holds it; `descriptor` is None where it does not share it with others."""

    descriptor: int | None = None

    def is_alone(self) -> bool:
        """Tell whether no other process works in the folder; then none begins to before this one has ended."""
        return self.descriptor is None or take_byte(self.descriptor, 0)

    @contextmanager
    def hold(self, console: Console) -> Iterator[None]:
        """Let the block run in one process at a time."""
        if self.descriptor is None:
            yield
            return
        import fcntl

        if not take_byte(self.descriptor, 1):
            console.note("Another process makes what the search needs; waiting for it.")
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, 1)
        try:
            yield
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, 1)


def take_byte(descriptor: int, byte: int) -> bool:
    """Return whether a byte of the lock file could be locked against all others."""
    import fcntl

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    return True


@contextmanager
def open_place(made: FrontierJob) -> Iterator[Place]:
    """Make the folder ready, beside other processes of the same search if there are any; UserError as `open_store`."""
    request, folder = made.request, made.folder
    if not request.search:
        open_store(folder, made.settings, request.overwrite)
        yield Place()
        return
    import fcntl

    if not (folder / SETTINGS).is_file():
        open_store(folder, made.settings, request.overwrite)
    with (folder / LOCK).open("a+b") as lock:
        place = Place(lock.fileno())
        alone = place.is_alone()
        if alone:  # only then is a half-written folder nobody's
            open_store(folder, made.settings, request.overwrite)
        elif request.overwrite:
            raise UserError(f"Another process is at work in {folder}: wait for its end, or leave --overwrite out.")
        if request.overwrite:
            (folder / LOG).unlink(missing_ok=True)
        fcntl.lockf(lock.fileno(), fcntl.LOCK_SH, 1, 0)
        if not alone:
            refuse_others(folder, read_json(folder / SETTINGS), made.settings)
        yield place


# What is searched


@dataclass(frozen=True)
class Space:
    """What trials are drawn from: shares to keep, `low` .. `high`, sets of axes such as `ffn+layers`, formats."""

    low: float
    high: float
    axes: tuple[str, ...]
    formats: tuple[str, ...]


def open_space(made: FrontierJob) -> Space:
    """Return what the levels, the recipe, the model and the first profile leave to choose."""
    shares = [level.recipe.keep for level in made.levels]
    job, recipe = made.job, made.request.recipe
    formats = tuple(name for name in made.request.formats if open_format(made.targets[0], name, job, recipe))
    return Space(min(shares), max(shares), tuple(list_axes(made)), formats)


def list_axes(made: FrontierJob) -> Iterator[str]:
    """Yield the sets of the recipe's axes that the rest of it and the model allow, FFN channels always among them."""
    axes = made.job.recipe.axes
    needed = {"ffn"} & set(axes)
    for size in range(1, len(axes) + 1):
        for some in combinations(axes, size):
            if needed <= set(some) and allows_axes(made, some):
                yield "+".join(some)


def allows_axes(made: FrontierJob, axes: tuple[str, ...]) -> bool:
    """Tell whether plans can be made that cut these axes only."""
    try:
        check_choices(made.job.spec, replace(made.job.recipe, axes=axes))
    except UserError:
        return False
    return True


def describe_study(made: FrontierJob, space: Space) -> dict[str, Any]:
    """Return what all trials of a study have in common, by what a user would call it."""
    target = made.targets[0]
    assert target.device is not None
    profile = hashlib.sha256(encode_manifest(asdict(target.device.profile)).encode()).hexdigest()
    return {
        **{name: made.settings[name] for name in SHARED},
        "first profile": [target.name, profile],
        "range of --keep": [space.low, space.high],
        "choice of axes": space.axes,
        "list of --formats": space.formats,
    }


# The study


def find_storage(request: CompareRequest) -> str:
    """Return the URL or the file that holds the study."""
    return request.storage or str(request.output / LOG)


def hide_password(storage: str) -> str:
    """Return a storage as it may be shown: without the user and the password of a URL."""
    return re.sub(r"//[^/]*@", "//USER:PASSWORD@", storage)


def is_url(storage: str) -> bool:
    """Tell a database from a file."""
    return "://" in storage


def check_study(made: FrontierJob) -> None:
    """Raise UserError, before anything is written, where a study that is there already is of something else."""
    request = made.request
    if not request.search or (request.overwrite and not request.storage):
        return
    storage = find_storage(request)
    if is_url(storage) or Path(storage).is_file():
        open_study(made)


def open_study(made: FrontierJob) -> Any:
    """Return the study, made if it is not there; UserError where it cannot be opened, or is of something else."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = find_storage(made.request)
    try:
        study = load_study(open_storage(storage))
    except list_errors(storage) as error:
        reason = (str(error).strip().splitlines() or [""])[0].strip(" .:") or type(error).__name__
        raise UserError(
            f"--storage {hide_password(storage)} cannot be opened ({hide_password(reason)}): give a file, or a URL "
            "such as sqlite:///search.db."
        ) from error
    refuse_study(study, made)
    return study


def load_study(storage: Any) -> Any:
    """Return the study of a storage; to look at one that is there writes nothing."""
    import optuna

    try:
        return optuna.load_study(study_name=STUDY, storage=storage)
    except KeyError:
        goals = ["minimize", "maximize"]
        return optuna.create_study(study_name=STUDY, storage=storage, directions=goals, load_if_exists=True)


def open_storage(storage: str) -> Any:
    """Return Optuna's storage for a file, locked as it works on NFS too, or for the URL of a database."""
    import optuna
    from optuna.storages import journal

    if is_url(storage):
        return optuna.storages.RDBStorage(storage)
    return optuna.storages.JournalStorage(journal.JournalFileBackend(storage))


def list_errors(storage: str) -> tuple[type[Exception], ...]:
    """Return the exceptions with which a storage that is wrong or out of reach is refused."""
    from optuna.exceptions import OptunaError

    own = (OSError, ValueError, LookupError, TypeError, ImportError, OptunaError)
    if not is_url(storage):
        return own
    from sqlalchemy.exc import SQLAlchemyError

    return (*own, SQLAlchemyError)


def refuse_study(study: Any, made: FrontierJob) -> None:
    """Say in the study what it is of; UserError that names in what it differs where it says so already."""
    wanted = json.loads(encode_manifest(describe_study(made, open_space(made))))
    if KEY not in study.user_attrs:
        study.set_user_attr(KEY, wanted)
    found = study.user_attrs[KEY]
    other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if other:
        raise UserError(
            f"{hide_password(find_storage(made.request))} holds a search with another {' and '.join(other)}: give "
            "another --storage, or what that search was made with."
        )


def make_sampler(seed: int, place: int) -> Any:
    """Return what proposes one trial."""
    import optuna

    drawn = random.Random(f"{seed} {place}").getrandbits(32)
    with warnings.catch_warnings():
        # Optuna 4 calls it experimental; without it, trials of several processes crowd together.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=drawn, n_startup_trials=STARTUP, multivariate=False, constant_liar=True
        )  # fmt: skip


# Whose turn it is


def claim_trial(study: Any, wanted: int) -> Any:
    """Return a trial that this process is to make, its place noted in it; None where `wanted` are done or taken."""
    retry_dead(study)
    while has_room(study, wanted):
        trial = study.ask()
        sign_trial(trial)
        place = sum(1 for other in list_active(study) if other.number < trial.number)
        if place < wanted:
            if "place" not in trial.user_attrs:  # those that are tried again have theirs
                trial.set_user_attr("place", place)
            return trial
        tell_failure(study, trial.number)  # another process was as quick
    return None


def list_active(study: Any) -> list[Any]:
    """Return the trials that count, by number: failed ones were given up, or have become others."""
    from optuna.trial import TrialState

    return [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]


def has_room(study: Any, wanted: int) -> bool:
    """Tell whether one of the first `wanted` trials is still to be begun."""
    from optuna.trial import TrialState

    active = list_active(study)
    return len(active) < wanted or any(trial.state == TrialState.WAITING for trial in active[:wanted])


def retry_dead(study: Any) -> None:
    """Give trials back whose process has ended."""
    from optuna.trial import TrialState

    for trial in list_active(study):
        if trial.state == TrialState.RUNNING and is_dead(trial):
            give_back(study, trial)


def give_back(study: Any, trial: Any) -> None:
    """Let a trial that was begun be made by whoever comes next, with the same parameters, place and name."""
    if tell_failure(study, trial.number):
        kept = {name: trial.user_attrs[name] for name in ("place",) if name in trial.user_attrs}
        study.enqueue_trial(trial.params, user_attrs={**kept, "tries": trial.user_attrs.get("tries", 1) + 1})


def tell_failure(study: Any, number: int) -> bool:
    """Give a trial up; return whether nobody else did before."""
    from optuna.trial import TrialState

    try:
        study.tell(number, state=TrialState.FAIL)
    except (ValueError, RuntimeError):  # Optuna's, of a trial that is finished
        return False
    return True


def is_dead(trial: Any) -> bool:
    """Tell whether the process of a running trial has ended: at once on its own machine, by its silence elsewhere."""
    owner = trial.user_attrs.get("owner")
    if owner is None:
        return trial.datetime_start is None or time.time() - trial.datetime_start.timestamp() > DEAD_SECONDS
    if owner["host"] == platform.node():
        return bool(owner["started"] != read_start(owner["pid"]))
    return bool(time.time() - trial.user_attrs["beat"] > DEAD_SECONDS)


def read_start(pid: int) -> str:
    """Return what tells a process from a later one of its number; empty where there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # another user's
    path = Path(f"/proc/{pid}/stat")
    # Field 22 (proc(5)), the time of its start; names in brackets may hold spaces.
    return path.read_text(encoding="utf-8").rpartition(")")[2].split()[19] if path.is_file() else "unknown"


def sign_trial(trial: Any) -> None:
    """Note who makes a trial."""
    trial.set_user_attr("beat", time.time())
    trial.set_user_attr("owner", {"host": platform.node(), "pid": os.getpid(), "started": read_start(os.getpid())})


@contextmanager
def keep_alive(trial: Any) -> Iterator[None]:
    """Give signs of a trial's life while the block runs."""
    stop = threading.Event()

    def beat() -> None:
        try:
            while not stop.wait(BEAT_SECONDS):
                trial.set_user_attr("beat", time.time())
        except RuntimeError:  # another machine took this one for dead, and finished the trial
            return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


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
    bench, job = search.bench, search.made.job
    level, form = propose_level(search, trial)
    plan = plan_level(search.calibration.survey(), level, bench.console)
    new_config(job.spec, plan, level.recipe)  # refuses what no stock class holds
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
