"""16 steps straight are 8, a resume and 8 more: bit for bit, dropout on, under every layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.evaluation.parity import cases
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training.checkpoint import Snapshot
from ds_pretrain.training.optimizer import OptimizerConfig
from ds_pretrain.training.trainer import PreTrainer

HALF, LAST = 8, 16
CAUSAL = ModelConfig(layers=2, hidden=32, heads=4, dropout=0.1)
MASKED = ModelConfig(preset="bert-1m", layers=2, hidden=32, heads=4)
ON_FOUR = [
    ParallelPlan(tensor=2),
    ParallelPlan(pipeline=2),
    ParallelPlan(tensor=2, pipeline=2),
    ParallelPlan(tensor=2, context=2),
]
"""Layouts of four ranks: what two cannot have, and as many data ranks."""


def trainer(data, output, plan, stage, objective, half=False, **more):
    dataset = PretrainingDataset(data, seq_len=32, objective=objective, seed=3)
    model = CAUSAL if dataset.objective.kind == "causal" else MASKED
    deepspeed = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": half}}
    settings = {"batch_size": 4, "micro_batch_size": 2, "max_steps": LAST, "save_every": HALF, "keep": 9, "progress": False}
    return PreTrainer(
        model=model, objective=dataset.objective, dataset=dataset, plan=plan, deepspeed=deepspeed, output=output,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5), **{**settings, **more},
    )  # fmt: skip


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def straight_and_resumed(data, folder, todo):
    """On the ranks: every case twice; rank 0 says what differs."""
    found = []
    for number, (plan, stage, objective, half) in enumerate(todo):
        whole, part = folder / f"{len(todo)}-{number}-whole", folder / f"{len(todo)}-{number}-part"
        straight = trainer(data, whole, plan, stage, objective, half)
        straight.train()
        if straight.mesh.rank == 0:
            shutil.copytree(whole / "checkpoints" / f"step-{HALF}", part / "checkpoints" / f"step-{HALF}")
        straight.mesh.barrier()
        resumed = trainer(data, part, plan, stage, objective, half)
        assert resumed.step == HALF and 0 < resumed.cursor.row < 10**6
        resumed.train()
        if straight.mesh.rank == 0:
            found.append(difference(whole, part))
    return found


def difference(whole, part):
    expected, got = losses(whole), losses(part)
    a, b = (Snapshot(out / "checkpoints" / f"step-{LAST}") for out in (whole, part))
    return {
        "losses": [step for step in range(HALF + 1, LAST + 1) if expected[step] != got[step]],
        "tensors": [key for key in a.index if not torch.equal(a.whole(*key), b.whole(*key))],
        "compared": len(a.index),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resume_is_bitwise_under_every_layout(world, data, tmp_path):
    legal = [case for case in cases(world, ["clm"]) if case.illegal is None]
    every = (ParallelPlan(), ParallelPlan(tensor=2))  # with all stages; the other layouts with their last one
    if world == 4:
        every, legal = (), [case for case in legal if case.plan in ON_FOUR]
    last = {case.plan: case.stage for case in legal}
    layouts = dict.fromkeys((c.plan, c.stage) for c in legal if c.plan in every or c.stage == last[c.plan])
    todo = [(plan, stage, ("clm", "mlm")[i % 2], False) for i, (plan, stage) in enumerate(layouts)]
    todo += [(plan, 1, "clm", True) for plan in dict.fromkeys(plan for plan, _ in layouts)] if world < 4 else []
    for case, found in zip(todo, spawn(world, straight_and_resumed, data, Path(tmp_path), todo), strict=True):
        assert found["losses"] == [] and found["tensors"] == [] and found["compared"] > 50, case


def elastic(data, output, plan, stage):
    """On the ranks: go on from what is in `output`. Attention's own dropout is each rank's, so there is none."""
    model = CAUSAL.model_copy(update={"attention_dropout": 0.0})
    dataset = PretrainingDataset(data, seq_len=32, objective="clm", seed=3)
    PreTrainer(
        model=model, objective=dataset.objective, dataset=dataset, plan=plan, batch_size=4, micro_batch_size=1,
        deepspeed={"zero_optimization": {"stage": stage}}, output=output, max_steps=40, save_every=20, keep=9,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5), progress=False,
    ).train()  # fmt: skip
    return losses(output)


def test_a_checkpoint_continues_under_another_layout(data, tmp_path):
    """From PP2 by one process: same rows and dropout, losses within 1e-6. All pairs by the engines alone: tests/evaluation."""
    first = spawn(2, elastic, data, tmp_path / "a", ParallelPlan(pipeline=2), 1)
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-20", tmp_path / "b" / "checkpoints" / "step-20")
    again = spawn(1, elastic, data, tmp_path / "b", ParallelPlan(), 0)
    assert min(again) == 21
    assert max(abs(again[step] / first[step] - 1) for step in range(21, 41)) < 1e-6
