"""The keyed order: a permutation for every n, another one for every key, and as even as chance."""

import numpy as np
import pytest

from ds_pretrain.data.order import permute


@pytest.mark.parametrize("n", [1, 2, 3, 5, 63, 64, 65, 100, 1000, 4095, 4096, 4097, 300_000])
def test_every_index_is_hit_once(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, 7, "train")), np.arange(n))


def test_a_range_beyond_memory_needs_no_table():
    n = (1 << 41) + 12345
    index = np.arange(n - 50_000, n)
    out = permute(index, n, 0)
    assert out.dtype == np.int64 and len(np.unique(out)) == len(out)
    assert out.min() >= 0 and out.max() < n
    assert abs(out.mean() / n - 0.5) < 5 * np.sqrt(1 / 12 / len(out))


def test_any_part_equals_the_same_part_of_the_whole():
    whole = permute(np.arange(1000), 1000, 3, 1)
    assert np.array_equal(permute(np.array([999, 0, 500]), 1000, 3, 1), whole[[999, 0, 500]])


def test_epochs_seeds_and_sources_differ():
    orders = {permute(np.arange(50), 50, *key).tobytes() for key in [(0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b")]}
    assert len(orders) == 4


@pytest.mark.parametrize("n", [4, 64, 100])
def test_places_are_uniform_over_keys(n):
    """Chi square of (index, place) counts over 1000 keys, within five standard deviations of its mean."""
    keys = 1000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    freedom = (n - 1) ** 2
    chi = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    n = 100_000
    steps = np.diff(permute(np.arange(n), n, 0))
    assert np.count_nonzero(np.abs(steps) == 1) < 20
    assert abs(np.corrcoef(np.arange(n), permute(np.arange(n), n, 0))[0, 1]) < 5 / np.sqrt(n)
