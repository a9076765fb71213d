"""The folder of a comparison, in which one run is at work, or several processes of one search.

    OUT/search.log      Optuna's journal, unless --storage says otherwise
    OUT/.compare.lock   byte 0: who is at work in OUT; byte 1: who makes what all of a search share; byte 2: whether
                        those at work are of a search. A run without --search has all three for itself. The system takes
                        locks back when a process ends, however it ends; the file stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cli.console import Console
from cli.frontier_job import FrontierJob
from cli.frontier_store import LOCK, SETTINGS, explain_unwritable, open_store, refuse_others
from compress.checkpoint_source import read_json
from compress.errors import UserError

LOG = "search.log"
WORKER, MAKER, KIND, PROBE = range(4)  # bytes of the lock file; the last one tells whether locks work at all


@dataclass(frozen=True)
class Place:
    """A comparison's folder as one process holds it; `descriptor` is None where the system has no locks."""

    descriptor: int | None = None

    def is_alone(self) -> bool:
        """Tell whether no other process works in the folder; then none begins to before this one has ended."""
        return self.descriptor is None or take_bytes(self.descriptor, WORKER)

    def share(self, console: Console) -> None:
        """Let other processes of the search in; wait for one that is alone in the folder."""
        assert self.descriptor is not None
        import fcntl

        if not take_bytes(self.descriptor, WORKER, shared=True):
            console.note("Another process begins this search or ends it; waiting for it.")
            fcntl.lockf(self.descriptor, fcntl.LOCK_SH, 1, WORKER)

    @contextmanager
    def hold(self, console: Console) -> Iterator[None]:
        """Let the block run in one process at a time."""
        if self.descriptor is None:
            yield
            return
        import fcntl

        if not take_bytes(self.descriptor, MAKER):
            console.note("Another process makes what the search needs; waiting for it.")
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, MAKER)
        try:
            yield
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, MAKER)


@contextmanager
def open_place(made: FrontierJob, check: Callable[[], None], console: Console) -> Iterator[Place]:
    """Make the folder ready, beside other processes of the same search if there are any; UserError as `open_store`.

    `check` is called before anything is written, or deleted by --overwrite. Raises UserError too where another process
    is at work in the folder. What does not get as far as its settings leaves no folder behind.
    """
    folder = made.folder
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with open_lock(folder) as descriptor:
        place = enter_place(made, descriptor)
        try:
            begin_work(made, place, check, console)
            yield place
        finally:
            if not (folder / SETTINGS).is_file() and is_current(folder, descriptor) and place.is_alone():
                leave_folder(folder, new)


@contextmanager
def open_lock(folder: Path) -> Iterator[int | None]:
    """Make the folder and open its lock file; None where the system or the file system has no locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+b")
    except OSError as error:
        raise explain_unwritable(folder, error) from error
    with lock:
        try:
            take_bytes(lock.fileno(), PROBE, shared=True)
        except (ImportError, OSError):
            yield None
        else:
            yield lock.fileno()


def enter_place(made: FrontierJob, descriptor: int | None) -> Place:
    """Take the folder for a run of this kind; UserError where one of the other kind, or of none but itself, has it."""
    folder, search = made.folder, bool(made.request.search)
    if descriptor is None:
        return Place()
    taken = take_bytes(descriptor, KIND, shared=True) if search else take_bytes(descriptor, WORKER, KIND + 1)
    if not taken or not is_current(folder, descriptor):
        raise UserError(f"Another process is at work in {folder}: wait for its end, or choose another output.")
    return Place(descriptor)


def begin_work(made: FrontierJob, place: Place, check: Callable[[], None], console: Console) -> None:
    """Check and open the store, or join those who did; UserError where they are of another setting."""
    request, folder = made.request, made.folder
    if request.search and place.descriptor is None:
        raise UserError(f"--search needs locks on files, which {folder} does not have: choose another output.")
    alone = place.is_alone()
    if alone:  # only then is a half-written folder nobody's
        if not request.overwrite and (folder / SETTINGS).is_file():
            refuse_others(folder, read_json(folder / SETTINGS), made.settings)
        check()
        open_store(folder, made.settings, request.overwrite)
        if request.overwrite:
            (folder / LOG).unlink(missing_ok=True)
    elif request.overwrite:
        raise UserError(f"Another process is at work in {folder}: wait for its end, or leave --overwrite out.")
    if request.search:
        place.share(console)
    if not alone:
        if not (folder / SETTINGS).is_file():
            raise UserError(f"The process that began {folder} ended before it got far: start this one again.")
        refuse_others(folder, read_json(folder / SETTINGS), made.settings)


def leave_folder(folder: Path, new: Sequence[Path]) -> None:
    """Remove the lock of a folder in which nothing was begun, and the folders that were made for it."""
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
        for path in new:
            path.rmdir()


# Locks


def take_bytes(descriptor: int, first: int, count: int = 1, shared: bool = False) -> bool:
    """Return whether bytes of the lock file could be locked against all others, or against those who do not share."""
    import fcntl

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, count, first)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    return True


def is_current(folder: Path, descriptor: int | None) -> bool:
    """Tell whether a lock file is still that of its folder: one that was refused takes its own away."""
    path = folder / LOCK
    return descriptor is None or (path.is_file() and os.path.samestat(os.fstat(descriptor), path.stat()))
