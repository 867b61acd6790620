"""Span corruption: cut spans out of a document, leave a sentinel for each, and write the spans down.

Inputs are the kept text with one sentinel for each span, targets the spans behind their sentinels, both ended by the
end-of-document id (T5: Raffel et al. 2020, `random_spans_noise_mask`). Decoder-only form: inputs, read from both sides,
then targets in the same row, with loss on the targets. Putting the spans back gives the document exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ds_pretrain.core.batch import Document, Example, Head
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import Objective, register
from ds_pretrain.objectives.prefix import prefixed


class Noise(NamedTuple):
    """How much of a text is cut out, and in how many spans; arrays or numbers."""

    tokens: np.ndarray
    spans: np.ndarray


def noise(tokens: np.ndarray, density: float, mean: float) -> Noise:
    """T5's counts: n_noise = clamp(round(n * density), 1, n - 1) and n_spans = max(1, round(n_noise / mean)), halves to
    even. A text of one token is cut out whole."""
    cut = np.clip(np.round(tokens * density), 1, np.maximum(tokens - 1, 1)).astype(np.int64)
    spans = np.maximum(1, np.round(cut / mean)).astype(np.int64)
    return Noise(cut, np.minimum(spans, np.maximum(tokens - cut, 1)))


def segmentation(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` as a sum of `parts` positive integers, every such sum equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def noise_mask(tokens: int, density: float, mean: float, roll: bool, rng: np.random.Generator) -> np.ndarray:
    """Bool [n]: what is cut out. Kept and cut stretches alternate, the first is kept, unless the mask is rolled."""
    cut, spans = (int(x) for x in noise(np.array(tokens), density, mean))
    if cut == tokens:
        return np.ones(tokens, dtype=bool)
    lengths = np.stack([segmentation(tokens - cut, spans, rng), segmentation(cut, spans, rng)], axis=1).ravel()
    mask = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
    return np.roll(mask, int(rng.integers(tokens))) if roll else mask


def corrupt(tokens: np.ndarray, mask: np.ndarray, sentinels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets): each span becomes a sentinel in the one and follows it in the other."""
    first = mask & ~np.concatenate(([False], mask[:-1]))
    marks = np.asarray(sentinels)[np.cumsum(first) - 1]
    inputs = np.where(first, marks, tokens)[~mask | first]
    at = np.flatnonzero(first[mask])
    return inputs, np.insert(tokens[mask], at, marks[first])


@lru_cache
def _longest(objective: SpanCorruption, max_len: int) -> int:
    """Tokens of the longest text whose example has at most `max_len` positions."""
    return int(np.flatnonzero(objective.size(np.arange(max_len + 1)) <= max_len)[-1])


@register("span_corruption")
@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Objective):
    """T5's objective in one row."""

    density: float = 0.15
    """Share of the tokens that is cut out."""
    mean_span: float = 3.0
    """Mean length of a span, in tokens."""
    roll: bool = False
    """Roll the mask by a random amount: without it the first token is never and the last always cut out."""
    mode: str | None = None
    """Special token in front, by name (UL2's R and X denoisers have [NLU] and [NLG])."""

    heads = (Head("span_corruption"),)
    kind = "mixed"
    eod = False

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ValueError(f"density must lie between 0 and 1, got {self.density}")
        if self.mean_span < 1:
            raise ValueError(f"mean_span must be at least 1 token, got {self.mean_span}")

    def piece(self, max_len: int) -> int:
        return _longest(self, max_len)

    def size(self, tokens: np.ndarray) -> np.ndarray:
        """Text, a sentinel on both sides for each span (one more where rolling cuts a span in two), two ends; shifted."""
        spans = noise(tokens, self.density, self.mean_span).spans + self.roll
        return tokens + 2 * spans + 1 + (self.mode is not None)

    def check(self, vocab: Vocabulary, max_len: int) -> list[str]:
        problems = super().check(vocab, max_len) + vocab.lacks(self.name, [self.mode] if self.mode else [])
        if problems:
            return problems
        most = self.piece(max_len)
        need = int(noise(np.array(most), self.density, self.mean_span).spans) + self.roll
        if need > len(vocab.sentinels):
            problems.append(
                f"{self.name} with density {self.density} and mean_span {self.mean_span} cuts {most} tokens into {need} spans, "
                f"the tokenizer has {len(vocab.sentinels)} sentinels: raise mean_span, lower density or batch.seq_len, or "
                "train a tokenizer with more"
            )
        return problems

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        (doc,) = docs
        text = doc.tokens[: self.piece(max_len)]
        mask = noise_mask(len(text), self.density, self.mean_span, self.roll, rng)
        inputs, targets = corrupt(text, mask, vocab.sentinels)
        start = [vocab.names[self.mode]] if self.mode else []
        whole = np.concatenate((start, inputs, [vocab.eod], targets, [vocab.eod]))
        return prefixed(whole, len(start) + len(inputs) + 1, self.heads[0].name)
