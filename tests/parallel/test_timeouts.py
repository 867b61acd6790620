"""No collective waits for ever: every group of a job ends with an error after the same time, DeepSpeed's and Megatron's too."""

import torch.distributed as dist

from ds_pretrain.evaluation import parity
from ds_pretrain.objectives import create
from ds_pretrain.parallel.mesh import TIMEOUT, Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training import deepspeed_json
from ds_pretrain.training.engine import build_for, create_engine
from ds_pretrain.training.optimizer import OptimizerConfig

CASES = [
    (ParallelPlan(), 1), (ParallelPlan(), 3),
    (ParallelPlan(tensor=2), 1), (ParallelPlan(pipeline=2), 1), (ParallelPlan(context=2), 1),
]  # fmt: skip
"""Layouts and ZeRO stages."""


def timeouts():
    """By case and rank, the seconds of every group that there is then."""
    return [(case, rank, found) for case in CASES for rank, found in enumerate(of_groups(*case))]


def of_groups(plan, stage):
    mesh = Mesh.build(plan)
    model = parity.model_for("clm").model_copy(update={"positions": 32})
    config = deepspeed_json.filled({"zero_optimization": {"stage": stage}}, mesh.replicas, 4, 2, 1.0)
    create_engine(build_for(create("clm"), model, mesh, 32), create("clm"), OptimizerConfig(), config)
    groups = dist.distributed_c10d._world.pg_map
    return mesh.gather([group._get_backend(mesh.device).options._timeout.total_seconds() for group in groups])


def test_every_group_has_the_same_timeout():
    for case, rank, found in spawn(2, timeouts):
        assert len(found) > 3 and {*found} == {TIMEOUT.total_seconds()}, (case, rank)
