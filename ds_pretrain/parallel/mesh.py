"""From an environment to a mesh: rendezvous, groups, and the random streams of each rank.

Rank, world size and meeting point come from the launcher's environment (`launch`); without one the process is a world of its
own and no port is opened.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.parallel.cpu import adapt
from ds_pretrain.parallel.launch import Place, join, place
from ds_pretrain.parallel.links import reach
from ds_pretrain.parallel.plan import Coordinate, ParallelPlan

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)
"""Of every collective. Longer than the watchdog waits, which tells more: where it came first, the rank that hangs would be
killed without its stack."""


def start(where: Place | None = None) -> Place:
    """Join the job's process group (NCCL with CUDA, gloo without). Safe to call twice."""
    if dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    where = where or place()
    if torch.cuda.is_available():
        torch.cuda.set_device(device(where.local_rank))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = join(where)
    reach(store, where)
    dist.init_process_group(backend, store=store, rank=where.rank, world_size=where.world, timeout=TIMEOUT)
    for name, value in (("RANK", where.rank), ("WORLD_SIZE", where.world), ("LOCAL_RANK", where.local_rank)):
        os.environ[name] = str(value)  # DeepSpeed and megatron-core read these, whoever the launcher was
    return where


def device(local_rank: int) -> torch.device:
    """What a rank computes on: of the GPUs that it is shown the one of its number, of one alone that."""
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a job arranged by a plan. One mesh at a time per process: megatron-core's groups are global."""

    plan: ParallelPlan
    rank: int
    world: int
    local_rank: int

    @staticmethod
    def build(plan: ParallelPlan) -> Mesh:
        """Create the groups of `plan` over all ranks of the job (collective)."""
        where = start()
        plan.data(where.world)
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401  (adapt patches what is imported)
        from megatron.core import parallel_state

        adapt()
        mesh = Mesh(plan, *where)
        if _standing != [mesh] or not parallel_state.model_parallel_is_initialized():
            _tear_down()
            parallel_state.initialize_model_parallel(
                plan.tensor,
                plan.pipeline,
                context_parallel_size=plan.context,
                create_gloo_process_groups=False,
                distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
            )
            _standing.append(mesh)
            _ends.extend(_groups_of_ends(mesh))
        mesh.seed(0, 0)
        return mesh

    @property
    def at(self) -> Coordinate:
        return self.plan.coordinate(self.rank, self.world)

    @property
    def data_size(self) -> int:
        return self.plan.data(self.world)

    @property
    def replicas(self) -> int:
        return self.plan.replicas(self.world)

    @property
    def replica(self) -> int:
        """This rank's place among the replicas."""
        return self.at.data * self.plan.context + self.at.context

    @property
    def first_stage(self) -> bool:
        return self.at.pipeline == 0

    @property
    def last_stage(self) -> bool:
        return self.at.pipeline == self.plan.pipeline - 1

    @property
    def device(self) -> torch.device:
        return device(self.local_rank)

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group()

    @property
    def context_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_context_parallel_group()

    @property
    def ends_group(self) -> dist.ProcessGroup:
        """The first and the last pipeline stage of all replicas, at this tensor rank: those that hold a tied weight."""
        return _ends[self.at.tensor]

    def seed(self, seed: int, step: int) -> None:
        """Make all dropout of this step a pure function of (seed, step, ...), so that a resume needs nothing saved.

        The default stream's seed, the same on every rank, is what hidden states are dropped by (`models/noise.py`). Attention
        drops its weights inside fused kernels, from a stream of each rank's own.
        """
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        torch.manual_seed(rng.torch_seed("dropout", seed, step))
        tracker = get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", rng.torch_seed("tensor", seed, step, *self.at))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over every rank of the job. Ranks that hold a copy must pass zeros."""
        dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        """The largest of every rank's numbers."""
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    def barrier(self) -> None:
        dist.barrier()


_standing: list[Mesh] = []
"""The mesh whose groups exist now. Building the same one again uses them: every gloo group costs a thread that wakes."""


_ends: list[dist.ProcessGroup] = []
"""By tensor rank; none without a pipeline."""


def _groups_of_ends(mesh: Mesh) -> list[dist.ProcessGroup]:
    if mesh.plan.pipeline == 1:
        return []
    places = [mesh.plan.coordinate(rank, mesh.world) for rank in range(mesh.world)]
    outer = [rank for rank, at in enumerate(places) if at.pipeline in (0, mesh.plan.pipeline - 1)]
    rows = [[rank for rank in outer if places[rank].tensor == t] for t in range(mesh.plan.tensor)]
    return [dist.new_group(row, timeout=TIMEOUT) for row in rows]


def _tear_down() -> None:
    from megatron.core import parallel_state

    for group in {id(g): g for g in [*(parallel_state._global_process_group_list or []), *_ends] if g}.values():
        with contextlib.suppress(ValueError, AssertionError):  # a group this rank is not in
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    _standing.clear()
    _ends.clear()


class Mpu:
    """The facade through which DeepSpeed asks for megatron's groups. Context ranks are data ranks to it."""

    def __init__(self) -> None:
        from megatron.core import parallel_state as state

        self.get_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = state.get_tensor_model_parallel_group
        self.get_tensor_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_tensor_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_tensor_model_parallel_group = state.get_tensor_model_parallel_group
        self.get_data_parallel_rank = partial(state.get_data_parallel_rank, with_context_parallel=True)
        self.get_data_parallel_world_size = partial(state.get_data_parallel_world_size, with_context_parallel=True)
        self.get_data_parallel_group = partial(state.get_data_parallel_group, with_context_parallel=True)
