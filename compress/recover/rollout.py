"""On-policy rounds: the student answers prompts once, and what it wrote is the text of the next lesson.

The prompts are those of the training text: what stands before the last answer of a chat or of a prompt with its
answer, and the first tokens of a plain text. Nothing is generated while training: a round's answers lie on disk, so
that a teacher can score them like any other text (offline on-policy distillation: methods 4.1, stage B).

    ROUND/round.json             the weights that the student had, as a hash: answers of others are thrown away
    ROUND/answers-00000.npz      the answers to some prompts: ids, and for each row its size and its prompt's
    ROUND/done.json              how many of these there are, and what is told of the round
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from compress.checkpoint_source import read_json
from compress.checkpoint_writer import write_atomically
from compress.errors import UserError
from compress.parallel import ALONE, Group
from compress.recover.data import DataStream, Document, StreamOptions
from compress.recover.data_index import ENTRY, DocumentIndex, Spool
from compress.recover.data_pack import shuffle_places
from compress.recover.functional import Model
from compress.recover.losses import count_piece, widen
from compress.recover.model import Frozen, Student
from compress.recover.parallel import gather_whole
from compress.recover.sampler import SampleOptions, answer_prompts, count_rows, make_generator
from compress.recover.teacher import Progress, select_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.recover.data import Batch, Counts

KEY_NAME, DONE_NAME = "round.json", "done.json"
PLAIN_SHARE = 0.25  # of a row: the most that a plain text gives as a prompt
LEAST, WINDOW = 16, 512  # prompts that are answered between two files
STOP_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class RolloutOptions:
    """What a round asks for: `tokens` of text, prompts included, in rows of `length`; the seed is the run's and its."""

    tokens: int
    length: int
    sample: SampleOptions
    seed: tuple[int, ...]

    @property
    def room(self) -> int:
        """Tokens that a prompt may have, so that every answer has its full length."""
        return self.length - self.sample.most


# Prompts


def read_stops(folder: Path) -> tuple[int, ...]:
    """Return the tokens with which a model's answers end, by its configs."""
    found: set[int] = set()
    for path in (folder / name for name in STOP_FILES):
        value = read_json(path).get("eos_token_id") if path.is_file() else None
        found.update(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
    return tuple(sorted(found))


def cut_prompt(document: Document, options: RolloutOptions) -> list[int]:
    """Return what a document gives as a prompt: all before its last answer, or the start of a text that is no answer.

    Empty where it leaves no room for an answer. A text gives at most half of itself, and a quarter of a row.
    """
    weights = document.weights
    stop = max((place for place, weight in enumerate(weights) if weight), default=0)
    size = next((place + 1 for place in range(stop, -1, -1) if not weights[place]), 0)
    if size <= 1:  # all but the first token count
        size = min(int(PLAIN_SHARE * options.length), len(weights) // 2, options.room)
    return list(document.ids[:size]) if size <= options.room else []


def draw_prompts(stream: DataStream, numbers: Sequence[int], options: RolloutOptions) -> Iterator[list[int]]:
    """Yield prompts from the documents `numbers` of a text, in an order that the round's seed decides."""
    for place in shuffle_places(len(numbers), *options.seed):
        number = numbers[int(place)]
        # What begins in the middle of a prompt is none.
        prompt = cut_prompt(stream.document(number), options) if stream.begins(number) else []
        if prompt:
            yield prompt


def check_prompts(stream: DataStream, numbers: Sequence[int], options: RolloutOptions) -> None:
    """Raise UserError where no document gives a prompt with room for its answer."""
    if options.room < 1:
        raise UserError(
            f"--answer-tokens {options.sample.most} leave no room for a prompt in rows of {options.length} tokens; "
            "give fewer, or a larger --length."
        )
    if next(draw_prompts(stream, numbers, options), None) is None:
        raise UserError(
            f"No prompt of the text fits into the {options.room} tokens that --length {options.length} leaves beside "
            f"--answer-tokens {options.sample.most}; give fewer of these, or a larger --length."
        )


# Answers


@dataclass(frozen=True)
class Rollouts(Sequence[Document]):
    """Prompts with their answers, of which only the answers count: flat `ids`, `[answers]` sizes and prompts' sizes."""

    ids: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    prompts: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, place: Any) -> Any:
        """Return one of them as a document."""
        stop = int(self.stops[place])
        size, prompt = int(self.sizes[place]), int(self.prompts[place])
        return Document(self.ids[stop - size : stop].tolist(), [0] * prompt + [1] * (size - prompt))

    @cached_property
    def stops(self) -> np.ndarray[Any, Any]:
        """Where each one ends in `ids`."""
        return np.cumsum(self.sizes)

    @property
    def generated(self) -> int:
        """Tokens that the student wrote."""
        return int(self.sizes.sum() - self.prompts.sum())

    def describe(self, stop: Sequence[int]) -> dict[str, Any]:
        """Return counts for a report; `ended`: the share whose last token is one of `stop`."""
        return {
            "prompts": len(self),
            "tokens": self.generated,
            "mean_tokens": self.generated / len(self),
            "ended": float(np.isin(self.ids[self.stops - 1], stop).mean()),
        }


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Return several as one."""
    return Rollouts(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "sizes", "prompts")))


def hash_student(student: Student) -> str:
    """Return a hash of all trained parameters; processes that share them gather them together."""
    total = hashlib.sha256()
    for name, tensor in student.trained().items():
        total.update(name.encode())
        total.update(gather_whole(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def open_round(folder: Path, key: str) -> None:
    """Make a round's folder, or accept that of the same student; what another one's round left there is deleted."""
    path = folder / KEY_NAME
    try:
        if json.loads(path.read_text(encoding="utf-8")) == {"student": key}:
            return
    except (OSError, ValueError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_atomically(path, json.dumps({"student": key}).encode())


@dataclass(frozen=True)
class Writer:
    """Who answers: the student, in the processes of a group, with notes on how far they are."""

    model: Model
    progress: Progress
    group: Group = ALONE


def fill_round(folder: Path, writer: Writer, prompts: Iterator[list[int]], options: RolloutOptions) -> Rollouts:
    """Answer prompts until the round has its tokens or there are no more; files that are there already are kept.

    `prompts` are those of the round from the first one on. UserError where there is none.
    """
    parts, have, written = list[Rollouts](), 0, 0
    for number in count():
        answer = written / sum(map(len, parts)) if parts else options.sample.most
        taken = take_prompts(prompts, options.tokens - have, answer) if have < options.tokens else []
        if not taken:
            break
        writer.progress("answer prompts", have, options.tokens)
        path = folder / f"answers-{number:05d}.npz"
        known = writer.group.tell(path.is_file())
        parts.append(read_part(path) if known else answer_window(writer, taken, options, number))
        if not known and writer.group.first:
            write_part(path, parts[-1])
        have, written = have + len(parts[-1].ids), written + parts[-1].generated
    if not parts:
        raise UserError("The text has no prompt that leaves room for an answer; give a larger --length.")
    writer.progress("answer prompts", options.tokens, options.tokens)
    return join_rollouts(parts)


def take_prompts(prompts: Iterator[list[int]], wanted: int, answer: float) -> list[list[int]]:
    """Take prompts that give about `wanted` tokens where answers have `answer`, within what one file holds."""
    taken, tokens = list[list[int]](), 0.0
    for prompt in prompts:
        taken.append(prompt)
        tokens += len(prompt) + answer
        if len(taken) == WINDOW or (tokens >= wanted and len(taken) >= LEAST):
            break
    return taken


def answer_window(writer: Writer, prompts: list[list[int]], options: RolloutOptions, number: int) -> Rollouts:
    """Answer prompts of similar length together, batches shared out among the processes.

    Each batch has random numbers of its own, so that any number of processes gives the same answers.
    """
    model, ordered = writer.model, sorted(prompts, key=len)
    rows = count_rows(model.spec, options.length)
    starts, own = range(0, len(ordered), rows), list[list[int]]()
    for start in (starts[place] for place in writer.group.share(len(starts))):
        random = make_generator((*options.seed, number, start))
        own += answer_prompts(model, ordered[start : start + rows], options.sample, random)
    found = [one for part in writer.group.gather(own) for one in part]
    sizes, lengths = (np.array([len(one) for one in every], np.int32) for every in (found, ordered))
    return Rollouts(np.concatenate([np.array(one, np.int32) for one in found]), sizes, lengths)


def write_part(path: Path, part: Rollouts) -> None:
    """Write a file of answers by one rename."""
    data = io.BytesIO()
    np.savez_compressed(data, ids=part.ids, sizes=part.sizes, prompts=part.prompts)
    write_atomically(path, data.getvalue())


def read_part(path: Path) -> Rollouts:
    """Read a file of answers; UserError for one that is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            return Rollouts(found["ids"], found["sizes"], found["prompts"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is missing or damaged; delete {path.parent.parent} to start again.") from error


def close_round(folder: Path, facts: dict[str, Any]) -> None:
    """Write down that a round is ready to be trained on, and what is told of it."""
    facts = {**facts, "files": len(list(folder.glob("answers-*.npz")))}
    write_atomically(folder / DONE_NAME, (json.dumps(facts, indent=2) + "\n").encode())


def read_round(folder: Path) -> dict[str, Any]:
    """Return what is told of a round that is ready; UserError where none is."""
    try:
        return dict(json.loads((folder / DONE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds no finished round; delete {folder.parent} to start again.") from error


def read_rollouts(folder: Path) -> Rollouts:
    """Return the answers of a round that is ready."""
    files = int(read_round(folder)["files"])
    return join_rollouts([read_part(folder / f"answers-{number:05d}.npz") for number in range(files)])


# As training text


class RolloutIndex(DocumentIndex):
    """Answers as the documents of one file."""

    def __init__(self, folder: Path, rollouts: Rollouts) -> None:
        """Note the size of each."""
        self.paths, self.field, self.entries = [folder], "", Spool(ENTRY)
        self._tables = {}
        entries = np.zeros(len(rollouts), ENTRY)
        entries["size"], entries["line"] = rollouts.sizes, np.arange(1, len(rollouts) + 1)
        self.entries.append(entries)


class RolloutStream(DataStream):
    """A student's answers packed into batches like any other text."""

    def __init__(self, folder: Path, rollouts: Rollouts, options: StreamOptions) -> None:
        """Take the tokens over; `folder` is for messages."""
        self._rollouts = rollouts
        super().__init__(RolloutIndex(folder, rollouts), None, options)

    def _add_group(self, group: Sequence[int], tokenizer: Any, counts: Counts) -> None:
        for number in group:
            self._add_document(number, self._rollouts[number], counts)


@torch.no_grad()
def measure_frozen(model: Frozen, batches: Iterable[Batch]) -> float:
    """Return a model's mean cross entropy in nats of the counted tokens of some batches, each layer read once."""
    chosen, total, weight = list(batches), 0.0, 0.0
    streams, _ = model.streams([(batch.ids, batch.documents) for batch in chosen])
    step = count_piece(model.spec.shape.vocab)
    for batch, stream in zip(chosen, streams, strict=True):
        rows = select_rows(batch)
        picked = rows.pick(stream)
        for start in range(0, len(picked), step):
            span = slice(start, start + step)
            losses = F.cross_entropy(widen(model.logits(picked[span])), rows.labels[span], reduction="none")
            total += float((losses * rows.weights[span]).sum(dtype=torch.float64))
        weight += float(rows.weights.sum(dtype=torch.float64))
    return total / weight
