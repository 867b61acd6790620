"""Masked diffusion: hide each token with one random probability per document, and weight the loss by its inverse.

t ~ U(0, 1), p = (1 - eps) t + eps; every maskable token becomes [MASK] with probability p, attention is full. The loss,
sum over the hidden of nll / p divided by the number of MASKABLE tokens, is an upper bound on the negative log-likelihood
per token: a bound, not a perplexity (MDLM: Sahoo et al. 2024; LLaDA: Nie et al. 2025). MDLM spreads the t of a batch evenly
over (0, 1), for a loss and a gradient of less variance. Samples here do not know their batch, which may
change; they take turns over `STRATA` equal parts of (0, 1) in the order of van der Corput, in which every stretch of the stream
is nearly even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ds_pretrain.core.batch import Document, Example, Head, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import Objective, Variant, register

STRATA = 64
"""Parts of (0, 1) that t is drawn from in turn; a power of two."""


@register("mdlm")
@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(Objective):
    """The absorbing-state diffusion of MDLM and LLaDA."""

    eps: float = 1e-3
    """Smallest masking probability."""
    random_length: float = 0.01
    """Share of pieces that are cut to a uniformly random length (LLaDA's 1%)."""

    antithetic: bool = True
    """Whether the t of samples that are trained together are spread evenly, as MDLM's are; LLaDA's, and those in a mixture, are
    independent."""

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
        """A bound on the whole text cuts nothing off, and its standard error is one of independent draws."""
        return replace(self, random_length=0.0, antithetic=False)

    @property
    def in_turn(self) -> bool:
        return self.antithetic

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(Stratum(self, van_der_corput(i, STRATA)) for i in range(STRATA)) if self.antithetic else (self,)

    def piece(self, max_len: int) -> int:
        return max_len

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        return self.at(rng.random(), docs, max_len, vocab, rng)

    def at(self, t: float, docs: Sequence[Document], max_len: int, vocab: Vocabulary, rng: np.random.Generator) -> Example:
        """The example at this time of the diffusion."""
        (doc,) = docs
        labels = doc.tokens[:max_len].astype(np.int32)
        if rng.random() < self.random_length:
            labels = labels[: rng.integers(1, len(labels) + 1)]
        p = (1 - self.eps) * t + self.eps
        maskable = ~vocab.is_special[labels]
        hidden = maskable & (rng.random(len(labels)) < p)
        inputs = np.where(hidden, vocab.mask, labels).astype(np.int32)
        return Example.bidirectional(inputs, {"mdlm": Target.of(labels, hidden / p, total=int(maskable.sum()))})


@dataclass(frozen=True)
class Stratum:
    """The examples whose t lies in [start, start + 1 / STRATA)."""

    objective: MaskedDiffusion
    start: float

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return self.objective.size(tokens)

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        return self.objective.at(self.start + rng.random() / STRATA, docs, max_len, vocab, rng)


def van_der_corput(number: int, count: int) -> float:
    """The bits of `number` behind the binary point in reverse; of numbers 0 to `count` - 1, a power of two, a permutation."""
    bits = count.bit_length() - 1
    return int(f"{number:0{bits}b}"[::-1], 2) / count
