"""Keys and values of what a causal model has read, so that one more token costs one position and not the whole text again.

Each layer's core attention is given a memory where context parallelism has its exchange: new positions are added to it, and
attend to all of it. Rows may begin with padding, which nobody sees. The memory grows by a copy for each token: simple, and
small beside what a layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_pretrain.models.attention import CoreAttention, Lowered, rotate


@contextmanager
def remembering(network: nn.Module) -> Iterator[None]:
    """Inside, every forward pass goes on where the last one ended."""
    layers = [module for module in network.modules() if isinstance(module, CoreAttention)]
    for layer in layers:
        layer.across = Memory()
    try:
        yield
    finally:
        for layer in layers:
            layer.across = None


class Memory:
    """What one layer has read: keys and values [S, B, G, D], and bool [B, S] where there is text."""

    def __init__(self) -> None:
        self.read: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, lowered: Lowered) -> Tensor:
        """New positions [S, B, heads, D], which see all that was read and themselves: [S, B, N, D]."""
        if lowered.rotary is not None:
            query, key = rotate(query, lowered.rotary), rotate(key, lowered.rotary)
        new = (key, value, lowered.pattern.segment != 0)
        self.read = new if self.read is None else _joined(self.read, new)
        keys, values, real = self.read
        count, before = len(query), len(keys) - len(query)
        later = torch.ones(count, len(keys), dtype=torch.bool, device=keys.device).tril(before)
        own = torch.eye(count, len(keys), dtype=torch.bool, device=keys.device).roll(before, 1)  # padding sees itself alone
        mask = real[:, None, None, :] & later | own
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, keys, values))
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3)


def _joined(old: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]), torch.cat([old[2], new[2]], 1)
