"""The arithmetic of `plan` against models that stand, and against the paper's numbers."""

import pytest
from test_config import BASE

from ds_pretrain.config import parse_run
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.transformer import Build, Network
from ds_pretrain.planning import memory, stage_parameters

STYLES = {
    "gpt": {"preset": "gpt2-small", "hidden": 64, "heads": 4},
    "llama": {"preset": "llama-1m", "tie_embeddings": False},
    "bert": {"preset": "bert-1m"},
}


def planned(world=1, **sections):
    run = parse_run({**BASE, **sections})
    model = run.model.model_copy(update={"vocab": 1000, "positions": 128})
    return memory(run, model, world), model


@pytest.mark.parametrize("style", STYLES)
def test_parameters_are_those_of_the_network(style, mesh):
    model = ModelConfig(**STYLES[style], vocab=1000, positions=128)
    real = sum(p.numel() for p in Network(Build(model, mesh)).parameters())
    assert model.count_parameters() == real == stage_parameters(model, 1)[0]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_share_the_parameters_and_hold_a_tied_matrix_twice(stages, tied):
    model = ModelConfig(layers=7, hidden=64, heads=4, vocab=1000, positions=128, tie_embeddings=tied)
    copy = 1000 * 64 if tied else 0
    assert sum(stage_parameters(model, stages)) == model.count_parameters() + copy


def test_zero_divides_what_its_stage_says():
    whole, model = planned(8, deepspeed={"config": "zero1_bf16.json"})
    count = model.count_parameters()
    assert (whole["weights"], whole["gradients"]) == (2 * count, 2 * count)
    assert (whole["fp32 master"], whole["Adam moments"]) == (4 * count / 8, 8 * count / 8)
    less, _ = planned(8, deepspeed={"config": "zero3_bf16.json"})
    assert (less["weights"], less["gradients"]) == (2 * count / 8, 2 * count / 8)
    plain, _ = planned(1, deepspeed={"config": "zero0_fp32.json"})
    assert (plain["weights"], plain["fp32 master"], plain["Adam moments"]) == (4 * count, 0, 8 * count)


@pytest.mark.parametrize(
    ("parallel", "recompute", "per_position"),
    [  # bytes of a layer over s b h, attention scores left out: Korthikanti et al. 2022, table 2
        ({}, False, 34),
        ({"tensor": 2}, False, 10 + 24 / 2),
        ({"tensor": 2, "sequence": True}, False, 34 / 2),
        ({"tensor": 2}, True, 2),
        ({"tensor": 2, "sequence": True}, True, 2 / 2),
    ],
)
def test_activations_are_those_of_the_paper(parallel, recompute, per_position):
    found, model = planned(
        2,
        parallel=parallel,
        batch={"global_size": 8, "micro_size": 4, "seq_len": 128},
        train={"max_steps": 1000, "activation_checkpointing": recompute},
        deepspeed={"config": "zero1_bf16.json"},
    )
    assert found["activations"] == 4 * 128 * model.hidden * model.layers * per_position


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages():
    sizes = {"batch": {"global_size": 8, "micro_size": 1, "seq_len": 128}, "model": {"layers": 4, "hidden": 64}}
    one, _ = planned(1, **sizes, parallel={"pipeline": 1})
    four, _ = planned(4, **sizes, parallel={"pipeline": 4})
    assert four["activations"] == one["activations"]  # a quarter of the layers, four times


def test_a_generator_is_counted():
    encoder = {"model": {"preset": "bert-1m"}, "deepspeed": {"config": "zero1_fp32.json"}}
    alone, _ = planned(**encoder, objective={"name": "mlm"})
    both, _ = planned(**encoder, objective={"name": "electra"})
    assert both["weights"] > alone["weights"] and both["activations"] > alone["activations"]
