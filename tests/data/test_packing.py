"""Cutting and packing against the definitions, written out by hand."""

import time

import numpy as np
import pytest

from ds_pretrain.data.packing import Pieces, alone, pack, waste


def one_by_one(sizes, capacity):
    """Best fit decreasing as the books have it: free positions per row."""
    free = []
    for i in np.argsort(-sizes, kind="stable"):
        fits = [(room, row) for row, room in enumerate(free) if room >= sizes[i]]
        if fits:
            free[min(fits)[1]] -= sizes[i]
        else:
            free.append(capacity - sizes[i])
    return sorted(free)


@pytest.mark.parametrize("trial", range(40))
def test_packing_equals_the_one_by_one_algorithm(trial):
    random = np.random.default_rng(trial)
    capacity = int(random.integers(4, 60))
    sizes = random.integers(1, capacity + 1, size=int(random.integers(0, 90)))
    packing = pack(sizes, capacity)
    assert sorted(packing.order.tolist()) == list(range(len(sizes)))
    free = [capacity - sum(int(sizes[i]) for i in row) for row in packing.rows(np.arange(len(sizes)))]
    assert sorted(free) == one_by_one(sizes, capacity)


def test_text_lengths_pack_almost_without_waste_and_fast():
    sizes = np.minimum(1024, 1 + np.random.default_rng(0).lognormal(5.5, 1, 20_000).astype(int))
    start = time.perf_counter()
    packing = pack(sizes, 1024)
    rate = len(sizes) / (time.perf_counter() - start)
    print(f"{rate / 1e6:.2f} M pieces/s, waste {waste(sizes, packing, 1024):.3%}")
    assert waste(sizes, packing, 1024) < 0.005
    assert rate > 50_000


def test_what_cannot_fit_is_refused_with_the_sizes():
    with pytest.raises(ValueError, match="1 to 8 positions to be packed, got 3 to 9"):
        pack(np.array([3, 9]), 8)
    with pytest.raises(ValueError, match="got 0 to 3"):
        pack(np.array([3, 0]), 8)


def test_nothing_packs_into_no_rows():
    assert pack(np.array([], dtype=np.int64), 8).rows(np.array([])) == []


def test_alone_gives_every_item_its_row_in_order():
    assert alone(np.array([3, 1])).rows(np.array([7, 9])) == [(7,), (9,)]
    assert waste(np.array([3, 1]), alone(np.array([3, 1])), 8) == 0.75


def test_pieces_tile_every_document():
    usable = np.array([0, 5, 10, 0, 0, 11, 1, 0])
    pieces = Pieces(usable, 5)
    cut = pieces.cut(np.arange(len(pieces)))
    found = list(zip(cut.document.tolist(), cut.start.tolist(), cut.stop.tolist(), strict=True))
    assert found == [(1, 0, 5), (2, 0, 5), (2, 5, 10), (5, 0, 5), (5, 5, 10), (5, 10, 11), (6, 0, 1)]
    assert pieces.unusable == 4
    assert pieces.first(np.array([0, 1, 2, 5, 6])).tolist() == [0, 0, 1, 3, 6]


def test_a_store_without_text_has_no_pieces():
    assert len(Pieces(np.array([], dtype=np.int64), 5)) == 0
    assert len(Pieces(np.array([0, 0]), 5)) == 0
