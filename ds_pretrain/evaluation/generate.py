"""Text from a causal model, greedy or sampled with temperature, top-k and top-p; and from a masked diffusion model.

A causal model reads every token once and keeps its keys and values (`models/cache.py`). A diffusion model starts from masks
and uncovers the places it is surest of, several in each pass, block by block from left to right (low-confidence remasking:
Nie et al. 2025).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.training.inference import FrozenModel


@dataclass(frozen=True)
class Sampling:
    """How text is drawn."""

    tokens: int = 100
    """New ones at most."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """Keep so many candidates; 0: all."""
    top_p: float = 0.95
    """Keep this much probability."""
    seed: int = 0
    """Another seed, another text."""


def no_text(model: FrozenModel, vocab: Vocabulary) -> frozenset[int]:
    """Ids that are no text: special tokens, and rows of the embedding that the tokenizer has no ids for."""
    return vocab.specials | frozenset(range(vocab.size, model.build.model.vocab_size))


def ends_of(model: FrozenModel, vocab: Vocabulary) -> frozenset[int]:
    """Ids that end a text: <eod>, and what else a model that came in ends one with."""
    return frozenset(vocab.ends(model.origin.get("generation", {}).get("eos_token_id")))


def generate(
    model: FrozenModel, beginning: Sequence[int], ends: frozenset[int], banned: frozenset[int], how: Sampling = Sampling()
) -> Iterator[int]:
    """The new ids of one text; see `continue_all`."""
    for (token,) in continue_all(model, [beginning], ends, banned, how):
        if token is None:
            return
        yield token


def continue_all(
    model: FrozenModel,
    beginnings: Sequence[Sequence[int]],
    ends: frozenset[int],
    banned: frozenset[int],
    how: Sampling = Sampling(),
    cache: bool = True,
) -> Iterator[list[int | None]]:
    """The next id of each text, so often as is asked for: None where the model has ended the document.

    beginnings: ids to go on from; those of a whole document begin with `begin`, as in training. ends: ids that end a text.
    banned: ids that are never produced (other specials). What is drawn for a text depends on the seed and its number, not on
    the others. Texts are read once, with keys and values kept (cache), until one of them is longer than the model's positions:
    from there on its window slides, and is read anew for each token.
    """
    if model.objective.kind != "causal":
        raise ValueError(f"objective {model.objective.name} does not generate from left to right: use a causal run")
    window = model.build.model.positions or 1 << 30
    texts = [list(ids) for ids in beginnings]
    draws = [rng.torch_generator("generate", how.seed, number) for number in range(len(texts))]
    never = torch.tensor(sorted(banned - ends), dtype=torch.long)
    ended = [False] * len(texts)
    with contextlib.ExitStack() as stack:
        read = stack.enter_context(model.reading()) if cache else None
        for number in range(how.tokens):
            if read and max(map(len, texts)) > window:
                stack.close()
                read = None
            logits = _read_on(read, texts, ended, number == 0) if read else _read_all(model, texts, ended, window)
            logits[:, never] = -torch.inf
            for row in (row for row, over in enumerate(ended) if not over):
                texts[row].append(_draw(logits[row], how, draws[row]))
                ended[row] = texts[row][-1] in ends
            if all(ended):
                return
            yield [None if over else text[-1] for text, over in zip(texts, ended, strict=True)]


def _read_on(read: Callable[[Tensor, Tensor], Tensor], texts: list[list[int]], ended: list[bool], first: bool) -> Tensor:
    """Logits [B, V] after what is new: at first whole texts, filled up at the left; then the last id of each."""
    if not first:
        return read(torch.tensor([text[-1:] for text in texts]), ~torch.tensor(ended)[:, None]).float().cpu()
    longest = max(map(len, texts))
    padded = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    real = torch.arange(longest) >= torch.tensor([[longest - len(text)] for text in texts])
    return read(padded, real).float().cpu()


def _read_all(model: FrozenModel, texts: list[list[int]], ended: list[bool], window: int) -> Tensor:
    """The same from the whole window of each text that goes on."""
    rows = [model.logits(torch.tensor([text[-window:]])) for text, over in zip(texts, ended, strict=True) if not over]
    found = torch.zeros(len(texts), rows[0].shape[-1])
    found[~torch.tensor(ended)] = torch.cat(rows).float().cpu()
    return found


def unmask(
    model: FrozenModel,
    prompt: list[int],
    mask: int,
    banned: frozenset[int],
    how: Sampling = Sampling(),
    block: int = 32,
    steps: int = 16,
) -> list[int]:
    """Exactly `how.tokens` new ids after the prompt, by a model that predicts hidden tokens from both sides.

    block: places that are uncovered together. steps: passes for each block. Of `how` top_k and top_p do not count.
    """
    if model.objective.measure != "bound":
        raise ValueError(f"objective {model.objective.name} is no diffusion: use a run of masked diffusion")
    room = model.build.model.positions
    if room and len(prompt) + how.tokens > room:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {how.tokens} new ones are more than the {room} positions of this model: "
            f"ask for at most {max(0, room - len(prompt))}"
        )
    never = torch.tensor(sorted(banned), dtype=torch.long)
    ids = torch.tensor([[*prompt, *[mask] * how.tokens]])
    generator = rng.torch_generator("unmask", how.seed)
    for start in range(len(prompt), ids.shape[1], block):
        here = torch.zeros_like(ids, dtype=torch.bool)
        here[:, start : start + block] = True
        left = int(here.sum())
        for step in range(steps, 0, -1):
            hidden = here & (ids == mask)
            logits = model.logits_at(ids, hidden).float().cpu()
            logits[:, never] = -torch.inf
            probability = logits.softmax(-1)
            drawn = _sample(logits, how.temperature, generator)
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


def _draw(logits: Tensor, how: Sampling, generator: torch.Generator) -> int:
    if how.temperature == 0:
        return int(logits.argmax())
    order = logits.argsort(descending=True)[: how.top_k or None]  # top-p is of what top-k leaves, as in transformers
    probability = (logits[order] / how.temperature).softmax(0)
    keep = probability.cumsum(0) - probability < how.top_p
    return int(order[torch.multinomial(probability * keep, 1, generator=generator)])
