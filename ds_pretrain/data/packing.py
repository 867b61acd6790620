"""Documents cut into pieces, and pieces packed into rows.

Both need sizes only, never a token: every rank computes the same plan and no example is built twice. Cutting is one
cumulative sum over the documents, searched by index. Packing is best fit decreasing, run on the histogram of sizes: a
row takes as many pieces of one size as fit in one move, so the price follows rows and different sizes rather than
pieces (1 to 2 million pieces a second). The result equals placing the pieces one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Cut(NamedTuple):
    """Where pieces lie: tokens [start, stop) of a document. Arrays of one length."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class Pieces:
    """The pieces of all documents, numbered in their natural order.

    usable: tokens of each document that examples are made from. size: the most that one piece takes. shortest: the least;
    a document with fewer has no piece, and `unusable` counts those. A last piece that would be shorter takes what it lacks
    from the one before it.
    """

    def __init__(self, usable: np.ndarray, size: int, shortest: int = 1) -> None:
        self.usable, self.size, self.shortest = usable, size, shortest
        self.ends = np.cumsum(np.where(usable < shortest, 0, -(-usable // size)), dtype=np.int64)
        self.unusable = int(np.count_nonzero(usable < shortest))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def severed(self) -> int:
        """Documents of more than one piece."""
        return int(np.count_nonzero(np.diff(self.ends, prepend=0) > 1))

    def cut(self, piece: np.ndarray) -> Cut:
        document = np.searchsorted(self.ends, piece, side="right")
        number, usable = piece - self.first(document), self.usable[document]
        start = np.minimum(number * self.size, usable - self.shortest)
        follows = piece + 1 < self.ends[document]
        stop = np.where(follows, np.minimum((number + 1) * self.size, usable - self.shortest), usable)
        return Cut(document, np.where(number > 0, start, 0), stop)

    def first(self, document: np.ndarray) -> np.ndarray:
        """The number of each document's first piece; of the next document's where it has none."""
        return np.where(document > 0, self.ends[document - 1], 0)


class Slots:
    """Pieces cut further, for a curriculum that starts with short examples.

    Slot 0 is a whole piece; each shorter size has as many slots as the longest piece has cuts of it. sizes: tokens of a cut
    at most, one for each stage of the curriculum; a stage whose size is that of the pieces uses slot 0.
    """

    def __init__(self, pieces: Pieces, sizes: Sequence[int]) -> None:
        self.pieces, self.sizes = pieces, np.array([pieces.size, *sizes], dtype=np.int64)
        counts = np.where(self.sizes < pieces.size, -(-pieces.size // self.sizes), 1)
        counts[1:][self.sizes[1:] >= pieces.size] = 0
        self.first = np.cumsum(counts) - counts
        self.first[self.sizes >= pieces.size] = 0
        self.size_of = np.repeat(self.sizes, counts)
        self.start_of = np.arange(len(self.size_of)) - np.repeat(np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        return len(self.size_of)

    def of(self, pieces: np.ndarray, stage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index into `pieces`, slot) of every cut of these pieces; stage 0 is before any curriculum."""
        cut = self.pieces.cut(pieces)
        size = self.sizes[stage]
        counts = np.where(size < self.pieces.size, -(-(cut.stop - cut.start) // size), 1)
        which = np.repeat(np.arange(len(pieces)), counts)
        number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        return which, self.first[stage][which] + number

    def cut(self, piece: np.ndarray, slot: np.ndarray) -> Cut:
        """Where these cuts lie. A last one that would be too short takes what it lacks from the one before it."""
        whole = self.pieces.cut(piece)
        size, number = self.size_of[slot], self.start_of[slot]
        latest = whole.stop - self.pieces.shortest
        start = np.where(number > 0, np.minimum(whole.start + number * size, latest), whole.start)
        follows = whole.start + (number + 1) * size < whole.stop
        stop = np.where(follows, np.minimum(whole.start + (number + 1) * size, latest), whole.stop)
        return Cut(whole.document, start, stop)


class Packing(NamedTuple):
    """Rows as a ragged array: row r holds items order[starts[r]:starts[r + 1]]."""

    order: np.ndarray
    starts: np.ndarray

    def rows(self, values: np.ndarray) -> list[tuple[int, ...]]:
        """The rows, with `values[item]` in the place of each item."""
        flat, starts = values[self.order].tolist(), self.starts.tolist()
        return [tuple(flat[a:b]) for a, b in pairwise(starts)]


def pack(sizes: np.ndarray, capacity: int) -> Packing:
    """Best fit decreasing: each item, largest first, into the fullest row that still has room for it."""
    largest, smallest = int(sizes.max(initial=1)), int(sizes.min(initial=capacity))
    if largest > capacity or smallest < 1:
        raise ValueError(f"items must have 1 to {capacity} positions to be packed, got {smallest} to {largest}")
    order = np.argsort(-sizes, kind="stable")
    row = np.empty(len(sizes), dtype=np.int64)
    row[order] = _best_fit(np.bincount(sizes, minlength=capacity + 1), capacity)
    order = np.argsort(row, kind="stable")
    return Packing(order, np.concatenate(([0], np.cumsum(np.bincount(row)))))


def alone(sizes: np.ndarray) -> Packing:
    """One item per row, for objectives whose examples cannot share one."""
    return Packing(np.arange(len(sizes)), np.arange(len(sizes) + 1))


def waste(sizes: np.ndarray, packing: Packing, capacity: int) -> float:
    """The share of positions that hold no item."""
    return 1 - float(sizes.sum()) / max(1, (len(packing.starts) - 1) * capacity)


def _best_fit(histogram: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each item, largest size first.

    room: for each amount of free positions, the rows that have it. `open_` says the same in one integer: bit f is set
    where room[f] is not empty, so the tightest fit for a size is the lowest bit set at or above it.
    """
    room: list[list[int]] = [[] for _ in range(capacity + 1)]
    placed: list[int] = []
    open_, rows = 0, 0
    for size in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[size])
        while left:
            fitting = open_ >> size
            if fitting:
                free = size + (fitting & -fitting).bit_length() - 1
            else:
                free, new = capacity, -(-left // (capacity // size))
                room[free].extend(range(rows, rows + new))
                rows += new
            open_, left = _fill(room, open_, free, size, left, placed)
    return np.array(placed, dtype=np.int64)


def _fill(room: list[list[int]], open_: int, free: int, size: int, left: int, placed: list[int]) -> tuple[int, int]:
    """Items of one size into the rows with `free` room, each filled while it can be; (open_, left) afterwards."""
    fits = free // size
    while left and room[free]:
        row, count = room[free].pop(), min(left, fits)
        placed.extend([row] * count)
        room[free - count * size].append(row)
        left -= count
        open_ |= 1 << (free - count * size)
    if room[free]:
        return open_ | (1 << free), left
    return open_ & ~(1 << free), left
