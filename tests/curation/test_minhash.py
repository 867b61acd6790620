"""Hashes of n-grams are those of the n-grams, whatever is hashed beside them; signatures tell how similar their sets are."""

import random

import numpy as np
import pytest
from planted import edited, grams, jaccard, planted, words

from ds_pretrain.curation.minhash import MinHash, estimate, found_by
from ds_pretrain.curation.minhash import jaccard as similarity
from ds_pretrain.curation.shingles import Grams, batches

STRANGE = [
    "",
    " ",
    "a",
    "\0\0",
    "a\0b",
    "über Straße 東京",
    "東京都",
    "...",
    "a_b",
    "A a",
    "\ud800 lone",
    "x" * 5000,
    "1,000.5",
]


def sets(texts, how):
    found = how.of(texts)
    return [set(found.hash[found.text == i].tolist()) for i in range(len(texts))]


@pytest.mark.parametrize("n", [1, 2, 5, 70])
@pytest.mark.parametrize("unit", ["word", "char"])
def test_hashes_are_equal_where_the_grams_are(unit, n):
    """As many distinct hashes as distinct n-grams, and the same in common between any two texts."""
    draw = random.Random(n)
    texts = [" ".join(words(draw, draw.randrange(0, 40), 30)) for _ in range(60)]
    split = (lambda text: [c for c in text if c != " "]) if unit == "char" else str.split
    known = []
    for text in texts:
        found = split(text)
        known.append({tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))} if found else set())
    hashed = sets(texts, Grams(unit=unit, n=n))
    for i, one in enumerate(known):
        for j, other in enumerate(known):
            assert len(hashed[i] & hashed[j]) == len(one & other), (texts[i], texts[j])


@pytest.mark.parametrize("unit", ["word", "char"])
def test_a_text_has_the_same_hashes_alone_and_among_others(unit):
    how = Grams(unit=unit, n=3)
    together = sets(STRANGE, how)
    assert together == [sets([text], how)[0] for text in STRANGE]
    assert [text for group in batches(STRANGE) for text in group] == STRANGE


def test_case_punctuation_and_space_do_not_count_but_words_do():
    how = Grams(n=2)
    same = ["The cat, sat.", "the  CAT\nsat", "«the» cat—sat…", "\u201cthe\u00a0cat\u201d\u3000sat\u2019"]
    assert len({frozenset(each) for each in sets(same, how)}) == 1
    found = Grams(n=1).units(["a—b"])
    assert found.start.tolist() == [0, 4] and found.stop.tolist() == [1, 5], "places are those of the text as it is"
    assert sets(["the cat sat"], how) != sets(["the cats at"], how)
    assert sets(["ab c"], Grams(n=1)) != sets(["a bc"], Grams(n=1))


def test_units_say_where_they_lie():
    text = "  Äpfel und 2 Birnen. "
    for unit in ("word", "char"):
        found = Grams(unit=unit).units(["x", text])
        mine = found.text == 1
        spans = zip(found.start[mine].tolist(), found.stop[mine].tolist(), strict=True)
        told = [text.encode()[start:stop].decode() for start, stop in spans]
        assert told == (text.replace(".", "").split() if unit == "word" else list("ÄpfelundBirnen".replace("B", "2B")))


@pytest.mark.parametrize("length", [8, 25, 200])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.15])
def test_signatures_estimate_the_true_similarity(length, share):
    """Unbiased, and no more scattered than K independent draws would be (twice, where a text has four)."""
    draw, how = random.Random(length), MinHash()
    errors, spread = [], []
    for _ in range(300):
        text = words(draw, length, 10**6)
        pair = [" ".join(text), " ".join(edited(draw, text, share))]
        true = jaccard(*pair)
        errors.append(estimate(*how.signatures(pair)) - true)
        spread.append(true * (1 - true) / how.bins)
    assert abs(np.mean(errors)) < 4 * np.sqrt(np.mean(spread) / len(errors)) * 1.5 + 1e-3
    assert np.std(errors) < (2 if length == 8 else 1.5) * np.sqrt(np.mean(spread)) + 1e-3


def test_a_signature_does_not_depend_on_what_is_signed_beside_it():
    texts, _ = planted(10, 20)
    how = MinHash(bins=64)
    alone = np.concatenate([how.signatures([text]) for text in [*texts, *STRANGE]])
    assert np.array_equal(how.signatures([*texts, *STRANGE]), alone)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_what_was_asked_for(threshold):
    how = MinHash(threshold=threshold)
    assert how.curve(np.array([threshold]))[0] >= 1 - how.missed
    assert how.bands * how.rows <= how.bins
    more = how.rows + 1
    assert more > how.bins or found_by(threshold, how.bins // more, more) < 1 - how.missed, "fewer false pairs were possible"
    draw = random.Random(1)
    pairs = [
        [" ".join(t), " ".join(edited(draw, t, draw.uniform(0, 0.08)))] for t in (words(draw, 150, 10**6) for _ in range(400))
    ]
    keys = [how.keys(how.signatures(pair)) for pair in pairs]
    met = np.array([(a == b).any() for a, b in keys])
    expected = how.curve(np.array([jaccard(*pair) for pair in pairs]))
    assert abs(met.sum() - expected.sum()) < 4 * np.sqrt((expected * (1 - expected)).sum()) + 0.03 * len(pairs)


def test_jaccard_of_hashes_is_jaccard_of_words():
    texts, _ = planted(20, 0)
    how = MinHash()
    hashed = [np.unique(how.grams.of([text]).hash) for text in texts]
    for one in range(0, len(texts), 3):
        for other in range(len(texts)):
            assert similarity(hashed[one], hashed[other]) == pytest.approx(jaccard(texts[one], texts[other]), abs=1e-12)
    assert len(grams("")) == 0 and similarity(np.zeros(0), np.zeros(0)) == 0.0


@pytest.mark.parametrize(
    "fields, told", [({"bins": 100}, "power of two"), ({"threshold": 0.0}, "threshold 0"), ({"threshold": 0.01}, "raise bins")]
)
def test_settings_that_cannot_work_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        MinHash(**fields)
