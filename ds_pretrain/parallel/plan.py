"""Which rank does what: arithmetic only, so that a layout can be looked at without starting it.

Ranks count tensor fastest, then data, pipeline outermost: the order of megatron-core's "tp-cp-ep-dp-pp" and of
DeepSpeed's PipeModelDataParallelTopology, so that both libraries mean the same neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Coordinate(NamedTuple):
    """Where a rank sits on each axis."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How one model is laid over the ranks; what is left of the world is data parallel.

    tensor: ranks that share every matrix. pipeline: stages the layers are divided into. sequence: whether activations
    between the matrices are divided over the tensor ranks along the sequence (Korthikanti et al. 2022).
    """

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        if self.tensor < 1 or self.pipeline < 1:
            raise ValueError(f"tensor {self.tensor} and pipeline {self.pipeline} must be at least 1")

    def data(self, world: int) -> int:
        """Data-parallel ranks in a world of that size."""
        if world % (self.tensor * self.pipeline):
            raise ValueError(
                f"{world} ranks cannot be divided into parallel.tensor {self.tensor} x parallel.pipeline "
                f"{self.pipeline}: start a multiple of {self.tensor * self.pipeline} ranks"
            )
        return world // (self.tensor * self.pipeline)

    def coordinate(self, rank: int, world: int) -> Coordinate:
        data = self.data(world)
        return Coordinate(rank // (self.tensor * data), rank // self.tensor % data, rank % self.tensor)

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}"] * (self.tensor > 1) + [f"PP{self.pipeline}"] * (self.pipeline > 1)
        return "x".join(parts) + "+SP" * self.sequence or "1"


def stage_of_layer(layers: int, stages: int) -> list[int]:
    """The stage of each transformer layer: as even as can be, the remainder on the first stages."""
    return [stage for stage in range(stages) for _ in range(layers // stages + (stage < layers % stages))]
