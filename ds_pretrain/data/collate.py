"""Examples laid end to end into the planes of a batch, and the audit of what came out.

What a row lacks is one more stretch, of padding, so that every plane is a concatenation and nothing is scattered.
Causal language modelling has a second way that makes no examples at all: its inputs are its labels moved by one, so a
batch is one read of the store. It gives the same planes bit for bit (a test compares them) at five times the speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch, Count, Example, Head, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives import CausalLanguageModeling, Objective

Shape = tuple[int, int]


class Layout(NamedTuple):
    """The stretches of a batch, laid end to end: row by row its examples, then one of padding (perhaps of length 0).

    starts, lengths: positions in the flattened batch. padding: bool, which stretches are padding.
    """

    starts: np.ndarray
    lengths: np.ndarray
    segments: np.ndarray
    shape: Shape

    @staticmethod
    def of(counts: Sequence[int], lengths: np.ndarray, seq_len: int) -> Layout:
        """counts: examples of each row. lengths: positions of each example."""
        ends, of_row = np.cumsum(counts, dtype=np.int64), np.repeat(np.arange(len(counts)), counts)
        free = seq_len - np.bincount(of_row, weights=lengths, minlength=len(counts)).astype(np.int64)
        assert free.min(initial=0) >= 0, f"a row exceeds {seq_len} positions: objective.size is no upper bound"
        segments = 1 + np.arange(len(lengths)) - np.repeat(ends - counts, counts)
        lengths, segments = np.insert(lengths, ends, free), np.insert(segments, ends, 0).astype(np.int32)
        return Layout(np.cumsum(lengths) - lengths, lengths, segments, (len(counts), seq_len))

    def real(self) -> np.ndarray:
        """Where the examples start."""
        return self.starts[self.segments > 0]

    def position(self, reset: bool) -> np.ndarray:
        """From 0 on in every stretch, or in every row."""
        rows, seq_len = self.shape
        if not reset:
            return np.tile(np.arange(seq_len), rows)
        start = np.repeat(self.starts, self.lengths)
        return np.subtract(np.arange(len(start)), start, out=start)

    def segment(self, reset: bool) -> np.ndarray:
        """One of its own for every example, or one for all examples of a row."""
        return np.repeat(self.segments if reset else np.minimum(self.segments, 1), self.lengths)

    def padding(self) -> list[slice]:
        """The stretches of padding that are not empty."""
        empty = np.flatnonzero((self.segments == 0) & (self.lengths > 0))
        return [slice(a, a + n) for a, n in zip(self.starts[empty].tolist(), self.lengths[empty].tolist(), strict=True)]


def collate(rows: Sequence[Sequence[Example]], objective: Objective, vocab: Vocabulary, seq_len: int) -> Batch:
    """Rows of examples as a batch; a row without any is all padding and contributes exactly 0."""
    rows = [[part for e in row for part in (e, *e.then)] for row in rows]
    made = [e for row in rows for e in row]
    layout = Layout.of([len(row) for row in rows], np.array([len(e.inputs) for e in made], dtype=np.int64), seq_len)
    following = iter(made)
    laid = [
        next(following) if segment else _padding(length, vocab.pad)
        for segment, length in zip(layout.segments.tolist(), layout.lengths.tolist(), strict=True)
    ]
    horizon = np.concatenate([e.horizon for e in laid]) + np.repeat(layout.starts % seq_len, layout.lengths)
    targets = {head.name: _target(laid, head.name, layout.shape) for head in objective.heads}
    inputs = np.concatenate([e.inputs for e in laid])
    return _batch(layout, inputs, horizon, targets, objective, _token_type(laid, layout.shape))


def collate_causal(
    layout: Layout,
    pieces: Iterable[np.ndarray],
    fresh: np.ndarray,
    objective: CausalLanguageModeling,
    vocab: Vocabulary,
) -> Batch:
    """What `collate` gives for the examples of these pieces.

    pieces: tokens of each, the one before it included where the piece is not fresh. fresh: begins with the end-of-document id.
    """
    rows, seq_len = layout.shape
    inputs = np.empty(rows * seq_len, dtype=np.int64)
    labels, last, starts = np.empty_like(inputs), [], layout.real()
    for start, tokens in zip((starts + fresh).tolist(), pieces, strict=True):
        inputs[start : start + len(tokens) - 1] = tokens[:-1]
        last.append(tokens[-1])
    inputs[starts[fresh]] = vocab.begin
    labels[:-1] = inputs[1:]
    labels[starts + layout.lengths[layout.segments > 0] - 1] = last
    scored = labels != vocab.eod if not objective.eod_loss else np.ones(len(labels), dtype=bool)
    for padding in layout.padding():
        inputs[padding], labels[padding], scored[padding] = vocab.pad, 0, False
    weights = _plane(scored.astype(np.float32), layout.shape)
    horizon = np.tile(np.arange(seq_len, dtype=np.int32), rows)
    target = Target(_plane(labels, layout.shape), weights, float(np.count_nonzero(scored)))
    return _batch(layout, inputs, horizon, {"clm": target}, objective)


def realised(batches: Sequence[Batch], vocab: Vocabulary, heads: Sequence[Head]) -> dict[str, float]:
    """What the batches really contain, as shares: `counted`, divided."""
    return {key: part / whole for key, (part, whole) in counted(batches, vocab, heads).items() if whole}


def counted(batches: Sequence[Batch], vocab: Vocabulary, heads: Sequence[Head]) -> dict[str, Count]:
    """What the batches really contain, to be summed and held against what was asked for.

    useful: positions that are not padding. ahead: those of them that see beyond themselves, where that differs from position to
    position. HEAD/targets: of the useful, those that this head predicts. HEAD/rate, mask, random, kept: for heads that predict
    their own position, of the words those that are predicted, and what became of them. HEAD/cut, spans, span_length: of heads
    whose labels hold sentinels, tokens cut out of the text, spans by example and tokens by span.
    """
    useful = sum(int((b.attention.segment != 0).sum()) for b in batches)
    found: dict[str, Count] = {"useful": (useful, sum(b.inputs.numel() for b in batches))}
    if batches[0].attention.kind == "mixed":
        found["ahead"] = (sum(_ahead(b.attention) for b in batches), useful)
    words = {head.name for head in heads if head.classes is None}
    for name in batches[0].targets:
        found[f"{name}/targets"] = (sum(int((b.targets[name].weights != 0).sum()) for b in batches), useful)
        if name in words:
            found |= {f"{name}/{key}": count for key, count in _fates(batches, name, vocab).items()}
            found |= {f"{name}/{key}": count for key, count in _spans(batches, name, vocab).items()}
    return found


def _ahead(attention: AttentionPattern) -> int:
    here = torch.arange(attention.horizon.shape[1], device=attention.horizon.device)
    return int(((attention.horizon > here) & (attention.segment != 0)).sum())


def _fates(batches: Sequence[Batch], name: str, vocab: Vocabulary) -> Mapping[str, Count]:
    chosen = [b.targets[name].weights != 0 for b in batches]
    inputs = torch.cat([b.inputs[at] for b, at in zip(batches, chosen, strict=True)])
    labels = torch.cat([b.targets[name].labels[at] for b, at in zip(batches, chosen, strict=True)])
    special = torch.from_numpy(vocab.is_special)
    masked, kept = (int((inputs == other).sum()) for other in (vocab.mask, labels))
    if not masked or special[labels].any():
        return {}
    owns = [_segments(b, at) > 0 for b, at in zip(batches, chosen, strict=True)]  # of a mixture, the examples of this head
    text = sum(int((own & (~special[b.inputs] | at)).sum()) for b, at, own in zip(batches, chosen, owns, strict=True))
    fates = {"mask": masked, "random": len(inputs) - masked - kept, "kept": kept}
    return {"rate": (len(inputs), text)} | {key: (n, len(inputs)) for key, n in fates.items()}


def _spans(batches: Sequence[Batch], name: str, vocab: Vocabulary) -> Mapping[str, Count]:
    """Spans by their sentinels; the text of an example is what its inputs hold beside special ids."""
    special, sentinels = torch.from_numpy(vocab.is_special), torch.tensor(vocab.sentinels, dtype=torch.int64)
    spans = cut = text = examples = 0
    for b in batches:
        labels, scored = b.targets[name].labels, b.targets[name].weights != 0
        starts = scored & torch.isin(labels, sentinels)
        if not starts.any():
            continue
        own = _segments(b, starts)
        examples += int(own.unique().numel()) - bool((own == 0).any())
        spans += int(starts.sum())
        cut += int((scored & (own > 0) & ~special[labels]).sum())
        text += int(((own > 0) & ~special[b.inputs]).sum())
    return {"cut": (cut, text), "spans": (spans, examples), "span_length": (cut, spans)} if spans else {}


def _segments(batch: Batch, marked: Tensor) -> Tensor:
    """int64 [B, S]: at positions of segments that hold a marked one a number of their segment, from 1; 0 elsewhere."""
    rows = torch.arange(marked.shape[0])[:, None] * (marked.shape[1] + 1)
    number = (batch.attention.segment.long() + rows) * (batch.attention.segment != 0)
    return torch.where(torch.isin(number, number[marked]), number, 0)


def _batch(
    layout: Layout,
    inputs: np.ndarray,
    horizon: np.ndarray,
    targets: Mapping[str, Target],
    objective: Objective,
    token_type: Tensor | None = None,
) -> Batch:
    shape = layout.shape
    segment = _plane(layout.segment(objective.reset_attention), shape)
    attention = AttentionPattern(segment, _plane(horizon.astype(np.int32, copy=False), shape), objective.kind)
    position = _plane(layout.position(objective.reset_position), shape)
    return Batch(_plane(inputs.astype(np.int64, copy=False), shape), position, attention, targets, token_type)


def _padding(length: int, pad: int) -> Example:
    return Example(np.full(length, pad, dtype=np.int32), np.arange(length, dtype=np.int32), {})


def _target(laid: Sequence[Example], head: str, shape: Shape) -> Target:
    given = [e.targets.get(head) or _nothing(len(e.inputs)) for e in laid]
    labels = np.concatenate([t.labels for t in given], dtype=np.int64)
    weights = np.concatenate([t.weights for t in given], dtype=np.float32)
    return Target(_plane(labels, shape), _plane(weights, shape), float(sum(t.total for t in given)))


def _nothing(length: int) -> Target:
    return Target(np.zeros(length, dtype=np.int32), np.zeros(length, dtype=np.float32), 0.0)


def _token_type(laid: Sequence[Example], shape: Shape) -> Tensor | None:
    if all(e.token_type is None for e in laid):
        return None
    given = [np.zeros(len(e.inputs), dtype=np.int64) if e.token_type is None else e.token_type for e in laid]
    return _plane(np.concatenate(given, dtype=np.int64), shape)


def _plane(flat: np.ndarray, shape: Shape) -> Tensor:
    return torch.from_numpy(flat.reshape(shape))
