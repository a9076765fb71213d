"""Which text `compress --recover` trains on, and which it keeps out to evaluate on. Imported only by running verbs."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cli.prepare import Job, Texts
from compress.errors import UserError
from compress.text import SEPARATOR, Windows, boundary_ids, load_tokenizer, read_documents

TRAIN_NAME, HELD_NAME = "recovery-text.txt", "recovery-heldout.txt"
CHARACTERS = 64  # of a token, at most, as compress.text.read_windows counts


@dataclass(frozen=True)
class TrainingText:
    """The files that are trained on, and the one that is only evaluated on."""

    paths: tuple[Path, ...]
    heldout: Path | None


def check_apart(job: Job) -> None:
    """Raise UserError where the text to evaluate on is trained on too."""
    request = job.request
    assert request.recovery is not None
    for path in request.recovery.texts or (request.text,):
        if request.eval_text is not None and is_same(path, request.eval_text):
            raise UserError(
                f"{path} is also the --eval-text, which training must not see: give another one, or leave it out, and "
                "a part of --text is kept for evaluation."
            )


def list_whole(job: Job) -> tuple[Path, ...]:
    """Return the files that are trained on whole: none where a part of --text is kept out, or where there is none."""
    request = job.request
    assert request.recovery is not None
    if request.recovery.texts or request.text is None or request.eval_text is None:
        return request.recovery.texts
    return (request.text,)


def is_same(path: Path | None, other: Path | None) -> bool:
    """Tell whether two files hold the same."""
    if path is None or other is None or not path.is_file() or not other.is_file():
        return False
    return filecmp.cmp(path, other, shallow=False)


def write_training_text(folder: Path, job: Job, texts: Texts) -> TrainingText:
    """Write the parts of the text that training may and may not see; files that it may see whole stay in place."""
    names = (folder / TRAIN_NAME, folder / HELD_NAME)
    with names[0].open("w", encoding="utf-8") as train, names[1].open("w", encoding="utf-8") as held:
        for piece, kept_out in list_pieces(job, texts):
            (held if kept_out else train).write(f"{piece}\n{SEPARATOR}\n")
    for path in names:
        if not path.stat().st_size:
            path.unlink()
    found = find_training_text(folder, job)
    if not all(path.is_file() for path in found.paths):
        raise UserError(f"{texts.calibration.source}: gives no text to train on; give some with --recover-text FILE.")
    return found


def find_training_text(folder: Path, job: Job) -> TrainingText:
    """Return what is trained on: the files of --recover-text, else --text, each without what is kept out of it."""
    request, own = job.request, folder / TRAIN_NAME
    assert request.recovery is not None
    cut = own.is_file()
    given = request.recovery.texts or ((request.text,) if request.text is not None and not cut else (own,))
    paths = tuple(own if cut and is_same(path, request.text) else path for path in given)
    held = folder / HELD_NAME
    return TrainingText(paths, request.eval_text or (held if held.is_file() else None))


def list_pieces(job: Job, texts: Texts) -> Iterator[tuple[str, bool]]:
    """Yield the parts of documents, and whether each is kept out; none where training and evaluation have own files."""
    request, spec = job.request, job.spec
    held = texts.evaluation if request.eval_text is None else None
    tokenizer = load_tokenizer(job.checkpoint.folder)
    if request.text is None:
        stops = list_stops(spec.config)
        for windows, kept_out in ((texts.calibration, False), (held, True)):
            yield from ((text, kept_out) for text in decode_windows(windows, tokenizer, stops))
    elif held is not None:
        first = texts.calibration.tokens
        documents = read_documents(request.text, job.recipe.field)
        start = len(boundary_ids(dict(spec.config)))
        yield from divide_documents(documents, tokenizer, start, (first, first + held.tokens))


def divide_documents(
    documents: Iterable[str], tokenizer: Any, start: int, span: tuple[int, int]
) -> Iterator[tuple[str, bool]]:
    """Yield the parts of documents outside and inside of a span of tokens, counted as `read_windows` packs them.

    `start`: tokens before each document. A character of which some tokens lie inside is inside.
    """
    at, (first, last) = 0, span
    for document in documents:
        if at >= last:
            yield document, False
            continue
        offsets = tokenizer.encode(document[: CHARACTERS * (last - at)], add_special_tokens=False).offsets
        inside = offsets[max(0, first - at - start) : max(0, last - at - start)]
        at += start + len(offsets)
        if not inside:
            yield document, False
            continue
        begin, end = min(one[0] for one in inside), max(one[1] for one in inside)
        for piece, held in ((document[:begin], False), (document[begin:end], True), (document[end:], False)):
            if piece.strip():
                yield piece, held


def list_stops(config: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens that start or end a document."""
    end = config.get("eos_token_id")
    ends = end if isinstance(end, list) else [end]
    return frozenset([*boundary_ids(dict(config)), *(one for one in ends if isinstance(one, int))])


def decode_windows(windows: Windows | None, tokenizer: Any, stops: frozenset[int]) -> Iterator[str]:
    """Yield the documents of sampled windows as text."""
    for row in windows.ids.tolist() if windows is not None else []:
        for between, ids in groupby(row, stops.__contains__):
            text = "" if between else tokenizer.decode(list(ids))
            if text.strip():
                yield text
