"""Contrastive sentence embeddings: a sentence should be nearest to itself under another dropout mask.

Both views stand in one row, so dropout differs by position; all other sentences of the step are negatives. loss = -log
softmax over cosine / temperature (SimCSE: Gao et al. 2021). The embedding is the state of [CLS], behind a dense layer while
training and bare at test. Supervised: a document is three lines, a sentence, one it entails and one that contradicts it,
which is a hard negative for everybody. The pool of negatives is the whole step, over micro-batches and data ranks
(`training/pool.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_pretrain.core.batch import Batch, Comm, Document, Example, Head, Readout, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import Objective, create, register
from ds_pretrain.objectives.masked import MaskedLanguageModeling

ANCHOR, POSITIVE, NEGATIVE = 1, 2, 3
"""Labels at the [CLS] of each part."""


@register("simcse")
@dataclass(frozen=True, kw_only=True)
class SimCSE(Objective):
    """Unsupervised unless `supervised`."""

    temperature: float = 0.05
    """Cosines are divided by it."""
    length: int = 32
    """Tokens of a sentence at most; longer documents are cut into as many."""
    supervised: bool = False
    """Documents are three lines: sentence, entailed, contradicting."""
    hard_negative_weight: float = 1.0
    """How many other negatives a sentence's own hard negative counts for (alpha of the paper's equation 8)."""
    mlm_weight: float = 0.0
    """Factor of a masked LM loss on a third, masked view (the paper's ablation: 0.1)."""
    mlm: MaskedLanguageModeling = field(default_factory=MaskedLanguageModeling)
    """How that view is masked."""

    kind = "full"
    framed = True
    eod = False
    pooled = True

    def __post_init__(self) -> None:
        if isinstance(self.mlm, Mapping):  # as a run file writes it
            object.__setattr__(self, "mlm", create(**{"name": "mlm", **self.mlm}))
        if not isinstance(self.mlm, MaskedLanguageModeling):
            raise ValueError(f"mlm of simcse has the fields of masked LM, got {self.mlm!r}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.length < 1 or self.mlm_weight < 0:
            raise ValueError(f"length {self.length} must be positive and mlm_weight {self.mlm_weight} not negative")
        if self.hard_negative_weight <= 0:
            raise ValueError(f"hard_negative_weight must be positive, got {self.hard_negative_weight}")

    @cached_property
    def heads(self) -> tuple[Head, ...]:  # type: ignore[override]
        masked = (Head("mlm", coefficient=self.mlm_weight),) if self.mlm_weight else ()
        return Head("simcse", classes=0), *masked

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return self.supervised

    @property
    def parts(self) -> int:
        return 2 + (self.mlm_weight > 0)

    def piece(self, max_len: int) -> int:
        if self.supervised:  # lines must stay together
            return (max_len - 8) // 2 if self.mlm_weight else max_len - 6
        return max(1, min(self.length, max_len // self.parts - 2))

    def size(self, tokens: np.ndarray) -> np.ndarray:
        if self.supervised:
            return tokens + 6 + (tokens + 2) * (self.mlm_weight > 0)
        return (tokens + 2) * self.parts

    def check(self, vocab: Vocabulary, max_len: int) -> list[str]:
        need = 3 * self.parts
        if max_len < max(8, need):
            return [f"batch.seq_len {max_len} is too short for simcse: its views need {max(8, need)} positions at least"]
        if self.supervised and not vocab.line_ends.any():
            return ["simcse with supervised=true needs documents of three lines: this tokenizer has no line end"]
        return []

    def unusable(self, doc: Document, vocab: Vocabulary) -> str | None:
        if not self.supervised:
            return None
        lines = self._lines(doc.tokens, vocab)
        if len(lines) != 3:
            return (
                f"{len(lines)} line{'s' * (len(lines) > 1)} where simcse with objective.supervised=true needs three: a "
                "sentence, an entailed one and a hard negative"
            )
        glued = [bool(vocab.line_ends[line[-1]]) for line in lines]
        return "lines that end in tokens of different kinds, which tell them apart" if any(glued) and not all(glued) else None

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        (doc,) = docs
        if self.supervised and (why := self.unusable(doc, vocab)):
            raise ValueError(f"a document has {why}")
        lines = self._lines(doc.tokens, vocab) if self.supervised else [doc.tokens[: self.piece(max_len)]] * 2
        views = [np.concatenate(([vocab.cls], line, [vocab.sep])).astype(np.int32) for line in lines]
        marks = [_mark(len(view), kind) for kind, view in enumerate(views, start=ANCHOR)]
        parts = [Example.bidirectional(view, {"simcse": mark}) for view, mark in zip(views, marks, strict=True)]
        if self.mlm_weight:
            inputs, target = self.mlm.hide(views[0], vocab, rng)
            parts.append(Example.bidirectional(inputs, {"mlm": target}))
        return replace(parts[0], then=tuple(parts[1:]))

    def loss(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        similarity, own = self._similarity(read, batch, comm)
        sums = {"simcse": F.cross_entropy(similarity, own, reduction="sum")}
        return sums | ({"mlm": self._summed(read, batch, "mlm")} if self.mlm_weight else {})

    @property
    def tallied(self) -> tuple[str, ...]:
        """Nothing: without dropout both views are the same, and each sentence is its own nearest."""
        return ()

    def tallies(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        return {}

    def _similarity(self, read: Readout, batch: Batch, comm: Comm) -> tuple[Tensor, Tensor]:
        """Scaled cosines of this rank's sentences with all second views and hard negatives [n, N], and their own column."""
        kind = batch.targets["simcse"].labels
        found = F.normalize(read.embed("simcse", kind > 0).float(), dim=-1)
        kind = kind[kind > 0]
        anchors, positives, negatives = (found[kind == k] for k in (ANCHOR, POSITIVE, NEGATIVE))
        keys, first = comm.gather(positives)
        own = first + torch.arange(len(anchors), device=keys.device)
        similarity = anchors @ keys.t() / self.temperature
        if not self.supervised:
            return similarity, own
        hard = anchors @ comm.gather(negatives)[0].t() / self.temperature
        weight = F.one_hot(own, hard.shape[1]) * math.log(self.hard_negative_weight)
        return torch.cat([similarity, hard + weight], dim=1), own

    @staticmethod
    def _lines(tokens: np.ndarray, vocab: Vocabulary) -> list[np.ndarray]:
        """The lines, without tokens that are nothing but line ends: the last line often has none, which would tell it."""
        ends = np.flatnonzero(vocab.line_ends[tokens]) + 1
        lines = (line[~vocab.blank[line]] for line in np.split(tokens, ends))
        return [line for line in lines if len(line)]


def _mark(length: int, kind: int) -> Target[np.ndarray]:
    """The kind of a part at its [CLS]; anchors are what is counted."""
    labels, weights = np.zeros(length, dtype=np.int32), np.zeros(length)
    labels[0], weights[0] = kind, kind == ANCHOR
    return Target.of(labels, weights)
