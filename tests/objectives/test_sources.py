"""The objectives beside sources that nobody here wrote: published numbers, other people's algorithms and libraries."""

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from text import ENCODED, TEXTS, TOKENIZER, VOCAB, real_document

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Document
from ds_pretrain.core.loss import weighted_mean
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.collate import collate
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.noise import gumbel, row_keys
from ds_pretrain.models.transformer import Build, Network, initialise
from ds_pretrain.objectives import create
from ds_pretrain.objectives.fim import NAMES
from ds_pretrain.objectives.prefix import prefixed
from ds_pretrain.objectives.spans import noise, noise_mask
from ds_pretrain.training.engine import Criterion

MAX_LEN = 128
RANK = {sentinel: number for number, sentinel in enumerate(VOCAB.sentinels)}


def within(count, total, share):
    """A binomial count, by five standard deviations."""
    assert abs(count / total - share) < 5 * math.sqrt(share * (1 - share) / total), f"{count / total:.5f} for {share:.5f}"


def fits(counts, expected):
    """Chi-square with the probability of five standard deviations at most."""
    counts, expected = np.asarray(counts, float), np.broadcast_to(expected, np.shape(counts)).astype(float)
    chi, free = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    assert chi < free + 5 * math.sqrt(2 * free), f"chi-square {chi:.1f} with {free} degrees of freedom"


def alike(ours, theirs):
    """Two-sample chi-square of two Counters of equally many draws."""
    keys = [key for key in ours | theirs if ours[key] + theirs[key] >= 20]
    a, b = (np.array([c[key] for key in keys], float) for c in (ours, theirs))
    chi, free = ((a - b) ** 2 / (a + b)).sum(), len(keys)
    assert chi < free + 5 * math.sqrt(2 * free), f"chi-square {chi:.1f} with {free} degrees of freedom"


def examples(objective, count, max_len=MAX_LEN):
    """(documents, example) for pieces of real texts."""
    for number in range(count):
        docs = real_document(objective, max_len, number)
        yield docs, objective.example(docs, VOCAB, max_len, rng.generator("source", number))


def repeated(objective, tokens, count, vocab=VOCAB, max_len=1024):
    """Examples of one document under as many keys."""
    doc = Document(np.asarray(tokens, np.int32))
    return (objective.example([doc], vocab, max_len, rng.generator("again", key)) for key in range(count))


def sides(example):
    """What is read from both sides, and what is predicted after it."""
    (target,) = example.targets.values()
    first = int(target.weights.argmax())
    assert (target.weights == (np.arange(len(target.weights)) >= first)).all()
    return example.inputs[: first + 1], target.labels[first:]


def t5_noise_mask(length, density, mean, roll, random):
    """`random_spans_noise_mask` of the t5 library, in numpy."""

    def segments(items, parts):
        starts = np.arange(items - 1) < parts - 1
        random.shuffle(starts)
        return np.bincount(np.cumsum(np.pad(starts, (1, 0))), minlength=parts)

    cut = min(max(round(length * density), 1), length - 1)
    spans = max(round(cut / mean), 1)
    lengths = np.stack([segments(length - cut, spans), segments(cut, spans)], axis=1).reshape(-1)
    starts = np.bincount(np.cumsum(lengths)[:-1], minlength=length)
    mask = np.cumsum(starts) % 2 == 1
    return np.roll(mask, random.integers(length)) if roll else mask


def restored(inputs, targets):
    """The document, from inputs and targets without their ends; sentinels must count 0, 1, 2 ... on both sides."""
    spans, order = {}, [RANK[t] for t in inputs if t in RANK]
    for token in targets.tolist():
        spans.setdefault(token, []) if token in RANK else spans[[*spans][-1]].append(token)
    assert order == [RANK[s] for s in spans] == list(range(len(spans)))
    return [token for t in inputs.tolist() for token in spans.get(t, [t])]


@pytest.mark.parametrize(
    ("inputs", "mean", "density", "raw", "targets", "spans"),
    [
        (512, 3, 0.15, 568, 114, 28), (512, 8, 0.15, 588, 100, 11), (512, 3, 0.5, 766, 512, 128),
        (512, 8, 0.5, 908, 512, 57), (512, 64, 0.15, 600, 92, 1), (512, 64, 0.5, 1006, 512, 8),
        (64, 2, 0.2, 70, 22, None), (64, 1, 0.2, 63, 27, None),
    ],
)  # fmt: skip
def test_span_counts_give_the_lengths_that_t5_published(inputs, mean, density, raw, targets, spans):
    """`random_spans_helper`: the longest text whose inputs fit, one less where half is noise and the targets do not."""
    tokens = np.arange(2, 2000)
    cut = noise(tokens, density, mean)
    read, written = tokens - cut.tokens + cut.spans + 1, cut.tokens + cut.spans + 1
    last = np.flatnonzero(read <= inputs)[-1]
    last -= density == 0.5 and written[last] > inputs
    assert (tokens[last], written[last]) == (raw, targets) and spans in (None, cut.spans[last])


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("case", [(10, 0.4, 2.0), (12, 0.5, 2.0), (13, 0.3, 2.0)])
def test_span_masks_are_distributed_as_those_of_t5(case, roll):
    draw, random = rng.generator("masks", *map(str, case)), np.random.default_rng(0)
    ours = Counter(tuple(noise_mask(*case, roll, draw).tolist()) for _ in range(20_000))
    theirs = Counter(tuple(t5_noise_mask(*case, roll, random).tolist()) for _ in range(20_000))
    alike(ours, theirs)
    hidden = np.array([*ours]).T @ [*ours.values()]
    if roll:
        fits(hidden, hidden.mean())
    else:  # all masks are equally likely, the first position is never hidden and the last one always
        length, cut, spans = case[0], *map(int, noise(np.array(case[0]), *case[1:]))
        fits([*ours.values()], 20_000 / (math.comb(length - cut - 1, spans - 1) * math.comb(cut - 1, spans - 1)))
        assert hidden[0] == 0 and hidden[-1] == 20_000


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("fields", [{}, {"density": 0.5}, {"density": 0.5, "mean_span": 64.0}])
def test_spans_put_back_give_the_document(fields, roll):
    for (doc,), e in examples(create("span_corruption", roll=roll, **fields), 2000):
        inputs, targets = sides(e)
        assert inputs[-1] == targets[-1] == VOCAB.eod
        assert restored(inputs[:-1], targets[:-1]) == doc.tokens.tolist()


def test_prefix_rows_are_those_that_seqio_documents():
    """The packed example in the documentation of seqio.PrefixLMFeatureConverter."""
    vocab = Vocabulary(10, 0, 1, 2, 2, 2, 2, (), frozenset({0, 1, 2}))
    texts = [([7, 8, 5, 1], [3, 9, 1]), ([8, 4, 9, 3, 1], [4, 1])]
    row = [prefixed(np.array([0, *inputs, *targets]), 1 + len(inputs), "prefix_lm") for inputs, targets in texts]
    batch = collate([row], create("prefix_lm"), vocab, 15)
    both = torch.tensor([1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0])
    segment = torch.tensor([1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0])
    target = batch.targets["prefix_lm"]
    assert target.labels[0].tolist() == [7, 8, 5, 1, 3, 9, 1, 8, 4, 9, 3, 1, 4, 1, 0]
    assert target.weights[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]
    assert batch.inputs[0].tolist() == [0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 9, 3, 1, 4, 0]
    assert batch.position[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]
    assert batch.attention.segment[0].tolist() == segment.tolist()
    assert torch.equal(batch.attention.dense()[0], t5x_mask(both, segment))


def t5x_mask(both, segment):
    """Causal OR both in the prefix, AND the same segment, AND no padding: as t5x adds up its masks."""
    causal = torch.ones(len(both), len(both)).tril().bool()
    same = (segment[:, None] == segment[None]) & (segment[:, None] > 0)
    return (causal | (both[:, None] * both[None]).bool()) & same


@pytest.mark.parametrize("name", ["prefix_lm", "span_corruption"])
def test_packed_prefixes_see_what_t5x_lets_them_see(name):
    objective = create(name)
    found = [e for _, e in examples(objective, 300, 60)]
    for rows in zip(*[iter(found)] * 3, strict=True):
        batch = collate([rows], objective, VOCAB, 200)
        flags = [np.arange(len(e.inputs)) <= max(e.targets[name].weights.argmax(), 0) for e in rows]
        both = torch.from_numpy(np.pad(np.concatenate(flags), (0, 200 - sum(map(len, flags))))).int()
        assert torch.equal(batch.attention.dense()[0], t5x_mask(both, batch.attention.segment[0]))


def test_prefix_lengths_are_uniform():
    """As T5's `random_prefix_noise_mask`: 1 to n - 1 tokens of the document."""
    counts = Counter(len(sides(e)[0]) - 1 for e in repeated(create("prefix_lm"), VOCAB.words[:20], 19_000))
    assert sorted(counts) == [*range(1, 20)]
    fits([*counts.values()], 1000)


PRE, SUF, MID = (VOCAB.names[name] for name in NAMES)


def middle(row):
    """(prefix, middle, suffix, is SPM) of a rewritten row, None of another; each marker stands there once."""
    if not np.isin(row, (PRE, SUF, MID)).any():
        return None
    ((pre,), (suf,), (mid,), (end,)) = (np.flatnonzero(row == mark).tolist() for mark in (PRE, SUF, MID, VOCAB.eod))
    assert pre == 0 and suf < mid < end == len(row) - 1
    between = row[suf + 1 : mid]
    return (row[:0], row[mid + 1 : -1], between, True) if suf == 1 else (row[1:suf], row[mid + 1 : -1], between, False)


@pytest.mark.parametrize("cut", ["character", "token"])
def test_fim_gives_the_document_back(cut):
    """From PSM as A B C; SPM writes A and B in one, so C has to follow what stands behind <MID>. Nothing is ever cut off."""
    found = Counter()
    for (doc,), e in examples(create("fim", cut=cut), 2000):
        row, tokens = e.targets["fim"].labels, doc.tokens[doc.tokens != VOCAB.eod]
        parts = middle(row)
        found["spm" if parts and parts[3] else "psm" if parts else "left alone"] += 1
        whole = np.concatenate(parts[:3]) if parts else row[row != VOCAB.eod]
        if not np.array_equal(whole, tokens):  # cut inside a token, so the parts are encoded anew
            assert cut == "character" and "".join(map(TOKENIZER.decode, parts[:3])) == TOKENIZER.decode(tokens)
            found["anew"] += 1
        assert np.array_equal(e.inputs[1:], row[:-1])
    within(found["spm"] + found["psm"], 2000, 0.5)
    within(found["spm"], found["spm"] + found["psm"], 0.5)
    assert (found["anew"] > 600) == (cut == "character")


@pytest.mark.parametrize("kind", ["bpe", "unigram", "sp_bpe", "wordpiece"])
def test_characters_are_cut_only_where_the_parts_join_again(kind):
    """sentencepiece writes a part as if a word began there: a text cut inside a word would come back with a space."""
    vocab = TextTokenizer.train(iter(TEXTS[:40]), vocab_size=900, kind=kind).vocabulary
    assert create("fim", cut="token").check(vocab, 128) == []
    refused = create("fim").check(vocab, 128)
    assert not refused if kind == "bpe" else "use objective.cut=token" in refused[0]


def test_fim_cuts_characters_uniformly_and_text_forges_no_marker():
    """Both cuts fall on each of the n + 1 places between n characters equally often, in text that spells the markers too."""
    text = "def f(x): # <fim_middle> <fim_suffix><fim_prefix> <eod> [NLU] <extra_id_0>"
    places = Counter()
    for e in repeated(create("fim", rate=1.0, spm=0.0), TOKENIZER.encode(text), 6000):
        row = e.targets["fim"].labels
        a, b, c = map(TOKENIZER.decode, middle(row)[:3])
        assert a + b + c == text and VOCAB.is_special[row].sum() == 4
        places.update([len(a), len(a) + len(b)])
    fits([places[i] for i in range(len(text) + 1)], 12_000 / (len(text) + 1))


MODES = {VOCAB.names[name]: name for name in ("[NLU]", "[S2S]", "[NLG]")}
DENOISERS = {
    ("[NLU]", 30, 10): (3, 0.15), ("[NLU]", 30, 4): (8, 0.15), ("[S2S]", 50, 0): "s", ("[NLG]", 100, 33): (3, 0.5),
    ("[NLG]", 100, 12): (8, 0.5), ("[NLG]", 30, 1): (64, 0.15), ("[NLG]", 100, 2): (64, 0.5),
}  # fmt: skip
"""Mode, tokens cut out of 200, spans; by hand from T5's formulae, halves to even."""


@pytest.mark.parametrize(("name", "groups"), [("ul2", (2, 1, 4)), ("ul2r", (0.25, 0.5, 0.25))])
def test_ul2_draws_its_seven_denoisers_by_their_shares(name, groups):
    found, text = Counter(), VOCAB.words[:200]
    for e in repeated(create(name), text, 7000):
        inputs, targets = sides(e)
        (mode,) = (MODES[t] for t in inputs.tolist() if t in MODES)
        found[DENOISERS[mode, int(np.isin(targets, text).sum()), int(np.isin(targets, VOCAB.sentinels).sum())]] += 1
    assert len(found) == 7
    for denoiser, count in found.items():
        group = 1 if denoiser == "s" else 0 if denoiser in [(3, 0.15), (8, 0.15)] else 2
        within(count, 7000, groups[group] / sum(groups) / (2, 1, 4)[group])


def test_ul2_puts_back_what_it_hid():
    for (doc,), e in examples(create("ul2"), 2000):
        inputs, targets = sides(e)
        text = doc.tokens[doc.tokens != VOCAB.eod].tolist()
        if VOCAB.names["[S2S]"] in inputs:
            assert [*inputs[2:], *targets] == doc.tokens.tolist() and inputs[1] == VOCAB.names["[S2S]"]
            assert not set(e.inputs.tolist()) & set(RANK)
        elif text:
            assert MODES[int(inputs[0])] in ("[NLU]", "[NLG]")
            assert restored(inputs[1:-1], targets[:-1]) == text


def grouped(kind):
    """(vocabulary, [(ids, the word of each by the tokenizers library, -1 for none)]) of pieces of real texts. Byte-level BPE
    groups otherwise ("x" and "86"), so there the words are runs of letters and digits, found by the offsets."""
    trained, found = TextTokenizer.train(iter(TEXTS), vocab_size=800, kind=kind), []
    raw = tokenizers.Tokenizer.from_str(trained.model.decode())
    for text in TEXTS[::4]:
        encoded, of_char = raw.encode(text), np.full(len(text), -1)
        for number, run in enumerate(re.finditer(r"[^\W_]+", text)):
            of_char[slice(*run.span())] = number
        by_offset = [max(of_char[slice(*span)]) for span in encoded.offsets]
        words = np.array(encoded.word_ids if kind == "wordpiece" else by_offset)
        ids = np.array(encoded.ids, dtype=np.int32)
        found += [(ids[i : i + 120], words[i : i + 120]) for i in range(0, len(ids), 120)]
    return trained.vocabulary, found


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_word_is_masked_whole_or_not_at_all(kind):
    vocab, pieces = grouped(kind)
    several, objectives = 0, [create("mlm", unit="word", selection=way) for way in ("exact", "bernoulli")]
    for number, (ids, word) in enumerate(pieces):
        real = (word >= 0) & ~vocab.is_special[ids]
        pairs = real[1:] & real[:-1]
        assert np.array_equal(vocab.word_starts(ids)[1:][pairs], (word[1:] != word[:-1])[pairs])
        several += (word[1:] == word[:-1])[pairs].sum()
        for objective in objectives:
            e = objective.example([Document(ids)], vocab, MAX_LEN, rng.generator("word", number))
            chosen = e.targets["mlm"].weights[1:-1] == 1
            same = word[:, None] == word
            assert not (same & real & real[:, None] & (chosen[:, None] != chosen)).any()
    assert several > 5000


@pytest.mark.filterwarnings("ignore")
def test_whole_words_agree_with_transformers():
    """Letters and spaces only: beside them its collator takes what touches for one word. The same words, as many masked."""
    transformers = pytest.importorskip("transformers")
    trained = TextTokenizer.train(iter(TEXTS), vocab_size=800, kind="wordpiece")
    raw, vocab = tokenizers.Tokenizer.from_str(trained.model.decode()), trained.vocabulary
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, mask_token="<mask>", pad_token="<pad>")
    collator = transformers.DataCollatorForLanguageModeling(tokenizer=fast, whole_word_mask=True, seed=0)
    encoded = raw.encode(" ".join(re.findall("[a-z]+", " ".join(TEXTS).lower())))
    ids, offsets = (np.array(x[: 126 * 900]).reshape(900, 126, -1) for x in (encoded.ids, encoded.offsets))
    ids, plain = ids[..., 0], np.zeros((900, 126), int)
    names = ("input_ids", "offset_mapping", "special_tokens_mask")
    features = [dict(zip(names, row, strict=True)) for row in zip(ids, offsets, plain, strict=True)]
    first = ~collator._calc_word_ids_and_prob_mask(offsets, plain)[1]
    theirs = (collator(features)["labels"] != -100).numpy()
    objective = create("mlm", unit="word", selection="bernoulli")
    made = [objective.example([Document(row.astype(np.int32))], vocab, 128, rng.generator(i)) for i, row in enumerate(ids)]
    ours = np.stack([e.targets["mlm"].weights[1:-1] == 1 for e in made])
    assert np.array_equal(first, np.stack([vocab.word_starts(row) for row in ids]))
    for chosen in (ours[first], theirs[first]):  # words by their own coins
        within(chosen.sum(), len(chosen), 0.15)
        within((chosen[1:] & chosen[:-1]).sum(), len(chosen) - 1, 0.15**2)


GEOMETRIC, HARMONIC = 0.2 * 0.8 ** np.arange(10), 1 / np.arange(1, 4)
"""Span lengths of SpanBERT (1 to 10 words) and of ALBERT (1 to 3)."""


def span_mask(length, count, shares, random):
    """`PairWithSpanMaskingScheme.mask` of SpanBERT's code, for words of one token each."""
    mask = set()
    while len(mask) < count:
        span, anchor = 1 + random.choice(len(shares), p=shares / shares.sum()), random.integers(length)
        if anchor not in mask:
            mask.update([*range(anchor, min(anchor + span, length))][: count - len(mask)])
    return np.isin(np.arange(length), [*mask])


@pytest.mark.parametrize(("fields", "shares"), [({}, GEOMETRIC), ({"span_lengths": "harmonic", "span_max": 3}, HARMONIC)])
def test_spans_are_as_long_as_those_of_spanbert_and_albert(fields, shares):
    """Sparse enough for spans not to touch, the last one cut to the budget."""

    def runs(masks):
        return Counter(len([*run]) for mask in masks for hidden, run in groupby(mask.tolist()) if hidden)

    words, random = Vocabulary.synthetic(), np.random.default_rng(3)
    vocab = replace(words, surfaces=lambda: [" word"] * words.size)
    objective = create("mlm", unit="span", mask_prob=0.02, **fields)
    ours = runs(e.targets["mlm"].weights == 1 for e in repeated(objective, [300] * 1000, 3000, vocab))
    alike(ours, runs(span_mask(1000, 20, shares, random) for _ in range(3000)))
    assert set(ours) >= {*range(1, len(shares) + 1)} and ours[1] < 1.3 * shares[0] / shares.sum() * ours.total() + 0.1


@pytest.mark.parametrize("unit", ["span", "word"])
def test_words_and_spans_keep_the_budget(unit):
    asked = hidden = 0
    for (doc,), e in examples(create("mlm", unit=unit), 2000):
        count = max(1, round(0.15 * len(doc.tokens)))
        hidden, asked = hidden + e.targets["mlm"].total, asked + count
        assert e.targets["mlm"].total == count if unit == "span" else e.targets["mlm"].total <= max(count, 8)
    assert hidden > 0.98 * asked


def pairs(name, count):
    """(A, B, label, documents) of real texts: pieces from anywhere, and as they lie one behind the other."""
    objective = create(name)
    for number in range(count):
        draw, docs = rng.generator("pair", number), real_document(objective, MAX_LEN, number)
        if number % 2:
            texts = [ENCODED[draw.integers(len(ENCODED))] for _ in docs]
            starts = [125 * int(draw.integers(-(-len(text) // 125))) for text in texts]
            pairs = [(text[i : i + 125], int(text[i - 1]) if i else None) for text, i in zip(texts, starts, strict=True)]
            docs = [Document(*pair) for pair in pairs if len(pair[0]) >= objective.shortest]
        if len(docs) == objective.documents:
            e = objective.example(docs, VOCAB, MAX_LEN, rng.generator("example", number))
            a, b = (e.inputs[e.token_type == kind] for kind in (0, 1))
            assert a[0] == VOCAB.cls and a[-1] == b[-1] == VOCAB.sep
            yield a[1:-1], b[:-1], int(e.targets[name].labels[0]), docs


SURFACES = VOCAB.surfaces()


def clues(a, b, docs):
    """What should not tell the answer: lengths, final punctuation, whether the cut falls inside a word, and whether the pair
    touches an end of a document. (Its first words may: text that opens with a heading is in order, which is what the task
    asks about.)"""
    found = [len(a), len(b), math.log(len(a) / len(b)), len(a) > len(b), len(a) + len(b)]
    for part in (a, b):
        last = SURFACES[part[-1]].rstrip()
        found += [last.endswith((".", "!", "?")), last == ""]
    found.append(bool(VOCAB.word_starts(np.array([a[-1], b[0]]))[1]))
    begins = any(np.array_equal(x, doc.tokens[: len(x)]) for x in (a, b) for doc in docs)
    return [*found, begins, any(np.array_equal(x, doc.tokens[-len(x) :]) for x in (a, b) for doc in docs)]


def auc(features, labels):
    """Logistic regression on one half, by Newton's method; how well it orders the other half."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    x, half = np.hstack([features, np.ones((len(features), 1))]), len(features) // 2
    w = np.zeros(x.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-x[:half] @ w))
        hessian = (x[:half] * (p * (1 - p))[:, None]).T @ x[:half] + np.eye(len(w))
        w += np.linalg.solve(hessian, x[:half].T @ (labels[:half] - p) - w)
    wrong, right = (np.sort((x[half:] @ w)[labels[half:] == label]) for label in (0, 1))
    below, upto = (np.searchsorted(wrong, right, side).mean() for side in ("left", "right"))  # ties count half
    return (below + upto) / 2 / len(wrong)


def with_products(features):
    """Also every product of two clues: what each hides may show in both."""
    pairs = [features[:, i] * features[:, j] for i in range(features.shape[1]) for j in range(i)]
    return np.column_stack([features, *pairs])


@pytest.mark.parametrize("name", ["nsp", "sop"])
def test_a_probe_cannot_tell_the_label_from_anything_but_the_text(name):
    found = [(clues(a, b, docs), label) for a, b, label, docs in pairs(name, 24_000)]
    features, labels = np.array([x for x, _ in found], float), np.array([label for _, label in found])
    within(labels.sum(), len(labels), 0.5)
    assert auc(features, labels) == pytest.approx(0.5, abs=0.02)
    if name == "nsp":  # for sop a full stop before a capital is the text that tells the order, as it should
        assert auc(with_products(features), labels) == pytest.approx(0.5, abs=0.02)
    leaky = np.hstack([features, (labels + np.random.default_rng(0).normal(size=len(labels)))[:, None]])
    assert auc(leaky, labels) > 0.7, "the probe can find a clue where there is one"


def test_pairs_are_made_of_neighbours_or_of_two_documents():
    for name, label, order in (("nsp", 0, 1), ("sop", 0, 1), ("sop", 1, -1)):
        for a, b, _, docs in (pair for pair in pairs(name, 500) if pair[2] == label):
            assert np.concatenate([a, b][::order]).tobytes() in docs[0].tokens.tobytes()
    for a, b, label, docs in pairs("nsp", 2000):
        assert a.tobytes() in docs[0].tokens.tobytes() and b.tobytes() in docs[label].tokens.tobytes()


def test_a_unigram_model_is_scored_with_the_entropy_of_the_text():
    """Every token is masked with p and weighted with 1 / p, so the loss of a model that only knows frequencies is their
    entropy, within the standard error of the draws, and a document's weights sum to its maskable tokens on average."""
    made = [e.targets["mdlm"] for _, e in examples(create("mdlm", random_length=0), 20_000, 64)]
    counts = np.bincount(np.concatenate([t.labels for t in made]), minlength=VOCAB.size)
    nll = -np.log(np.maximum(counts, 1) / counts.sum())
    entropy = (counts * nll).sum() / counts.sum()
    total = sum(t.total for t in made)
    assert total == counts.sum()
    for worth, expected in ((nll, entropy), (np.ones_like(nll), 1.0)):
        errors = np.array([(t.weights * worth[t.labels]).sum() - worth[t.labels].sum() for t in made])
        error = math.sqrt((errors**2).sum()) / total
        assert error < 0.02 * expected and abs(errors.sum() / total) < 4 * error


def test_masking_probabilities_are_uniform_and_lengths_are_cut_as_rarely_as_asked():
    tokens = VOCAB.words[:50]
    cut = [len(e.inputs) for e in repeated(create("mdlm"), tokens, 20_000)]
    within(sum(n < 50 for n in cut), 20_000, 0.01 * 49 / 50)
    lengths = Counter(len(e.inputs) for e in repeated(create("mdlm", random_length=1.0), tokens, 10_000))
    fits([lengths[n] for n in range(1, 51)], 200)
    weights = [e.targets["mdlm"].weights.max() for e in repeated(create("mdlm", random_length=0), tokens, 10_000)]
    seen = np.histogram([1 / w for w in weights if w], bins=10, range=(0.001, 1))[0][3:]  # p, where something is masked
    fits(seen, seen.sum() / 7)


def electra(mesh, vocab, std):
    """The objective and a tiny network for it."""
    size = {"layers": 1, "hidden": 16, "heads": 4, "positions": 64}
    model, e = ModelConfig(preset="bert-1m", vocab=vocab, init_std=std, **size), create("electra")
    build = Build(model, mesh, e.kind, 64, heads=e.heads, generator=e.generator)
    network = Network(build).eval().requires_grad_(False)
    initialise(network, build, 0)
    return e, network


ONE = SimpleNamespace(gather=lambda x: (x, 0))
"""The only data rank."""


def electra_batch(rows):
    return collate([[e] for _, e in examples(create("electra"), rows, 64)], create("electra"), VOCAB, 64)


def test_electra_starts_at_ln_v_and_fifty_ln_2(mesh):
    """10.3262 + 50 x 0.6931 = 44.98 with BERT's vocabulary."""
    objective, network = electra(mesh, 30522, 0.02)
    batch = electra_batch(8)
    criterion = Criterion(objective, ONE, 1.0)
    criterion.start({head.name: batch.targets[head.name].total for head in objective.heads})
    network(batch, criterion)
    loss = weighted_mean(criterion.sums, criterion.totals, objective.heads)
    assert loss == pytest.approx(44.98, abs=0.1)


def test_a_lucky_guess_of_the_generator_counts_as_real():
    batch = electra_batch(8)
    original, chosen = batch.targets["mlm"].labels, batch.targets["mlm"].weights != 0
    lucky = chosen & (torch.arange(64) % 2 == 0)
    tokens = torch.where(lucky, original, torch.where(chosen, original + 1, batch.inputs))
    told = SimpleNamespace(tokens=tokens, nll=lambda head, labels, weights: labels * (weights != 0))
    assert create("electra").loss(told, batch, ONE)["rtd"] == (chosen & ~lucky).sum() > 0
    assert torch.equal(batch.targets["rtd"].weights != 0, batch.attention.segment > 0)


def test_electra_masks_85_and_keeps_15():
    found = Counter()
    for _, e in examples(create("electra"), 3000):
        chosen = e.targets["mlm"].weights == 1
        inputs, labels = e.inputs[chosen], e.targets["mlm"].labels[chosen]
        found.update(mask=int((inputs == VOCAB.mask).sum()), kept=int((inputs == labels).sum()), all=len(inputs))
    assert found["mask"] + found["kept"] == found["all"]
    within(found["mask"], found["all"], 0.85)


def test_gumbel_samples_follow_softmax():
    """One draw for each of 20,000 positions; a tensor rank's slice of the vocabulary has the same noise."""
    logits = torch.tensor([2.0, 1, 0, -1, 0.5, 0.3, -2, 1.5, 0, 0, 3, -3])
    keys = row_keys(torch.randint(0, 1000, (400, 50), generator=torch.Generator().manual_seed(0))).flatten()
    drawn = (logits + gumbel(keys, 0, 12)).argmax(1)
    fits(np.bincount(drawn, minlength=12), 20_000 * torch.softmax(logits, 0).numpy())
    assert torch.equal(gumbel(keys, 5, 7), gumbel(keys, 0, 12)[:, 5:])


def test_no_gumbel_noise_is_infinite(monkeypatch):
    """The largest and the smallest that there can be: an infinite one would win over any logit."""
    for bits in (-1, 0):
        monkeypatch.setattr("ds_pretrain.models.noise.mix", lambda x, bits=bits: torch.full_like(x, bits))
        noise = gumbel(torch.zeros(1, dtype=torch.int64), 0, 1)
        assert noise.isfinite().all() and -3 < noise.item() < 17


def test_electra_fills_a_row_alike_in_every_micro_batch(mesh):
    objective, network = electra(mesh, VOCAB.size, 0.5)
    rows = [[e] for _, e in examples(objective, 9, 64)]
    parts = [rows, rows[::-1], *([row] for row in rows)]
    together, turned, *alone = (network(collate(x, objective, VOCAB, 64), lambda read, _: read.tokens) for x in parts)
    assert torch.equal(together, turned.flip(0)) and torch.equal(together, torch.cat(alone))
    chosen = electra_batch(9).targets["mlm"].weights != 0
    assert len(together[chosen].unique()) > 20 and not (together == VOCAB.mask)[chosen].all()


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize(("n", "start"), [(64, 4.1589), (512, 6.2383)])
def test_simcse_is_the_loss_of_its_authors(n, start, supervised):
    """Cosines of every first view with all second views and hard negatives over 0.05; the own second view is right. Where
    all are equally similar it is ln n, or ln 2n with hard negatives."""
    objective, parts = create("simcse", supervised=supervised), 2 + supervised
    lines = np.concatenate([TOKENIZER.encode("a line\n")] * 3)
    examples = [objective.example([Document(lines)], VOCAB, 64, rng.generator(i)) for i in range(n)]
    batch = collate([[e] for e in examples], objective, VOCAB, 64)

    def loss(found):
        return objective.loss(SimpleNamespace(embed=lambda head, chosen: found), batch, ONE)["simcse"] / n

    z = torch.randn(n, parts, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    others = [F.cosine_similarity(z[:, :1], z[None, :, k], dim=-1) / 0.05 for k in range(1, parts)]
    expected = F.cross_entropy(torch.cat(others, 1), torch.arange(n))
    ours = loss(z.flatten(0, 1))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (ours, expected)))
    heavy = replace(objective, hard_negative_weight=3.0)  # alpha of equation 8: the own hard negative counts as three
    hard = torch.cat(others, 1) + math.log(3) * torch.eye(n, n * (parts - 1)).roll(n, 1) * supervised
    found = heavy.loss(SimpleNamespace(embed=lambda head, chosen: z.flatten(0, 1)), batch, ONE)["simcse"] / n
    torch.testing.assert_close(found, F.cross_entropy(hard, torch.arange(n)))
    assert loss(torch.ones(n * parts, 8)).item() == pytest.approx(start + supervised * math.log(2), abs=1e-4)
