"""What a model's states are good for without further training of it: sentence similarity, and a linear probe.

Similarity: cosine of sentence embeddings against human scores (Spearman), alignment of the pairs that people call equal, and
uniformity over all sentences (Wang & Isola 2020; SimCSE reports the three). Probe: multinomial logistic regression on frozen
embeddings, on a part of the texts that is chosen by their hash, scored on the rest beside the most frequent class and the
same network with untrained weights.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_pretrain.core.files import text_lines
from ds_pretrain.core.pooling import Sentences
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.training.inference import FrozenModel

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to embeddings [n, H]."""
TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class Similarity:
    """spearman: -1 to 1. alignment: mean squared distance of equal pairs. uniformity: log mean exp(-2 distance^2), the lower
    the better spread. pairs, equal: how many."""

    spearman: float
    alignment: float
    uniformity: float
    pairs: int
    equal: int


@dataclass(frozen=True)
class Probe:
    """Accuracies on the held-out texts."""

    accuracy: float
    untrained: float
    majority: float
    train: int
    test: int
    classes: int


def embedder(model: FrozenModel, tokenizer: TextTokenizer) -> Embed:
    """Texts to embeddings, framed as the model has seen them and cut to its positions; of a sentence encoder that came in as
    its folder says."""
    vocab, objective = tokenizer.vocabulary, model.objective
    said = Sentences(**model.origin.get("sentences", {}))
    room = min(model.build.model.positions or 1 << 30, said.tokens or 1 << 30) - 2
    first, last = ([vocab.cls], [vocab.sep]) if objective.framed else ([], [vocab.eod])
    if objective.kind == "causal":
        first, last = [vocab.begin], []

    def embed(texts: Sequence[str]) -> Tensor:
        found = [ids[:room].tolist() for ids in tokenizer.encode_batch(texts)]
        vectors = model.embed([[*first, *ids, *last] for ids in found])
        return F.normalize(vectors, dim=-1) if said.unit else vectors

    return embed


def probe_of(model: FrozenModel, tokenizer: TextTokenizer, path: str | Path) -> Probe:
    """A model's probe on a file of lines of text TAB label, beside what it was before its first step (of a run that began
    with weights: beside the network that its seed would draw)."""
    rows = [(text, label) for text, label in read_table(path, 2)]
    return probe(embedder(model, tokenizer), embedder(model.untrained(model.seed), tokenizer), rows)


def read_table(path: str | Path, columns: int) -> list[list[str]]:
    """Lines of tab-separated columns. ValueError naming the line that has another number of them or an empty one."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file: give one with lines of {columns} columns, separated by tabs")
    rows = []
    for number, line in enumerate(text_lines(path), start=1):
        fields = line.split("\t")
        if len(fields) != columns:
            raise ValueError(f"{path}:{number} has {len(fields)} columns separated by tabs, {columns} are needed")
        if not all(field.strip() for field in fields):
            raise ValueError(f"{path}:{number} has an empty column")
        rows.append(fields)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def read_scores(path: str | Path) -> list[tuple[str, str, float]]:
    """Lines of sentence, sentence, score. ValueError naming the line whose score is no number."""
    rows = []
    for number, (left, right, text) in enumerate(read_table(path, 3), start=1):
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{path}:{number} has the score {text!r}, which is no number")
        rows.append((left, right, score))
    return rows


def similarity(embed: Embed, pairs: Sequence[tuple[str, str, float]]) -> Similarity:
    """Of pairs of sentences with human scores; those within a fifth of the range from the highest count as equal."""
    if len(pairs) < 3:
        raise ValueError(f"{len(pairs)} pairs are too few for a rank correlation: give at least 3")
    left, right = (F.normalize(embed([pair[i] for pair in pairs]).float(), dim=-1) for i in (0, 1))  # type: ignore[misc]
    scores = torch.tensor([pair[2] for pair in pairs])
    equal = scores >= scores.max() - 0.2 * (scores.max() - scores.min())
    alignment = (left - right)[equal].pow(2).sum(-1).mean()
    distance = torch.pdist(torch.cat([left, right])).pow(2)
    uniformity = distance.mul(-2).exp().mean().log()
    return Similarity(
        spearman((left * right).sum(-1), scores), float(alignment), float(uniformity), len(pairs), int(equal.sum())
    )


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation, ties sharing their mean rank; not a number where all are equal."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def probe(embed: Embed, untrained: Embed, examples: Sequence[tuple[str, str]]) -> Probe:
    """Of labelled texts, at least two classes on both sides of the split."""
    train = [_in_train(text) for text, _ in examples]
    labels = sorted({label for _, label in examples})
    target = torch.tensor([labels.index(label) for _, label in examples])
    inside = torch.tensor(train)
    if len(labels) < 2 or len(set(target[inside].tolist())) < 2 or not (~inside).any():
        raise ValueError(
            f"a probe needs two classes and held-out texts: {len(examples)} texts of {len(labels)} classes are not enough"
        )
    texts = [text for text, _ in examples]
    common = Counter(target[inside].tolist()).most_common(1)[0][0]
    trained, fresh = (_accuracy(each(texts).float(), target, inside, len(labels)) for each in (embed, untrained))
    majority = float((target[~inside] == common).float().mean())
    return Probe(trained, fresh, majority, int(inside.sum()), int((~inside).sum()), len(labels))


def _in_train(text: str) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") < TRAIN_SHARE * 2**32


def _accuracy(features: Tensor, target: Tensor, train: Tensor, classes: int) -> float:
    """Held-out accuracy of a logistic regression with a little weight decay, by L-BFGS."""
    mean, spread = features[train].mean(0), features[train].std(0) + 1e-6
    features = (features - mean) / spread
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features[train], weight, bias), target[train]) + 1e-3 * weight.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    guess = F.linear(features[~train], weight, bias).argmax(-1)
    return float((guess == target[~train]).float().mean())
