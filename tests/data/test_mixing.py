"""Several folders as one stream: the shares asked for, each folder in its own epochs, weights that change in mid-run."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_pretrain.curation.prepare import prepare
from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.data.loader import Loader
from ds_pretrain.data.mixing import MixedDataset
from ds_pretrain.data.store import Store
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.objectives import REGISTRY, create

objectives = pytest.mark.parametrize("name", list(REGISTRY))
SEQ = 32


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory):
    """Three folders of one tokenizer: the shared one, and two of other texts and sizes."""
    made = [data]
    for name, count in (("b", 60), ("c", 200)):
        folder = tmp_path_factory.mktemp(name)
        lines = (
            f"text number {i}: " + "and so on, " * (i % 40 if name == "c" else 1) + "to the end of it." for i in range(count)
        )
        (folder / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        prepare(folder / "in.jsonl", folder / "data", tokenizer=data / "tokenizer", split=(0.8, 0.1, 0.1), quiet=True)
        made.append(folder / "data")
    return [str(folder) for folder in made]


def mixed(folders, weights, objective="clm", by="tokens"):
    main = PretrainingDataset(folders[0], seq_len=SEQ, objective=objective)
    return MixedDataset(main, dict(zip(folders, weights, strict=True)), by)


def own(data, rows):
    """Rows by folder, under the folder's own numbers."""
    return {name: rows for name, (_, rows) in zip(data.weights, data._apart(rows), strict=True)}


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.9, 0.1, 0), (0.57, 0.23, 0.2), (5, 0, 1), (0, 0, 1), (1, 1e-3, 1e-3)])
def test_every_stretch_of_rows_has_the_wanted_shares(folders, weights):
    data = mixed(folders, weights)
    which = data.pick(np.arange(20_000))
    wanted = data.shares
    for start, stop in [(0, 20_000), (0, 1000), (777, 1777), (12_345, 12_845)]:
        counts = np.bincount(which[start:stop], minlength=3)
        assert np.abs(counts - np.array(wanted) * (stop - start)).max() < 6
    assert all((which != i).all() for i, share in enumerate(wanted) if share == 0)


@objectives
def test_any_reader_sees_the_same_rows(folders, name):
    data = mixed(folders, (0.5, 0.3, 0.2), create(name))
    rows, end = data.rows(data.first, 48)
    one_by_one, cursor = [], data.first
    for _ in range(48):
        found, cursor = data.rows(cursor, 1)
        one_by_one += found
    assert one_by_one == rows and cursor == end == data.position(json.loads(json.dumps(end)))
    batch = data.collate(rows)
    for place in range(0, 48, 7):
        alone = data.collate([rows[place]])
        assert torch.equal(alone.inputs[0], batch.inputs[place])
        assert torch.equal(alone.attention.dense()[0], batch.attention.dense()[place])
        for head, target in alone.targets.items():
            assert torch.equal(target.labels[0], batch.targets[head].labels[place])
    assert sum(data.collate([row]).targets[h].total for row in rows for h in batch.targets) == pytest.approx(
        sum(t.total for t in batch.targets.values())
    )
    by_rank = [Loader(data, 16, 4, rank, 2) for rank in range(2)]
    steps = [next(loader) for loader in by_rank]
    dealt = [steps[m % 2].batches[m // 2].inputs for m in range(4)]
    assert torch.equal(torch.cat(dealt), batch.inputs[:16])
    for loader in by_rank:
        loader.close()


def test_each_folder_is_read_once_per_epoch_of_its_own_whatever_the_weights(folders):
    """Also where the weights change on the way: what a folder gives goes on where it was."""
    cursor, taken = None, {name: [] for name in folders}
    for weights in ((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0, 1, 1), (0.4, 0.3, 0.3)):
        data = mixed(folders, weights)
        rows, cursor = data.rows(cursor or data.first, 40)
        for name, mine in own(data, rows).items():
            taken[name] += mine
    for name, mine in taken.items():
        alone = PretrainingDataset(name, TextTokenizer.load(Path(folders[0]) / "tokenizer"), SEQ, "clm")
        expected, _ = alone.rows(alone.first, len(mine))
        assert mine == expected
    told = data.progress(cursor)
    assert sum(each["share"] for each in told.values()) == pytest.approx(1)
    for each in told.values():
        assert each["epochs"] > 0


@pytest.mark.parametrize("weights", [(0.8, 0.1, 0.1), (0.2, 0.2, 0.6)])
def test_weights_are_shares_of_tokens_however_full_rows_are(folders, weights):
    data = mixed(folders, weights)
    _, cursor = data.rows(data.first, 3000)
    told = data.progress(cursor)
    for name, weight in zip(folders, weights, strict=True):
        assert told[name]["share"] == pytest.approx(weight, abs=0.01)
    alike = data.shares / [weight for _, weight in sorted(zip(folders, weights, strict=True))]
    assert alike.max() > 1.02 * alike.min(), "rows of these folders are not equally full"


def test_samples_may_be_counted_instead_of_tokens(folders):
    data = mixed(folders, (1, 1, 2), by="samples")
    rows, _ = data.rows(data.first, 600)
    counts = {name: sum(map(len, mine)) for name, mine in own(data, rows).items()}
    wanted = dict(zip(folders, (0.25, 0.25, 0.5), strict=True))
    for name, count in counts.items():
        assert count / sum(counts.values()) == pytest.approx(wanted[name], abs=0.03)
    assert not np.allclose(data.shares, sorted(wanted.values()), atol=0.02), "their rows hold other numbers of samples"


def test_components_of_an_objective_are_counted_over_all_folders(folders):
    data = mixed(folders, (1, 1, 1), create("ul2"))
    rows, _ = data.rows(data.first, 60)
    assert data.consumed(rows).total() == sum(map(len, rows))
    assert mixed(folders, (1, 1, 1)).consumed([(3,)]) == Counter()


def test_the_digest_is_of_the_folders_and_not_of_their_weights(folders):
    assert mixed(folders, (1, 1, 1)).digest == mixed(folders, (0, 2, 7)).digest
    assert mixed(folders[:2], (1, 1)).digest != mixed(folders, (1, 1, 1)).digest
    assert mixed(folders[:1], (1,)).digest != PretrainingDataset(folders[0], seq_len=SEQ, objective="clm").digest


@pytest.mark.parametrize("weights", [(-1, 2, 0), (0, 0, 0), (float("nan"), 1, 1)])
def test_weights_that_are_no_shares_are_refused(folders, weights):
    with pytest.raises(ValueError, match="must not be negative and not all be 0, got "):
        mixed(folders, weights)


def test_every_folder_is_evaluated_and_tells_how_it_is_packed(folders):
    data = mixed(folders, (0.5, 0.5, 0))
    parts = data.parts("validation")
    assert list(parts) == ["", *folders[1:]] and parts[""] is data.main.split("validation")
    assert all(parts[name].store.prefix == f"{name}/validation" for name in folders[1:])
    for name, told in data.packing().items():
        lengths = Store(f"{name}/train").lengths
        assert told["documents"] == len(lengths) and told["cut"] == (lengths > SEQ).sum()
        assert told["too_short"] == told["lost_tokens"] == 0 and 0 <= told["waste"] < 1
    short = PretrainingDataset(folders[2], seq_len=64, objective="nsp").packing()["train"]
    lengths = Store(f"{folders[2]}/train").lengths - 1
    few = lengths[lengths < create("nsp").shortest]
    assert (short["too_short"], short["lost_tokens"]) == (len(few), few.sum())


def test_a_folder_of_another_tokenizer_is_refused(folders, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"other {i}"}) + "\n" for i in range(60)))
    prepare(tmp_path / "in.jsonl", tmp_path / "data", vocab_size=600, split=(0.8, 0.1, 0.1), quiet=True)
    with pytest.raises(ValueError, match=r"was prepared with another tokenizer .* again with --tokenizer"):
        mixed([folders[0], str(tmp_path / "data")], (1, 1))


def test_one_folder_under_two_spellings_is_refused(folders):
    main = PretrainingDataset(folders[0], seq_len=SEQ, objective="clm")
    with pytest.raises(ValueError, match="given twice"):
        MixedDataset(main, {folders[1]: 0.5, folders[1] + "/": 0.5})
