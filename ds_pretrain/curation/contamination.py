"""Documents that share text with what a model will be tested on go.

A document is contaminated if it has an n-gram of words (13, as in GPT-3: Brown et al. 2020, appendix C) in common with any text
of the benchmark, case and punctuation aside. Shorter texts of the benchmark find nothing and are counted: a test of short
questions needs fewer words. The benchmark's n-grams are held in memory, 8 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ds_pretrain.curation import runs
from ds_pretrain.curation.documents import Dropped, Folder, Row, Work, batched, number_of, read_part, step, write_part
from ds_pretrain.curation.reading import normalised
from ds_pretrain.curation.shingles import Grams, batches
from ds_pretrain.curation.workers import Workers
from ds_pretrain.data import corpus
from ds_pretrain.data.sources import fingerprint

WORDS = 13


def decontaminate(before: Folder, out: Path, workers: Workers, against: Sequence[str], words: int = WORDS) -> Folder:
    """Drop what shares `words` words in a row with these sources (see `data.corpus`)."""
    if not against:
        raise ValueError("no benchmark given to clean the documents of: name its files")
    grams = Grams(n=words)

    def do(work: Work) -> dict[str, Any]:
        known, short = _known(against, grams)
        if not len(known):
            raise ValueError(
                f"no text of {', '.join(against)} has {words} words, so nothing can be found by them: ask for fewer"
            )
        path = work.place.of("known")
        runs.save(path, known)
        work.write("clean", partial(_clean, work.folder, path, grams))
        return {"benchmark_ngrams": len(known), "benchmark_too_short": short}

    asked = {"against": {name: fingerprint(name) for name in against}, "words": words}
    return step("decontaminate", out, before, asked, workers, do)


def _known(sources: Sequence[str], grams: Grams) -> tuple[np.ndarray, int]:
    """The sorted n-grams of the benchmark, and how many of its texts are too short for one."""
    texts = (normalised(each.text) for source in sources for each in corpus.read(source))
    found = [grams.of(group) for group in batches(texts)]
    return np.unique(np.concatenate([each.hash[each.whole] for each in found])), sum(int((~each.whole).sum()) for each in found)


def _clean(folder: Path, known: Path, grams: Grams, part: Path) -> None:
    write_part(folder, number_of(part), _cleaned(part, runs.load(known), grams))


def _cleaned(part: Path, known: np.ndarray, grams: Grams) -> Iterator[Row | Dropped]:
    for rows in batched(read_part(part)):
        found = grams.of([row.text for row in rows])
        chosen, _ = runs.among(known, found.hash[found.whole])
        dirty = set(found.text[found.whole][chosen].tolist())
        for number, row in enumerate(rows):
            yield Dropped(row, "contaminated") if number in dirty else row
