"""Sources as units of work: what one worker reads at a time, and how to tell that it is still the same.

Files are taken in the order of the sources and of their names, several small ones in a unit, each large one in its own. A file
is known by its size and the checksum of all its bytes, so that one which was touched, copied or moved between disks is the same
and one in which a byte changed is not. The price: one file is one worker's, so a corpus in a single file is read by one core;
and whoever asks for something that is there already waits until the sources have been read once, at the speed of the disk.
"""

from __future__ import annotations

import os
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ds_pretrain.data import corpus
from ds_pretrain.data.corpus import Ledger, SourceText
from ds_pretrain.data.store import file_digest

UNIT = 32 << 20
"""Bytes of files that one unit takes before the next begins."""


class State(NamedTuple):
    """A file as it was. changed: when it was written to last, in nanoseconds; since then it has these bytes."""

    size: int
    changed: int
    digest: str

    @classmethod
    def of(cls, file: str) -> State:
        stat = os.stat(file)
        return cls(stat.st_size, stat.st_mtime_ns, file_digest(file))

    def holds(self, file: str) -> bool:
        """Whether the file still has these bytes; read again only where its time of change is another."""
        stat = os.stat(file)
        return stat.st_size == self.size and (stat.st_mtime_ns == self.changed or file_digest(file) == self.digest)


@dataclass(frozen=True)
class Unit:
    """What one worker reads. files: none for sources that are no files."""

    number: int
    source: str
    files: tuple[str, ...] = ()
    states: tuple[State, ...] = ()
    """Of the files, when their checksums were taken."""

    def seen(self) -> Unit:
        """With the files' states as they are now: reads every byte."""
        return replace(self, states=tuple(map(State.of, self.files)))

    @property
    def identity(self) -> list[tuple[str | int, ...]]:
        """What it is that is read, whenever and by whomever: of each file its name, size and checksum."""
        if not self.files:
            return [(_named(self.source), self.number, self.source)]
        pairs = zip(self.files, self.states, strict=True)
        return [(corpus.shown_name(file), state.size, state.digest, self.number, self.source) for file, state in pairs]

    def read(self, ledger: Ledger, text_field: str = "text") -> Iterator[SourceText]:
        """The documents. ValueError if the files are not, or no more when all are read, what they were when they were seen."""
        self._check()
        if self.files:
            for file in self.files:
                yield from corpus.read_file(Path(file), self.source, ledger, text_field)
        else:
            yield from corpus.read(self.source, ledger, text_field)
        self._check()

    def _check(self) -> None:
        for file, state in zip(self.files, self.states, strict=True):
            if not state.holds(file):
                raise ValueError(f"{file} changed while it was read: remove what is unfinished and run the same command again")


def units(sources: Sequence[str], each: Callable[[Callable[[Unit], Unit], Sequence[Unit]], Iterable[Unit]] = map) -> list[Unit]:
    """The units of these sources: a matter of the files alone. each: takes the checksums of all, where others have to do it.

    ValueError for no source, or one that is given twice.
    """
    if not sources:
        raise ValueError("no source given: name a file, a folder, datasets:NAME or embedded")
    check_repeated(sources)
    found, seen = list[tuple[str, tuple[str, ...]]](), dict[str, str]()
    for source in map(spelled, sources):
        if not is_path(source):
            found.append((source, ()))
            continue
        files = corpus.list_files(source)
        for file in files:
            if (real := os.path.realpath(file)) in seen:
                raise ValueError(f"{file} of {source} was read as {seen[real]}: every document would be counted twice")
            seen[real] = f"{file} of {source}"
        groups = corpus.grouped(files, lambda file: file.stat().st_size, UNIT)
        found += [(source, tuple(map(str, group))) for group in groups]
    return list(each(Unit.seen, [Unit(number, source, files) for number, (source, files) in enumerate(found)]))


def spelled(source: str) -> str:
    """A source in the one spelling that it is known by: `./texts/` is `texts`."""
    return str(Path(source)) if is_path(source) else source


def is_path(source: str) -> bool:
    """Whether a source is a file or a folder, and not a name."""
    return not source.startswith(("embedded", "datasets:"))


def check_apart(sources: Sequence[str], output: Path) -> None:
    """ValueError if what is made would lie among what is read."""
    for source in sources:
        folder = corpus.fixed(source)
        if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{output} lies inside of the source {source}, and would be read as one: choose another folder")


def check_repeated(names: Sequence[str]) -> None:
    """ValueError if a source is given twice, under whatever spelling of its path."""
    real = Counter(os.path.realpath(name) if os.path.exists(name) else name for name in names)
    if repeated := [name for name, times in real.items() if times > 1]:
        raise ValueError(f"source {repeated[0]} is given twice: every document would be counted twice")


def fingerprint(source: str) -> str:
    """What identifies a source: its files' checksums; a dataset's name; for embedded text the version of Python."""
    files = tuple(map(str, corpus.list_files(source))) if is_path(source) else ()
    return fingerprints([Unit(0, source, files).seen()])[source]


def fingerprints(units: Sequence[Unit]) -> dict[str, str]:
    """What identifies each source of these units."""
    digests = defaultdict[str, xxhash.xxh3_128](xxhash.xxh3_128)
    for unit in units:
        for file, state in zip(unit.files, unit.states, strict=True):
            digests[unit.source].update(os.fsencode(file) + f"\0{state.digest}\n".encode())
    return {name: digests[name].hexdigest() if name in digests else _named(name) for name in _sources(units)}


def _named(source: str) -> str:
    """What a source that is no file is known by."""
    return f"{source} python {platform.python_version()}" if source.startswith("embedded") else source


def _sources(units: Sequence[Unit]) -> list[str]:
    return list(dict.fromkeys(unit.source for unit in units))


def ledger_of(told: Mapping[str, Any]) -> Ledger:
    """A ledger from what JSON made of it."""
    return Ledger(**{**told, "kept": Counter(told["kept"]), "refused": Counter(told["refused"])})


def account(units: Sequence[Unit], ledgers: Sequence[Ledger]) -> Ledger:
    """The account of the reading of all units. ValueError if a source gave no document at all."""
    found = Ledger()
    for each in ledgers:
        found.kept.update(each.kept)
        found.refused.update(each.refused)
        found.inputs |= each.inputs
        found.licences |= each.licences
        found.notes += each.notes
    for source in _sources(units):
        mine = [(unit, ledger) for unit, ledger in zip(units, ledgers, strict=True) if unit.source == source]
        if not any(ledger.kept.total() for _, ledger in mine):
            refused = sum((ledger.refused for _, ledger in mine), Counter[str]())
            told = ", ".join(f"{reason}: {count}" for reason, count in refused.items()) or "nothing"
            raise ValueError(f"no document in {source} (quarantined: {told}); is the text field right?")
        if mine[0][0].files:
            found.notes += corpus.passed_over(source, corpus.list_files(source))
    return found
