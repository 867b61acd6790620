"""A tokenizer that learns a new language or domain: every id keeps its meaning, new pieces come after the last of them.

BPE, WordPiece and sentencepiece's BPE go on where their training ended: the new text is cut by the old tokenizer, and the
commonest neighbours are joined, again and again ("continued BPE", Purason et al. 2025, "Teaching Old Tokenizers New Words").
Pieces taken from a tokenizer trained apart, the usual way, are partly out of reach of the old merges and never used; on the
text that a BPE was trained on, this gives what training with the larger vocabulary gives. Characters that the tokenizer lacks
come first, commonest first, in half of the room at most. In a unigram model pieces do not rest on each other: after the
characters it gets the likeliest of one that sentencepiece trains on the new text, with their scores.

The price: old text may be cut otherwise where a new piece applies, so stores made before should be made again (their ids stay
valid and decode to the same text); and neighbours are counted in plain Python, 4,000 byte-level pieces of 250 KB of Chinese in
some 5 s.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

from ds_pretrain.data.extend_models import Model, Parts, Unigram, Words, open_model
from ds_pretrain.data.tokenizer import TextTokenizer

RARE = 2
"""What is seen less often is not learned."""


@dataclass(frozen=True)
class Extension:
    """An extended tokenizer.

    first: the first new id, which is the size that the old tokenizer had.
    parts: for each new id in turn the old ids that spell it; none where they cannot.
    """

    tokenizer: TextTokenizer
    first: int
    parts: tuple[tuple[int, ...], ...]

    def save(self, folder: Path) -> None:
        """The tokenizer, and beside it pieces.json, by which a checkpoint is resized."""
        self.tokenizer.save(folder)
        content = {"first": self.first, "digest": self.tokenizer.digest, "parts": self.parts}
        (folder / "pieces.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def load(folder: Path) -> Extension:
    """What `save` wrote."""
    tokenizer = TextTokenizer.load(folder)
    try:
        content = json.loads((folder / "pieces.json").read_bytes())
        first, digest, parts = content["first"], content["digest"], tuple(map(tuple, content["parts"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} holds no sound pieces.json: extend a tokenizer into another folder") from None
    if digest != tokenizer.digest or first + len(parts) != len(tokenizer):
        raise ValueError(f"{folder / 'pieces.json'} is of another tokenizer than the one beside it: copy the folder again")
    return Extension(tokenizer, first, parts)


def extend(
    tokenizer: TextTokenizer, texts: Sequence[str], pieces: int, told: Callable[[int], None] = lambda learned: None
) -> Extension:
    """Learn up to `pieces` new pieces, fewer where no more repeats. told: is called with the number learned so far."""
    if pieces < 1 or not any(text.strip() for text in texts):
        raise ValueError(f"nothing to learn: {pieces} pieces from {len(texts)} texts; give text, and pieces above 0")
    model = open_model(tokenizer)
    parts = model.likeliest(texts, pieces) if isinstance(model, Unigram) else _continue(model, texts, pieces, told)
    if not parts:
        raise ValueError(f"nothing learned: the tokenizer cuts nothing that repeats in {len(texts)} texts; give more text")
    made = TextTokenizer(tokenizer.file, model.tobytes(), tokenizer.specials)
    assert len(made) == len(tokenizer) + len(parts)
    return Extension(made, len(tokenizer), tuple(parts.values()))


def _continue(model: Model, texts: Sequence[str], pieces: int, told: Callable[[int], None]) -> Parts:
    """Characters, then joined neighbours."""
    parts: Parts = {}
    for piece, times in sorted(model.lacking(texts).items(), key=lambda item: (-item[1], item[0]))[: pieces // 2]:
        if times >= RARE:
            parts[piece] = tuple(i for i in model.spell(piece) if i != model.unknown)
            model.add(piece)
    spelled: Parts = {piece: (i,) for piece, i in model.ids.items()} | parts
    neighbours = _Neighbours(model, model.words(texts))
    while len(parts) < pieces and (best := neighbours.best()) is not None:
        left, right = next(iter(neighbours.pairs[best]))
        piece = model.join(left, right)
        if piece not in model.ids:
            parts[piece] = spelled[left] + spelled[right]
            spelled[piece] = parts[piece]
        model.add(piece, (left, right))
        neighbours.merge(best)
        told(len(parts))
    return parts


class _Neighbours:
    """What stands side by side in words, counted as it changes. A key is what is learned when a pair is joined."""

    def __init__(self, model: Model, words: Words) -> None:
        self.model = model
        self.texts, self.times = [list(word) for word in words], list(words.values())
        self.count: Counter[Hashable] = Counter()
        self.where: dict[Hashable, set[int]] = defaultdict(set)
        self.pairs: dict[Hashable, dict[tuple[str, str], str]] = defaultdict(dict)
        self.keys: dict[tuple[str, str], Hashable | None] = {}
        for word, text in enumerate(self.texts):
            for pair in pairwise(text):
                self.tally(word, pair, 1)
        self.heap = [self.entry(key) for key in self.count]
        heapify(self.heap)

    def entry(self, key: Hashable) -> tuple[int, Any, Hashable]:
        return -self.count[key], min(self.model.order(*pair) for pair in self.pairs[key]), key

    def tally(self, word: int, pair: tuple[str, str], sign: int) -> Hashable | None:
        if pair not in self.keys:
            self.keys[pair] = key = self.model.key(*pair)
            if key is not None:
                self.pairs[key][pair] = self.model.join(*pair)
        if (key := self.keys[pair]) is not None:
            self.count[key] += sign * self.times[word]
            if sign > 0:
                self.where[key].add(word)
        return key

    def best(self) -> Hashable | None:
        """The commonest, None where nothing repeats."""
        while self.heap:
            negative, order, key = heappop(self.heap)
            now = self.count[key]
            if now == -negative:
                return key if now >= RARE else None
            if 0 < now < -negative:  # there is an entry of a larger count, if it has grown
                heappush(self.heap, (-now, order, key))
        return None

    def merge(self, best: Hashable) -> None:
        """Join these neighbours everywhere, and never count them again."""
        pairs = self.pairs.pop(best)
        grown = {key for word in self.where.pop(best) for key in self.rewrite(word, pairs)} - {None, best}
        self.keys |= dict.fromkeys(pairs)
        self.count[best] = 0
        for key in grown:
            heappush(self.heap, self.entry(key))

    def rewrite(self, word: int, pairs: dict[tuple[str, str], str]) -> Iterator[Hashable | None]:
        """The word with these pairs joined; what has been counted more for it."""
        text, made, place = self.texts[word], list[str](), 0
        while place < len(text):
            if (joined := pairs.get((text[place], text[place + 1])) if place + 1 < len(text) else None) is None:
                made.append(text[place])
                place += 1
                continue
            if made:
                self.tally(word, (made[-1], text[place]), -1)
                yield self.tally(word, (made[-1], joined), 1)
            if place + 2 < len(text):
                self.tally(word, (text[place + 1], text[place + 2]), -1)
                yield self.tally(word, (joined, text[place + 2]), 1)
            made.append(joined)
            place += 2
        self.texts[word] = made
