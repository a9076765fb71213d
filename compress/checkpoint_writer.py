"""Writing a Hugging Face folder: one tensor in memory, and no folder in place before it is complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from compress.checkpoint_source import CONFIG_NAME, DTYPES, INDEX_NAME, LENGTH_BYTES, SINGLE_NAME
from compress.errors import UserError

CODES = {dtype: code for code, dtype in DTYPES.items()}
MANIFEST_NAME = "lightpress.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
COPY_BYTES = 16 * 2**20
HEADER_ROOM = 64 * 2**10  # kept free before the values, so that the header of a large shard can be filled in at the end
ROOM_SHARE = 1024  # padding is not worth more than this fraction of a shard
GIB = 2**30


def check_output(folder: Path, source: Path | None = None, overwrite: bool = False) -> None:
    """Raise UserError where `folder` may not be written: in use, not a folder, or overlapping the `source` folder."""
    target = folder.resolve()
    if source is not None:
        origin = source.resolve()
        if target == origin or origin in target.parents:
            raise UserError(f"The output {folder} is the input folder or lies inside it; choose a folder elsewhere.")
        if overwrite and target in origin.parents:
            raise UserError(f"Overwriting {folder} would delete the input folder inside it; choose another output.")
    if target.exists() and not target.is_dir():
        raise UserError(f"The output {folder} is a file; choose a folder.")
    if target.is_mount():  # the last step is a rename, which a mount point refuses
        raise UserError(f"The output {folder} is a mount point; choose a folder inside it.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"The output {folder} exists and is not empty; choose another folder or give --overwrite.")
    if not any((target / name).is_file() for name in (CONFIG_NAME, MANIFEST_NAME)):
        # A mistyped path must not cost someone a folder of other things.
        raise UserError(f"The output {folder} has no config.json, so it is not overwritten; choose another folder.")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise UserError, with needed and free GiB, where the disk under `folder` (which need not exist) is too small."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(
            f"{folder} needs {needed_bytes / GIB:.2f} GiB but its disk has {free / GIB:.2f} GiB free; "
            "free some space or choose a folder on another disk."
        )


class CheckpointWriter:
    """Stream tensors into a folder that appears only when `finish` has written and synced all of it.

    Use it as a context manager: work happens in a hidden sibling, which leaving the block without `finish` removes.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        shard_bytes: int = 2 * GIB,
        *,
        overwrite: bool = False,
        source: Path | None = None,
    ) -> None:
        """Check the output as `check_output` does; a shard closes before it would exceed `shard_bytes`."""
        check_output(folder, source, overwrite)
        self._folder = folder.resolve()
        self._config = config
        self._shard_bytes = shard_bytes
        self._overwrite = overwrite
        self._work = self._folder.with_name(f".{self._folder.name}.partial-{os.getpid()}")
        self._shard = _OpenShard(self._work)
        self._sealed: list[Path] = []
        self._weight_map: dict[str, int] = {}
        self._total = 0

    @property
    def work(self) -> Path:
        """The hidden sibling, for stages that write more files before the folder appears."""
        return self._work

    def __enter__(self) -> Self:
        """Create the sibling; UserError where the place cannot be written."""
        try:
            # A sibling with our own process id can only come from a killed run, as in a container, where ids repeat.
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(parents=True)
        except OSError as error:
            raise _explain_os_error(self._folder, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the sibling; a full disk or an output that cannot be written becomes a UserError."""
        self._shard.close()
        shutil.rmtree(self._work, ignore_errors=True)
        if isinstance(error, OSError) and _concerns_output(self._folder, error):
            raise _explain_os_error(self._folder, error) from error

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor of any shape; ValueError for a repeated name or a dtype that cannot be stored."""
        if name in self._weight_map:
            raise ValueError(f"tensor {name} was added twice")
        if tensor.dtype not in CODES:
            raise ValueError(f"tensor {name} has the dtype {tensor.dtype}, which cannot be stored")
        if self._shard.nbytes and self._shard.nbytes + tensor.nbytes > self._shard_bytes:
            self._seal_shard()
        self._shard.append(name, tensor)
        self._weight_map[name] = len(self._sealed)
        self._total += tensor.nbytes

    def add_file(self, path: Path) -> None:
        """Copy a file, following links, under its own name."""
        shutil.copyfile(path, self._work / path.name)

    def add_text(self, name: str, text: str) -> None:
        """Write a UTF-8 text file."""
        (self._work / name).write_text(text, encoding="utf-8")

    def seal(self) -> Path:
        """Complete the shards, index and config.json and sync; return the still hidden folder. ValueError if empty.

        Other stages may then read it, prove it and add to it before `finish`.
        """
        if not self._weight_map:
            raise ValueError("no tensor was added")
        self._seal_shard()
        self._name_shards()
        _sync_tree(self._work)
        self.add_text(CONFIG_NAME, json.dumps(self._config, indent=2) + "\n")
        sync_path(self._work / CONFIG_NAME)
        sync_path(self._work)
        return self._work

    def finish(self) -> Path:
        """Seal the folder if that is still to be done, sync it, and move it into place; ValueError if empty."""
        if not (self._work / CONFIG_NAME).exists():
            self.seal()
        _sync_tree(self._work)
        _move_into_place(self._work, self._folder, self._overwrite)
        return self._folder

    def _seal_shard(self) -> None:
        self._sealed.append(self._shard.seal(self._work / f"shard-{len(self._sealed) + 1:05d}.part"))
        self._shard = _OpenShard(self._work)

    def _name_shards(self) -> None:
        """Give the shards their final names, which state their number, and write the index if there are several."""
        count = len(self._sealed)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = [SINGLE_NAME]
        for part, name in zip(self._sealed, names, strict=True):
            part.rename(self._work / name)
        if count > 1:
            mapping = {name: names[shard] for name, shard in sorted(self._weight_map.items())}
            index = {"metadata": {"total_size": self._total}, "weight_map": mapping}
            self.add_text(INDEX_NAME, json.dumps(index, indent=2) + "\n")


class _OpenShard:
    """Raw bytes of a shard on disk, one file per item size.

    The header comes first in a safetensors file but is known last, and values must be aligned without gaps. So room is
    kept before the values; a shard that is small, of mixed item sizes or of very many tensors is copied instead, with
    the widest items first.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._parts: dict[int, BinaryIO] = {}
        self._entries: list[tuple[str, torch.dtype, tuple[int, ...], int]] = []
        self.nbytes = 0

    def append(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.dtype.itemsize
        if size not in self._parts:
            self._parts[size] = (self._work / f"open-{size}.part").open("w+b")
            self._parts[size].seek(HEADER_ROOM)  # a hole, which takes no space on disk
        part = self._parts[size]
        self._entries.append((name, tensor.dtype, tuple(tensor.shape), part.tell() - HEADER_ROOM))
        values = tensor.detach().to("cpu").contiguous().reshape(-1)
        part.write(values.view(torch.uint8).numpy().data)
        self.nbytes += tensor.nbytes

    def seal(self, path: Path) -> Path:
        """Turn the raw parts into one synced safetensors file."""
        bases, base = {}, 0
        for size in sorted(self._parts, reverse=True):
            bases[size], base = base, base + self._parts[size].tell() - HEADER_ROOM
        text = _encode_header(self._entries, bases)
        if len(bases) == 1 and LENGTH_BYTES + len(text) <= HEADER_ROOM <= self.nbytes // ROOM_SHARE:
            self._fill_header(path, text, next(iter(self._parts.values())))
        else:
            self._copy_parts(path, text, [self._parts[size] for size in bases])
        return path

    def _fill_header(self, path: Path, text: bytes, part: BinaryIO) -> None:
        part.seek(0)
        _write_header(part, text, HEADER_ROOM)
        _sync_stream(part)
        part.close()
        Path(part.name).rename(path)

    def _copy_parts(self, path: Path, text: bytes, parts: list[BinaryIO]) -> None:
        with path.open("wb") as out:
            _write_header(out, text)
            for part in parts:
                part.seek(HEADER_ROOM)
                shutil.copyfileobj(part, out, COPY_BYTES)
                part.close()
                os.unlink(part.name)
            _sync_stream(out)

    def close(self) -> None:
        for part in self._parts.values():
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                part.close()


def _encode_header(entries: list[tuple[str, torch.dtype, tuple[int, ...], int]], bases: dict[int, int]) -> bytes:
    """Return the JSON header, its entries in the order of their values as safetensors requires."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    placed = [(bases[dtype.itemsize] + start, name, dtype, shape) for name, dtype, shape, start in entries]
    for begin, name, dtype, shape in sorted(placed, key=lambda entry: entry[0]):
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(header, separators=(",", ":")).encode()


def _write_header(out: BinaryIO, text: bytes, room: int = 0) -> None:
    """Write the header's length and text, padded with spaces to `room` bytes or to where values are aligned."""
    length = room - LENGTH_BYTES if room else len(text) + -len(text) % LENGTH_BYTES
    out.write(length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length))


def _sync_stream(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _move_into_place(work: Path, folder: Path, overwrite: bool) -> None:
    # Checked again: the run took long, and a rename onto an empty folder is the only one that may pass unasked.
    check_output(folder, overwrite=overwrite)
    replace_folder(work, folder)


def replace_folder(work: Path, folder: Path) -> None:
    """Rename `work` to `folder`; an old folder is moved aside first, put back on failure, and deleted last."""
    aside = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    replaces = folder.exists()
    if replaces:
        folder.rename(aside)
    try:
        work.rename(folder)
    except BaseException:
        if replaces:
            aside.rename(folder)
        raise
    sync_path(folder.parent)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Sync what other stages and the small files left in the page cache; the shards are synced already, at no cost."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            sync_path(path)


def sync_path(path: Path) -> None:
    """Make a file, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _concerns_output(folder: Path, error: OSError) -> bool:
    """Tell whether an error from inside the block is about the output; a write error carries no file name."""
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    roots = (f"{folder}/", str(folder.with_name(f".{folder.name}.")))
    return error.errno in DISK_FULL or any(f"{Path(name).absolute()}/".startswith(roots) for name in named)


def _explain_os_error(folder: Path, error: OSError) -> UserError:
    if error.errno in DISK_FULL:
        return UserError(f"The disk of {folder} is full, so nothing was kept; free some space or choose another one.")
    reason = error.strerror or type(error).__name__
    return UserError(f"{folder} cannot be written ({reason}); choose another output folder or change its permissions.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file beside its place, put it on the disk itself, and move it into place by one rename."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        sync_path(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_kept(folder: Path, inputs: Iterable[Path | None]) -> None:
    """Raise UserError where overwriting `folder` would delete one of the `inputs`."""
    target = folder.resolve()
    for path in inputs:
        if path is not None and target in (path.resolve(), *path.resolve().parents):
            raise UserError(f"Overwriting {folder} would delete {path} inside it; choose another output.")


def remove_folder(folder: Path) -> None:
    """Delete a folder: it loses its name first, so that whatever stops this leaves no half of it behind."""
    aside = folder.with_name(f".{folder.name}.removed-{os.getpid()}")
    with suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
