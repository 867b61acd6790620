"""Documents between two steps: a folder of parquet parts, and the step that made it.

Every step of the chain turns a folder into a folder, part by part, so each also runs alone, can be looked into with any
parquet tool, and goes on where it was stopped:

    STEP/kept/part-000000.parquet     what goes on, with a document's number, text and origin
    STEP/dropped/part-000000.parquet  what does not, and why
    STEP/report.json                  counts, what was asked for, and digests of all of it; written last

Until the report is written the folder is called STEP.unfinished. A part is written under another name first, so one that is
there is whole, and holds at most some 32 MB of text, so that a step may hold one in memory: a larger file becomes part-000000,
part-000000_00001 and so on; its pages have checksums. The price: text is copied by every step (zstd makes that a third of its
size), and the process that leads holds a few numbers for each copy that is found, a kilobyte for each part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ds_pretrain.core.files import beside, sync
from ds_pretrain.curation.shingles import batches
from ds_pretrain.curation.unfinished import otherwise, unfinished, write_json
from ds_pretrain.curation.workers import Workers

VERSION = 5
ROW_GROUP = 8 << 20
"""Characters of text that are in memory at once."""
SHIFT = 28
"""Bits of a document's number that count inside its part."""
ROLLS = 1 << 14
"""Parts that one unit of the sources may become."""
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Row:
    """One document on its way. number: part * 2^28 + place, the same for ever. line: where it began in its file."""

    number: int
    text: str
    source: str
    file: str
    line: int
    language: str = ""
    tier: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that goes no further. of: the number of the one that is kept instead, if it is a copy; -1 otherwise."""

    row: Row
    reason: str
    of: int = -1


_COLUMNS = [
    ("number", pa.int64()), ("text", pa.large_string()), ("source", pa.string()), ("file", pa.string()), ("line", pa.int64()),
    ("language", pa.string()), ("tier", pa.string()),
]  # fmt: skip
KEPT = pa.schema(_COLUMNS)
DROPPED = pa.schema([*_COLUMNS, ("reason", pa.string()), ("of", pa.int64())])


class _Table:
    """A parquet file in the making; takes its name when the block ends well."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self._rows: list[tuple[Any, ...]] = []
        self._size = 0

    def __enter__(self) -> _Table:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._beside = beside(self.path)
        self._file = pq.ParquetWriter(self._beside, self.schema, compression="zstd", write_page_checksum=True)
        return self

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        self._size += len(row[1])
        if self._size >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self.schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self._rows, self._size = [], 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
            self._file.close()
            if kind is None:
                sync(self._beside)
                self._beside.replace(self.path)
        finally:
            self._beside.unlink(missing_ok=True)


def write_part(folder: Path, part: int, rows: Iterable[Row | Dropped], tell: Callable[[], Mapping[str, Any]] = dict) -> None:
    """The files of one part; `kept` takes its name last, so that a part which has one is whole. tell: asked when all rows are
    written for what the step's report needs of the part (`Work.told`)."""
    with ExitStack() as stack:
        kept = stack.enter_context(_Table(folder / "kept" / part_name(part), KEPT))
        dropped = stack.enter_context(_Table(folder / "dropped" / part_name(part), DROPPED))
        for row in rows:
            if isinstance(row, Row):
                kept.add(_fields(row))
            else:
                dropped.add((*_fields(row.row), row.reason, row.of))
        write_json(_told(folder, part), tell())


def _told(folder: Path, part: int) -> Path:
    return folder / "work" / f"told-{part}.json"


def _fields(row: Row) -> tuple[Any, ...]:
    return (row.number, row.text, row.source, row.file, row.line, row.language, row.tier)


def part_name(number: int) -> str:
    """The file of a part: a unit of the sources is one, or several if it is large."""
    unit, roll = divmod(number, ROLLS)
    return f"part-{unit:06d}_{roll:05d}.parquet" if roll else f"part-{unit:06d}.parquet"  # in this order by name too


def number_of(part: Path) -> int:
    """The number of a part, by its file."""
    unit, _, roll = part.stem.removeprefix("part-").partition("_")
    return int(unit) * ROLLS + int(roll or 0)


def read_part(path: Path) -> Iterator[Row]:
    """The documents of one kept part, a row group at a time."""
    file = opened(path)
    for group in range(file.num_row_groups):
        yield from read_group(path, file, group)


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    """ValueError, with its name, for a part that is damaged."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove its step's folder and run the step again") from error


def opened(path: Path) -> pq.ParquetFile:
    """A part, whose checksums are compared as it is read."""
    with _intact(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if not any(file.schema_arrow.equals(schema) for schema in (KEPT, DROPPED)):  # the footer has no checksum
            raise pa.ArrowInvalid(f"its columns are {', '.join(file.schema_arrow.names)}")
        return file


def batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Documents in groups whose texts are hashed or scored at once."""
    return batches(rows, lambda row: len(row.text))


def _columns(path: Path, file: pq.ParquetFile, group: int) -> dict[str, list[Any]]:
    with _intact(path):
        return file.read_row_group(group, use_threads=False).to_pydict()  # there is a worker for each core


def read_group(path: Path, file: pq.ParquetFile, group: int) -> list[Row]:
    """The documents of one row group of an opened part."""
    columns = _columns(path, file, group)
    return [Row(*values) for values in zip(*(columns[name] for name, _ in _COLUMNS), strict=True)]


@dataclass(frozen=True)
class Folder:
    """What a finished step left."""

    path: Path

    @property
    def parts(self) -> list[Path]:
        return sorted((self.path / "kept").glob("part-*.parquet"), key=number_of)

    @property
    def report(self) -> dict[str, Any]:
        """The report. ValueError where there is none, or the parts are not those that it counted."""
        try:
            report = json.loads((self.path / "report.json").read_bytes())
            wanted, _ = report["files"], report["request"]
        except (OSError, ValueError, KeyError, TypeError):
            unfinished = self.path.with_name(self.path.name + ".unfinished").exists()
            hint = "its step was stopped: run it again, it goes on" if unfinished else "expected what a step has made"
            raise ValueError(f"{self.path} holds no finished documents ({hint})") from None
        if (there := _sizes(self.path)) != wanted:
            wrong = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
            raise ValueError(
                f"{self.path / 'kept'} is not what its report.json counts ({wrong[0]} has {there.get(wrong[0], 'no')} bytes "
                f"instead of {wanted.get(wrong[0], 'none')}): remove {self.path} and run its step again"
            )
        return report

    def filled(self) -> dict[str, Any]:
        """The report. ValueError, too, where no document is left to go on with."""
        report = self.report
        if not report["documents"]:
            reason, count = next(iter(report["dropped"].items()), ("nothing", 0))
            raise ValueError(
                f"too few documents: none is left in {self.path}. Its step {report['request']['step']} dropped "
                f"{sum(report['dropped'].values()):,}, most often for {reason} ({count:,}): ask it for less, or add text"
            )
        return report

    def rows(self) -> Iterator[Row]:
        for path in self.parts:
            yield from read_part(path)

    def dropped(self) -> Iterator[Dropped]:
        for path in sorted((self.path / "dropped").glob("part-*.parquet"), key=number_of):
            yield from read_dropped(path)


def read_dropped(path: Path) -> Iterator[Dropped]:
    """The documents of one dropped part, a row group at a time."""
    file = opened(path)
    for group in range(file.num_row_groups):
        yield from _dropped(_columns(path, file, group))


def _dropped(columns: Mapping[str, list[Any]]) -> Iterator[Dropped]:
    rows = zip(*(columns[name] for name, _ in _COLUMNS), strict=True)
    for values, reason, of in zip(rows, columns["reason"], columns["of"], strict=True):
        yield Dropped(Row(*values), reason, of)


@dataclass(frozen=True)
class Work:
    """A step at work on its folder. before: what it reads; None where it reads sources."""

    name: str
    folder: Path
    before: Folder | None
    workers: Workers

    def each(self, what: str, units: Sequence[U], work: Callable[[U], None], there: Callable[[U], Path]) -> None:
        """Do the units whose file is not there yet."""
        self.workers.map(f"{self.name}: {what}", work, [unit for unit in units if not there(unit).exists()])

    def kept(self, part: int) -> Path:
        return self.folder / "kept" / part_name(part)

    def write(self, what: str, work: Callable[[Path], None]) -> None:
        """Make every part out of the one before it."""
        self.each(what, self.place.parts, work, lambda part: self.kept(number_of(part)))

    def told(self) -> list[dict[str, Any]]:
        """What each part told when it was written."""
        numbers = (number_of(path) for path in Folder(self.folder).parts)
        return [json.loads(_told(self.folder, number).read_bytes()) for number in numbers]

    @property
    def place(self) -> Place:
        assert self.before
        return Place(self.folder, self.before)


@dataclass(frozen=True)
class Place:
    """Where a step that reads documents keeps its files between its units of work; goes to every worker."""

    folder: Path
    before: Folder

    @property
    def parts(self) -> Sequence[Path]:
        """The parts that the step reads."""
        kept = self.before.path / "kept"
        return _listed(self.before, kept.stat().st_mtime_ns)

    def of(self, what: str, unit: Path | int | None = None) -> Path:
        """The file of this of a part, of a numbered unit of work, or of all."""
        name = "" if unit is None else f"-{unit:05d}" if isinstance(unit, int) else f"-{unit.stem}"
        return self.folder / "work" / f"{what}{name}.npy"

    def every(self, what: str) -> list[Path]:
        """These files of all parts."""
        return [self.of(what, part) for part in self.parts]


@lru_cache(maxsize=4)
def _listed(folder: Folder, _changed: int) -> Sequence[Path]:
    return folder.parts


def step(
    name: str,
    out: Path,
    before: Folder | None,
    asked: Mapping[str, Any],
    workers: Workers,
    do: Callable[[Work], Mapping[str, Any]],
) -> Folder:
    """Run a step, or find that its very result is there. do: writes all parts and tells what else belongs into the report.

    ValueError if `out` was made by another step, from other documents or with other settings, or is being made, and if there
    is no document before it.
    """
    told = before.filled() if before else {}
    request = {"step": name, "version": VERSION, "asked": _plain(asked), "before": told.get("digest", "")}
    done = Folder(out)
    if out.exists():
        if (was := done.report["request"]) != request:
            raise ValueError(f"{out} was made by other means ({otherwise(was, request)}): choose another folder, or remove it")
        return done
    with unfinished(out, request) as building:
        if not (building / "report.json").exists():
            _made(Work(name, building, before, workers), request, do)
    return done


def _made(work: Work, request: Mapping[str, Any], do: Callable[[Work], Mapping[str, Any]]) -> None:
    """Do the work and write the report."""
    extra = do(work)
    counts = work.workers.map(f"{work.name}: count", _counted, Folder(work.folder).parts)
    report = _summed(counts) | dict(extra) | {"request": request, "digest": _digest(request, counts)}
    write_json(work.folder / "report.json", report | {"files": _sizes(work.folder)})


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in Folder(folder).parts}


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))


def _counted(kept: Path) -> dict[str, Any]:
    """Counts of one part, and a digest of what is kept of it."""
    digest, reasons = xxhash.xxh3_128(), dict[str, int]()
    documents = size = lost = 0
    for row in read_part(kept):
        data = row.text.encode()
        digest.update(f"{row.number} {row.language} {row.tier} {len(data)}\n".encode() + data)
        documents, size = documents + 1, size + len(data)
    for each in read_dropped(kept.parent.parent / "dropped" / kept.name):
        reasons[each.reason] = reasons.get(each.reason, 0) + 1
        lost += len(each.row.text.encode())
    return {"documents": documents, "bytes": size, "dropped": reasons, "dropped_bytes": lost, "digest": digest.hexdigest()}


def _summed(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    reasons: dict[str, int] = {}
    for each in counts:
        for reason, count in each["dropped"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    total = {key: sum(each[key] for each in counts) for key in ("documents", "bytes", "dropped_bytes")}
    return {"parts": len(counts), **total, "dropped": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))}


def _digest(request: Mapping[str, Any], counts: Sequence[Mapping[str, Any]]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([request, list(counts)], sort_keys=True).encode())
