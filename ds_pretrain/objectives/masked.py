"""Masked language modelling: hide some tokens, predict them from both sides.

Of the chosen positions 80% become [MASK], 10% a random word of the real vocabulary, 10% stay (Devlin et al. 2019).
Special tokens are never chosen and never inserted; the count comes from real tokens, not from the padded length. Two
ways to choose: exactly max(1, round(p * n)) positions as BERT's own data generator does, or each position by its own
coin as `transformers` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ds_pretrain.core.batch import Document, Example, Head, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import Objective, register


@register("mlm")
@dataclass(frozen=True, kw_only=True)
class MaskedLanguageModeling(Objective):
    """The BERT objective without a sentence task (RoBERTa's FULL-SENTENCES)."""

    mask_prob: float = 0.15
    """Share of real tokens that are predicted."""
    mask_token_prob: float = 0.8
    """Share of the predicted that are replaced by [MASK]."""
    random_token_prob: float = 0.1
    """Share of the predicted that are replaced by a uniformly random word; the rest is kept."""
    selection: Literal["exact", "bernoulli"] = "exact"
    """How positions are chosen: a fixed count per example, or each by its own coin."""

    heads = (Head("mlm"),)
    kind = "full"
    eod = False

    def __post_init__(self) -> None:
        if not 0 < self.mask_prob < 1:
            raise ValueError(f"mask_prob must lie between 0 and 1, got {self.mask_prob}")
        if min(self.mask_token_prob, self.random_token_prob) < 0 or self.mask_token_prob + self.random_token_prob > 1:
            raise ValueError(
                f"mask_token_prob {self.mask_token_prob} and random_token_prob {self.random_token_prob} must not be "
                "negative and must not sum to more than 1"
            )
        if self.selection not in ("exact", "bernoulli"):
            raise ValueError(f"selection must be 'exact' or 'bernoulli', got {self.selection!r}")

    def piece(self, max_len: int) -> int:
        return max_len - 2

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return tokens + 2

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        (doc,) = docs
        labels = np.concatenate(([vocab.cls], doc.tokens[: max_len - 2], [vocab.sep])).astype(np.int32)
        chosen = self._choose(np.flatnonzero(~vocab.is_special[labels]), rng)
        inputs = labels.copy()
        inputs[chosen] = self._corrupt(labels[chosen], vocab, rng)
        weights = np.zeros(len(labels))
        weights[chosen] = 1
        horizon = np.full(len(labels), len(labels) - 1, dtype=np.int32)
        return Example(inputs, horizon, {"mlm": Target.of(labels, weights)})

    def _choose(self, maskable: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.selection == "bernoulli":
            return maskable[rng.random(len(maskable)) < self.mask_prob]
        count = min(len(maskable), max(1, round(self.mask_prob * len(maskable))))
        return rng.permutation(maskable)[:count]

    def _corrupt(self, tokens: np.ndarray, vocab: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        dice = rng.random(len(tokens))
        words = vocab.words[rng.integers(len(vocab.words), size=len(tokens))]
        replaced = np.where(dice < self.mask_token_prob + self.random_token_prob, words, tokens)
        return np.where(dice < self.mask_token_prob, vocab.mask, replaced).astype(np.int32)
