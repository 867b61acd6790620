"""The loader: the same step whoever shares it, wherever it starts; errors surface and threads end."""

import itertools
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from memory import VOCAB, corpus

from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.data.loader import Loader, evaluation_batches, own_rows
from ds_pretrain.objectives import REGISTRY

objectives = pytest.mark.parametrize("name", list(REGISTRY))


def dataset(name="mlm"):
    return Samples(corpus(), VOCAB, 64, name, "train", 0)


def steps(count, data=None, **settings):
    settings = {"global_size": 8, "micro_size": 2} | settings
    with Loader(data or dataset(), **settings) as loader:
        return [next(loader) for _ in range(count)]


def inputs(step):
    return torch.stack([batch.inputs for batch in step.batches])


def joined(parts):
    """Rows of a step in their global order, from the micro-batches [m, rows, S] of each rank."""
    return torch.stack([inputs(part) for part in parts], dim=1).flatten(0, 2)


@objectives
@pytest.mark.parametrize("data_size", [2, 4])
def test_a_step_has_the_same_rows_for_every_number_of_data_ranks(name, data_size):
    alone = steps(60, dataset(name))
    ranks = [steps(60, dataset(name), data_rank=r, data_size=data_size) for r in range(data_size)]
    for t, step in enumerate(alone):
        assert torch.equal(joined([step]), joined([rank[t] for rank in ranks]))
        assert {rank[t].cursor for rank in ranks} == {step.cursor}
        assert all(len(rank[t].batches) == 4 // data_size for rank in ranks)


def test_the_micro_size_does_not_change_the_rows():
    assert torch.equal(joined(steps(1, micro_size=8)), joined(steps(1, micro_size=1)))


@objectives
def test_resuming_gives_identical_batches(name):
    """Over more than an epoch, stopping at every place, on another number of ranks than before."""
    whole = steps(90, dataset(name))
    assert whole[-1].cursor.block >= 1
    for at in range(0, 89, 6):
        resumed = steps(1, dataset(name), cursor=whole[at].cursor)[0]
        assert torch.equal(inputs(resumed), inputs(whole[at + 1]))
        assert resumed.cursor == whole[at + 1].cursor
        for ours, theirs in zip(resumed.batches, whole[at + 1].batches, strict=True):
            assert all(torch.equal(t.labels, theirs.targets[head].labels) for head, t in ours.targets.items())


def test_prefetching_never_moves_the_cursor_ahead():
    for prefetch in (1, 5):
        assert [s.cursor for s in steps(5, prefetch=prefetch)] == [s.cursor for s in steps(5, prefetch=2)]


def test_an_error_in_the_thread_reaches_the_consumer():
    data = dataset()
    collate, calls = data.collate, []

    def failing(rows):
        calls.append(rows)
        if len(calls) > 8:
            raise OSError("the disk is gone")
        return collate(rows)

    data.collate = failing
    with Loader(data, 8, 2) as loader:
        assert len([next(loader) for _ in range(2)]) == 2
        with pytest.raises(OSError, match="the disk is gone"):
            next(loader)
    assert not loader_threads()


def test_closing_ends_the_thread_even_when_nothing_was_read():
    with Loader(dataset(), 8, 2, prefetch=4) as loader:
        next(loader)
        assert loader_threads()
    loader.close()
    assert not loader_threads()
    with pytest.raises(RuntimeError):
        next(loader)
    Loader(dataset(), 8, 2).close()


def test_closing_waits_for_one_step_at_most():
    data = dataset()
    collate, calls = data.collate, []

    def slow(rows):
        calls.append(rows)
        time.sleep(0.05)
        return collate(rows)

    data.collate = slow
    with Loader(data, 2, 2, prefetch=20) as loader:
        next(loader)
    assert len(calls) <= 10


def test_a_forgotten_loader_does_not_hold_the_interpreter():
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from memory import VOCAB, corpus\n"
        "from ds_pretrain.data.dataset import Samples\n"
        "from ds_pretrain.data.loader import Loader\n"
        "loader = Loader(Samples(corpus(), VOCAB, 64, 'mlm', 'train', 0), 8, 2)\n"
        "print(next(loader).cursor)"
    )
    folder = __file__.rpartition("/")[0]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "Cursor(block=0, row=8)" in done.stdout and "Error" not in done.stderr
    print(f"ended after {time.monotonic() - start:.1f} s")


@pytest.mark.parametrize(("sizes", "near"), [((10, 4, 1), 8), ((8, 2, 3), 6), ((1, 2, 2), 4)])
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(sizes, near):
    total, micro, ranks = sizes
    with pytest.raises(ValueError, match=rf"{total} must be a multiple of .* {micro} .* {ranks} = .*use {near},"):
        Loader(dataset(), total, micro, data_size=ranks)


@objectives
@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_evaluation_is_whole_and_equally_long_on_every_rank(name, data_size):
    data = dataset(name)
    ranks = [list(evaluation_batches(data, 2000, 4, r, data_size)) for r in range(data_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.inputs.shape == (4, 64) for batches in ranks for batch in batches)
    whole = data.collate(data.evaluation(2000).rows)
    for head, target in whole.targets.items():
        found = sum(batch.targets[head].total for batches in ranks for batch in batches)
        assert found == pytest.approx(target.total)
    rows = torch.cat([torch.stack([b[m].inputs for b in ranks]).flatten(0, 1) for m in range(len(ranks[0]))])
    assert torch.equal(rows[: len(whole.inputs)], whole.inputs) and (rows[len(whole.inputs) :] == VOCAB.pad).all()


def test_cursors_survive_a_checkpoint():
    step = steps(1)[0]
    assert Cursor(*list(step.cursor)) == step.cursor


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("name", ["mlm", "nsp", "ul2"])
def test_an_epoch_on_six_world_sizes_uses_every_piece_exactly_once(name):
    """The world changes five times in mid-epoch; the data ranks of each world together go on where the last one stopped."""
    data, cursor, used = Samples(corpus(900), VOCAB, 64, name, "train", 0), Cursor(), Counter()
    for world in itertools.chain([1, 2, 4, 3, 8], itertools.repeat(2)):
        if cursor.block == data.blocks:
            break
        rows, cursor = data.rows(cursor, 24)
        for rank in range(world):
            own = [sample for micro in own_rows(rows, 24 // world, rank, world) for row in micro for sample in row]
            number = data.decode(np.array(own, dtype=np.int64))
            used.update(number.piece[number.epoch == 0].tolist())
    assert world == 2 and used == Counter(range(len(data)))
