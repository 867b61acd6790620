"""Ranks that hold copies hold the same bits, and a run stops where they do not."""

import pytest
import torch

from ds_pretrain import ParallelPlan, PreTrainer, PretrainingDataset
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training import agreement
from ds_pretrain.training.agreement import DisagreementError, Held, disagreements
from ds_pretrain.training.optimizer import OptimizerConfig

WORD, NORM = Held("weights", "word.weight", 0, 0, 8), Held("exp_avg", "norm.weight", -1, 0, 4)


def test_camps_are_named_and_what_only_one_rank_holds_is_not_compared():
    assert disagreements([{WORD: 1, NORM: 2}, {NORM: 2}, {WORD: 1}]) == []
    found = disagreements([{WORD: 1, NORM: 2}, {WORD: 1, NORM: 3}, {WORD: 1, NORM: 2}])
    assert found == ["exp_avg of norm.weight between ranks 0, 2 and rank 1"]
    assert "slice" not in found[0] and disagreements([{WORD: 1}, {WORD._replace(slice=1): 2}]) == []


def checks(data, plan, spoil_at, every):
    """On two ranks: the second one's weights change at a step; the steps that were compared, and what was told. Stage 0: ZeRO
    gathers working weights anew from their owners, and a drift heals."""
    dataset = PretrainingDataset(data, seq_len=32, objective="clm")
    trainer = PreTrainer(
        model=ModelConfig(layers=2, hidden=32, heads=4), objective=dataset.objective, dataset=dataset, plan=plan, batch_size=4,
        max_steps=6, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2), progress=False, check_every=every,
        deepspeed={"zero_optimization": {"stage": 0}},
    )  # fmt: skip
    compared, check, step = [], agreement.check, trainer.model.step

    def counting(engine, number):
        compared.append(number)
        check(engine, number)

    def spoiling(batches, number, lr):
        result = step(batches, number, lr)
        if number == spoil_at and trainer.mesh.rank == 1:
            with torch.no_grad():
                dict(trainer.model.module.named_parameters())["layers.2.input_layernorm.weight"].add_(1e-3)
        return result

    agreement.check, trainer.model.step = counting, spoiling
    try:
        trainer.train()
    except DisagreementError as error:
        return compared, str(error)
    return compared, ""


@pytest.mark.parametrize("plan", [ParallelPlan(), ParallelPlan(tensor=2)], ids=["data", "tensor"])
def test_a_rank_that_drifts_is_told_at_the_next_comparison(data, plan):
    compared, told = spawn(2, checks, data, plan, 4, 3)
    assert compared == [1, 3, 6]
    assert told.startswith("step 6: ranks disagree") and "of layers.0.input_layernorm.weight between rank 0 and rank 1" in told


def test_a_sound_run_is_compared_at_its_first_step_and_every_so_many(data):
    assert spawn(2, checks, data, ParallelPlan(), 0, 3) == ([1, 3, 6], "")
    assert spawn(2, checks, data, ParallelPlan(), 0, 0) == ([], "")
