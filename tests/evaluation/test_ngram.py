"""The n-grams are distributions, they agree with counting by hand, and they find the structure that is there."""

import math
import time
from collections import Counter

import numpy as np
import pytest

from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.dataset import Samples
from ds_pretrain.evaluation import ngram
from ds_pretrain.evaluation.ngram import Bigram, Unigram, baselines, score, train_tokens
from ds_pretrain.objectives import CausalLanguageModeling, MaskedLanguageModeling

EOD, FIRST, SIZE = 2, 8, 30
VOCAB = Vocabulary(SIZE, 0, EOD, 1, 3, 4, 5, (), frozenset(range(FIRST)))


class Text:
    """Documents in memory, with the interface of a store; each token stands for four bytes, two make a word."""

    def __init__(self, documents):
        self.documents = [np.append(doc, EOD).astype(np.int32) for doc in documents]
        self.lengths = np.array([len(doc) for doc in self.documents], dtype=np.int32)
        self.text = np.array([[4 * (len(doc) - 1), len(doc) // 2 or 1] for doc in self.documents], dtype=np.int64)
        self.digest = "text"

    def slice(self, i, start, stop):
        return self.documents[i][start:stop]


def samples(documents, objective="clm", seq_len=16):
    return Samples(Text(documents), VOCAB, seq_len, objective, "test", 0)


def markov(documents, length, seed):
    """Documents of a chain over four tokens, and its entropy rate in nats per token."""
    moves = np.array([[0.7, 0.2, 0.05, 0.05], [0.05, 0.05, 0.8, 0.1], [0.1, 0.1, 0.1, 0.7], [0.85, 0.05, 0.05, 0.05]])
    random, made = np.random.default_rng(seed), []
    for _ in range(documents):
        state, doc = 0, []
        for draw in random.random(length):
            state = min(int(np.searchsorted(np.cumsum(moves[state]), draw)), 3)
            doc.append(FIRST + state)
        made.append(doc)
    stationary = np.linalg.matrix_power(moves, 200)[0]
    return made, float(-(stationary[:, None] * moves * np.log(moves)).sum())


@pytest.fixture
def corpus():
    random = np.random.default_rng(0)
    return [FIRST + np.minimum(random.geometric(0.2, n), 15) for n in random.integers(0, 60, 40)]


def test_both_are_distributions_over_the_whole_vocabulary(corpus):
    tokens = train_tokens(samples(corpus))
    labels = np.arange(SIZE)
    for model in (Unigram.count(tokens, SIZE), Bigram.count(tokens, SIZE, EOD)):
        for previous in range(SIZE):
            p = model.probability(np.full(SIZE, previous), labels)
            assert p.min() > 0
            assert p.sum() == pytest.approx(1, abs=1e-12)
            assert p[model.guess(np.array([previous]))[0]] == p.max()


@pytest.mark.parametrize("tokens", [[EOD], [FIRST, EOD], [FIRST, FIRST, EOD, FIRST, EOD], [*range(FIRST, SIZE), EOD]])
def test_the_bigram_is_a_distribution_in_the_smallest_corpora(tokens):
    model = Bigram.count(np.array(tokens, dtype=np.int32), SIZE, EOD)
    for previous in range(SIZE):
        p = model.probability(np.full(SIZE, previous), np.arange(SIZE))
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_unigram_bits_per_byte_by_hand():
    a, b = FIRST, FIRST + 1
    train, text = samples([[a, a, a, b], [a, b]]), samples([[a, b, b], [a]])
    (name, found), _ = baselines(train, text)
    p = {a: 5 / (8 + SIZE), b: 3 / (8 + SIZE), EOD: 3 / (8 + SIZE)}
    bits = -sum(math.log2(p[t]) for t in (a, b, b, EOD, a, EOD))
    assert name == "unigram"
    assert (found.tokens, found.bytes) == (6, 16)
    assert found.bits_per_byte == pytest.approx(bits / 16)
    assert found.perplexity == pytest.approx(2 ** (bits / 6))
    assert found.accuracy == 2 / 6  # it always says `a`


def test_bigram_by_hand():
    """Pairs of a b a c <eod>: <eod>-a, a-b, b-a, a-c, c-<eod>, all once: D = 6/7."""
    a, b, c = FIRST, FIRST + 1, FIRST + 2
    model = Bigram.count(np.array([a, b, a, c, EOD]), SIZE, EOD)
    lower = lambda contexts: (contexts + 1) / (5 + SIZE)  # noqa: E731
    asked = {(a, b): (1 - 6 / 7) / 2 + 6 / 7 * lower(1), (b, a): 1 / 7 + 6 / 7 * lower(2)}
    asked |= {(a, a): 6 / 7 * lower(2), (c, b): 6 / 7 * lower(1), (SIZE - 1, a): lower(2)}
    for (previous, label), expected in asked.items():
        assert model.probability(np.array([previous]), np.array([label])) == pytest.approx(expected)


def test_the_lower_order_counts_contexts_not_tokens():
    """b is frequent, but only after a: after anything else it is as likely as a token seen once."""
    a, b, c = FIRST, FIRST + 1, FIRST + 2
    model = Bigram.count(np.array([a, b, a, b, a, b, c, EOD]), SIZE, EOD)
    assert model.probability(np.array([SIZE - 1] * 2), np.array([b, c])) == pytest.approx([2 / (5 + SIZE)] * 2)


@pytest.mark.parametrize("seq_len", [8, 16, 1000])
def test_every_token_is_scored_once_whatever_the_rows(corpus, seq_len):
    """The nats are those of walking through each document from its end-of-document id, cut or not."""
    train, text = samples(corpus[:20]), samples(corpus[20:], seq_len=seq_len)
    model = Bigram.count(train_tokens(train), SIZE, EOD)
    limit = int(text.store.lengths[:9].sum())
    nats, tokens = 0.0, 0
    for doc in text.store.documents[:9]:
        for previous, label in zip([EOD, *doc[:-1]], doc, strict=True):
            nats -= math.log(model.probability(np.array([previous]), np.array([label]))[0])
            tokens += 1
    found = score(model, text, limit)
    assert found.nats == pytest.approx(nats)
    assert found.tokens == tokens == limit
    assert (found.bytes, found.words) == tuple(text.store.text[:9].sum(axis=0))


def test_the_bigram_approaches_the_entropy_rate_of_a_markov_chain():
    train, rate = markov(40, 1000, seed=1)
    text, _ = markov(10, 1000, seed=2)
    unigram, bigram = (found.loss for _, found in baselines(samples(train), samples(text, seq_len=128)))
    assert bigram == pytest.approx(rate, abs=0.03)
    assert unigram > rate + 0.3


def test_the_bigram_is_not_the_unigram_where_there_is_nothing_to_find():
    """Independent tokens: no gain, and little loss, from looking at the one before."""
    random = np.random.default_rng(3)
    train, text = ([FIRST + random.integers(0, 20, 500) for _ in range(n)] for n in (40, 10))
    unigram, bigram = (found.loss for _, found in baselines(samples(train), samples(text)))
    assert 0 < bigram - unigram < 0.05


def test_eod_is_not_scored_where_the_objective_does_not(corpus):
    text = samples(corpus, CausalLanguageModeling(eod_loss=False))
    for _, found in baselines(text, text):
        assert found.tokens == int(text.store.lengths.sum()) - len(corpus)


def test_masked_models_are_compared_on_the_tokens_that_are_hidden(corpus):
    train = samples(corpus, MaskedLanguageModeling())
    names = [name for name, _ in baselines(train, train)]
    plan, (_, found) = train.evaluation(), baselines(train, train)[0]
    batch = train.collate(plan.rows)
    hidden = batch.targets["mlm"].labels[batch.targets["mlm"].weights != 0].tolist()
    share = Unigram.count(train_tokens(train), SIZE).share
    assert names == ["unigram"]  # a bigram would look at what is masked, or at the answer
    assert found.nats == pytest.approx(-sum(n * math.log(share[t]) for t, n in Counter(hidden).items()))


def test_a_large_train_split_is_counted_in_part(corpus):
    data = samples(corpus)
    lengths = data.store.lengths
    assert len(train_tokens(data)) == lengths.sum()
    part = train_tokens(data, -(-int(lengths.sum()) // 3))
    assert np.array_equal(part, np.concatenate(data.store.documents[::3]))


def test_counting_is_fast_enough_for_a_real_corpus():
    random = np.random.default_rng(4)
    tokens = np.minimum(random.zipf(1.3, 2_000_000), 8191).astype(np.int32)
    began = time.perf_counter()
    model = Bigram.count(tokens, 8192, EOD)
    model.probability(tokens[:-1], tokens[1:])
    assert time.perf_counter() - began < 10
    assert ngram.COUNTED >= 5_000_000
