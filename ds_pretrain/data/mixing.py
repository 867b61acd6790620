"""Rows from several prepared folders, by weight: a domain with replay of general text, languages, tiers of quality.

Which folder gives a row is a function of the row's number alone: the number times the golden ratio, modulo 1, falls into some
folder's share of [0, 1). So every stretch of rows has the wanted shares within some five rows per folder, and nothing is
stored but one cursor per folder. Weights may therefore change when a run goes on: no folder skips or repeats a piece. The
price: the folders themselves must stay the same; one that shall come in later is named from the start, with a weight of 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.dataset import Cursor, PretrainingDataset, Row
from ds_pretrain.data.sources import check_repeated
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.objectives import Objective

GOLDEN = 0x9E3779B97F4A7C15
"""The golden ratio's fraction, times 2^64."""
Shares = Literal["tokens", "samples"]


class MixedCursor(NamedTuple):
    """The complete position: rows so far, and each folder's own cursor, in the order of the folders' names."""

    row: int
    folders: tuple[Cursor, ...]


class MixedDataset:
    """Rows of several folders as one stream; evaluation, tokenizer and vocabulary are the main folder's.

    weights: folder to its share, which need not sum to 1. by: what they are shares of, tokens or samples.
    Settings (length, objective, seed) are those of `main`. ValueError for a folder of another tokenizer.
    """

    def __init__(self, main: PretrainingDataset, weights: Mapping[str, float], by: Shares = "tokens") -> None:
        check_weights(weights)
        check_repeated(list(weights))
        self.main, self.by = main, by
        self.weights = dict(sorted(weights.items()))
        self.folders = [self._open(name) for name in self.weights]

    def _open(self, name: str) -> PretrainingDataset:
        m = self.main
        if str(m.data_path) == name:
            return m
        if (other := TextTokenizer.load(Path(name) / "tokenizer")).digest != m.tokenizer.digest:
            raise ValueError(
                f"{name} was prepared with another tokenizer ({other.digest}) than {m.data_path} ({m.tokenizer.digest}), and "
                f"one run has one: prepare its text again with --tokenizer {m.data_path / 'tokenizer'}"
            )
        return PretrainingDataset(name, m.tokenizer, m.seq_len, m.objective, m.source, m.seed, m.lengths, m.verify)

    @property
    def objective(self) -> Objective:
        return self.main.objective

    @property
    def vocab(self) -> Vocabulary:
        return self.main.vocab

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.main.tokenizer

    @property
    def seq_len(self) -> int:
        return self.main.seq_len

    @property
    def digest(self) -> str:
        """Changes with the folders, not with their weights."""
        pairs = zip(self.weights, self.folders, strict=True)
        return f"{rng.key('mixed', *(part for name, each in pairs for part in (name, each.digest))):032x}"

    @property
    def first(self) -> MixedCursor:
        return MixedCursor(0, tuple(each.first for each in self.folders))

    def position(self, saved: Any) -> MixedCursor:
        """A cursor from what JSON made of it."""
        return MixedCursor(saved[0], tuple(each.position(its) for each, its in zip(self.folders, saved[1], strict=True)))

    def split(self, name: str, objective: Objective | None = None) -> PretrainingDataset:
        return self.main.split(name, objective)

    def parts(self, name: str, objective: Objective | None = None) -> dict[str, PretrainingDataset]:
        """This split of each folder, whatever its weight, the main one under no name: what one gains and another loses."""
        others = {folder: each for folder, each in zip(self.weights, self.folders, strict=True) if each is not self.main}
        return {"": self.split(name, objective)} | {folder: each.split(name, objective) for folder, each in others.items()}

    def packing(self) -> dict[str, dict[str, float]]:
        """Of each folder, how its documents fill rows (see `Samples.packing`)."""
        return {name: told for name, each in zip(self.weights, self.folders, strict=True) for told in each.packing().values()}

    @cached_property
    def shares(self) -> np.ndarray:
        """float [folders]: of the rows; sums to 1. Rows of short documents hold fewer tokens, so there are more of them."""
        per_row = np.array([each.per_row()[self.by == "samples"] for each in self.folders])
        rows = np.array(list(self.weights.values())) / per_row
        return rows / rows.sum()

    def pick(self, numbers: np.ndarray) -> np.ndarray:
        """Which folder gives each of these rows."""
        start = int(rng.generator("mixed", self.main.seed).integers(1 << 63))
        place = (numbers.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(start)) / 2.0**64
        found = np.searchsorted(np.cumsum(self.shares), place, side="right")
        return np.minimum(found, int(np.flatnonzero(self.shares)[-1]))

    def rows(self, cursor: MixedCursor, count: int) -> tuple[list[Row], MixedCursor]:
        """The next `count` rows, and the position after them. A sample's number says its folder too."""
        which = self.pick(np.arange(cursor.row, cursor.row + count))
        taken: list[Row] = [()] * count
        after = []
        for i, (folder, its) in enumerate(zip(self.folders, cursor.folders, strict=True)):
            places = np.flatnonzero(which == i).tolist()
            found, its = folder.rows(its, len(places))
            after.append(its)
            for place, row in zip(places, found, strict=True):
                taken[place] = tuple(sample * len(self.folders) + i for sample in row)
        return taken, MixedCursor(cursor.row + count, tuple(after))

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Rows as planes, in their order."""
        places, made = list[int](), list[Batch]()
        for folder, (mine, own) in zip(self.folders, self._apart(rows), strict=True):
            if mine:
                places += mine
                made.append(folder.collate(own))
        return joined(made, np.argsort(places))

    def consumed(self, rows: Sequence[Row]) -> Counter[str]:
        return sum((each.consumed(own) for each, (_, own) in zip(self.folders, self._apart(rows), strict=True)), Counter())

    def progress(self, cursor: MixedCursor) -> dict[str, dict[str, float]]:
        """Of each folder, how often it has been read and its share of all tokens that have been."""
        epochs = [each.epochs(its) for each, its in zip(self.folders, cursor.folders, strict=True)]
        tokens = [count * int(each.store.lengths.sum()) for count, each in zip(epochs, self.folders, strict=True)]
        told = zip(self.weights, epochs, tokens, strict=True)
        return {name: {"epochs": count, "share": part / max(1.0, sum(tokens))} for name, count, part in told}

    def _apart(self, rows: Sequence[Row]) -> list[tuple[list[int], list[Row]]]:
        """For each folder the places of its rows, and these under its own numbers. Rows of padding are the first's."""
        count = len(self.folders)
        of = [row[0] % count if row else 0 for row in rows]
        mine = [[place for place, its in enumerate(of) if its == i] for i in range(count)]
        return [(places, [tuple(sample // count for sample in rows[place]) for place in places]) for places in mine]


def check_weights(weights: Mapping[str, float]) -> None:
    """ValueError for weights that are no shares."""
    told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "none"
    wrong = any(not math.isfinite(weight) or weight < 0 for weight in weights.values())
    if wrong or not sum(weights.values()) > 0:
        raise ValueError(f"weights of data.mix must not be negative and not all be 0, got {told}")


def joined(batches: Sequence[Batch], order: np.ndarray) -> Batch:
    """The rows of several batches as one, in this order."""
    if len(batches) == 1 and (np.diff(order) == 1).all():
        return batches[0]
    at, one = torch.from_numpy(order), batches[0]

    def rows(planes: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(planes))[at]

    targets = {
        name: Target(
            rows([each.targets[name].labels for each in batches]),
            rows([each.targets[name].weights for each in batches]),
            sum(each.targets[name].total for each in batches),
        )
        for name in one.targets
    }
    segment, horizon = (rows([getattr(each.attention, plane) for each in batches]) for plane in ("segment", "horizon"))
    types = [each.token_type for each in batches if each.token_type is not None]
    return replace(
        one,
        inputs=rows([each.inputs for each in batches]),
        position=rows([each.position for each in batches]),
        attention=AttentionPattern(segment, horizon, one.attention.kind),
        targets=targets,
        token_type=rows(types) if types else None,
    )
