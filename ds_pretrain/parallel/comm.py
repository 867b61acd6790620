"""Collectives that the rooms above ask for, and what an objective may ask of other data ranks (`core.batch.Comm`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pretrain.parallel.mesh import Mesh


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the group, in place."""
    dist.all_reduce(x, group=group)
    return x


class _Gather(torch.autograd.Function):
    """Stack the tensors of all ranks; each rank's gradient of its own is the sum of what all ranks send back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return all_reduce(gradient.contiguous().clone(), ctx.group)[dist.get_rank(ctx.group)], None


def gather_positions(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S / ranks, ...] of each rank of the group as [B, S, ...]; gradients flow back to their owners."""
    if dist.get_world_size(group) == 1:
        return x
    parts: Tensor = _Gather.apply(x, group)
    return parts.transpose(0, 1).flatten(1, 2)


class DataComm:
    """Gathers over data ranks only: tensor ranks hold copies and must not count twice."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def gather(self, x: Tensor) -> tuple[Tensor, int]:
        if self.mesh.data_size == 1:
            return x, 0
        counts = self._counts(len(x))
        padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
        found: Tensor = _Gather.apply(padded, self.mesh.data_group)
        rows = torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
        return rows, sum(counts[: self.mesh.at.data])

    def _counts(self, count: int) -> list[int]:
        """`count` of every data rank."""
        counts = torch.zeros(self.mesh.data_size, dtype=torch.int64, device=self.mesh.device)
        counts[self.mesh.at.data] = count
        return all_reduce(counts, self.mesh.data_group).tolist()
