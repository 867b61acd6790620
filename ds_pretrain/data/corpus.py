"""Sources to documents: text, JSON lines, parquet (each also .gz or .zst), folders, `datasets`, the embedded corpus.

A source is a string: a file, a folder, a pattern such as `src/**/*.py`, `datasets:NAME[:CONFIG[:SPLIT]]`, `embedded` or
`embedded:PART+PART`. What is a document: a line of .jsonl, a row of .parquet or of a dataset; in .txt, and in what a pattern
names, what lies between form feeds, cut at a blank line once it exceeds 64 KB (at any line end once it exceeds 1 MB), so that a
large file still splits by document.

Nothing is dropped without a word: broken JSON, a missing field, invalid UTF-8, NUL, empty and giant records go to the
ledger's quarantine with file, line and reason, and kept + quarantined is exactly what was read. The price: a file that
cannot be read at all (a truncated .gz, a broken .parquet, a link to nothing) stops everything with its name instead of
losing its tail.

`datasets` are streamed, so that one larger than the disk can be read; the price is that each reading fetches it again
(`prepare` reads twice). A slice such as `train[:10%]` cannot be streamed: it is loaded through the cache on disk.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from ds_pretrain.core.registry import unknown

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
PACKED = ("", ".gz", ".zst")
PATTERN = re.compile(r"[*?\[]")
T = TypeVar("T")
SOFT, HARD = 1 << 16, 1 << 20
"""Bytes after which a .txt document ends at the next blank line, and at the next line."""
GIANT = 16 << 20
"""Bytes above which a record is quarantined."""
SHOWN = 200
"""Characters of a quarantined record that are kept."""


@dataclass(frozen=True, slots=True)
class SourceText:
    """One document. line: where it starts, from 1 (a row for parquet and datasets)."""

    text: str
    source: str
    file: str
    line: int


@dataclass
class Ledger:
    """The account of one reading: kept + quarantined is what was read.

    quarantine: the JSONL file for refused records, made when the first one is; None counts them only.
    inputs: sha256 of what the embedded corpus read. licences: by source name. notes: what a person should be told.
    """

    quarantine: Path | None = None
    kept: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, str] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def refuse(self, file: str, line: int, reason: str, head: str | bytes) -> None:
        """Quarantine one record."""
        self.refused[reason] += 1
        if self.quarantine:
            shown = head.decode("utf-8", "backslashreplace") if isinstance(head, bytes) else head
            shown = shown.encode("utf-8", "backslashreplace").decode()[:SHOWN]  # lone surrogates cannot be written
            with self.quarantine.open("a", encoding="utf-8") as out:
                row = {"file": shown_name(file), "line": line, "reason": reason, "head": shown}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")

    def screen(self, text: str, source: str, file: str, line: int) -> Iterator[SourceText]:
        """The document if it is sound; else it is quarantined."""
        if reason := fault(text):
            self.refuse(file, line, reason, text[:SHOWN])
        else:
            self.kept[source] += 1
            yield SourceText(text, source, file, line)


def shown_name(file: str) -> str:
    """The name of a file, spelled out where it is no UTF-8."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def fault(text: str) -> str | None:
    """Why a text is not fit for training, if it is not."""
    if not text.strip():
        return "empty"
    if "\x00" in text:
        return "NUL"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "invalid UTF-8"
    return "giant" if size > GIANT else None


def read(source: str | Path, ledger: Ledger | None = None, text_field: str = "text") -> Iterator[SourceText]:
    """The documents of one source, in a fixed order."""
    ledger = Ledger() if ledger is None else ledger
    before = ledger.kept.total()
    refused = ledger.refused.copy()
    name = str(source)
    if name.partition(":")[0] == "embedded":
        from ds_pretrain.data import embedded

        yield from embedded.read(ledger, embedded.parts(name))
    elif name.startswith("datasets:"):
        yield from _dataset(name, ledger, text_field)
    else:
        files = list_files(source)
        ledger.notes += passed_over(source, files)
        for path in files:
            yield from read_file(path, name, ledger, text_field)
    if ledger.kept.total() == before:
        found = ", ".join(f"{reason}: {count}" for reason, count in (ledger.refused - refused).items()) or "nothing"
        raise ValueError(f"no document in {name} (quarantined: {found}); is the text field really {text_field!r}?")


def list_files(source: str | Path) -> list[Path]:
    """The files of a path, sorted; a folder gives every file below it that can be read, through links too, and a pattern such
    as `src/**/*.py` every file that matches, as text unless its name says otherwise."""
    path = Path(source)
    if not path.exists() and PATTERN.search(str(source)):
        return _matching(str(source))
    known = tuple(kind + packed for kind in SUFFIXES for packed in PACKED)
    if not path.exists():
        raise ValueError(f"no corpus at {path}: no such file or folder")
    files = sorted(p for p in _below(path) if p.name.endswith(known)) if path.is_dir() else [path]
    if not files or not files[0].name.endswith(known):
        raise ValueError(f"no corpus at {path}: expected files ending in {', '.join(SUFFIXES)}, alone or with .gz or .zst")
    return _regular(files)


def fixed(source: str) -> Path:
    """The path of a source; of a pattern the folder that all its files are below."""
    match = None if Path(source).exists() else PATTERN.search(source)
    return Path(source[: match.start()] + "x").parent if match else Path(source)


def _regular(files: list[Path]) -> list[Path]:
    """The same. ValueError naming one that is no file."""
    for file in files:
        if not file.is_file():
            what = f"a link to nothing ({os.readlink(file)})" if file.is_symlink() else "no regular file"
            raise ValueError(f"{file} is {what}: mend or remove it")
    return files


def _matching(pattern: str) -> list[Path]:
    files = sorted(path for path in map(Path, glob.iglob(pattern, recursive=True)) if not path.is_dir())
    if not files:
        raise ValueError(f"no corpus at {pattern}: no file matches (** is any depth of folders; quote it from the shell)")
    return _regular(files)


def _below(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder. What cannot be listed raises, and so does a link that leads in a circle."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for inner, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(inner)) in seen:
            raise ValueError(f"{inner} leads to {real}, which {folder} holds already: remove the link")
        seen.add(real)
        yield from (Path(inner, name) for name in names)


def grouped(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items in order in groups; each ends with the item that brings its size to the limit."""
    group: list[T] = []
    held = 0
    for item in items:
        group.append(item)
        held += size(item)
        if held >= limit:
            yield group
            group, held = [], 0
    if group:
        yield group


def passed_over(source: str | Path, files: Sequence[Path]) -> list[str]:
    """A note on the files of a folder whose names say that they are no text, if there are any."""
    others = sorted(set(_below(Path(source))).difference(files)) if Path(source).is_dir() else []
    kinds = Counter(path.suffix or path.name for path in others).most_common(4)
    return [f"{source}: {len(others)} files of other kinds passed over ({', '.join(k for k, _ in kinds)})"] * bool(others)


def read_file(path: Path, source: str, ledger: Ledger, text_field: str = "text") -> Iterator[SourceText]:
    """The documents of one file, of the kind that its name says, else text; it may have none."""
    kind = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    broken = (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        with _open(path) as stream:
            if kind == ".parquet":
                yield from _parquet(stream, path, source, ledger, text_field)
            elif kind in (".jsonl", ".ndjson"):
                yield from _jsonl(stream, str(path), source, ledger, text_field)
            else:
                yield from _text(stream, str(path), source, ledger)
    except broken as error:
        raise ValueError(f"{path} is damaged and cannot be read to its end ({error}): fetch it again, or remove it") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix in PACKED[1:] and not path.stat().st_size:
        raise EOFError("it has no byte, and packed nothing has some")  # Python and zstandard take it for packed nothing
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path))
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """A .zst file of any number of frames. The library's own reader takes a truncated file for a finished one."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._raw = path.open("rb")
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._inside = False
        self._error = zstandard.ZstdError
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside = self._new(), False
            data = data or self._raw.read(1 << 17)
            if not data:
                if self._inside:
                    raise EOFError("the last frame is cut off")
                return 0
            self._inside = True
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _lines(stream: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each line with its end, and whether it is giant: of a giant one the beginning only."""
    while line := stream.readline(GIANT + 1):
        giant = len(line) > GIANT
        rest = line
        while giant and rest and not rest.endswith(b"\n"):
            rest = stream.readline(GIANT)
        yield line, giant


def decoded(data: bytes, file: str, line: int, ledger: Ledger) -> Iterator[str]:
    try:
        yield data.removeprefix(b"\xef\xbb\xbf").decode() if line == 1 else data.decode()
    except UnicodeDecodeError:
        ledger.refuse(file, line, "invalid UTF-8", data[:SHOWN])


def _jsonl(stream: IO[bytes], file: str, source: str, ledger: Ledger, text_field: str) -> Iterator[SourceText]:
    for number, (line, giant) in enumerate(_lines(stream), start=1):
        if giant:
            ledger.refuse(file, number, "giant", line[:SHOWN])
            continue
        for text in decoded(line, file, number, ledger):
            found = _field(text, text_field)
            if isinstance(found, Fault):
                ledger.refuse(file, number, found.reason, text[:SHOWN])
            else:
                yield from ledger.screen(found, source, file, number)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a record has no text."""

    reason: str


def _field(line: str, text_field: str) -> str | Fault:
    if not line.strip():
        return Fault("empty")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Fault("broken JSON")
    if not isinstance(row, dict) or text_field not in row:
        return Fault(f"no field {text_field!r}")
    text = row[text_field]
    return text if isinstance(text, str) else Fault(f"field {text_field!r} is not text")


def _text(stream: IO[bytes], file: str, source: str, ledger: Ledger) -> Iterator[SourceText]:
    for line, part, giant in cut(_lines(stream)):
        if giant:
            ledger.refuse(file, line, "giant", part[:SHOWN])
            continue
        for text in decoded(part, file, line, ledger):
            yield from ledger.screen(text, source, file, line)


def cut(lines: Iterable[tuple[bytes, bool]], soft: int = SOFT, hard: int = HARD) -> Iterator[tuple[int, bytes, bool]]:
    """Lines into documents: (first line, bytes, whether giant).

    A document ends at a form feed, at a blank line beyond `soft` bytes and at any line beyond `hard`. A giant line is
    one of its own. Nothing but form feeds, and blank text after the last of them, is missing from what comes out.
    """
    held, first, found = bytearray(), 1, 0
    for number, (line, giant) in enumerate(lines, start=1):
        *ended, rest = [line] if giant else line.split(b"\f")
        if giant:
            if held:
                yield first, bytes(held), False
            yield number, rest, True
            held, rest, found = bytearray(), b"", found + 1
        for part in ended:
            yield first if held else number, bytes(held) + part, False
            held, found = bytearray(), found + 1
        first = first if held else number
        held += rest
        if len(held) >= hard or (len(held) >= soft and not line.strip()):
            yield first, bytes(held), False
            held, found = bytearray(), found + 1
    if held.strip() or not found:
        yield first, bytes(held), False


def _parquet(stream: IO[bytes], path: Path, source: str, ledger: Ledger, text_field: str) -> Iterator[SourceText]:
    for row, value in enumerate(_cells(stream, path, text_field), start=1):
        if value is None:
            ledger.refuse(str(path), row, f"no field {text_field!r}", "")
            continue
        for text in decoded(value, str(path), row, ledger):
            yield from ledger.screen(text, source, str(path), row)


def _cells(stream: IO[bytes], path: Path, text_field: str) -> Iterator[bytes | None]:
    """The texts of a parquet file, None where one is null. ValueError where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(stream if path.suffix == ".parquet" else io.BytesIO(stream.read()))
        schema = table.schema_arrow
        if text_field not in schema.names:
            raise ValueError(f"{path}: {unknown('column', text_field, schema.names)}; name the one that holds the text")
        if not (pa.types.is_string(schema.field(text_field).type) or pa.types.is_large_string(schema.field(text_field).type)):
            raise ValueError(f"{path}: column {text_field!r} is {schema.field(text_field).type}, not text")
        rows = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0).cast(pa.large_binary()):  # as bytes: nothing has checked that they are UTF-8
                rows += 1
                yield value.as_py()
        if rows != table.metadata.num_rows:  # the library does not compare them
            raise pa.ArrowInvalid(f"{rows} of its {table.metadata.num_rows} rows were found")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged and cannot be read to its end ({error}): fetch it again, or remove it") from None


def _dataset(spec: str, ledger: Ledger, text_field: str) -> Iterator[SourceText]:
    name, config, split = [*spec.split(":", 3)[1:], "", ""][:3]  # a slice has a colon of its own
    try:
        import datasets

        table = datasets.load_dataset(name, config or None, split=split or "train", streaming="[" not in split)
        columns = table.column_names or list(next(iter(table), {}))  # a stream may not know them before its first row
    except Exception as error:  # the library raises a dozen kinds, and a user needs one: what could not be loaded, and why
        raise ValueError(f"cannot load {spec} (datasets:NAME[:CONFIG[:SPLIT]]): {type(error).__name__}: {error}") from error
    if text_field not in columns:
        raise ValueError(f"{spec}: {unknown('column', text_field, columns)}; name the one that holds the text")
    for number, row in enumerate(_whole(table.select_columns([text_field]), spec), start=1):
        if isinstance(text := row[text_field], str):
            yield from ledger.screen(text, spec, spec, number)
        else:
            ledger.refuse(spec, number, f"field {text_field!r} is not text", repr(text)[:SHOWN])


def _whole(rows: Iterable[dict[str, Any]], spec: str) -> Iterator[dict[str, Any]]:
    """All rows of a stream; one that breaks off is named instead of ending early."""
    try:
        yield from rows
    except Exception as error:
        raise ValueError(f"{spec} broke off and cannot be read to its end: {type(error).__name__}: {error}") from error
