"""The first step: sources to numbered documents with one spelling of what looks alike.

Files are read in the order of the sources and of their names, several small ones in a part, each large one in its own; what a
source is and what is refused there is `data.corpus`'s. A text is put into Unicode's composed form (NFC), its line ends become
line feeds, and control characters go. The price: one file is one worker's, so a corpus in a single file is read by one core.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ds_pretrain.curation.documents import SHIFT, Folder, Row, Work, step, write_part
from ds_pretrain.curation.workers import Workers
from ds_pretrain.data import corpus
from ds_pretrain.data.corpus import Ledger
from ds_pretrain.data.prepare import check_repeated, fingerprint

PART = 32 << 20
"""Bytes of files that one part takes before the next begins."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff]")


@dataclass(frozen=True)
class Part:
    """What one worker reads. files: none for sources that are no files."""

    number: int
    source: str
    files: tuple[str, ...] = ()

    def state(self) -> list[Any]:
        """What changes when the files do; of an embedded corpus the version of Python."""
        if not self.files:
            return [fingerprint(self.source)]
        stats = [os.stat(file) for file in self.files]
        return [[corpus.shown_name(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(self.files, stats, strict=True)]


def read(sources: Sequence[str], out: Path, workers: Workers, text_field: str = "text") -> Folder:
    """Sources (see `data.corpus`) to documents."""
    if not sources:
        raise ValueError("no source given: name a file, a folder, datasets:NAME or embedded")
    check_repeated(sources)
    found = parts(sources)
    asked = {"sources": [[part.source, *part.state()] for part in found]}

    def do(work: Work) -> dict[str, Any]:
        reads = partial(_read, work.folder, text_field)
        work.each("parts", found, reads, lambda part: work.kept(part.number))
        return _accounts(work, found)

    return step("read", out, None, {**asked, "text_field": text_field}, workers, do)


def parts(sources: Sequence[str]) -> list[Part]:
    """The sources as units of work: a matter of the files alone."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for source in sources:
        if source.startswith(("embedded", "datasets:")):
            found.append((source, ()))
        else:
            groups = corpus.grouped(corpus.list_files(source), lambda file: file.stat().st_size, PART)
            found += [(source, tuple(map(str, files))) for files in groups]
    return [Part(number, source, files) for number, (source, files) in enumerate(found)]


def normalised(text: str) -> str:
    """One spelling: NFC, line feeds, no control characters but tab and form feed."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def _read(folder: Path, text_field: str, part: Part) -> None:
    quarantine = folder / "quarantine" / f"part-{part.number:05d}.jsonl"
    quarantine.parent.mkdir(exist_ok=True)
    quarantine.unlink(missing_ok=True)  # of an attempt that was stopped
    ledger = Ledger(quarantine)
    before = part.state()

    def tell() -> dict[str, Any]:
        if part.state() != before:
            raise ValueError(f"{part.files[0]} or a file near it changed while it was read: run the same command again")
        kept = ledger.kept.total()
        return {"kept": kept, **{name: getattr(ledger, name) for name in ("refused", "inputs", "licences", "notes")}}

    write_part(folder, part.number, _rows(part, ledger, text_field), tell)


def _rows(part: Part, ledger: Ledger, text_field: str) -> Iterator[Row]:
    documents = (
        (each for file in part.files for each in corpus.read_file(Path(file), part.source, ledger, text_field))
        if part.files
        else corpus.read(part.source, ledger, text_field)
    )
    place = part.number << SHIFT
    for each in documents:
        text, file = normalised(each.text), corpus.shown_name(each.file)
        if text.strip():
            yield Row(place, text, each.source, file, each.line)
            place += 1
        else:
            ledger.kept[each.source] -= 1
            ledger.refuse(file, each.line, "empty", each.text)


def _accounts(work: Work, found: Sequence[Part]) -> dict[str, Any]:
    """What the ledgers of all parts have together. ValueError if a source has no document at all."""
    refused, notes, kept = Counter[str](), list[str](), Counter[str]()
    licences, inputs = dict[str, str](), dict[str, str]()
    for part, told in zip(found, work.told(), strict=True):
        refused.update(told["refused"])
        kept[part.source] += told["kept"]
        licences, inputs, notes = licences | told["licences"], inputs | told["inputs"], notes + told["notes"]
    if empty := [part.source for part in found if not kept[part.source]]:
        raise ValueError(f"no document in {empty[0]} (quarantined: {dict(refused) or 'nothing'}); is the text field right?")
    for source in dict.fromkeys(part.source for part in found if part.files):
        notes += corpus.passed_over(source, corpus.list_files(source))
    return {"quarantined": dict(refused), "licences": licences, "sha256": inputs, "notes": notes}
