"""Texts to the hashes of their n-grams, many texts at once, in numpy alone.

A unit is a word (what lies between spaces, punctuation and symbols of any script; ASCII letters in lower case) or a
character. The hash of a unit is a polynomial of random numbers for its bytes, read off two prefix sums modulo 2^64 (Karp and
Rabin 1987), so no loop runs over texts or words. The price: only ASCII is put in lower case, and words of scripts without
spaces are as long as their sentences: take characters there.

Suffixes: B bytes, W units, N n-grams.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from ds_pretrain.core import rng
from ds_pretrain.data import corpus

T = TypeVar("T", bound=Any)
Unit = Literal["word", "char"]
BATCH = 1 << 18
"""Bytes of text that are hashed at once: what fits into a core's cache."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the polynomial; odd, so that it has an inverse modulo 2^64."""


class Units(NamedTuple):
    """Where the units of some texts lie, and what they are."""

    text: np.ndarray
    """int64 [W]: which text."""
    start: np.ndarray
    """int64 [W]: first byte in its text."""
    stop: np.ndarray
    """int64 [W]: the byte after its last."""
    hash: np.ndarray
    """uint64 [W]"""


class Shingles(NamedTuple):
    """The n-grams of some texts, in their order; a text of fewer units has one n-gram of all of them, an empty one none."""

    text: np.ndarray
    """int64 [N]: which text."""
    first: np.ndarray
    """int64 [N]: which of all units it begins with."""
    hash: np.ndarray
    """uint64 [N]"""
    whole: np.ndarray
    """bool [N]: whether it has all of its units."""


@dataclass(frozen=True, kw_only=True)
class Grams:
    """What two texts are compared by."""

    unit: Unit = "word"
    """Words, or characters for scripts without spaces."""
    n: int = 5
    """Units of an n-gram."""

    def __post_init__(self) -> None:
        if self.unit not in ("word", "char"):
            raise ValueError(f"unit must be 'word' or 'char', got {self.unit!r}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")

    def units(self, texts: Sequence[str]) -> Units:
        raw = [_spaced(text).encode("utf-8", "surrogatepass") for text in texts]
        bytes_b = np.frombuffer(b"\0" + b"\0".join(raw) + b"\0", dtype=np.uint8)
        first = 1 + np.cumsum([0, *(len(each) + 1 for each in raw[:-1])])
        inside_b = (_CLASS > 0)[bytes_b]
        begin, end = _edges(inside_b) if self.unit == "word" else _characters(bytes_b, inside_b)
        sums_b = np.cumsum(_CLASS[bytes_b] * _powers(len(bytes_b)), dtype=np.uint64)
        hash_w = rng.mixed((sums_b[end - 1] - sums_b[begin - 1]) * _inverses(len(bytes_b))[begin])
        text_w = np.searchsorted(first, begin, side="right") - 1
        return Units(text_w, begin - first[text_w], end - first[text_w], hash_w)

    def of(self, texts: Sequence[str]) -> Shingles:
        return self.among(self.units(texts))

    def among(self, units: Units) -> Shingles:
        """The n-grams of these units."""
        text, count = units.text, len(units.text)
        sums, whole = units.hash * _WEIGHTS[0], np.ones(count, dtype=bool)
        for k in range(1, min(self.n, count + 1)):
            same = text[k:] == text[: count - k]
            sums[: count - k] += np.where(same, units.hash[k:] * _weight(k), 0).astype(np.uint64)
            whole[: count - k] &= same
            whole[count - k :] = False
        alone = np.diff(text, prepend=-1) > 0  # the first of each text, whose n-gram may be short
        chosen = np.flatnonzero(whole | alone)
        return Shingles(text[chosen], chosen, rng.mixed(sums[chosen]), whole[chosen])


def batches(texts: Iterable[T], length: Callable[[T], int] = len) -> Iterator[list[T]]:
    """Texts, or what has one, in groups of about `BATCH` characters."""
    return corpus.grouped(texts, length, BATCH)


def _spaced(text: str) -> str:
    """The text with spaces for what is no part of a word beyond ASCII, as many as it has bytes."""
    return text if text.isascii() else _BETWEEN.sub(lambda found: " " * len(found[0].encode()), text)


def _edges(inside_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First bytes of words, and the bytes after their last."""
    change = np.flatnonzero(inside_b[1:] != inside_b[:-1]) + 1
    return change[::2], change[1::2]


def _characters(bytes_b: np.ndarray, inside_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for characters of UTF-8 that words are made of."""
    leads = np.flatnonzero(((bytes_b & 0xC0) != 0x80) | ~inside_b)
    begin = leads[inside_b[leads]]
    end = np.append(leads[1:], len(bytes_b))[inside_b[leads]]
    return begin, end


def _classes() -> np.ndarray:
    """uint64 [256]: a random number for each byte, one for both cases of a letter, 0 for what separates."""
    letters = rng.mixed(np.arange(1, 257, dtype=np.uint64) * BASE) | np.uint64(1)
    kept = np.array([b >= 0x80 or chr(b).isalnum() for b in range(256)])
    lower = np.array([ord(chr(b).lower()) if b < 0x80 else b for b in range(256)])
    return np.where(kept, letters[lower], 0).astype(np.uint64)


def _weight(k: int) -> np.uint64:
    """What the k-th unit of an n-gram counts, odd."""
    return _WEIGHTS[k] if k < len(_WEIGHTS) else np.uint64(pow(int(BASE), 2 * k + 1, 1 << 64) | 1)


def _powers(count: int) -> np.ndarray:
    return _series(int(BASE), count)


def _inverses(count: int) -> np.ndarray:
    return _series(pow(int(BASE), -1, 1 << 64), count)


def _series(base: int, count: int) -> np.ndarray:
    """1, base, base^2 ... modulo 2^64; kept for texts of usual lengths."""
    return _usual(base)[:count] if count <= 2 * BATCH else _computed(base, count)


@cache
def _usual(base: int) -> np.ndarray:
    return _computed(base, 2 * BATCH)


def _computed(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


_OTHERS = "".join(c for c in map(chr, range(0x80, 0x10000)) if unicodedata.category(c)[0] in "PSZ")
_BETWEEN = re.compile(f"[{re.escape(_OTHERS)}]+")
_CLASS = _classes()
_WEIGHTS = rng.mixed(np.arange(1, 65, dtype=np.uint64)) | np.uint64(1)
