"""A run on several layouts, measured beside its predictions."""

import pytest

from ds_pretrain import efficiency
from ds_pretrain.config import ConfigError, parse_run
from ds_pretrain.traffic import GLOO, predicted


@pytest.fixture(scope="module")
def config(data):
    return parse_run(
        {
            "model": {"layers": 2, "hidden": 64, "heads": 4},
            "data": {"path": str(data)},
            "batch": {"global_size": 8, "seq_len": 64},
            "deepspeed": {"config": "zero1_fp32"},
        }
    )


@pytest.fixture(scope="module")
def points(config):
    return efficiency.run(config, ["1", "DP2", "PP2"], "weak", 4)


def test_weak_scaling_keeps_the_rows_of_a_data_rank(points):
    assert [(point.layout, point.world, point.config.batch.global_size) for point in points] == [
        ("1", 1, 8), ("DP2", 2, 16), ("PP2", 2, 8),
    ]  # fmt: skip


def test_what_is_sent_is_what_was_predicted(points):
    for point in points[1:]:
        assert max(point.sent) == pytest.approx(max(predicted(point.config, point.model, point.world).sent(GLOO)), rel=0.01)


def test_a_step_on_one_rank_is_predicted_as_it_was_and_the_others_from_it(points):
    one, *others = (sum(efficiency.seconds_of(point).values()) for point in points)
    assert one == pytest.approx(points[0].seconds)
    assert all(0 < seconds < 100 * point.seconds for seconds, point in zip(others, points[1:], strict=True))
    assert efficiency.table(points, "weak").row_count == 3


def test_layouts_that_the_run_cannot_have_are_told_at_once(config):
    with pytest.raises(ConfigError) as refused:
        efficiency.run(config, ["1", "TP3", "DP3"], "strong", 1)
    assert "TP3: model.heads 4 is not divisible by parallel.tensor 3" in str(refused.value)
    assert "DP3: batch.global_size 8 is not divisible by 3 data ranks" in str(refused.value)
    with pytest.raises(ValueError, match="layout 'DQ2': name the axes"):
        efficiency.run(config, ["DQ2"], "strong", 1)
