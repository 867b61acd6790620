"""What a step is predicted to compute, against what it computes."""

import pytest

from ds_pretrain.config import parse_run
from ds_pretrain.data.dataset import Cursor, PretrainingDataset
from ds_pretrain.data.loader import Loader
from ds_pretrain.objectives import REGISTRY
from ds_pretrain.planning.speed import step_flops
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
