"""Sum first, divide once: how rows are dealt out to micro-batches and ranks changes no gradient, for every objective."""

import pytest
import torch
from every import engine_for, first_rows, gradients, samples

from ds_pretrain.data.loader import own_rows
from ds_pretrain.objectives import REGISTRY, create
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training.pool import Pool


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


@pytest.mark.parametrize("name", REGISTRY)
def test_accumulation_and_micro_batches_change_no_gradient(name):
    """1, 2 and 8 micro-batches; with 8 the last one has not a single target. A pool of negatives is all of the step."""
    loss, true = one_step(create(name), 1)
    assert all(gradient.isfinite().all() for gradient in true.values())
    for deals in (2, 8):
        again, found = one_step(create(name), deals)
        assert again == pytest.approx(loss, rel=1e-6)
        assert distance(found, true) < 1e-6


MASKED_VIEW = {"name": "simcse", "mlm_weight": 0.1}
MIXED = {"name": "mixture", "weights": {"simcse": 0.7, "mlm": 0.3}}


POOLED = [{"name": "simcse"}, MASKED_VIEW, MIXED]


def pooled_steps(deals):
    """On the ranks: each of these objectives, its rows dealt out to so many micro-batches."""
    return [[pooled_step(fields, each, 0.0) for each in deals] for fields in POOLED]


def pooled_step(fields, deals, dropout):
    """On the ranks: the same 8 rows dealt out to them and to micro-batches."""
    objective = create(**fields)
    data, rows = samples(objective), first_rows(samples(objective), 8)
    mesh = Mesh.build(ParallelPlan())
    size = 8 // deals // mesh.data_size
    engine = engine_for(objective, size, deals, dropout=dropout)
    mine = own_rows(rows, size, mesh.at.data, mesh.data_size)
    result = engine.step([data.collate(each) for each in mine], 1, 1e-3)
    return result.loss, result.sums, gradients(engine)


@pytest.fixture(scope="module")
def pools():
    """By objective: one process with 1 and 4 micro-batches, two with 1 and 2."""
    return list(zip(*(spawn(world, pooled_steps, deals) for world, deals in ((1, (1, 4)), (2, (1, 2)))), strict=True))


@pytest.mark.parametrize("number", range(len(POOLED)), ids=["simcse", "masked view", "mixture"])
def test_a_pool_over_ranks_and_micro_batches_is_the_pool_of_one(pools, number):
    """Unequal numbers of sentences: gathered keys, own columns and gradients are those of one process and micro-batch."""
    (loss, sums, true), *others = [found for world in pools[number] for found in world]
    assert len(others) == 3
    for again, found_sums, found in others:
        assert again == pytest.approx(loss, rel=1e-6) and found_sums == pytest.approx(sums, rel=1e-6)
        assert distance(found, true) < 1e-6


def test_both_walks_draw_the_same_dropout():
    """The second walk's embeddings are those that the pool's gradient was made for; other dropout would move it far."""
    objective = create("simcse")
    data, rows = samples(objective), first_rows(samples(objective), 8)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        ask = Pool._ask

        def watching(pool, read, batch):
            asked, sums = ask(pool, read, batch)
            seen.append(asked.vectors.detach().clone())
            return asked, sums

        patch.setattr(Pool, "_ask", watching)
        engine_for(objective, 2, 4, dropout=0.3).step([data.collate(rows[i : i + 2]) for i in range(0, 8, 2)], 1, 1e-3)
    assert len(seen) == 8
    for first, second in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0][: len(seen[1])], seen[1][: len(seen[0])])


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
