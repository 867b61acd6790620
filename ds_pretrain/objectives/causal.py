"""Causal language modelling: predict every token of a document, its end included, from what came before.

The first token of a document is predicted from the end-of-document id (of a model that came in, from what its texts begin
with), the first of a later piece from the token before it, so the pieces of a long document predict each token exactly once:
nothing is skipped at a cut and nothing repeated.
What a document's end does is three switches, as in Megatron-LM (`--reset-position-ids`, `--reset-attention-mask`,
`--eod-mask-loss`): with both resets off a row is one running text, as GPT-2 was trained (Radford et al. 2018, 2019). Without
`reset_attention` every piece begins with the end-of-document id, a later one too, so that no two texts touch.
Evaluation always resets: the likelihood of a document does not depend on the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ds_pretrain.core.batch import Document, Example, Head, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import Objective, register


@register("clm")
@dataclass(frozen=True, kw_only=True)
class CausalLanguageModeling(Objective):
    """The GPT objective."""

    eod_loss: bool = True
    """Whether the end-of-document token is a target like any other."""
    reset_position: bool = True  # type: ignore[misc]
    """Whether positions restart with every document."""
    reset_attention: bool = True  # type: ignore[misc]
    """Whether a document is hidden from those behind it in its row."""

    heads = (Head("clm"),)
    kind = "causal"
    measure = "likelihood"

    @property
    def evaluated(self) -> Objective:
        return replace(self, reset_position=True, reset_attention=True)

    def piece(self, max_len: int) -> int:
        return max_len

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        (doc,) = docs
        labels = doc.tokens[:max_len]
        before = vocab.begin if doc.before is None or not self.reset_attention else doc.before
        inputs = np.concatenate(([before], labels[:-1])).astype(np.int32)
        weights = np.ones(len(labels)) if self.eod_loss else labels != vocab.eod
        return Example(inputs, np.arange(len(inputs), dtype=np.int32), {"clm": Target.of(labels, weights)})
