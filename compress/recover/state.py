"""What a run leaves on the way, so that it can be stopped, killed and resumed: states, and the curve of its loss.

    WORK/state-00000200/         parameters, moments and running mean as safetensors; the rest of the state as JSON
    WORK/loss.csv                one row for each step
    WORK/run.json                what the run was asked for: only the same may be resumed

A state is a folder of CheckpointWriter: written to a sibling, synced, renamed last. The last two are kept. It holds
whole tensors whatever number of processes wrote it, so that any other number may go on from it.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter, write_atomically
from compress.errors import UserError
from compress.recover.loop import History, StepReport, Trainer, check_finite
from compress.recover.parallel import gather_whole, own_part, own_rows

PREFIX, KEPT, RUN_NAME = "state-", 2, "run.json"
CURVE_NAME = "loss.csv"
CURVE = ("step", "tokens", "loss", "heldout", "rate", "norm", "seconds")


def list_states(work: Path) -> list[Path]:
    """Return the finished states in a run's folder, oldest first."""
    return sorted(path for path in work.glob(f"{PREFIX}*") if path.is_dir())


def save_state(work: Path, trainer: Trainer) -> Path:
    """Save where a run stands and remove all but the last states; Diverged where a parameter is not finite.

    A state that this step has already is left as it is. A group gathers one tensor at a time, in every process, and
    the first one writes it.
    """
    check_finite(trainer)
    folder = work / f"{PREFIX}{trainer.history.step:08d}"
    (there,) = trainer.group.any(trainer.group.first and folder.is_dir())
    if there:
        return folder
    if trainer.group.first:
        write_state(folder, trainer)
        for old in list_states(work)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    else:
        for tensor in list_tensors(trainer).values():
            gather_whole(tensor.detach())
    return folder


def write_state(folder: Path, trainer: Trainer) -> None:
    """Write all that a run needs to go on."""
    facts = {"history": asdict(trainer.history), "moments": trainer.optimizer.steps}
    with CheckpointWriter(folder, facts, overwrite=True) as writer:
        for name, tensor in list_tensors(trainer).items():
            writer.add(name, gather_whole(tensor.detach()))
        writer.add("random", torch.get_rng_state())
        writer.finish()


def list_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return all tensors of a run's state by name."""
    kinds: dict[str, Mapping[str, Tensor]] = {
        "parameter": trainer.optimizer.parameters,
        "first": trainer.optimizer.first,
        "second": trainer.optimizer.second,
    }
    if trainer.average is not None:
        kinds["average"] = trainer.average.values
    return {f"{kind}/{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}


def load_state(folder: Path, trainer: Trainer) -> None:
    """Put a trainer where a saved run stood, to the bit; UserError where the state is another model's.

    Each process of a group reads the rows that it holds.
    """
    state = open_checkpoint(folder)
    wanted = list_tensors(trainer)
    with torch.no_grad():
        for name, tensor in wanted.items():
            if name not in state.tensors or state.tensors[name].shape != tuple(tensor.shape):
                raise UserError(f"{folder} is the state of another model; delete its folder to start again.")
            rows = own_rows(tensor)
            own_part(tensor).copy_(state.read_slice(name, rows.start, rows.stop))
    torch.set_rng_state(state.read_one("random"))
    trainer.history = read_history(state.config["history"])
    trainer.optimizer.steps = int(state.config["moments"])


def read_history(saved: Mapping[str, Any]) -> History:
    """Return a history from its JSON, which has lists for pairs."""
    return History(**{**saved, "rates": [(int(step), float(rate)) for step, rate in saved.get("rates", [])]})


def find_state(work: Path) -> Path | None:
    """Return the last state of a run, or None where none was saved yet."""
    states = list_states(work)
    return states[-1] if states else None


def open_work(work: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a new run, or accept that of one to `resume`.

    Raises UserError for a new run where another one stopped, for nothing to resume, and for other settings.
    """
    path = work / RUN_NAME
    if not resume:
        if path.exists() or list_states(work) or (work / CURVE_NAME).exists():
            raise UserError(f"{work} holds a run that did not finish: go on with --resume, or delete that folder.")
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())
        return
    if not path.is_file():
        raise UserError(f"There is no run to resume at {work}; leave --resume out to start one.")
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete {work} to start again.") from error
    for name in {**settings, **saved}:  # flags first, then hashes, which say less
        if saved.get(name) != settings.get(name):
            raise UserError(
                f"{work} was begun with another {name} ({shorten(saved.get(name))}, now "
                f"{shorten(settings.get(name))}); resume with the same, or delete it to start again."
            )
    for left in work.glob(f".{PREFIX}*"):  # what a killed run was writing
        shutil.rmtree(left, ignore_errors=True)


def shorten(value: object) -> str:
    """Return a value as a few words."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."  # noqa: PLR2004


class Curve:
    """The loss curve as a CSV file, a row for each step, appended as they come."""

    def __init__(self, work: Path, step: int) -> None:
        """Open the file of a run that stands at `step`: rows of later steps, which were not saved, go."""
        self.path = work / CURVE_NAME
        rows = [row for row in read_curve(self.path) if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, CURVE, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue().encode())

    def add(self, report: StepReport, heldout: float | None = None) -> None:
        """Append one step."""
        held = "" if heldout is None else f"{heldout:.6g}"
        row = (report.step, report.tokens, f"{report.loss:.6g}", held, f"{report.rate:.6g}", f"{report.norm:.6g}")
        with self.path.open("a", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow((*row, f"{report.seconds:.4g}"))


def read_curve(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a loss curve; a row that a killed run left half-written is not one."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if set(row) == set(CURVE) and None not in row.values() and row["step"].isdigit()]
