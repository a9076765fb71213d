"""What a search of a comparison chooses from, and the Optuna study that keeps its trials, in a file or a database.

Imported only by running verbs.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from cli.frontier_job import FrontierJob, open_format
from cli.frontier_place import LOG
from cli.frontier_request import CompareRequest
from cli.manifest import encode_manifest
from cli.prepare import check_choices
from compress.errors import UserError

STUDY, KEY = "lightpress", "lightpress"
STARTUP = 6  # trials that are drawn at random before TPE has anything to go by
# What of a folder's settings decides the results of trials.
SHARED = ("checkpoint", "recipe", "text", "evaluation text", "number of recovery tokens")


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
