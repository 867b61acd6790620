"""Context parallelism: the positions of a row divided over ranks, all of them brought together for attention alone.

DeepSpeed Ulysses (Jacobs et al. 2023): an all-to-all turns "my positions of all heads" into "all positions of my heads" and
back. So whatever pattern a batch has, packed documents, prefixes, both, is attended to by the same kernels as on one rank.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ds_pretrain.models.attention import CoreAttention, Lowered
from ds_pretrain.parallel.mesh import Mesh


def divide_positions(network: nn.Module, mesh: Mesh) -> None:
    """Make every attention of the network see all positions, where `mesh` divides them."""
    if mesh.plan.context > 1:
        for core in network.modules():
            if isinstance(core, CoreAttention):
                core.across = _across(core, mesh)


def _across(core: CoreAttention, mesh: Mesh) -> Callable[[Tensor, Tensor, Tensor, Lowered], Tensor]:
    from deepspeed.sequence.layer import DistributedAttention

    ranks, whole = mesh.plan.context, DistributedAttention(core.local, mesh.context_group)

    def across(query: Tensor, key: Tensor, value: Tensor, pattern: Lowered) -> Tensor:
        if key.shape[2] % ranks:  # fewer key heads than ranks: one for each query head
            key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
        out: Tensor = whole.forward(query, key, value, 1, None, pattern)
        return out

    return across
