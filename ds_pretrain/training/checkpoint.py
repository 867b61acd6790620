"""A checkpoint that knows no layout, and is either whole or not there.

Each rank writes what it owns of the fp32 master weights and Adam moments, under logical names with the place of each piece
in the whole, as safetensors (no pickle). A reader puts any parameter together from the pieces and takes its own slice, so a
checkpoint of one layout continues under any other. What one rank reads is every parameter of its own stage, one at a time,
from memory maps.

Commit: write under `step-N.tmp` -> hash from memory -> fsync -> gather the file list -> rank 0 writes a self-hashed manifest
-> fsync -> rename to `step-N` -> fsync the folder. Nothing sound is overwritten before its successor is whole, and a resume
takes the newest step whose every byte verifies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ds_pretrain.core.files import sync
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.shards import Shard
from ds_pretrain.training import state
from ds_pretrain.training.engine import Engine

log = logging.getLogger(__name__)

VERSION = 1
FILE_BYTES = 1 << 29
"""Tensors of one file, about: bounds the memory that serialising takes."""
MEANING = ("heads", "groups", "norm", "norm_position", "norm_eps", "activation", "position", "rope_base", "rope_scaling")
"""Fields of a model that change what its weights mean, though not always their shapes."""
HEADS = ("head.classifiers.", "head.dense", "head.output_bias.", "generator.")
"""Where the names of parameters begin that belong to an objective rather than to the model."""


@dataclass(frozen=True)
class Piece:
    """Where one stored tensor belongs: `kind` of `shard`, elements from `start` of its flattened slice."""

    kind: str
    shard: Shard
    start: int

    @staticmethod
    def parse(text: str) -> Piece:
        value = json.loads(text)
        shard: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value["shard"].items()}
        return Piece(value["kind"], Shard(**shard), value["start"])


def save(folder: Path, engine: Engine, step: int, facts: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `folder/step-N` (collective) and drop the oldest beyond `keep`. `facts` go into the manifest.

    OSError (disk full, no permission) on any rank removes the attempt and is raised on all.
    """
    final, attempt = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if engine.mesh.rank == 0:
        shutil.rmtree(attempt, ignore_errors=True)
    engine.mesh.barrier()
    outcome: list[dict] | str
    try:
        attempt.mkdir(parents=True, exist_ok=True)
        outcome = [write_file(attempt, *file) for file in packed(engine.mesh.rank, _pieces(engine))]
    except OSError as error:
        outcome = f"rank {engine.mesh.rank}: {error}"
    everyone = engine.mesh.gather(outcome)
    failed = [text for text in everyone if isinstance(text, str)]
    saved = {"counters": state.counters(engine)}
    if not failed and engine.mesh.rank == 0:
        try:
            commit(attempt, final, {"version": VERSION, "step": step, **facts, **saved, "files": list(chain(*everyone))})
        except OSError as error:
            failed = [f"rank 0: {error}"]
        else:
            try:
                prune(folder, keep, step)
            except OSError as error:
                log.warning("an older checkpoint could not be removed: %s", error)
    told = engine.mesh.agree("; ".join(failed))
    if told:
        if engine.mesh.rank == 0:
            shutil.rmtree(attempt, ignore_errors=True)
        raise OSError(f"checkpoint of step {step} was not saved: {told}. Earlier ones are as they were")
    return final


def packed(rank: int, pieces: Iterable[tuple[Piece, Tensor]], most: int = FILE_BYTES) -> Iterator[tuple[str, bytes]]:
    """A rank's pieces as named safetensors files of about `most` bytes."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    size = number = 0
    for piece, tensor in pieces:
        key = str(len(tensors))
        tensors[key], metadata[key] = tensor.detach().cpu().contiguous(), json.dumps(asdict(piece))
        size += tensor.numel() * tensor.element_size()
        if size > most:
            yield f"rank-{rank:05d}-{number:03d}.safetensors", to_bytes(tensors, metadata)
            tensors, metadata, size, number = {}, {}, 0, number + 1
    if tensors:
        yield f"rank-{rank:05d}-{number:03d}.safetensors", to_bytes(tensors, metadata)


def _pieces(engine: Engine) -> Iterator[tuple[Piece, Tensor]]:
    """What this rank writes: of replicas one copy each."""
    mesh = engine.mesh
    copies = mesh.replica > 0 if engine.stage == 0 else False
    for fragment in state.fragments(engine):
        tied_copy = fragment.shard.name.startswith("word.") and not mesh.first_stage
        replica = fragment.shard.dim is None and mesh.at.tensor > 0
        if not (copies or tied_copy or replica):
            for kind, view in fragment.views.items():
                yield Piece(kind, fragment.shard, fragment.start), view


def write_file(folder: Path, name: str, data: bytes) -> dict[str, Any]:
    """Write a file durably; its line of the manifest."""
    _write_synced(folder / name, data)
    return {"name": name, "bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def commit(attempt: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest and give the attempt its name."""
    body = json.dumps(manifest, indent=1, sort_keys=True)
    sealed = {"manifest": json.loads(body), "xxh3_128": xxhash.xxh3_128_hexdigest(body.encode())}
    _write_synced(attempt / "manifest.json", json.dumps(sealed, indent=1, sort_keys=True).encode())
    sync(attempt)
    if final.exists():  # this step was damaged and is made again
        _remove(final)
    attempt.rename(final)
    sync(final.parent)


def prune(folder: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`; later ones can only be damaged and do not count. What a
    killed attempt or removal left goes too."""
    for left in (*folder.glob("step-*.tmp"), *folder.glob("step-*.old")):
        shutil.rmtree(left, ignore_errors=True)
    upto = [path for path in steps(folder) if _number(path) <= step]
    for path in upto[keep:]:
        _remove(path)


def _remove(path: Path) -> None:
    """Rename first, so that no checkpoint is ever seen half-removed."""
    doomed = path.with_name(path.name + ".old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def steps(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of one checkpoint. ValueError if it is missing, unreadable or not what was written."""
    file = path / "manifest.json"
    try:
        raw = file.read_bytes()
        sealed = json.loads(raw)
        manifest = sealed["manifest"]
        body = json.dumps(manifest, indent=1, sort_keys=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not readable as a manifest ({error})") from error
    rebuilt = {"manifest": manifest, "xxh3_128": xxhash.xxh3_128_hexdigest(body.encode())}
    if raw != json.dumps(rebuilt, indent=1, sort_keys=True).encode():
        raise ValueError(f"{file}: does not match its own checksum: it was changed after it was written")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{file}: format version {manifest.get('version')}, this release reads {VERSION}")
    return manifest


def first_manifest(paths: Sequence[Path]) -> dict[str, Any]:
    """Of the first of some checkpoints that has a readable one. ValueError, of the first, if none has."""
    for path in paths:
        with contextlib.suppress(ValueError):
            return read_manifest(path)
    return read_manifest(paths[0])


def damages(path: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint, file by file; `share` of `shares` lets ranks divide the reading."""
    try:
        files = read_manifest(path)["files"]
        strangers = {p.name for p in path.iterdir()} - {f["name"] for f in files} - {"manifest.json"}
        found = [f"{path / name}: not part of this checkpoint" for name in sorted(strangers)]
        return found + [text for f in files[share::shares] if (text := _damage(path / f["name"], f))]
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: not readable ({error})"]


def _damage(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path}: has {path.stat().st_size} bytes, {expected['bytes']} were written"
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return None if digest.hexdigest() == expected["xxh3_128"] else f"{path}: checksum differs: the file is corrupt"


def newest(folder: Path, mesh: Mesh | None = None) -> Path | None:
    """The newest checkpoint that verifies (collective over a mesh), None where there is none; damaged ones are named and passed
    over. ValueError, on every rank, if all are damaged. Rank 0's listing of the folder counts: another node may see an older
    one."""
    rank, world = (mesh.rank, mesh.world) if mesh else (0, 1)
    found_steps = steps(folder) if mesh is None else mesh.gather(steps(folder))[0]
    for path in found_steps:
        found = damages(path, rank, world)
        found = found if mesh is None else list(chain(*mesh.gather(found)))
        if not found:
            return path
        if rank == 0:
            log.warning("checkpoint %s is damaged, falling back: %s", path, "; ".join(sorted(set(found))[:3]))
    if found_steps:
        raise ValueError(f"no checkpoint in {folder} is sound: move the folder away to start anew")
    return None


class Snapshot:
    """A verified checkpoint, open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)

    @cached_property
    def index(self) -> dict[tuple[str, str], list[tuple[Piece, Path, str]]]:
        """(name, kind) -> its pieces and where they lie."""
        found: dict[tuple[str, str], list[tuple[Piece, Path, str]]] = {}
        for file in self.manifest["files"]:
            path = self.path / file["name"]
            try:
                with safe_open(path, "pt") as tensors:
                    for key, text in tensors.metadata().items():
                        piece = Piece.parse(text)
                        found.setdefault((piece.shard.name, piece.kind), []).append((piece, path, key))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not readable ({error})") from error
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter and its whole shape."""
        return {name: pieces[0][0].shard.shape for (name, _), pieces in self.index.items()}

    def whole(self, name: str, kind: str = "master") -> Tensor:
        """One parameter (or Adam moment) put together, fp32, without vocabulary padding."""
        pieces = self.index[name, kind]
        shard = pieces[0][0].shard
        slices = [torch.full(shard.local, torch.nan).view(-1) for _ in range(shard.ranks)]
        filled = 0
        for piece, path, key in pieces:
            with safe_open(path, "pt") as tensors:
                tensor = tensors.get_tensor(key)
            slices[piece.shard.rank][piece.start : piece.start + tensor.numel()] = tensor
            filled += tensor.numel()
        if filled != sum(s.numel() for s in slices):
            raise ValueError(f"{self.path}: {name} ({kind}) has {filled} of {sum(s.numel() for s in slices)} elements")
        return shard.merge([s.view(shard.local) for s in slices])


def load(snapshot: Snapshot, engine: Engine) -> None:
    """Continue `engine` from a checkpoint of any layout: weights, Adam's moments and every counter."""
    check_model(snapshot, engine)
    _put(snapshot, engine, state.KINDS, snapshot.shapes)
    state.restore_counters(engine, snapshot.manifest["step"], snapshot.manifest["counters"])
    engine.mesh.barrier()


def adopt(snapshot: Snapshot, engine: Engine) -> tuple[list[str], list[str]]:
    """Begin `engine` with the weights of a checkpoint of any layout: no moments, no counters. Heads may be missing on either
    side; returns the names of those that keep their initial values, and of those that are left behind."""
    check_model(snapshot, engine, HEADS)
    theirs = snapshot.shapes
    _put(snapshot, engine, ("master",), theirs)
    ours = set(chain(*engine.mesh.gather([shard.name for shard, _ in state.local_parameters(engine)])))
    engine.mesh.barrier()
    return sorted(ours - theirs.keys()), sorted(theirs.keys() - ours)


def _put(snapshot: Snapshot, engine: Engine, kinds: Iterable[str], known: Container[str]) -> None:
    """This rank's part of every parameter that the checkpoint has, and of its moments."""
    owned = {fragment.shard.name: fragment for fragment in state.fragments(engine)}
    for shard, parameter in list(state.local_parameters(engine)):
        for kind in kinds if shard.name in known else ():
            local = shard.take(snapshot.whole(shard.name, kind)).to(engine.mesh.device)
            if fragment := owned.get(shard.name):
                view = fragment.views[kind]
                view.copy_(local.reshape(-1)[fragment.start : fragment.start + view.numel()])
            if kind == "master":
                state.refresh_weights(engine, shard, parameter, local)


def check_model(snapshot: Snapshot, engine: Engine, but: tuple[str, ...] = ()) -> None:
    """ValueError that names how the checkpoint's model differs from the engine's. but: where names of parameters begin that
    only one of them may have."""
    local = {shard.name: shard.shape for shard, _ in state.local_parameters(engine)}
    ours = {name: shape for stage in engine.mesh.gather(local) for name, shape in stage.items()}
    theirs = snapshot.shapes
    wrong = [
        f"{name}: {theirs.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} in the model"
        for name in sorted({**ours, **theirs})
        if theirs.get(name) != ours.get(name) and not (name.startswith(but) and (name not in ours or name not in theirs))
    ]
    was, now = ModelConfig(**snapshot.manifest["model"]), engine.build.model
    wrong += [
        f"{field} {getattr(was, field)} in the checkpoint, {getattr(now, field)} in the model"
        for field in MEANING
        if getattr(was, field) != getattr(now, field)
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(
            f"{snapshot.path} is a checkpoint of another model: {shown}. Use the model of its run.yaml, or another output"
        )
