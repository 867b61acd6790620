"""Folders as `save_pretrained` writes them: tensors read one at a time, and written one at a time into files of bounded size.

Nothing of the folder is run. Of files only safetensors are read, unless pickles are asked for, which torch then opens with
`weights_only`. A folder that is written appears whole under its name or not at all, and never over another.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_pretrain.core.files import read_json

log = logging.getLogger(__name__)
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What the format calls them."""
SHARD = 5_000_000_000
"""Bytes of a file at most, as `save_pretrained` has it."""


class Stored:
    """A folder's config and tensors. pickles: read pytorch_model.bin where there are no safetensors."""

    def __init__(self, folder: str | Path, pickles: bool = False) -> None:
        self.folder = Path(folder)
        config = self.folder / "config.json"
        if not config.is_file():
            raise ValueError(f"{config} does not exist: give a folder that save_pretrained() wrote")
        self.config: dict[str, Any] = read_json(config, {})
        self.pickles = pickles and not self._has(SAFE)
        if not self._has(PICKLED if self.pickles else SAFE):
            raise ValueError(self._absent())

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file() or (self.folder / f"{name}.index.json").is_file()

    def _absent(self) -> str:
        if self._has(PICKLED):
            return (
                f"{self.folder} has no {SAFE}, only a pickle, which can run code when it is read: save it once more as "
                "safetensors, or add --allow-pickle if you trust it (torch then reads it with weights_only)"
            )
        return f"{self.folder} has no {SAFE}: give a folder that save_pretrained() wrote"

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Every tensor's name and the file it lies in; one file counts before an index, as in transformers. ValueError naming
        what is missing."""
        name = PICKLED if self.pickles else SAFE
        if (self.folder / name).is_file():
            return dict.fromkeys(self._names(self.folder / name), self.folder / name)
        index = self.folder / f"{name}.index.json"
        if not isinstance(places := read_json(index, dict[str, Any]()).get("weight_map"), dict):
            raise ValueError(f"{index} has no weight_map: copy it again")
        if outside := [tensor for tensor, file in places.items() if not isinstance(file, str) or Path(file).name != file]:
            raise ValueError(
                f"{index} says that {outside[0]} lies in {places[outside[0]]!r}, which is no file of this folder: copy it again"
            )
        for file in sorted(set(places.values())):
            listed = [tensor for tensor, place in places.items() if place == file]
            if not (self.folder / file).is_file():
                raise ValueError(f"{self.folder / file} is missing, with {len(listed)} of {len(places)} tensors: copy it again")
            if lost := sorted(set(listed) - set(self._names(self.folder / file))):
                raise ValueError(f"{self.folder / file} lacks {some(lost)}, which {index.name} says it holds: copy both again")
        return {tensor: self.folder / file for tensor, file in places.items()}

    def _names(self, path: Path) -> list[str]:
        with self._open(path) as tensors:
            return list(tensors.keys())

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            if self.pickles:
                yield _pickled(path)
            else:
                with safe_open(path, "pt") as tensors:
                    yield tensors
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): copy it again") from None

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        with self._open(self.files[name]) as tensors:
            return tensors[name] if self.pickles else tensors.get_tensor(name)

    def dtype(self, name: str) -> str:
        """Its precision as the format calls it, without reading it."""
        with self._open(self.files[name]) as tensors:
            if self.pickles:
                return DTYPES.get(tensors[name].dtype, str(tensors[name].dtype))
            return str(tensors.get_slice(name).get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        with self._open(self.files[name]) as tensors:
            return tuple(tensors[name].shape if self.pickles else tensors.get_slice(name).get_shape())


@functools.cache
def _pickled(path: Path) -> dict[str, Tensor]:
    """All tensors of a pickle; from the disk where its format lets them lie there."""
    for mmap in (True, False):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()):
                return found
        except Exception as error:  # bytes that are no pickle end in any
            log.debug("%s with mmap=%s: %s", path, mmap, error)
    raise ValueError(
        f"{path} is damaged, or holds other objects than tensors, which are never made: copy it again, or save the model as "
        "safetensors where it comes from"
    )


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write(folder: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], shard: int = SHARD) -> list[str]:
    """Write tensors, which come in the order of their entries, into as many files as they need; returns these files' names.

    A file's header is made of the entries, so that no more than one tensor need be there at a time.
    """
    groups = list(_groups(entries, shard))
    names = [SAFE] if len(groups) == 1 else [_numbered(i, len(groups)) for i in range(len(groups))]
    coming = iter(tensors)
    for name, group in zip(names, groups, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(group))
            for entry in group:
                given = next(coming)
                tensor = given.to(entry.dtype).contiguous()
                if entry.dtype == torch.float16 and bool((tensor.isinf() & given.isfinite()).any()):
                    raise ValueError(f"{entry.name} has numbers beyond float16: write --dtype bfloat16 or float32")
                if tuple(tensor.shape) != tuple(entry.shape):
                    raise ValueError(f"{entry.name} is {tuple(tensor.shape)} and was announced as {tuple(entry.shape)}")
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
    if len(groups) > 1:
        places = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
        index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": places}
        (folder / f"{SAFE}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return names


def _numbered(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _groups(entries: Sequence[Entry], most: int) -> Iterator[list[Entry]]:
    """Entries by file."""
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + entry.bytes > most:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.bytes
    yield group


def _header(entries: Sequence[Entry]) -> bytes:
    """The beginning of a safetensors file: its own length and, in JSON, where each tensor lies."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        stop = start + entry.bytes
        content[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def canonical(names: Iterable[str], rename: Mapping[str, str]) -> dict[str, list[str]]:
    """Stored names by the name that rules know them by; those that are no parameter are left out."""
    found: dict[str, list[str]] = {}
    for stored in names:
        name = stored
        for pattern, replacement in rename.items():
            name = re.sub(pattern, replacement, name)
        if name:
            found.setdefault(name, []).append(stored)
    return found


def some(items: Sequence[str], limit: int = 8) -> str:
    """A few of them, and how many more there are."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
