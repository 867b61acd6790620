"""The order of samples: a keyed bijection of [0, n), computed wherever it is needed and stored nowhere.

A Feistel network permutes the smallest power of two that holds n; an index that lands outside walks on until it is
back inside (cycle walking: fewer than two rounds of the network on average). There is no table to build, to cache, to
race on or to hand to a worker, and any index of any epoch costs the same. The price: about 0.1 microseconds an index,
against a nanosecond for a table of 8n bytes.
"""

from __future__ import annotations

import numpy as np

from ds_pretrain.core import rng

ROUNDS = 8
SMALLEST_BITS = 6
"""Tiny domains have few distinct Feistel networks; walking in 64 slots costs nothing and mixes properly."""


def permute(index: np.ndarray, n: int, *key: int | str) -> np.ndarray:
    """Where each index of [0, n) goes under the permutation that belongs to `key`; int64, same shape."""
    bits = max(SMALLEST_BITS, (n - 1).bit_length())
    keys = rng.generator("order", *key).integers(1 << 63, size=ROUNDS, dtype=np.uint64)
    index = _network(np.asarray(index).astype(np.uint64), bits, keys)
    outside = np.flatnonzero(index >= n)
    while len(outside):
        index[outside] = _network(index[outside], bits, keys)
        outside = outside[index[outside] >= n]
    return index.astype(np.int64)


def uniform(index: np.ndarray, *key: int | str) -> np.ndarray:
    """A number in [0, 1) for each index, a pure function of index and key."""
    first, second = rng.generator("uniform", *key).integers(1 << 63, size=2, dtype=np.uint64)
    mixed = rng.mixed(rng.mixed(np.asarray(index).astype(np.uint64) + first) + second)
    return (mixed >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _network(index: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """One bijection of [0, 2^bits). The halves take turns in changing each other, so they may differ by a bit."""
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    right, left = index & low_mask, index >> low
    for turn in range(0, ROUNDS, 2):
        left ^= rng.mixed(right + keys[turn]) & high_mask
        right ^= rng.mixed(left + keys[turn + 1]) & low_mask
    return (left << low) | right
