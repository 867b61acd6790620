"""What a model gives back verbatim is counted by how often it stood in the training text."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ds_pretrain.cli import app
from ds_pretrain.curation.prepare import prepare
from ds_pretrain.evaluation import memorisation
from ds_pretrain.evaluation.memorisation import Recall, memorised, windows
from ds_pretrain.runs import load_model, make_trainer, open_run

EOD, LENGTH = 0, 6


def planted(times: dict[int, int], rng: np.random.Generator) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Documents of random ids, among them one for each number of times, repeated so often; and those by their number."""
    originals = {count: rng.integers(1, 30000, 40) for count in times}
    documents = [each for count, each in originals.items() for _ in range(times[count])]
    documents += [rng.integers(1, 30000, 50) for _ in range(100)]
    rng.shuffle(documents := [np.append(each, EOD) for each in documents])
    return np.concatenate(documents).astype(np.uint16), originals


def test_windows_are_counted_as_often_as_they_are_there():
    rng = np.random.default_rng(0)
    train, originals = planted({2: 2, 3: 3, 9: 9}, rng)
    test = np.concatenate([[5], originals[2][:20], [EOD], rng.integers(1, 30000, 30), [EOD]]).astype(np.uint16)
    found = {each.occurrences: each for each in windows(train, test, EOD, LENGTH, 10_000)}
    per_document = 40 - LENGTH + 1
    assert {name: each.there for name, each in found.items()} == {
        "0": 25 + 1, "1": 100 * 45, "2-3": 2 * per_document, "8-15": per_document,
    }  # fmt: skip
    assert {tuple(row) for row in found["8-15"].ids} == {tuple(originals[9][i : i + LENGTH]) for i in range(per_document)}
    assert all((each.ids != EOD).all() for each in found.values()), "no window crosses documents"


def test_few_are_drawn_and_the_same_each_time():
    train, _ = planted({4: 4}, np.random.default_rng(1))
    first, again, other = ([each.ids for each in windows(train, train, EOD, LENGTH, 7, seed)] for seed in (0, 0, 1))
    assert all(len(ids) == 7 for ids in first) and all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
    assert list(windows(train[:3], train[:3], EOD, LENGTH, 7)) == []


class Parrot:
    """Stands in for a model that knows some texts by heart."""

    def __init__(self, known):
        self.known = {tuple(row[:4]): row[4:].tolist() for row in known}

    def continue_all(self, model, prompts, eod, banned, how):
        assert how.temperature == 0 and how.tokens == 2
        rows = [self.known.get(tuple(prompt), [7, None]) for prompt in prompts]
        yield from ([row[i] for row in rows] for i in range(2))


def test_verbatim_is_every_token(monkeypatch):
    ids = np.random.default_rng(2).integers(10, 100, (40, LENGTH))
    monkeypatch.setattr(memorisation, "continue_all", Parrot(ids[:25]).continue_all)
    assert memorisation._verbatim(None, EOD, ids, 4) == 25
    wrong = ids.copy()
    wrong[:5, -1] += 1
    assert memorisation._verbatim(None, EOD, wrong, 4) == 20
    assert Recall("1", 25, 40, 400).share == pytest.approx(0.625)


def test_a_model_that_has_read_a_text_often_knows_it(tmp_path):
    """Trained for many epochs on few texts: their windows come out, those of the test split do not."""
    rng, words = np.random.default_rng(3), [path.stem for path in Path(json.__file__).parents[1].glob("*.py")]
    for number in range(24):
        (tmp_path / f"{number}.txt").write_text(" ".join(rng.choice(words, 15)))
    prepare(
        [str(path) for path in tmp_path.glob("*.txt")], tmp_path / "data", vocab_size=600, split=(0.6, 0.2, 0.2), quiet=True
    )
    values = {
        "model": {"layers": 2, "hidden": 96, "heads": 4, "position": "rope"}, "data": {"path": str(tmp_path / "data")},
        "batch": {"global_size": 8, "seq_len": 64}, "optimizer": {"lr": 4e-3, "warmup_steps": 10},
        "train": {"max_steps": 200}, "output": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    trainer = make_trainer(*open_run(str(tmp_path / "run.yaml"), []))
    trainer.progress = False
    trainer.train()
    told = CliRunner().invoke(app, ["memorised", str(tmp_path / "run"), "--prompt", "28", "--tokens", "4", "--windows", "60"])
    assert told.exit_code == 0 and "occurrences" in told.output, told.output
    model, data = load_model(str(tmp_path / "run")), trainer.dataset
    found = memorised(model, data.split("train").store, data.split("test").store, 28, 4, 60)
    shares = {each.occurrences: each.share for each in found}
    assert shares["1"] > 0.3 and shares["0"] < 0.05, shares
    with pytest.raises(ValueError, match=r"windows of 60 \+ 6 tokens do not fit 64 positions"):
        memorised(model, data.split("train").store, data.split("test").store, 60, 6)
