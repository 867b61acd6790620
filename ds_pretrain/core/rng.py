"""Randomness without state: every stream is a pure function of what it is for.

Counter-based generators (Philox) keyed by a hash of (seed, epoch, source, document, objective, ...). There is nothing to
save, nothing to seed per worker, and nothing that a changed world size could shift.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(*parts: int | str) -> int:
    """A 128-bit key. Parts are length-prefixed, so ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator of its own for these parts."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def mixed(x: np.ndarray) -> np.ndarray:
    """uint64, same shape: splitmix64's finaliser, by which every input bit reaches every output bit. Wraps around by intent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU torch generator of its own for these parts."""
    return torch.Generator().manual_seed(key(*parts) % (1 << 63))


def torch_seed(*parts: int | str) -> int:
    """A 63-bit seed for torch's own streams (dropout)."""
    return key(*parts) % (1 << 63)
