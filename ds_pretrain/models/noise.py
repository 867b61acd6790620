"""Noise that no layout changes: a hash of what stands in the row, where in it, and what the noise is for.

Dropout and a generator's samples are drawn from this instead of from a stream, so the same row meets the same noise on one
device, on tensor, context and pipeline ranks, in any micro-batch and after any resume. Attention's own dropout is not: the
fused kernels draw it inside.

Shape suffixes: B rows, S positions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (1 << 32) - 1


def row_keys(tokens: Tensor, seed: int = 0) -> Tensor:
    """int64 [B, S]: a hash of the seed, the whole row and the position."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    row = mix(tokens + (place << 32)).sum(1, keepdim=True) + seed  # wraps around by intent
    return mix(row + place)


def gumbel(key: Tensor, first: int, count: int) -> Tensor:
    """Standard Gumbel noise fp32 [n, count] for ids from `first` on; a pure function of key [n] and id. 23 bits, so that
    adding a half is exact and the largest is 16.6, not infinite."""
    ids = torch.arange(first, first + count, device=key.device)
    uniform = ((mix(key[:, None] + (ids << 20)) & ((1 << 23) - 1)).float() + 0.5) / (1 << 23)
    return -torch.log(-torch.log(uniform))


def dropout(x: Tensor, key: Tensor, site: int, p: float) -> Tensor:
    """Inverted dropout of x [..., H] by key [...] int64; `site` says which of a model's dropouts it is."""
    return x.masked_fill(dropped(key, site, x.shape[-1], p), 0.0) * (1 / (1 - p))


def dropped(key: Tensor, site: int, width: int, p: float) -> Tensor:
    """Bool [..., width], True with probability p: 32-bit hashes of key, site and channel (murmur3's finaliser, cut short)."""
    channel = mix(torch.arange(width, device=key.device) + ((site & BITS) << 20)).to(torch.int32)
    x = key.to(torch.int32)[..., None] ^ channel
    x.mul_(-0x7A143595)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.mul_(-0x3D4D51CB)
    return x < int(p * (1 << 32)) - (1 << 31)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose right shifts are made logical here."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
