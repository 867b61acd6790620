"""What a model that reads from both sides puts where a text has a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.training.inference import FrozenModel

LEAD = "\n"
"""A character that no word is joined to."""


def masked(parts: Sequence[str], tokenizer: TextTokenizer, framed: bool) -> list[int]:
    """A text of which these parts are left, a mask between each two, as a model has seen it in training.

    There a mask stands for a token with the space before it, and a part behind it is no beginning of a text.
    """
    vocab = tokenizer.vocabulary
    first, *others = [part.removesuffix(" ") for part in parts[:-1]] + [parts[-1]]
    ids = tokenizer.encode(first).tolist()
    for part in others:
        ids += [vocab.mask, *_behind(part, tokenizer)]
    return [vocab.cls, *ids, vocab.sep] if framed else [*ids, vocab.eod]


def _behind(text: str, tokenizer: TextTokenizer) -> list[int]:
    """Ids of a text that stands behind another, without what a tokenizer puts before the first word."""
    lead, whole = (ids.tolist() for ids in tokenizer.encode_batch([LEAD, LEAD + text]))
    return whole[len(lead) :] if whole[: len(lead)] == lead else tokenizer.encode(text).tolist()


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
    if len(ids) > (model.build.model.positions or len(ids)):
        raise ValueError(f"the text has {len(ids)} tokens, the model {model.build.model.positions} positions: shorten it")
    logits = model.logits_at(tokens, here).float().cpu()
    logits[:, sorted(banned)] = -torch.inf
    found = logits.softmax(-1).topk(min(top, logits.shape[-1]), -1)
    return [
        [Candidate(*pair) for pair in zip(row.tolist(), p.tolist(), strict=True)]
        for row, p in zip(found.indices, found.values, strict=True)
    ]
