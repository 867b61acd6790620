"""The stream of rows: exactly once per epoch, the same for every reader; planes that keep examples apart."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from memory import VOCAB, MemoryStore, corpus

from ds_pretrain.core import rng
from ds_pretrain.data.collate import collate, realised
from ds_pretrain.data.dataset import EVALUATION, Cursor, PretrainingDataset, Samples
from ds_pretrain.data.store import Store, StoreWriter
from ds_pretrain.objectives import REGISTRY, CausalLanguageModeling, MaskedLanguageModeling, create

SEQ = 64
objectives = pytest.mark.parametrize("name", list(REGISTRY))


def dataset(name="mlm", store=None, **settings):
    settings = {"seq_len": SEQ, "source": "train", "seed": 0} | settings
    return Samples(store or corpus(), VOCAB, objective=name, **settings)


def epoch_of_rows(data, epoch):
    """All rows of one epoch, block by block."""
    rows, cursor = [], Cursor(epoch * data.blocks)
    while cursor.block < (epoch + 1) * data.blocks:
        found, cursor = data.rows(cursor, 1)
        rows += found
    return rows


def equal(a, b):
    planes = [(a.inputs, b.inputs), (a.position, b.position), (a.attention.segment, b.attention.segment)]
    planes += [(a.attention.horizon, b.attention.horizon)]
    for name, target in a.targets.items():
        assert target.total == b.targets[name].total
        planes += [(target.labels, b.targets[name].labels), (target.weights, b.targets[name].weights)]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in planes)


@objectives
@pytest.mark.parametrize("blocks", [None, 7])
def test_every_epoch_uses_every_piece_exactly_once(name, blocks):
    data = dataset(name)
    data.blocks = blocks or data.blocks
    orders = []
    for epoch in range(3):
        samples = [sample for row in epoch_of_rows(data, epoch) for sample in row]
        number = data.decode(samples)
        assert set(number.epoch.tolist()) == {epoch} and sorted(number.piece.tolist()) == list(range(len(data)))
        orders.append(number.piece.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert not np.array_equal(data._ordered(0)[1], data._ordered(data.blocks)[1])


@objectives
def test_the_pieces_hold_every_usable_token_once(name):
    store = corpus()
    data = dataset(name, store)
    tokens = np.concatenate([data.piece(i).tokens for i in range(len(data))])
    usable = store.lengths - (not data.objective.eod)
    long_enough = np.repeat(usable >= data.objective.shortest, store.lengths)
    wanted = long_enough if data.objective.eod else long_enough & (store.tokens != VOCAB.eod)
    assert np.array_equal(tokens, store.tokens[wanted])


def test_a_piece_knows_the_token_before_it():
    store = MemoryStore([200])
    data = dataset("clm", store)
    assert data.piece(0).before is None
    assert data.piece(1).before == store.tokens[SEQ - 1]


def test_empty_documents_are_counted_and_said():
    data = dataset("mlm", MemoryStore([1, 5, 1, 9]))
    assert len(data) == 2 and data.pieces.unusable == 2
    told = data.packing()[data.source]
    assert (told["documents"], told["too_short"], told["lost_tokens"]) == (4, 2, 0)
    data = dataset("sop", MemoryStore([2, 7, 6]))
    assert len(data) == 1 and data.packing()[data.source]["too_short"] == 2


@objectives
def test_any_reader_sees_the_same_rows(name):
    """One row at a time, many at a time, or from a cursor in the middle, over three epochs."""
    data, again = dataset(name), dataset(name)
    total = 3 * len(epoch_of_rows(data, 0))
    whole, end = data.rows(Cursor(), total)
    cursor, parts = Cursor(), []
    for count in [1, 2, 3, 50, total - 56]:
        found, cursor = again.rows(Cursor(*cursor), count)
        parts += found
    assert parts == whole and cursor == end


@objectives
def test_rows_are_planned_with_little_waste_and_never_overfilled(name):
    data = dataset(name)
    batch = data.collate(epoch_of_rows(data, 0))
    share = realised([batch], VOCAB, data.objective.heads)["useful"]
    assert share <= 1 - data.waste() + 0.02
    if data.objective.packed:
        assert data.waste() < (0.15 if len(data.variants) > 1 else 0.03)  # their longest pieces fit the largest only
    if name in ("clm", "mlm", "prefix_lm", "electra", "span_corruption"):  # sizes are exact
        assert share > 0.97


@objectives
def test_examples_of_a_row_never_see_each_other(name):
    data = dataset(name)
    rows, _ = data.rows(Cursor(), 8)
    batch = data.collate(rows)
    mask = batch.attention.dense()
    for r, row in enumerate(rows):
        at = 0
        segments = [part for sample in row for e in [data.example(sample)] for part in (e, *e.then)]
        for k, example in enumerate(segments, 1):
            here = slice(at, at + len(example.inputs))
            assert torch.equal(batch.inputs[r, here], torch.from_numpy(example.inputs.astype(np.int64)))
            assert batch.attention.segment[r, here].unique().tolist() == [k]
            assert batch.position[r, here].tolist() == list(range(len(example.inputs)))
            assert batch.attention.horizon[r, here].tolist() == (example.horizon + at).tolist()
            assert not mask[r, here, :at].any() and not mask[r, here, here.stop :].any()
            for head, target in example.targets.items():
                assert batch.targets[head].labels[r, here].tolist() == target.labels.tolist()
                assert batch.targets[head].weights[r, here].tolist() == target.weights.tolist()
            at = here.stop
        assert (batch.inputs[r, at:] == VOCAB.pad).all() and (batch.attention.segment[r, at:] == 0).all()
        assert batch.attention.horizon[r, at:].tolist() == list(range(at, SEQ))
        assert not mask[r, at:].any() and not mask[r, :, at:].any()
        assert all((target.weights[r, at:] == 0).all() for target in batch.targets.values())


@objectives
def test_totals_are_summed_over_rows(name):
    data = dataset(name)
    rows, _ = data.rows(Cursor(), 8)
    whole = [data.example(sample) for row in rows for sample in row]
    examples = [part for e in whole for part in (e, *e.then)]
    for head, target in data.collate(rows).targets.items():
        assert target.total == pytest.approx(sum(e.targets[head].total for e in examples if head in e.targets))


@pytest.mark.parametrize("switches", itertools.product([True, False], repeat=3))
def test_the_fast_way_of_clm_equals_the_examples(switches):
    eod_loss, position, attention = switches
    objective = CausalLanguageModeling(eod_loss=eod_loss, reset_position=position, reset_attention=attention)
    data = dataset(objective)
    rows = [*epoch_of_rows(data, 0), (), *epoch_of_rows(data, 1)[:5]]
    slow = collate([[data.example(s) for s in row] for row in rows], objective, VOCAB, SEQ)
    assert equal(data.collate(rows), slow)
    several = [i for i, row in enumerate(rows) if len(row) > 1]
    assert (slow.attention.segment[several].amax() == 1) == (not attention)
    assert torch.equal(slow.position[several], torch.arange(SEQ).expand(len(several), -1)) == (not position)


@objectives
def test_a_row_of_padding_contributes_exactly_nothing(name):
    batch = dataset(name).collate([(), ()])
    assert batch.inputs.shape == (2, SEQ) and (batch.inputs == VOCAB.pad).all()
    assert not batch.attention.dense().any()
    assert all(t.total == 0 and not t.weights.any() for t in batch.targets.values())


@objectives
def test_dtypes_are_the_contract(name):
    data = dataset(name)
    batch = data.collate(data.rows(Cursor(), 2)[0])
    assert (batch.inputs.dtype, batch.position.dtype) == (torch.int64, torch.int64)
    assert (batch.attention.segment.dtype, batch.attention.horizon.dtype) == (torch.int32, torch.int32)
    assert all((t.labels.dtype, t.weights.dtype) == (torch.int64, torch.float32) for t in batch.targets.values())
    assert list(batch.targets) == [head.name for head in data.objective.heads]


def test_masks_change_with_the_epoch_and_not_in_evaluation():
    data = dataset("mlm")
    first, second = data.example(3), data.example(3 + len(data))
    assert np.array_equal(first.targets["mlm"].labels, second.targets["mlm"].labels)
    assert not np.array_equal(first.inputs, second.inputs)
    a, b = (dataset("mlm").collate(dataset("mlm").evaluation(500).rows) for _ in range(2))
    assert equal(a, b)
    assert not np.array_equal(data.example(3 + EVALUATION * len(data)).inputs, first.inputs)


@pytest.mark.parametrize(("epoch", "word"), [(0, 0), (2, 2), (EVALUATION, "evaluation")])
def test_the_key_of_a_sample_is_the_published_one(epoch, word):
    data = dataset("mlm", seed=5)
    key = rng.generator(5, word, "train", 3, "mlm")
    expected = data.objective.example([data.piece(3)], VOCAB, SEQ, key)
    assert np.array_equal(data.example(epoch * len(data) + 3).inputs, expected.inputs)


def test_lengths_do_not_drift_within_a_block():
    """Packing makes rows of long pieces first; a reader must not notice."""
    data = dataset("clm", corpus(3000))
    counts = np.array([len(row) for row in epoch_of_rows(data, 0)[:1000]])
    assert abs(np.corrcoef(np.arange(1000), counts)[0, 1]) < 5 / np.sqrt(1000)


SHORT = {0: 16, 150: 32, 400: SEQ}


@objectives
def test_a_curriculum_cuts_early_pieces_and_loses_nothing(name):
    """Over two epochs: the first pieces give short examples, then longer ones, then whole ones, every token once."""
    objective = create(name)
    if objective.check(VOCAB, 16):
        with pytest.raises(ValueError, match="too short"):
            dataset(name, lengths=SHORT)
        return
    data, whole = dataset(name, lengths=SHORT), dataset(name)
    assert len(data) == len(whole)
    for epoch in (0, 1):
        number = data.decode([s for row in epoch_of_rows(data, epoch) for s in row])
        cut, pieces = data.slots.cut(number.piece, number.slot), data.pieces.cut(np.arange(len(data)))
        assert Counter(zip(cut.document, cut.start, strict=True)).most_common(1)[0][1] == 1
        assert (cut.stop - cut.start >= objective.shortest).all()
        assert (cut.stop - cut.start).sum() == (pieces.stop - pieces.start).sum()
    _, pieces, ordinal = data._ordered(0)
    for low, high, length in ((0, 150, 16), (150, 400, 32)):
        early = (ordinal >= low) & (ordinal < high)
        _, samples = data._planning(0, pieces[early], ordinal[early])
        found = [data.example(int(sample)) for sample in samples[:40]]
        assert max(sum(len(part.inputs) for part in (e, *e.then)) for e in found) <= length
    assert data.evaluation(2000) == replace(whole.evaluation(2000), rows=data.evaluation(2000).rows)
    assert data.digest != whole.digest


def test_a_curriculum_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="starts at 5 pieces"):
        dataset("clm", lengths={5: 16})
    with pytest.raises(ValueError, match=r"128 positions from piece 9 on, batch.seq_len is 64"):
        dataset("clm", lengths={0: 16, 9: 128})


def test_a_mixture_follows_its_schedule_and_counts_what_it_consumed():
    """Shares of samples move from 90:10 to 0:100 over the first 2,000 pieces."""
    mixture = create("mixture", weights={"clm": 0.9, "mlm": 0.1}, schedule={2000: {"mlm": 1.0}})
    data = dataset(mixture, corpus(3000))
    shares = []
    for low in range(0, 2800, 400):
        ordinal = np.arange(low, low + 400)
        variant = data._variant(0, ordinal, ordinal)
        shares.append((variant == 1).mean())
        wanted = 0.1 + 0.9 * min(1.0, (low + 200) / 2000) if low < 2000 else 1.0
        assert abs(shares[-1] - wanted) < 5 * np.sqrt(0.25 / 400)
    rows = epoch_of_rows(data, 0)
    consumed = data.consumed(rows)
    assert sum(consumed.values()) == len(data) and set(consumed) == {"clm", "mlm"}
    assert dataset("clm").consumed(rows[:1]) == Counter()


@pytest.mark.parametrize("position", [True, False])
def test_where_documents_see_each_other_one_ends_before_the_next(position):
    data = dataset(CausalLanguageModeling(reset_position=position, reset_attention=False))
    batch = data.collate(epoch_of_rows(data, 0))
    labels, inputs = batch.targets["clm"].labels[:, :-1], batch.inputs[:, 1:]
    touching = (batch.attention.segment[:, 1:] != 0) & (labels != inputs)
    assert (inputs[touching] == VOCAB.eod).all() and (inputs == VOCAB.eod).sum() > 100


@pytest.mark.parametrize("step", [16, 48])
def test_masking_probabilities_of_a_step_are_spread_evenly(step):
    """MDLM's low-discrepancy t: what a step hides varies with its coins only, and over all steps every t is as frequent."""

    def hidden(**fields):
        data = dataset(create("mdlm", random_length=0.0, **fields), MemoryStore(np.full(3200, SEQ + 1)))
        rows, _ = data.rows(Cursor(), 3200 // step * step)
        assert not data.consumed(rows)
        return (data.collate(rows).targets["mdlm"].weights > 0).float().mean(dim=1).numpy()

    even, free = hidden(), hidden(antithetic=False)
    spread = [share.reshape(-1, step).mean(axis=1).std() for share in (even, free)]
    coins = np.sqrt(np.mean(even * (1 - even)) / SEQ / step)
    assert spread[0] < 1.5 * coins < 0.5 * spread[1]
    assert all(abs(np.mean(even < p) - p) < 0.03 for p in np.arange(0.1, 1, 0.1))


def test_loss_tokens_are_shared_as_asked_where_components_take_other_pieces():
    """Span corruption needs room for sentinels, so a causal component of the same mixture gets shorter pieces too."""
    options = {"span_corruption": {"density": 0.5}}
    data = dataset(create("mixture", weights={"clm": 0.5, "span_corruption": 0.5}, by="tokens", options=options), corpus(3000))
    totals = {name: target.total for name, target in data.collate(epoch_of_rows(data, 0)).targets.items()}
    assert totals["clm"] / sum(totals.values()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("by", ["samples", "tokens"])
def test_weights_are_shares_of_what_they_say(by):
    """80% causal, 20% masked: by loss tokens the masked one, which scores 15% of its tokens, is drawn more often."""
    data = dataset(create("mixture", weights={"clm": 0.8, "mlm": 0.2}, by=by), corpus(3000))
    batch = data.collate(epoch_of_rows(data, 0))
    tokens = {name: target.total for name, target in batch.targets.items()}
    samples = data.consumed(epoch_of_rows(data, 0))
    share = {"tokens": tokens["mlm"] / sum(tokens.values()), "samples": samples["mlm"] / samples.total()}[by]
    assert share == pytest.approx(0.2, abs=0.03)
    assert (samples["mlm"] / samples.total() > 0.5) == (by == "tokens")


def test_seeds_and_sources_give_other_orders_and_masks():
    def stream(**settings):
        rows, _ = dataset("mlm", **settings).rows(Cursor(), 4)
        return rows

    assert stream() == stream() != stream(seed=1)
    assert stream(source="other") != stream()
    assert not np.array_equal(dataset().example(3).inputs, dataset(seed=1).example(3).inputs)


@objectives
def test_evaluation_takes_whole_documents_up_to_the_limit(name):
    store = corpus()
    data = dataset(name, store)
    plan = data.evaluation(1000)
    assert plan.tokens == store.lengths[: plan.documents].sum() <= 1000
    assert plan.tokens + store.lengths[plan.documents] > 1000
    assert (plan.bytes, plan.words) == (5 * plan.tokens, plan.tokens)
    number = data.decode([sample for row in plan.rows for sample in row])
    assert set(number.epoch.tolist()) == {EVALUATION}
    pieces = Counter(number.piece.tolist())
    assert pieces == Counter(range(int(data.pieces.ends[plan.documents - 1])))
    assert data.evaluation(int(store.lengths[:5].sum())).documents == 5
    assert data.evaluation(0).documents == data.evaluation(1).documents == 1
    assert data.evaluation().documents == len(store)


def test_clm_evaluation_predicts_every_token_of_its_documents():
    store = corpus()
    data = dataset("clm", store)
    plan = data.evaluation(3000)
    assert data.collate(plan.rows).targets["clm"].total == plan.tokens


def test_the_digest_follows_everything_that_moves_a_cursor():
    digests = [
        dataset().digest,
        dataset(seed=1).digest,
        dataset(seq_len=32).digest,
        dataset(store=corpus(seed=1)).digest,
        dataset("clm").digest,
        dataset(source="other").digest,
    ]
    assert len(set(digests)) == len(digests)
    assert dataset(MaskedLanguageModeling(mask_prob=0.3)).digest == digests[0]


@objectives
def test_a_store_on_disk_gives_the_same_batches(name, tmp_path):
    memory = corpus(40)
    with StoreWriter(tmp_path / "train", vocab_size=VOCAB.size, eod=VOCAB.eod, tokenizer_digest="memory") as writer:
        for i, length in enumerate(memory.lengths.tolist()):
            writer.add(memory.slice(i, 0, length - 1), "")
    ours, disk = dataset(name, memory), dataset(name, Store(tmp_path / "train"))
    rows, _ = ours.rows(Cursor(), 20)
    assert rows == disk.rows(Cursor(), 20)[0]
    assert equal(ours.collate(rows), disk.collate(rows))


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="seq_len 4 is too short"):
        dataset(seq_len=4)
    with pytest.raises(ValueError, match=r"makes an example from 1 documents of at least 1 token, train has 0 of 2"):
        dataset(store=MemoryStore([1, 1]))
    for name, lengths in (("sop", [2]), ("nsp", [2, 4]), ("nsp", [40])):
        with pytest.raises(ValueError, match=f"{name} makes an example from . documents of at least .* tokens, train has"):
            dataset(name, store=MemoryStore(lengths))
    with pytest.raises(ValueError, match="is not a position in these data"):
        dataset().rows(Cursor(0, 10**6), 1)
    with pytest.raises(ValueError, match="did you mean 'mlm'"):
        dataset("mml")


def test_partners_come_from_another_document():
    class Pairs(MaskedLanguageModeling):
        documents = 2

    data = dataset(Pairs(), corpus(20))
    epochs, pieces = np.repeat(np.arange(200), len(data)), np.tile(np.arange(len(data)), 200)
    partners = data._partners(epochs, pieces, 1)
    own, other = (data.pieces.cut(p).document for p in (pieces, partners))
    assert not (own == other).any()
    assert set(partners.tolist()) == set(range(len(data)))
    counts = np.bincount(partners[pieces == 0], minlength=len(data))
    assert counts.max() < 40


def test_the_audit_reports_what_was_asked_for():
    data = dataset("mlm", corpus(2000))
    found = realised([data.collate(epoch_of_rows(data, 0))], VOCAB, data.objective.heads)
    assert found["mlm/mask"] == pytest.approx(0.8, abs=0.01)
    assert found["mlm/random"] == pytest.approx(0.1, abs=0.01)
    assert found["mlm/kept"] == pytest.approx(0.1, abs=0.01)
    assert sum(found[f"mlm/{key}"] for key in ("mask", "random", "kept")) == pytest.approx(1)
    clm = dataset("clm")
    assert set(realised([clm.collate(clm.rows(Cursor(), 4)[0])], VOCAB, clm.objective.heads)) == {"useful", "clm/targets"}


def test_a_tokenizer_that_did_not_prepare_the_data_is_refused(monkeypatch):
    class Other:
        digest, vocabulary = "aaaa", VOCAB

    store = MemoryStore([9, 9])
    store.tokenizer_digest = "bbbb"
    monkeypatch.setattr("ds_pretrain.data.dataset.Store", lambda prefix, verify: store)
    with pytest.raises(ValueError, match=r"prepared with tokenizer bbbb, .*given is aaaa: prepare .*tokenizer"):
        PretrainingDataset("folder", Other(), seq_len=SEQ)
    store.tokenizer_digest = "aaaa"
    data = PretrainingDataset(data_path="folder", tokenizer=Other(), seq_len=SEQ, objective="clm", seed=3)
    other = data.split("validation")
    assert (other.source, other.seq_len, other.seed, other.objective) == ("validation", SEQ, 3, data.objective)
    assert other.digest != data.digest


def test_an_unknown_split_is_told_with_the_nearest_one(data):
    with pytest.raises(ValueError, match="unknown split 'tset': did you mean 'test'"):
        PretrainingDataset(data, split="tset")
