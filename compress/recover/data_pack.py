"""Packing: whole documents into rows of a fixed length by best fit, long ones cut beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Places = np.ndarray[Any, Any]


def cut_document(size: int, length: int) -> list[tuple[int, int]]:
    """Return the spans `[begin, end)` of a document of `size` tokens that fit into rows of `length`.

    Neighbours share one token: it is the last that one piece predicts and the first that the next one sees, so that
    every token but the document's first is predicted exactly once.
    """
    spans = [(0, min(size, length))]
    while spans[-1][1] < size:
        begin = spans[-1][1] - 1
        spans.append((begin, min(begin + length, size)))
    return spans


def pack_rows(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Return rows of places in `sizes`: best-fit decreasing, each row's sizes adding up to at most `length`.

    The largest goes first, always into the row it fills best (packing as in arXiv 2404.10830, section 3).
    """
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # room left -> rows that have it
    rooms = 0  # bit r is set where some row has r tokens of room: the lowest set bit from n on is the best fit
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        size = sizes[place]
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = free[room].pop()
            rooms &= ~(int(not free[room]) << room)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(place)
        free.setdefault(room - size, []).append(row)
        rooms |= 1 << (room - size)
    return rows


def cut_windows(places: Places, sizes: Places, most: int, room: int) -> Iterator[Places]:
    """Yield neighbours among `places` to pack together: at most `most`, of at most `room` tokens or one place alone.

    `sizes`: tokens of every place.
    """
    ends = np.cumsum(sizes[places], dtype=np.int64)
    start, before = 0, 0
    while start < len(places):
        stop = int(np.searchsorted(ends, before + room, "right"))
        stop = min(max(stop, start + 1), start + most)
        yield places[start:stop]
        start, before = stop, int(ends[min(stop, len(places)) - 1])


def shuffle_places(count: int, *seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the numbers below `count` in an order that the seeds decide."""
    return np.random.Generator(np.random.PCG64(list(seed))).permutation(count)
