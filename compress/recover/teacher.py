"""What the teacher says of each token: asked for in the loop, or written to disk before it and read from there.

Online, the teacher runs on each batch beside the student. Offline, it runs once over all batches that training will
use, each of its layers read once per shard, and leaves its k most likely tokens, the log-probability of all others
together, and the log-sum-exp of its logits (with which log-probabilities are logits again) for every token that
counts. Training then holds no teacher. (Offline distillation: methods 4.2; buckets: `losses.tail_kl`.)

    CACHE/scores.json            the key: hashes of teacher and tokens, sizes; a cache with another key is refused
    CACHE/shard-00000.npy        one record for each counted token, batch after batch
    CACHE/shard-00000.json       for each batch: counted tokens and a checksum of what was scored
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.checkpoint_writer import sync_path, write_atomically
from compress.errors import UserError
from compress.parallel import ALONE, Group
from compress.recover.losses import Target, Top, count_piece, widen
from compress.recover.model import Frozen
from compress.spec import ModelSpec
from compress.text import load_tokenizer

if TYPE_CHECKING:
    from compress.recover.data import Batch

Progress = Callable[[str, int, int], None]
KEY_NAME = "scores.json"
BUDGET_BYTES = 60  # for each counted token
SHARD_TOKENS = 2**16  # whose streams are in memory while the teacher's layers go by
NARROW_VOCABULARY = 2**16  # ids below fit two bytes; larger vocabularies take a third
FIXED_BYTES = 6  # tail and log-sum-exp


@dataclass(frozen=True)
class Rows:
    """The counted predictions of a batch: `mask` `[rows, length - 1]` of the tokens that predict, labels, weights."""

    mask: Tensor
    labels: Tensor
    weights: Tensor

    def pick(self, stream: Tensor) -> Tensor:
        """Return the counted rows `[tokens, hidden]` of a stream `[rows, length, hidden]`."""
        return stream[:, :-1][self.mask]


def select_rows(batch: Batch) -> Rows:
    """Return which tokens of a batch predict something that counts; a token is predicted from the one before it."""
    mask = batch.weights[:, 1:] > 0
    return Rows(mask, batch.ids[:, 1:][mask], batch.weights[:, 1:][mask])


def ignore_hidden() -> dict[int, Tensor]:
    """Return no hidden states."""
    return {}


@dataclass(frozen=True)
class Guide:
    """What the teacher says of one batch: `target(span)` of its counted tokens, and streams `[tokens, hidden]`."""

    target: Callable[[slice], Target]
    hidden: Mapping[int, Tensor] = field(default_factory=ignore_hidden)


class Teaching(Protocol):
    """Where the loop gets its targets from."""

    def guide(self, number: int, batch: Batch) -> Guide:
        """Return what the teacher says of batch `number` of the stream."""
        ...


class NoTeacher:
    """Training on the text alone."""

    def guide(self, number: int, batch: Batch) -> Guide:
        """Return a guide without a target."""
        del number, batch
        return Guide(lambda span: None)


class OnlineTeacher:
    """The teacher in the loop: its logits exist for one piece of tokens at a time."""

    def __init__(self, model: Frozen, taps: Sequence[int] = ()) -> None:
        self._model, self._taps = model, tuple(taps)

    def guide(self, number: int, batch: Batch) -> Guide:
        """Run the teacher on the batch."""
        del number
        rows = select_rows(batch)
        streams, tapped = self._model.streams([(batch.ids, batch.documents)], self._taps)
        last = rows.pick(streams[0])
        hidden = {layer: rows.pick(found[0]) for layer, found in tapped.items()}
        return Guide(lambda span: self._model.logits(last[span]), hidden)


def check_vocabulary(student: tuple[ModelSpec, Path], teacher: tuple[ModelSpec, Path]) -> None:
    """Raise UserError where token ids mean different things to (spec, folder) of student and teacher."""
    (own, folder), (other, taught) = student, teacher
    if own.shape.vocab != other.shape.vocab:
        raise UserError(
            f"{taught} has {other.shape.vocab} vocabulary rows and {folder} has {own.shape.vocab}: a teacher needs the "
            f"student's tokens; give the model that {folder} was cut from, or train on text alone with --loss ce."
        )
    if not all((place / "tokenizer.json").is_file() for place in (folder, taught)):
        return
    words, others = (load_tokenizer(place).get_vocab() for place in (folder, taught))
    moved = next((word for word, number in words.items() if others.get(word) != number), None)
    if moved is not None:
        raise UserError(
            f"The tokenizers of {folder} and {taught} differ ('{moved}' is {words[moved]} and {others.get(moved)}); "
            f"give the model that {folder} was cut from as --teacher, or train on text alone with --loss ce."
        )


def check_matches(student: ModelSpec, teacher: ModelSpec, matches: Sequence[tuple[int, int]]) -> None:
    """Raise UserError for a pair (student layer, teacher layer) that is not there or whose streams differ in width."""
    for own, other in matches:
        for layer, spec, side in ((own, student, "student"), (other, teacher, "teacher")):
            if not 0 <= layer < len(spec.layers):
                raise UserError(f"--match {own}:{other}: the {side} has layers 0 to {len(spec.layers) - 1}.")
    if matches and student.shape.hidden != teacher.shape.hidden:
        raise UserError(
            f"--match compares hidden states, and the student's are {student.shape.hidden} wide, the teacher's "
            f"{teacher.shape.hidden}: leave it out, or cut the model without hidden in --axes."
        )


# Scores on disk


@dataclass(frozen=True)
class Form:
    """How a token's scores are stored: `k` buckets, ids of two bytes, or of three for a large vocabulary."""

    k: int
    wide: bool

    @property
    def record(self) -> np.dtype[Any]:
        """The record of one token."""
        high = [("high", "u1", (self.k,))] if self.wide else []
        fixed = [("values", "<f2", (self.k,)), ("tail", "<f2"), ("total", "<f4")]
        return np.dtype([("low", "<u2", (self.k,)), *high, *fixed])


def choose_form(vocab: int, budget: int = BUDGET_BYTES) -> Form:
    """Return the form with most buckets in `budget` bytes for each token; one token at least is left for the tail."""
    wide = vocab > NARROW_VOCABULARY
    k = min((budget - FIXED_BYTES) // (5 if wide else 4), vocab - 1)
    if k < 1:
        raise UserError(f"{budget} bytes for each token hold no score; give at least {FIXED_BYTES + 5}.")
    return Form(k, wide)


def pack_scores(logits: Tensor, form: Form) -> npt.NDArray[Any]:
    """Return the records `[tokens]` of a teacher's logits `[tokens, vocab]`."""
    z = widen(logits)
    total = z.logsumexp(-1, keepdim=True)
    values, ids = z.topk(form.k, -1)
    tail = z.scatter(-1, ids, float("-inf")).logsumexp(-1) - total[:, 0]
    records = np.empty(len(z), form.record)
    numbers = ids.cpu().numpy()
    records["low"] = numbers & 0xFFFF
    if form.wide:
        records["high"] = numbers >> 16
    records["values"], records["tail"] = (values - total).cpu().numpy(), tail.clamp(min=-6e4).cpu().numpy()
    records["total"] = total[:, 0].cpu().numpy()
    return records


def unpack_scores(records: npt.NDArray[Any]) -> Top:
    """Return the buckets of stored records; what rounding to 16 bits added to their sum is taken off again."""
    ids = records["low"].astype(np.int64)
    if "high" in (records.dtype.names or ()):
        ids |= records["high"].astype(np.int64) << 16
    values = torch.from_numpy(records["values"].astype(np.float32))
    tail = torch.from_numpy(records["tail"].astype(np.float32))
    total = torch.cat((values, tail[:, None]), -1).logsumexp(-1)
    return Top(torch.from_numpy(ids), values - total[:, None], tail - total)


@dataclass(frozen=True)
class Plan:
    """What a cache holds: its key, the form of its records, how many batches, and how many go into one shard."""

    key: Mapping[str, str]
    form: Form
    batches: int
    per_shard: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        form = {"k": self.form.k, "wide": self.form.wide}
        return {"key": dict(self.key), "form": form, "batches": self.batches, "per_shard": self.per_shard}


def plan_cache(key: Mapping[str, str], vocab: int, batches: int, batch_tokens: int) -> Plan:
    """Decide the form and the shards of a cache for `batches` batches of `batch_tokens` tokens."""
    return Plan(key, choose_form(vocab), batches, max(1, SHARD_TOKENS // batch_tokens))


def open_cache(folder: Path, plan: Plan) -> None:
    """Make the folder of a cache, or accept one of the same plan; raises UserError for another one's."""
    path = folder / KEY_NAME
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(plan.to_json(), indent=2).encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in plan.key.items() if found["key"].get(name) != value]
        fits = {**found, "key": plan.to_json()["key"]} == plan.to_json()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete {folder} to score again.") from error
    if other or not fits:
        what = " and ".join(other) or "settings"
        raise UserError(
            f"{folder} holds a teacher's scores of another run (its {what} differ); give another --cache, or delete it "
            "to score again."
        )


def count_shards(plan: Plan) -> int:
    """Return how many shards a whole cache has."""
    return -(-plan.batches // plan.per_shard)


def list_missing(folder: Path, plan: Plan) -> list[int]:
    """Return the shards that are still to be scored."""
    return [shard for shard in range(count_shards(plan)) if not shard_path(folder, shard).is_file()]


def fill_cache(
    folder: Path,
    plan: Plan,
    model: Frozen,
    batches: Callable[[int], Iterator[Batch]],
    progress: Progress,
    group: Group = ALONE,
) -> None:
    """Score all batches that no finished shard holds; `batches(start)` yields them from number `start` on.

    The processes of a group take turns at the shards, and return when all are there.
    """
    shards, missing = count_shards(plan), group.tell(list_missing(folder, plan))
    for done, shard in enumerate(missing[group.rank :: group.size]):
        progress("score", shards - len(missing) + done * group.size, shards)
        start = shard * plan.per_shard
        chosen = list(islice(batches(start), min(plan.per_shard, plan.batches - start)))
        write_shard(shard_path(folder, shard), plan.form, model, chosen)
    group.wait()
    progress("score", shards, shards)


def write_shard(path: Path, form: Form, model: Frozen, batches: Sequence[Batch]) -> None:
    """Score some batches, the teacher's layers read once for all; the records appear last, by one rename."""
    streams, _ = model.streams([(batch.ids, batch.documents) for batch in batches])
    step = count_piece(model.spec.shape.vocab)
    partial, facts = path.with_name(f".{path.name}.partial-{os.getpid()}"), []
    counts = [int(select_rows(batch).mask.sum()) for batch in batches]
    records = np.lib.format.open_memmap(partial, "w+", form.record, (sum(counts),)) if sum(counts) else None
    place = 0
    for batch, stream, count in zip(batches, streams, counts, strict=True):
        rows = select_rows(batch).pick(stream)
        for start in range(0, count, step):
            part = pack_scores(model.logits(rows[start : start + step]), form)
            assert records is not None
            records[place : place + len(part)] = part
            place += len(part)
        facts.append([count, checksum(batch)])
    write_atomically(path.with_suffix(".json"), json.dumps(facts).encode())
    if records is None:  # nothing counts in these batches, and an empty file cannot be mapped
        with partial.open("wb") as file:
            np.save(file, np.empty(0, form.record))
    else:
        records.flush()
        del records
    sync_path(partial)
    partial.replace(path)


def shard_path(folder: Path, shard: int) -> Path:
    """Return where the records of a shard lie."""
    return folder / f"shard-{shard:05d}.npy"


def checksum(batch: Batch) -> int:
    """Return a checksum of what a batch asks: its tokens, which of them count, and the documents."""
    parts = (batch.ids, (batch.weights > 0).to(torch.uint8), batch.documents)
    total = 0
    for part in parts:
        total = zlib.crc32(part.contiguous().numpy().tobytes(), total)
    return total


class CachedTeacher:
    """The teacher's scores from disk, one shard mapped at a time."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._shard = -1
        self._records: npt.NDArray[Any] = np.empty(0, plan.form.record)
        self._facts: list[tuple[int, int]] = []

    def guide(self, number: int, batch: Batch) -> Guide:
        """Return the stored scores of batch `number`; UserError where the batch is not the one that was scored."""
        shard, place = divmod(number, self._plan.per_shard)
        self._open(shard)
        count, expected = self._facts[place]
        if checksum(batch) != expected:
            raise UserError(
                f"{self._folder} holds scores of other text than the run now reads; delete it to score again."
            )
        start = sum(counted for counted, _ in self._facts[:place])
        top = unpack_scores(self._records[start : start + count])
        return Guide(top.part)

    def _open(self, shard: int) -> None:
        if shard == self._shard:
            return
        path = shard_path(self._folder, shard)
        try:
            facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is missing or damaged; delete {self._folder} to score again.") from error
        self._shard, self._facts, self._records = shard, [(int(count), int(code)) for count, code in facts], records
