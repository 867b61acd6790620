"""Masked language modelling: hide some tokens, predict them from both sides.

Of the chosen positions 80% become [MASK], 10% a random word of the real vocabulary, 10% stay (Devlin et al. 2019).
Special tokens are never chosen and never inserted; the count comes from real tokens, not from the padded length. Two
ways to choose: exactly max(1, round(p * n)) positions as BERT's own data generator does, or each position by its own
coin as `transformers` does. Three units of choice: tokens, whole words (found from the text of the ids, so for any
tokenizer), or spans of words: with geometric lengths, each span's fate drawn once for all of it (SpanBERT, Joshi et al.
2020), or of n words with probability 1/n, each token's fate by itself (ALBERT, Lan et al. 2020). The last span is cut to
what is left of the count, inside a word if need be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

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
    """How positions are chosen: a fixed count per example, or each unit by its own coin (not for spans)."""
    unit: Literal["token", "word", "span"] = "token"
    """What is chosen together: single tokens, whole words, or spans of whole words."""
    span_prob: float = 0.2
    """Parameter of the geometric distribution of span lengths, in words."""
    span_lengths: Literal["geometric", "harmonic"] = "geometric"
    """Distribution of span lengths: SpanBERT's geometric one, or ALBERT's, in which n words have a probability of 1/n."""
    span_max: int = 10
    """Longest span, in words."""

    heads: ClassVar[tuple[Head, ...]] = (Head("mlm"),)
    kind = "full"
    framed = True
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
        if self.unit not in ("token", "word", "span"):
            raise ValueError(f"unit must be 'token', 'word' or 'span', got {self.unit!r}")
        if self.unit == "span" and self.selection == "bernoulli":
            raise ValueError("spans are drawn until a count is reached: use selection='exact' with unit='span'")
        if self.span_lengths not in ("geometric", "harmonic"):
            raise ValueError(f"span_lengths must be 'geometric' or 'harmonic', got {self.span_lengths!r}")
        if not 0 < self.span_prob <= 1 or self.span_max < 1:
            raise ValueError(f"span_prob {self.span_prob} must lie in (0, 1] and span_max {self.span_max} be at least 1")

    @property
    def expected(self) -> Mapping[str, float]:
        rate = {"mlm/rate": self.mask_prob}
        if self._shared_fate:
            return rate
        kept = 1 - self.mask_token_prob - self.random_token_prob
        return {**rate, "mlm/mask": self.mask_token_prob, "mlm/random": self.random_token_prob, "mlm/kept": kept}

    @property
    def _shared_fate(self) -> bool:
        """Whether what becomes of a span is one draw for all of it."""
        return self.unit == "span" and self.span_lengths == "geometric"

    def piece(self, max_len: int) -> int:
        return max_len - 2

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return tokens + 2

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        (doc,) = docs
        labels = np.concatenate(([vocab.cls], doc.tokens[: max_len - 2], [vocab.sep])).astype(np.int32)
        inputs, target = self.hide(labels, vocab, rng)
        return Example.bidirectional(inputs, {"mlm": target})

    def hide(self, labels: np.ndarray, vocab: Vocabulary, rng: np.random.Generator) -> tuple[np.ndarray, Target[np.ndarray]]:
        """The inputs in which some of `labels` are hidden, and the target that asks for them."""
        group = self._groups(labels, vocab, rng)
        chosen = np.flatnonzero(group >= 0)
        inputs = labels.copy()
        inputs[chosen] = self._corrupt(labels[chosen], group[chosen], vocab, rng)
        return inputs, Target.of(labels, group >= 0)

    def _groups(self, labels: np.ndarray, vocab: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        """For each position the number of the group whose fate it shares, -1 where nothing is predicted."""
        group = np.full(len(labels), -1)
        maskable = np.flatnonzero(~vocab.is_special[labels])
        if self.unit == "token":
            chosen = self._choose(len(maskable), rng)
            group[maskable[chosen]] = np.arange(len(chosen))
        elif len(maskable):
            word = np.cumsum(vocab.word_starts(labels))[maskable]
            starts = np.flatnonzero(np.diff(word, prepend=-1))
            if self.unit == "word":
                lengths = np.diff(starts, append=len(maskable))
                chosen = maskable[np.repeat(self._words(lengths, rng), lengths)]
                group[chosen] = np.arange(len(chosen))
            else:
                for number, positions in enumerate(self._spans(maskable, starts, rng)):
                    group[positions] = number
        return group

    def _count(self, maskable: int) -> int:
        return min(maskable, max(1, round(self.mask_prob * maskable)))

    def _choose(self, maskable: int, rng: np.random.Generator) -> np.ndarray:
        if self.selection == "bernoulli":
            return np.flatnonzero(rng.random(maskable) < self.mask_prob)
        return rng.permutation(maskable)[: self._count(maskable)]

    def _words(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Bool [words]: those chosen, in random order each that still fits the count, or the shortest where none does; or each
        by its own coin."""
        if self.selection == "bernoulli":
            return rng.random(len(lengths)) < self.mask_prob
        count, order = self._count(int(lengths.sum())), rng.permutation(len(lengths))
        sizes = lengths[order]
        taken = np.cumsum(sizes) <= count
        left, at = count - int(sizes[taken].sum()), int(np.count_nonzero(taken))
        while len(fits := np.flatnonzero(sizes[at:] <= left)):
            at += int(fits[0]) + 1
            taken[at - 1] = True
            left -= int(sizes[at - 1])
        taken[sizes.argmin()] |= not taken.any()  # a run of letters may be longer than all that was asked for
        chosen = np.zeros(len(lengths), dtype=bool)
        chosen[order[taken]] = True
        return chosen

    def _spans(self, positions: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Spans of adjacent free words in random order until the count is reached; the last one is cut to what is left of it.

        positions: of the maskable tokens. starts: where among them each word begins.
        """
        left = self._count(len(positions))
        begin, end = starts.tolist(), [*starts[1:].tolist(), len(positions)]
        adjacent = [False, *(np.diff(positions)[starts[1:] - 1] == 1).tolist(), False]
        lengths = iter(rng.choice(self.span_max, left, p=self._lengths).tolist())  # a span has a token at least
        taken = [False] * len(begin)
        for word in rng.permutation(len(begin)).tolist():
            if left == 0:
                return
            if taken[word]:
                continue
            stop, most = word + 1, word + 1 + next(lengths)
            while stop < most and adjacent[stop] and not taken[stop]:
                stop += 1
            taken[word:stop] = [True] * (stop - word)
            span = positions[begin[word] : min(end[stop - 1], begin[word] + left)]
            left -= len(span)
            yield span

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Probabilities of span lengths 1 to span_max, normalised."""
        n = np.arange(1.0, self.span_max + 1)
        weights = 1 / n if self.span_lengths == "harmonic" else (1 - self.span_prob) ** (n - 1)
        return weights / weights.sum()

    def _corrupt(self, tokens: np.ndarray, group: np.ndarray, vocab: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        dice = rng.random(len(tokens))
        if self._shared_fate:
            dice = dice[group]  # groups are counted from 0, so there are fewer of them than tokens
        words = vocab.words[rng.integers(len(vocab.words), size=len(tokens))]
        replaced = np.where(dice < self.mask_token_prob + self.random_token_prob, words, tokens)
        return np.where(dice < self.mask_token_prob, vocab.mask, replaced).astype(np.int32)
