"""Training data: chats, instructions and plain text as packed batches in an order that a seed decides.

    files -> index of byte offsets -> tokens, once, in a temporary file -> rows of whole documents -> batches

A row is one object of a .jsonl file: `messages` (a chat), a prompt with its answer, or a text; kinds may be mixed. Of
chats and answers only what the assistant says counts in the loss; of a text everything but the first token does.
Neither texts nor tokens stay in memory, only about 50 bytes per document and the rows that are being packed. As the
tokens are known before the first batch, a run that resumes skips batches without reading them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import UserError
from compress.recover.chat import ChatTemplate, Message, mark_tokens, read_template, render_chat
from compress.recover.data_index import DocumentIndex, Spool
from compress.recover.data_pack import cut_document, pack_rows, shuffle_places
from compress.text import boundary_ids

# Names of a question and its answer, in the order in which they are looked for.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
GROUP, GROUP_CHARACTERS = 512, 2**22  # documents, and characters, that are tokenised at once
WINDOW = 8192  # pieces that are packed together, and whose rows are shuffled
# A piece of a document that fits into a row: where its tokens lie, how many, how many count, and whose it is.
PIECE = np.dtype([("start", "<u8"), ("size", "<u4"), ("counted", "<u4"), ("document", "<u8")])


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
class StreamOptions:
    """How to make batches; `make_options` fills in what a checkpoint folder says.

    `length`, `rows`: of a batch; `field`: of the text; `start`, `end`: ids around texts and answers without a template;
    `vocabulary`: size to check ids against (0: unchecked); `most_tokens`: stop after so many, taking documents at
    random (0: all); `plain`: prompts with answers do not go through the template.
    """

    length: int = 512
    rows: int = 8
    seed: int = 0
    field: str = "text"
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    template: ChatTemplate | None = None
    vocabulary: int = 0
    most_tokens: int = 0
    plain: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that hold no prediction."""
        if self.length < 2 or self.rows < 1:  # noqa: PLR2004 (a token, and one that is predicted)
            raise UserError(f"{self.rows} rows of {self.length} tokens hold no prediction; give at least 1 row of 2.")


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


@dataclass(frozen=True)
class Document:
    """Token ids of one document and, of equal length, 1 for each token that counts in the loss, else 0."""

    ids: Sequence[int]
    weights: Sequence[int]
    rewritten: bool = False


@dataclass(frozen=True)
class Draft:
    """A document before it is tokenised: texts, the spans of characters that count, and the ids around them.

    `apart`: prompt and answer are tokenised apart, so that the answer begins with a token of its own.
    """

    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...] | None = None
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    rewritten: bool = False


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


# From a row to tokens


def draft_row(row: Mapping[str, Any], options: StreamOptions, ends: tuple[bool, bool], place: str) -> Draft:
    """Return the draft of one row by its keys; `ends`: whether the text starts and stops here."""
    if "messages" in row:
        return draft_chat(row["messages"], row.get("tools"), options, place)
    for names in PAIRS:
        if all(isinstance(row.get(name), str) for name in names):
            return draft_pair(join_prompt(row, names[0]), str(row[names[1]]), options, place)
    text = row.get(options.field)
    if not isinstance(text, str):
        raise UserError(
            f"{place} has neither 'messages', nor 'prompt' with 'response', nor text in '{options.field}' (it has "
            f"{', '.join(sorted(row)) or 'nothing'}); rename its keys, or set --field."
        )
    start, end = (options.start if ends[0] else ()), (options.end if ends[1] else ())
    return Draft((clean_text(text),), None, start, end)


def join_prompt(row: Mapping[str, Any], name: str) -> str:
    """Return a row's prompt; an `input` beside an `instruction` follows it after an empty line."""
    extra = row.get("input") if name == "instruction" else None
    return f"{row[name]}\n\n{extra}" if isinstance(extra, str) and extra else str(row[name])


def draft_pair(prompt: str, answer: str, options: StreamOptions, place: str) -> Draft:
    """Return a prompt with its answer: as a chat where there is a template, else one after the other as they are."""
    if options.template is not None and not options.plain:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return draft_chat(messages, None, options, place)
    return Draft((clean_text(prompt), clean_text(answer)), None, options.start, options.end)


def draft_chat(messages: Any, tools: Any, options: StreamOptions, place: str) -> Draft:
    """Return a chat as its template writes it; UserError for no template, no chat, or one that the template refuses."""
    check_messages(messages, place)
    if options.template is None:
        raise UserError(
            f"{place} is a chat, and the model's folder has no chat template: put its chat_template.jinja there, or "
            "give rows with prompt and response."
        )
    try:
        found = render_chat(options.template, [clean_message(message) for message in messages], tools)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return Draft((found.text,), found.spans, rewritten=not found.whole)


def check_messages(messages: Any, place: str) -> None:
    """Raise UserError for what is no list of messages with a role and a content."""
    fits = isinstance(messages, list) and bool(messages)
    if not fits or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
        raise UserError(f"{place} has 'messages' that are not a list of objects with role and content; repair it.")


def clean_message(message: Message) -> dict[str, Any]:
    """Return a message whose texts a tokenizer can read."""
    return {key: clean_text(value) if isinstance(value, str) else value for key, value in message.items()}


def clean_text(text: str) -> str:
    """Replace halves of surrogate pairs, as cut emoji leave in JSON: they are no text for a tokenizer."""
    return text.encode("utf-8", "replace").decode("utf-8")


def encode_drafts(tokenizer: Any, drafts: Sequence[Draft]) -> Iterator[Document]:
    """Yield the documents of some drafts, tokenised together."""
    texts = [text for draft in drafts for text in draft.texts]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    for draft in drafts:
        parts = [next(encoded) for _ in draft.texts]
        ids = [one for part in parts for one in part.ids]
        if draft.spans is not None:
            yield Document(ids, mark_tokens(parts[0].offsets, draft.spans), draft.rewritten)
            continue
        prompt = len(parts[0].ids) if len(parts) > 1 else 0
        weights = [0] * (len(draft.start) + prompt) + [1] * (len(ids) - prompt + len(draft.end))
        yield Document([*draft.start, *ids, *draft.end], weights)


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
        self._numbers, self._firsts = np.unique(self._owners, return_index=True)

    def close(self) -> None:
        """Delete the temporary files; they also go with the object."""
        for spool in (self._ids, self._weights, self._pieces, self.index.entries):
            spool.close()

    def batches(self, start: int = 0, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield batches without end, epoch after epoch, without the first `start`, which are skipped without reading.

        Each epoch has its own shuffle, by the seed. `order` (document numbers, for a curriculum; those left out are not
        used) replaces it: rows are then shuffled only among neighbours. A batch may hold the end of an epoch and the
        start of the next.
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

    def document(self, number: int) -> Document:
        """Return a document's first piece of at most `length` tokens; empty for one that was left out.

        For scores of documents: what a row can hold is what training sees of it at once.
        """
        at = int(np.searchsorted(self._numbers, number))
        if at == len(self._numbers) or self._numbers[at] != number:
            return Document([], [])
        ids, weights = self._read_piece(int(self._firsts[at]))
        return Document(ids.tolist(), weights.tolist())

    def used(self) -> list[int]:
        """Return the numbers of the documents that training sees."""
        found: list[int] = self._numbers.tolist()
        return found

    def token_counts(self) -> np.ndarray[Any, Any]:
        """Return the tokens of each document that training sees, `[documents in the files]`; 0: it was left out."""
        return np.bincount(self._owners.astype(np.int64), self._sizes, len(self.index)).astype(np.int64)

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
        drafts = [self._draft(number) for number in group]
        for number, document in zip(group, encode_drafts(tokenizer, drafts), strict=True):
            if most and self._ids.count >= most:
                counts.add("unread")
            else:
                self._add_document(number, document, counts)

    def _draft(self, number: int) -> Draft:
        row, first, last = self.index.read(number)
        return draft_row(row, self.options, (first, last), self.index.place(number))

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
            (begin + start, stop - start, own, number)
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
        seed = self.options.seed
        places = shuffle_places(len(self._sizes), seed, epoch) if order is None else self._follow(order)
        for number, start in enumerate(range(0, len(places), WINDOW)):
            window = places[start : start + WINDOW]
            rows = pack_rows(self._sizes[window].tolist(), self.options.length)
            yield [window[rows[place]] for place in shuffle_places(len(rows), seed, epoch, number)]

    def _follow(self, order: Sequence[int]) -> np.ndarray[Any, Any]:
        """Return the pieces of the documents in `order`."""
        ranks = np.full(len(self.index), -1, np.int64)
        ranks[np.asarray(order, np.int64)] = np.arange(len(order))
        own = ranks[self._owners.astype(np.int64)]
        chosen = np.flatnonzero(own >= 0)
        if not len(chosen):
            raise UserError("The order of the documents names none that has something to predict; give others.")
        return chosen[np.argsort(own[chosen], kind="stable")]

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
