"""Laws that hold for every registered objective, and the numbers that clm and mlm must reproduce."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from text import VOCAB, real_document

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Document
from ds_pretrain.data.dataset import Samples
from ds_pretrain.objectives import REGISTRY, CausalLanguageModeling, MaskedLanguageModeling, create

LENGTHS = [1, 2, 3, 7, 50, 127, 10_000]
WORDS = VOCAB.words
MAX_LEN = 128

objectives = pytest.mark.parametrize("name", list(REGISTRY))


def documents(objective, tokens, seed=0, specials=()):
    """As many documents as one example takes, each of at most `tokens` tokens and ending as documents do."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(objective.documents):
        words = random.choice(WORDS, size=max(objective.shortest, min(tokens, objective.piece(MAX_LEN)))).astype(np.int32)
        words[[i for i in specials if i < len(words)]] = VOCAB.sep
        if objective.eod:
            words[-1] = VOCAB.eod
        made.append(Document(words))
    return made


def example(objective, docs, *key):
    return objective.example(docs, VOCAB, MAX_LEN, rng.generator("test", *key))


def made(name, keys=5):
    """(objective, documents, example) for random ids of all lengths and for pieces of real texts: 2,000 documents."""
    objective = create(name)
    for number in range(2000):
        if number < keys * len(LENGTHS):
            docs = documents(objective, LENGTHS[number % len(LENGTHS)], number)
        else:
            docs = real_document(objective, MAX_LEN, number)
        yield objective, docs, example(objective, docs, number)


def parts(e):
    """The segments of an example."""
    return (e, *e.then)


def planes(e):
    arrays = [a for x in parts(e) for a in (x.inputs, x.horizon, x.token_type) if a is not None]
    return arrays + [a for x in parts(e) for t in x.targets.values() for a in (t.labels, t.weights)]


@objectives
def test_the_same_key_gives_the_same_example_and_leaves_the_document_alone(name):
    for number, (objective, docs, first) in enumerate(made(name)):
        before = [doc.tokens.copy() for doc in docs]
        again = example(objective, docs, number)
        assert all(np.array_equal(a, b) for a, b in zip(planes(again), planes(first), strict=True))
        assert all(np.array_equal(doc.tokens, tokens) for doc, tokens in zip(docs, before, strict=True))
        assert not any(np.shares_memory(part.inputs, doc.tokens) for part in parts(first) for doc in docs)


@objectives
def test_an_example_stands_between_cls_and_sep_where_it_says_so(name):
    firsts = {(e.inputs[0] == VOCAB.cls) for _, _, e in itertools.islice(made(name), 300)}
    assert create(name).framed in firsts and (create(name).framed or firsts == {False})
    if name != "mixture":
        assert firsts == {create(name).framed}


@objectives
def test_an_example_keeps_its_promised_size(name):
    for objective, docs, e in made(name):
        bound = int(objective.size(np.array([len(docs[0].tokens)]))[0])
        assert 1 <= sum(len(part.inputs) for part in parts(e)) <= bound <= MAX_LEN
        for part in parts(e):
            found = [part.horizon, *(a for t in part.targets.values() for a in (t.labels, t.weights))]
            assert all(len(plane) == len(part.inputs) for plane in found)
            assert part.token_type is None or len(part.token_type) == len(part.inputs)
    assert int(objective.size(np.array([objective.piece(MAX_LEN)]))[0]) <= MAX_LEN


@objectives
def test_sizes_are_a_vector_that_grows_with_the_piece(name):
    objective = create(name)
    tokens = np.arange(objective.shortest, objective.piece(MAX_LEN) + 1)
    for maker in (objective, *objective.variants):
        sizes = maker.size(tokens)
        assert sizes.shape == tokens.shape and (np.diff(sizes) >= 0).all()
        assert (sizes <= objective.size(tokens)).all()


@objectives
def test_every_variant_keeps_its_own_size(name):
    objective = create(name)
    for number in range(300):
        docs = real_document(objective, MAX_LEN, number)
        for variant in objective.variants:
            e = variant.example(docs, VOCAB, MAX_LEN, rng.generator("variant", number))
            assert sum(len(part.inputs) for part in parts(e)) <= int(variant.size(np.array([len(docs[0].tokens)]))[0])


@objectives
def test_every_position_sees_itself_and_nothing_outside_its_segment(name):
    for _, _, e in made(name):
        for part in parts(e):
            here = np.arange(len(part.inputs))
            assert (part.horizon >= here).all() and (part.horizon < len(here)).all()


@objectives
def test_the_kind_of_attention_is_the_promised_one(name):
    for objective, _, e in made(name):
        for part in parts(e):
            here = np.arange(len(part.inputs))
            if objective.kind == "causal":
                assert np.array_equal(part.horizon, here)
            if objective.kind == "full":
                assert (part.horizon == len(here) - 1).all()


@objectives
def test_what_bears_loss_is_a_real_label_under_a_declared_head(name):
    seen = set()
    for objective, _, e in made(name):
        heads = {head.name: head for head in objective.heads}
        for part in parts(e):
            assert set(part.targets) <= set(heads)
            for head, target in part.targets.items():
                scored = target.labels[target.weights != 0]
                assert (scored >= 0).all() and (scored < (heads[head].classes or VOCAB.size)).all()
                assert (target.weights >= 0).all() and target.weights.dtype == np.float32
                seen |= {head} if len(scored) else set()
    assert seen == set(heads), "every head has something to learn from"


@objectives
def test_the_total_is_the_sum_of_the_weights_or_says_otherwise(name):
    """Masked diffusion divides by the number of maskable tokens; every other objective by its weights."""
    for objective, _, e in made(name):
        for target in (target for part in parts(e) for target in part.targets.values()):
            assert np.isfinite(target.total) and target.total >= 0
            assert target.total > 0 or not target.weights.any()
            if objective.measure != "bound":
                assert target.total == pytest.approx(float(target.weights.sum()))


@objectives
def test_a_position_is_never_shown_the_answer_that_it_is_asked_for(name):
    """Of a head over the vocabulary: a later position is the label of an earlier one only where the earlier cannot see it,
    and a position that predicts itself reads its own token by intent alone (the kept 10% of masked LM)."""
    shown = asked = 0
    for objective, _, e in made(name):
        words = {head.name for head in objective.heads if head.classes is None}
        for part in parts(e):
            for head in words & set(part.targets):
                at = np.flatnonzero(part.targets[head].weights)
                labels = part.targets[head].labels
                if (part.inputs == VOCAB.mask).any():  # hides: shows what it asks for by intent alone
                    shown, asked = shown + (part.inputs == labels)[at].sum(), asked + len(at)
                elif len(labels) > 1 and np.array_equal(labels[:-1], part.inputs[1:]):  # predicts the next token
                    assert (part.horizon[at] <= at).all()
    assert shown <= 0.16 * asked  # 15% of electra's are kept


@objectives
def test_inputs_are_ids_of_the_vocabulary(name):
    for _, _, e in made(name):
        for part in parts(e):
            assert part.inputs.dtype == np.int32 and (part.inputs >= 0).all() and (part.inputs < VOCAB.size).all()
            assert not (part.inputs == VOCAB.pad).any()


@objectives
def test_special_tokens_are_never_masked_and_words_are_never_swapped_for_them(name):
    """Position by position where an example keeps its document in place, which those that write [MASK] do."""
    objective = create(name)
    for key in range(200):
        e = example(objective, documents(objective, 100, key, specials=(10, 11, 12, 50)), key)
        for part in parts(e):
            if not (part.inputs == VOCAB.mask).any():
                continue
            words = {head.name for head in objective.heads if head.classes is None}
            for target in (part.targets[head] for head in words & set(part.targets)):
                scored = target.weights != 0
                assert not VOCAB.is_special[target.labels[scored]].any()
                assert not VOCAB.is_special[part.inputs[scored & (part.inputs != VOCAB.mask)]].any()


@objectives
def test_too_short_rows_are_refused_with_the_numbers(name):
    (problem, *_) = create(name).check(VOCAB, 2)
    assert "2" in problem and "too short" in problem
    assert create(name).check(VOCAB, 512) == []


@objectives
def test_unknown_fields_name_the_nearest(name):
    with pytest.raises(ValueError, match=f"unknown field of objective {name}"):
        create(name, nonsense=1)


def test_fields_are_the_parameters_and_numbers_are_numbers():
    with pytest.raises(ValueError, match=r"unknown field of objective mlm 'kind'.* Known: mask_prob"):
        create("mlm", kind="causal")
    for wrong in ("a", None, True, [0.1]):
        with pytest.raises(ValueError, match=r"objective.mask_prob of mlm is a number, got"):
            create("mlm", mask_prob=wrong)
    assert create("mixture", weights={"mlm": 1, "x": 1}, options={"x": {"name": "mlm", "mask_token_prob": 0.5}}).expected == {
        "mlm/rate": 0.15, "x/rate": 0.15, "mlm/samples": 0.5, "x/samples": 0.5,
        "mlm/mask": 0.8, "mlm/random": 0.1, "mlm/kept": pytest.approx(0.1),
        "x/mask": 0.5, "x/random": 0.1, "x/kept": pytest.approx(0.4),
    }  # fmt: skip


def test_clm_predicts_every_token_of_a_document_exactly_once():
    tokens = np.append(np.random.default_rng(0).choice(WORDS, 300), VOCAB.eod).astype(np.int32)
    pieces = [Document(tokens[i : i + 64], None if i == 0 else int(tokens[i - 1])) for i in range(0, len(tokens), 64)]
    examples = [CausalLanguageModeling().example([p], VOCAB, 64, rng.generator(0)) for p in pieces]
    assert np.array_equal(np.concatenate([e.targets["clm"].labels for e in examples]), tokens)
    assert np.array_equal(np.concatenate([e.inputs for e in examples]), np.concatenate(([VOCAB.eod], tokens[:-1])))
    assert all((e.targets["clm"].weights == 1).all() for e in examples)


def test_clm_without_eod_loss_leaves_out_the_end_only():
    docs = documents(CausalLanguageModeling(), 10)
    target = example(CausalLanguageModeling(eod_loss=False), docs, 0).targets["clm"]
    assert target.weights.tolist() == [1] * 9 + [0] and target.total == 9


@pytest.mark.parametrize("tokens", [1, 2, 3, 10, 100, 126])
def test_mlm_exact_selection_counts_as_bert_does(tokens):
    """max(1, round(p * n)) of the real tokens: two of these are special and do not count."""
    objective = MaskedLanguageModeling()
    specials = (0, 5) if tokens > 9 else ()
    e = example(objective, documents(objective, tokens, specials=specials), 0)
    assert e.targets["mlm"].total == max(1, round(0.15 * (tokens - len(specials))))


def corrupted(objective, total=1_000_000):
    """inputs, labels, weights of a million tokens, each document with two special ids in its middle."""
    examples = [example(objective, documents(objective, 126, k, specials=(40, 41)), k) for k in range(-(-total // 126))]
    targets = [e.targets["mlm"] for e in examples]
    inputs = np.concatenate([e.inputs for e in examples])
    return inputs, np.concatenate([t.labels for t in targets]), np.concatenate([t.weights for t in targets])


def within(count, total, share):
    """Five standard deviations of a binomial."""
    assert abs(count / total - share) < 5 * np.sqrt(share * (1 - share) / total), f"{count / total:.5f} for {share}"


@pytest.fixture(scope="module", params=["exact", "bernoulli"])
def million(request):
    return request.param, *corrupted(MaskedLanguageModeling(selection=request.param))


def test_mlm_rates_over_a_million_tokens(million):
    selection, inputs, labels, weights = million
    real = ~VOCAB.is_special[labels]
    chosen = weights == 1
    share = round(0.15 * 124) / 124 if selection == "exact" else 0.15
    within(chosen.sum(), real.sum(), share)
    masked, words = inputs == VOCAB.mask, len(WORDS)
    within((chosen & masked).sum(), chosen.sum(), 0.8)
    within((chosen & ~masked & (inputs != labels)).sum(), chosen.sum(), 0.1 * (1 - 1 / words))
    within((chosen & (inputs == labels)).sum(), chosen.sum(), 0.1 * (1 + 1 / words))


def test_mlm_touches_no_special_and_inserts_none(million):
    _, inputs, labels, weights = million
    special = VOCAB.is_special[labels]
    assert not weights[special].any()
    assert np.array_equal(inputs[weights == 0], labels[weights == 0])
    inserted = inputs[(inputs != labels) & (inputs != VOCAB.mask)]
    assert not VOCAB.is_special[inserted].any()
    assert len(np.unique(inserted)) == len(WORDS), "random words are uniform over the real vocabulary"
    counts = np.bincount(inserted, minlength=1000)[WORDS]
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi - len(WORDS) + 1) < 5 * np.sqrt(2 * len(WORDS))


def test_mlm_chooses_every_position_equally_often(million):
    _, _, labels, weights = million
    columns = weights.reshape(-1, 128)[:, ~VOCAB.is_special[labels.reshape(-1, 128)[0]]]
    for count in columns.sum(axis=0):
        within(count, len(columns), columns.mean())


def test_mlm_agrees_with_transformers():
    """The three shares of DataCollatorForLanguageModeling over as many tokens, as the difference of two samples."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizerFast(vocab=_wordpieces(), do_lower_case=False)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15, seed=0)
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 1000, size=(4000, 126)))
    rows = torch.cat([torch.full((4000, 1), 2), ids, torch.full((4000, 1), 3)], dim=1)
    out = collator([{"input_ids": row} for row in rows])
    chosen = (out["labels"] != -100).numpy()
    inputs, labels = out["input_ids"].numpy(), rows.numpy()
    theirs = _shares(inputs, labels, chosen, tokenizer.mask_token_id, 4000 * 126)
    inputs, labels, weights = corrupted(MaskedLanguageModeling(selection="bernoulli"), 4000 * 126)
    ours = _shares(inputs, labels, weights == 1, VOCAB.mask, int((~VOCAB.is_special[labels]).sum()))
    for (a, n), (b, m) in zip(ours, theirs, strict=True):
        assert abs(a - b) < 5 * np.sqrt(a * (1 - a) * (1 / n + 1 / m)), (ours, theirs)


def _shares(inputs, labels, chosen, mask, real):
    count = int(chosen.sum())
    masked, kept = (int((chosen & (inputs == other)).sum()) for other in (mask, labels))
    return [(count / real, real), (masked / count, count), (kept / count, count)]


def _wordpieces():
    return {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(995))])}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_prob": 0}, "mask_prob must lie between 0 and 1, got 0"),
        ({"mask_prob": 1.5}, "got 1.5"),
        ({"mask_token_prob": 0.95}, "mask_token_prob 0.95 and random_token_prob 0.1"),
        ({"random_token_prob": -0.1}, "must not be negative"),
        ({"selection": "some"}, "'exact' or 'bernoulli', got 'some'"),
    ],
)
def test_mlm_refuses_impossible_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModeling(**fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": "simcse", "length": "x"}, "length of simcse is a whole number"),
        ({"name": "mlm", "span_max": 2.5}, "span_max of mlm is a whole number"),
        ({"name": "clm", "eod_loss": "no"}, "eod_loss of clm is true or false"),
        ({"name": "electra", "rtd_weight": math.nan}, "rtd_weight of electra is a number"),
        ({"name": "mixture", "weights": 3}, "weights of mixture is a mapping"),
        ({"name": "mixture", "weights": {"clm": "a"}}, "weights of a mixture are numbers, got clm='a'"),
        ({"name": "mixture", "weights": {"clm": math.nan}}, "weights of a mixture are numbers"),
        ({"name": "mixture", "weights": {"mixture": 1.0, "clm": 1.0}}, "mixture cannot be a component"),
        ({"name": "prefix_lm", "ratio": "0.5"}, "ratio of prefix_lm is a number"),
        ({"name": "simcse", "mlm": 3}, "mlm of simcse has the fields of masked LM"),
        ({"name": "mixture", "schedule": 3}, "schedule of mixture is a mapping"),
        (
            {"name": "mixture", "weights": {"mlm": 1, "nsp.2": 1}, "options": {"nsp.2": {"name": "nsp"}}},
            "nsp.2: a component's name has no dot",
        ),
        (
            {"name": "mixture", "weights": {"simcse": 1, "hot": 1}, "options": {"hot": {"name": "simcse", "temperature": 1}}},
            "simcse, hot: a mixture has one contrastive component at most",
        ),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_name(fields, told):
    with pytest.raises(ValueError, match=told):
        create(**fields)


def test_a_whole_float_is_a_whole_number():
    assert type(create("mlm", span_max=3.0).span_max) is int


def test_mixtures_that_cannot_be_are_refused_with_the_components():
    no_words = create("mixture", weights={"clm": 0.5, "nsp": 0.5}, by="tokens")
    assert no_words.check(VOCAB, 128) == ["by=tokens needs a loss over the vocabulary, nsp has none: use by=samples"]
    options = {"simcse": {"length": 3}}
    short = create("mixture", weights={"simcse": 0.5, "sop": 0.5}, by="samples", options=options)
    assert short.check(VOCAB, 128) == [
        "simcse takes 3 tokens of a document at most, sop needs 11: they cannot be mixed like this"
    ]
    assert create("simcse", mlm={"mask_prob": 0.3}, mlm_weight=0.1).mlm.mask_prob == 0.3


def test_a_triplet_that_does_not_fit_or_is_none_is_refused_before_training():
    """One of a thousand documents is enough: a cut triplet trains on wrong pairs."""
    line = [*VOCAB.words[:5].tolist()]
    objective = create("simcse", supervised=True)
    vocab = replace(VOCAB, surfaces=lambda: ["\n" if i == VOCAB.words[0] else "a" for i in range(VOCAB.size)])
    ends = [*VOCAB.words[1:5].tolist(), int(VOCAB.words[0])]
    for bad, told in (
        (ends * 2, "2 lines where simcse with objective.supervised=true needs three"),
        (ends * 2 + line * 20, r"\d+ tokens, 58 fit a row of 64"),
    ):
        store = Listed([[*ends * 3, VOCAB.eod]] * 999 + [[*bad, VOCAB.eod]])
        with pytest.raises(ValueError, match=rf"1 of 1000 documents .* document 999 has {told}"):
            Samples(store, vocab, 64, objective, "train", 0)


def test_nothing_but_its_words_tells_a_hard_negative_from_a_positive():
    """The last line of a document mostly has no line end; the others must then have none either."""
    newline, words = int(VOCAB.words[0]), VOCAB.words[1:5].tolist()
    vocab = replace(VOCAB, surfaces=lambda: ["\n" if i == newline else "a" for i in range(VOCAB.size)])
    tokens = np.array([*words, newline, *words, newline, *words], dtype=np.int32)
    e = create("simcse", supervised=True).example([Document(tokens)], vocab, 64, rng.generator(0))
    assert len({part.inputs.tobytes() for part in parts(e)}) == 1 and newline not in e.inputs
    glued = replace(VOCAB, surfaces=lambda: [".\n" if i == newline else "a" for i in range(VOCAB.size)])
    assert "tell them apart" in create("simcse", supervised=True).unusable(Document(tokens), glued)


class Listed:
    """A store of given documents."""

    digest = "listed"

    def __init__(self, documents):
        self.documents = [np.array(ids, dtype=np.int32) for ids in documents]
        self.lengths = np.array([len(ids) for ids in documents])
        self.text = np.ones((len(documents), 2), dtype=np.int64)

    def slice(self, i, start, stop):
        return self.documents[i][start:stop]


def test_an_evaluation_of_a_mixture_scores_every_component_on_whole_documents():
    mixed = create("mixture", weights={"mlm": 1, "clm": 0}, schedule={9: {"mdlm": 1}}, options={"mdlm": {"eps": 0.01}})
    found = mixed.evaluated
    assert dict(found.weights) == {"mlm": 0.5, "clm": 0.0, "mdlm": 0.5} and not found.schedule
    assert (
        dict(found.options) == {"mdlm": {"eps": 0.01, "random_length": 0.0, "antithetic": False}} and found.heads == mixed.heads
    )


def test_a_bound_is_evaluated_on_whole_documents():
    assert create("mdlm", random_length=0.5).evaluated == create("mdlm", random_length=0.0, antithetic=False)
    assert create("clm").evaluated == create("clm")
