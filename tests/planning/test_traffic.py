"""Bytes as they are predicted against bytes as the kernel counts them, under every layout; and against the papers' formulas."""

import gc
import json

import pytest
import torch
import torch.distributed as dist
from test_config import BASE

from ds_pretrain.config import parse_run
from ds_pretrain.data.loader import Loader
from ds_pretrain.evaluation import parity
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel import wire
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.planning.traffic import GLOO, NCCL, predicted, tables
from ds_pretrain.training import deepspeed_json

ROWS, LENGTH = 16, 64
WIDE = parity.CAUSAL.model_copy(update={"hidden": 256, "ffn": 512})
"""Has parameters that ZeRO-3 divides: others are smaller than its threshold."""
SHORT = {"stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 1000}
TP, PP, CP = {"tensor": 2}, {"pipeline": 2}, {"context": 2}
SP = {**TP, "sequence": True}
Case = tuple[str, dict, int, int, bool, str, dict]
"""Objective, layout, ZeRO stage, micro-batches, recomputation, precision, further settings of ZeRO."""
CASES: dict[int, list[Case]] = {
    2: [
        ("clm", {}, 0, 1, False, "fp32", {}),
        ("clm", {}, 1, 2, False, "bf16", {}),
        ("clm", {}, 1, 2, False, "fp32", {"use_multi_rank_bucket_allreduce": False}),
        ("clm", {}, 2, 2, True, "fp32", {}),
        ("clm", {}, 3, 2, False, "fp32", {}),
        ("clm", {}, 3, 2, True, "bf16", SHORT),
        ("simcse", {}, 1, 2, False, "fp32", {}),
        ("clm", TP, 0, 2, True, "fp32", {}),
        ("electra", TP, 2, 1, False, "fp32", {}),
        ("fim", TP, 1, 2, False, "bf16", {}),
        ("mlm", SP, 1, 2, True, "fp32", {}),
        ("electra", SP, 1, 1, False, "bf16", {}),
        ("clm", PP, 1, 2, True, "fp32", {}),
        ("mlm", PP, 1, 1, False, "bf16", {}),
        ("clm", CP, 1, 2, True, "fp32", {}),
        ("simcse", CP, 3, 1, False, "fp32", {}),
    ],
    4: [
        ("clm", {}, 1, 2, False, "fp32", {}),
        ("mlm", {}, 3, 2, False, "bf16", {}),
        ("clm", TP, 0, 2, False, "fp32", {}),
        ("clm", SP, 3, 2, False, "bf16", {}),
        ("mlm", {"tensor": 4, "sequence": True}, 0, 1, True, "fp32", {}),
        ("mlm", {"tensor": 4}, 1, 2, False, "fp32", {}),
        ("mlm", {"context": 4}, 1, 1, False, "fp32", {}),
        ("mlm", {**CP, **SP}, 1, 2, False, "bf16", {}),
        ("mlm", PP, 1, 2, False, "fp32", {}),
        ("clm", {"pipeline": 4}, 1, 2, False, "fp32", {}),
        ("clm", {**TP, **PP}, 1, 2, True, "fp32", {}),
        ("mlm", {**SP, **PP}, 1, 2, False, "fp32", {}),
        ("clm", CP, 2, 2, False, "fp32", {}),
        ("electra", {**CP, **TP}, 1, 1, False, "fp32", {}),
        ("mlm", {**CP, **PP}, 1, 2, False, "fp32", {}),
    ],
}  # fmt: skip


def shape(case: Case) -> ModelConfig:
    objective, layout, stage = case[:3]
    model = WIDE if objective == "clm" and stage == 3 else parity.model_for(objective)
    return model.model_copy(update={"positions": LENGTH, "layers": max(model.layers, layout.get("pipeline", 1))})


def run_of(case: Case, world: int, folder):
    """The run file of a case."""
    objective, layout, stage, accumulation, recompute, precision, zero = case
    path = folder / f"{world} {CASES[world].index(case)}.json"
    half = {precision: {"enabled": True}} if precision != "fp32" else {}
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **zero}, **half}))
    data = world // (layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1))
    return parse_run(
        {
            **BASE,
            "objective": {"name": objective, **parity.OPTIONS.get(objective, {})},
            "batch": {"global_size": ROWS, "micro_size": ROWS // data // accumulation, "seq_len": LENGTH},
            "parallel": layout,
            "train": {"max_steps": 10, "activation_checkpointing": recompute},
            "optimizer": {"warmup_steps": 1},
            "deepspeed": {"config": str(path)},
        }
    )


def measured(runs):
    """For each run what every rank sends in a step, and what share of the positions its heads score; what every rank sends for
    an operation on so many fp32 elements."""
    steps = [one_step(*run) for run in runs]
    mesh = Mesh.build(ParallelPlan())
    return steps, {(name, numel): mesh.gather(sends(name, numel, mesh)) for name in GLOO for numel in (96_000, 2_400_000)}


def one_step(run, model):
    from ds_pretrain.training.engine import build_for, create_engine, share_groups
    from ds_pretrain.training.optimizer import OptimizerConfig

    share_groups()
    mesh, objective, batch = Mesh.build(run.parallel.plan()), run.make_objective(), run.batch
    build = build_for(objective, model, mesh, LENGTH, run.train.activation_checkpointing)
    accumulation = ROWS // mesh.data_size // batch.micro_size
    config = deepspeed_json.filled(run.deepspeed_json(), mesh.replicas, batch.micro_size, accumulation, 1.0)
    engine = create_engine(build, objective, OptimizerConfig(), config)
    data = parity.samples(objective.name, LENGTH)
    steps = 3 if engine.stage == 3 else 2  # it learns in the first two what it needs when
    with Loader(data, ROWS, batch.micro_size, mesh.at.data, mesh.data_size) as loader:
        for number in range(1, steps + 1):
            batches = next(loader).batches
            gc.collect()  # groups that earlier engines left
            before = wire.counts()
            engine.step(batches, number, 1e-3)
            mesh.max(0)  # the training loop asks whether to stop
            sent = wire.since(before)
    shares = {h.name: float(sum((b.targets[h.name].weights != 0).float().mean() for b in batches)) for h in objective.heads}
    everyone = mesh.gather((sent, shares))
    means = {name: sum(found[name] for _, found in everyone) / mesh.world / accumulation for name in shares}
    return [count for count, _ in everyone], means


def sends(operation: str, numel: int, mesh: Mesh) -> int:
    """What this rank sends for one operation. Even ranks send to odd ones."""
    whole, part, even = torch.zeros(numel), torch.zeros(numel // mesh.world), mesh.rank % 2 == 0
    does = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce": lambda: [dist.reduce(whole, root) for root in range(mesh.world)],
        "broadcast": lambda: dist.broadcast(whole, 0),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(numel), whole),
        "send": lambda: dist.send(whole, mesh.rank + 1) if even else dist.recv(whole, mesh.rank - 1),
    }
    does["receive"] = does["send"]
    does[operation]()
    before = wire.counts()
    does[operation]()
    counts = even if operation == "send" else operation != "receive" or not even
    return wire.since(before) if counts else 0


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_sends_what_is_predicted(world, tmp_path):
    runs = [(run_of(case, world, tmp_path), shape(case)) for case in CASES[world]]
    steps, operations = spawn(world, measured, runs)
    wrong = []
    for case, (run, model), (counts, shares) in zip(CASES[world], runs, steps, strict=True):
        traffic, plan = predicted(run, model, world, shares), run.parallel.plan()
        for rank, count in enumerate(counts):
            stage = plan.coordinate(rank, world).pipeline
            expected, least = traffic.sent(GLOO)[stage], sum(traffic.minimum(stage).values())
            wrong += [(case, rank, count, expected, least)] if abs(expected - count) > 0.01 * count or count < least else []
    assert not wrong
    for (operation, numel), counts in operations.items():
        ranks, times = (2, world // 2) if operation in ("send", "receive") else (world, world)
        times = times * world if operation == "reduce" else times
        expected = times * GLOO[operation](ranks, numel, 4 * numel)
        assert sum(counts) == pytest.approx(expected, rel=0.01), (operation, numel, counts)


def plain(world, objective="clm", config="zero1_bf16.json", scored=None, **parallel):
    """Traffic of a GPT-2 with 4 layers, 8 rows of 128 in two micro-batches on each of 2 data ranks; and the model."""
    run = parse_run(
        {
            **BASE,
            "model": {"preset": "gpt2-small", "layers": 4, "vocab": 1000, "positions": 128},
            "objective": {"name": objective},
            "batch": {"global_size": 16, "micro_size": 4, "seq_len": 128},
            "parallel": parallel,
            "deepspeed": {"config": config},
        }
    )
    return predicted(run, run.model, world, scored), run.model


def test_one_rank_sends_nothing():
    traffic, _ = plain(1)
    assert traffic.stages == ((),) and traffic.sent(GLOO) == [0]


@pytest.mark.parametrize(
    ("config", "sent", "least"),
    [  # parameters' bytes that each rank sends, over (n - 1) / n: Rajbhandari et al. 2020, section 7, for two micro-batches
        ("zero0_fp32.json", 2 * 4, 2 * 4),
        ("zero1_bf16.json", (2 + 1) * 2, (1 + 1) * 2),
        ("zero2_bf16.json", (2 * 2 + 1) * 2, (2 * 1 + 1) * 2),
    ],
)
def test_data_parallel_bytes_are_those_of_the_paper(config, sent, least):
    traffic, model = plain(2, config=config)
    count = model.count_parameters() / 2
    assert sum(traffic.by_use(NCCL, 0).values()) == pytest.approx(sent * count, rel=1e-5)
    assert sum(traffic.minimum(0).values()) == pytest.approx(least * count, rel=1e-5)


def test_tensor_parallel_bytes_are_those_of_the_paper():
    x = 4 * 128 * 768 * 2 * 4  # micro-batch of bf16 hidden states, 4 micro-batches
    traffic, model = plain(4, tensor=4)
    assert traffic.by_use(NCCL, 0)["tensor: layers"] == 4 * model.layers * 2 * 3 / 4 * x  # Shoeybi et al. 2019, figure 4
    divided, _ = plain(4, tensor=4, sequence=True)
    assert divided.by_use(NCCL, 0)["tensor: layers"] == 4 * model.layers * 2 * 3 / 4 * x  # Korthikanti et al. 2022, section 4.2
    assert divided.by_use(NCCL, 0)["tensor: inputs gathered again"] == 2 * model.layers * 3 / 4 * x


def test_what_is_needed_is_no_more_than_what_is_sent():
    for parallel in (TP, SP, PP, CP, {**TP, **PP}, {**SP, **PP, **CP}):
        traffic, _ = plain(16, **parallel)
        for stage in range(len(traffic.stages)):
            sent, least = traffic.by_use(NCCL, stage), traffic.minimum(stage)
            assert all(0 <= least[use] <= sent[use] for use in sent) and sum(least.values()) < sum(sent.values())


def test_a_head_costs_what_it_scores():
    promised, _ = plain(2, "mlm", **TP)
    told, _ = plain(2, "mlm", scored={"mlm": 0.3}, **TP)
    use = "head over the vocabulary"
    assert told.by_use(NCCL, 0)[use] == pytest.approx(2 * promised.by_use(NCCL, 0)[use])
    assert {**told.by_use(NCCL, 0), use: 0} == {**promised.by_use(NCCL, 0), use: 0}


def test_tables_add_up():
    traffic, _ = plain(4, **TP, **PP)
    by_use, by_stage = tables(traffic)
    for column, costs in ((1, NCCL), (2, GLOO)):
        cells = [float(cell.replace(",", "")) for cell in by_use.columns[column].cells]
        assert sum(cells[:-1]) == pytest.approx(cells[-1], abs=0.01)
        assert cells[-1] == pytest.approx(max(traffic.sent(costs)) / 1e6, abs=0.001)
    assert by_stage.row_count == 2
