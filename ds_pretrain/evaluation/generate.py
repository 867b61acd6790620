"""Text from a causal model, greedy or sampled with temperature, top-k and top-p; and from a masked diffusion model.

A causal model takes one forward pass for each new token, without a key-value cache: right and simple, and slow for long
texts. A diffusion model starts from masks and uncovers the places it is surest of, several in each pass, block by block
from left to right (low-confidence remasking: Nie et al. 2025).
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


def unmask(
    model: FrozenModel,
    prompt: list[int],
    mask: int,
    banned: frozenset[int],
    tokens: int = 100,
    temperature: float = 0.8,
    block: int = 32,
    steps: int = 16,
    seed: int = 0,
) -> list[int]:
    """Exactly `tokens` new ids after the prompt, by a model that predicts hidden tokens from both sides.

    block: places that are uncovered together. steps: passes for each block. temperature 0 takes the most probable ids.
    """
    if model.objective.measure != "bound":
        raise ValueError(f"objective {model.objective.name} is no diffusion: use a run of masked diffusion")
    room = model.build.model.positions
    if room and len(prompt) + tokens > room:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {tokens} new ones are more than the {room} positions of this model: ask for "
            f"at most {max(0, room - len(prompt))}"
        )
    never = torch.tensor(sorted(banned), dtype=torch.long)
    ids = torch.tensor([[*prompt, *[mask] * tokens]])
    generator = rng.torch_generator("unmask", seed)
    for start in range(len(prompt), ids.shape[1], block):
        here = torch.zeros_like(ids, dtype=torch.bool)
        here[:, start : start + block] = True
        left = int(here.sum())
        for step in range(steps, 0, -1):
            hidden = here & (ids == mask)
            logits = model.logits_at(ids, hidden).float().cpu()
            logits[:, never] = -torch.inf
            probability = logits.softmax(-1)
            drawn = _sample(logits, temperature, generator)
            sure = probability.gather(1, drawn[:, None])[:, 0]
            count = -(-left // step)
            keep = sure.topk(count).indices
            places = hidden[0].nonzero()[:, 0][keep]
            ids[0, places] = drawn[keep]
            left -= count
            if left == 0:
                break
    return ids[0, len(prompt) :].tolist()


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One id for each row of logits [n, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    order = logits.argsort(descending=True)
    probability = (logits[order] / temperature).softmax(0)
    keep = probability.cumsum(0) - probability < top_p
    if top_k:
        keep[top_k:] = False
    return int(order[torch.multinomial(probability * keep, 1, generator=generator)])
