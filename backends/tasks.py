"""Tasks from local JSON-lines files, scored by log-likelihood: minimal pairs and multiple choice."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.likelihood import Progress, TextModel, encode_pair, score_rows
from compress.errors import UserError
from compress.text import iterate_objects

Json = Mapping[str, Any]
GOOD, BAD = "sentence_good", "sentence_bad"
CONTEXTS = ("context", "question")  # where both are there, they are joined in this order
OTHER_CONTEXTS = ("query", "prompt")
ANSWERS = ("answer", "answerKey", "label", "gold")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Example:
    """One context with its choices and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class TaskFile:
    """The examples of one file; the metrics say how the likeliest choice is found, as lm-eval names them."""

    name: str
    examples: tuple[Example, ...]
    metrics: tuple[str, ...] = ("acc",)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: its value, and what is known of its error: a standard error or a 95 % interval."""

    task: str
    metric: str
    value: float
    examples: int
    error: float | None = None
    interval: tuple[float, float] | None = None
    higher_is_better: bool = True


# Reading


def read_pairs(path: Path, limit: int | None = None) -> TaskFile:
    """Read pairs of sentences, in the keys of BLiMP (Warstadt et al. 2020): sentence_good and sentence_bad.

    Raises UserError for a missing or empty file and for the first line that does not fit.
    """
    return TaskFile(path.stem, read_examples(path, make_pair, limit))


def read_choices(path: Path, limit: int | None = None) -> TaskFile:
    """Read multiple choice: `question` or `context` (or both), `choices`, and `answer` as index, letter, label or text.

    The forms of published sets count too: `choices` as {"text": [...], "label": [...]}, the answer as `answerKey`,
    `label` or `gold`. Raises UserError for a missing or empty file and for the first line that does not fit.
    """
    return TaskFile(path.stem, read_examples(path, make_question, limit), tuple(LENGTHS))


def read_examples(path: Path, make: Callable[[Json], Example], limit: int | None) -> tuple[Example, ...]:
    """Read up to `limit` examples, one a line."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a .jsonl file.")
    examples: list[Example] = []
    with path.open("rb") as lines:
        for number, row in iterate_objects(path, lines):
            if len(examples) == limit:
                break
            try:
                examples.append(make(row))
            except ValueError as error:
                raise UserError(f"{path}: line {number} {error}.") from error
    if not examples:
        raise UserError(f"{path}: holds no example; give one JSON object per line.")
    return tuple(examples)


def make_pair(row: Json) -> Example:
    """Return a pair as a choice without a context; ValueError says what is wrong."""
    return Example("", (take_text(row, GOOD), take_text(row, BAD)), 0)


def take_text(row: Json, key: str) -> str:
    """Return a text that is there; ValueError says what is wrong."""
    if key not in row:
        raise ValueError(f"has no '{key}' (it has {list_keys(row)})")
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"has no text in '{key}'")
    return row[key]  # type: ignore[no-any-return]


def list_keys(row: Json) -> str:
    """Return an object's keys in words."""
    return ", ".join(sorted(row)) or "nothing"


def make_question(row: Json) -> Example:
    """Return a question with its choices; ValueError says what is wrong."""
    keys = [key for key in CONTEXTS if key in row] or [key for key in OTHER_CONTEXTS if key in row][:1]
    if not keys:
        raise ValueError(f"has no 'question' and no 'context' (it has {list_keys(row)})")
    context = "\n".join(take_text(row, key) for key in keys)
    choices, labels = take_choices(row)
    return Example(context, choices, find_answer(row, choices, labels))


def take_choices(row: Json) -> tuple[tuple[str, ...], Sequence[Any]]:
    """Return the choices and their labels, if they have some; ValueError says what is wrong."""
    if "choices" not in row:
        raise ValueError(f"has no 'choices' (it has {list_keys(row)})")
    given: Any = row["choices"]
    labels: Any = ()
    if isinstance(given, dict):
        given, labels = given.get("text"), given.get("label", ())
    if not isinstance(given, list) or len(given) < 2:  # noqa: PLR2004 (a choice is between two at least)
        raise ValueError("needs at least two texts in 'choices'")
    if not all(isinstance(choice, str) and choice.strip() for choice in given):
        raise ValueError("has a choice without text in 'choices'")
    if labels and (not isinstance(labels, list) or len(labels) != len(given)):
        raise ValueError(f"has {len(given)} choices, which must have as many labels")
    return tuple(given), labels


def find_answer(row: Json, choices: Sequence[str], labels: Sequence[Any]) -> int:
    """Return the index of the right choice; ValueError says what is wrong."""
    key = next((key for key in ANSWERS if key in row), None)
    if key is None:
        raise ValueError(f"has no 'answer' (it has {list_keys(row)})")
    answer = row[key]
    letters = string.ascii_uppercase[: len(choices)]
    if not isinstance(answer, bool):
        for names in (labels, choices, list(letters), list(letters.lower()), range(len(choices))):
            if answer in names:
                return list(names).index(answer)
    raise ValueError(
        f"has {answer!r} as '{key}', which is no index from 0 to {len(choices) - 1}, no letter from A to "
        f"{letters[-1]}, and no label or text of a choice"
    )


# Scoring

# What a choice's log-likelihood is divided by, under lm-eval's name of the accuracy that comes of it.
LENGTHS: Mapping[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode("utf-8")),
}


def score_task(model: TextModel, task: TaskFile, progress: Progress | None = None) -> list[TaskScore]:
    """Return each metric of a task: the share of examples whose right choice is the likeliest, with its interval.

    Of equal choices the first counts as chosen, as in lm-eval.
    """
    totals = iter(score_examples(model, task, progress))
    rights = dict.fromkeys(task.metrics, 0)
    for example in task.examples:
        own = [next(totals) for _ in example.choices]
        for metric in task.metrics:
            means = [total / LENGTHS[metric](choice) for total, choice in zip(own, example.choices, strict=True)]
            rights[metric] += means.index(max(means)) == example.answer
    count = len(task.examples)
    return [
        TaskScore(task.name, metric, right / count, count, interval=bootstrap_share(right, count))
        for metric, right in rights.items()
    ]


def score_examples(model: TextModel, task: TaskFile, progress: Progress | None = None) -> list[float]:
    """Return the log-likelihood of every choice of every example in turn, in nats, summed over its tokens."""
    rows = [
        encode_pair(model, example.context, join_choice(example.context, choice))
        for example in task.examples
        for choice in example.choices
    ]
    return [score.total for score in score_rows(model, rows, progress)]


def join_choice(context: str, choice: str) -> str:
    """Return a choice with the blank before it, where there is a context and neither side brings one."""
    return choice if not context or context[-1].isspace() or choice[0].isspace() else f" {choice}"


def bootstrap_share(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval (Efron 1979) of a share of `count` examples.

    Resampling zeros and ones counts a binomial variable, so that the limit of infinitely many resamples is known.
    """
    from scipy.stats import binom  # noqa: PLC0415 (slow to import)

    tail = (1 - CONFIDENCE) / 2
    low, high = (float(binom.ppf(level, count, right / count)) / count for level in (tail, 1 - tail))
    return low, high
