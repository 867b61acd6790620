"""What is drawn has the shares that the formula gives, to the byte, and depends on nothing but the texts."""

import random
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from ds_pretrain.data.balance import Share, balance, draw, measure, shares, table


def corpora(seed):
    """Sources of very different sizes with characters of one to four bytes."""
    rng = random.Random(seed)
    letters = {"en": "abcdef ", "zh": "日本語中文", "mixed": "aé語😀\n"}
    sizes = {"en": 300, "zh": 40, "mixed": 7}
    return {name: ["".join(rng.choices(letters[name], k=rng.randrange(1, 60))) for _ in range(sizes[name])] for name in letters}


@pytest.mark.parametrize("temperature", [1, 1 / 0.7, 1 / 0.3, 5])
def test_shares_follow_the_published_formula(temperature):
    counts = np.array([55_608.0, 2_733.0, 0.5]) * 1e6  # millions of tokens of English, Finnish and a small one
    q = counts / counts.sum()
    expected = q ** (1 / temperature) / (q ** (1 / temperature)).sum()
    found = shares({str(i): int(n) for i, n in enumerate(counts)}, temperature, 10**9)
    assert np.allclose([share.probability for share in found], expected, rtol=1e-9)
    assert abs(sum(share.drawn for share in found) - 10**9) <= len(found)


def test_the_ends_of_the_scale():
    sizes = {"large": 9_000, "small": 1_000}
    assert [share.drawn for share in shares(sizes, 1)] == [9_000, 1_000]
    assert [share.drawn for share in shares(sizes, 1e9)] == [5_000, 5_000]
    assert [share.epochs for share in shares(sizes, 1e9)] == [5 / 9, 5.0]


@pytest.mark.parametrize("seed", range(5))
def test_every_source_gets_its_bytes(seed):
    texts = corpora(seed)
    sources = {name: lambda name=name: texts[name] for name in texts}
    for temperature, budget in ((1, None), (3.33, None), (2, 1_000), (50, 40_000)):
        for share in shares(measure(sources), temperature, budget):
            drawn = list(draw(sources[share.name], share.drawn, share.size, seed))
            assert 0 <= share.drawn - sum(len(text.encode()) for text in drawn) <= 3
            times = Counter(drawn)
            whole = Counter(texts[share.name])
            low, high = int(share.epochs), int(share.epochs) + 1
            cut = [text for text in times if not low * whole[text] <= times[text] <= high * whole[text]]
            assert len(cut) <= 1 and all(any(full.startswith(text) for full in whole) for text in cut)


def test_order_changes_nothing_and_the_seed_does():
    texts = corpora(3)
    sources = {name: lambda name=name: texts[name] for name in texts}
    backwards = {name: lambda name=name: texts[name][::-1] for name in texts}
    plan = shares(measure(sources), 3.33)
    assert sorted(balance(sources, plan)) == sorted(balance(backwards, plan))
    assert sorted(balance(sources, plan)) != sorted(balance(sources, plan, seed=1))


def test_what_cannot_be_balanced_says_so():
    with pytest.raises(ValueError, match="source zh has no text"):
        shares({"en": 5, "zh": 0}, 1)
    for temperature in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            shares({"en": 5}, temperature)
    with pytest.raises(ValueError, match="there must be a source"):
        shares({}, 1)


def test_a_person_sees_the_plan():
    console = Console(record=True, width=100)
    console.print(table((Share("en", 9_000, 0.6, 6_000), Share("zh", 1_000, 0.4, 4_000)), 3.33))
    shown = console.export_text()
    assert "temperature 3.33" in shown and "90.0%" in shown and "40.0%" in shown and "4.00" in shown
