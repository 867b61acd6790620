"""What a rank is said to hold, against networks that stand."""

import math

import pytest

from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.transformer import Build, Network
from ds_pretrain.objectives import create
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.planning.held import parameters

STYLES = {
    "gpt": {"preset": "gpt2-small", "hidden": 64, "heads": 4},
    "llama": {"preset": "llama-1m", "tie_embeddings": False},
    "bert": {"preset": "bert-1m"},
}


def elements(model, objective="clm", stage=0, **plan):
    held = parameters(model, create(objective), ParallelPlan(**plan), stage)
    return sum(math.prod(shape) for shape in held.values())


@pytest.mark.parametrize("style", STYLES)
def test_one_rank_holds_the_parameters_of_the_network(style, mesh):
    model = ModelConfig(**STYLES[style], vocab=1000, positions=128)
    real = sum(p.numel() for p in Network(Build(model, mesh)).parameters())
    assert model.count_parameters() == real == elements(model, "mlm" if style == "bert" else "clm")


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_share_the_parameters_and_hold_a_tied_matrix_twice(stages, tied):
    model = ModelConfig(layers=7, hidden=64, heads=4, vocab=1000, positions=128, tie_embeddings=tied)
    copy = 1000 * 64 if tied else 0
    assert sum(elements(model, stage=stage, pipeline=stages) for stage in range(stages)) == model.count_parameters() + copy


def test_tensor_ranks_share_matrices_and_a_padded_vocabulary_and_repeat_the_rest():
    model = ModelConfig(layers=2, hidden=64, heads=4, vocab=1001, positions=128)
    held = parameters(model, create("clm"), ParallelPlan(tensor=2), 0)
    assert held["word.weight"] == (501, 64) and held["layers.0.mlp.linear_fc2.weight"] == (64, 128)
    assert held["layers.0.self_attention.linear_qkv.weight"] == (96, 64) and held["layers.1.input_layernorm.weight"] == (64,)
