"""The one description of a parameter that every layout shares: its name, its whole shape, and which slice is here.

Initial weights, checkpoints, parity and import all speak of parameters this way, so none of them knows a layout. Slices
follow megatron-core: along `dim`, and with `stride` 2 for SwiGLU's first matrix, where each rank holds a slice of the gate
followed by a slice of the up projection. (Merged with stride 1 the round trip is bit-equal and the model is wrong.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shard:
    """One parameter as this rank holds it.

    name: logical name, the same under every engine and layout. shape: whole shape, without vocabulary padding.
    local: shape of this rank's slice, padding included. dim: the divided dimension, None for a replica.
    stride: how many interleaved blocks a slice consists of.
    """

    name: str
    shape: tuple[int, ...]
    local: tuple[int, ...]
    dim: int | None = None
    stride: int = 1
    rank: int = 0
    ranks: int = 1

    def take(self, whole: Tensor) -> Tensor:
        """This rank's slice of the whole tensor; padding rows are zero."""
        if self.dim is None:
            return whole
        missing = self.local[self.dim] * self.ranks - whole.shape[self.dim]
        if missing:
            padding = list(whole.shape)
            padding[self.dim] = missing
            whole = torch.cat([whole, whole.new_zeros(padding)], self.dim)
        blocks = whole.chunk(self.stride * self.ranks, self.dim)
        return torch.cat([blocks[k * self.ranks + self.rank] for k in range(self.stride)], self.dim)

    def merge(self, slices: list[Tensor]) -> Tensor:
        """The whole tensor from the slices of all ranks, in rank order."""
        if self.dim is None:
            return slices[0]
        pieces = [s.chunk(self.stride, self.dim) for s in slices]
        whole = torch.cat([pieces[r][k] for k in range(self.stride) for r in range(len(slices))], self.dim)
        return whole.narrow(self.dim, 0, self.shape[self.dim])


def shards(module: nn.Module, tensor_rank: int, tensor_size: int) -> Iterator[tuple[Shard, nn.Parameter]]:
    """Every parameter of the layers in `module`, with its logical description.

    A layer says its own logical prefix in `logical`; a parameter whose whole shape is not slice x ranks (a padded
    vocabulary) says it in `whole_rows`. Works on the modules of both engines, whatever names they wrap around.
    """
    seen: set[int] = set()
    for layer in module.modules():
        prefix = getattr(layer, "logical", None)
        for name, parameter in layer.named_parameters() if prefix is not None else ():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield _describe(f"{prefix}.{name}", parameter, tensor_rank, tensor_size), parameter


def _describe(name: str, parameter: nn.Parameter, rank: int, ranks: int) -> Shard:
    local = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties the tensor and keeps its shape here
    if not getattr(parameter, "tensor_model_parallel", False):
        return Shard(name, local, local)
    dim, shape = parameter.partition_dim, list(local)  # type: ignore[attr-defined]
    shape[dim] = getattr(parameter, "whole_rows", shape[dim] * ranks)
    return Shard(name, tuple(shape), local, dim, parameter.partition_stride, rank, ranks)  # type: ignore[attr-defined]
