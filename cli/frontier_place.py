"""The folder of a comparison, which several processes of one search may work in.

    OUT/search.log      Optuna's journal, unless --storage says otherwise
    OUT/.search.lock    byte 0: who is at work in OUT; byte 1: who makes what all of them share
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cli.console import Console
from cli.frontier_job import FrontierJob
from cli.frontier_store import SETTINGS, open_store, refuse_others
from compress.checkpoint_source import read_json
from compress.errors import UserError

LOG, LOCK = "search.log", ".search.lock"


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
