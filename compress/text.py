"""Reading, tokenising and packing of calibration and evaluation text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Windows:
    """Token ids `[windows, length]` for a streamed pass, and where they came from."""

    ids: Tensor
    source: str

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.ids.numel()

    def take(self, count: int) -> Windows:
        """Return the first `count` windows."""
        return Windows(self.ids[:count], self.source)


def read_documents(path: Path, field: str = "text") -> Iterator[str]:
    """Yield the documents of a .txt (split at <|endoftext|>), .jsonl or .parquet file; `field` names the text.

    Raises UserError for a missing or empty file, an unknown kind, a broken line or a missing field.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such text file"
        raise UserError(f"{path}: {found}; give a .txt, .jsonl or .parquet file.")
    readers = {".jsonl": read_jsonl, ".json": read_jsonl, ".parquet": read_parquet, ".txt": read_plain, "": read_plain}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read text from '{path.suffix}' files; give a .txt, .jsonl or .parquet file.")
    empty = True
    for document in reader(path, field):
        if document.strip():
            empty = False
            # Half of a surrogate pair, as cut emoji leave in JSON, is no text for a tokenizer.
            yield document.encode("utf-8", "replace").decode("utf-8")
    if empty:
        raise UserError(f"{path}: holds no text; give a file with at least one document.")


def read_plain(path: Path, field: str) -> Iterator[str]:
    """Yield the documents of a UTF-8 text file."""
    del field
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); convert it first.") from error
    yield from (document.strip("\n") for document in text.split(SEPARATOR))


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    """Yield `field` of every line of a JSON-lines file."""
    with path.open("rb") as lines:
        for number, row in iterate_objects(path, lines):
            if not isinstance(row.get(field), str):
                have = ", ".join(sorted(row))
                raise UserError(f"{path}: line {number} has no text in '{field}' (it has {have}); set --field.")
            yield row[field]


def iterate_objects(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line that is not blank; UserError for a line that is none."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: line {number} is not UTF-8 text; convert the file first.") from error
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON; give one JSON object per line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is a {type(row).__name__}; give one JSON object per line.")
        yield number, row


def open_parquet(path: Path) -> Any:
    """Open a Parquet file (needs pyarrow); raises UserError without pyarrow, and for a file that is none."""
    try:
        from pyarrow import ArrowInvalid, parquet  # noqa: PLC0415 (optional and heavy)
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; run: pip install pyarrow.") from error
    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: is not a Parquet file; check the file.") from error


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """Yield `field` of every row of a Parquet file; raises UserError as `open_parquet`, and without that column."""
    table = open_parquet(path)
    if field not in table.schema_arrow.names:
        raise UserError(f"{path}: has no column '{field}' (it has {', '.join(table.schema_arrow.names)}); set --field.")
    for batch in table.iter_batches(columns=[field]):
        yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str))


def load_tokenizer(folder: Path) -> Any:
    """Load tokenizer.json with the `tokenizers` library; raises UserError when the folder has none."""
    from tokenizers import Tokenizer  # noqa: PLC0415 (keeps --help quick)

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json, which reading text needs; copy it from the original model.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
        raise UserError(f"{path}: is not a tokenizer of the `tokenizers` library ({error}).") from error


def boundary_ids(config: dict[str, Any]) -> list[int]:
    """Return the token that starts a document ([bos], else [eos], else nothing)."""
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return [value]
    return []


def read_windows(path: Path, tokenizer: Any, config: dict[str, Any], size: tuple[int, int], field: str) -> Windows:
    """Read, tokenise and pack text into at most `size` = (windows, length) tokens, each document after a boundary.

    Raises UserError when the text gives not even one window, or a token the model does not have.
    """
    count, length = size
    start = boundary_ids(config)
    tokens: list[int] = []
    for document in read_documents(path, field):
        # A token for 64 characters is fewer than any prose gives: more of a huge document need not be read.
        part = document[: 64 * (length * count - len(tokens))]
        tokens += start + tokenizer.encode(part, add_special_tokens=False).ids
        if len(tokens) >= length * count:
            break
    return pack_windows(tokens, size, config, str(path))


def pack_windows(tokens: list[int], size: tuple[int, int], config: dict[str, Any], source: str) -> Windows:
    """Cut a token stream into whole windows; a last piece shorter than a window is left out."""
    count, length = size
    whole = min(len(tokens) // length, count)
    if whole == 0:
        raise UserError(f"{source}: gives {len(tokens)} tokens, less than one window of {length}; give more text.")
    ids = torch.tensor(tokens[: whole * length]).view(whole, length)
    vocabulary = int(config["vocab_size"])
    if int(ids.max()) >= vocabulary:
        raise UserError(
            f"{source}: the tokenizer gives token {int(ids.max())} but the model has {vocabulary} embeddings; "
            "the tokenizer belongs to another model."
        )
    return Windows(ids, source)
