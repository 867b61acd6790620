"""No scored position sees its own answer: the answer is changed in the document, and the logits that ask for it stay."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from every import SEQ, VOCAB, model_for

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Document
from ds_pretrain.data.collate import collate
from ds_pretrain.models.transformer import Network, initialise
from ds_pretrain.objectives import REGISTRY, create
from ds_pretrain.training.engine import build_for

WORDS = [name for name in REGISTRY if any(head.classes is None for head in create(name).heads)]


@pytest.fixture(scope="module")
def networks(mesh):
    """A network with random weights for every objective."""
    found = {}
    for name in WORDS:
        objective = create(name)
        build = build_for(objective, model_for(objective), mesh, SEQ)
        found[name] = Network(build).eval()
        initialise(found[name], build, 3)
    return found


def example(objective, tokens, number):
    """Its first segment that has a head over the vocabulary; the same random choices for every text."""
    other = rng.generator("other", number).choice(VOCAB.words, 40).astype(np.int32)
    documents = [Document(tokens), Document(other)][: objective.documents]
    made = objective.example(documents, VOCAB, SEQ, rng.generator("leak", number))
    words = {head.name for head in objective.heads if head.classes is None}
    return next(part for part in (made, *made.then) if words & set(part.targets))


def logits(network, objective, made):
    """Logits [S, V] of one row, by the network that answers for the vocabulary."""
    batch = collate([[replace(made, then=())]], objective, VOCAB, SEQ)
    every = torch.ones(1, SEQ, dtype=torch.bool)

    with torch.no_grad():
        return network(batch, Asking(every))


class Asking:
    """A criterion that asks whoever speaks for the vocabulary: a generator, where there is one."""

    def __init__(self, every):
        self.every, self.found = every, None

    def generated(self, answers, labels, weights, hidden):
        self.found = answers.logits(self.every)
        return hidden

    def __call__(self, answers, _):
        return answers.logits(self.every) if self.found is None else self.found


@pytest.mark.parametrize("name", WORDS)
def test_no_logit_sees_the_answer_it_is_asked_for(name, networks):
    """Also that the law has something to say: most scored answers are tried, and other logits do move."""
    objective, network = create(name), networks[name]
    asked = moved = 0
    for number in range(320):
        draw = rng.generator("document", number)
        tokens = draw.choice(VOCAB.words, min(objective.piece(SEQ), 40)).astype(np.int32)
        before = example(objective, tokens, number)
        at = int(draw.integers(len(tokens)))
        changed = tokens.copy()
        changed[at] = draw.choice(VOCAB.words[VOCAB.words != tokens[at]])
        after = example(objective, changed, number)
        if len(before.inputs) != len(after.inputs):
            continue
        (head,) = (h for h in before.targets if h in {x.name for x in objective.heads if x.classes is None})
        a, b = before.targets[head], after.targets[head]
        answers = np.flatnonzero((a.labels != b.labels) & (a.weights != 0) & (before.inputs != a.labels))
        first, second = logits(network, objective, before), logits(network, objective, after)
        for position in answers.tolist():
            assert torch.equal(first[position], second[position]), (number, position)
            asked += 1
        moved += not torch.equal(first, second)
    assert asked >= 8 and moved >= 60


def test_a_leak_would_be_seen(networks):
    """A causal example that is read from both sides shows the answer, and the logits move."""
    objective, network = create("prefix_lm"), networks["prefix_lm"]
    tokens = VOCAB.words[:20].astype(np.int32)
    changed = np.append(tokens[:-1], tokens[0]).astype(np.int32)
    rows = [example(objective, x, 0) for x in (np.append(tokens, 500), np.append(changed, 500))]
    leaky = [replace(row, horizon=np.full(len(row.inputs), len(row.inputs) - 1, dtype=np.int32)) for row in rows]
    first, second = (logits(network, objective, row) for row in leaky)
    assert not torch.equal(first[18], second[18])
    first, second = (logits(network, objective, row) for row in rows)
    assert torch.equal(first[18], second[18])
