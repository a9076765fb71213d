"""Accuracy on multiple-choice tasks: the choice that a model finds likeliest after the prompt counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.calibrate import Progress
from compress.checkpoint import Checkpoint
from compress.demo.grammar import KINDS, Task, write_tasks
from compress.evaluate import fill_hidden, stream_logits
from compress.hidden import HiddenStore
from compress.spec import ModelSpec
from compress.text import Windows, boundary_ids


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt with one of its choices, and where the choice starts."""

    ids: list[int]
    start: int


def score_kinds(
    model: tuple[Checkpoint, ModelSpec], tokenizer: Any, count: int, seed: int = 0, progress: Progress | None = None
) -> dict[str, float]:
    """Return the share of right answers to `count` held-out tasks of each kind."""
    scores = {}
    for done, kind in enumerate(KINDS, 1):
        scores[kind] = score_tasks(model, tokenizer, write_tasks(kind, count, seed))
        if progress is not None:
            progress("answer tasks", done, len(KINDS))
    return scores


def score_tasks(model: tuple[Checkpoint, ModelSpec], tokenizer: Any, tasks: Sequence[Task]) -> float:
    """Return the share of tasks whose right choice has the highest log-likelihood, summed over its tokens."""
    rows = [row for task in tasks for row in make_rows(task, tokenizer, boundary_ids(dict(model[1].config)))]
    sums = iter(sum_likelihoods(model, rows))
    right = 0
    for task in tasks:
        found = [next(sums) for _ in task.choices]
        right += found.index(max(found)) == task.answer
    return right / len(tasks)


def make_rows(task: Task, tokenizer: Any, start: list[int]) -> Iterator[Row]:
    """Yield one row per choice; prompt and choice are tokenised apart, as their boundary is a token boundary."""
    prompt = start + tokenizer.encode(task.prompt, add_special_tokens=False).ids
    for choice in task.choices:
        yield Row(prompt + tokenizer.encode(choice, add_special_tokens=False).ids, len(prompt))


def sum_likelihoods(model: tuple[Checkpoint, ModelSpec], rows: Sequence[Row]) -> Iterator[float]:
    """Yield each row's log-likelihood of its choice; all rows run through one layer after the other."""
    windows = Windows(pad_rows(rows), "tasks")
    with HiddenStore((*windows.ids.shape, model[1].shape.hidden)) as store:
        fill_hidden(*model, windows, store)
        for row, logits in zip(rows, stream_logits(*model, store), strict=True):
            wanted = torch.tensor(row.ids[row.start :])
            chances = logits[row.start - 1 : len(row.ids) - 1].log_softmax(-1)
            yield float(chances.gather(1, wanted[:, None]).sum())


def pad_rows(rows: Sequence[Row]) -> Tensor:
    """Return ids `[rows, longest]`, padded on the right, where causal attention keeps padding without effect."""
    longest = max(len(row.ids) for row in rows)
    return torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
