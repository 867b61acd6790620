"""Long passages that other documents have too, such as licence headers: all but the first occurrence are cut out.

A passage is a run of `words` words (case, punctuation and space aside) that occurs again, in another document or the same;
overlapping ones are cut as one. That is ExactSubstr of Lee et al. 2022 (50 tokens) on words and by 64-bit hashes instead of a
suffix array: three walks over the text, 8 bytes on disk per word between them, memory for a part and what is repeated. The
price: a passage that is cut leaves the text before and after it as neighbours, as theirs does, here with a line end between.

    walk 1  the distinct hashes of each part, sorted     -> which occur twice (`runs`)
    walk 2  for each of those the first part that has it
    walk 3  cut what is not the first occurrence
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ds_pretrain.curation import runs
from ds_pretrain.curation.documents import Dropped, Folder, Place, Row, Work, batched, number_of, read_part, step, write_part
from ds_pretrain.curation.shingles import Grams
from ds_pretrain.curation.workers import Workers

WORDS = 50
"""Words of a passage at least."""
SHOWN = 20
"""Passages that the report shows."""
REMEMBERED = 1000
"""Passages of a part among which those that all parts show are found."""
LENGTH = 200
"""Characters that it shows of each."""
ALL = "repeated passages only"


class _Grams(NamedTuple):
    """The n-grams of some documents that have all their words."""

    row: np.ndarray
    """int64 [N]: which document."""
    hash: np.ndarray
    """uint64 [N]"""
    start: np.ndarray
    """int64 [N]: its first byte there."""
    stop: np.ndarray
    """int64 [N]: the byte after its last."""
    reach: np.ndarray
    """int64 [N, 2]: where the word before it ends and the word after it begins, or the ends of the document."""


class _Span(NamedTuple):
    """Bytes of a document, from a word's first to a word's last, and how far it is to the words around them."""

    start: int
    stop: int
    before: int
    after: int

    def lines(self, data: bytes) -> tuple[int, int]:
        """With what is left of the lines that they begin and end in."""
        line, end = data.rfind(b"\n", self.before, self.start), data.find(b"\n", self.stop, self.after)
        start = line if line >= 0 else self.start if self.before else 0
        return start, end if end >= 0 else self.stop if self.after < len(data) else len(data)


def passages(before: Folder, out: Path, workers: Workers, words: int = WORDS) -> Folder:
    """Cut repeated passages out of documents; one of which no word is left is dropped."""
    check(words)

    def do(work: Work) -> dict[str, Any]:
        files = work.place
        work.each("hash", files.parts, partial(_hash, files, words), partial(files.of, "hashes"))
        every = files.every("hashes")
        count = runs.buckets(every)
        work.each("compare", range(count), partial(_repeated, files, every, count), partial(files.of, "repeated"))
        runs.save(files.of("repeated"), runs.joined(files.of("repeated", i) for i in range(count)))
        work.each("locate", files.parts, partial(_locate, files), partial(files.of, "present"))
        _own(files)
        work.write("cut", partial(_cut, files, words))
        return _evidence(work.told())

    return step("passages", out, before, {"words": words}, workers, do)


def check(words: int) -> None:
    """ValueError for passages that would be phrases of the language."""
    if words < 10:
        raise ValueError(f"passages have at least 10 words, got {words}: shorter ones are phrases of the language")


def _grams(rows: list[Row], words: int) -> _Grams:
    grams, raw = Grams(n=words), [row.text.encode() for row in rows]
    units = grams.units([row.text for row in rows])
    found = grams.among(units)
    first = found.first[found.whole]
    last = first + words - 1
    row = units.text[first]
    ends = np.concatenate([[0], units.stop])[first]  # of the word before
    before = np.where(np.concatenate([[-1], units.text])[first] == row, ends, 0)
    begins = np.concatenate([units.start, [0]])[last + 1]
    sizes = np.array([len(each) for each in raw], dtype=np.int64)
    after = np.where(np.concatenate([units.text, [-1]])[last + 1] == row, begins, sizes[row] if len(row) else 0)
    reach = np.stack([before, after], axis=1)
    return _Grams(row, found.hash[found.whole], units.start[first], units.stop[last], reach)


def _hash(files: Place, words: int, part: Path) -> None:
    """The sorted hashes of a part; those that it has twice are there twice."""
    found = [np.zeros(0, np.uint64)]
    for rows in batched(read_part(part)):
        found.append(_grams(rows, words).hash)
    kept, count = np.unique(np.concatenate(found), return_counts=True)
    runs.save(files.of("hashes", part), np.repeat(kept, np.minimum(count, 2)))


def _repeated(files: Place, every: list[Path], count: int, number: int) -> None:
    hashes = runs.bucket(every, number, count)
    runs.save(files.of("repeated", number), runs.once(hashes[1:][hashes[1:] == hashes[:-1]]))


def _locate(files: Place, part: Path) -> None:
    """Which of the repeated passages a part has."""
    _, places = runs.among(runs.load(files.of("repeated")), runs.once(runs.load(files.of("hashes", part))))
    runs.save(files.of("present", part), places)


def _own(files: Place) -> None:
    """For each repeated passage the first part that has it."""
    owner = np.full(len(runs.load(files.of("repeated"))), len(files.parts), dtype=np.int32)
    for number, part in reversed(list(enumerate(files.parts))):
        owner[runs.load(files.of("present", part))] = number
    runs.save(files.of("owner"), owner)


def _cut(files: Place, words: int, part: Path) -> None:
    """Write a part without what occurs earlier."""
    number = files.parts.index(part)
    seen = np.asarray(runs.load(files.of("owner")) != number)  # what an earlier part has; then also what came earlier here
    cut: Counter[str] = Counter()
    rows = (row for group in batched(read_part(part)) for row in _without(group, files, words, seen, cut))
    write_part(files.folder, number_of(part), rows, lambda: {"cut": cut.total(), "often": dict(cut.most_common(REMEMBERED))})


def _without(rows: list[Row], files: Place, words: int, seen: np.ndarray, cut: Counter[str]) -> Iterator[Row | Dropped]:
    found = _grams(rows, words)
    chosen, place = runs.among(runs.load(files.of("repeated")), found.hash)
    _, first = np.unique(place, return_index=True)
    again = seen[place]
    again[np.setdiff1d(np.arange(len(place)), first)] = True
    seen[place] = True
    spans: dict[int, list[_Span]] = {}
    for gram in chosen[again].tolist():
        ends = (int(found.start[gram]), int(found.stop[gram]), *found.reach[gram].tolist())
        spans.setdefault(int(found.row[gram]), []).append(_Span(*ends))
    for number, row in enumerate(rows):
        yield _shortened(row, _joined(spans[number]), cut) if number in spans else row


def _joined(spans: Sequence[_Span]) -> list[_Span]:
    """Stretches in order, those that overlap as one."""
    joined = [spans[0]]
    for span in spans[1:]:
        last = joined[-1]
        if span.start < last.stop:
            joined[-1] = last._replace(stop=span.stop, after=span.after)
        else:
            joined.append(span)
    return joined


def _shortened(row: Row, spans: Sequence[_Span], cut: Counter[str]) -> Row | Dropped:
    """The document without these stretches."""
    data = row.text.encode()
    ends = [span.lines(data) for span in spans]
    cut.update(data[start:stop].decode().strip()[:LENGTH] for start, stop in ends)
    edges = [0, *(edge for pair in ends for edge in pair), len(data)]
    kept = [data[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    text = b"\n".join(kept).decode().strip()
    return replace(row, text=text) if text else Dropped(row, ALL)


def _evidence(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often something was cut, and the beginnings of what was cut most often."""
    often: Counter[str] = Counter()
    for part in told:
        often.update(part["often"])
    return {"cut": sum(part["cut"] for part in told), "passages": [[text, times] for text, times in often.most_common(SHOWN)]}
