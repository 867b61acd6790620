"""The bar that a trained model must clear: unigram and bigram models of the same train split, scored on the same text.

Both give a proper distribution over the vocabulary, in closed form. The unigram adds one to every count. The bigram is
interpolated Kneser-Ney: a discount D = n1 / (n1 + 2 n2) leaves every seen pair, and the mass it frees follows how many
different tokens a token comes after (Ney et al. 1994; Chen and Goodman 1999); one is added to n1 and to 2 n2, so that D
lies between 0 and 1 in any corpus. Both read the planes of the objective's own evaluation batches, so that they predict
exactly what the model predicts, from the token that it sees last.

The price: a train split of more than `COUNTED` tokens is counted in part, every k-th document of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ds_pretrain.data.dataset import Samples
from ds_pretrain.data.loader import evaluation_batches
from ds_pretrain.evaluation.report import Scores

COUNTED = 1 << 24
"""Tokens of the train split that are counted at most: seconds, and about 1 GB."""
ROWS = 256
"""Rows that are scored at once."""


class Scored(NamedTuple):
    """The scored positions of some rows: the token before each, the token to predict, its weight in the loss."""

    previous: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Predictor(Protocol):
    """A distribution over the next token."""

    def probability(self, previous: np.ndarray, labels: np.ndarray) -> np.ndarray: ...

    def guess(self, previous: np.ndarray) -> np.ndarray:
        """The most probable label after each."""
        ...


@dataclass(frozen=True)
class Unigram:
    """share: float64 [size], (count + 1) / (tokens + size)."""

    share: np.ndarray

    @staticmethod
    def count(tokens: np.ndarray, size: int) -> Unigram:
        return Unigram((np.bincount(tokens, minlength=size) + 1) / (len(tokens) + size))

    def probability(self, previous: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return self.share[labels]

    def guess(self, previous: np.ndarray) -> np.ndarray:
        return np.full(len(previous), self.share.argmax())


@dataclass(frozen=True)
class Bigram:
    """p(w | v) = (c(v, w) - D) / c(v) if the pair was seen + backoff[v] * lower[w].

    keys: int64, the pairs seen as v * size + w, sorted. seen: their first term. backoff, lower, best: by token.
    """

    keys: np.ndarray
    seen: np.ndarray
    backoff: np.ndarray
    lower: np.ndarray
    best: np.ndarray

    @staticmethod
    def count(tokens: np.ndarray, size: int, eod: int) -> Bigram:
        """tokens: documents end to end, each with its last end-of-document id, which precedes the first one too."""
        previous = np.concatenate(([eod], tokens[:-1])).astype(np.int64)
        keys, count = np.unique(previous * size + tokens, return_counts=True)
        before, after = np.divmod(keys, size)
        once, twice = (int((count == n).sum()) for n in (1, 2))
        discount = (once + 1) / (once + 2 * twice + 2)
        total = np.bincount(previous, minlength=size)
        followers = np.bincount(before, minlength=size)
        lower = (np.bincount(after, minlength=size) + 1) / (len(keys) + size)
        backoff = np.where(total > 0, discount * followers / np.maximum(total, 1), 1.0)
        seen = (count - discount) / total[before]
        return Bigram(keys, seen, backoff, lower, _best(keys, seen + backoff[before] * lower[after], backoff, lower))

    def probability(self, previous: np.ndarray, labels: np.ndarray) -> np.ndarray:
        wanted = previous.astype(np.int64) * len(self.lower) + labels
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        seen = np.where(self.keys[place] == wanted, self.seen[place], 0.0)
        return seen + self.backoff[previous] * self.lower[labels]

    def guess(self, previous: np.ndarray) -> np.ndarray:
        return self.best[previous]


def score(model: Predictor, dataset: Samples, max_tokens: int | None = None) -> Scores:
    """The model on exactly the positions that the dataset's objective scores in its evaluation."""
    plan = dataset.evaluation(max_tokens)
    nats = weight = hits = 0.0
    for previous, labels, weights in _positions(dataset, max_tokens):
        nats -= float(np.log(model.probability(previous, labels)) @ weights)
        weight += float(weights.sum())
        hits += int((model.guess(previous) == labels).sum())
    return Scores(nats, round(weight), plan.bytes, plan.words, hits / weight if weight else 0.0)


def baselines(train: Samples, dataset: Samples, max_tokens: int | None = None) -> list[tuple[str, Scores]]:
    """The scores of the n-grams that apply: a bigram needs an objective that reads from left to right.

    train: the split to count. dataset: the split to score, under the objective of the model to compare with.
    """
    if not _words(dataset):
        raise ValueError(f"{dataset.objective.name} predicts classes, not tokens: score it without the n-gram baselines")
    tokens, vocab = train_tokens(train), train.vocab
    found = [("unigram", score(Unigram.count(tokens, vocab.size), dataset, max_tokens))]
    if dataset.objective.kind == "causal":
        found.append(("bigram", score(Bigram.count(tokens, vocab.size, vocab.eod), dataset, max_tokens)))
    return found


def train_tokens(dataset: Samples, limit: int = COUNTED) -> np.ndarray:
    """The documents of a split end to end; every k-th one where they have more than `limit` tokens."""
    lengths = np.asarray(dataset.store.lengths, dtype=np.int64)
    step = max(1, -(-int(lengths.sum()) // limit))
    chosen = range(0, len(lengths), step)
    return np.concatenate([dataset.store.slice(i, 0, int(lengths[i])) for i in chosen])


def _positions(dataset: Samples, max_tokens: int | None) -> Iterator[Scored]:
    for batch in evaluation_batches(dataset, max_tokens, ROWS):
        for name in _words(dataset):
            labels, weights = (np.asarray(plane) for plane in (batch.targets[name].labels, batch.targets[name].weights))
            at = weights != 0
            yield Scored(batch.inputs.numpy()[at], labels[at], weights[at].astype(np.float64))


def _words(dataset: Samples) -> list[str]:
    return [head.name for head in dataset.objective.heads if head.classes is None]


def _best(keys: np.ndarray, probability: np.ndarray, backoff: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The most probable follower of each token: the best one seen, or the best of all where that is more probable."""
    size = len(lower)
    best = np.full(size, lower.argmax())
    order = np.lexsort((probability, keys // size))
    before = keys[order] // size
    last = order[np.flatnonzero(np.append(before[1:] != before[:-1], True))]
    token = keys[last] // size
    won = probability[last] >= backoff[token] * lower.max()
    best[token[won]] = keys[last[won]] % size
    return best
