"""Sources to a folder that can be trained on: three stores, the tokenizer that made them, and a manifest of it all.

A document goes to train, validation or test by the hash of its text alone, so it stays where it is when the corpus
grows or is reordered, and exact duplicates never lie on both sides. The price: the shares hold on average only, and a
small corpus can leave one split empty, which is refused. The sources are read twice (survey, then write) so that an
empty split or a bad path shows before the long part, and the tokenizer is trained on a sample of the train split: the
documents of lowest hash up to `sample_bytes`, whatever order they come in.

    OUTPUT/{train,validation,test}.{bin,idx,text.npy,json}  tokenizer/  manifest.json  quarantine.jsonl (if need be)
"""

from __future__ import annotations

import heapq
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ds_pretrain.data import corpus
from ds_pretrain.data.corpus import Ledger, SourceText
from ds_pretrain.data.store import SPLITS, Store, StoreWriter, file_digest
from ds_pretrain.data.tokenizer import KINDS, Kind, TextTokenizer

VERSION = 1
BATCH = 4 << 20
"""Bytes of text that are tokenised at once."""


@dataclass(frozen=True)
class Report:
    """What `prepare` made, or found made already.

    splits: documents, tokens, bytes and words by split. quarantined: refused records by reason. notes: what to know.
    reused: whether the output was there before, from the same inputs.
    """

    output: Path
    splits: Mapping[str, Mapping[str, int]]
    vocab_size: int
    quarantined: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reused: bool = False
    seconds: float = 0.0

    def table(self) -> Table:
        """The counts as a table for people."""
        table = Table(title=f"{self.output}{' (up to date, nothing done)' if self.reused else ''}")
        for name in ("split", "documents", "tokens", "bytes", "bytes/token"):
            table.add_column(name, justify="left" if name == "split" else "right")
        for name, row in self.splits.items():
            counts = (f"{row[key]:,}" for key in ("documents", "tokens", "bytes"))
            table.add_row(name, *counts, f"{row['bytes'] / row['tokens']:.2f}")
        lost = ", ".join(f"{reason} {count}" for reason, count in self.quarantined.items())
        table.caption = "\n".join([f"vocabulary {self.vocab_size:,}", *([f"quarantined: {lost}"] if lost else []), *self.notes])
        return table


def list_kinds() -> dict[str, str]:
    """The kinds of tokenizer that can be trained, each with a line about it."""
    return dict(KINDS)


def prepare(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    vocab_size: int = 8192,
    kind: Kind = "bpe",
    tokenizer: str | Path | None = None,
    split: tuple[float, float, float] = (0.98, 0.01, 0.01),
    text_field: str = "text",
    sample_bytes: int = 64 << 20,
    quiet: bool = False,
) -> Report:
    """Tokenise sources (see `corpus`) into OUTPUT, which must not exist unless it came from the same inputs.

    tokenizer: a saved tokenizer to use instead of training one of `vocab_size` and `kind`. split: the shares of train,
    validation and test. sample_bytes: text that the tokenizer is trained on, at most.
    """
    started, output, console = time.perf_counter(), Path(output), Console(quiet=quiet)
    names = [str(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    _check(names, split)
    given = None if tokenizer is None else TextTokenizer.load(tokenizer)
    request = {
        "version": VERSION,
        "sources": names,
        "inputs": {name: fingerprint(name) for name in names},
        "text_field": text_field,
        "split": list(split),
        "tokenizer": {"given": given.digest}
        if given
        else {"kind": kind, "vocab_size": vocab_size, "sample_bytes": sample_bytes},
    }
    if output.exists():
        report = _reuse(output, request)
    else:
        building = output.with_name(f"{output.name}.tmp")
        shutil.rmtree(building, ignore_errors=True)  # left by a run that was killed
        building.mkdir(parents=True)
        try:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
            ) as progress:
                work = _Work(names, text_field, split, building, progress)
                report = work.run(output, request, given, started)
            building.rename(output)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    console.print(report.table())
    return report


def split_of(text: str, shares: Sequence[float]) -> str:
    """The split that a document belongs to: a function of its text and the shares only."""
    where = xxhash.xxh3_64_intdigest(text.encode()) / 2**64
    return SPLITS[0] if where < shares[0] else SPLITS[1] if where < shares[0] + shares[1] else SPLITS[2]


def fingerprint(source: str) -> str:
    """What identifies a source: its files' checksums; a dataset's name; for embedded text the version of Python."""
    if source.startswith("datasets:"):
        return source
    if source.startswith("embedded"):
        return f"{source} python {platform.python_version()}"
    files = corpus.list_files(source)
    return xxhash.xxh3_128_hexdigest(b"".join(os.fsencode(file) + f"\0{file_digest(file)}\n".encode() for file in files))


@dataclass
class _Work:
    """One run: survey, tokenizer, stores, manifest."""

    names: list[str]
    text_field: str
    shares: tuple[float, float, float]
    folder: Path
    progress: Progress

    def run(self, output: Path, request: dict[str, Any], given: TextTokenizer | None, started: float) -> Report:
        ledger = Ledger(self.folder / "quarantine.jsonl")
        wanted = request["tokenizer"]
        documents, sample = self.survey(ledger, 0 if given else wanted["sample_bytes"])
        if given is None:
            self.progress.add_task(f"train {wanted['kind']} on {len(sample):,} documents", total=None)
            given = TextTokenizer.train(iter(sample), wanted["vocab_size"], wanted["kind"])
        given.save(self.folder / "tokenizer")
        self.write(given, ledger, documents)
        splits = {name: Store(self.folder / name, "sizes").info for name in SPLITS}
        counts = {name: {key: info[key] for key in ("documents", "tokens", "bytes", "words")} for name, info in splits.items()}
        kept = ledger.kept.total()
        assert kept == sum(row["documents"] for row in counts.values())
        manifest = {
            "request": request,
            "splits": counts,
            "stores": {name: info["digest"] for name, info in splits.items()},
            "tokenizer": {"digest": given.digest, "size": len(given)},
            "documents": {"read": kept + ledger.refused.total(), "kept": kept},
            "kept_by_source": dict(ledger.kept),
            "quarantined": dict(ledger.refused),
            "licences": ledger.licences,
            "sha256": ledger.inputs,
            "notes": ledger.notes,
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        seconds = time.perf_counter() - started
        return Report(output, counts, len(given), dict(ledger.refused), tuple(ledger.notes), seconds=seconds)

    def survey(self, ledger: Ledger, sample_bytes: int) -> tuple[Counter[str], list[str]]:
        """Count each split, fill the quarantine, and sample the train split: the lowest hashes that fit."""
        count: Counter[str] = Counter()
        heap: list[tuple[int, str]] = []
        room = sample_bytes
        task = self.progress.add_task("read", total=None)
        for document in self.read(ledger):
            name = split_of(document.text, self.shares)
            count[name] += 1
            self.progress.advance(task)
            if name == "train" and sample_bytes:
                heapq.heappush(heap, (-xxhash.xxh3_64_intdigest(document.text.encode(), seed=1), document.text))
                room -= len(document.text.encode())
                while room < 0 and len(heap) > 1:
                    room += len(heapq.heappop(heap)[1].encode())
        self.progress.update(task, total=sum(count.values()))
        for name, share in zip(SPLITS, self.shares, strict=True):
            if not count[name]:
                raise ValueError(_empty(name, share, sum(count.values())))
        return count, [text for _, text in sorted(heap, reverse=True)]

    def write(self, tokenizer: TextTokenizer, ledger: Ledger, documents: Counter[str]) -> None:
        """Tokenise into the three stores. A document without a single token joins the quarantine."""
        task = self.progress.add_task("tokenise", total=sum(documents.values()))
        again: Counter[str] = Counter()
        eod, digest = tokenizer.vocabulary.eod, tokenizer.digest
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    StoreWriter(self.folder / name, vocab_size=len(tokenizer), eod=eod, tokenizer_digest=digest)
                )
                for name in SPLITS
            }
            for batch in corpus.grouped(self.read(Ledger()), lambda document: len(document.text), BATCH):
                texts = [document.text for document in batch]
                for document, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                    name = split_of(document.text, self.shares)
                    again[name] += 1
                    if len(ids):
                        writers[name].add(ids, document.text)
                    else:
                        ledger.refuse(document.file, document.line, "no tokens", document.text)
                        ledger.kept[document.source] -= 1
                self.progress.advance(task, len(batch))
            if again != documents:
                raise ValueError(f"the sources changed while they were read: {dict(documents)}, then {dict(again)}")

    def read(self, ledger: Ledger) -> Iterator[SourceText]:
        for name in self.names:
            yield from corpus.read(name, ledger, self.text_field)


def _check(names: list[str], split: Sequence[float]) -> None:
    if not names:
        raise ValueError("no source given: name a file, a folder, datasets:NAME or embedded")
    check_repeated(names)
    if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
        raise ValueError(f"split must be three shares above 0 that sum to 1 (train, validation, test), got {tuple(split)}")


def check_repeated(names: Sequence[str]) -> None:
    """ValueError if a source is given twice, under whatever spelling of its path."""
    real = Counter(os.path.realpath(name) if os.path.exists(name) else name for name in names)
    if repeated := [name for name, times in real.items() if times > 1]:
        raise ValueError(f"source {repeated[0]} is given twice: every document would be counted twice")


def _empty(name: str, share: float, documents: int) -> str:
    expected = f"{name} is empty: a share of {share:g} of {documents} documents is {share * documents:.2f} on average"
    if documents < 20:
        return f"{expected}. At least 20 documents are needed: add text, or cut it into more documents"
    return f"{expected}. Raise its share to {5 / documents:.2g} or more (split), or add documents"


def _reuse(output: Path, request: Mapping[str, Any]) -> Report:
    """The report of an output that these very inputs made; anything else there is refused."""
    try:
        manifest = json.loads((output / "manifest.json").read_bytes())
        old = manifest["request"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{output} exists and was not made by prepare: choose another output, or remove it") from None
    if changed := [key for key in request if old.get(key) != request[key]]:
        what = ", ".join(f"{key}: {old.get(key)} -> {request[key]}" for key in changed)
        raise ValueError(f"{output} was prepared from other inputs ({what}): choose another output, or remove it")
    for name in SPLITS:
        if Store(output / name).digest != manifest["stores"][name]:
            raise ValueError(f"{output / name} is not the store that manifest.json names: remove {output}")
    if (size := manifest["tokenizer"])["digest"] != TextTokenizer.load(output / "tokenizer").digest:
        raise ValueError(f"{output / 'tokenizer'} is not the tokenizer that manifest.json names: remove {output}")
    notes = tuple(manifest["notes"])
    return Report(output, manifest["splits"], size["size"], manifest["quarantined"], notes, reused=True)
