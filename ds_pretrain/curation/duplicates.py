"""Exact and near duplicates over all parts: of each group of copies the first is kept.

Exact: equal xxh3-128 of the text with its white space evened out. Near: MinHash signatures (`minhash`) whose bands meet in a
bucket make a pair, every pair is compared by its true n-grams, and pairs that pass are joined (union-find). The first in the
order of the sources stays, so put the source you trust most first. The price of joining: A and C may be less alike than the
threshold if B is like both. A pair that is found only among three or more in a band may be overlooked there: each is paired
with the first and with its neighbour, not with all. Pairs are compared in chunks, each of which reads the row groups that it
needs: where copies are many and far apart, text is read several times.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ds_pretrain.curation import runs
from ds_pretrain.curation.documents import (
    SHIFT,
    Dropped,
    Folder,
    Place,
    Row,
    Work,
    batched,
    number_of,
    opened,
    read_group,
    read_part,
    step,
    write_part,
)
from ds_pretrain.curation.minhash import MinHash, estimate, jaccard
from ds_pretrain.curation.workers import Workers

COPY = np.dtype([("number", "<i8"), ("of", "<i8")])
PAIR = np.dtype([("a", "<i8"), ("b", "<i8"), ("jaccard", "<f8"), ("estimate", "<f8")])
AT_ONCE = 32 << 20
"""Bytes of text of the pairs that are compared by one unit of work."""
FEW = 1 << 16
"""Pairs that are numbers of Python at once."""
SHOWN = 2_000
"""Pairs whose estimate and truth go into the report."""


def exact(before: Folder, out: Path, workers: Workers) -> Folder:
    """Drop all but the first of equal documents."""

    def do(work: Work) -> dict[str, Any]:
        place = work.place
        work.each("hash", place.parts, partial(_hash, place), partial(place.of, "run"))
        count = runs.buckets(place.every("run"))
        work.each("compare", range(count), partial(_equal, place, count), partial(place.of, "copies"))
        return drop(work, "exact copy", gathered(place, "copies", range(count)))

    return step("exact", out, before, {}, workers, do)


def near(before: Folder, out: Path, workers: Workers, how: MinHash = MinHash()) -> Folder:
    """Drop all but the first of documents that are nearly the same."""

    def do(work: Work) -> dict[str, Any]:
        place = work.place
        work.each("sign", place.parts, partial(_sign, place, how), partial(place.of, "run"))
        count = runs.buckets(place.every("run"))
        work.each("meet", range(count), partial(_meet, place, count), partial(place.of, "pairs"))
        pairs = _together(runs.distinct(gathered(place, "pairs", range(count))))
        chunks = list(enumerate(_chunks(place, pairs)))
        work.each("verify", chunks, partial(_verify, place, how), lambda chunk: place.of("verified", chunk[0]))
        verified = gathered(place, "verified", range(len(chunks)))
        passed = verified[verified["jaccard"] >= how.threshold]
        copies = clusters(passed["a"], passed["b"])
        return drop(work, "near copy", copies) | _evidence(how, verified)

    return step("near", out, before, asdict(how), workers, do)


def gathered(place: Place, what: str, numbers: Iterable[int]) -> np.ndarray:
    return np.concatenate([runs.load(place.of(what, number)) for number in numbers])


def _hash(place: Place, part: Path) -> None:
    numbers, digests = array("q"), bytearray()
    for row in read_part(part):
        numbers.append(row.number)
        digests += xxhash.xxh3_128_digest(" ".join(row.text.split()).encode())
    keys = np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2)
    runs.save(place.of("run", part), runs.run(keys[:, 0], keys[:, 1], np.frombuffer(numbers, dtype=np.int64)))


def _equal(place: Place, count: int, number: int) -> None:
    found = runs.copies(runs.bucket(place.every("run"), number, count))
    copies = np.empty(len(found), dtype=COPY)
    copies["number"], copies["of"] = found[:, 2], found[:, 0]
    runs.save(place.of("copies", number), copies)


def _sign(place: Place, how: MinHash, part: Path) -> None:
    """The signatures of a part and the run of their bands' keys. Texts without a unit resemble nothing and have no keys."""
    dtype = np.dtype([("number", "<i8"), ("size", "<i8"), ("signature", "<u4", (how.bins,))])
    made = [np.zeros(0, dtype)]
    for rows in batched(read_part(part)):
        some = np.empty(len(rows), dtype)
        some["number"], some["size"] = [row.number for row in rows], [len(row.text) for row in rows]
        some["signature"] = how.signatures([row.text for row in rows])
        made.append(some[~(some["signature"] == np.iinfo(np.uint32).max).all(axis=1)])
    signed = np.concatenate(made)
    number, signature = signed["number"], np.ascontiguousarray(signed["signature"])
    runs.save(place.of("signatures", part), signed)
    band = np.tile(np.arange(how.bands, dtype=np.uint64), len(number))
    runs.save(place.of("run", part), runs.run(how.keys(signature).ravel(), band, np.repeat(number, how.bands)))


def _meet(place: Place, count: int, number: int) -> None:
    """Pairs of documents that share a band: each with the first of its group, and with its neighbour."""
    found = runs.copies(runs.bucket(place.every("run"), number, count))
    runs.save(place.of("pairs", number), runs.distinct(np.concatenate([found[:, [0, 2]], found[:, [1, 2]]])))


def _together(pairs: np.ndarray) -> np.ndarray:
    """The pairs in the order of the clusters that they would make if all passed: so each text is hashed about once, however
    many pairs it is in."""
    tied, first = clusters(pairs[:, 0], pairs[:, 1]), pairs[:, 0].copy()
    later = np.isin(first, tied["number"])
    first[later] = tied["of"][np.searchsorted(tied["number"], first[later])]
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0], first))]


def _chunks(place: Place, pairs: np.ndarray) -> Iterator[np.ndarray]:
    """The pairs in stretches of so much text that a worker can hold it; one at least."""
    wanted = np.unique(pairs)
    sizes = [size for part in place.parts for size in _signed(place, part, wanted)["size"].tolist()] if len(wanted) else []
    held, text, start = set[int](), 0, 0
    for i, pair in enumerate(pair for some in _few(pairs) for pair in np.searchsorted(wanted, some).tolist()):
        new = set(pair) - held
        held |= new
        text += sum(sizes[each] for each in new)
        if text >= AT_ONCE:
            yield pairs[start : i + 1]
            held, text, start = set(), 0, i + 1
    yield pairs[start:]


def _verify(place: Place, how: MinHash, chunk: tuple[int, np.ndarray]) -> None:
    """True and estimated similarity of these pairs."""
    number, pairs = chunk
    wanted = np.unique(pairs)
    grams = dict(_hashed(place, how, wanted))
    signatures = {int(each["number"]): each["signature"] for part in place.parts for each in _signed(place, part, wanted)}
    made = [(a, b, jaccard(grams[a], grams[b]), estimate(signatures[a], signatures[b])) for a, b in pairs.tolist()]
    runs.save(place.of("verified", number), np.array(made, dtype=PAIR))


def _hashed(place: Place, how: MinHash, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The sorted distinct n-grams of these documents."""
    for rows in batched(rows_of(place, wanted)):
        found = how.grams.of([row.text for row in rows])
        order = np.lexsort((found.hash, found.text))
        text, hashes = found.text[order], found.hash[order]
        once = runs.begins(text, hashes)
        text, hashes = text[once], hashes[once]
        ends = np.searchsorted(text, np.arange(len(rows) + 1))
        yield from ((row.number, hashes[start:stop]) for row, start, stop in zip(rows, ends, ends[1:], strict=False))


def _signed(place: Place, part: Path, wanted: np.ndarray) -> np.ndarray:
    signed = runs.load(place.of("signatures", part))
    return np.array(signed[np.isin(signed["number"], wanted, assume_unique=True)])


def rows_of(place: Place, wanted: np.ndarray) -> Iterator[Row]:
    """Documents by their sorted numbers; only row groups that hold some are read."""
    for part in place.parts:
        file = opened(part)
        for group in range(file.num_row_groups):
            span = file.metadata.row_group(group).column(0).statistics
            if span is None:  # no documents
                continue
            low, high = np.searchsorted(wanted, span.min), np.searchsorted(wanted, span.max, side="right")
            if mine := set(wanted[low:high].tolist()):
                yield from (row for row in read_group(part, file, group) if row.number in mine)


def clusters(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Each document that a chain of pairs ties to an earlier one, and the first of its cluster."""
    root: dict[int, int] = {}

    def find(x: int) -> int:
        while (up := root.setdefault(x, x)) != x:
            root[x] = x = root[up]
        return x

    for some in _few(np.stack([left, right], axis=1)):
        for a, b in some.tolist():
            low, high = sorted((find(a), find(b)))
            root[high] = low
    return np.array([(x, find(x)) for x in sorted(root) if find(x) != x], dtype=COPY)


def _few(pairs: np.ndarray) -> Iterator[np.ndarray]:
    """So many at a time that lists of them are small."""
    return (pairs[i : i + FEW] for i in range(0, len(pairs), FEW))


def drop(work: Work, reason: str, copies: np.ndarray) -> dict[str, Any]:
    """Write all parts without these copies."""
    place = work.place
    runs.save(place.of("copies"), np.sort(copies, order="number"))
    work.write("write", partial(_without, place, reason))
    sizes = Counter(Counter(copies["of"].tolist()).values())
    return {"clusters": {str(size + 1): count for size, count in sorted(sizes.items())}}


def _without(place: Place, reason: str, part: Path) -> None:
    number = number_of(part)
    copies = runs.load(place.of("copies"))
    low, high = np.searchsorted(copies["number"], [number << SHIFT, (number + 1) << SHIFT])
    of = dict(copies[low:high].tolist())
    rows = (Dropped(row, reason, of[row.number]) if row.number in of else row for row in read_part(part))
    write_part(place.folder, number, rows)


def _evidence(how: MinHash, verified: np.ndarray) -> dict[str, Any]:
    """What the report shows of the pairs: how many, and of some the estimate beside the truth."""
    passed = int((verified["jaccard"] >= how.threshold).sum())
    shown = verified[:: max(1, len(verified) // SHOWN)]
    pairs = [[round(float(each), 4) for each in row] for row in zip(shown["estimate"], shown["jaccard"], strict=True)]
    return {"candidates": len(verified), "passed": passed, "bands": how.bands, "rows": how.rows, "estimate_and_truth": pairs}
