"""Stores that Megatron's own tools wrote, made ours.

Megatron's `.bin/.idx` says neither which tokenizer made it nor how large the text was, a document may be several
sequences (`--split-sentences`), and may lack its end-of-document id (no `--append-eod`). So the user names the tokenizer,
every id is compared with its vocabulary, and the sizes of the text are recovered by decoding. In place, only a sidecar
and the sizes are written beside the files, which stay as they are: possible where each document is one sequence and ends
in the end-of-document id. Anything else is rewritten under another prefix, `output`, as one sequence per document with the
id appended where it lacks.

The price: decoding takes most of the time (about a million tokens a second), and it gives the original sizes only if the
tokenizer loses nothing; the sidecar says `"text_sizes": "decoded"`, so that bits per byte can be read with that in mind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_pretrain.data.store import DTYPES, HEADER, MAGIC, SUFFIXES, VERSION, Store, StoreWriter, describe, file_digest
from ds_pretrain.data.tokenizer import TextTokenizer

CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Megatron's codes of every dtype of whole numbers."""
NOTES = {"text_sizes": "decoded"}
Advance = Callable[[int], object]
"""Told how many tokens were done since it was called last."""


@dataclass(frozen=True)
class Foreign:
    """A store without a sidecar, memory-mapped, its structure verified.

    lengths: tokens of each sequence. bounds: int64 [documents + 1], the first sequence of each document, and the end.
    """

    prefix: str
    tokens: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray

    @staticmethod
    def open(prefix: str | Path) -> Foreign:
        path = f"{prefix}.idx"
        for name in (path, f"{prefix}.bin"):
            if not os.path.isfile(name) or not os.path.getsize(name):
                raise ValueError(f"no store of Megatron's at {prefix}: {name} is missing or empty")
        raw = np.memmap(path, mode="r")
        magic, version, code, sequences, bounds = HEADER.unpack(raw[: HEADER.size].tobytes().ljust(HEADER.size, b"\0"))
        if (magic, version) != (MAGIC, VERSION) or code not in CODES:
            raise ValueError(f"{path} is no index of Megatron's over whole numbers (header {magic!r}, {version}, dtype {code})")
        wanted = HEADER.size + sequences * 12 + bounds * 8
        if len(raw) != wanted:
            raise ValueError(f"{path} has {len(raw)} bytes instead of {wanted}: it is cut off, or multimodal")
        lengths = np.frombuffer(raw, np.int32, sequences, HEADER.size)
        pointers = np.frombuffer(raw, np.int64, sequences, HEADER.size + lengths.nbytes)
        documents = np.frombuffer(raw, np.int64, bounds, HEADER.size + lengths.nbytes + pointers.nbytes)
        size = np.dtype(CODES[code]).itemsize
        ends = np.cumsum(lengths, dtype=np.int64) * size
        if lengths.min(initial=0) < 0 or pointers[:1].any() or (pointers[1:] != ends[:-1]).any():
            raise ValueError(f"{path}: its sequences do not lie end to end")
        if sequences == 0 or bounds < 2 or documents[0] or documents[-1] != sequences or (np.diff(documents) < 0).any():
            raise ValueError(f"{path}: its documents are not runs of its {sequences} sequences")
        if os.path.getsize(f"{prefix}.bin") != ends[-1]:
            raise ValueError(f"{prefix}.bin has {os.path.getsize(f'{prefix}.bin')} bytes instead of {ends[-1]}")
        return Foreign(str(prefix), np.memmap(f"{prefix}.bin", CODES[code], mode="r").view(np.ndarray), lengths, documents)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of each document, its sequences joined: views into the file."""
        ends = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))[self.bounds]
        for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            yield self.tokens[start:stop]


def adopt(
    prefix: str | Path, tokenizer: TextTokenizer, output: str | Path | None = None, advance: Advance = lambda _: None
) -> Store:
    """Make Megatron's store at `prefix` ours: in place, or rewritten under the prefix `output`."""
    foreign = Foreign.open(prefix)
    _check_ids(foreign, tokenizer)
    if output is None:
        return _describe_in_place(foreign, tokenizer, advance)
    eod = tokenizer.vocabulary.eod
    with StoreWriter(output, vocab_size=len(tokenizer), eod=eod, tokenizer_digest=tokenizer.digest, notes=NOTES) as writer:
        for ids in foreign.documents():
            bare = ids[:-1] if len(ids) and ids[-1] == eod else ids
            writer.add(bare, tokenizer.decode(bare, skip_specials=True))
            advance(len(ids))
    return Store(output)


def _check_ids(foreign: Foreign, tokenizer: TextTokenizer) -> None:
    for start in range(0, len(foreign.tokens), 1 << 22):
        part = foreign.tokens[start : start + (1 << 22)]
        if part.min() < 0 or part.max() >= len(tokenizer):
            raise ValueError(
                f"{foreign.prefix}.bin holds ids {part.min()}..{part.max()}, outside the vocabulary of {len(tokenizer)}: "
                "name the tokenizer that made it"
            )


def _describe_in_place(foreign: Foreign, tokenizer: TextTokenizer, advance: Advance) -> Store:
    prefix, eod = foreign.prefix, tokenizer.vocabulary.eod
    if os.path.exists(f"{prefix}.json"):
        raise ValueError(f"{prefix}.json exists: the store is ours already, or remove it")
    _check_shape(foreign, eod, tokenizer.token(eod))
    text = np.empty((len(foreign), 2), dtype=np.int64)
    for i, ids in enumerate(foreign.documents()):
        found = tokenizer.decode(ids[:-1], skip_specials=True)
        text[i] = len(found.encode()), len(found.split())
        advance(len(ids))
    files = {suffix: f"{prefix}.{suffix}" for suffix in SUFFIXES} | {"text.npy": f"{prefix}.text.npy.tmp"}
    try:
        with open(files["text.npy"], "wb") as npy:
            np.save(npy, text)
        sidecar = describe(
            files, {suffix: file_digest(path) for suffix, path in files.items()}, text, dtype=foreign.tokens.dtype.name,
            vocab_size=len(tokenizer), eod=eod, tokenizer_digest=tokenizer.digest, tokens=len(foreign.tokens), **NOTES,
        )  # fmt: skip
        Path(f"{prefix}.json.tmp").write_text(sidecar, encoding="utf-8")
        for suffix in ("text.npy", "json"):  # the sidecar last: without it there is no store
            os.replace(f"{prefix}.{suffix}.tmp", f"{prefix}.{suffix}")
    finally:
        for suffix in ("text.npy", "json"):
            with suppress(FileNotFoundError):
                os.remove(f"{prefix}.{suffix}.tmp")
    return Store(prefix)


def _check_shape(foreign: Foreign, eod: int, name: str) -> None:
    """Refuses what cannot stay as it is."""
    problems = []
    if (dtype := foreign.tokens.dtype.name) not in DTYPES:
        problems.append(f"its dtype is {dtype}, not {' or '.join(DTYPES)}")
    if several := int(np.count_nonzero(np.diff(foreign.bounds) != 1)):
        problems.append(f"{several} of {len(foreign)} documents are not one sequence")
    ends = np.cumsum(foreign.lengths, dtype=np.int64)[foreign.bounds[1:] - 1]
    if open_ := int(np.count_nonzero((foreign.tokens[ends - 1] != eod) | (np.diff(foreign.bounds) == 0))):
        problems.append(f"{open_} of {len(foreign)} documents do not end in {name} ({eod})")
    if not foreign.lengths.all():
        problems.append(f"{int(np.count_nonzero(foreign.lengths == 0))} sequences are empty")
    if problems:
        raise ValueError(
            f"{foreign.prefix} cannot be adopted in place ({'; '.join(problems)}): name an output to rewrite it to"
        )
