"""Log-likelihoods and greedy text of any runtime, from text: what task scores and lm-eval are made of.

Text becomes tokens as lm-eval does it for stock models (`TemplateLM._encode_pair` and `HFLM.tok_encode` of lm-eval
0.4.13), so that scores can be set beside those that others publish.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.runtime import Logits, Runtime
from compress.errors import UserError

Progress = Callable[[str, int, int], None]
STAGE = "likelihoods"
MAX_TOKENS = 2048  # in one batch of equal rows
MAX_LOGITS = 2**23  # computed at once: 32 MB in float32


@dataclass(frozen=True)
class TextModel:
    """A runtime with its folder's tokenizer, which must neither cut nor pad.

    `start`: the token before a text, if the model knows one; `ends`: tokens at which generation stops; `context`: the
    longest sequence in tokens; `name`: what messages call it.
    """

    runtime: Runtime
    tokenizer: Any
    start: int | None
    ends: frozenset[int]
    context: int
    name: str = "the model"


@dataclass(frozen=True)
class Row:
    """Token ids of a context and what follows it; those from `start` (at least 1) on are scored."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Score:
    """Log-likelihood of each scored token `[tokens]` in float64, and whether each was the likeliest."""

    tokens: NDArray[np.float64]
    greedy: bool

    @property
    def total(self) -> float:
        """Log-likelihood of all of them, in nats."""
        return float(self.tokens.sum())


# Text to rows


def encode_plain(model: TextModel, text: str) -> list[int]:
    """Return the ids of a text, with nothing around them."""
    return list(model.tokenizer.encode(text, add_special_tokens=False).ids)


def encode_text(model: TextModel, text: str) -> list[int]:
    """Return the ids of a text with what the tokenizer puts around one, unless the text brings its own start token."""
    begin = "" if model.start is None else model.tokenizer.decode([model.start], skip_special_tokens=False)
    own = bool(begin) and text.startswith(begin)
    return list(model.tokenizer.encode(text, add_special_tokens=not own).ids)


def encode_pair(model: TextModel, context: str, continuation: str) -> Row:
    """Return the row that scores a continuation; blanks at the end of the context count as the continuation's.

    Without a context the start token stands there, or the continuation's first token where the model has no start.
    The row is cut on the left to the model's context. Raises UserError where no token is left to score, or too many.
    """
    head = context.rstrip()
    if not head:
        return make_row(model, [], encode_plain(model, context + continuation), continuation)
    before = encode_text(model, head)
    return make_row(model, before, encode_text(model, context + continuation)[len(before) :], continuation)


def make_row(model: TextModel, before: list[int], scored: list[int], text: str) -> Row:
    """Join the ids of a context and those to score to a row that fits the model; `text` is for messages."""
    if not before:
        before, scored = split_start(model, scored)
    if not scored:
        raise UserError(f"{text[:40]!r} gives {model.name} no token to score; give a longer text.")
    if len(scored) > model.context:
        raise UserError(
            f"{text[:40]!r} is {len(scored)} tokens long, but the context of {model.name} is {model.context}; "
            "shorten it, or leave the example out."
        )
    ids = (*before, *scored)[-(model.context + 1) :]
    return Row(ids, len(ids) - len(scored))


def split_start(model: TextModel, ids: list[int]) -> tuple[list[int], list[int]]:
    """Return what stands before ids without a context, and the rest: the first of them if it is a start, or must be."""
    if model.start is None or ids[:1] == [model.start]:
        return ids[:1], ids[1:]
    return [model.start], ids


def roll_text(model: TextModel, text: str) -> list[Row]:
    """Return rows that score every token of a text of any length once, the first after the start token.

    Windows do not overlap but for one token of context, and the last looks back as far as the model can: lm-eval's
    `get_rolling_token_windows` with `context_len=1`. A model without a start token does not score the first token.
    """
    before, scored = split_start(model, encode_plain(model, text))
    ids = (*before, *scored)
    rows = []
    for begin in range(1, len(ids), model.context):
        end = min(begin + model.context, len(ids))
        window = ids[max(end - model.context - 1, 0) : end]
        rows.append(Row(window, len(window) - (end - begin)))
    return rows


# Rows to scores


def score_rows(model: TextModel, rows: Sequence[Row], progress: Progress | None = None) -> list[Score]:
    """Score rows in the order given; equal lengths run together, and a long context that several share runs once.

    Raises UserError for a token that the model does not have, and FloatingPointError for scores that are no numbers.
    """
    check_ids(model, rows)
    scores: dict[int, Score] = {}
    for numbers, shared in group_rows(rows, model.runtime.vocab):
        group = [rows[number] for number in numbers]
        found = score_shared(model.runtime, group) if shared else score_equal(model.runtime, group)
        scores.update(zip(numbers, found, strict=True))
        if progress is not None:
            progress(STAGE, len(scores), len(rows))
    return [scores[number] for number in range(len(rows))]


def check_ids(model: TextModel, rows: Sequence[Row]) -> None:
    """Raise UserError for a token that the model does not have."""
    largest = max((max(row.ids) for row in rows), default=0)
    if largest >= model.runtime.vocab:
        raise UserError(
            f"The tokenizer of {model.name} gives token {largest}, but the model has only {model.runtime.vocab}: it "
            "belongs to another model; copy the right tokenizer.json there."
        )


def group_rows(rows: Sequence[Row], vocab: int) -> Iterator[tuple[list[int], bool]]:
    """Yield the numbers of rows that run together, and whether they do so by one context instead of equal lengths."""
    contexts = defaultdict(list)
    for number, row in enumerate(rows):
        contexts[row.ids[: row.start]].append(number)
    lengths = defaultdict(list)
    for numbers in contexts.values():
        if saves_half([rows[number] for number in numbers]):
            yield numbers, True
        else:
            for number in numbers:
                lengths[len(rows[number].ids) - 1].append(number)
    for length, numbers in sorted(lengths.items()):
        size = min(MAX_TOKENS // length, MAX_LOGITS // (length * vocab))
        for place in range(0, len(numbers), max(size, 1)):
            yield numbers[place : place + max(size, 1)], size < 1


def saves_half(rows: Sequence[Row]) -> bool:
    """Tell whether rows of one context need at most half as many tokens when that context runs only once."""
    apart = sum(len(row.ids) - 1 for row in rows)
    return 2 * (apart - (len(rows) - 1) * rows[0].start) <= apart


def score_equal(runtime: Runtime, rows: Sequence[Row]) -> list[Score]:
    """Score rows of equal length as one batch."""
    ids = np.array([row.ids for row in rows], dtype=np.int64)
    logits, _ = runtime.prefill(ids[:, :-1])
    return [score_targets(own[row.start - 1 :], row.ids[row.start :]) for own, row in zip(logits, rows, strict=True)]


def score_shared(runtime: Runtime, rows: Sequence[Row]) -> list[Score]:
    """Score rows of one context one after the other: the context runs once, each row decodes from its cache."""
    context = np.array([rows[0].ids[: rows[0].start]], dtype=np.int64)
    logits, cache = runtime.prefill(context, every=False)
    first = np.array(logits[0, -1:])  # a runtime may reuse its buffers
    return [score_rest(runtime, row, first, cache) for row in rows]


def score_rest(runtime: Runtime, row: Row, first: Logits, cache: Any) -> Score:
    """Score a row after its context's cache; `first` are the logits `[1, vocab]` of the context's last token."""
    parts = [score_targets(first, row.ids[row.start : row.start + 1])]
    step = max(1, MAX_LOGITS // runtime.vocab)
    for place in range(row.start, len(row.ids) - 1, step):
        fed = row.ids[place : min(place + step, len(row.ids) - 1)]
        logits, cache = runtime.decode(np.array([fed], dtype=np.int64), cache)
        parts.append(score_targets(logits[0], row.ids[place + 1 : place + 1 + len(fed)]))
    return Score(np.concatenate([part.tokens for part in parts]), all(part.greedy for part in parts))


def score_targets(logits: Logits, targets: Sequence[int]) -> Score:
    """Return the log-likelihoods of targets `[tokens]` by logits `[tokens, vocab]`, computed in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    chosen = wide[np.arange(len(targets)), list(targets)]
    with np.errstate(invalid="ignore"):  # what is no number is refused below
        values = chosen - top - np.log(np.exp(wide - top[:, None]).sum(-1))
    if not np.isfinite(values).all():
        raise FloatingPointError("the model computes scores that are no numbers; its weights may be damaged")
    return Score(values, bool((logits.argmax(-1) == np.asarray(targets)).all()))


# Greedy text


def continue_text(model: TextModel, prompt: str, stops: Sequence[str], count: int) -> str:
    """Return the greedy continuation of a prompt: up to `count` tokens, an end token or a stop string, without those.

    A prompt that leaves no room for `count` tokens is cut on the left. Raises UserError when nothing is left of it.
    """
    ids = encode_prompt(model, prompt, model.context - count)
    check_ids(model, [Row(tuple(ids), 1)])
    text, stops = "", [stop for stop in stops if stop]
    made: list[int] = []
    for token in iterate_greedily(model, ids, count):
        made.append(token)
        text = model.tokenizer.decode(made)
        if any(stop in text for stop in stops):
            break
    return cut_text(text, stops)


def encode_prompt(model: TextModel, prompt: str, room: int) -> list[int]:
    """Return the last `room` ids of a prompt; an empty one is the start token."""
    if room < 1:
        raise UserError(
            f"{model.context - room} new tokens do not fit the context of {model.name}, {model.context}; set "
            f"max_gen_toks in the task's generation_kwargs to {model.context // 2} or so."
        )
    ids = encode_text(model, prompt) or ([] if model.start is None else [model.start])
    if not ids:
        raise UserError(f"An empty prompt gives {model.name} no token to start with; give a prompt.")
    return ids[-room:]


def iterate_greedily(model: TextModel, ids: Sequence[int], count: int) -> Iterator[int]:
    """Yield the likeliest token after ids, again and again, up to an end token, which is left out."""
    logits, cache = model.runtime.prefill(np.array([ids], dtype=np.int64), every=False)
    for number in range(1, count + 1):
        token = int(logits[0, -1].argmax())
        if not np.isfinite(logits[0, -1, token]):
            raise FloatingPointError("the model computes scores that are no numbers; its weights may be damaged")
        if token in model.ends:
            return
        yield token
        if number < count:
            logits, cache = model.runtime.decode(np.array([[token]], dtype=np.int64), cache)


def cut_text(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the stop strings in it."""
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text
