"""MinHash signatures by one permutation, and the bands that find pairs above a similarity.

Each n-gram is hashed once; its top bits choose one of K bins, which keeps the least of its hashes (one permutation hashing,
Li et al. 2012), so a text of n n-grams costs n operations instead of n K. Empty bins of short texts borrow from others in an
order drawn per bin ("optimal densification", Shrivastava 2017), after which two signatures agree in a bin with the
probability of their Jaccard similarity, as under MinHash (Broder 1997). The price: bins of short texts are not independent,
so their estimates vary more; every pair found is compared by its true n-grams before anything is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np

from ds_pretrain.core import rng
from ds_pretrain.curation.shingles import Grams

EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
FEW = 8
"""Full bins up to which they are looked up in the orders of the empty ones."""
AT_ONCE = 512
"""Texts whose empty bins are filled at once."""


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """How near-duplicates are found."""

    grams: Grams = field(default_factory=Grams)
    """What texts are compared by."""
    bins: int = 128
    """Length K of a signature; a power of two."""
    threshold: float = 0.7
    """Jaccard similarity of n-grams from which on two texts are near-duplicates."""
    missed: float = 0.02
    """Share of the pairs exactly at the threshold that the bands may overlook."""

    def __post_init__(self) -> None:
        if self.bins < 16 or self.bins & (self.bins - 1):
            raise ValueError(f"bins must be a power of two from 16 on, got {self.bins}")
        if not 0 < self.threshold <= 1 or not 0 < self.missed < 1:
            raise ValueError(f"threshold {self.threshold} must lie in (0, 1] and missed {self.missed} in (0, 1)")
        if found_by(self.threshold, self.bins, 1) < 1 - self.missed:
            raise ValueError(f"{self.bins} bins find too few pairs of similarity {self.threshold}: raise bins or missed")

    @cached_property
    def rows(self) -> int:
        """Bins of a band: the most (fewest false candidates) that overlook no more than allowed."""
        return max(r for r in range(1, self.bins + 1) if found_by(self.threshold, self.bins // r, r) >= 1 - self.missed)

    @cached_property
    def bands(self) -> int:
        return self.bins // self.rows

    def curve(self, similarity: np.ndarray) -> np.ndarray:
        """The S-curve: with what probability a pair of each similarity becomes a candidate."""
        return found_by(similarity, self.bands, self.rows)

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """uint32 [texts, bins]; a text without a single unit has its own kind of signature, all ones."""
        found = self.grams.of(texts)
        shift = np.uint64(64 - (self.bins.bit_length() - 1))
        bin_n = (found.hash >> shift).astype(np.int64)
        least = np.full(len(texts) * self.bins, EMPTY)
        np.minimum.at(least, found.text * self.bins + bin_n, found.hash)
        return _densified(least.reshape(-1, self.bins)).astype(np.uint32)

    def keys(self, signatures: np.ndarray) -> np.ndarray:
        """uint64 [texts, bands]: equal where all bins of a band agree."""
        used = signatures[:, : self.bands * self.rows].astype(np.uint64).reshape(len(signatures), self.bands, self.rows)
        weight = rng.mixed(np.arange(1, self.rows + 1, dtype=np.uint64)) | np.uint64(1)
        return rng.mixed((rng.mixed(used + np.uint64(1)) * weight).sum(axis=2, dtype=np.uint64))


def found_by(similarity: float | np.ndarray, bands: int, rows: int) -> np.ndarray:
    """With what probability some band of `rows` bins agrees in all of them."""
    return 1 - (1 - np.asarray(similarity, dtype=np.float64) ** rows) ** bands


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """True similarity of two texts from their sorted distinct n-grams."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - common
    return common / union if union else 0.0


def estimate(one: np.ndarray, other: np.ndarray) -> float:
    """Similarity of two texts by their signatures: the share of bins that agree."""
    return float((one == other).mean())


def _densified(least: np.ndarray) -> np.ndarray:
    """Every empty bin filled from the full one that comes first in its order of all bins."""
    full, bins = least != EMPTY, least.shape[1]
    filled, count = least.copy(), full.sum(axis=1)
    for few in range(1, FEW + 1):  # full ones are looked up in each order
        for texts in _chunks(np.flatnonzero(count == few)):
            known = np.nonzero(full[texts])[1].reshape(len(texts), few)
            first = _orders(bins)[1][:, known].argmin(axis=2)  # [bins, texts]
            text, at = np.nonzero(~full[texts])
            _borrow(filled, least, texts[text], at, known[text, first[at, text]])
    for texts in _chunks(np.flatnonzero((count > FEW) & (count < bins))):  # each order is walked until a full one comes
        text, at = np.nonzero(~full[texts])
        text = texts[text]
        for turn in range(bins):
            source = _orders(bins)[0][at, turn]
            hit = full[text, source]
            _borrow(filled, least, text[hit], at[hit], source[hit])
            text, at = text[~hit], at[~hit]
            if not len(text):
                break
    return filled


def _borrow(filled: np.ndarray, least: np.ndarray, text: np.ndarray, at: np.ndarray, source: np.ndarray) -> None:
    """What is borrowed is changed by the bin that borrows, or bins that borrow from one would all agree at once."""
    filled[text, at] = rng.mixed(least[text, source] + at.astype(np.uint64))


def _chunks(texts: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(texts), AT_ONCE):
        yield texts[start : start + AT_ONCE]


@cache
def _orders(bins: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 [bins, bins] each: the order in which each bin asks all bins, and the place of each bin in it; for all texts."""
    keys = rng.mixed(rng.mixed(np.arange(bins * bins, dtype=np.uint64)) + np.uint64(1)).reshape(bins, bins)
    order = keys.argsort(axis=1)
    return order.astype(np.int16), order.argsort(axis=1).astype(np.int16)
