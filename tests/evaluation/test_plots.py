"""The picture of a run holds what the run wrote: the later line of a step, no broken line, numbers only."""

import io
import json

import numpy as np
import pytest
from matplotlib.colors import same_color

from ds_pretrain.evaluation.plots import BLUE, ORANGE, History, draw, learning_curve


def trained(step, loss, heads=("clm",), **more):
    shares = {head: loss / len(heads) for head in heads}
    rest = {"grad_norm": 1.0, "lr": 1e-3, "tokens": 100 * step, "tokens_per_second": 5.0, "skipped_steps": 0}
    return {"step": step, "loss": loss, **shares, **rest} | more


def evaluated(step, loss, split="validation"):
    return {"step": step, "split": split, "loss": loss, "tokens": 100 * step}


def write(path, lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    return path


@pytest.fixture
def metrics(tmp_path):
    lines = []
    for step in range(1, 201):
        lines += [trained(step, 9 / step + 3)] + [evaluated(step, 9 / step + 3.1)] * (step % 50 == 0)
    return write(tmp_path / "metrics.jsonl", lines)


def curves(axes, colour):
    return [line for line in axes.lines if same_color(line.get_color(), colour)]


def test_a_png_of_1200_pixels(metrics, tmp_path):
    learning_curve(metrics, tmp_path / "curve.png", {"unigram": 6.5})
    head = (tmp_path / "curve.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) == (1200, 900)


def test_axes_curves_and_names(metrics):
    loss, norm, rate = draw(History.read(metrics), "a run", {"unigram": 6.5, "bigram": 4.5}).axes
    assert (len(loss.lines), len(norm.lines), len(rate.lines)) == (5, 1, 1)  # raw, mean, validation, two baselines
    raw, mean = curves(loss, BLUE)
    (points,) = curves(loss, ORANGE)
    assert np.array_equal(raw.get_xdata(), np.arange(1, 201))
    assert raw.get_ydata()[0] == 12
    assert mean.get_ydata()[100] == pytest.approx(np.mean(raw.get_ydata()[98:103]))
    assert points.get_xdata().tolist() == [50, 100, 150, 200]
    assert {text.get_text() for text in loss.texts} >= {"unigram 6.500", "bigram 4.500", "validation 3.145"}
    assert norm.get_yscale() == "log"
    (tokens,) = loss.child_axes
    assert tokens.get_xlabel() == "tokens"
    assert rate.get_xlabel() == "step"


def test_the_axis_of_tokens_is_to_scale(metrics):
    figure = draw(History.read(metrics), "a run", {})
    figure.savefig(io.BytesIO())
    (tokens,) = figure.axes[0].child_axes
    assert tokens.get_xlim() == pytest.approx((0, 20_000))


def test_broken_lines_are_skipped(metrics):
    whole = History.read(metrics)
    text = metrics.read_text(encoding="utf-8")
    metrics.write_text(text + '{"step": 201, "lo', encoding="utf-8")
    assert History.read(metrics) == whole
    metrics.write_text(text + '{"step": 201, "lo{"step": 201}\n[]\n\n', encoding="utf-8")
    assert History.read(metrics) == whole


def test_of_a_resumed_run_the_later_line_counts(tmp_path):
    """Killed at step 6, continued from 3, now at 5: steps 4 and 5 are the new ones, and the old 6 has not happened."""
    first = [trained(step, 10.0) for step in range(1, 7)]
    again = [trained(4, 7.0), evaluated(4, 7.5), trained(5, 6.0)]
    path = write(tmp_path / "metrics.jsonl", [*first, evaluated(4, 10.0), evaluated(6, 10.0), *again])
    history = History.read(path)
    steps, values = history.column("loss")
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert values.tolist() == [10, 10, 10, 7, 6]
    assert [line["loss"] for line in history.evaluations] == [7.5]


def test_what_is_not_a_number_is_left_out(tmp_path):
    lines = [trained(1, 5.0), trained(2, 1.0, grad_norm="inf") | {"loss": "nan"}, trained(3, 4.0, grad_norm=0.0)]
    history = History.read(write(tmp_path / "metrics.jsonl", lines))
    assert history.column("loss")[0].tolist() == [1, 3]
    draw(history, "a run", {}).savefig(io.BytesIO())


def test_the_heads_of_a_sum_are_drawn_beside_it(tmp_path):
    lines = [trained(step, 9.0, heads=("mlm", "nsp")) for step in range(1, 9)]
    history = History.read(write(tmp_path / "metrics.jsonl", lines))
    assert history.heads == ("mlm", "nsp")
    labels = [text.get_text() for text in draw(history, "a run", {}).axes[0].get_legend().get_texts()]
    assert labels == ["train", "train, mlm alone", "train, nsp alone"]


def test_names_at_the_edge_do_not_cover_each_other(metrics):
    for crowded in (3.1, 12):  # at the bottom and at the top
        baselines = {f"model {i}": crowded + i / 1000 for i in range(6)}
        texts = draw(History.read(metrics), "a run", baselines).axes[0].texts
        heights = sorted(text.get_position()[1] for text in texts)
        assert len(heights) == 8
        assert np.diff(heights).min() > 0.05
        assert 0 <= heights[0] < heights[-1] <= 1


def test_a_spike_does_not_press_the_curve_to_the_floor(tmp_path):
    lines = [trained(step, 1e4 if step == 150 else 4.0) for step in range(1, 301)]
    axes = draw(History.read(write(tmp_path / "metrics.jsonl", lines)), "a run", {}).axes[0]
    assert axes.get_ylim()[1] < 10


def test_the_smallest_run_and_the_empty_one(tmp_path):
    draw(History.read(write(tmp_path / "one.jsonl", [trained(1, 5.0)])), "a run", {}).savefig(io.BytesIO())
    with pytest.raises(ValueError, match="no line of training"):
        History.read(write(tmp_path / "none.jsonl", [evaluated(1, 5.0)]))
