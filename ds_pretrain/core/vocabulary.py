"""What an objective needs to know of a tokenizer: its ids, which of them are not text, and where words begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

SENTINELS = 256


@dataclass(frozen=True)
class Codec:
    """Text to ids and back, for objectives that cut characters rather than tokens."""

    encode: Callable[[str], np.ndarray]
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Vocabulary:
    """The special ids of a tokenizer.

    size: number of real ids, without the padding that tensor parallelism adds to the embedding.
    specials: every id that is not text (the named ones, sentinels and the rest of the reserved block).
    sentinels: the sentinel block, in the order in which spans use it.
    names: special ids by name, those included that only one objective knows ("[NLU]", "<fim_prefix>").
    surfaces: the text that each id stands for, a space in front where it begins a word after a space.
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
    names: Mapping[str, int] = field(default_factory=dict, compare=False)
    surfaces: Callable[[], Sequence[str]] | None = field(default=None, compare=False)
    codec: Codec | None = field(default=None, compare=False)

    @staticmethod
    def synthetic(size: int = 1000) -> Vocabulary:
        """A vocabulary without a tokenizer, with every special token there is, each id a character: to measure and test."""
        modes = ("[NLU]", "[S2S]", "[NLG]", "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
        names = {name: 6 + i for i, name in enumerate(modes)}
        first = 6 + len(modes)
        sentinels = tuple(range(first, first + SENTINELS))
        base = 0x4E00  # CJK ideographs: letters, and enough of them
        codec = Codec(
            encode=lambda text: np.array([ord(char) - base for char in text], dtype=np.int32),
            decode=lambda ids: "".join(chr(base + i) for i in ids),
        )
        return Vocabulary(
            size, 0, 1, 2, 3, 4, 5, sentinels, frozenset(range(first + SENTINELS)), names,
            surfaces=lambda: [chr(base + i) for i in range(size)], codec=codec,
        )  # fmt: skip

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

    def lacks(self, who: str, names: Sequence[str]) -> list[str]:
        """One problem if the tokenizer has not all of these special tokens."""
        missing = [name for name in names if name not in self.names]
        if not missing:
            return []
        return [
            f"{who} needs the special tokens {', '.join(missing)}, which this tokenizer lacks: train one with `prepare`, or "
            "load it with extend=True"
        ]

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Bool [n]: where a word begins. A word is a run of letters and digits with the space before it, and every other
        character is one of its own, whichever way the tokenizer cuts them."""
        opens, closes = self._edges
        starts = opens[tokens] | self.is_special[tokens]
        starts[1:] |= closes[tokens[:-1]] | self.is_special[tokens[:-1]]
        starts[:1] = True
        return starts

    @cached_property
    def line_ends(self) -> np.ndarray:
        """Bool [size]: ids whose text ends a line."""
        texts = self.surfaces() if self.surfaces else [""] * self.size
        return np.array([text.endswith("\n") for text in texts])

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """For each id whether its first character cannot continue a word, and whether its last one ends it."""
        if self.surfaces is None:
            return np.ones(self.size, dtype=bool), np.ones(self.size, dtype=bool)
        texts = self.surfaces()
        opens, closes = np.array([(_edge(text[:1]), _edge(text[-1:])) for text in texts], dtype=bool).T
        return opens, closes


def _edge(char: str) -> bool:
    return not (char.isalnum() or char == "\N{REPLACEMENT CHARACTER}")  # part of a character that takes several ids
