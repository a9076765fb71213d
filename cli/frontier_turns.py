"""Whose turn it is among the processes of a search: a trial has one owner, and is given back when that ends.

Beside it, how a process of `--jobs` ends with the one that began it.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BEAT_SECONDS, DEAD_SECONDS = 60.0, 900.0  # signs of life of a trial for other machines, and none for so long is death


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


def follow_parent() -> None:
    """End this process, begun by multiprocessing, as soon as its parent has ended, killed or not.

    Otherwise it would go on writing in a folder that nobody holds any more.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
