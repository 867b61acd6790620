"""Closed-form floors: on texts whose law is known, training comes near the best loss there is and never below it.

A text here is drawn from a law of which P(evidence) is exact, evidence being any belief about each token: seen, hidden, or
perhaps replaced. The best nll of whatever an objective asks is then a difference of two log P(evidence): for each masked
token, or by the chain rule for a whole target, markers and cut points included. Floors are sums over the very examples that
are evaluated, so sampling error is in both sides. A loss above the margin did not learn what its inputs tell; one below the
floor was told the answer, by a way that no unit test needs to know of.

Shape suffixes: Q questions, n tokens, K symbols.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
import torch
from every import VOCAB as WIDE

from ds_pretrain import PreTrainer
from ds_pretrain.core.batch import Batch, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.dataset import Samples
from ds_pretrain.data.loader import evaluation_batches
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import create
from ds_pretrain.objectives.base import Objective
from ds_pretrain.objectives.masked import MaskedLanguageModeling
from ds_pretrain.objectives.prefix import PrefixLanguageModeling
from ds_pretrain.training.optimizer import OptimizerConfig

K, LENGTH, SEQ = 8, 24, 64
VOCAB: Vocabulary = replace(WIDE, size=16 + K, sentinels=WIDE.sentinels[:4], specials=frozenset(range(16)))
FIRST = int(VOCAB.words[0])
PRE, SUF, MID = (VOCAB.names[f"<fim_{part}>"] for part in ("prefix", "suffix", "middle"))
SEEN = np.eye(K)
BELOW = 0.01
"""How far chance may put a loss below its floor, nats per scored position: a model at gap g from the optimum differs from it
by sqrt(2 g / N) on N positions, 0.005 for g = 0.05 and N = 4,000; a leak is a tenth of a nat and more."""


class Chain:
    """A first-order Markov chain in its stationary state; with equal rows its tokens are independent."""

    def __init__(self, move: np.ndarray) -> None:
        self.move = move
        self.start = np.linalg.matrix_power(move, 1000)[0]

    def draw(self, documents: int, random: np.random.Generator) -> np.ndarray:
        text = np.empty((documents, LENGTH), dtype=np.int64)
        for t in range(LENGTH):
            ends = np.cumsum(self.move[text[:, t - 1]] if t else np.tile(self.start, (documents, 1)), axis=1)
            text[:, t] = (random.random((documents, 1)) > ends[:, :-1]).sum(1)
        return text

    def log_evidence(self, belief: np.ndarray) -> np.ndarray:
        """log P of beliefs [Q, n, K]: the forward algorithm."""
        state, total = self.start * belief[:, 0], np.zeros(len(belief))
        for t in range(1, belief.shape[1]):
            scale = state.sum(1)
            total += np.log(scale)
            state = (state / scale[:, None]) @ self.move * belief[:, t]
        return total + np.log(state.sum(1))

    def entropy(self) -> float:
        """Of a whole document, nats."""
        each = -(self.move * np.log(self.move)).sum(1)
        return float(-(self.start * np.log(self.start)).sum() + (LENGTH - 1) * self.start @ each)


class Copy:
    """A random string, as often as it takes."""

    def __init__(self, period: int = LENGTH // 2) -> None:
        self.period = period

    def draw(self, documents: int, random: np.random.Generator) -> np.ndarray:
        return np.tile(random.integers(K, size=(documents, self.period)), LENGTH // self.period)

    def log_evidence(self, belief: np.ndarray) -> np.ndarray:
        cut = np.ones((len(belief), LENGTH - belief.shape[1], K))
        belief = np.concatenate((belief, cut), axis=1).reshape(len(belief), -1, self.period, K)
        with np.errstate(divide="ignore"):  # evidence that contradicts itself
            return np.log(belief.prod(1).mean(2)).sum(1)

    def entropy(self) -> float:
        return self.period * math.log(K)


Law = Chain | Copy
MARKOV = Chain(np.random.default_rng(5).dirichlet(np.full(K, 0.4), K) * 0.96 + 0.04 / K)
UNIGRAM = Chain(np.tile(np.arange(1.0, K + 1) / (K * (K + 1) / 2), (K, 1)))


class Texts:
    """Documents of a law, with the interface of a store."""

    def __init__(self, law: Law, documents: int, seed: int) -> None:
        self.symbols = law.draw(documents, np.random.default_rng(seed))
        self.tokens = np.append(self.symbols + FIRST, np.full((documents, 1), VOCAB.eod), axis=1).astype(np.int32)
        self.lengths = np.full(documents, LENGTH + 1)
        self.text = np.ones((documents, 2), dtype=np.int64)
        self.digest = f"{type(law).__name__}-{documents}-{seed}"

    def slice(self, i: int, start: int, stop: int) -> np.ndarray:
        return self.tokens[i, start:stop]


def whole(law, x):
    """-log P of a document."""
    return -float(law.log_evidence(SEEN[x][None])[0])


def rest(law, x, known):
    """Everything behind the first `known` tokens."""
    belief = SEEN[x].copy()
    belief[known:] = 1
    return whole(law, x) + float(law.log_evidence(belief[None])[0])


def causal(law, x, made, objective):
    """The end costs nothing: every document is equally long."""
    return whole(law, x)


def prefix(law, x, made, objective):
    return rest(law, x, LENGTH + 1 - int(made.targets["prefix_lm"].total))


def masked(law, x, made, objective):
    """A token that is shown may be a random one: the observations are noisy, each by its own coin."""
    (head,) = (name for name in made.targets if name != "rtd")
    weights, inputs = made.targets[head].weights, made.inputs
    at = np.flatnonzero(weights)
    words = ~VOCAB.is_special[made.targets[head].labels]
    place = np.cumsum(words)[at] - 1
    seen = inputs[words]
    share = getattr(objective, "mask_prob", 0.0)
    random = getattr(objective, "random_token_prob", 0.0)
    kept = 1 - getattr(objective, "mask_token_prob", 1.0) - random
    shown = (seen != VOCAB.mask)[:, None]
    match = SEEN[np.where(shown[:, 0], seen - FIRST, 0)]
    belief = np.where(shown, share * random / K + (share * kept + 1 - share) * match, 1.0)
    asked = np.where(shown, random / K + kept * match, 1.0)
    question = np.repeat(belief[None], len(at), axis=0)
    number = np.arange(len(at))
    question[number, place] = asked[place]
    answer = question.copy()
    answer[number, place] *= SEEN[x[place]]
    return float((weights[at] * (law.log_evidence(question) - law.log_evidence(answer))).sum()) if len(at) else 0.0


def fim(law, x, made, objective):
    """The text, and the two cuts: each of the (LENGTH + 1)^2 pairs is equally likely. With an empty A the two orders look
    the same."""
    labels, pairs = made.targets["fim"].labels.tolist(), (LENGTH + 1) ** 2
    if PRE not in labels:
        return whole(law, x) - math.log(1 - objective.rate)
    i, j = labels.index(SUF) - 1, LENGTH - (labels.index(MID) - labels.index(SUF) - 1)
    share = (1 - objective.spm) * (1 if i == j else 2) / pairs
    if i == 0:
        share += objective.spm * (2 * j + 1) / pairs
    return whole(law, x) - math.log(objective.rate * share)


def spans(law, x, made, objective):
    """The spans and their lengths: all ways to cut the same amount into as many, of which the kept text is evidence."""
    sentinels = np.isin(made.inputs, VOCAB.sentinels)
    end = int(np.flatnonzero(made.inputs == VOCAB.eod)[0])
    marks = np.flatnonzero(sentinels[:end])
    kept = np.diff(marks, prepend=-1) - 1
    seen = SEEN[made.inputs[:end][~sentinels[:end]] - FIRST]
    hidden = LENGTH - len(seen)
    ways = [np.diff((0, *cuts, hidden)) for cuts in combinations(range(1, hidden), len(kept) - 1)]
    beliefs = np.ones((len(ways), LENGTH, K))
    for belief, way in zip(beliefs, ways, strict=True):
        belief[np.repeat(np.tile([True, False], len(kept)), np.stack([kept, way], 1).ravel())] = seen
    return whole(law, x) + float(np.logaddexp.reduce(law.log_evidence(beliefs)))


@dataclass(frozen=True)
class Case:
    """margin: how far above its floor training may end, nats per scored position. It is below what a model loses that does
    not read its inputs, but for the spans of a chain: finding what stood around a sentinel takes more steps than a test has,
    so that case is there for the floor, and documents of one repeated token show that inputs are read."""

    law: Law
    objective: Objective
    floor: Callable
    steps: int
    margin: float


CASES = {
    "clm-markov": Case(MARKOV, create("clm"), causal, 100, 0.03),
    "clm-copy": Case(Copy(), create("clm"), causal, 150, 0.03),
    "mlm-markov": Case(MARKOV, create("mlm", mask_prob=0.3, selection="bernoulli"), masked, 300, 0.1),
    "mlm-copy": Case(Copy(), create("mlm", mask_prob=0.3, selection="bernoulli"), masked, 200, 0.05),
    "prefix_lm-markov": Case(MARKOV, create("prefix_lm"), prefix, 100, 0.05),
    "prefix_lm-copy": Case(Copy(), create("prefix_lm"), prefix, 200, 0.05),
    "fim-markov": Case(MARKOV, create("fim", cut="token"), fim, 200, 0.1),
    "span_corruption-constant": Case(Copy(1), create("span_corruption", density=0.25), spans, 200, 0.05),
    "span_corruption-markov": Case(MARKOV, create("span_corruption", density=0.25), spans, 200, 0.25),
    "mdlm-markov": Case(MARKOV, create("mdlm"), masked, 400, 0.15),
    "mdlm-copy": Case(Copy(), create("mdlm"), masked, 200, 0.03),
}


def data(law: Law, objective: Objective, documents: int, seed: int) -> Samples:
    return Samples(Texts(law, documents, seed), VOCAB, SEQ, objective, "train", seed)


def trained(law: Law, objective: Objective, steps: int) -> PreTrainer:
    trainer = PreTrainer(
        model=ModelConfig(layers=2, hidden=64, heads=4, position="rope", init_std=0.15),
        objective=objective,
        dataset=data(law, objective, 20_000, 1),
        batch_size=16,
        max_steps=steps,
        optimizer=OptimizerConfig(lr=5e-3, warmup_steps=30, weight_decay=0.01),
        progress=False,
    )
    trainer.train()
    return trainer


def floors(case: Case, test: Samples) -> np.ndarray:
    """Nats of each document that is evaluated."""
    numbers = [sample for row in test.evaluation().rows for sample in row]
    documents = test.pieces.cut(test.decode(np.array(numbers)).piece).document
    texts = test.store.symbols[documents]
    return np.array([case.floor(case.law, x, test.example(i), case.objective) for x, i in zip(texts, numbers, strict=True)])


def gaps(case: Case) -> dict[str, float]:
    """Loss after training less its floor by head, nats per scored position, on documents of their own."""
    test, trainer = data(case.law, case.objective, 300, 2), trained(case.law, case.objective, case.steps)
    batches = list(evaluation_batches(test, None, 16))
    found = trainer.model.evaluate(batches)
    floor = {head.name: float(floors(case, test).sum()) for head in case.objective.heads if head.classes is None}
    if "rtd" in found.sums:
        floor["rtd"] = sum(detection(trainer, batch, case) for batch in batches)
    return {name: (found.sums[name] - floor[name]) / found.totals[name] for name in floor}


@torch.no_grad()
def detection(trainer: PreTrainer, batch: Batch, case: Case) -> float:
    """The best detector's nats where the generator's samples follow the law of independent tokens: of those that read o,
    P(o is a replacement) = P(masked) P(sample is o) P(original is not o) / P(o) = P(masked) (1 - P(o))."""
    trainer.model.module.eval()
    read = trainer.model.module(batch, lambda answers, _: answers.tokens).numpy()
    words = (batch.attention.segment.numpy() != 0) & ~VOCAB.is_special[read]
    share = case.objective.mask_prob * case.objective.mask_token_prob * (1 - case.law.start[read[words] - FIRST])
    replaced = (read != batch.targets["mlm"].labels.numpy())[words]
    return -float(np.log(np.where(replaced, share, 1 - share)).sum())


@pytest.mark.parametrize("name", CASES)
def test_training_comes_near_the_floor_and_never_below(name):
    (gap,) = gaps(CASES[name]).values()
    assert -BELOW <= gap <= CASES[name].margin


def test_the_detector_of_replaced_tokens_does_no_better_than_their_base_rate():
    """ELECTRA on independent tokens: the generator learns their frequencies, and the detector the share replaced of each."""
    found = gaps(Case(UNIGRAM, create("electra", mask_prob=0.3, selection="bernoulli"), masked, 200, 0.015))
    assert found.keys() == {"mlm", "rtd"} and all(-BELOW <= gap <= 0.015 for gap in found.values())


@pytest.mark.parametrize("law", [MARKOV, Copy()], ids=["markov", "copy"])
@pytest.mark.parametrize("objective", ["clm", "mdlm"])
def test_floors_average_to_the_entropy_of_the_law(law, objective):
    """For masked diffusion that is its theorem: over all masks the bound of the best model is tight."""
    fields = {"random_length": 0.0} if objective == "mdlm" else {}
    case = Case(law, create(objective, **fields), masked if fields else causal, 0, 0.0)
    found = floors(case, data(law, case.objective, 2000, 3))
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - law.entropy()) <= 4 * error + 1e-6 and error < 0.03 * law.entropy()


class OneAhead(PrefixLanguageModeling):
    """A leak: every position sees one more than it may, which is its answer."""

    def example(self, docs, vocab, max_len, rng):
        made = super().example(docs, vocab, max_len, rng)
        return replace(made, horizon=np.minimum(made.horizon + 1, len(made.inputs) - 1))


class Telling(MaskedLanguageModeling):
    """A leak that no attention mask shows: being hidden tells something of the token."""

    def hide(self, labels, vocab, rng):
        inputs, target = super().hide(labels, vocab, rng)
        low = labels < FIRST + K // 2
        return np.where(low, inputs, labels), Target.of(target.labels, (target.weights != 0) & low)


@pytest.mark.parametrize(
    "case",
    [
        Case(MARKOV, OneAhead(), prefix, 150, 0.0),
        Case(MARKOV, Telling(mask_prob=0.3, mask_token_prob=1.0, random_token_prob=0.0), masked, 150, 0.0),
    ],
    ids=["one ahead", "telling masks"],
)
def test_a_leak_ends_far_below_the_floor(case):
    (gap,) = gaps(case).values()
    assert gap < -10 * BELOW
