"""Which rank does what: arithmetic only, so that a layout can be looked at without starting it.

Ranks count tensor fastest, then context, then data, pipeline outermost: the order of megatron-core's "tp-cp-ep-dp-pp" and
of DeepSpeed's PipeModelDataParallelTopology, so that both libraries mean the same neighbours. DeepSpeed knows no context
ranks here: they hold the same weights as data ranks do, and for ZeRO both are replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Coordinate(NamedTuple):
    """Where a rank sits on each axis."""

    pipeline: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How one model is laid over the ranks; what is left of the world is data parallel.

    tensor: ranks that share every matrix. pipeline: stages the layers are divided into. sequence: whether activations
    between the matrices are divided over the tensor ranks along the sequence (Korthikanti et al. 2022). context: ranks that
    share every row, each with a part of its positions everywhere but in attention, where each has all positions and a part of
    the heads (DeepSpeed Ulysses: Jacobs et al. 2023).
    """

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    context: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.context) < 1:
            raise ValueError(f"tensor {self.tensor}, context {self.context} and pipeline {self.pipeline} must be at least 1")

    @property
    def unit(self) -> int:
        """Ranks that hold the model once."""
        return self.tensor * self.context * self.pipeline

    def data(self, world: int) -> int:
        """Data-parallel ranks in a world of that size."""
        if world % self.unit:
            raise ValueError(f"{world} ranks cannot be divided into {self.product()}: start a multiple of {self.unit} ranks")
        return world // self.unit

    def replicas(self, world: int) -> int:
        """Ranks that hold the same part of the model: DeepSpeed's data ranks."""
        return self.data(world) * self.context

    def product(self) -> str:
        """The ranks of one model by the fields of a run file."""
        context = f" x parallel.context {self.context}" * (self.context > 1)
        return f"parallel.tensor {self.tensor}{context} x parallel.pipeline {self.pipeline}"

    def coordinate(self, rank: int, world: int) -> Coordinate:
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data(world))
        return Coordinate(pipeline, data, context, tensor)

    def __str__(self) -> str:
        axes = (("TP", self.tensor), ("CP", self.context), ("PP", self.pipeline))
        return "x".join(f"{name}{size}" for name, size in axes if size > 1) + "+SP" * self.sequence or "1"


def stage_of_layer(layers: int, stages: int) -> list[int]:
    """The stage of each transformer layer: as even as can be, the remainder on the first stages."""
    return [stage for stage in range(stages) for _ in range(layers // stages + (stage < layers % stages))]


def layout_of(plan: ParallelPlan, world: int) -> str:
    """The name of a plan in a world of that size, such as TP2xDP2."""
    data = plan.data(world)
    axes = [name for name in (str(plan), f"DP{data}") if name not in ("1", "DP1")]
    return "x".join(axes) or "1"


def plan_of(layout: str) -> tuple[ParallelPlan, int]:
    """The plan and the world size of a name. ValueError if it is none."""
    parts = layout.replace("+SP", "").split("x")
    size = {"TP": 1, "CP": 1, "PP": 1, "DP": 1}
    for part in parts if parts != ["1"] else ():
        if part[:2] not in size or not part[2:].isdecimal():
            raise ValueError(f"layout {layout!r}: name the axes and their ranks, such as DP4, TP2xDP2 or TP2+SPxPP2")
        size[part[:2]] = int(part[2:])
    plan = ParallelPlan(tensor=size["TP"], context=size["CP"], pipeline=size["PP"], sequence="+SP" in layout)
    return plan, plan.unit * size["DP"]
