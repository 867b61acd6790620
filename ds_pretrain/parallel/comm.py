"""Collectives that the rooms above ask for, and what an objective may ask of other data ranks (`core.batch.Comm`)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from ds_pretrain.parallel.mesh import Mesh


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the group, in place."""
    dist.all_reduce(x, group=group)
    return x


class DataComm:
    """Gathers over data ranks only: tensor ranks hold copies and must not count twice."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all data ranks, in rank order; gradients flow back to their owners."""
        if self.mesh.data_size == 1:
            return x
        return torch.cat(all_gather(x.contiguous(), group=self.mesh.data_group))

    def index(self) -> int:
        return self.mesh.at.data
