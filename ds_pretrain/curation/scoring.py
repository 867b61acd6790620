"""Documents that a language model finds too strange, or too easy, go (the idea of CCNet, Wenzek et al. 2020).

A document's score is its bits per byte under a model: high for word salad and other languages, low for lists and boilerplate.
CCNet cuts at percentiles of each language; here the bounds are given, and a first run without any tells the quantiles to choose
from. Every score is kept (STEP/scores). The price: a model likes what it was trained on, so text that is good and unlike that
goes too; look at what was dropped. Who makes the scores is no matter of this room: a picklable factory of them is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ds_pretrain.curation import runs
from ds_pretrain.curation.documents import Dropped, Folder, Row, Work, batched, number_of, read_part, step, write_part
from ds_pretrain.curation.workers import Workers, one_thread

Scorer = Callable[[Sequence[str]], list[float]]
"""The bits per byte of each text; the same for the same texts, whoever asks."""
SCORE = np.dtype([("number", "<i8"), ("bits_per_byte", "<f8")])
QUANTILES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)


def perplexity(
    before: Folder,
    out: Path,
    workers: Workers,
    scorer: Callable[[], Scorer],
    most: float | None = None,
    least: float | None = None,
) -> Folder:
    """Drop documents of more than `most` or fewer than `least` bits per byte. scorer: picklable; its `repr` says which model it
    is, the same in every process, as the step is known by it."""
    check(most, least)
    assert " at 0x" not in repr(scorer), f"{scorer!r} does not say what it is"
    asked = {"scorer": repr(scorer), "most": most, "least": least}

    def do(work: Work) -> dict[str, Any]:
        scored = [_scores(work.folder, part) for part in before.parts]
        work.each("score", before.parts, partial(_score, work.folder, scorer), partial(_scores, work.folder))
        work.write("write", partial(_cut, work.folder, most, least))
        bits = runs.joined(scored, lambda scores: scores["bits_per_byte"])
        kept = ~(_over(bits, most) | _under(bits, least))
        return {"bits_per_byte": {"before": _quantiles(bits), "after": _quantiles(bits[kept])}}

    return step("perplexity", out, before, asked, workers, do)


def check(most: float | None, least: float | None) -> None:
    """ValueError for bounds that nothing or nobody can meet."""
    for name, bound in (("most", most), ("least", least)):
        if bound is not None and not 0 < bound < float("inf"):
            raise ValueError(f"{name} is a number of bits per byte above 0, got {bound}")
    if most is not None and least is not None and most <= least:
        raise ValueError(f"least {least} must be below most {most} bits per byte: nothing would be kept")


def _scores(folder: Path, part: Path) -> Path:
    return folder / "scores" / f"{part.stem}.npy"


def _score(folder: Path, scorer: Callable[[], Scorer], part: Path) -> None:
    found = list[tuple[int, float]]()
    with one_thread():
        score = scorer()
        for rows in batched(read_part(part)):
            found += zip([row.number for row in rows], score([row.text for row in rows]), strict=True)
    scores = np.array(found, dtype=SCORE)
    if strange := scores["number"][~np.isfinite(scores["bits_per_byte"])].tolist():
        raise ValueError(f"{scorer!r} gives document {strange[0]} of {part} no finite score: was its training sound?")
    runs.save(_scores(folder, part), scores)


def _over(bits: np.ndarray, most: float | None) -> np.ndarray:
    return np.zeros(len(bits), dtype=bool) if most is None else bits > most


def _under(bits: np.ndarray, least: float | None) -> np.ndarray:
    return np.zeros(len(bits), dtype=bool) if least is None else bits < least


def _cut(folder: Path, most: float | None, least: float | None, part: Path) -> None:
    bits = runs.load(_scores(folder, part))["bits_per_byte"]
    write_part(folder, number_of(part), _judged(read_part(part), _over(bits, most), _under(bits, least)))


def _judged(rows: Iterator[Row], over: np.ndarray, under: np.ndarray) -> Iterator[Row | Dropped]:
    for row, high, low in zip(rows, over.tolist(), under.tolist(), strict=True):
        reason = "perplexity/too_high" if high else "perplexity/too_low" if low else ""
        yield Dropped(row, reason) if reason else row


def _quantiles(bits: np.ndarray) -> dict[str, float]:
    return {f"{share:.0%}": round(float(np.quantile(bits, share)), 4) for share in QUANTILES if len(bits)}
