"""Any objective under any layout is the same computation: losses of three steps and norms of their gradients, whose scale
Adam would hide, on one and on two ranks."""

import pytest
from every import engine_for, first_rows, samples

from ds_pretrain.objectives import REGISTRY, create
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn

ROWS, STEPS = 8, 3
LAYOUTS = {
    "DP2": (ParallelPlan(), 2),
    "DP2 ZeRO-3": (ParallelPlan(), 3),
    "TP2": (ParallelPlan(tensor=2), 1),
    "TP2+SP": (ParallelPlan(tensor=2, sequence=True), 1),
    "PP2": (ParallelPlan(pipeline=2), 1),
}


def losses(name, plan, stage):
    """Of the same rows, whoever trains on them; two micro-batches a rank, one where the pool is a micro-batch."""
    objective = create(name)
    data, rows = samples(objective), first_rows(samples(objective), ROWS * STEPS)
    deals = 1 if objective.pooled else 2
    mesh = Mesh.build(plan)
    micro = ROWS // deals // mesh.data_size
    engine = engine_for(objective, micro, deals, stage, plan)
    found = []
    for step in range(STEPS):
        mine = rows[step * ROWS + mesh.at.data * micro : (step + 1) * ROWS]
        batches = [data.collate(mine[deal * micro * mesh.data_size :][:micro]) for deal in range(deals)]
        result = engine.step(batches, step + 1, 1e-3)
        found.append({"loss": result.loss, "norm": result.grad_norm, **{head: result.sums[head] for head in result.sums}})
    return found


def every_case(layouts):
    found = {}
    for name in REGISTRY:
        for layout, (plan, stage) in layouts.items():
            if legal(name, plan):
                found[name, layout] = losses(name, plan, stage)
    return found


@pytest.fixture(scope="module")
def alone():
    return every_case({"one": (ParallelPlan(), 1)})


@pytest.fixture(scope="module")
def together():
    return spawn(2, every_case, LAYOUTS)


def legal(name, plan):
    """Two networks in one schedule run without a pipeline."""
    return not (create(name).generator and plan.pipeline > 1)


@pytest.mark.parametrize("name, layout", [(n, each) for n in REGISTRY for each in LAYOUTS if legal(n, LAYOUTS[each][0])])
def test_a_layout_changes_no_loss(alone, together, name, layout):
    for one, other in zip(alone[name, "one"], together[name, layout], strict=True):
        assert other == pytest.approx(one, rel=1e-4), (name, layout)
