"""Who moves whom: one token of a row is changed, and exactly the outputs that its attention lets see it may move.

A leak between documents or past a horizon shows here under the layout that has it, with all its kernels and collectives, and
so does sight that got lost. Two layers carry what one position sees of another on to a third, so what may move is the mask's
closure over the layers. Nothing else is tolerated: elsewhere states must be the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Batch, Comm, Head, Readout

if TYPE_CHECKING:
    from ds_pretrain.training.engine import Engine

CHANGES = 3
"""Tokens of each row that are changed, one at a time."""


def strayed(engine: Engine, batch: Batch, exact: bool = True) -> int:
    """Outputs of this micro-batch that moved and should not have, or the other way round, on any rank (collective).

    exact: also count those that did not move and should have; half precision may round a small move away.
    """
    asked = engine.objective.generator  # a generator would rewrite the row anew, so it is not asked
    batch = replace(
        batch, targets={name: target for name, target in batch.targets.items() if asked is None or name != asked[0]}
    )
    chosen = [_positions(batch, number) for number in range(CHANGES)]
    before, *after = _states(engine, [batch, *(_changed(batch, at) for at in chosen)])
    if before is None:
        return engine.mesh.max(0)
    sight = _closure(batch.attention.dense(), engine.build.model.layers)
    wrong = 0
    for at, states in zip(chosen, after, strict=True):
        assert states is not None
        moved = torch.ne(states, before).any(-1).cpu()
        allowed = sight.gather(2, at[:, None, None].expand(-1, sight.shape[1], 1))[..., 0]
        wrong += int((moved & ~allowed).sum()) + exact * int((allowed & ~moved).sum())
    return engine.mesh.max(wrong)


@dataclass
class _Listener:
    """An objective that only keeps the states it is shown."""

    heads: tuple[Head, ...]
    found: list[Tensor] = field(default_factory=list)

    def loss(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        self.found.append(read.states().detach())
        return {head.name: torch.zeros((), device=self.found[-1].device) for head in self.heads}


def _states(engine: Engine, batches: list[Batch]) -> list[Tensor] | list[None]:
    """Final hidden states [B, S, H] of each micro-batch; None on stages that have none."""
    listener, criterion = _Listener(engine.objective.heads), engine.criterion
    real, criterion.objective = criterion.objective, listener  # type: ignore[assignment]
    criterion.start({head.name: 1.0 for head in listener.heads})
    try:
        with torch.no_grad():
            engine._evaluate(batches)
    finally:
        criterion.objective = real
        criterion.start({})
    return listener.found or [None] * len(batches)


def _positions(batch: Batch, number: int) -> Tensor:
    """int64 [B]: a position of each row that holds a token."""
    draw = rng.torch_generator("influence", number)
    weights = (batch.attention.segment != 0).float() + 1e-9  # a row of padding has none: its padding moves nothing
    return torch.multinomial(weights, 1, generator=draw)[:, 0]


def _changed(batch: Batch, at: Tensor) -> Batch:
    inputs, rows = batch.inputs.clone(), torch.arange(len(at))
    inputs[rows, at] = torch.where(inputs[rows, at] == inputs.max(), inputs[rows, at] - 1, inputs.max())
    return replace(batch, inputs=inputs)


def _closure(mask: Tensor, layers: int) -> Tensor:
    """Bool [B, S, S]: what a position can learn of through so many layers, itself included."""
    sees = (mask | torch.eye(mask.shape[1], dtype=torch.bool)).float()
    reach = sees
    for _ in range(layers - 1):
        reach = (reach @ sees > 0).float()
    return reach > 0
