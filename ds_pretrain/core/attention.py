"""Who sees whom, as two integer planes instead of a dense mask.

    q sees k   iff   segment[q] == segment[k] != 0   and   k <= horizon[q]

Two int32 planes of shape [B, S] hold causal, bidirectional, prefix, padded and packed rows, and any mixture of them
inside one row. The price: patterns that are not "a left-closed window inside my own segment" (sliding windows, for
example) do not fit. A dense [B, S, S] mask exists in one place only, `dense()`, the reference every kernel is tested
against.

Shape suffixes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["causal", "full", "mixed"]


class Span(NamedTuple):
    """One document inside a packed batch: positions [start, stop) of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """The attention structure of one micro-batch.

    segment: int32 [B, S], the document of a position inside its row, counted from 1; 0 is padding.
    horizon: int32 [B, S], the last position (absolute in the row) that a query may see.
    kind: a static promise about the rows, so that a kernel is chosen without reading the device.
    """

    segment: Tensor
    horizon: Tensor
    kind: Kind = "mixed"

    @staticmethod
    def causal(segment: Tensor) -> AttentionPattern:
        """Every position sees itself and what came before it in its own segment."""
        return AttentionPattern(segment, _positions(segment), "causal")

    @staticmethod
    def full(segment: Tensor) -> AttentionPattern:
        """Every position sees its whole segment."""
        return AttentionPattern(segment, torch.full_like(segment, segment.shape[1] - 1), "full")

    @staticmethod
    def prefix(segment: Tensor, length: Tensor) -> AttentionPattern:
        """The first `length[b, s]` positions of each segment see one another; the rest is causal.

        length: int [B, S], the prefix length of the segment that a position belongs to.
        """
        position = _positions(segment)
        end = _starts(segment) + length.to(position.dtype) - 1
        return AttentionPattern(segment, torch.maximum(position, end), "mixed")

    def offset(self) -> Tensor:
        """[B, S]: how far each position is from the start of its segment."""
        return _positions(self.segment) - _starts(self.segment)

    def dense(self) -> Tensor:
        """The reference mask: bool [B, S, S], True where row (query) sees column (key)."""
        same = (self.segment[:, :, None] == self.segment[:, None, :]) & (self.segment[:, :, None] != 0)
        key = torch.arange(self.segment.shape[1], device=self.segment.device)
        return same & (key <= self.horizon[:, :, None])

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same rule in the form that FlexAttention asks for: (batch, head, query, key) -> bool."""
        segment, horizon = self.segment, self.horizon

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (segment[b, q] == segment[b, k]) & (segment[b, q] != 0) & (k <= horizon[b, q])

        return rule

    def spans(self) -> list[Span]:
        """The documents of the batch, row by row. Reads the device: for the CPU path, tools and tests."""
        edged = F.pad(self.segment.cpu(), (1, 1))
        border, inside = edged[:, 1:] != edged[:, :-1], edged != 0
        rows, starts = (border & inside[:, 1:]).nonzero(as_tuple=True)
        _, stops = (border & inside[:, :-1]).nonzero(as_tuple=True)
        return [Span(*numbers) for numbers in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True)]

    def cu_seqlens(self) -> Tensor:
        """Cumulative document lengths, int32 [documents + 1], as variable-length kernels want them (no padding)."""
        lengths = torch.tensor([0] + [span.stop - span.start for span in self.spans()], dtype=torch.int32)
        return lengths.cumsum(0).to(torch.int32).to(self.segment.device)


def _starts(segment: Tensor) -> Tensor:
    first = torch.zeros_like(segment)
    first[:, 1:] = torch.where(segment[:, 1:] != segment[:, :-1], _positions(segment)[:, 1:], 0)
    return first.cummax(dim=1).values


def _positions(segment: Tensor) -> Tensor:
    rows, length = segment.shape
    return torch.arange(length, dtype=segment.dtype, device=segment.device).repeat(rows, 1)
