"""Samples of one size, by tier, whoever draws them."""

import pydoc_data.topics

import pytest
from planted import digests, jsonl

from ds_pretrain.curation import reading
from ds_pretrain.curation.prepare import split_of
from ds_pretrain.curation.reading import read
from ds_pretrain.curation.sampling import sample
from ds_pretrain.curation.screening import screening
from ds_pretrain.curation.workers import Workers, workers
from ds_pretrain.data import sources

HERE = Workers(quiet=True)
SIZE = 20_000


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Documents in several parts, with their tiers."""
    folder = tmp_path_factory.mktemp("labelled")
    texts = list(dict.fromkeys(pydoc_data.topics.topics.values()))[:60]
    for i in range(4):
        jsonl(folder / f"text/{i}.jsonl", texts[i::4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT", 1)
        patch.setattr(reading, "PART", 10_000)
        return screening(read([str(folder / "text")], folder / "read", HERE), folder / "labels", HERE, label=["tier"])


def size_of(rows):
    return sum(len(row.text.encode()) for row in rows)


def test_a_sample_is_as_large_as_asked_to_the_last_document_that_fits(labelled, tmp_path):
    small, large = (sample(labelled, tmp_path / str(size), HERE, size=size) for size in (SIZE, 3 * SIZE))
    for drawn, size in ((small, SIZE), (large, 3 * SIZE)):
        left = size - size_of(drawn.rows())
        assert 0 <= left < min(size_of([dropped.row]) for dropped in drawn.dropped())
    shared = {row.number for row in small.rows()} & {row.number for row in large.rows()}
    assert len(shared) > len(list(small.rows())) / 2
    kept, dropped = len(list(small.rows())), len(list(small.dropped()))
    assert kept + dropped == 60 == small.report["documents"] + sum(small.report["dropped"].values())
    assert small.report["dropped"] == {"enough without it": dropped}


def test_tiers_are_apart(labelled, tmp_path):
    tiers = {row.tier for row in labelled.rows()}
    found = {tier: {row.number for row in sample(labelled, tmp_path / tier, HERE, tier).rows()} for tier in tiers}
    assert len(tiers) > 1 and sorted(n for numbers in found.values() for n in numbers) == sorted(
        r.number for r in labelled.rows()
    )


def test_the_bytes_do_not_depend_on_who_draws(labelled, tmp_path):
    sample(labelled, tmp_path / "one", HERE, size=SIZE)
    with workers(2, quiet=True) as team:
        sample(labelled, tmp_path / "two", team, size=SIZE)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_what_cannot_be_drawn_is_told(labelled, tmp_path):
    everything = size_of(labelled.rows())
    told = f"has {everything:,} bytes to train on, {10 * everything:,} are asked for: ask for less"
    with pytest.raises(ValueError, match=told):
        sample(labelled, tmp_path / "none", HERE, size=10 * everything)
    with pytest.raises(ValueError, match=r"label its documents first \(screen --labels tier\)"):
        sample(labelled.__class__(labelled.path.with_name("read")), tmp_path / "none", HERE, "high", 10)
    with pytest.raises(ValueError, match="unknown tier 'hihg': did you mean 'high'"):
        sample(labelled, tmp_path / "none", HERE, "hihg")
    assert not list(tmp_path.iterdir()), "nothing is left of what failed"
    assert sample(labelled, tmp_path / "none", HERE, size=SIZE).report["documents"], "asked for less"


def test_what_a_split_will_hold_out_stays_whole(labelled, tmp_path):
    shares = (0.6, 0.2, 0.2)
    apart = {row.number for row in labelled.rows() if split_of(row.text, shares) != "train"}
    found = list(sample(labelled, tmp_path / "out", HERE, size=SIZE, shares=shares).rows())
    kept = {row.number for row in found}
    assert apart and apart < kept
    left = SIZE - size_of(row for row in found if row.number not in apart)
    assert 0 <= left < min(size_of([row]) for row in labelled.rows() if row.number not in kept)
