"""Exact and near duplicates over all parts: of each group of copies the first is kept.

Exact: equal xxh3-128 of the text with its white space evened out. Near: MinHash signatures (`minhash`) whose bands meet in a
bucket make a pair, every pair is compared by its true n-grams, and pairs that pass are joined (union-find). The first in the
order of the sources stays, so put the source you trust most first. The price of joining: A and C may be less alike than the
threshold if B is like both. A pair that is found only among three or more in a band may be overlooked there: each is paired
with the first and with its neighbour, not with all. A text is hashed once for its signature and, if it is in a pair, once more
for its n-grams, which wait on disk (8 bytes each, about 1.3 times the text) until pairs are compared in chunks that a worker
can hold; a chunk opens the files of every part that one of its documents is in.
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
SPAN = np.dtype([("number", "<i8"), ("start", "<i8"), ("stop", "<i8")])
"""Where the n-grams of a document lie among those of its part."""
AT_ONCE = 1 << 22
"""Words of 8 bytes that a unit which compares pairs holds, about."""
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
        runs.save(place.of("wanted"), np.unique(pairs))
        work.each("hash", place.parts, partial(_hash_grams, place, how), partial(place.of, "spans"))
        chunks = list(enumerate(_chunks(place, how, pairs)))
        work.each("verify", chunks, partial(_verify, place, how), lambda chunk: place.of("verified", chunk[0]))
        verified = gathered(place, "verified", range(len(chunks)))
        for path in place.every("grams"):
            path.unlink(missing_ok=True)  # large, and known to be of no use now
        passed = verified[verified["jaccard"] >= how.threshold]
        copies = clusters(passed["a"], passed["b"])
        return drop(work, "near copy", copies) | _evidence(how, verified)

    return step("near", out, before, asdict(how), workers, do)


def gathered(place: Place, what: str, numbers: Iterable[int]) -> np.ndarray:
    return runs.joined(place.of(what, number) for number in numbers)


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
    dtype = np.dtype([("number", "<i8"), ("signature", "<u4", (how.bins,))])
    made = [np.zeros(0, dtype)]
    for rows in batched(read_part(part)):
        some = np.empty(len(rows), dtype)
        some["number"] = [row.number for row in rows]
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
    """The pairs in the order of the clusters that they would make if all passed: so each document is in about one chunk,
    however many pairs it is in."""
    tied, first = clusters(pairs[:, 0], pairs[:, 1]), pairs[:, 0].copy()
    later, at = runs.among(tied["number"], first)
    first[later] = tied["of"][at]
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0], first))]


def _chunks(place: Place, how: MinHash, pairs: np.ndarray) -> Iterator[np.ndarray]:
    """The pairs in stretches that a worker can hold; one at least. A pair counts as much as a document's signature."""
    wanted = runs.load(place.of("wanted"))
    sizes = how.bins + runs.joined(place.every("spans"), lambda spans: spans["stop"] - spans["start"])
    held, words, start = set[int](), 0, 0
    for i, pair in enumerate(pair for some in _few(pairs) for pair in np.searchsorted(wanted, some).tolist()):
        new = set(pair) - held
        held |= new
        words += how.bins + sum(int(sizes[each]) for each in new)
        if words >= AT_ONCE:
            yield pairs[start : i + 1]
            held, words, start = set(), 0, i + 1
    yield pairs[start:]


def _verify(place: Place, how: MinHash, chunk: tuple[int, np.ndarray]) -> None:
    """True and estimated similarity of these pairs."""
    number, pairs = chunk
    wanted, signatures, grams = np.unique(pairs), dict[int, np.ndarray](), dict[int, np.ndarray]()
    for part in place.parts:
        if len(mine := wanted[_within(wanted, part)]):
            signatures |= _signed(place, part, mine)
            grams |= _hashed(place, part, mine)
    made = [(a, b, jaccard(grams[a], grams[b]), estimate(signatures[a], signatures[b])) for a, b in pairs.tolist()]
    runs.save(place.of("verified", number), np.array(made, dtype=PAIR))


def _within(numbers: np.ndarray, part: Path) -> slice:
    """Where those of sorted numbers are whose documents are in this part."""
    return slice(*np.searchsorted(numbers, [number_of(part) << SHIFT, (number_of(part) + 1) << SHIFT]))


def _hash_grams(place: Place, how: MinHash, part: Path) -> None:
    """The sorted distinct n-grams of those documents of a part that are in a pair, one after another, and where each begins."""
    wanted = runs.load(place.of("wanted"))
    numbers, counts, grams = list[int](), list[int](), [np.zeros(0, "<u8")]
    for rows in batched(rows_of([part], wanted[_within(wanted, part)])):
        found = how.grams.of([row.text for row in rows])
        order = np.lexsort((found.hash, found.text))
        distinct = order[runs.begins(found.text[order], found.hash[order])]
        numbers += [row.number for row in rows]
        counts += np.bincount(found.text[distinct], minlength=len(rows)).tolist()
        grams.append(found.hash[distinct])
    spans = np.empty(len(numbers), SPAN)
    spans["number"], spans["stop"] = numbers, np.cumsum(counts)
    spans["start"] = spans["stop"] - counts
    runs.save(place.of("grams", part), np.concatenate(grams))
    runs.save(place.of("spans", part), spans)


def _hashed(place: Place, part: Path, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """The n-grams of these documents of a part."""
    spans, grams = runs.load(place.of("spans", part)), runs.load(place.of("grams", part))
    found = spans[np.searchsorted(spans["number"], wanted)]
    return {number: np.array(grams[start:stop]) for number, start, stop in found.tolist()}


def _signed(place: Place, part: Path, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Their signatures."""
    signed = runs.load(place.of("signatures", part))
    found = signed[np.searchsorted(signed["number"], wanted)]
    return dict(zip(found["number"].tolist(), found["signature"], strict=True))


def rows_of(parts: Iterable[Path], wanted: np.ndarray) -> Iterator[Row]:
    """Documents by their sorted numbers; only row groups that hold some are read."""
    for part in parts:
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
    copies = runs.load(place.of("copies"))
    of = dict(copies[_within(copies["number"], part)].tolist())
    rows = (Dropped(row, reason, of[row.number]) if row.number in of else row for row in read_part(part))
    write_part(place.folder, number_of(part), rows)


def _evidence(how: MinHash, verified: np.ndarray) -> dict[str, Any]:
    """What the report shows of the pairs: how many, and of some the estimate beside the truth."""
    passed = int((verified["jaccard"] >= how.threshold).sum())
    shown = verified[:: max(1, len(verified) // SHOWN)]
    pairs = [[round(float(each), 4) for each in row] for row in zip(shown["estimate"], shown["jaccard"], strict=True)]
    return {"candidates": len(verified), "passed": passed, "bands": how.bands, "rows": how.rows, "estimate_and_truth": pairs}
