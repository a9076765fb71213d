"""A verb that torchrun started in several processes: their device, their group, and one voice for all of them.

    torchrun --nproc-per-node 4 -m cli recover STUDENT ...

What happens below is torch.distributed's. Here is who speaks: the first process, and of an error the one that met it
first. Light to import: libraries are imported by the functions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cli.console import Console, RunFailure
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.parallel import Group

CPU, CUDA, NPU = "cpu", "cuda", "npu"
DEVICES = (CPU, CUDA, NPU)
FAILED, MISUSED = 1, 2
GRACE = 1.0  # seconds that a silent process outlives the speaking one
LOST = ("gloo", "nccl", "hccl", "connection", "socket")  # words in what torch says when another process is gone

DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, or npu: an Ascend NPU by torch-npu (extra `npu`) with CANN.")
]


class SilentConsole(Console):
    """The console of all processes but the first."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""

    def show(self, text: str) -> None:
        """Say nothing."""

    def finish(self, data: Any) -> None:
        """Say nothing."""


def open_console(as_json: bool, quiet: bool) -> Console:
    """Return the console of this process."""
    first = int(os.environ.get("RANK", "0")) == 0
    return Console(as_json, quiet) if first else SilentConsole(as_json, quiet)


@contextmanager
def speak_once(place: str = "RANK") -> Iterator[None]:
    """Let the first process alone say what is wrong with a request: before they meet, all of them find the same.

    `place`: LOCAL_RANK where all processes of one machine find it, and perhaps those of another one do not.
    """
    try:
        yield
    except UserError:
        leave_to_first(place)
        raise


def leave_to_first(place: str = "RANK") -> None:
    """End this process without a word, unless it is the first one, which says what all of them find."""
    if int(os.environ.get(place, "0")) > 0:
        leave(MISUSED)


def leave(code: int) -> NoReturn:
    """End this process without a word, once the one that speaks has spoken: torchrun ends all when one has gone."""
    with suppress(KeyboardInterrupt):
        time.sleep(GRACE)
    raise SystemExit(code)


@contextmanager
def join_run(kind: str) -> Iterator[Group]:
    """Join the processes that torchrun started, each on a device of this kind, for the block; alone without torchrun.

    Whatever ends one process ends all of them, and one says why. Raises UserError for a device that is not there.
    """
    from compress.parallel import join_group

    with speak_once("LOCAL_RANK"):
        open_device(kind)
    check_place(kind)
    with join_group(kind) as group, end_together(group):
        yield group
        group.wait()  # for the first process, which writes and proves


def open_device(kind: str) -> None:
    """Make torch ready for a kind of device; UserError says what is missing."""
    if kind not in DEVICES:
        raise UserError(f"--device {kind} is not one of {', '.join(DEVICES)}.")
    if kind == CPU:
        return
    if kind == NPU:
        from backends.npu import open_npu

        open_npu([])  # asks a fresh process first: torch-npu without CANN takes its process down
    import torch

    module = getattr(torch, kind)
    if not module.is_available():
        raise UserError(f"--device {kind}: torch finds no such device; install a torch with it, or use --device cpu.")


def check_place(kind: str) -> None:
    """Raise UserError, in the first process that no device is left for; those behind it leave without a word."""
    if kind == CPU:
        return
    import torch

    place, count = int(os.environ.get("LOCAL_RANK", "0")), getattr(torch, kind).device_count()
    if place > count:
        leave(MISUSED)
    if place == count:
        raise UserError(
            f"torchrun started more processes than this machine has {kind} devices: give --nproc-per-node {count}."
        )


@contextmanager
def end_together(group: Group) -> Iterator[None]:
    """Let one process say what ended the block, the one that met it first; the others leave without a word.

    An error that nobody expected keeps its traceback in every process that meets it.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        lost = is_lost(error)
        code = MISUSED if isinstance(error, UserError) else FAILED
        own = f"{group.rank} {code}"
        said = own if group.size == 1 else group.claim(own)
        if said == own:
            if group.size > 1 and lost:
                raise RunFailure(
                    "Another process of this run ended without a word (out of memory?); see torchrun's own report."
                ) from error
            raise
        if not lost and not isinstance(error, (UserError, RunFailure, OSError, KeyboardInterrupt)):
            raise
        leave(int(said.split()[-1]) if said else code)


def is_lost(error: BaseException) -> bool:
    """Return whether torch says that it does not reach another process."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
