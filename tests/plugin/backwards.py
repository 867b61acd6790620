"""A further objective, outside the package: read a document from its end to its beginning."""

from dataclasses import dataclass

import numpy as np

from ds_pretrain.core.batch import Example, Head, Target
from ds_pretrain.objectives import Objective, register


@register("backwards")
@dataclass(frozen=True, kw_only=True)
class Backwards(Objective):
    """Causal language modelling of reversed text, which starts at the document's end."""

    heads = (Head("backwards"),)
    kind = "causal"
    measure = "likelihood"
    eod = False

    def piece(self, max_len):
        return max_len

    def size(self, tokens):
        return tokens

    def example(self, docs, vocab, max_len, rng):
        labels = docs[0].tokens[:max_len][::-1].astype(np.int32)
        inputs = np.concatenate(([vocab.eod], labels[:-1])).astype(np.int32)
        return Example(inputs, np.arange(len(inputs), dtype=np.int32), {"backwards": Target.of(labels, np.ones(len(labels)))})
