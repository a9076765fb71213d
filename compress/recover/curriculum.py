"""The order of the training documents: stages by a label, and in each by difficulty, as the student finds it.

    documents of the run -> stages, one a label -> difficulty (the student's) -> bands of a stage -> order of the run

The order is laid over the whole run and not over each epoch: a run that reads its text three times reads each band (an
eighth of a stage) three times, before it goes on to the next. Difficulty then rises once, as the student
grows, a label is left for good before the next one begins (reasoning first, then short answers: arXiv 2509.26497,
methods 4.1), and every document is read as often as without a curriculum. A run shorter than its text takes documents
at random, so that easy first does not mean easy only. Bands are our choice; the papers say only what comes first.

Difficulty is the mean loss of a document's counted tokens, or the share of them that the student's most likely token
gets wrong, each predicted from the true text before it. The latter is our cheap stand-in for the failure rate of
sampled answers (arXiv 2505.22375, methods 5.2): one forward pass instead of k generations for each document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UserError
from compress.recover.data import NEAR, Batch, DataStream
from compress.recover.data_pack import shuffle_places
from compress.recover.functional import stack_documents
from compress.recover.losses import count_piece, widen
from compress.recover.model import Frozen
from compress.recover.select import KINDS, TOKENS, group_documents, order_documents
from compress.recover.teacher import select_rows

LOSS, FAILURES = "loss", "failures"
MEASURES = (LOSS, FAILURES)  # the columns of what `measure_difficulty` returns
BANDS = 8  # of a stage, each read as often as the run reads its text before the next one begins
MOST_LABELS = 20
SPARE = 1.05  # documents measured for those that a short run will read: how they pack is only known later

Report = Callable[[int, int], None]
Counts = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CurriculumOptions:
    """What is asked for: `kind` (easy, medium or hard first; None: at random) by `measure`, and stages by a label.

    `label`: the field of a row that names its stage; `labels`: all its values in order (none: long answers first).
    """

    kind: str | None = None
    measure: str = LOSS
    label: str | None = None
    labels: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        if self.kind is not None and self.kind not in KINDS:
            raise UserError(f"--curriculum {self.kind} is not one of {', '.join(KINDS)}.")
        if self.measure not in MEASURES:
            raise UserError(f"--difficulty {self.measure} is not one of {', '.join(MEASURES)}.")


@dataclass(frozen=True)
class Stage:
    """Documents of one label (None: those without), and the least and the most difficult of them where measured."""

    label: str | None
    documents: tuple[int, ...]
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curriculum:
    """The documents of a whole run in order, and the stages that it goes through; it reads the text `passes` times."""

    order: tuple[int, ...]
    stages: tuple[Stage, ...]
    passes: float


def make_curriculum(
    stream: DataStream, options: CurriculumOptions, rows: int, model: Frozen | None = None, report: Report | None = None
) -> Curriculum:
    """Return the order of a run of `rows` rows; the `model` is asked where `kind` is given.

    Raises UserError for labels that are none, and for losses that are no numbers.
    """
    stages, sizes = list_stages(stream, options), stream.token_counts()
    passes = rows / stream.count_rows([number for stage in stages for number in stage.documents])
    stages = [
        Stage(stage.label, tuple(draw_share(stage.documents, SPARE * passes, sizes, (options.seed, place))))
        for place, stage in enumerate(stages)
    ]
    if options.kind is not None:
        assert model is not None
        chosen = [number for stage in stages for number in stage.documents]
        found = measure_difficulty(model, stream, chosen, report)[:, MEASURES.index(options.measure)]
        stages = [sort_stage(stage, found, options) for stage in stages]
    bands = [band for stage in stages for band in split_stage(stage, stream, BANDS if options.kind else 1)]
    return Curriculum(tuple(lay_out_run(stream, bands, rows, options.seed)), tuple(stages), passes)


# Stages


def list_stages(stream: DataStream, options: CurriculumOptions) -> list[Stage]:
    """Return the documents that training sees by label, in a random order each; those without a label come last."""
    found: dict[str | None, list[int]] = {None: stream.used()}
    if options.label is not None:
        found = read_labels(stream, options.label)
    stages: list[Stage] = []
    for label in sort_labels(stream, found, options):
        places = shuffle_places(len(found[label]), options.seed, len(stages))
        stages.append(Stage(label, tuple(found[label][place] for place in places.tolist())))
    return stages


def read_labels(stream: DataStream, name: str) -> dict[str | None, list[int]]:
    """Return the documents of each label; UserError where `name` is in no row, or its values are no labels."""
    found: dict[str | None, list[int]] = {}
    for number in stream.used():
        value = stream.index.read(number)[0].get(name)
        if isinstance(value, float | list | dict):
            raise UserError(f"{stream.index.place(number)}: '{name}' is a {type(value).__name__}, and no label.")
        found.setdefault(value if value is None or isinstance(value, str) else json.dumps(value), []).append(number)
        if len(found) > MOST_LABELS:
            raise UserError(
                f"--label {name} has more than {MOST_LABELS} values ({stream.index.place(number)} has the next one): "
                "it does not say what kind a row is; name another field."
            )
    if set(found) == {None}:
        raise UserError(f"--label {name}: no row of the training text has a field of this name; check its spelling.")
    return found


def sort_labels(
    stream: DataStream, found: dict[str | None, list[int]], options: CurriculumOptions
) -> list[str | None]:
    """Return the labels in order: as asked, else by the mean number of counted tokens, most first.

    Reasoning is written out at length and short answers are not. Raises UserError where the order leaves a label out.
    """
    counts = stream.answer_counts()
    names = sorted(
        (name for name in found if name is not None), key=lambda name: (-counts[found[name]].mean(), str(name))
    )
    if options.labels:
        missing = [name for name in names if name not in options.labels]
        unknown = [name for name in options.labels if name not in names]
        if missing or unknown or len(set(options.labels)) < len(options.labels):
            raise UserError(
                f"--label-order {','.join(options.labels)} does not name each value of '{options.label}' once: the "
                f"text has {', '.join(map(str, names))}."
            )
        names = list(options.labels)
    return [*names, *([None] if None in found else [])]


def sort_stage(stage: Stage, difficulty: Tensor, options: CurriculumOptions) -> Stage:
    """Return a stage's documents by difficulty; those of equal difficulty stay in the random order that they had."""
    values = difficulty[list(stage.documents)]
    assert options.kind is not None
    places = order_documents(values, options.kind)
    span = (float(values.min()), float(values.max()))
    return Stage(stage.label, tuple(stage.documents[place] for place in places), span)


# Difficulty


@torch.no_grad()
def measure_difficulty(
    model: Frozen, stream: DataStream, chosen: Sequence[int], report: Report | None = None
) -> Tensor:
    """Return mean loss in nats and share of failures, `[documents in the files, 2]`; NaN for those not `chosen`.

    A document longer than a row is judged by its first row. Memory: one layer and the streams of as many batches as
    there are layers, which is less than training keeps; each layer is read once for all of these. UserError for a loss
    that is no number.
    """
    found = torch.full((len(stream.index), len(MEASURES)), float("nan"))
    groups = group_documents(stream, chosen, min(TOKENS, stream.options.rows * stream.options.length))
    done = 0
    for shard in take_shards(groups, len(model.spec.layers)):
        stacked = [stack_documents([stream.document(number) for number in numbers]) for numbers in shard]
        streams, _ = model.streams([(ids, torch.zeros_like(ids)) for ids, _ in stacked])
        for numbers, (ids, weights), x in zip(shard, stacked, streams, strict=True):
            found[numbers] = judge_rows(model, x, Batch(ids, weights, torch.zeros_like(ids)))
            done += len(numbers)
        if report is not None:
            report(done, len(chosen))
    wrong = [number for number in chosen if not bool(found[number].isfinite().all())]
    if wrong:
        raise UserError(
            f"{stream.index.place(wrong[0])}: the student's loss is not a number here, so that no order follows from "
            "it; leave --curriculum out, or mend the student."
        )
    return found


def take_shards(groups: Iterator[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Yield groups, `size` at a time."""
    while shard := list(islice(groups, size)):
        yield shard


def judge_rows(model: Frozen, stream: Tensor, batch: Batch) -> Tensor:
    """Return mean loss and share of failures over each row's counted tokens, `[rows, 2]`, from the last `stream`."""
    counted, sums = select_rows(batch), torch.zeros(len(batch.ids), len(MEASURES))
    owners, rows = counted.mask.nonzero()[:, 0], counted.pick(stream)
    step = count_piece(model.spec.shape.vocab)
    for start in range(0, len(rows), step):
        span = slice(start, start + step)
        logits, labels = widen(model.logits(rows[span])), counted.labels[span]
        losses = F.cross_entropy(logits, labels, reduction="none")
        values = torch.stack((losses, (logits.argmax(-1) != labels).to(losses.dtype)), 1)
        sums.index_add_(0, owners[span], (values * counted.weights[span, None]).to(sums.dtype))
    return sums / batch.weights[:, 1:].sum(1, keepdim=True)


# The order of a run


def split_stage(stage: Stage, stream: DataStream, most: int) -> list[tuple[int, ...]]:
    """Cut a stage into at most `most` bands of about equal tokens, none smaller than what is shuffled together."""
    options, sizes = stream.options, stream.token_counts()
    ends = np.cumsum(sizes[list(stage.documents)])
    count = int(min(most, max(1, ends[-1] // (NEAR * options.rows * options.length))))
    cuts = [0, *(int(np.searchsorted(ends, ends[-1] * part / count)) for part in range(1, count)), len(ends)]
    return [stage.documents[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]


def lay_out_run(stream: DataStream, bands: Sequence[Sequence[int]], rows: int, seed: int) -> list[int]:
    """Return an order that fills at least `rows` rows and hardly more, each band as often as the others."""
    sizes = stream.token_counts()
    passes = rows / stream.count_rows([number for band in bands for number in band])
    while True:
        order = [
            number for place, band in enumerate(bands) for number in repeat_band(band, passes, sizes, (seed, place))
        ]
        found = stream.count_rows(order)
        if found >= rows:
            return order
        passes *= 1.005 * rows / found


def repeat_band(band: Sequence[int], passes: float, sizes: Counts, seed: tuple[int, int]) -> Iterator[int]:
    """Yield a band's documents `passes` times, first in their order and then shuffled; of the last time a random part.

    Packed in one order again and again, documents would always meet the same neighbours.
    """
    whole, part = divmod(passes, 1)
    for number in range(int(whole)):
        yield from (band[place] for place in shuffle_places(len(band), *seed, number).tolist()) if number else band
    yield from draw_share(band, part, sizes, (*seed, int(whole)))


def draw_share(documents: Sequence[int], share: float, sizes: Counts, seed: tuple[int, ...]) -> list[int]:
    """Return random documents with a `share` of the tokens, at least, in the order in which they are given."""
    if share <= 0 or share >= 1:
        return list(documents) if share > 0 else []
    places = shuffle_places(len(documents), *seed)
    ends = np.cumsum(sizes[np.asarray(documents)[places]])
    count = int(np.searchsorted(ends, share * ends[-1])) + 1
    return [documents[place] for place in sorted(places[:count].tolist())]
