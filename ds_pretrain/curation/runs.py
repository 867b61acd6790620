"""What is equal in all parts of a corpus, in memory that grows with the largest part and not with the corpus.

Each part writes its keys sorted (a run). The range of all keys is cut into buckets, and a bucket takes its slice of every
run, so equal keys meet in one bucket whatever part they are of; buckets are independent units of work. How many there are
depends on the number of keys alone. This is the sort-merge of every large deduplicator, on files and without a server.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ds_pretrain.core.files import whole

RUN = np.dtype([("key", "<u8"), ("check", "<u8"), ("number", "<i8")])
"""check: what must also be equal. number: of the document."""
BUCKET = 1 << 22
"""Keys of a bucket, about."""


def run(key: np.ndarray, check: np.ndarray | int, number: np.ndarray) -> np.ndarray:
    """Keys as a sorted run."""
    made = np.empty(len(key), dtype=RUN)
    made["key"], made["check"], made["number"] = key, check, number
    return made[np.lexsort((made["number"], made["check"], made["key"]))]


def save(path: Path, array: np.ndarray) -> None:
    """An .npy file, whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        try:
            np.save(file, array)
        except OSError as error:
            why = error.strerror or str(error)  # numpy says only how much was written
            raise OSError(error.errno or errno.ENOSPC, why, str(path)) from error


def load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def joined(paths: Iterable[Path], of: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray:
    """What files hold, one after another in memory, or this of it; one file is open at a time. Takes one file at least."""
    return np.concatenate([np.array(of(load(path))) for path in paths])


def buckets(runs: Sequence[Path]) -> int:
    """How many buckets these runs need."""
    return max(1, -(-sum(len(load(path)) for path in runs) // BUCKET))


def bucket(runs: Sequence[Path], number: int, count: int) -> np.ndarray:
    """The sorted entries of one bucket of `count`."""
    low, high = (np.uint64(min((i << 64) // count, (1 << 64) - 1)) for i in (number, number + 1))
    slices = []
    for path in runs:
        entries = load(path)
        keys = entries["key"] if entries.dtype.names else entries
        stop = len(keys) if number + 1 == count else int(np.searchsorted(keys, high))
        slices.append(np.array(entries[int(np.searchsorted(keys, low)) : stop]))
    merged = np.concatenate(slices)
    if not merged.dtype.names:
        return np.sort(merged)
    return merged[np.lexsort((merged["number"], merged["check"], merged["key"]))]


def begins(*columns: np.ndarray) -> np.ndarray:
    """bool [n]: where an entry of sorted columns differs from the one before it."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


def copies(entries: np.ndarray) -> np.ndarray:
    """int64 [n, 3] for each entry but the first of equal (key, check): the number of the first, the one before, and its own."""
    new = begins(entries["key"], entries["check"])
    later = np.flatnonzero(~new)
    first = np.flatnonzero(new)[np.cumsum(new)[later] - 1]
    return np.stack([entries["number"][at] for at in (first, later - 1, later)], axis=1)


def once(ordered: np.ndarray) -> np.ndarray:
    """Sorted values, each once."""
    return ordered[begins(ordered)]


def among(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of these values are among the sorted ones, and where those stand."""
    if not len(ordered):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    chosen = np.flatnonzero(ordered[place] == values)
    return chosen, place[chosen]


def distinct(pairs: np.ndarray) -> np.ndarray:
    """The rows of an [n, 2] array, sorted and each once."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[begins(*pairs.T)]
