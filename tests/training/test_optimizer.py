import math

import pytest
import torch
from torch import nn

from ds_pretrain.training.optimizer import OptimizerConfig, adamw


def rates(schedule, **fields):
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=10, min_lr=0.1, **fields)
    return [config.rate(step, 100) for step in range(1, 101)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "inverse_sqrt", "wsd", "constant"])
def test_warmup_rises_linearly_to_the_peak_and_nothing_leaves_the_bounds(schedule):
    found = rates(schedule)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(found) == pytest.approx(1.0) and min(found[10:]) >= 0.1 - 1e-12


def test_where_each_schedule_ends():
    assert rates("cosine")[-1] == pytest.approx(0.1)
    assert rates("cosine")[54] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way
    assert rates("linear")[-1] == pytest.approx(0.1)
    assert rates("linear")[54] == pytest.approx(0.55)
    assert rates("inverse_sqrt")[39] == pytest.approx(math.sqrt(10 / 40))
    assert rates("wsd")[79] == 1.0 and rates("wsd")[89] == pytest.approx(0.55) and rates("wsd")[-1] == pytest.approx(0.1)
    assert rates("constant")[-1] == 1.0


def test_no_warmup_starts_at_the_peak():
    assert OptimizerConfig(lr=2.0, warmup_steps=0, schedule="constant").rate(1, 10) == 2.0


def test_only_what_has_rows_is_decayed():
    module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    decayed, plain = adamw(OptimizerConfig(weight_decay=0.5), module, offload=False).param_groups
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.5
    assert [p.ndim for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0
    assert isinstance(adamw(OptimizerConfig(), module, False), torch.optim.AdamW)
