"""Rows of training files as documents: a chat, a prompt with its answer, or a text, and which of its tokens count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import UserError
from compress.recover.chat import ChatTemplate, Message, mark_tokens, render_chat

# Names of a question and its answer, in the order in which they are looked for.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))


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
