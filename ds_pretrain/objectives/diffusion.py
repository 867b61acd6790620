"""Masked diffusion: hide each token with one random probability per document, and weight the loss by its inverse.

t ~ U(0, 1), p = (1 - eps) t + eps; every maskable token becomes [MASK] with probability p, attention is full. The loss,
sum over the hidden of nll / p divided by the number of MASKABLE tokens, is an upper bound on the negative log-likelihood
per token: a bound, not a perplexity (MDLM: Sahoo et al. 2024; LLaDA: Nie et al. 2025). MDLM can also draw the t of a batch
in strata; a sample here does not know its batch, which is what makes it the same under any layout, so each draws its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ds_pretrain.core.batch import Document, Example, Head, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import Objective, register


@register("mdlm")
@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(Objective):
    """The absorbing-state diffusion of MDLM and LLaDA."""

    eps: float = 1e-3
    """Smallest masking probability."""
    random_length: float = 0.01
    """Share of pieces that are cut to a uniformly random length (LLaDA's 1%)."""

    heads = (Head("mdlm"),)
    kind = "full"
    eod = False
    measure = "bound"

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must lie between 0 and 1, got {self.eps}")
        if not 0 <= self.random_length <= 1:
            raise ValueError(f"random_length must lie in [0, 1], got {self.random_length}")

    @property
    def evaluated(self) -> Objective:
        """A bound on the whole text cuts nothing off."""
        return replace(self, random_length=0.0)

    def piece(self, max_len: int) -> int:
        return max_len

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        (doc,) = docs
        labels = doc.tokens[:max_len].astype(np.int32)
        if rng.random() < self.random_length:
            labels = labels[: rng.integers(1, len(labels) + 1)]
        p = (1 - self.eps) * rng.random() + self.eps
        maskable = ~vocab.is_special[labels]
        hidden = maskable & (rng.random(len(labels)) < p)
        inputs = np.where(hidden, vocab.mask, labels).astype(np.int32)
        return Example.bidirectional(inputs, {"mdlm": Target.of(labels, hidden / p, total=int(maskable.sum()))})
