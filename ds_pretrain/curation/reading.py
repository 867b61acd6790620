"""The first step: sources to numbered documents with one spelling of what looks alike.

What a source is and what is refused there is `data.corpus`'s, who reads what is `data.sources`'s. A text is put into Unicode's
composed form (NFC), its line ends become line feeds, and control characters go.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ds_pretrain.core.files import beside
from ds_pretrain.curation.documents import ROLLS, SHIFT, Folder, Row, Work, step, write_part
from ds_pretrain.curation.unfinished import write_json
from ds_pretrain.curation.workers import Workers
from ds_pretrain.data import corpus
from ds_pretrain.data.corpus import Ledger, SourceText
from ds_pretrain.data.sources import Unit, account, check_apart, ledger_of, units

PART = 32 << 20
"""Bytes of text that one part takes before the next begins."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff]")


def read(sources: Sequence[str], out: Path, workers: Workers, text_field: str = "text") -> Folder:
    """Sources (see `data.corpus`) to documents."""
    check_apart(sources, out)
    found = units(sources, partial(workers.map, "read: checksums"))
    asked = {"files": [each for unit in found for each in unit.identity], "text_field": text_field}

    def do(work: Work) -> dict[str, Any]:
        work.each("read", found, partial(_read, work.folder, text_field), partial(_whole, work.folder))
        return _accounts(work, found)

    return step("read", out, None, asked, workers, do)


def normalised(text: str) -> str:
    """One spelling: NFC, line feeds, no control characters but tab and form feed."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def _whole(folder: Path, unit: Unit) -> Path:
    """What says that all parts of a unit are there: the account of its reading."""
    return folder / "work" / f"unit-{unit.number:05d}.json"


def _read(folder: Path, text_field: str, unit: Unit) -> None:
    quarantine = folder / "quarantine" / f"part-{unit.number:06d}.jsonl"
    quarantine.parent.mkdir(exist_ok=True)
    beside(quarantine).unlink(missing_ok=True)
    ledger = Ledger(beside(quarantine))
    documents = _normalised(unit, ledger, text_field)
    for roll, some in enumerate(_rolled(documents)):
        if roll == ROLLS:
            raise ValueError(
                f"{unit.files[0] if unit.files else unit.source} has over {ROLLS * PART:,} bytes of text: cut it up"
            )
        number = unit.number * ROLLS + roll
        write_part(folder, number, _rows(some, number << SHIFT))
    if beside(quarantine).exists():
        beside(quarantine).replace(quarantine)
    write_json(_whole(folder, unit), vars(ledger) | {"quarantine": None})


def _normalised(unit: Unit, ledger: Ledger, text_field: str) -> Iterator[SourceText]:
    for each in unit.read(ledger, text_field):
        text = normalised(each.text)
        if text.strip():
            yield replace(each, text=text)
        else:
            ledger.kept[each.source] -= 1
            ledger.refuse(each.file, each.line, "empty", each.text)


def _rolled(documents: Iterator[SourceText]) -> Iterator[Iterator[SourceText]]:
    """Documents as they come, in stretches of `PART` bytes of text; one stretch at least."""

    def stretch(first: list[SourceText]) -> Iterator[SourceText]:
        held = 0
        for each in chain(first, documents):
            yield each
            held += len(each.text.encode())
            if held >= PART:
                return

    yield stretch([])
    while following := list(islice(documents, 1)):
        yield stretch(following)


def _rows(documents: Iterator[SourceText], first: int) -> Iterator[Row]:
    for place, each in enumerate(documents):
        yield Row(first + place, each.text, each.source, corpus.shown_name(each.file), each.line)


def _accounts(work: Work, found: Sequence[Unit]) -> dict[str, Any]:
    """What the ledgers of all units have together."""
    ledger = account(found, [ledger_of(json.loads(_whole(work.folder, unit).read_bytes())) for unit in found])
    return {
        "quarantined": dict(ledger.refused), "licences": ledger.licences, "sha256": ledger.inputs, "notes": ledger.notes
    }  # fmt: skip
