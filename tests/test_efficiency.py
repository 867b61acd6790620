"""A run on several layouts, measured beside its predictions."""

from dataclasses import replace

import pytest

from ds_pretrain import efficiency
from ds_pretrain.config import ConfigError, parse_run
from ds_pretrain.planning.points import Cluster, calibrated, read, save
from ds_pretrain.planning.tables import tables
from ds_pretrain.planning.traffic import GLOO, predicted


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
    one, *others = (point.expected_seconds(calibrated(points)) for point in points)
    assert one == pytest.approx(points[0].seconds)
    assert all(seconds > one / 20 for seconds in others)
    assert [table.row_count for table in efficiency.tables(points, "weak")] == [3, 3]


def test_efficiency_is_tokens_of_a_rank_beside_those_of_the_smallest_world(points):
    """By hand: twice the tokens in the time of one rank is all of it; strong scaling is the same ratio."""
    weak = [replace(points[0], seconds=1.0), replace(points[1], seconds=1.25), replace(points[2], seconds=1.0)]
    assert [*efficiency.tables(weak, "weak")[0].columns[-1].cells] == ["100%", "80%", "50%"]
    strong = [replace(points[0], kind="strong", seconds=1.0), replace(points[2], kind="strong", seconds=0.625)]
    assert [*efficiency.tables([*weak, *strong], "strong")[0].columns[-1].cells] == ["100%", "80%"]


def test_strong_scaling_keeps_the_rows_of_a_step(config):
    assert [efficiency.configured(config, each, "strong")[0].batch.global_size for each in ("1", "DP2", "PP2")] == [8, 8, 8]


def test_what_is_held_is_about_what_was_predicted(points):
    """Within a fifth: beside the step of `tests/planning/test_memory.py` a run holds the batches that its loader made ahead."""
    for point in points:
        assert point.peak == pytest.approx(point.expected_peak().total, rel=0.2), point.layout


def test_points_are_kept_and_planned_from(config, points, tmp_path):
    path = tmp_path / "points.json"
    save(points[:2], path)
    save([replace(points[1], seconds=9.0), points[2]], path)
    again = read(path)
    assert [(p.layout, p.seconds) for p in again] == [("1", points[0].seconds), ("DP2", 9.0), ("PP2", points[2].seconds)]
    assert again[2].expected_seconds(1.0) == points[2].expected_seconds(1.0) and again[2].sent == points[2].sent
    cluster = Cluster.of(points, {"link": 5e9})
    assert cluster.pace.link == 5e9 and cluster.pace.products == points[1].pace.products and cluster.device == "cpu"
    assert list(cluster.errors) == ["DP2 on 2 (weak)", "PP2 on 2 (weak)"]
    with pytest.raises(ValueError, match="nothing tells the speed of link and latency"):
        Cluster.of(points[:1], {})
    captions = [table.caption for table in tables(config, 4, 600, cluster) if table.caption]
    off = ", ".join(f"{where} {error:+.0%}" for where, error in cluster.errors.items())
    assert any(f"The same arithmetic is off on the measured points by: {off}." in str(caption) for caption in captions)
    held = ", ".join(f"{p.layout} on {p.world} (weak) {p.expected_peak().total / p.peak - 1:+.0%}" for p in again)
    assert any(f"On the measured points the peak was predicted off by: {held}." in str(caption) for caption in captions)


def test_a_file_without_points_is_refused(tmp_path):
    for text in ("{", '{"layout": "1"}', '[{"layout": "1"}]'):
        (tmp_path / "points.json").write_text(text)
        with pytest.raises(ValueError, match="holds no points of `ds-pretrain bench scaling RUN --out"):
            read(tmp_path / "points.json")


def test_layouts_that_the_run_cannot_have_are_told_at_once(config):
    with pytest.raises(ConfigError) as refused:
        efficiency.run(config, ["1", "TP3", "DP3"], "strong", 1)
    assert "TP3: model.heads 4 is not divisible by parallel.tensor 3" in str(refused.value)
    assert "DP3: batch.global_size 8 is not divisible by 3 data ranks" in str(refused.value)
    with pytest.raises(ValueError, match="layout 'DQ2': name the axes"):
        efficiency.run(config, ["DQ2"], "strong", 1)
