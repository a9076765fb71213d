"""Reading a Hugging Face folder: names, shapes and dtypes first, tensors only when asked for.

Tensors are read with positional file reads, not through a memory map: mapped pages count in a process's peak RSS until
they are unmapped, so a map would make the peak grow with what was read, and a shard that shrinks under a map kills the
process. Nothing stays open or mapped between calls.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint_source import (
    CONFIG_NAME,
    TensorInfo,
    find_folder,
    list_side_files,
    list_tensors,
    read_json,
    refuse_lfs_pointer,
    refuse_quantised_config,
)
from compress.errors import UserError

BLOCK_BYTES = 8 * 2**20  # of a matrix that is worked on row by row

__all__ = ["Checkpoint", "TensorInfo", "check_finite", "open_checkpoint"]

STEP = 8 * 2**20  # values per cast or check, which bounds the scratch memory


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose tensors are listed but not loaded, in the order of file and then name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """The stored size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Return the named tensors as fresh contiguous memory, cast if asked; KeyError for an unknown name."""
        infos = {name: self.tensors[name] for name in names}
        loaded: dict[str, torch.Tensor] = {}
        for file in sorted({info.file for info in infos.values()}):
            with FileIO(file) as stream:
                for info in sorted((i for i in infos.values() if i.file == file), key=lambda i: i.offset):
                    loaded[info.name] = _read_values(stream, info, 0, info.count, dtype).view(info.shape)
        return {name: loaded[name] for name in infos}

    def read_one(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return one tensor as fresh contiguous memory, cast if asked; KeyError for a name that is not stored."""
        return self.read([name], dtype)[name]

    def read_rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return `tensor[rows]`, `[len(rows), ...]`, reading only those rows; IndexError outside `0 .. rows - 1`."""
        info = self.tensors[name]
        width = math.prod(info.shape[1:])
        wanted, place = torch.unique(rows.to("cpu", torch.int64), return_inverse=True)
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < info.shape[0]:
            raise IndexError(f"rows of {name} must lie in 0 .. {info.shape[0] - 1}")
        found = torch.empty((len(wanted), width), dtype=info.dtype)
        with FileIO(info.file) as stream:
            for target, row in zip(found, wanted.tolist(), strict=True):
                stream.seek(info.offset + row * width * info.dtype.itemsize)
                _fill_bytes(stream, target, info)
        return found.to(dtype or info.dtype)[place].view(len(rows), *info.shape[1:])

    def read_slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return `tensor[start:stop]`, `[stop - start, ...]`, reading only those rows; IndexError outside it."""
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name} lie outside its {info.shape[0]} rows")
        width = math.prod(info.shape[1:])
        with FileIO(info.file) as stream:
            values = _read_values(stream, info, start * width, stop * width, dtype)
        return values.view(stop - start, *info.shape[1:])

    def read_blocks(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield a stored matrix as blocks of its rows, each of BLOCK_BYTES at most or one row."""
        rows, width = self.tensors[name].shape
        step = max(BLOCK_BYTES // (width * dtype.itemsize), 1)
        for start in range(0, rows, step):
            yield self.read_slice(name, start, min(start + step, rows), dtype)

    def side_files(self) -> list[Path]:
        """Return the tokenizer, template and generation files of the model; never weights, code or pickles."""
        return list_side_files(self.folder)

    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of config.json and of every weight file in use, by file name."""
        files = [self.folder / CONFIG_NAME, *sorted({info.file for info in self.tensors.values()})]
        return {file.name: _hash_file(file) for file in files}


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a local folder or a hub id without loading weights; UserError for whatever cannot be compressed."""
    try:
        return _list_checkpoint(find_folder(source))
    except OSError as error:
        reason = f"{error.filename or source} cannot be read ({error.strerror or type(error).__name__})"
        raise UserError(f"{reason}; check that the file exists and that you may read it.") from error


def _list_checkpoint(folder: Path) -> Checkpoint:
    config = read_json(folder / CONFIG_NAME)
    refuse_quantised_config(folder, config)
    for file in list_side_files(folder):
        refuse_lfs_pointer(file)
    ordered = sorted(list_tensors(folder), key=lambda info: (info.file, info.name))
    return Checkpoint(folder, config, {info.name: info for info in ordered})


def check_finite(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
    """Read every tensor (or the named ones) once; UserError names the first that holds NaN or infinite values."""
    for name in checkpoint.tensors if names is None else names:
        info = checkpoint.tensors[name]
        bad = _count_not_finite(info) if info.dtype.is_floating_point else 0
        if bad:
            raise UserError(
                f"Tensor {name} in {info.file} holds {bad} NaN or infinite values out of {info.count}; "
                "download the checkpoint again or use an undamaged one."
            )


def _read_values(
    stream: FileIO, info: TensorInfo, start: int, stop: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Read values start:stop of a tensor, `[stop - start]`; a cast goes through a bounded scratch buffer."""
    values = torch.empty(stop - start, dtype=dtype or info.dtype)
    stream.seek(info.offset + start * info.dtype.itemsize)
    if values.dtype == info.dtype:
        _fill_bytes(stream, values, info)
        return values
    scratch = torch.empty(min(len(values), STEP), dtype=info.dtype)
    for begin in range(0, len(values), STEP):
        part = values[begin : begin + STEP]
        _fill_bytes(stream, scratch[: len(part)], info)
        part.copy_(scratch[: len(part)])
    return values


def _fill_bytes(stream: FileIO, values: torch.Tensor, info: TensorInfo) -> None:
    """Fill contiguous `values` from where the stream stands; one read call returns at most 2 GiB, hence the loop."""
    view = values.view(torch.uint8).numpy().data
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise UserError(f"{info.file} ended inside tensor {info.name}; it changed during the run, so start again.")
        view = view[count:]


def _iterate_values(info: TensorInfo) -> Iterator[torch.Tensor]:
    with FileIO(info.file) as stream:
        for start in range(0, info.count, STEP):
            yield _read_values(stream, info, start, min(start + STEP, info.count))


def _count_not_finite(info: TensorInfo) -> int:
    """Count NaN and Inf; the extremes of a part already show them, so the mask is built only where there are some."""
    bad = 0
    for part in _iterate_values(info):
        low, high = part.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad += int((~torch.isfinite(part)).sum())
    return bad


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
