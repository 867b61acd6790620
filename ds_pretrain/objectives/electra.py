"""Replaced token detection: a small generator fills the masks, the model says of every token whether it is the original.

The generator learns masked LM (85% [MASK], 15% kept, no random words) and its samples are drawn with Gumbel-max and no
gradient; a sample that hits the original counts as original. Loss = MLM + 50 x RTD, the second over every real token
(ELECTRA: Clark et al. 2020). At the start it is ln V + 50 ln 2. Token and position embeddings are shared by the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ds_pretrain.core.batch import Batch, Comm, Document, Example, Head, Readout, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import register
from ds_pretrain.objectives.masked import MaskedLanguageModeling


@register("electra")
@dataclass(frozen=True, kw_only=True)
class Electra(MaskedLanguageModeling):
    """Masked LM for the generator, replaced token detection for the model itself."""

    mask_token_prob: float = 0.85
    """Share of the predicted that the generator sees as [MASK]; the rest it sees as they are."""
    random_token_prob: float = 0.0
    """Share of the predicted that the generator sees as a random word."""
    generator_size: float = 0.25
    """Width of the generator as a share of the model's (base: 1/3); depth is the same."""
    rtd_weight: float = 50.0
    """Factor of the discriminator's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.generator_size <= 1:
            raise ValueError(f"generator_size must lie in (0, 1], got {self.generator_size}")
        if self.rtd_weight <= 0:
            raise ValueError(f"rtd_weight must be positive, got {self.rtd_weight}")

    @property
    def generator(self) -> tuple[str, float]:  # type: ignore[override]
        return "mlm", self.generator_size

    @cached_property
    def heads(self) -> tuple[Head, ...]:  # type: ignore[override]
        return Head("mlm"), Head("rtd", classes=2, coefficient=self.rtd_weight, activation="gelu")

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        made = super().example(docs, vocab, max_len, rng)
        unknown = Target.of(np.zeros(len(made.inputs), dtype=np.int32), np.ones(len(made.inputs)))
        return replace(made, targets={**made.targets, "rtd": unknown})

    def loss(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        return super().loss(read, self._answered(read, batch), comm)

    def tallies(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        return super().tallies(read, self._answered(read, batch), comm)

    @staticmethod
    def _answered(read: Readout, batch: Batch) -> Batch:
        """The batch with the labels of the discriminator: 1 where it reads another token than the original."""
        rtd, original = batch.targets["rtd"], batch.targets["mlm"].labels
        replaced = ((read.tokens != original) & (rtd.weights != 0)).to(torch.int64)
        return replace(batch, targets={**batch.targets, "rtd": Target(replaced, rtd.weights, rtd.total)})
