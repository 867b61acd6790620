"""Tokens on disk: Megatron's `.bin/.idx` (MMIDIDX version 1), written and read by us.

The format is the one that existing tools read; the reader is our own, because Megatron's returns garbage from truncated
files and its writer wraps ids past the dtype. A JSON sidecar holds the counts, the tokenizer's digest and the xxh3-128
of every file, and is written last: a store without one is not a store. Beside them lies the size of each document's
original text in bytes and in words, which bits per byte and perplexity per word divide by. Every document ends in the
end-of-document id. The price: opening with `verify="full"` reads every byte once (gigabytes per second), and a store
that Megatron's own tool wrote has to be adopted first (see `adopt`), as it lacks the sidecar and the sizes of the text.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import xxhash

from ds_pretrain.core.files import sync

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
DTYPES = {"int32": 4, "uint16": 8}
"""Megatron's code of each dtype that we write."""
SUFFIXES = ("bin", "idx", "text.npy")
SPLITS = ("train", "validation", "test")
"""The stores of a prepared folder."""


def dtype_for(vocab_size: int) -> np.dtype:
    """The narrowest dtype of the format that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class StoreWriter:
    """Writes PREFIX.bin, .idx, .text.npy and .json under temporary names; they take their own when the block ends well.

    vocab_size: ids at or above it are refused. eod: the id appended to every document. tokenizer_digest: its maker.
    notes: further fields of the sidecar.
    """

    def __init__(
        self, prefix: str | Path, *, vocab_size: int, eod: int, tokenizer_digest: str, notes: Mapping[str, str] = {}
    ) -> None:
        if not 0 <= eod < vocab_size:
            raise ValueError(f"end-of-document id {eod} is outside the vocabulary of {vocab_size} ids")
        self.prefix, self.vocab_size, self.eod, self.tokenizer_digest = str(prefix), vocab_size, eod, tokenizer_digest
        self.notes, self.dtype = notes, dtype_for(vocab_size)
        self._lengths, self._text = array("i"), array("q")
        self._tokens = 0
        self._hash = xxhash.xxh3_128()

    def __enter__(self) -> StoreWriter:
        if os.path.exists(f"{self.prefix}.json"):
            raise ValueError(f"a store exists at {self.prefix}.json: remove it or choose another prefix")
        os.makedirs(os.path.dirname(self.prefix) or ".", exist_ok=True)
        self._bin = open(f"{self.prefix}.bin.tmp", "wb")
        return self

    def add(self, tokens: np.ndarray, text: str) -> None:
        """Append one document: its ids (without the end-of-document id) and the text that they stand for."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(
                f"document {len(self)} of {self.prefix} holds ids {tokens.min()}..{tokens.max()}, outside the "
                f"vocabulary of {self.vocab_size}: was it made by another tokenizer?"
            )
        data = np.append(tokens, self.eod).astype(self.dtype).tobytes()
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.append(len(tokens) + 1)
        self._tokens += len(tokens) + 1
        self._text.extend((len(text.encode()), len(text.split())))

    def extend(self, other: Store) -> None:
        """Append all documents of a store of the same tokenizer."""
        if (other.tokenizer_digest, other.vocab_size) != (self.tokenizer_digest, self.vocab_size):
            raise ValueError(f"{other.prefix} was made by tokenizer {other.tokenizer_digest}, {self.prefix} by another")
        for part in other.chunks():
            self._bin.write(part.data)
            self._hash.update(part.data)
        self._lengths.frombytes(other.lengths.tobytes())
        self._text.frombytes(other.text.tobytes())
        self._tokens += other.info["tokens"]

    def __len__(self) -> int:
        return len(self._lengths)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        names = [f"{self.prefix}.{suffix}" for suffix in (*SUFFIXES, "json")]
        try:
            with self._bin:
                self._bin.flush()
                os.fsync(self._bin.fileno())
            if kind is None:
                self._finish()
                for name in names:
                    os.replace(f"{name}.tmp", name)
                sync(os.path.dirname(self.prefix) or ".")
        finally:
            for name in names:
                with suppress(FileNotFoundError):
                    os.remove(f"{name}.tmp")

    def _finish(self) -> None:
        if not len(self):
            raise ValueError(f"no document was added to {self.prefix}: an empty store cannot be trained on")
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(self), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        with open(f"{self.prefix}.idx.tmp", "wb") as idx:
            idx.write(HEADER.pack(MAGIC, VERSION, DTYPES[self.dtype.name], len(self), len(self) + 1))
            for part in (lengths, pointers * self.dtype.itemsize, np.arange(len(self) + 1, dtype=np.int64)):
                part.tofile(idx)
        text = np.frombuffer(self._text, dtype=np.int64).reshape(-1, 2)
        with open(f"{self.prefix}.text.npy.tmp", "wb") as npy:
            np.save(npy, text)
        files = {suffix: f"{self.prefix}.{suffix}.tmp" for suffix in SUFFIXES}
        digests = {"bin": self._hash.hexdigest()} | {suffix: file_digest(files[suffix]) for suffix in SUFFIXES[1:]}
        sidecar = describe(
            files, digests, text, dtype=self.dtype.name, vocab_size=self.vocab_size, eod=self.eod,
            tokenizer_digest=self.tokenizer_digest, tokens=self._tokens, **self.notes,
        )  # fmt: skip
        Path(f"{self.prefix}.json.tmp").write_text(sidecar, encoding="utf-8")
        for suffix in (*SUFFIXES[1:], "json"):
            sync(f"{self.prefix}.{suffix}.tmp")


def describe(files: Mapping[str, str], digests: Mapping[str, str], text: np.ndarray, **fields: Any) -> str:
    """The sidecar of a store whose files lie at these paths, by suffix.

    text: bytes and words of each document. fields: dtype, vocab_size, eod, tokenizer_digest, tokens, and notes if any.
    """
    size, words = (int(total) for total in text.sum(axis=0))
    counts = {"documents": len(text), "bytes": size, "words": words}
    sizes = {suffix: os.path.getsize(path) for suffix, path in files.items()}
    return _sealed({"version": VERSION, **counts, **fields, "sizes": sizes, "xxh3_128": dict(digests)})


class Store:
    """A finished store, memory-mapped. Documents end in the end-of-document id.

    verify: "full" compares every file with its checksum; "sizes" only lengths and structure, for the ranks that open
    what another rank has verified.
    """

    def __init__(self, prefix: str | Path, verify: Literal["full", "sizes"] = "full") -> None:
        self.prefix = str(prefix)
        self.info = self._sidecar()
        self._check_files(verify)
        self.vocab_size: int = self.info["vocab_size"]
        self.tokenizer_digest: str = self.info["tokenizer_digest"]
        self.digest: str = self.info["digest"]
        self.lengths, self._pointers = self._index()
        self.text: np.ndarray = np.load(f"{self.prefix}.text.npy", mmap_mode="r", allow_pickle=False)
        """int64 [documents, 2]: bytes and words of each document's original text."""
        self._tokens = np.memmap(f"{self.prefix}.bin", dtype=self.info["dtype"], mode="r").view(np.ndarray)  # slices faster

    def __len__(self) -> int:
        return self.info["documents"]

    def __getitem__(self, i: int) -> np.ndarray:
        return self.slice(i, 0, int(self.lengths[i]))

    def slice(self, i: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of document i, int32: a copy, so nothing points into the file once it is closed."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {self.prefix}, which has {len(self)}")
        if not 0 <= start <= stop <= self.lengths[i]:
            raise IndexError(f"tokens {start}..{stop} of document {i} of {self.prefix}, which has {self.lengths[i]}")
        first = int(self._pointers[i]) // self._tokens.itemsize
        return np.array(self._tokens[first + start : first + stop], dtype=np.int32)

    def chunks(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """All tokens in order, at most `size` at a time, in the file's own dtype: read, not mapped, so that little memory is
        enough for any store."""
        with open(f"{self.prefix}.bin", "rb") as stream:
            while len(part := np.fromfile(stream, self.info["dtype"], size)):
                yield part

    def at(self, places: np.ndarray) -> np.ndarray:
        """The tokens at these places of the whole store, in its own dtype."""
        return self._tokens[places]

    def ends(self, first: int, stop: int) -> np.ndarray:
        """int64: where the documents [first, stop) end, counted in tokens of the whole store."""
        return self._pointers[first:stop] // self._tokens.itemsize + self.lengths[first:stop]

    def __reduce__(self) -> tuple[type[Store], tuple[str, str]]:
        return Store, (self.prefix, "sizes")

    def _sidecar(self) -> dict[str, Any]:
        path = f"{self.prefix}.json"
        try:
            raw = Path(path).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"no store at {self.prefix}: {path} is missing; run `ds-pretrain prepare`") from None
        try:
            info = json.loads(raw)
            sound = raw == _sealed({key: value for key, value in info.items() if key != "digest"}).encode()
        except (ValueError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(f"{path} is damaged (its digest does not match its content): prepare the data again")
        if info["version"] != VERSION:
            raise ValueError(f"{path} is of store version {info['version']}; this program reads {VERSION}")
        return info

    def _check_files(self, verify: str) -> None:
        if verify not in ("full", "sizes"):
            raise ValueError(f"verify must be 'full' or 'sizes', got {verify!r}")
        for suffix in SUFFIXES:
            path, size = f"{self.prefix}.{suffix}", self.info["sizes"][suffix]
            if not os.path.exists(path):
                raise ValueError(f"{path} is missing: prepare the data again")
            if os.path.getsize(path) != size:
                raise ValueError(f"{path} has {os.path.getsize(path)} bytes instead of {size}: prepare the data again")
            if verify == "full" and file_digest(path) != self.info["xxh3_128"][suffix]:
                raise ValueError(f"{path} is damaged (its checksum does not match): prepare the data again")

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        path, count = f"{self.prefix}.idx", len(self)
        data = np.memmap(path, mode="r")
        expected = (MAGIC, VERSION, DTYPES[self.info["dtype"]], count, count + 1)
        if HEADER.unpack(data[: HEADER.size].tobytes()) != expected:
            raise ValueError(f"{path} does not begin with the header that {self.prefix}.json describes")
        lengths = np.frombuffer(data, dtype=np.int32, count=count, offset=HEADER.size)
        pointers = np.frombuffer(data, dtype=np.int64, count=count, offset=HEADER.size + lengths.nbytes)
        if lengths.sum(dtype=np.int64) != self.info["tokens"] or lengths.min() < 1:
            raise ValueError(f"{path} counts {lengths.sum(dtype=np.int64)} tokens instead of {self.info['tokens']}")
        return lengths, pointers


def file_digest(path: str | Path, advance: Callable[[int], object] | None = None) -> str:
    """xxh3-128 of a file, as hexadecimal digits. advance: told the bytes of each piece that was read."""
    digest, buffer = xxhash.xxh3_128(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if advance:
                advance(count)
    return digest.hexdigest()


def _sealed(fields: dict[str, Any]) -> str:
    """The sidecar's text: the fields and a digest of them, in one spelling, so that any changed byte shows."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())
    return json.dumps(fields | {"digest": digest}, indent=1, sort_keys=True) + "\n"
