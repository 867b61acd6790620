"""The last step: documents to a folder that can be trained on, three stores, their tokenizer, and a manifest of it all.

A document goes to train, validation or test by the hash of its text alone, so it stays where it is when the corpus
grows or is reordered, and exact duplicates never lie on both sides. The price: the shares hold on average only, and a
small corpus can leave one split empty, which is refused. The sources are read for their checksums, then for a survey so that
an empty split shows before the long part, and then tokenised; a tokenizer is trained on a sample of the train split, the
documents of lowest hash up to `sample_bytes`, whatever order they come in, which takes one reading more.

Each unit of the sources becomes stores of its own, by whichever worker, and these are copied into one another in order: the
bytes do not depend on who worked, and a run that was stopped goes on. The price: twice the room on disk until it is done, and
44 bytes of memory for each document at the end.

    OUTPUT/{train,validation,test}.{bin,idx,text.npy,json}  tokenizer/  manifest.json  quarantine.jsonl (if need be)
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from ds_pretrain.core.differing import differing
from ds_pretrain.curation.unfinished import unfinished, write_json
from ds_pretrain.curation.workers import Workers
from ds_pretrain.data import corpus
from ds_pretrain.data.corpus import Ledger
from ds_pretrain.data.sources import Unit, account, check_apart, fingerprints, ledger_of, spelled, units
from ds_pretrain.data.store import SPLITS, Store, StoreWriter, file_digest
from ds_pretrain.data.tokenizer import Kind, TextTokenizer, check_kind

VERSION = 1
BATCH = 4 << 20
"""Characters of text that are tokenised at once."""


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
    workers: Workers | None = None,
    quiet: bool = False,
) -> Report:
    """Tokenise sources (see `corpus`) into OUTPUT, which must not exist unless it came from the same inputs.

    tokenizer: a saved tokenizer to use instead of training one of `vocab_size` and `kind`. split: the shares of train,
    validation and test. sample_bytes: text that the tokenizer is trained on, at most. workers: who does it, if not
    this process.
    """
    given_as = [sources] if isinstance(sources, (str, Path)) else sources
    names, output = [spelled(str(source)) for source in given_as], Path(output)
    check(kind, vocab_size, split)
    check_apart(names, output)
    given = None if tokenizer is None else TextTokenizer.load(tokenizer)
    team = workers or Workers(quiet=quiet)
    found = units(names, partial(team.map, "checksums"))
    train = {"kind": kind, "vocab_size": vocab_size, "sample_bytes": sample_bytes}
    request = {
        "version": VERSION,
        "sources": names,
        "inputs": fingerprints(found),
        "text_field": text_field,
        "split": list(split),
        "tokenizer": {"given": given.digest} if given else train,
    }
    if output.exists():
        report = _reuse(output, request)
    else:
        with unfinished(output, request) as folder:
            if not (folder / "manifest.json").exists():
                job = Job(folder, found, Read(text_field, split, 0 if given else sample_bytes), team)
                job.run(job.survey(), given, request)
        report = _report(output)
    Console(quiet=quiet).print(report.table())
    return report


def check(kind: str, vocab_size: int, split: Sequence[float]) -> None:
    """ValueError for a request that no text can meet."""
    check_kind(kind, vocab_size)
    if len(split) != 3 or not min(split) > 0 or not abs(sum(split) - 1) < 1e-6:
        raise ValueError(f"split must be three shares above 0 that sum to 1 (train, validation, test), got {tuple(split)}")


def split_of(text: str, shares: Sequence[float]) -> str:
    """The split that a document belongs to: a function of its text and the shares only."""
    where = xxhash.xxh3_64_intdigest(text.encode()) / 2**64
    return SPLITS[0] if where < shares[0] else SPLITS[1] if where < shares[0] + shares[1] else SPLITS[2]


@dataclass(frozen=True)
class Read:
    """How every worker reads. sample_bytes: text of the train split to train a tokenizer on, at most."""

    text_field: str
    shares: tuple[float, float, float]
    sample_bytes: int


class Survey(NamedTuple):
    """What a first reading finds, in a unit or in all. lowest: uint64 [N, 2], rank and bytes of what trains a tokenizer."""

    ledger: Ledger
    documents: Counter[str]
    lowest: np.ndarray


@dataclass(frozen=True)
class Job:
    """Units of sources to stores in a folder, by these workers."""

    folder: Path
    units: Sequence[Unit]
    read: Read
    team: Workers

    def survey(self) -> Survey:
        """ValueError for a source without a document, and for an empty split."""
        self._each("read", _survey, _surveyed)
        ledgers, documents, lowest = list[Ledger](), Counter[str](), np.zeros((0, 2), np.uint64)
        for unit in self.units:
            found = json.loads(_surveyed(self.folder, unit).read_bytes())
            ledgers.append(ledger_of(found["ledger"]))
            documents.update(found["documents"])
            lowest = _within([lowest, np.array(found["lowest"], np.uint64).reshape(-1, 2)], self.read.sample_bytes)
        try:
            survey = Survey(account(self.units, ledgers), documents, lowest)
            if missing := [name for name in SPLITS if not documents[name]]:
                raise ValueError(_empty(missing[0], self.read.shares, documents.total()))
        except ValueError:
            for unit in self.units:  # so that nothing is left to remove
                _surveyed(self.folder, unit).unlink()
            raise
        return survey

    def run(self, survey: Survey, given: TextTokenizer | None, request: Mapping[str, Any]) -> None:
        """Tokenizer, stores and manifest: what is not there yet."""
        if not (self.folder / "tokenizer" / "specials.json").exists():
            (given or self.trained(survey, **request["tokenizer"])).save(self.folder / "tokenizer")
        tokenizer = TextTokenizer.load(self.folder / "tokenizer")
        self._each("tokenise", _tokenise, _tokenised)
        told = [json.loads(_tokenised(self.folder, unit).read_bytes()) for unit in self.units]
        again = sum((Counter(each["documents"]) for each in told), Counter[str]())
        if again != survey.documents:
            raise ValueError(
                f"the sources changed while they were read: {dict(survey.documents)}, then {dict(again)}. Remove {self.folder} "
                "and run the same command again"
            )
        self.team.here("join", lambda: _joined(self.folder, self.units, tokenizer))
        kept, refused = (sum((Counter(each[what]) for each in told), Counter[str]()) for what in ("kept", "refused"))
        write_json(self.folder / "manifest.json", _manifest(self.folder, survey.ledger, kept, refused, tokenizer, request))

    def _each(self, what: str, work: Callable[[Path, Read, Unit], None], there: Callable[[Path, Unit], Path]) -> None:
        left = [unit for unit in self.units if not there(self.folder, unit).exists()]
        self.team.map(what, partial(work, self.folder, self.read), left)

    def trained(self, survey: Survey, kind: Kind, vocab_size: int, sample_bytes: int) -> TextTokenizer:
        """A tokenizer of the documents of lowest rank that have `sample_bytes` together."""
        found = self.team.map("sample", partial(_sample, self.read, int(survey.lowest[-1, 0])), self.units)
        texts = [text for _, text in sorted(pair for some in found for pair in some)][: len(survey.lowest)]
        train = partial(TextTokenizer.train, iter(texts), vocab_size, kind)
        return self.team.here(f"train {kind} on {len(texts):,} documents", train)


def _survey(folder: Path, read: Read, unit: Unit) -> None:
    """Count each split of a unit, and rank its train split."""
    ledger, documents, ranked = Ledger(), Counter[str](), list[tuple[int, int]]()
    for each in unit.read(ledger, read.text_field):
        name = split_of(each.text, read.shares)
        documents[name] += 1
        if name == "train" and read.sample_bytes:
            ranked.append((rank(each.text), len(each.text.encode())))
    lowest = _within([np.array(ranked, np.uint64).reshape(-1, 2)], read.sample_bytes)
    write_json(_surveyed(folder, unit), {"ledger": vars(ledger), "documents": documents, "lowest": lowest.tolist()})


def rank(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), seed=1)


def _within(ranked: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Those of lowest rank that have at most `size` bytes together; one at least."""
    every = np.concatenate(ranked)
    every = every[np.lexsort((every[:, 1], every[:, 0]))]
    return every[: max(1, int(np.searchsorted(np.cumsum(every[:, 1]), np.uint64(size), side="right")))]


def _sample(read: Read, last: int, unit: Unit) -> list[tuple[int, str]]:
    """Rank and text of the documents of the train split up to this rank."""
    ranked = ((rank(each.text), each.text) for each in unit.read(Ledger(), read.text_field))
    return [(key, text) for key, text in ranked if key <= last and split_of(text, read.shares) == "train"]


def _surveyed(folder: Path, unit: Unit) -> Path:
    """The survey of a unit."""
    return folder / "work" / f"survey-{unit.number}.json"


def _tokenised(folder: Path, unit: Unit) -> Path:
    """The account of a unit; there once its stores are."""
    return folder / "work" / f"unit-{unit.number}.json"


def _shard(folder: Path, name: str, unit: Unit) -> Path:
    return folder / "work" / f"{unit.number}" / name


@cache
def _tokenizer(folder: Path, _digest: str) -> TextTokenizer:
    return TextTokenizer.load(folder)


def _tokenise(folder: Path, read: Read, unit: Unit) -> None:
    """A store of each split that has documents in this unit. A document without a single token joins the quarantine."""
    tokenizer = _tokenizer(folder / "tokenizer", file_digest(folder / "tokenizer" / "specials.json"))
    shutil.rmtree(_shard(folder, "", unit), ignore_errors=True)  # of an attempt that was stopped
    _shard(folder, "", unit).mkdir()
    ledger, documents = Ledger(_shard(folder, "quarantine", unit).with_suffix(".jsonl")), Counter[str]()
    with ExitStack() as stack:
        writers: dict[str, StoreWriter] = {}
        for batch in corpus.grouped(unit.read(ledger, read.text_field), lambda document: len(document.text), BATCH):
            for document, ids in zip(batch, tokenizer.encode_batch([each.text for each in batch]), strict=True):
                name = split_of(document.text, read.shares)
                documents[name] += 1
                if not len(ids):
                    ledger.refuse(document.file, document.line, "no tokens", document.text)
                    ledger.kept[document.source] -= 1
                    continue
                if name not in writers:
                    writers[name] = stack.enter_context(_writer(_shard(folder, name, unit), tokenizer))
                writers[name].add(ids, document.text)
    write_json(_tokenised(folder, unit), {"documents": documents, "kept": ledger.kept, "refused": ledger.refused})


def _writer(prefix: Path, tokenizer: TextTokenizer) -> StoreWriter:
    return StoreWriter(prefix, vocab_size=len(tokenizer), eod=tokenizer.vocabulary.eod, tokenizer_digest=tokenizer.digest)


def _joined(folder: Path, found: Sequence[Unit], tokenizer: TextTokenizer) -> None:
    """The stores of all units as one of each split, and what they refused."""
    for name in SPLITS:
        if (folder / f"{name}.json").exists():
            continue
        with _writer(folder / name, tokenizer) as writer:
            for unit in found:
                if (shard := _shard(folder, name, unit)).with_suffix(".json").exists():
                    writer.extend(Store(shard))
    refused = [path for unit in found if (path := _shard(folder, "quarantine", unit).with_suffix(".jsonl")).exists()]
    if refused:
        with (folder / "quarantine.jsonl").open("wb") as file:
            for path in refused:
                file.write(path.read_bytes())


def _manifest(
    folder: Path,
    survey: Ledger,
    kept: Counter[str],
    refused: Counter[str],
    tokenizer: TextTokenizer,
    request: Mapping[str, Any],
) -> dict[str, Any]:
    splits = {name: Store(folder / name, "sizes").info for name in SPLITS}
    counts = {name: {key: info[key] for key in ("documents", "tokens", "bytes", "words")} for name, info in splits.items()}
    assert kept.total() == sum(row["documents"] for row in counts.values())
    return {
        "request": request,
        "splits": counts,
        "stores": {name: info["digest"] for name, info in splits.items()},
        "tokenizer": {"digest": tokenizer.digest, "size": len(tokenizer)},
        "documents": {"read": kept.total() + refused.total(), "kept": kept.total()},
        "kept_by_source": dict(kept),
        "quarantined": dict(refused),
        "licences": survey.licences,
        "sha256": survey.inputs,
        "notes": survey.notes,
    }


def _report(output: Path, reused: bool = False) -> Report:
    manifest = json.loads((output / "manifest.json").read_bytes())
    size, asked = manifest["tokenizer"]["size"], manifest["request"]["tokenizer"].get("vocab_size")
    notes = [*manifest["notes"], *([f"vocabulary {fewer(asked)}"] if asked and asked != size else [])]
    return Report(output, manifest["splits"], size, manifest["quarantined"], tuple(notes), reused)


def fewer(asked: int) -> str:
    """Why a vocabulary is smaller than asked for."""
    return f"not {asked:,}: the text has no more that repeats"


def _empty(name: str, shares: Sequence[float], documents: int) -> str:
    share = shares[SPLITS.index(name)]
    expected = f"too few documents: {name} is empty, as {share:g} of {documents} are {share * documents:.2f} on average"
    if documents < 20:
        return (
            f"{expected}. Add text, or cut it into more documents: 20 are the least, {5 / share:,.0f} enough for these shares"
        )
    raised = ",".join(f"{each:g}" for each in _raised(shares, documents))
    return f"{expected}. Ask for --split {raised}, or give {5 / share:,.0f} documents"


def _raised(shares: Sequence[float], documents: int) -> list[float]:
    """Shares of which each has 5 documents on average (it is empty once in 150), the rest taken from the largest."""
    found = [max(round(each, 4), math.ceil(500 / documents) / 100) for each in shares]
    found[found.index(max(found))] -= sum(found) - 1
    return found


def _reuse(output: Path, request: Mapping[str, Any]) -> Report:
    """The report of an output that these very inputs made; anything else there is refused."""
    try:
        manifest = json.loads((output / "manifest.json").read_bytes())
        old = manifest["request"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{output} exists and was not made by prepare: choose another output, or remove it") from None
    if old != request:
        what = differing(old, request)
        raise ValueError(f"{output} was prepared from other inputs ({what}): choose another output, or remove it")
    for name in SPLITS:
        if Store(output / name).digest != manifest["stores"][name]:
            raise ValueError(f"{output / name} is not the store that manifest.json names: remove {output}")
    if manifest["tokenizer"]["digest"] != TextTokenizer.load(output / "tokenizer").digest:
        raise ValueError(f"{output / 'tokenizer'} is not the tokenizer that manifest.json names: remove {output}")
    return _report(output, reused=True)
