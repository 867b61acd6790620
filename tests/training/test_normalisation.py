"""Sum first, divide once: how rows are dealt out to micro-batches and ranks changes no gradient, for every objective."""

import pytest
import torch
from every import engine_for, first_rows, gradients, samples

from ds_pretrain.objectives import REGISTRY, create
from ds_pretrain.parallel.spawn import spawn

POOLED = [name for name in REGISTRY if create(name).pooled]


def one_step(objective, deals):
    """Loss and gradient of one step whose rows are dealt out as micro-batches like this."""
    data = samples(objective)
    rows = [*first_rows(data, 7), ()]  # the last row is all padding
    engine = engine_for(objective, len(rows) // deals, deals)
    size = len(rows) // deals
    batches = [data.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    return engine.step(batches, 1, 1e-3).loss, gradients(engine)


def distance(found, true):
    return max(float((found[name] - true[name]).norm()) for name in true) / max(float(true[name].norm()) for name in true)


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in POOLED])
def test_accumulation_and_micro_batches_change_no_gradient(name):
    """1, 2 and 8 micro-batches; with 8 the last one has not a single target."""
    loss, true = one_step(create(name), 1)
    assert all(gradient.isfinite().all() for gradient in true.values())
    for deals in (2, 8):
        again, found = one_step(create(name), deals)
        assert again == pytest.approx(loss, rel=1e-6)
        assert distance(found, true) < 1e-6


def pooled_step(name):
    """On the ranks: the same 8 rows in one micro-batch over all of them."""
    objective = create(name)
    data, rows = samples(objective), first_rows(samples(objective), 8)
    engine = engine_for(objective, 8, 1)
    mesh, size = engine.mesh, 8 // engine.mesh.data_size
    engine = engine_for(objective, size, 1)
    result = engine.step([data.collate(rows[mesh.at.data * size : (mesh.at.data + 1) * size])], 1, 1e-3)
    return result.loss, gradients(engine)


@pytest.mark.parametrize("name", POOLED)
def test_a_pool_over_two_ranks_is_the_pool_of_one(name):
    """Unequal numbers of sentences on the two: gathered keys, own columns and gradients are those of one process."""
    loss, true = spawn(1, pooled_step, name)
    again, found = spawn(2, pooled_step, name)
    assert again == pytest.approx(loss, rel=1e-6)
    assert distance(found, true) < 1e-6


@pytest.mark.parametrize("name", REGISTRY)
def test_a_step_without_any_target_changes_nothing_and_is_no_error(name):
    objective = create(name)
    engine, data = engine_for(objective, 2, 1), samples(objective)
    result = engine.step([data.collate([(), ()])], 1, 1e-3)
    assert result.loss == 0 and result.finite
    assert all((gradient == 0).all() for gradient in gradients(engine).values())


def test_a_mean_of_means_would_be_seen():
    """What the laws above guard against is no rounding error: dividing each micro-batch by its own total moves gradients."""
    objective = create("mlm")
    data, rows = samples(objective), first_rows(samples(objective), 8)
    _, true = one_step(objective, 1)
    engine = engine_for(objective, 1, 8)
    batches = [data.collate([row]) for row in rows]
    for batch in batches:
        batch.targets["mlm"].weights.mul_(8 / batch.targets["mlm"].total)
    engine.step(batches, 1, 1e-3)
    assert distance(gradients(engine), true) > 1e-2
    assert isinstance(true["word.weight"], torch.Tensor)
