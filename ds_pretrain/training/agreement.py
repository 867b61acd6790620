"""Ranks that hold copies must hold the same bits: compared at step 1, after every resume and every so many steps.

Copies are working weights over data ranks, undivided parameters over tensor ranks, tied embeddings over pipeline stages, and
of ZeRO's fragments those that two ranks own alike. Beside weights and masters Adam's moments are compared, and the first of
them after step 1 is the gradient: a reduction that is missing anywhere shows there before it has done harm. Every rank
hashes what it holds (xxh3, gigabytes per second) and one gather of hashes does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from ds_pretrain.parallel.shards import Shard
from ds_pretrain.training import state
from ds_pretrain.training.engine import Engine

SHOWN = 3
"""Disagreements that a message names."""


class DisagreementError(ArithmeticError):
    """Ranks that should hold the same numbers do not. found: what, and who."""

    def __init__(self, step: int, found: Sequence[str]) -> None:
        self.found = list(found)
        more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
        super().__init__(
            f"step {step:,}: ranks disagree about what they must hold alike: {'; '.join(found[:SHOWN])}{more}. The run is not "
            "one computation any more: look for a reduction that is missing or a rank with other data, code or memory errors, "
            "and go on from an earlier checkpoint"
        )


class Held(NamedTuple):
    """Numbers of which every holder must have the same: `kind` of a parameter's slice, `numel` elements from `start`."""

    kind: str
    name: str
    slice: int
    start: int
    numel: int


def check(engine: Engine, step: int) -> None:
    """Compare over all ranks (collective). DisagreementError, on every rank, names parameters and ranks."""
    if found := disagreements(engine.mesh.gather(dict(_held(engine)))):
        raise DisagreementError(step, found)


def disagreements(everyone: Sequence[Mapping[Held, int]]) -> list[str]:
    """What ranks hold in different versions, given the hashes that each has."""
    versions: dict[Held, dict[int, list[int]]] = {}
    for rank, held in enumerate(everyone):
        for key, digest in held.items():
            versions.setdefault(key, {}).setdefault(digest, []).append(rank)
    return [_told(key, [*found.values()]) for key, found in versions.items() if len(found) > 1]


def _told(key: Held, camps: Sequence[Sequence[int]]) -> str:
    ranks = " and ".join(f"rank{'s' * (len(camp) > 1)} {', '.join(map(str, camp))}" for camp in camps)
    return f"{key.kind} of {key.name} between {ranks}"


def _held(engine: Engine) -> Iterator[tuple[Held, int]]:
    """What this rank holds copies of, perhaps, and its hashes."""
    if engine.stage < 3:
        for shard, parameter in state.local_parameters(engine):
            yield Held("weights", shard.name, _slice(shard), 0, parameter.numel()), _hash(parameter)
    for fragment in state.fragments(engine):
        for kind, view in fragment.views.items():
            yield Held(kind, fragment.shard.name, _slice(fragment.shard), fragment.start, view.numel()), _hash(view)


def _slice(shard: Shard) -> int:
    return -1 if shard.dim is None else shard.rank


def _hash(x: Tensor) -> int:
    flat = x.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    return xxhash.xxh3_64_intdigest(flat.numpy().data)
