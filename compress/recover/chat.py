"""Chats as token ids: the tokenizer's own Jinja template, and which tokens are the assistant's answers.

Templates come from the internet: they run in Jinja's immutable sandbox, as in transformers, and see plain JSON only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from compress.checkpoint_source import read_json
from compress.errors import UserError

TEMPLATE_NAME, CONFIG_NAME, PROCESSOR_NAME = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
ASSISTANT = "assistant"
# Marks around what a `generation` block renders; private-use characters, which no tokenizer's template writes.
OPEN, CLOSE = "\ue0f0", "\ue0f1"

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A chat as text, and the spans `[start, stop)` of its characters that the assistant says.

    `whole` is False where the template rewrites earlier answers, so that only the last one counts.
    """

    text: str
    spans: tuple[Span, ...]
    whole: bool = True


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template with the special tokens that it may name; `source` says where it is from."""

    template: Template
    tokens: Mapping[str, str] = field(default_factory=dict)
    source: str = TEMPLATE_NAME
    marked: bool = False

    def render(self, messages: Sequence[Message], prompt: bool = False, tools: list[Any] | None = None) -> str:
        """Return the text of a chat; `prompt` adds the header of an answer. Raises TemplateError as the template does.

        Values that are None are left out, as transformers does: many templates would print them.
        """
        return str(strip_marks(self.render_marks(messages, prompt, tools)))

    def render_marks(self, messages: Sequence[Message], prompt: bool = False, tools: list[Any] | None = None) -> str:
        """Return the text of a chat with marks around what `generation` blocks render."""
        plain = [
            {key: strip_marks(value) for key, value in message.items() if value is not None} for message in messages
        ]
        names: dict[str, Any] = {**self.tokens, "messages": plain, "add_generation_prompt": prompt}
        return self.template.render(**names, tools=tools, documents=None)


class GenerationMarks(Extension):
    """The tag `{% generation %} ... {% endgeneration %}` of transformers, which encloses what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call that marks its text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def read_template(folder: Path, now: datetime | None = None) -> ChatTemplate | None:
    """Read the chat template of a checkpoint folder, None where it has none; UserError for a broken one.

    As transformers: chat_template.jinja goes before tokenizer_config.json. `now` is the time that templates which
    print the date see: pin it for a run that is to resume to the same tokens.
    """
    config = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    found = find_template(folder, config)
    if found is None:
        return None
    text, source = found
    return compile_template(text, read_tokens(folder, config), str(source), now)


def find_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, Path] | None:
    """Return the template's text and its file."""
    if (folder / TEMPLATE_NAME).is_file():
        return (folder / TEMPLATE_NAME).read_text(encoding="utf-8"), folder / TEMPLATE_NAME
    for path in (folder / PROCESSOR_NAME, folder / CONFIG_NAME):
        holder = config if path.name == CONFIG_NAME else read_json(path) if path.is_file() else {}
        text = choose_template(holder.get("chat_template"), path)
        if text is not None:
            return text, path
    return None


def choose_template(value: Any, path: Path) -> str | None:
    """Return the template of a config's value: a text, or the one named `default` of a list; UserError for others."""
    if value is None or isinstance(value, str):
        return value
    named = value if isinstance(value, dict) else {}
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if isinstance(named.get("default"), str):
        return str(named["default"])
    raise UserError(f"{path}: has chat templates but none named 'default'; write the one to use into {TEMPLATE_NAME}.")


def read_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a template may name, such as bos_token."""
    path = folder / "special_tokens_map.json"
    merged = {**(read_json(path) if path.is_file() else {}), **config}
    tokens: dict[str, str] = {}
    for name, value in merged.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def compile_template(text: str, tokens: Mapping[str, str], source: str, now: datetime | None = None) -> ChatTemplate:
    """Compile a template in the sandbox with the helpers that transformers gives it; UserError for broken Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols]
    )
    date = now or datetime.now()
    environment.filters["tojson"] = dump_json
    environment.globals["raise_exception"] = refuse_chat
    environment.globals["strftime_now"] = date.strftime
    try:
        template = environment.from_string(text)
        marked = any(True for _ in find_marks(environment, text))
    except TemplateError as error:
        raise UserError(f"{source}: is not a valid chat template ({flatten(error)}); copy it again.") from error
    return ChatTemplate(template, dict(tokens), source, marked)


def find_marks(environment: ImmutableSandboxedEnvironment, text: str) -> Iterator[nodes.CallBlock]:
    """Yield the `generation` blocks of a template."""
    for block in environment.parse(text).find_all(nodes.CallBlock):
        target = block.call.node
        if isinstance(target, nodes.ExtensionAttribute) and target.name == "_mark":
            yield block


def dump_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
    """Write JSON without escaping HTML, unlike Jinja's own filter of this name."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)


def refuse_chat(message: str) -> None:
    """Let a template refuse a chat."""
    raise TemplateError(message)


def flatten(error: Exception) -> str:
    """Return an error's message as one line without its last point."""
    return " ".join(str(error).split()).rstrip(".")


def render_chat(template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None = None) -> Rendered:
    """Return a chat's text and where the assistant speaks; UserError (without a place) where that cannot be told."""
    try:
        if template.marked:
            return read_marks(template.render_marks(messages, tools=tools))
        return find_answers(template, messages, template.render(messages, tools=tools), tools)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"the chat template {template.source} refuses this chat ({flatten(error)}).") from error


def strip_marks(value: Any) -> Any:
    """Return a text without marks, and anything else as it is."""
    return value.replace(OPEN, "").replace(CLOSE, "") if isinstance(value, str) else value


def read_marks(text: str) -> Rendered:
    """Take the marks of `generation` blocks out of a text and return the spans between them."""
    parts, spans, place = list[str](), list[Span](), 0
    for piece in text.replace(CLOSE, OPEN).split(OPEN):
        if len(parts) % 2:
            spans.append((place, place + len(piece)))
        parts.append(piece)
        place += len(piece)
    return Rendered("".join(parts), tuple(spans))


def find_answers(
    template: ChatTemplate, messages: Sequence[Message], text: str, tools: list[Any] | None
) -> Rendered:
    """Return the spans by which the text grows when an answer is added after its header.

    A template that rewrites the past (dropping the reasoning of earlier answers) has no such text: there only the last
    answer stands as the model would have written it, and only it counts.
    """
    spans = []
    for place, message in enumerate(messages):
        if message.get("role") == ASSISTANT:
            spans.append(find_answer(template, messages[: place + 1], text, tools))
    known = tuple(span for span in spans if span is not None)
    if len(known) == len(spans):
        return Rendered(text, known)
    if messages[-1].get("role") == ASSISTANT and spans[-1] is not None:
        return Rendered(text, (spans[-1],), whole=False)
    raise UserError(
        f"the chat template {template.source} does not show where answers are; enclose them in its "
        "{% generation %} and {% endgeneration %}."
    )


def find_answer(template: ChatTemplate, messages: Sequence[Message], text: str, tools: list[Any] | None) -> Span | None:
    """Return the span of the last message in `text`, None where the text up to there is written otherwise."""
    stop = template.render(messages, tools=tools)
    if not text.startswith(stop):
        return None
    before = template.render(messages[:-1], tools=tools) if len(messages) > 1 else ""
    header = template.render(messages[:-1], prompt=True, tools=tools) if len(messages) > 1 else ""
    # A header may open a reasoning block that the answer does not have: what both share is not the answer's.
    start = count_shared(header, stop)
    return (start, len(stop)) if start >= count_shared(before, stop) and stop.startswith(before) else None


def count_shared(one: str, two: str) -> int:
    """Return how many characters two texts share from their start."""
    if two.startswith(one):
        return len(one)
    return next((place for place, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(
        len(one), len(two)
    ))


def mark_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return 1 for each token that overlaps a span of characters and 0 for others; both in ascending order."""
    marks, place = [], 0
    for start, stop in offsets:
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        marks.append(int(place < len(spans) and stop > spans[place][0] and stop > start))
    return marks
