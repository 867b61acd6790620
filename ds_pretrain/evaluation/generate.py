"""Text from a causal model: greedy, or sampled with temperature, top-k and top-p.

Each new token is one forward pass over what is there, without a key-value cache: right and simple, and slow for long texts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.training.inference import FrozenModel


def generate(
    model: FrozenModel,
    prompt: list[int],
    eod: int,
    banned: frozenset[int],
    tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[int]:
    """Up to `tokens` new ids after the prompt, until the model ends the document.

    The prompt follows an end-of-document id as documents do in training. banned: ids that are never produced (specials
    other than `eod`). temperature 0 is greedy. The window slides when it reaches the model's positions.
    """
    if model.objective.kind != "causal":
        raise ValueError(f"objective {model.objective.name} does not generate from left to right: use a causal run")
    window = model.build.model.positions or 1 << 30
    ids = [eod, *prompt]
    generator = rng.torch_generator("generate", seed)
    never = torch.tensor(sorted(banned - {eod}), dtype=torch.long)
    for _ in range(tokens):
        logits = model.logits(torch.tensor([ids[-window:]]))[0].float().cpu()
        logits[never] = -torch.inf
        ids.append(_draw(logits, temperature, top_k, top_p, generator))
        if ids[-1] == eod:
            return
        yield ids[-1]


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    order = logits.argsort(descending=True)
    probability = (logits[order] / temperature).softmax(0)
    keep = probability.cumsum(0) - probability < top_p
    if top_k:
        keep[top_k:] = False
    return int(order[torch.multinomial(probability * keep, 1, generator=generator)])
