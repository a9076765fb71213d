"""What the user sees: results on stdout, progress and notes on stderr, and the one way to fail a run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

PLAIN_SECONDS = 5.0  # between two plain progress lines of one stage
PLAIN_SHARE = 0.1
KIB = 1024
QUICK_SECONDS = 2.0  # a stage that is over sooner needs no closing line


class RunFailure(Exception):
    """A run that could not do its job through no mistake of the user: one sentence, exit code 1."""


class Console:
    """One run's voice; `quiet` silences progress and notes, `as_json` replaces the printed result by one object."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._meter: PlainMeter | BarMeter = BarMeter() if sys.stderr.isatty() else PlainMeter()

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back."""
        self._meter.close()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of a stage are over."""
        if not self.quiet:
            self._meter.report(stage, done, total)

    def note(self, text: str) -> None:
        """Say something by the way."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say something that changes how the result is to be read, even when quiet."""
        print(f"lightpress: warning: {text}", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """Print a part of the result, unless it comes as JSON."""
        if not self.as_json:
            print(text, flush=True)

    def finish(self, data: Any) -> None:
        """Print the whole result as one JSON object, if asked for."""
        if self.as_json:
            print(json.dumps(data, indent=2, allow_nan=False), flush=True)


class PlainMeter:
    """Progress as lines, few enough for a log file."""

    def __init__(self) -> None:
        self._stage = ""
        self._done = 0
        self._started = self._printed = 0.0
        self._share = 0.0

    def report(self, stage: str, done: int, total: int) -> None:
        """Print a line at most every few seconds and for each tenth, and one at the end of a long stage."""
        now = time.monotonic()
        if stage != self._stage or done < self._done:
            self._stage, self._started, self._printed, self._share = stage, now, now, 0.0
        self._done = done
        spent, share = now - self._started, done / max(total, 1)
        if done >= total:
            self._stage = ""
            if spent > QUICK_SECONDS:
                print(f"{stage}: done in {spent:.0f} s", file=sys.stderr, flush=True)
        elif done and now - self._printed >= PLAIN_SECONDS and share - self._share >= PLAIN_SHARE:
            self._printed, self._share = now, share
            left = spent / share - spent
            print(f"{stage}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class BarMeter:
    """Progress as a bar with the time left, on a terminal; a finished bar makes room for the next."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""

    def report(self, stage: str, done: int, total: int) -> None:
        """Move the bar."""
        if self._bar is None or stage != self._stage:
            self.close()
            self._bar, self._stage = self._open(), stage
            self._task = self._bar.add_task(stage, total=total)
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self.close()

    def _open(self) -> Any:
        from rich import progress
        from rich.console import Console as Terminal

        columns = (
            progress.TextColumn("{task.description:<12}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        bar = progress.Progress(*columns, console=Terminal(stderr=True), transient=True)
        bar.start()
        return bar

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def align_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("   ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def format_bytes(count: float) -> str:
    """Return bytes in the binary unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < KIB:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= KIB
    return f"{count:.1f} TiB"


def format_count(count: float) -> str:
    """Return a number with a unit: 1.33 M, 7.24 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"
