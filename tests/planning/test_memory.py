"""Memory as it is predicted against memory as torch's allocator counts it, and against the papers."""

import sys
from pathlib import Path

import pytest
from test_config import BASE

from ds_pretrain.config import parse_run
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import create
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.planning import memory
from ds_pretrain.planning.memory import ADAM, GRADIENTS, MASTER, WEIGHTS, Load, Rank

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import peak_memory

GPT = ModelConfig(preset="gpt2-small", layers=8, vocab=1000, positions=128)
LOAD = Load(positions=4 * 128, scored={"clm": 4 * 128}, pairs=4 * 128**2)


def rank(zero=1, replicas=1, recompute=False, place=0, accumulation=4, **plan):
    json = {"zero_optimization": {"stage": zero}, "bf16": {"enabled": True}} if zero else {}
    return Rank(GPT, create("clm"), ParallelPlan(**plan), replicas, json, LOAD, accumulation, recompute, place)


def test_every_layout_holds_what_is_predicted():
    found = peak_memory.measured(peak_memory.quick())
    print(peak_memory.table(found))
    assert not [(result.case, result.error) for result in found if abs(result.error) > peak_memory.LIMIT]


def test_zero_divides_what_its_stage_says():
    """Rajbhandari et al. 2020, figure 1: over 8 replicas, of 2 + 2 + 12 bytes a parameter."""
    count = GPT.count_parameters()
    for zero, weights, gradients, states in ((1, 2, 2, 12 / 8), (2, 2, 2 / 8, 12 / 8), (3, 2 / 8, 2 / 8, 12 / 8)):
        state = memory.moments(rank(zero, replicas=8))[0].parts
        assert state[WEIGHTS] == pytest.approx(weights * count, rel=1e-3)
        assert state[MASTER] + state[ADAM] == pytest.approx(states * count, rel=1e-3)
        assert state[GRADIENTS] == pytest.approx(gradients * count, rel=1e-3)
    plain = memory.moments(rank(0))[0].parts
    assert (plain[WEIGHTS], plain[GRADIENTS], plain[ADAM]) == (4 * count, 4 * count, 8 * count) and MASTER not in plain


def test_recomputation_keeps_the_input_of_each_layer():
    """Korthikanti et al. 2022, section 5: 2 s b h of a layer, divided with the sequence."""
    whole, divided = (memory._kept_of_layer(rank(recompute=True, tensor=2, sequence=it)) for it in (False, True))
    assert whole == 2 * LOAD.positions * GPT.hidden == 2 * divided


def test_a_sequence_divided_is_all_of_a_layer_divided():
    """Table 2 there: with tensor parallelism alone norms and what enters them stay whole, about 10 of 34."""
    one, tensor, both = (memory._kept_of_layer(rank(**plan)) for plan in ({}, {"tensor": 2}, {"tensor": 2, "sequence": True}))
    assert both == pytest.approx(one / 2) and one / 2 < tensor < one * 0.7


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages():
    flying = [rank(pipeline=4, place=place).flying for place in range(4)]
    assert flying == [4, 3, 2, 1] and rank(pipeline=4, accumulation=2).flying == 2


def test_a_generator_is_counted():
    def planned(objective):
        sections = {"model": {"preset": "bert-1m"}, "deepspeed": {"config": "zero1_fp32.json"}}
        run = parse_run({**BASE, **sections, "objective": {"name": objective}})
        return memory.fullest(run, run.model.model_copy(update={"vocab": 1000, "positions": 128}), 1, cuda=False)[1].parts

    alone, both = planned("mlm"), planned("electra")
    assert both[WEIGHTS] > alone[WEIGHTS]


def test_a_load_is_what_the_objective_asks_for():
    assert Load.of(create("clm"), 64, 4) == Load(positions=256, scored={"clm": 256}, pairs=4 * 64**2)
    masked = Load.of(create("mlm", mask_prob=0.15), 64, 256)
    assert masked.positions == 256 * 64 and masked.scored["mlm"] == pytest.approx(0.15 * 256 * 64, rel=0.2)
