"""Two segments of text and a question about them: [CLS] A [SEP] B [SEP], token types 0 and 1.

    nsp    does B follow A, or does it come from another document? (BERT: Devlin et al. 2019)
    sop    are two consecutive segments in order, or swapped? (ALBERT: Lan et al. 2020)
    bert   nsp with masked LM, albert   sop with masked LM

Nothing but the text may tell the answer. For NSP both documents are cut by one and the same draw, to lengths that fit
inside both and never at their ends, before a word of either, and the coin decides last whose second half is shown: lengths
and cuts are then exchangeable between the two labels. (Where the shorter document was shown whole, "A begins one and B ends
one" told the label of 88% of the pairs of a corpus of paragraphs; where the cut fell inside words, half a word behind a full
stop did.) Nothing is used up: every piece of the corpus is A once per epoch, and B is drawn beside it. The price of segments
that lie anywhere inside a piece is text: a pair of SOP shows half of its piece, and fills half of the place that was planned
for it; one of NSP two thirds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from ds_pretrain.core.batch import Document, Example, Head, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import Objective, register
from ds_pretrain.objectives.masked import MaskedLanguageModeling

ENOUGH = 5
"""Places that a pair of SOP is cut from at least: half of what is between them are two words for each side."""


class Pair(NamedTuple):
    """Two segments and the answer: 0 for what belongs together (IsNext, in order), 1 otherwise, as BERT numbers them."""

    first: np.ndarray
    second: np.ndarray
    label: int


@dataclass(frozen=True, kw_only=True)
class SentencePair(Objective):
    """What both tasks share: a pair is two adjacent stretches of one window of text."""

    short_prob: float = 0.1
    """Share of examples that are cut to a uniformly random shorter length (BERT's short_seq_prob)."""

    task: ClassVar[str]
    kind = "full"
    framed = True
    eod = False
    shortest = 2
    token_types = 2

    def __post_init__(self) -> None:
        if not 0 <= self.short_prob <= 1:
            raise ValueError(f"short_prob must lie in [0, 1], got {self.short_prob}")

    def piece(self, max_len: int) -> int:
        return max_len - 3

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return tokens + 3

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        pair = self.pair([replace(doc, tokens=doc.tokens[: max_len - 3]) for doc in docs], vocab, rng)
        inputs = np.concatenate(([vocab.cls], pair.first, [vocab.sep], pair.second, [vocab.sep])).astype(np.int32)
        types = (np.arange(len(inputs)) >= len(pair.first) + 2).astype(np.int32)
        labels, weights = np.zeros(len(inputs), dtype=np.int32), np.zeros(len(inputs))
        labels[0], weights[0] = pair.label, 1
        return Example.bidirectional(inputs, {self.task: Target.of(labels, weights)}, types)

    @abstractmethod
    def pair(self, docs: Sequence[Document], vocab: Vocabulary, rng: np.random.Generator) -> Pair:
        """A pair from documents of at least two tokens each."""

    def _shorter(self, most: int, rng: np.random.Generator) -> int:
        """`most`, or now and then a random smaller number from 2 on."""
        return int(rng.integers(2, most + 1)) if rng.random() < self.short_prob else most


@register("nsp")
@dataclass(frozen=True, kw_only=True)
class NextSentencePrediction(SentencePair):
    """Half of the pairs are adjacent in one document, half come from two documents, never from one."""

    task = "nsp"
    shortest = 4
    heads: ClassVar[tuple[Head, ...]] = (Head("nsp", classes=2),)
    documents = 2

    def pair(self, docs: Sequence[Document], vocab: Vocabulary, rng: np.random.Generator) -> Pair:
        window = self._shorter(min(len(doc.tokens) for doc in docs) - 2, rng)
        starts = [int(rng.integers(1, len(doc.tokens) - window)) for doc in docs]
        mine, other = (doc.tokens[start : start + window] for doc, start in zip(docs, starts, strict=True))
        joints, others = vocab.joints(mine)[1:], vocab.joints(other)[1:]
        seams = np.flatnonzero((joints == others) & (joints > 0)) + 1
        half = int(rng.choice(seams)) if len(seams) else int(rng.integers(1, window))
        label = int(rng.random() < 0.5)
        return Pair(mine[:half], (other if label else mine)[half:], label)


@register("sop")
@dataclass(frozen=True, kw_only=True)
class SentenceOrderPrediction(SentencePair):
    """Two consecutive segments of one document, swapped half of the time.

    Their lengths are two draws from one distribution, up to half of the piece in words, and they lie anywhere inside it:
    nothing but the text says which of the two comes first. (Cut at sentence ends, or at the ends of a document, a linear
    probe on lengths and punctuation finds the answer with an AUC of 0.55 to 0.67.)
    """

    task = "sop"
    shortest = ENOUGH + 1
    heads: ClassVar[tuple[Head, ...]] = (Head("sop", classes=2),)

    def pair(self, docs: Sequence[Document], vocab: Vocabulary, rng: np.random.Generator) -> Pair:
        (doc,) = docs
        places = np.flatnonzero(vocab.joints(doc.tokens) >= 2)[1:]  # tokens that begin a word whatever is before them
        if len(places) < ENOUGH:
            places = np.arange(1, len(doc.tokens))
        longest = self._shorter((len(places) - 1) // 2, rng)
        before, after = (int(x) for x in rng.integers(1, longest + 1, 2))
        start = int(rng.integers(len(places) - before - after))
        begin, cut, end = places[[start, start + before, start + before + after]]
        first, second = doc.tokens[begin:cut], doc.tokens[cut:end]
        return Pair(second, first, 1) if rng.random() < 0.5 else Pair(first, second, 0)


@dataclass(frozen=True, kw_only=True)
class _WithMasking(MaskedLanguageModeling, SentencePair):
    """A pair whose tokens are then masked; both losses are added."""

    def __post_init__(self) -> None:
        MaskedLanguageModeling.__post_init__(self)
        SentencePair.__post_init__(self)

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        pair = SentencePair.example(self, docs, vocab, max_len, rng)
        inputs, target = self.hide(pair.inputs, vocab, rng)
        return Example(inputs, pair.horizon, {"mlm": target, **pair.targets}, pair.token_type)

    piece = SentencePair.piece
    size = SentencePair.size


@register("bert")
@dataclass(frozen=True, kw_only=True)
class Bert(_WithMasking, NextSentencePrediction):
    """Masked LM and next-sentence prediction."""

    heads = (Head("mlm"), Head("nsp", classes=2))
    documents = 2


@register("albert")
@dataclass(frozen=True, kw_only=True)
class Albert(_WithMasking, SentenceOrderPrediction):
    """Masked LM of up to three words at once, and sentence-order prediction."""

    unit: Literal["token", "word", "span"] = "span"
    """What is chosen together; n words with a probability of 1/n is ALBERT's."""
    span_lengths: Literal["geometric", "harmonic"] = "harmonic"
    """Distribution of span lengths."""
    span_max: int = 3
    """Longest span, in words."""

    heads = (Head("mlm"), Head("sop", classes=2))
