"""Prefix language modelling: read the beginning from both sides, predict the rest one token at a time.

Positions of the prefix see all of it, later ones what came before them; loss is on the targets only, and the last
position of the prefix predicts the first target (Raffel et al. 2020, Tay et al. 2023). Prefix lengths are drawn from the
sample's own key: uniform as T5's `random_prefix_noise_mask`, or a fixed share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_pretrain.core.batch import Document, Example, Head, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import Objective, register


def prefixed(tokens: np.ndarray, prefix: int, head: str) -> Example:
    """`tokens[:prefix]` read from both sides, `tokens[prefix:]` predicted: one position less than tokens."""
    labels = tokens[1:].astype(np.int32)
    position = np.arange(len(labels), dtype=np.int32)
    horizon = np.maximum(position, prefix - 1)
    return Example(tokens[:-1].astype(np.int32), horizon, {head: Target.of(labels, position >= prefix - 1)})


@register("prefix_lm")
@dataclass(frozen=True, kw_only=True)
class PrefixLanguageModeling(Objective):
    """A document, cut once. Its first token is read after the end-of-document id (or the token before the piece)."""

    ratio: float | None = None
    """Share of a document's tokens that is prefix; None: 1 to n - 1 of them, uniformly."""
    mode: str | None = None
    """Special token in front of the prefix, by name (UL2's S denoiser has [S2S])."""

    heads = (Head("prefix_lm"),)
    kind = "mixed"

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}: leave it out for uniform prefixes")

    def piece(self, max_len: int) -> int:
        return max_len - (self.mode is not None)

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return tokens + (self.mode is not None)

    def check(self, vocab: Vocabulary, max_len: int) -> list[str]:
        return super().check(vocab, max_len) + vocab.lacks(self.name, [self.mode] if self.mode else [])

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        (doc,) = docs
        text = doc.tokens[: self.piece(max_len)]
        start = [vocab.begin if doc.before is None else doc.before] + ([vocab.names[self.mode]] if self.mode else [])
        return prefixed(np.concatenate((start, text)), len(start) + self._prefix(len(text), rng), self.heads[0].name)

    def _prefix(self, tokens: int, rng: np.random.Generator) -> int:
        """Tokens of the document that are prefix; none where there is but one."""
        if tokens < 2:
            return 0
        if self.ratio is None:
            return int(rng.integers(1, tokens))
        return min(max(1, round(self.ratio * tokens)), tokens - 1)
