"""The residual stream of all calibration windows: in memory, or in a memory-mapped file above a bound."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from types import TracebackType

import torch
from torch import Tensor

from compress.errors import UserError
from compress.parallel import Group


class HiddenStore:
    """Float32 values `[windows, length, width]`; use in a `with` block, which frees them.

    Raises UserError when the temporary folder has no room for the file.
    """

    def __init__(self, shape: tuple[int, ...], spill_bytes: int = 2**30) -> None:
        """Allocate memory, or a file in the temporary folder when more than `spill_bytes` are needed."""
        windows, length, width = shape
        self.shape = (windows, length, width)
        size = 4 * windows * length * width
        self._map: mmap.mmap | None = None
        if size <= spill_bytes:
            self._flat = torch.empty(size // 4)
            return
        self._map = map_file(size)
        self._flat = torch.frombuffer(self._map, dtype=torch.float32)

    @property
    def spilled(self) -> bool:
        """True when the values live in a file."""
        return self._map is not None

    def read(self, start: int, stop: int) -> Tensor:
        """Return a copy of windows `start:stop`."""
        values = self._values()[start:stop].clone()
        self._release()
        return values

    def write(self, start: int, values: Tensor) -> None:
        """Replace the windows from `start` on."""
        self._values()[start : start + len(values)] = values
        self._release()

    def resize(self, width: int) -> None:
        """Reuse the allocation for another width, at most the first one; the contents are undefined afterwards."""
        self.shape = (*self.shape[:2], width)

    def _values(self) -> Tensor:
        windows, length, width = self.shape
        return self._flat[: windows * length * width].view(self.shape)

    def _release(self) -> None:
        # Mapped pages count as resident until they are let go; the page cache still holds them.
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __enter__(self) -> HiddenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flat, self._map = torch.empty(0), None


def map_file(size: int) -> mmap.mmap:
    """Map a nameless temporary file of `size` bytes: it goes with the process, however that ends."""
    with tempfile.TemporaryFile(prefix="lightpress-") as file:
        try:
            # Reserved now, since a full disk would otherwise kill the process at some later write.
            reserve = getattr(os, "posix_fallocate", lambda handle, _, length: os.truncate(handle, length))
            reserve(file.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()} has no room for {size / 2**30:.2f} GiB of hidden states "
                f"({error.strerror}); set TMPDIR to a larger disk, or give fewer --windows."
            ) from error
        return mmap.mmap(file.fileno(), size)


def release_memory() -> None:
    """Give freed memory back to the system, after every layer.

    The C library keeps it otherwise, in a heap that tensors of many sizes fragment: on a synthetic model of 14 layers
    the peak of a rebuild was 667 MB without this and 596 MB with it.
    """
    trim = find_trim()
    if trim is not None:
        trim(0)


@cache
def find_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, or None where the C library has none."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return trim


def batches(windows: int, length: int, tokens: int = 2048) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of groups of windows with about `tokens` tokens each."""
    step = max(1, tokens // length)
    for start in range(0, windows, step):
        yield start, min(start + step, windows)


def share_windows(group: Group, windows: int, length: int) -> range:
    """Return which of all windows are this process's: neighbours, none where windows are fewer than processes.

    Whole batches where they go round: every product is then one that a single process makes too, and sums over all
    processes differ from its sums by the order of float64 additions alone.
    """
    spans = list(batches(windows, length))
    if len(spans) < group.size:
        return group.share(windows)
    own = group.share(len(spans))
    return range(spans[own.start][0], spans[own.stop - 1][1])
