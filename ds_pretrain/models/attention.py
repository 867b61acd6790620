"""The core attention that megatron-core's layer calls between its QKV and output projections.

The pattern of the batch is lowered to a kernel once per micro-batch and stage, not once per layer:

    CPU         one SDPA call per document, one for the whole batch where every row is a single document.
    CUDA        FlexAttention with a block mask made from the two integer planes; plain SDPA with the dense mask when
                attention dropout is on, which FlexAttention does not have.

Per-document calls never touch a masked score: at S = 2048 with 8 documents they were measured 8x faster than a dense
mask. Shape suffixes: B rows, S positions, N query heads here, G key heads here, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_pretrain.core.attention import AttentionPattern, Kind, Span


@dataclass(frozen=True)
class Lowered:
    """A pattern and its positions in the form the kernels want."""

    pattern: AttentionPattern
    spans: list[Span]
    """Documents (CPU only; reading them costs a synchronisation elsewhere)."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines, fp32 [S, B, 1, D]; None without rotary positions."""
    block_mask: Any = None
    """FlexAttention's block mask (CUDA only)."""

    @property
    def single(self) -> bool:
        """Every row is one document without padding."""
        rows, length = self.pattern.segment.shape
        return len(self.spans) == rows and all(s.stop - s.start == length for s in self.spans)


class _Memory(NamedTuple):
    """What `lower` was asked last, and its answer."""

    planes: tuple[Tensor, ...]
    shape: tuple[Any, ...]
    lowered: Lowered


_LAST: _Memory | None = None


def lower(segment: Tensor, horizon: Tensor, position: Tensor, kind: Kind, head_dim: int, base: float | None) -> Lowered:
    """The lowered pattern of a micro-batch; `base` is the rotary base, None without rotary positions.

    The last one is remembered, by the identity of its planes, which the layers of a stage hand on unchanged. Only the
    last: whatever is remembered keeps its planes and rotary tables alive.
    """
    global _LAST
    planes, shape = (segment, horizon, position), (kind, head_dim, base)
    if _LAST is None or shape != _LAST.shape or any(a is not b for a, b in zip(planes, _LAST.planes, strict=True)):
        pattern = AttentionPattern(segment, horizon, kind)
        cuda = segment.is_cuda
        rotary = None if base is None else rotary_table(position, head_dim, base)
        block_mask = _block_mask(pattern) if cuda else None
        _LAST = _Memory(planes, shape, Lowered(pattern, [] if cuda else pattern.spans(), rotary, block_mask))
    return _LAST.lowered


def rotary_table(position: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021, in LLaMA's half-split order), fp32 [S, B, 1, D]."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = position.t()[:, :, None, None].float() * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to [S, B, heads, D]; computed in fp32."""
    cos, sin = table
    left, right = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


class CoreAttention(nn.Module):
    """softmax(q k / sqrt(D)) v under the pattern of the batch, handed in as megatron-core's `attention_mask`."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Lowered, **_: Any) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N*D]."""
        if attention_mask.rotary is not None:
            query, key = rotate(query, attention_mask.rotary), rotate(key, attention_mask.rotary)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = self._attend(q, k, v, attention_mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lowered: Lowered) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if dropout == 0:
            return _without_dropout(q, k, v, lowered)
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with get_cuda_rng_tracker().fork():  # each tensor rank holds other heads: its own stream
            if q.is_cuda:
                mask = lowered.pattern.dense()[:, None]
                return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=q.shape[1] != k.shape[1])
            return by_document(q, k, v, lowered, dropout)


def _without_dropout(q: Tensor, k: Tensor, v: Tensor, lowered: Lowered) -> Tensor:
    if q.is_cuda:
        return _flex()(q, k, v, block_mask=lowered.block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return by_document(q, k, v, lowered, 0.0)


def by_document(q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, dropout: float) -> Tensor:
    """One call per document; padding gets zeros. All tensors [B, heads, S, D]."""
    if lowered.single:
        return _document(q, k, v, lowered.pattern, Span(0, 0, q.shape[2]), dropout)
    rows: list[list[Tensor]] = [[] for _ in range(q.shape[0])]
    ends = [0] * q.shape[0]
    for span in lowered.spans:
        here = (slice(span.row, span.row + 1), slice(None), slice(span.start, span.stop))
        rows[span.row].append(_zeros(q, span.start - ends[span.row]))
        rows[span.row].append(_document(q[here], k[here], v[here], lowered.pattern, span, dropout))
        ends[span.row] = span.stop
    return torch.cat([torch.cat([*row, _zeros(q, q.shape[2] - end)], 2) for row, end in zip(rows, ends, strict=True)])


def _document(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, span: Span, dropout: float) -> Tensor:
    """Attention inside one document, or in every row of a batch of single documents."""
    mask = None
    if pattern.kind == "mixed":
        rows = slice(span.row, span.row + q.shape[0])
        horizon = pattern.horizon[rows, None, span.start : span.stop, None] - span.start
        mask = torch.arange(q.shape[2], device=q.device) <= horizon
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=pattern.kind == "causal", enable_gqa=q.shape[1] != k.shape[1]
    )


def _zeros(like: Tensor, length: int) -> Tensor:
    """What padding of that length gives in one row."""
    return like.new_zeros(1, like.shape[1], length, like.shape[3])


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(pattern: AttentionPattern) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = pattern.segment.shape
    return create_block_mask(pattern.mask_mod(), rows, None, length, length, device=pattern.segment.device)
