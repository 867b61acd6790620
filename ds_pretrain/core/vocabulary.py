"""The ids an objective needs to know of a tokenizer: how many there are, and which of them are not text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

SENTINELS = 256


@dataclass(frozen=True)
class Vocabulary:
    """The special ids of a tokenizer.

    size: number of real ids, without the padding that tensor parallelism adds to the embedding.
    specials: every id that is not text (the named ones, sentinels and the rest of the reserved block).
    sentinels: the sentinel block, in the order in which spans use it.
    """

    size: int
    pad: int
    eod: int
    unk: int
    cls: int
    sep: int
    mask: int
    sentinels: tuple[int, ...]
    specials: frozenset[int]

    @cached_property
    def is_special(self) -> np.ndarray:
        """Bool [size]: True for an id that no objective may mask, insert or cross."""
        table = np.zeros(self.size, dtype=bool)
        table[list(self.specials)] = True
        return table

    @cached_property
    def words(self) -> np.ndarray:
        """int32: the ids that are text, from which random replacements are drawn."""
        return np.flatnonzero(~self.is_special).astype(np.int32)
