"""How much of its training text a causal model gives back word for word, by how often that text occurs in it.

A window of tokens is cut in two: the model is given the first part and continues it greedily; it has memorised the window if
the second part comes out token for token (Carlini et al. 2023, "Quantifying memorization across neural language models").
Windows of the test split, which occur not once, say how much of that is mere guessing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from ds_pretrain.core import rng
from ds_pretrain.data.store import Store
from ds_pretrain.evaluation.generate import Sampling, continue_all
from ds_pretrain.training.inference import FrozenModel

BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the rolling hash: odd, so that no token is lost."""
ROWS = 16
"""Windows that are continued at once."""
MOST = 1 << 25
"""Tokens of a store that are read, from its beginning: what repeats is counted among these."""


class Windows(NamedTuple):
    """Windows that occur between so many times: ids [n, prompt + tokens], n of `there` that do."""

    occurrences: str
    ids: np.ndarray
    there: int


class Recall(NamedTuple):
    """How many windows with so many occurrences were completed verbatim, of how many tried and how many there are."""

    occurrences: str
    verbatim: int
    tried: int
    there: int

    @property
    def share(self) -> float:
        return self.verbatim / self.tried


Piece = tuple[str, np.ndarray]
"""How often its windows occur, and their ids."""


def memorised(
    model: FrozenModel,
    train: Store,
    test: Store,
    prompt: int = 32,
    tokens: int = 32,
    count: int = 200,
    seed: int = 0,
    shown: Callable[[list[Piece]], Iterable[Piece]] = iter,
) -> list[Recall]:
    """Recall of up to `count` windows for each number of occurrences, those of `test` that `train` lacks first (collective).

    shown: what the pieces of work go through, such as a progress bar.

    ValueError for a model that does not continue texts, or that has no room for such windows.
    """
    if model.objective.kind != "causal":
        raise ValueError(f"objective {model.objective.name} does not continue texts: use a causal run")
    room = model.build.model.positions
    if room and prompt + tokens > room + 1:  # the last token is not read
        raise ValueError(f"windows of {prompt} + {tokens} tokens do not fit {room} positions: lower --prompt or --tokens")
    eod: int = train.info["eod"]
    groups = [*windows(_ids(train), _ids(test), eod, prompt + tokens, count, seed)]
    pieces = [(g.occurrences, rows) for g in groups for rows in np.array_split(g.ids, range(ROWS, len(g.ids), ROWS))]
    verbatim = Counter[str]()
    for occurrences, rows in shown(pieces):
        verbatim[occurrences] += _verbatim(model, eod, rows, prompt)
    return [Recall(g.occurrences, verbatim[g.occurrences], len(g.ids), g.there) for g in groups]


def _ids(store: Store) -> np.ndarray:
    return np.concatenate([np.zeros(0, store.info["dtype"]), *itertools.islice(store.chunks(MOST), 1)])


def windows(train: np.ndarray, test: np.ndarray, eod: int, length: int, count: int, seed: int = 0) -> Iterator[Windows]:
    """Windows inside of documents, which end in `eod`, drawn by the seed: those of test that train lacks, then those of train
    by powers of two."""
    marks, starts = _windows(train, eod, length)
    distinct, first, times = _counted(marks)
    others, elsewhere = _windows(test, eod, length)
    absent = elsewhere[~np.isin(others, distinct)]
    if len(absent):
        yield Windows("0", _drawn(test, absent, length, count, seed), len(absent))
    power = np.frexp(times.astype(float))[1] - 1  # of two, at most `times`
    for each in np.unique(power).tolist():
        low, high = 1 << each, (2 << each) - 1
        found = starts[first[power == each]]
        yield Windows(str(low) if low == high else f"{low}-{high}", _drawn(train, found, length, count, seed), len(found))


def _windows(ids: np.ndarray, eod: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each window that lies within one document, and where it starts."""
    last = max(0, len(ids) - length + 1)
    marks, ends = np.zeros(last, np.uint64), np.zeros(last, bool)
    for place in range(length):
        column = ids[place : place + last]
        marks = marks * BASE + column.astype(np.uint64) + np.uint64(1)
        ends |= column == eod
    starts = np.flatnonzero(~ends)
    return marks[starts], starts


def _counted(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct hashes in order, where each is first, and how often it is there."""
    order = np.argsort(marks, kind="stable")
    ordered = marks[order]
    heads = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))[: len(ordered)])
    return ordered[heads], order[heads], np.diff(np.append(heads, len(ordered)))


def _drawn(ids: np.ndarray, starts: np.ndarray, length: int, count: int, seed: int) -> np.ndarray:
    """Up to `count` of these windows, as ids."""
    chosen = rng.generator("memorised", seed).permutation(len(starts))[:count]
    return ids[starts[chosen, None] + np.arange(length)].astype(np.int64)


def _verbatim(model: FrozenModel, eod: int, ids: np.ndarray, prompt: int) -> int:
    """How many of these windows, continued at once, come out as they are."""
    how = Sampling(ids.shape[1] - prompt, temperature=0)
    steps = continue_all(model, ids[:, :prompt].tolist(), frozenset({eod}), frozenset(), how)
    written = np.array([[-1 if token is None else token for token in step] for step in steps]).reshape(-1, len(ids)).T
    return sum(np.array_equal(mine, row[prompt:]) for mine, row in zip(written, ids, strict=True))


def table(found: Sequence[Recall], output: str, train: Store) -> Table:
    """For people."""
    title = f"{output}: windows of its first {min(MOST, train.info['tokens']):,} training tokens, and of the test split (0)"
    shown = Table("occurrences in training", "windows there", "tried", "verbatim", "share", title=title, title_justify="left")
    for each in found:
        shown.add_row(each.occurrences, f"{each.there:,}", f"{each.tried:,}", f"{each.verbatim:,}", f"{each.share:.2%}")
    return shown
