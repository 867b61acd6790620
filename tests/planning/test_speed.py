"""What a step is predicted to compute, against what it computes; and to take, from speeds that are easy to reckon with."""

import pytest

from ds_pretrain.config import parse_run
from ds_pretrain.data.dataset import Cursor, PretrainingDataset
from ds_pretrain.data.loader import Loader
from ds_pretrain.objectives import REGISTRY
from ds_pretrain.parallel.pace import Pace
from ds_pretrain.planning.speed import step_flops, step_seconds
from ds_pretrain.planning.traffic import GLOO, predicted
from ds_pretrain.training import metrics


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_compute_of_a_step_is_what_real_rows_cost(name, data):
    """Of every objective: padding, masks and scored positions are those of its rows."""
    fields = {"name": name, **({"weights": {"clm": 1.0, "mlm": 1.0}} if name == "mixture" else {})}
    model = {"layers": 2, "hidden": 64, "heads": 4, "token_types": 2, "vocab": 1000, "positions": 128}
    batch = {"global_size": 64, "seq_len": 128}
    run = parse_run({"model": model, "objective": fields, "data": {"path": str(data)}, "batch": batch})
    dataset = PretrainingDataset(data, seq_len=128, objective=run.make_objective())
    with Loader(dataset, 64, 64, 0, 1, Cursor()) as loader:
        real = metrics.step_flops(run.model, run.make_objective(), next(loader).batches)
    assert step_flops(run, run.model) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    "layout, again, bubble",
    [({}, 1.0, 0.0), ({"tensor": 2}, 4 / 3, 0.0), ({"pipeline": 2}, 1.0, 0.25)],
    ids=["DP2", "TP2", "PP2"],
)
def test_a_step_takes_its_products_the_bubble_what_it_sends_and_a_latency_for_each_message(layout, again, bubble):
    model = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 1000, "positions": 128}
    batch = {"global_size": 8, "seq_len": 128, "micro_size": 2 if layout else 1}
    train = {"activation_checkpointing": again > 1}
    run = parse_run({"model": model, "batch": batch, "parallel": layout, "train": train, "data": {"path": "none"}})
    pace = Pace(products=4e12, link=1e6, latency=0.5)
    products, gap, sending, latency = step_seconds(run, run.model, 2, pace, 0.25, GLOO).values()
    assert products == pytest.approx(again * step_flops(run, run.model) / 2 / 1e12)
    assert gap == pytest.approx(bubble * products), "one of two stages idles for one of four micro-batches"
    traffic = predicted(run, run.model, 2)
    sent = traffic.sent(GLOO)
    assert sending == pytest.approx(max(sent) / 1e6) and sending > 0
    most = traffic.stages[sent.index(max(sent))]
    assert latency == pytest.approx(0.5 * sum(each.times for each in most)) and latency > 0
