"""What an objective needs to know of a tokenizer: its ids, which of them are not text, and where words begin."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

SENTINELS = 256
BEGIN = "<bos>"
"""The name of what texts begin with, where that is not the end of another."""
IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))
"""Unicode blocks of Chinese characters, as BERT's tokenizer has them."""


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

    @property
    def begin(self) -> int:
        """What a text is predicted from: the end of the one before it, or a token of its own (LLaMA's <s>)."""
        return self.names.get(BEGIN, self.eod)

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

    def ends(self, said: int | Sequence[int] | None) -> list[int]:
        """Ids that end a text: those that a folder names (`eos_token_id`: none, one or several), and <eod>."""
        named = [*said] if isinstance(said, Sequence) else [] if said is None else [said]
        return named if self.eod in named else [*named, self.eod]

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Bool [n]: where a word begins. A word is a run of letters, their marks and digits with the space before it, and every
        other character is one of its own, ideographs too (BERT's rule), whichever way the tokenizer cuts them."""
        starts = self.joints(tokens) > 0
        starts[:1] = True
        return starts

    def joints(self, tokens: np.ndarray) -> np.ndarray:
        """int8 [n]: why a word begins at each token: 2 if the token itself begins one, plus 1 if the one before it ends one."""
        opens, closes = self._edges
        joint = 2 * (opens[tokens] | self.is_special[tokens]).astype(np.int8)
        joint[1:] += closes[tokens[:-1]] | self.is_special[tokens[:-1]]
        return joint

    @cached_property
    def line_ends(self) -> np.ndarray:
        """Bool [size]: ids whose text ends a line."""
        return np.array([text.endswith("\n") for text in self._texts])

    @cached_property
    def blank(self) -> np.ndarray:
        """Bool [size]: ids whose text is line ends and spaces alone."""
        return np.array(["\n" in text and not text.strip() for text in self._texts])

    @property
    def _texts(self) -> Sequence[str]:
        return self.surfaces() if self.surfaces else [""] * self.size

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """For each id whether its first character cannot continue a word, and whether its last one ends it."""
        if self.surfaces is None:
            return np.ones(self.size, dtype=bool), np.ones(self.size, dtype=bool)
        texts = self.surfaces()
        opens, closes = np.array([(_edge(text[:1]), _edge(text[-1:])) for text in texts], dtype=bool).T
        return opens, closes


def _edge(char: str) -> bool:
    """Whether a character is no part of a word beside it. A replacement character is part of one that takes several ids."""
    if not char or any(low <= ord(char) <= high for low, high in IDEOGRAPHS):
        return True
    return not (char.isalnum() or char == "\N{REPLACEMENT CHARACTER}" or unicodedata.category(char)[0] == "M")
