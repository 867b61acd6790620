"""A checkpoint with a larger vocabulary: new rows where the vocabulary has rows, everything else byte for byte.

Read whole parameters, add rows, write them whole: a checkpoint knows no layout, nor the padding of the vocabulary that tensor
ranks need, which is made anew when it is loaded, so both may change here. Old rows stay as they are, and so do the logits of
old tokens; what a new row takes of the probability is up to it.

Rows of no id, which imported models have where they were padded, are the first to be taken.

A new row is the mean of the old pieces that spell the token, so that it begins near what the model knew of them (Gee et al.
2022, "Fast Vocabulary Transfer"); or it is drawn around the mean of all rows with a billionth of their covariance (Hewitt 2021,
as `resize_token_embeddings` of transformers does), which takes least of the probability where nothing is known of the token.
Adam's moments of new rows are zero; its step count is the whole model's and stays, so first updates of new rows are larger
than those of a fresh start.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.parallel.shards import Shard
from ds_pretrain.training import checkpoint
from ds_pretrain.training.checkpoint import Piece, Snapshot

SPREAD = 1e-9
"""Share of the covariance that new rows are drawn with: that of transformers."""
TABLES = ("word.weight", "output.weight")
BIASES = ".output_bias.bias"
"""The parameters with a row for each id, a generator's among them."""
Parts = Sequence[Sequence[int]]


def resize(
    source: Path,
    output: Path,
    vocab: int,
    parts: Parts | None = None,
    data: str | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
) -> Path:
    """Write `output/checkpoints/step-N` from the checkpoint `source` (a step-N folder), with rows for `vocab` ids.

    parts: for each new id the old ids that spell it, none where nothing does (it then gets the mean of all rows); left out,
    new rows are drawn. data: the digest of the dataset that a run goes on with, from its beginning; left out, the checkpoint
    serves evaluation and generation, and resuming is refused. tokenizer: the digest of the one that has these ids.
    """
    if found := checkpoint.damages(source):
        raise ValueError(f"{source} is not a sound checkpoint: {found[0]}")
    snapshot = Snapshot(source)
    rows = snapshot.manifest["model"]["vocab"]
    old = snapshot.manifest.get("origin", {}).get("ids", rows)
    _check(snapshot, vocab, old, rows, parts)
    final = output / "checkpoints" / source.name
    if final.exists():
        raise ValueError(f"{final} exists: choose another output, or remove it")
    first = snapshot.manifest.get("resized", {"from": old})  # also where it was resized more than once
    known = {"model": snapshot.manifest["model"] | {"vocab": max(vocab, rows)}, "resized": first}
    manifest = (
        snapshot.manifest | known | {"tokenizer": tokenizer} | {"origin": snapshot.manifest.get("origin", {}) | {"ids": vocab}}
    )
    if data is not None:
        manifest |= {"data": data, "cursor": None}
    else:
        manifest["data"] = f"{manifest['data']}, resized"
    attempt = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(attempt, ignore_errors=True)
    attempt.mkdir(parents=True)
    try:
        pieces = _pieces(snapshot, old, vocab, parts, seed)
        files = [checkpoint.write_file(attempt, *file) for file in checkpoint.packed(0, pieces)]
        checkpoint.commit(attempt, final, manifest | {"files": files})
    except BaseException:
        shutil.rmtree(attempt, ignore_errors=True)
        raise
    return final


def new_rows(rows: Tensor, count: int, parts: Parts | None, generator: torch.Generator) -> Tensor:
    """`count` rows after these: means of parts, or drawn around the mean of all."""
    rows = rows.double()
    mean = rows.mean(0)
    if parts is not None:
        return torch.stack([rows[list(ids)].mean(0) if len(ids) else mean for ids in parts]).float()
    flat = (rows - mean).view(len(rows), -1)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(rows))
    noise = torch.randn(count, len(values), dtype=torch.float64, generator=generator)
    drawn = noise * (SPREAD * values.clamp(min=0)).sqrt() @ vectors.T
    return (mean + drawn.view(count, *rows.shape[1:])).float()


def _check(snapshot: Snapshot, vocab: int, old: int, rows: int, parts: Parts | None) -> None:
    if vocab <= old:
        raise ValueError(f"{snapshot.path} has {old} ids, {vocab} are asked for: a vocabulary grows only")
    if parts is not None and len(parts) != vocab - old:
        raise ValueError(f"{vocab} ids are {vocab - old} more than {snapshot.path} has, but {len(parts)} are spelled out")
    if strange := [i for ids in parts or () for i in ids if not 0 <= i < old]:
        raise ValueError(
            f"a new id is spelled with id {strange[0]}, {snapshot.path} has ids below {old}: the parts are of another tokenizer"
        )
    wrong = [f"{name} {shape}" for name, shape in snapshot.shapes.items() if _has_ids(name) and shape[0] != rows]
    assert not wrong, wrong


def _has_ids(name: str) -> bool:
    return name in TABLES or name.endswith(BIASES)


def _pieces(snapshot: Snapshot, old: int, vocab: int, parts: Parts | None, seed: int) -> Iterator[tuple[Piece, Tensor]]:
    """Every parameter and moment as one piece."""
    for name, kind in snapshot.index:
        whole = snapshot.whole(name, kind)
        if _has_ids(name):
            whole = torch.cat([whole[:old], _more(whole[:old], name, kind, vocab, parts, seed), whole[vocab:]])
        shape = tuple(whole.shape)
        yield Piece(kind, Shard(name, shape, shape), 0), whole.reshape(-1)


def _more(whole: Tensor, name: str, kind: str, vocab: int, parts: Parts | None, seed: int) -> Tensor:
    count = vocab - len(whole)
    if kind != "master":
        return whole.new_zeros(count, *whole.shape[1:])
    return new_rows(whole, count, parts, rng.torch_generator("resize", name, seed))
