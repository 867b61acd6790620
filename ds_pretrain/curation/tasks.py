"""Tasks to hold models against, from text that they were not trained on: of a prepared folder, one split's documents.

A passage is a few lines that follow one another. `passages.tsv` says which file each is from, for `ds-pretrain probe`;
`cloze.jsonl` asks for the last word of each, as LAMBADA does (Paperno et al. 2016), for lm-eval
(ds_configs/lm_eval/cloze.yaml).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ds_pretrain.core.files import whole
from ds_pretrain.core.registry import unknown
from ds_pretrain.curation.prepare import split_of
from ds_pretrain.data.corpus import Ledger
from ds_pretrain.data.sources import fingerprints, units
from ds_pretrain.data.store import SPLITS

LINES, WORDS = 6, 20
"""Lines of a passage at most, and words at least."""
LEAST = 20
"""Passages of a file that is one of the classes."""
CLOZE = re.compile(r"(?P<context>.*\S) (?P<word>[^\W\d_]{3,})\W*", re.DOTALL)
"""A passage that ends in a word of letters, which is asked for."""


class Passage(NamedTuple):
    """Words of a document, and the file that it is from."""

    file: str
    text: str


class Tasks(NamedTuple):
    """What was written, 0 where there is no such task. majority: the share of the most frequent class."""

    passages: int
    classes: int
    majority: float
    cloze: int


def make(prepared: str | Path, output: str | Path, split: str = "test", least: int = LEAST) -> Tasks:
    """Write OUTPUT/passages.tsv and OUTPUT/cloze.jsonl from the sources that a folder was prepared from.

    least: passages of a file that is a class; without two such files there is no passages.tsv. ValueError if the sources are no
    longer what was prepared, or too few for any task.
    """
    found = list(dict.fromkeys(_passages(_texts(Path(prepared), split))))
    counts = Counter(passage.file for passage in found)
    labelled = [passage for passage in found if counts[passage.file] >= least]
    asked = [match.groupdict() for passage in found if (match := CLOZE.fullmatch(passage.text))]
    classes = {passage.file for passage in labelled}
    if not asked:
        raise ValueError(
            f"the {split} split of {prepared} has {len(found)} passages, none of which ends in a word: "
            "prepare it with a larger share for this split (--split 0.9,0.05,0.05)"
        )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "cloze.jsonl", [json.dumps(each, ensure_ascii=False) for each in asked])
    if len(classes) < 2:
        (folder / "passages.tsv").unlink(missing_ok=True)
        return Tasks(0, len(classes), 0.0, len(asked))
    _write(folder / "passages.tsv", [f"{passage.text}\t{passage.file}" for passage in labelled])
    return Tasks(len(labelled), len(classes), max(map(counts.__getitem__, classes)) / len(labelled), len(asked))


def _texts(prepared: Path, split: str) -> Iterator[tuple[str, str]]:
    """File and text of each document of a split."""
    if split not in SPLITS[1:]:
        raise ValueError(unknown("split that is held out", split, SPLITS[1:]))
    path = prepared / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a folder that ds-pretrain prepare wrote")
    request: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["request"]
    parts = units(request["sources"])
    if changed := [name for name, mark in fingerprints(parts).items() if mark != request["inputs"][name]]:
        raise ValueError(f"{changed[0]} has changed since {prepared} was prepared from it: prepare it again")
    for part in parts:
        for document in part.read(Ledger(), request["text_field"]):
            if split_of(document.text, request["split"]) == split:
                yield document.file, document.text


def _passages(texts: Iterator[tuple[str, str]]) -> Iterator[Passage]:
    for file, text in texts:
        lines = [words for line in text.splitlines() if (words := line.split())]
        for start in range(0, len(lines), LINES):
            words = [word for line in lines[start : start + LINES] for word in line]
            if len(words) >= WORDS:
                yield Passage(file, " ".join(words))


def _write(path: Path, lines: Sequence[str]) -> None:
    with whole(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
