"""The first step: sources to numbered documents with one spelling of what looks alike.

Files are read in the order of the sources and of their names, several small ones in a part, each large one in its own; what a
source is and what is refused there is `data.corpus`'s. A text is put into Unicode's composed form (NFC), its line ends become
line feeds, and control characters go. The price: one file is one worker's, so a corpus in a single file is read by one core.
"""

from __future__ import annotations

import json
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
from ds_pretrain.data.prepare import check_repeated

PART = 32 << 20
"""Bytes of files that one part takes before the next begins."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")


@dataclass(frozen=True)
class Part:
    """What one worker reads. files: none for sources that are no files."""

    number: int
    source: str
    files: tuple[str, ...] = ()


def read(sources: Sequence[str], out: Path, workers: Workers, text_field: str = "text") -> Folder:
    """Sources (see `data.corpus`) to documents."""
    if not sources:
        raise ValueError("no source given: name a file, a folder, datasets:NAME or embedded")
    check_repeated(sources)
    found = parts(sources)
    asked = {"sources": [[part.source, *((file, Path(file).stat().st_size) for file in part.files)] for part in found]}

    def do(work: Work) -> dict[str, Any]:
        reads = partial(_read, work.folder, text_field)
        work.each("parts", found, reads, lambda part: work.kept(part.number))
        return _accounts(work.folder, found)

    return step("read", out, None, {**asked, "text_field": text_field}, workers, do)


def parts(sources: Sequence[str]) -> list[Part]:
    """The sources as units of work: a matter of the files alone."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for source in sources:
        if source.startswith(("embedded", "datasets:")):
            found.append((source, ()))
        else:
            found += [(source, files) for files in _grouped(corpus.list_files(source))]
    return [Part(number, source, files) for number, (source, files) in enumerate(found)]


def _grouped(files: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    group: list[str] = []
    size = 0
    for file in files:
        group.append(str(file))
        size += file.stat().st_size
        if size >= PART:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def normalised(text: str) -> str:
    """One spelling: NFC, line feeds, no control characters but tab and form feed."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def _read(folder: Path, text_field: str, part: Part) -> None:
    quarantine = folder / "quarantine" / f"part-{part.number:05d}.jsonl"
    quarantine.parent.mkdir(exist_ok=True)
    quarantine.unlink(missing_ok=True)  # of an attempt that was stopped
    ledger = Ledger(quarantine)
    write_part(folder, part.number, _rows(part, ledger, text_field), lambda: _account(folder, part, ledger))


def _rows(part: Part, ledger: Ledger, text_field: str) -> Iterator[Row]:
    documents = (
        (each for file in part.files for each in corpus.read_file(Path(file), part.source, ledger, text_field))
        if part.files
        else corpus.read(part.source, ledger, text_field)
    )
    for place, each in enumerate(documents):
        yield Row((part.number << SHIFT) + place, normalised(each.text), each.source, each.file, each.line)


def _account(folder: Path, part: Part, ledger: Ledger) -> None:
    """What the ledger has of a part, beside it until the report is made."""
    content = {"refused": ledger.refused, "inputs": ledger.inputs, "licences": ledger.licences, "notes": ledger.notes}
    (folder / "work").mkdir(exist_ok=True)
    (folder / "work" / f"account-{part.number:05d}.json").write_text(json.dumps(content), encoding="utf-8")


def _accounts(folder: Path, found: Sequence[Part]) -> dict[str, Any]:
    """All of them together. ValueError if a source has no document at all."""
    refused, notes = Counter[str](), list[str]()
    licences, inputs = dict[str, str](), dict[str, str]()
    for part in found:
        told = json.loads((folder / "work" / f"account-{part.number:05d}.json").read_bytes())
        refused.update(told["refused"])
        licences, inputs, notes = licences | told["licences"], inputs | told["inputs"], notes + told["notes"]
    return {"quarantined": dict(refused), "licences": licences, "sha256": inputs, "notes": notes}
