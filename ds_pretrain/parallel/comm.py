"""What an objective may ask of the other data-parallel ranks (`core.batch.Comm`)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from ds_pretrain.parallel.mesh import Mesh


class DataComm:
    """Gathers over data ranks only: tensor ranks hold copies and must not count twice."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all data ranks, in rank order; gradients flow back to their owners."""
        if self.mesh.data_size == 1:
            return x
        import torch

        return torch.cat(all_gather(x.contiguous(), group=self.mesh.data_group))

    def index(self) -> int:
        return dist.get_rank(self.mesh.data_group)
