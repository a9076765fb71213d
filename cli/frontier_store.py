"""The folder of a comparison: what it was asked for, its plans, and its points as far as they are done.

    OUT/compare.json        the settings that decide every point; a folder with others is refused
    OUT/calibration.json    what pass 1 found, for the report
    OUT/plans/NAME.json     one plan for each level, which `lightpress compress --plan` takes too
    OUT/points/NAME/        one folder for each point: a checkpoint, or a graph alone; point.json is written last
    OUT/speeds.json         what was measured on a machine, of graphs that are still the same
    OUT/work/               what the next run of an unfinished comparison saves by; gone when it is complete
    OUT/search.log, .compare.lock   trials of --search, and who is at work here (cli/frontier_place.py)
    OUT/frontier.json, frontier.csv, report.html

Everything is put in place by a rename, so that a killed run leaves whole files only. What later files stand on comes
before them: the settings, then calibration.json, then the plans.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli.manifest import encode_manifest
from compress.checkpoint_source import read_json
from compress.checkpoint_writer import write_atomically
from compress.errors import UserError
from compress.plan import Plan, read_plan
from compress.report import LayerRow
from compress.report_frontier import CurveRow, Interval, Point, Sample
from compress.shapes import ModelShape

SETTINGS, CALIBRATION, PLANS, POINTS, WORK = "compare.json", "calibration.json", "plans", "points", "work"
POINT = "point.json"
SPEEDS = "speeds.json"
LOCK = ".compare.lock"
RESULTS = ("frontier.json", "frontier.csv", "report.html")
OWN = (SETTINGS, CALIBRATION, PLANS, POINTS, WORK, SPEEDS, *RESULTS)
LEFT = ".*.partial-*"  # what a killed run leaves of a folder that it was writing
BEGUN = f".{SETTINGS}.partial-"  # the same of its first file


def check_store(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless the folder is free or holds an earlier comparison."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"The output {folder} is a file; choose a folder.")
    if not folder.is_dir() or (folder / SETTINGS).is_file():
        return
    if all(path.name == LOCK or path.name.startswith(BEGUN) for path in folder.iterdir()):
        return
    hint = "is not overwritten" if overwrite else "is not empty"
    raise UserError(f"The output {folder} {hint}: it holds no earlier comparison; choose another folder.")


def open_store(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Make the folder ready for these settings; UserError where it holds a comparison with others.

    `overwrite`: an earlier comparison goes, whatever its settings.
    """
    path = folder / SETTINGS
    if overwrite and path.is_file():
        clear_store(folder)
    try:
        if path.is_file():
            refuse_others(folder, read_json(path), settings)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, dict(settings))
        for name in (PLANS, POINTS, WORK):
            (folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise explain_unwritable(folder, error) from error
    for left in (*folder.glob(f"{BEGUN}*"), *(folder / POINTS).glob(LEFT)):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def explain_unwritable(folder: Path, error: OSError) -> UserError:
    """Return the refusal of a folder that cannot be written."""
    reason = error.strerror or type(error).__name__
    return UserError(f"The output {folder} cannot be written ({reason}); choose another folder.")


def clear_store(folder: Path) -> None:
    """Remove what an earlier comparison left, its settings last: a folder without them is nobody's."""
    for name in reversed(OWN):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def refuse_others(folder: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UserError that names the settings in which an earlier comparison differs."""
    wanted = json.loads(encode_manifest(dict(settings)))
    other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if other:
        raise UserError(
            f"{folder} holds a comparison with another {' and '.join(other)}: choose another folder, give what it was "
            "made with, or add --overwrite to begin anew."
        )


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, in one rename."""
    write_whole(path, encode_manifest(data))


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in one rename."""
    write_atomically(path, text.encode("utf-8"))


def load_plan(path: Path, shape: ModelShape) -> Plan:
    """Return a plan of this folder with all its notes."""
    plan = read_plan(path, shape)
    data = read_json(path)
    notes = {name: value for name, value in data.items() if name not in ("version", "hidden", "layers")}
    return Plan(plan.hidden, plan.layers, notes)


# Points


def load_point(folder: Path) -> Point | None:
    """Return the point of a folder, its speeds left out; None where it is not complete."""
    path = folder / POINT
    return revive_point(read_json(path), folder) if path.is_file() else None


def save_point(folder: Path, point: Point) -> None:
    """Write a complete point; its speeds depend on devices that may be named later, and its place may change."""
    data = {name: value for name, value in vars(point).items() if name not in ("speeds", "folder")}
    write_json(folder / POINT, data)


def revive_point(data: Mapping[str, Any], folder: Path) -> Point:
    """Return the point that plain data describe."""
    values = dict(data)
    values |= {
        "layers": tuple(LayerRow(**row) for row in data["layers"]),
        "accuracy": {name: Interval(**value) for name, value in data["accuracy"].items()},
        "samples": tuple(Sample(**row) for row in data["samples"]),
        "curve": tuple(CurveRow(**row) for row in data["curve"]),
    }
    for name in ("perplexity", "divergence", "agreement", "ratio"):
        values[name] = None if data[name] is None else Interval(**data[name])
    return Point(**{**values, "speeds": {}, "folder": folder})
