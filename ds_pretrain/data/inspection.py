"""What is in a store: lengths, documents that hold a text, and whether every byte of it is sound.

Everything reads in pieces, so a store may be far larger than memory. The price: nothing is indexed, so a search reads every
token each time. Searching the text decodes it, which is exact however the tokenizer cut it (about a million tokens a second);
comparing ids is a hundred times faster and finds only the cuts that the tokenizer makes of the text by itself.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ds_pretrain.data.store import SPLITS, SUFFIXES, Store, file_digest
from ds_pretrain.data.tokenizer import TextTokenizer

PIECE = 1 << 20
"""Tokens of one document that are decoded at once."""
AROUND = 40
"""Characters, or tokens, shown on each side of what was found."""
Advance = Callable[[int], object]
"""Told how many tokens, or bytes, were done since it was called last."""


def prefixes(path: Path) -> list[Path]:
    """The stores at a path: the folder's, train first, or the one of this prefix."""
    if path.is_dir():
        found = [file.with_suffix("") for file in sorted(path.glob("*.json")) if file.with_suffix(".bin").exists()]
        if not found:
            raise ValueError(f"no store in {path}: a store is a .bin, .idx, .text.npy and .json of one name (see `adopt`)")
        return sorted(found, key=lambda prefix: SPLITS.index(prefix.name) if prefix.name in SPLITS else len(SPLITS))
    for suffix in (*SUFFIXES, "json"):
        if path.is_file() and path.name.endswith(f".{suffix}"):
            return [path.with_name(path.name.removesuffix(f".{suffix}"))]
    return [path]


class Lengths(NamedTuple):
    """How many documents have each length, exactly, in the room that the different lengths take."""

    values: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(store: Store, step: int = 1 << 22) -> Lengths:
        found = Lengths(np.zeros(0, np.int64), np.zeros(0, np.int64))
        for first in range(0, len(store), step):
            values, counts = np.unique(store.lengths[first : first + step], return_counts=True)
            values, place = np.unique(np.concatenate((found.values, values)), return_inverse=True)
            counts = np.bincount(place, np.concatenate((found.counts, counts))).astype(np.int64)
            found = Lengths(values.astype(np.int64), counts)
        return found

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of the documents does not exceed."""
        return int(self.values[np.searchsorted(np.cumsum(self.counts), share * self.counts.sum())])

    def octaves(self) -> list[tuple[int, int, int]]:
        """(k, documents, tokens) of the lengths in [2^k, 2^(k+1)), without gaps."""
        octave = np.array([int(value).bit_length() - 1 for value in self.values])
        documents, tokens = (np.bincount(octave, weights) for weights in (self.counts, self.counts * self.values))
        return [(k, int(documents[k]), int(tokens[k])) for k in range(octave.min(), octave.max() + 1)]


class Hit(NamedTuple):
    """A document that holds what was searched, and the first place of it: before, itself, after."""

    document: int
    context: tuple[str, str, str]


def search_text(store: Store, tokenizer: TextTokenizer, text: str, advance: Advance) -> Iterator[Hit]:
    """By decoding everything: exact however the text was cut, at about a million tokens a second."""
    overlap = len(text.encode()) + 8  # a token holds a byte at least; a cut character is whole in the next piece
    for document, length in enumerate(store.lengths):
        for start in range(0, max(1, int(length) - 1), PIECE):
            stop = min(int(length) - 1, start + PIECE + overlap)
            found = tokenizer.decode(store.slice(document, start, stop))
            if (place := found.find(text)) >= 0:
                end = place + len(text)
                yield Hit(document, (found[max(0, place - AROUND) : place], text, found[end : end + AROUND]))
                break
        advance(int(length))


def search_ids(store: Store, tokenizer: TextTokenizer, text: str, advance: Advance) -> Iterator[Hit]:
    """By comparing ids, at the speed of the disk."""
    seen = 0
    wanted = {tuple(tokenizer.encode(spelling).tolist()) for spelling in (text, f" {text}")} - {()}
    for place, length in places(store, wanted, advance):
        if place < seen:
            continue
        document = bisect.bisect_right(range(len(store)), place, key=lambda i: int(store.ends(i, i + 1)[0]))
        seen = int(store.ends(document, document + 1)[0])
        first = place - (seen - int(store.lengths[document]))
        last = min(first + length + AROUND // 2, int(store.lengths[document]))
        cuts = max(0, first - AROUND // 2), first, first + length, last
        parts = [tokenizer.decode(store.slice(document, *cut)) for cut in pairwise(cuts)]
        yield Hit(document, (parts[0], parts[1], parts[2]))


def places(store: Store, wanted: set[tuple[int, ...]], advance: Advance) -> Iterator[tuple[int, int]]:
    """Where in the whole store each of these sequences starts, and how long it is."""
    kept, start = np.zeros(0, dtype=np.int32), 0
    longest = max(map(len, wanted), default=1)
    for part in store.chunks():
        joined = np.concatenate((kept, part.astype(np.int32)))
        found: list[tuple[int, int]] = []
        for ids in wanted:
            at = np.flatnonzero(joined[: len(joined) - len(ids) + 1] == ids[0]) if len(joined) >= len(ids) else np.zeros(0, int)
            for offset, token in enumerate(ids[1:], start=1):
                at = at[joined[at + offset] == token]
            found += [(start + place, len(ids)) for place in at.tolist()]
        yield from sorted(found)
        kept = joined[max(0, len(joined) - longest + 1) :]
        start += len(joined) - len(kept)
        advance(len(part))


def listing(path: Path) -> dict[str, str]:
    """Digests of the stores that the manifest of a prepared folder lists; none without one. Names stay in the folder."""
    file = path / "manifest.json"
    if not file.is_file():
        return {}
    try:
        stores = json.loads(file.read_bytes()).get("stores", {})
    except (ValueError, AttributeError):
        raise ValueError(f"{file} is damaged: it is no JSON object") from None
    if escaping := [name for name in stores if Path(name).name != name or name == ".."]:
        raise ValueError(f"{file} lists {escaping[0]!r}, which is no name of a store in {path}")
    return stores


def check(prefix: Path, listed: dict[str, str], advance: Advance) -> Iterator[tuple[str, str]]:
    """Each file of a store with what is wrong with it, "" if nothing is."""
    try:
        store = Store(prefix, "sizes")
    except ValueError as error:
        yield f"{prefix}.json", str(error)
        return
    stray = listed and listed.get(prefix.name) != store.digest
    yield f"{prefix}.json", "not the store that manifest.json lists" * bool(stray)
    for suffix in SUFFIXES:
        sound = file_digest(f"{prefix}.{suffix}", advance) == store.info["xxh3_128"][suffix]
        yield f"{prefix}.{suffix}", "" if sound else "damaged: its checksum does not match"
    lows, highs = zip(*((int(part.min()), int(part.max())) for part in store.chunks()), strict=True)
    low, high = min(lows), max(highs)
    if low < 0 or high >= store.vocab_size:
        yield f"{prefix}.bin", f"ids {low}..{high}, outside the vocabulary of {store.vocab_size}"
    if open_ := sum(_open_ends(store)):
        yield f"{prefix}.bin", f"{open_} documents do not end in the end-of-document id {store.info['eod']}"


def _open_ends(store: Store, step: int = 1 << 20) -> Iterator[int]:
    for first in range(0, len(store), step):
        yield int(np.count_nonzero(store.at(store.ends(first, first + step) - 1) != store.info["eod"]))
