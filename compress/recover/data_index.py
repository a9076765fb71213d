"""Where the documents of training files lie: byte offsets in a temporary file, so that no text stays in memory."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from compress.errors import UserError
from compress.recover.data_rows import PAIRS
from compress.text import SEPARATOR, open_parquet

# One document: its file, its bytes, its line (.jsonl) and whether its text starts and ends here.
ENTRY = np.dtype([("file", "<u4"), ("start", "<u8"), ("size", "<u8"), ("line", "<u8"), ("first", "?"), ("last", "?")])
LINES, PLAIN, TABLES = (".jsonl", ".json"), (".txt", ""), (".parquet",)
BLOCK = 2**20  # bytes read at once; a plain document above it is taken in pieces of about so many bytes
MARK = SEPARATOR.encode()
TABLE_ROWS = 256  # of a table, in memory at once
ORDER_MARK = b"\xef\xbb\xbf"

Row = tuple[int, int, int, bool, bool]


class Spool:
    """Fixed-size records, appended to a temporary file and then read by place; the file goes with the object."""

    def __init__(self, kind: np.dtype[Any]) -> None:
        """Open an empty file in the temporary folder."""
        self.kind, self.count = kind, 0
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the finaliser)
        self.close = weakref.finalize(self, self._file.close)

    def append(self, records: np.ndarray[Any, Any]) -> None:
        """Write records at the end; UserError where the temporary folder is full."""
        try:
            self._file.write(records.astype(self.kind, copy=False).tobytes())
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: the data's temporary file cannot be written ({error.strerror}); free some "
                "space or set TMPDIR to another folder."
            ) from error
        self.count += len(records)

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return records `start:stop` as fresh memory: a mapped file would count as memory as it is read."""
        self._file.flush()
        size = self.kind.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), (stop - start) * size, start * size), self.kind).copy()

    def blocks(self, block: int = 2**16) -> Iterator[np.ndarray[Any, Any]]:
        """Yield all records, `block` at a time."""
        for at in range(0, self.count, block):
            yield self.read(at, min(at + block, self.count))

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """Return one field of all records."""
        parts = [records[name] for records in self.blocks()]
        return np.concatenate(parts) if parts else np.empty(0, self.kind[name])


class DocumentIndex:
    """The documents of some files by number, in the order of the files; each is read from its file when asked for."""

    def __init__(self, paths: Sequence[Path], field: str = "text") -> None:
        """Find all documents; UserError for a file that is missing, empty, of another kind, or no UTF-8."""
        if not paths:
            raise UserError("No training data: give at least one .jsonl, .txt or .parquet file.")
        self.paths, self.field = list(paths), field
        self.entries = Spool(ENTRY)
        self._tables: dict[int, Spool] = {}
        for number, path in enumerate(self.paths):
            before = self.entries.count
            self._add(number, path)
            if self.entries.count == before:
                raise UserError(f"{path}: holds no text; give a file with at least one document.")

    def __len__(self) -> int:
        return self.entries.count

    def close(self) -> None:
        """Delete the temporary files; they also go with the object."""
        for spool in (self.entries, *self._tables.values()):
            spool.close()

    def _add(self, number: int, path: Path) -> None:
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {found}; give a .jsonl, .txt or .parquet file.")
        kind = path.suffix.lower()
        if kind in TABLES:
            rows = self._copy_table(number, path)
        elif kind in LINES + PLAIN:
            rows = find_lines(path) if kind in LINES else find_texts(path)
        else:
            raise UserError(f"{path}: cannot read '{path.suffix}' files; give a .jsonl, .txt or .parquet file.")
        block: list[tuple[int, int, int, int, bool, bool]] = []
        for row in rows:
            block.append((number, *row))
            if len(block) == 2**12:  # noqa: PLR2004 (any number of records that is quick to write)
                self.entries.append(np.array(block, ENTRY))
                block.clear()
        self.entries.append(np.array(block, ENTRY))

    def _copy_table(self, number: int, path: Path) -> Iterator[Row]:
        """Copy a table's rows as JSON into a temporary file: they cannot be read by their bytes."""
        spool = self._tables[number] = Spool(np.dtype("u1"))
        for line, row in read_table(path, self.field):
            data, start = json.dumps(row, default=str).encode(), spool.count
            spool.append(np.frombuffer(data, "u1"))
            yield start, len(data), line, True, True

    def place(self, number: int) -> str:
        """Return where a document stands, for messages: the file and its line."""
        entry = self.entries.read(number, number + 1)[0]
        path = self.paths[int(entry["file"])]
        return f"{path}: line {entry['line']}" if entry["line"] else f"{path}: byte {entry['start']}"

    def read(self, number: int) -> tuple[dict[str, Any], bool, bool]:
        """Return a document as a row of JSON (plain text as `{"text": ...}`), and whether it starts and ends here.

        Raises UserError, with file and line, for a line that is no JSON object in UTF-8.
        """
        entry = self.entries.read(number, number + 1)[0]
        file, start, size = int(entry["file"]), int(entry["start"]), int(entry["size"])
        first, last = bool(entry["first"]), bool(entry["last"])
        if file in self._tables:
            return json.loads(self._tables[file].read(start, start + size).tobytes()), first, last
        with self.paths[file].open("rb") as stream:
            stream.seek(start)
            data = stream.read(size)
        if self.paths[file].suffix.lower() in LINES:
            return parse_line(data, self.place(number)), first, last
        try:
            return {self.field: data.decode("utf-8")}, first, last
        except UnicodeDecodeError as error:
            place = f"{self.paths[file]}: is not UTF-8 text (byte {start + error.start})"
            raise UserError(f"{place}; convert it first.") from error


def read_table(path: Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the values of each row of a Parquet file that says something (needs pyarrow).

    Raises UserError for a file that is none, and for one without a column of text, chats or prompts.
    """
    table = open_parquet(path)
    names, telling = table.schema_arrow.names, ("messages", *(pair[0] for pair in PAIRS), field)
    if not set(telling) & set(names):
        raise UserError(f"{path}: has no column '{field}' (it has {', '.join(names)}); set --field.")
    line = 0
    for batch in table.iter_batches(TABLE_ROWS):
        for row in batch.to_pylist():
            line += 1
            if any(row.get(name) and (name == "messages" or str(row[name]).strip()) for name in telling):
                yield line, {name: value for name, value in row.items() if value is not None}


def parse_line(data: bytes, place: str) -> dict[str, Any]:
    """Return the JSON object of a line; UserError for anything else."""
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text; convert the file first.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON; give one JSON object per line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{place} holds a {type(row).__name__}, not an object; give one JSON object per line.")
    return row


def find_lines(path: Path) -> Iterator[Row]:
    """Yield the lines of a JSON-lines file that are not blank."""
    start = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.removeprefix(ORDER_MARK).strip():
                yield start, len(line), number, True, True
            start += len(line)


def find_texts(path: Path) -> Iterator[Row]:
    """Yield the documents of a plain file, without newlines around them, a long one in pieces that end at a line.

    At most a block and a piece of the file are in memory.
    """
    first = True
    for start, stop, last in cut_texts(path):
        with path.open("rb") as stream:
            stream.seek(start)
            data = stream.read(stop - start)
        if start == 0 and data.startswith(ORDER_MARK):
            start, data = start + len(ORDER_MARK), data[len(ORDER_MARK) :]
        if first:
            kept = data.lstrip(b"\n")
            start, data = start + len(data) - len(kept), kept
        data = data.rstrip(b"\n") if last else data
        if data.strip():
            yield start, len(data), 0, first, last
        first = last


def cut_texts(path: Path) -> Iterator[tuple[int, int, bool]]:
    """Yield `(start, stop, ends)`: spans of bytes between separators, and whether the document ends there."""
    size, start = path.stat().st_size, 0
    with path.open("rb") as stream:
        while start < size:
            stream.seek(start)
            block = stream.read(BLOCK)
            found = block.find(MARK)
            if found >= 0:
                yield start, start + found, True
                start += found + len(MARK)
            elif start + len(block) >= size:
                yield start, size, True
                return
            else:
                stop = start + find_cut(block)
                yield start, stop, False
                start = stop


def find_cut(block: bytes) -> int:
    """Return where to cut a block that goes on: after its last line, else word, else character.

    The last bytes stay out of it: a separator may begin among them.
    """
    body = block[: len(block) - len(MARK)]
    for end in (b"\n", b" "):
        if end in body[len(body) // 2 :]:
            return body.rindex(end) + (end == b"\n")  # a space belongs to the word that follows it
    cut = len(body)
    while cut > 1 and 0x80 <= block[cut] < 0xC0:  # noqa: PLR2004 (a byte that continues a UTF-8 character)
        cut -= 1
    return cut
