"""Merging checkpoints of one shape: weighted means, and steps of a mean (methods 5.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import UserError


def check_mergeable(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise UserError for the first tensor whose name or shape is not in all checkpoints."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        names = sorted(set(first.tensors) ^ set(other.tensors))
        if names:
            has, lacks = (first, other) if names[0] in first.tensors else (other, first)
            raise UserError(
                f"{has.folder} has the tensor '{names[0]}' and {lacks.folder} does not: only checkpoints of one shape "
                "can be merged."
            )
        for name, info in first.tensors.items():
            if info.shape != other.tensors[name].shape:
                raise UserError(
                    f"'{name}' is {list(info.shape)} in {first.folder} and {list(other.tensors[name].shape)} in "
                    f"{other.folder}: only checkpoints of one shape can be merged."
                )


def average_checkpoints(checkpoints: Sequence[Checkpoint], shares: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, sum of shares x tensors) in the first checkpoint's types, one tensor at a time, summed in float64.

    Raises UserError for checkpoints of different shapes, ValueError where shares and checkpoints differ in number.
    """
    check_mergeable(checkpoints)
    for name, info in checkpoints[0].tensors.items():
        total = torch.zeros(info.shape, dtype=torch.float64)
        for checkpoint, share in zip(checkpoints, shares, strict=True):
            if share:  # a share of 0 leaves out infinities too
                total.add_(checkpoint.read_one(name, torch.float64), alpha=share)
        yield name, total.to(info.dtype)


def merge_step(base: Checkpoint, others: Sequence[Checkpoint], rate: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of base + rate x mean(others - base): the inter-iteration merge of arXiv 2505.22375.

    Its formula is known, its rate is not (methods 5.2): at 1, the default, the result is the mean of the others.
    """
    shares = [1 - rate, *([rate / len(others)] * len(others))]
    return average_checkpoints([base, *others], shares)
