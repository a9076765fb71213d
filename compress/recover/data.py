"""Training data: chats, instructions and plain text as packed batches in an order that a seed decides.

    files -> index of byte offsets -> tokens, once, in a temporary file -> rows of whole documents -> batches

A row is one object of a .jsonl file: `messages` (a chat), a prompt with its answer, or a text; kinds may be mixed. Of
chats and answers only what the assistant says counts in the loss; of a text everything but the first token does.
Neither texts nor tokens stay in memory, only about 50 bytes per document and the rows that are being packed. As the
tokens are known before the first batch, a run that resumes skips batches without reading them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import UserError
from compress.recover.chat import read_template
from compress.recover.data_index import DocumentIndex, Spool
from compress.recover.data_pack import cut_document, cut_windows, pack_rows, shuffle_places
from compress.recover.data_rows import Document, Draft, StreamOptions, draft_row, encode_drafts
from compress.text import boundary_ids

__all__ = [
    "Batch", "DataFacts", "DataStream", "Document", "DocumentView", "StreamOptions", "check_documents", "make_options",
    "open_stream",
]  # fmt: skip

GROUP, GROUP_CHARACTERS = 512, 2**22  # documents, and characters, that are tokenised at once
WINDOW = 8192  # pieces that are packed together, and whose rows are shuffled
NEAR = 4  # batches' worth of neighbours that are packed and shuffled where an order is to be followed
# A piece of a document that fits into a row: where its tokens lie, how many, how many count, whose it is, and whether
# it is the start of it.
PIECE = np.dtype([("start", "<u8"), ("size", "<u4"), ("counted", "<u4"), ("document", "<u8"), ("begins", "?")])


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    `ids` `[rows, length]` int64. `weights` `[rows, length]` float32: weights[t] counts the prediction OF token t from
    the tokens before it; 0 for prompts, padding and the first token of a document. `documents` `[rows, length]` int64:
    the document's index in its row; attention stays inside a document and positions restart there. Padding is an
    index of its own.
    """

    ids: Tensor
    weights: Tensor
    documents: Tensor

    @property
    def counted(self) -> float:
        """Sum of the weights: the tokens that the loss is a mean of."""
        return float(self.weights.sum())


@dataclass(frozen=True)
class DataFacts:
    """What was found: documents and their tokens, those that count in the loss, and what packing did to them.

    `split`: documents longer than a row, cut into pieces; `idle`: tokens of pieces with nothing to predict, left out;
    `unanswered`: chats without an answer, left out; `rewritten`: chats of which only the last answer counts, since the
    template rewrites earlier ones; `unread`: documents beyond `most_tokens`.
    """

    documents: int = 0
    tokens: int = 0
    counted: int = 0
    split: int = 0
    idle: int = 0
    unanswered: int = 0
    rewritten: int = 0
    unread: int = 0


def make_options(
    folder: Path, config: Mapping[str, Any], size: tuple[int, int], now: datetime | None = None, **rest: Any
) -> StreamOptions:
    """Return options for a checkpoint: its chat template, its boundary tokens and its vocabulary.

    `size`: (rows, length). Texts start with the token that calibration puts there and end with `eos_token_id`.
    """
    last = config.get("eos_token_id")
    last = last[0] if isinstance(last, list) and last else last
    settings: dict[str, Any] = {
        "start": tuple(boundary_ids(dict(config))),
        "end": (last,) if isinstance(last, int) else (),
        "template": read_template(folder, now),
        "vocabulary": int(config["vocab_size"]),
    }
    return StreamOptions(rows=size[0], length=size[1], **{**settings, **rest})


def open_stream(paths: Sequence[Path], tokenizer: Any, options: StreamOptions) -> DataStream:
    """Index and tokenise files; UserError, naming file and line, for what is no training data or gives no token."""
    index = DocumentIndex(paths, options.field)
    return DataStream(index, tokenizer, options)


def check_documents(paths: Sequence[Path], options: StreamOptions) -> None:
    """Read every document of some files once, without its tokens; UserError, naming file and line, as `open_stream`."""
    index = DocumentIndex(paths, options.field)
    for number in range(len(index)):
        draft_document(index, number, options)
    index.close()


def draft_document(index: DocumentIndex, number: int, options: StreamOptions) -> Draft:
    """Return a document before it is tokenised; UserError for what is no training data."""
    row, first, last = index.read(number)
    return draft_row(row, options, (first, last), index.place(number))


# The stream


class DocumentView(Sequence[Document]):
    """Some documents of a stream in an order, each read when it is asked for."""

    def __init__(self, stream: DataStream, numbers: Sequence[int]) -> None:
        self._stream, self.numbers = stream, list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        """Return the document at a place of the order."""
        return self._stream.document(self.numbers[place])


@dataclass
class Counts:
    """Facts while they are counted."""

    found: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, count: int | bool = 1) -> None:
        """Add to one of them."""
        self.found[name] = self.found.get(name, 0) + int(count)


class DataStream:
    """Tokenised documents in temporary files, packed into batches on demand; made by `open_stream`."""

    def __init__(self, index: DocumentIndex, tokenizer: Any, options: StreamOptions) -> None:
        """Tokenise the index's documents once."""
        self.index, self.options = index, options
        self._ids, self._weights, self._pieces = Spool(np.dtype("<i4")), Spool(np.dtype("u1")), Spool(PIECE)
        counts = Counts()
        for group in self._group_numbers():
            self._add_group(group, tokenizer, counts)
        self.facts = DataFacts(**{"documents": 0, **counts.found})
        if self._pieces.count == 0:
            names = ", ".join(str(path) for path in index.paths)
            raise UserError(f"{names}: no token there counts in the loss; give answers, or texts of two tokens.")
        self._sizes, self._owners = self._pieces.column("size"), self._pieces.column("document")
        self._numbers, self._firsts, self._cuts = np.unique(self._owners, return_index=True, return_counts=True)

    def close(self) -> None:
        """Delete the temporary files; they also go with the object."""
        for spool in (self._ids, self._weights, self._pieces):
            spool.close()
        self.index.close()

    @cached_property
    def digest(self) -> str:
        """Return a hash of all that decides the batches but an order: tokens, what counts, packing and seed."""
        total = hashlib.sha256(repr((self.options.rows, self.options.length, self.options.seed)).encode())
        for spool in (self._ids, self._weights, self._pieces):
            total.update(f"{spool.count} ".encode())
            for block in spool.blocks():
                total.update(block.tobytes())
        return total.hexdigest()

    def batches(self, start: int = 0, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield batches without end, epoch after epoch, without the first `start`, which are skipped without reading.

        Each epoch has its own shuffle, by the seed. `order` (document numbers, for a curriculum; some may be named more
        than once, and those left out are not used) replaces it: rows are then shuffled only among neighbours of a few
        batches, and what comes after its end is the same again. A batch may hold the end of an epoch and the start of
        the next.
        """
        rows, waiting = self.options.rows, start * self.options.rows
        held: list[np.ndarray[Any, Any]] = []
        for epoch in count():
            for window in self._plan_windows(epoch, order):
                if waiting >= len(window):
                    waiting -= len(window)
                    continue
                held += window[waiting:]
                waiting = 0
                while len(held) >= rows:
                    yield self._fill_batch(held[:rows])
                    held = held[rows:]

    def count_rows(self, order: Sequence[int] | None = None) -> int:
        """Return the rows of one epoch, or of an order once."""
        return sum(len(window) for window in self._plan_windows(0, order))

    def document(self, number: int) -> Document:
        """Return a document's first piece of at most `length` tokens in which something counts; empty without one.

        For scores of documents: what a row can hold is what training sees of it at once.
        """
        at = int(np.searchsorted(self._numbers, number))
        if at == len(self._numbers) or self._numbers[at] != number:
            return Document([], [])
        ids, weights = self._read_piece(int(self._firsts[at]))
        return Document(ids.tolist(), weights.tolist())

    def begins(self, number: int) -> bool:
        """Return whether what `document` returns is the start of the document."""
        at = int(np.searchsorted(self._numbers, number))
        place = int(self._firsts[at])
        return bool(self._pieces.read(place, place + 1)[0]["begins"])

    def used(self) -> list[int]:
        """Return the numbers of the documents that training sees."""
        found: list[int] = self._numbers.tolist()
        return found

    def token_counts(self) -> np.ndarray[Any, Any]:
        """Return the tokens of each document that training sees, `[documents in the files]`; 0: it was left out."""
        return self._sum_pieces(self._sizes)

    def answer_counts(self) -> np.ndarray[Any, Any]:
        """Return the tokens of each document that count in the loss, `[documents in the files]`."""
        return self._sum_pieces(self._pieces.column("counted"))

    def _sum_pieces(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the sum over each document's pieces."""
        return np.bincount(self._owners.astype(np.int64), values, len(self.index)).astype(np.int64)

    # Tokenising

    def _group_numbers(self) -> Iterator[list[int]]:
        """Yield document numbers in groups of bounded size, at random where only some will be used."""
        numbers = range(len(self.index))
        order = shuffle_places(len(self.index), self.options.seed) if self.options.most_tokens else numbers
        sizes, group, total = self.index.entries.column("size"), list[int](), 0
        for number in order:
            group.append(int(number))
            total += int(sizes[number])
            if len(group) == GROUP or total >= GROUP_CHARACTERS:
                yield group
                group, total = [], 0
        if group:
            yield group

    def _add_group(self, group: Sequence[int], tokenizer: Any, counts: Counts) -> None:
        most = self.options.most_tokens
        if most and self._ids.count >= most:
            counts.add("unread", len(group))
            return
        drafts = [draft_document(self.index, number, self.options) for number in group]
        for number, document in zip(group, encode_drafts(tokenizer, drafts), strict=True):
            if most and self._ids.count >= most:
                counts.add("unread")
            else:
                self._add_document(number, document, counts)

    def _add_document(self, number: int, document: Document, counts: Counts) -> None:
        """Write one document's tokens and its pieces that have something to predict."""
        self._check_ids(number, document.ids)
        size, weights, begin = len(document.ids), np.array(document.weights, np.uint8), self._ids.count
        if not weights[1:].any():
            counts.add("unanswered" if size > 1 else "idle", 1 if size > 1 else size)
            return
        spans = cut_document(size, self.options.length)
        counted = [int(weights[start + 1 : stop].sum()) for start, stop in spans]
        pieces = [
            (begin + start, stop - start, own, number, start == 0)
            for (start, stop), own in zip(spans, counted, strict=True) if own
        ]  # fmt: skip
        self._ids.append(np.array(document.ids, "<i4"))
        self._weights.append(weights)
        self._pieces.append(np.array(pieces, PIECE))
        for name, value in (("documents", 1), ("tokens", size), ("counted", sum(counted)), ("split", len(spans) > 1)):
            counts.add(name, value)
        counts.add("rewritten", document.rewritten)
        counts.add("idle", sum(stop - start for (start, stop), own in zip(spans, counted, strict=True) if not own))

    def _check_ids(self, number: int, ids: Sequence[int]) -> None:
        if self.options.vocabulary and max(ids, default=0) >= self.options.vocabulary:
            raise UserError(
                f"{self.index.place(number)}: the tokenizer gives token {max(ids)} but the model has "
                f"{self.options.vocabulary} embeddings; the tokenizer belongs to another model."
            )

    # Packing

    def _plan_windows(self, epoch: int, order: Sequence[int] | None) -> Iterator[list[np.ndarray[Any, Any]]]:
        """Yield the rows of one epoch, each the numbers of its pieces, a window of pieces at a time."""
        seed, length = self.options.seed, self.options.length
        if order is None:
            places, room = shuffle_places(len(self._sizes), seed, epoch), WINDOW * length
        else:
            places, room = self._follow(order), NEAR * self.options.rows * length
        for number, window in enumerate(cut_windows(places, self._sizes, WINDOW, room)):
            rows = pack_rows(self._sizes[window].tolist(), length)
            yield [window[rows[place]] for place in shuffle_places(len(rows), seed, epoch, number)]

    def _follow(self, order: Sequence[int]) -> np.ndarray[Any, Any]:
        """Return the pieces of the documents in `order`, each document's together."""
        wanted = np.asarray(order, np.int64)
        at = np.searchsorted(self._numbers, wanted).clip(max=len(self._numbers) - 1)
        at = at[self._numbers[at] == wanted]
        if not len(at):
            raise UserError("The order of the documents names none that has something to predict; give others.")
        cuts = self._cuts[at]
        before = np.cumsum(cuts) - cuts
        found: np.ndarray[Any, Any] = np.repeat(self._firsts[at] - before, cuts) + np.arange(int(cuts.sum()))
        return found

    def _read_piece(self, place: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return a piece's ids and weights; its first token is predicted by nothing."""
        piece = self._pieces.read(place, place + 1)[0]
        start, stop = int(piece["start"]), int(piece["start"]) + int(piece["size"])
        weights = self._weights.read(start, stop)
        weights[0] = 0
        return self._ids.read(start, stop), weights

    def _fill_batch(self, rows: Sequence[np.ndarray[Any, Any]]) -> Batch:
        shape = (len(rows), self.options.length)
        ids, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        documents = np.zeros(shape, np.int64)
        for row, places in enumerate(rows):
            documents[row] = len(places)
            at = 0
            for number, place in enumerate(places):
                found, counted = self._read_piece(int(place))
                span = slice(at, at + len(found))
                ids[row, span], weights[row, span], documents[row, span] = found, counted, number
                at = span.stop
        return Batch(torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(documents))
