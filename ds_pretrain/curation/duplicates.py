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
import pyarrow.parquet as pq
import xxhash

from ds_pretrain.curation import runs
from ds_pretrain.curation.documents import SHIFT, Dropped, Folder, Row, Work, number_of, read_group, read_part, step, write_part
from ds_pretrain.curation.minhash import MinHash, estimate, jaccard
from ds_pretrain.curation.shingles import batches
from ds_pretrain.curation.workers import Workers

COPY = np.dtype([("number", "<i8"), ("of", "<i8")])
PAIR = np.dtype([("a", "<i8"), ("b", "<i8"), ("jaccard", "<f8"), ("estimate", "<f8")])
AT_ONCE = 20_000
"""Pairs that are compared by one unit of work."""
SHOWN = 2_000
"""Pairs whose estimate and truth go into the report."""


def exact(before: Folder, out: Path, workers: Workers) -> Folder:
    """Drop all but the first of equal documents."""

    def do(work: Work) -> dict[str, Any]:
        paths = Workplace(work)
        work.each("hash", paths.parts, partial(_hash, paths), paths.run)
        count = runs.buckets(paths.runs)
        work.each("compare", range(count), partial(_equal, paths, count), lambda i: paths.of("copies", i))
        return drop(work, paths, "exact copy", gathered(paths, "copies", range(count)))

    return step("exact", out, before, {}, workers, do)


def near(before: Folder, out: Path, workers: Workers, how: MinHash = MinHash()) -> Folder:
    """Drop all but the first of documents that are nearly the same."""

    def do(work: Work) -> dict[str, Any]:
        paths = Workplace(work)
        work.each("sign", paths.parts, partial(_sign, paths, how), paths.run)
        count = runs.buckets(paths.runs)
        work.each("meet", range(count), partial(_meet, paths, count), lambda i: paths.of("pairs", i))
        pairs = runs.distinct(gathered(paths, "pairs", range(count)))
        chunks = list(enumerate(np.array_split(pairs, max(1, -(-len(pairs) // AT_ONCE)))))
        work.each("verify", chunks, partial(_verify, paths, how), lambda chunk: paths.of("verified", chunk[0]))
        verified = gathered(paths, "verified", range(len(chunks)))
        copies = clusters(verified[verified["jaccard"] >= how.threshold])
        return drop(work, paths, "near copy", copies) | _evidence(how, verified)

    return step("near", out, before, asdict(how), workers, do)


class Workplace:
    """Where a step of duplicates keeps its work; goes to every worker."""

    def __init__(self, work: Work) -> None:
        assert work.before
        self.out, self.work, self.parts = work.folder, work.folder / "work", work.before.parts

    def run(self, part: Path) -> Path:
        return self.work / f"run-{part.stem}.npy"

    def signatures(self, part: Path) -> Path:
        return self.work / f"signatures-{part.stem}.npy"

    def of(self, what: str, number: int) -> Path:
        return self.work / f"{what}-{number:05d}.npy"

    @property
    def runs(self) -> list[Path]:
        return [self.run(part) for part in self.parts]


def gathered(paths: Workplace, what: str, numbers: Iterable[int]) -> np.ndarray:
    return np.concatenate([runs.load(paths.of(what, number)) for number in numbers])


def _hash(paths: Workplace, part: Path) -> None:
    numbers, digests = array("q"), bytearray()
    for row in read_part(part):
        numbers.append(row.number)
        digests += xxhash.xxh3_128_digest(" ".join(row.text.split()).encode())
    keys = np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2)
    runs.save(paths.run(part), runs.run(keys[:, 0], keys[:, 1], np.frombuffer(numbers, dtype=np.int64)))


def _equal(paths: Workplace, count: int, number: int) -> None:
    found = runs.copies(runs.bucket(paths.runs, number, count))
    copies = np.empty(len(found), dtype=COPY)
    copies["number"], copies["of"] = found[:, 2], found[:, 0]
    runs.save(paths.of("copies", number), copies)


def _sign(paths: Workplace, how: MinHash, part: Path) -> None:
    """The signatures of a part and the run of their bands' keys. Texts without a unit resemble nothing and have no keys."""
    numbers, signatures = [np.zeros(0, np.int64)], [np.zeros((0, how.bins), np.uint32)]
    for rows in batches(read_part(part), lambda row: len(row.text)):
        numbers.append(np.array([row.number for row in rows], dtype=np.int64))
        signatures.append(how.signatures([row.text for row in rows]))
    number, signature = np.concatenate(numbers), np.concatenate(signatures)
    some = ~(signature == np.iinfo(np.uint32).max).all(axis=1)
    number, signature = number[some], signature[some]
    signed = np.empty(len(number), dtype=[("number", "<i8"), ("signature", "<u4", (how.bins,))])
    signed["number"], signed["signature"] = number, signature
    runs.save(paths.signatures(part), signed)
    band = np.tile(np.arange(how.bands, dtype=np.uint64), len(number))
    runs.save(paths.run(part), runs.run(how.keys(signature).ravel(), band, np.repeat(number, how.bands)))


def _meet(paths: Workplace, count: int, number: int) -> None:
    """Pairs of documents that share a band: each with the first of its group, and with its neighbour."""
    found = runs.copies(runs.bucket(paths.runs, number, count))
    runs.save(paths.of("pairs", number), runs.distinct(np.concatenate([found[:, [0, 2]], found[:, [1, 2]]])))


def _verify(paths: Workplace, how: MinHash, chunk: tuple[int, np.ndarray]) -> None:
    """True and estimated similarity of these pairs."""
    number, pairs = chunk
    wanted = np.unique(pairs)
    grams = dict(_hashed(paths, how, wanted))
    signatures = {int(each["number"]): each["signature"] for part in paths.parts for each in _signed(paths, part, wanted)}
    made = [(a, b, jaccard(grams[a], grams[b]), estimate(signatures[a], signatures[b])) for a, b in pairs.tolist()]
    runs.save(paths.of("verified", number), np.array(made, dtype=PAIR))


def _hashed(paths: Workplace, how: MinHash, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The sorted distinct n-grams of these documents."""
    for rows in batches(rows_of(paths, wanted), lambda row: len(row.text)):
        found = how.grams.of([row.text for row in rows])
        order = np.lexsort((found.hash, found.text))
        text, hashes = found.text[order], found.hash[order]
        once = np.append(True, (text[1:] != text[:-1]) | (hashes[1:] != hashes[:-1]))[: len(text)]
        text, hashes = text[once], hashes[once]
        ends = np.searchsorted(text, np.arange(len(rows) + 1))
        yield from ((row.number, hashes[start:stop]) for row, start, stop in zip(rows, ends, ends[1:], strict=False))


def _signed(paths: Workplace, part: Path, wanted: np.ndarray) -> np.ndarray:
    signed = runs.load(paths.signatures(part))
    return np.array(signed[np.isin(signed["number"], wanted, assume_unique=True)])


def rows_of(paths: Workplace, wanted: np.ndarray) -> Iterator[Row]:
    """Documents by their sorted numbers; only row groups that hold some are read."""
    for part in paths.parts:
        file = pq.ParquetFile(part)
        for group in range(file.num_row_groups):
            span = file.metadata.row_group(group).column(0).statistics
            if span is not None and np.searchsorted(wanted, span.min) < np.searchsorted(wanted, span.max, side="right"):
                low, high = np.searchsorted(wanted, span.min), np.searchsorted(wanted, span.max, side="right")
                mine = set(wanted[low:high].tolist())
                yield from (row for row in read_group(file, group) if row.number in mine)


def clusters(pairs: np.ndarray) -> np.ndarray:
    """Each document that a chain of pairs ties to an earlier one, and the first of its cluster."""
    root: dict[int, int] = {}

    def find(x: int) -> int:
        while (up := root.setdefault(x, x)) != x:
            root[x] = x = root[up]
        return x

    for a, b in zip(pairs["a"].tolist(), pairs["b"].tolist(), strict=True):
        low, high = sorted((find(a), find(b)))
        root[high] = low
    return np.array([(x, find(x)) for x in sorted(root) if find(x) != x], dtype=COPY)


def drop(work: Work, paths: Workplace, reason: str, copies: np.ndarray) -> dict[str, Any]:
    """Write all parts without these copies."""
    runs.save(paths.work / "copies.npy", np.sort(copies, order="number"))
    work.each("write", paths.parts, partial(_without, paths, reason), lambda part: paths.out / "kept" / part.name)
    sizes = Counter(Counter(copies["of"].tolist()).values())
    return {"clusters": {str(size + 1): count for size, count in sorted(sizes.items())}}


def _without(paths: Workplace, reason: str, part: Path) -> None:
    number = number_of(part)
    copies = runs.load(paths.work / "copies.npy")
    low, high = np.searchsorted(copies["number"], [number << SHIFT, (number + 1) << SHIFT])
    of = dict(copies[low:high].tolist())
    rows = (Dropped(row, reason, of[row.number]) if row.number in of else row for row in read_part(part))
    write_part(paths.out, number, rows)


def _evidence(how: MinHash, verified: np.ndarray) -> dict[str, Any]:
    """What the report shows of the pairs: how many, and of some the estimate beside the truth."""
    passed = int((verified["jaccard"] >= how.threshold).sum())
    shown = verified[:: max(1, len(verified) // SHOWN)]
    pairs = [[round(float(each), 4) for each in row] for row in zip(shown["estimate"], shown["jaccard"], strict=True)]
    return {"candidates": len(verified), "passed": passed, "bands": how.bands, "rows": how.rows, "estimate_and_truth": pairs}
