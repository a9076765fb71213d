"""Each process's part of a batch: its rows, and what the teacher says of them.

All processes read the same global batch and take rows of it, side by side: process 0 the first ones. The tokens that
count in a process's rows are then neighbours among those of the batch, which is the order that scores lie in on disk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import UserError
from compress.parallel import Group
from compress.recover.losses import Target, Top
from compress.recover.teacher import Guide, OnlineTeacher, Teaching

if TYPE_CHECKING:
    from compress.recover.data import Batch

CPU = torch.device("cpu")


def check_rows(rows: int, group: Group) -> None:
    """Raise UserError where the rows of a batch cannot be shared out evenly."""
    if rows % group.size:
        raise UserError(
            f"--batch {rows} cannot be shared evenly by {group.size} processes; give a multiple of {group.size}."
        )


def take_rows(batch: Batch, group: Group) -> Batch:
    """Return this process's rows of a batch, on its device."""
    own = group.share(len(batch.ids))
    parts = {name: getattr(batch, name)[own.start : own.stop] for name in ("ids", "weights", "documents")}
    return replace(batch, **{name: part.to(group.device) for name, part in parts.items()})


def ask_teacher(teaching: Teaching, number: int, batch: Batch, group: Group) -> Guide:
    """Return what the teacher says of this process's rows of batch `number`, on its device.

    A teacher that runs is asked about these rows; one that remembers whole batches is asked about the batch.
    """
    if isinstance(teaching, OnlineTeacher):
        return teaching.guide(number, take_rows(batch, group))
    guide = teaching.guide(number, batch)
    if group.size == 1 and group.device == CPU:
        return guide
    counted, own = batch.weights[:, 1:] > 0, group.share(len(batch.ids))
    first, last = int(counted[: own.start].sum()), int(counted[: own.stop].sum())

    def target(span: slice) -> Target:
        start, stop, _ = span.indices(last - first)
        return move_target(guide.target(slice(first + start, first + stop)), group.device)

    return Guide(target, {layer: x[first:last].to(group.device) for layer, x in guide.hidden.items()})


def move_target(target: Target, device: torch.device) -> Target:
    """Return a teacher's word on a device."""
    if isinstance(target, Tensor):
        return target.to(device)
    return None if target is None else Top(*(part.to(device) for part in (target.ids, target.log_probs, target.tail)))
