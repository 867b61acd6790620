"""What a model that reads from both sides puts where a text has a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ds_pretrain.training.inference import FrozenModel


class Candidate(NamedTuple):
    """An id and its probability."""

    token: int
    probability: float


def fill(
    model: FrozenModel, ids: Sequence[int], mask: int, banned: frozenset[int] = frozenset(), top: int = 5
) -> list[list[Candidate]]:
    """The most probable ids at each mask of a text, each mask by itself while the others stay masks.

    ValueError if the model does not predict words from both sides, or if there is no mask.
    """
    if model.objective.kind != "full" or not model.build.predicts_words:
        raise ValueError(f"a run of {model.objective.name} predicts no masked words: use one of mlm, bert, albert or mdlm")
    tokens = torch.tensor([list(ids)])
    here = tokens == mask
    if not here.any():
        raise ValueError("there is no mask in the text: write <mask> where a token is to be found")
    logits = model.logits_at(tokens, here).float().cpu()
    logits[:, sorted(banned)] = -torch.inf
    found = logits.softmax(-1).topk(top, -1)
    return [
        [Candidate(*pair) for pair in zip(row.tolist(), p.tolist(), strict=True)]
        for row, p in zip(found.indices, found.values, strict=True)
    ]
