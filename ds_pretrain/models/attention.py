"""The core attention that megatron-core's layer calls between its QKV and output projections.

The pattern of the batch is lowered to a kernel once per micro-batch and stage, not once per layer:

    CPU         one SDPA call for all documents of one length.
    CUDA        FlexAttention with a block mask made from the two integer planes; plain SDPA with the dense mask when
                attention dropout is on, which FlexAttention does not have.

Documents by themselves never touch a masked score: at S = 2048 with 8 of them they were measured 8x faster than a dense
mask. Shape suffixes: B rows, S positions, N query heads here, G key heads here, D head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_pretrain.core.attention import AttentionPattern, Kind, Span
from ds_pretrain.models.config import RopeScaling


class Documents(NamedTuple):
    """The documents of a batch, those of one length together."""

    order: Tensor
    """int64 [S*B]: positions (s*B + b) document by document, padding last."""
    inverse: Tensor
    """int64 [S*B]: the way back."""
    shapes: list[tuple[int, int]]
    """(documents, positions in each), in that order."""

    @staticmethod
    def of(pattern: AttentionPattern) -> Documents:
        """The documents of a pattern. Reads the device."""
        rows = len(pattern.segment)
        lengths: dict[int, list[Span]] = {}
        for span in pattern.spans():
            lengths.setdefault(span.stop - span.start, []).append(span)
        places = [
            (torch.tensor([span.start for span in spans])[:, None] + torch.arange(size)) * rows
            + torch.tensor([span.row for span in spans])[:, None]
            for size, spans in lengths.items()
        ]
        padding = (pattern.segment.cpu().t().flatten() == 0).nonzero()[:, 0]
        order = torch.cat([*(place.flatten() for place in places), padding])
        return Documents(order, order.argsort(), [(len(spans), size) for size, spans in lengths.items()])


@dataclass(frozen=True)
class Lowered:
    """A pattern and its positions in the form the kernels want."""

    pattern: AttentionPattern
    documents: Documents | None
    """Documents (CPU only; reading them costs a synchronisation elsewhere)."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines, fp32 [S, B, 1, D]; None without rotary positions."""
    block_mask: Any = None
    """FlexAttention's block mask (CUDA only)."""


class _Memory(NamedTuple):
    """What `lower` was asked last, and its answer."""

    planes: tuple[Tensor, ...]
    shape: tuple[Any, ...]
    lowered: Lowered


_LAST: _Memory | None = None


def lower(
    segment: Tensor,
    horizon: Tensor,
    position: Tensor,
    kind: Kind,
    head_dim: int,
    base: float | None,
    scaling: RopeScaling | None = None,
) -> Lowered:
    """The lowered pattern of a micro-batch; `base` is the rotary base, None without rotary positions.

    The last one is remembered, by the identity of its planes, which the layers of a stage hand on unchanged. Only the
    last: whatever is remembered keeps its planes and rotary tables alive.
    """
    global _LAST
    planes, shape = (segment, horizon, position), (kind, head_dim, base, scaling)
    if _LAST is None or shape != _LAST.shape or any(a is not b for a, b in zip(planes, _LAST.planes, strict=True)):
        pattern = AttentionPattern(segment, horizon, kind)
        cuda = segment.is_cuda
        rotary = None if base is None else rotary_table(position, head_dim, base, scaling)
        block_mask = _block_mask(pattern) if cuda else None
        _LAST = _Memory(planes, shape, Lowered(pattern, None if cuda else Documents.of(pattern), rotary, block_mask))
    return _LAST.lowered


def rotary_table(position: Tensor, head_dim: int, base: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021, in LLaMA's half-split order), fp32 [S, B, 1, D]."""
    exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    frequency = 1.0 / base**exponent  # to the last bit as others have it: far out that shows
    angle = position.t()[:, :, None, None].float() * (slowed(frequency, scaling) if scaling else frequency)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def slowed(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies (radians a position) that reach further; llama3: as LLaMA 3.1's published code has it."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.trained * frequency / (2 * math.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to [S, B, heads, D]; computed in fp32."""
    cos, sin = table
    left, right = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


class CoreAttention(nn.Module):
    """softmax(q k / sqrt(D)) v under the pattern of the batch, handed in as megatron-core's `attention_mask`.

    across: set where the positions of a row are divided over ranks (`training/context.py`): gives `local` all positions of a
    part of the heads, and gives back all heads of this rank's own positions.
    """

    across: Callable[[Tensor, Tensor, Tensor, Lowered], Tensor] | None = None

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Lowered, **_: Any) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N*D]."""
        return (self.across or self.local)(query, key, value, attention_mask).flatten(2)

    def local(self, query: Tensor, key: Tensor, value: Tensor, lowered: Lowered) -> Tensor:
        """All positions of the heads that are here: [S, B, N, D]."""
        if lowered.rotary is not None:
            query, key = rotate(query, lowered.rotary), rotate(key, lowered.rotary)
        dropout = self.dropout if self.training else 0.0
        if dropout == 0:
            return _attend(query, key, value, lowered, 0.0)
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with get_cuda_rng_tracker().fork():  # each tensor rank holds other heads: its own stream
            return _attend(query, key, value, lowered, dropout)


def _attend(query: Tensor, key: Tensor, value: Tensor, lowered: Lowered, dropout: float) -> Tensor:
    """Tensors [S, B, heads, D] on any device."""
    if lowered.documents is not None:
        return by_document(query, key, value, lowered.pattern, lowered.documents, dropout)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    if dropout:
        mask = lowered.pattern.dense()[:, None]
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=grouped)
    else:
        out = _flex()(q, k, v, block_mask=lowered.block_mask, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def by_document(
    query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, documents: Documents, dropout: float
) -> Tensor:
    """One call for all documents of one length; padding gets zeros. Tensors [S, B, heads, D]."""
    order, inverse, shapes = documents
    inner = [count * length for count, length in shapes]
    parts = [_Permute.apply(x.flatten(0, 1), order, inverse)[: sum(inner)].split(inner) for x in (query, key, value)]
    outs = []
    for shape, place, *qkv in zip(shapes, order[: sum(inner)].split(inner), *parts, strict=True):
        mask = _visible(pattern, place.view(shape)) if pattern.kind == "mixed" else None
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
        causal, grouped = pattern.kind == "causal", q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    padding = query.new_zeros(len(order) - sum(inner), *query.shape[2:])
    return _Permute.apply(torch.cat([*outs, padding]), inverse, order).view_as(query)


def _visible(pattern: AttentionPattern, place: Tensor) -> Tensor:
    """Who sees whom inside documents of one length L that lie at `place` [documents, L]: bool [documents, 1, L, L]."""
    start = place[:, :1] // len(pattern.horizon)
    horizon = pattern.horizon.t().flatten()[place] - start
    return torch.arange(place.shape[1]) <= horizon[:, None, :, None]


class _Permute(torch.autograd.Function):
    """Rows of a tensor in another order. The gradient is the way back, which autograd would add up row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.inverse), None, None


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(pattern: AttentionPattern) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = pattern.segment.shape
    return create_block_mask(pattern.mask_mod(), rows, None, length, length, device=pattern.segment.device)
