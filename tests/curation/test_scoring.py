"""Documents by their bits per byte: what is dropped, and that a trained run's scores are those that its evaluation gives."""

import json
import math
import os
import random
import runpy
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from planted import jsonl
from test_steps import corpus as corpus_of
from test_steps import digests, order, small_parts, texts_of  # noqa: F401

import ds_pretrain
from ds_pretrain.curation import reading
from ds_pretrain.curation.documents import Folder
from ds_pretrain.curation.reading import read
from ds_pretrain.curation.scoring import QUANTILES, perplexity
from ds_pretrain.curation.workers import Workers, workers
from ds_pretrain.data.store import StoreWriter
from ds_pretrain.data.tokenizer import TextTokenizer

HERE = Workers(quiet=True)
TOOL = Path(ds_pretrain.__file__).parents[1] / "tools" / "prepare_data.py"


@dataclass(frozen=True)
class Letters:
    """A stand-in for a model: the share of the letter e, or no number."""

    broken: bool = False

    def __call__(self):
        return lambda texts: [math.nan if self.broken else 10 * text.count("e") / len(text) for text in texts]


def documents(tmp_path, count=60):
    draw = random.Random(0)
    texts = ["".join(draw.choice("abcde ") for _ in range(draw.randrange(20, 400))) + "." for _ in range(count)]
    return order(texts), read([corpus_of(tmp_path / "in", texts)], tmp_path / "read", HERE)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("most, least", [(None, None), (1.9, None), (None, 1.4), (1.9, 1.4)])
def test_what_lies_outside_the_bounds_goes_and_every_score_is_kept(tmp_path, most, least):
    texts, before = documents(tmp_path)
    found = perplexity(before, tmp_path / "out", HERE, Letters(), most, least)
    score = {text: bits for text, bits in zip(texts, Letters()()(texts), strict=True)}
    low, high = least or 0, most or math.inf
    assert texts_of(found) == [text for text in texts if low <= score[text] <= high]
    reasons = {
        "perplexity/too_high": sum(s > high for s in score.values()),
        "perplexity/too_low": sum(s < low for s in score.values()),
    }
    assert found.report["dropped"] == {reason: count for reason, count in reasons.items() if count}
    assert all((d.reason == "perplexity/too_high") == (score[d.row.text] > high) for d in found.dropped())
    kept = np.concatenate([np.load(path) for path in sorted((found.path / "scores").iterdir())])
    numbers = {row.number: row.text for row in before.rows()}
    assert {numbers[n]: bits for n, bits in kept.tolist()} == score
    told = found.report["bits_per_byte"]
    for name, values in (("before", list(score.values())), ("after", [s for s in score.values() if low <= s <= high])):
        assert list(told[name].values()) == pytest.approx(np.quantile(values, QUANTILES), abs=1e-4)


def test_scores_are_made_once_and_by_anyone(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PART", 1)
    _, before = documents(tmp_path)
    perplexity(before, tmp_path / "one" / "out", HERE, Letters(), 1.9)
    with workers(2, quiet=True) as team:
        perplexity(before, tmp_path / "two" / "out", team, Letters(), 1.9)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    with pytest.raises(ValueError, match="was made by other means"):
        perplexity(before, tmp_path / "one" / "out", HERE, Letters(), 1.8)


@dataclass(frozen=True)
class Threads:
    """A stand-in whose scores are the threads that a model would have."""

    def __call__(self):
        import torch

        return lambda texts: [float(torch.get_num_threads())] * len(texts)


@pytest.fixture
def three_threads():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield torch.get_num_threads
    torch.set_num_threads(before)


def test_a_model_has_one_thread_whoever_works(tmp_path, three_threads, monkeypatch):
    monkeypatch.setattr(reading, "PART", 1)
    _, before = documents(tmp_path, 8)
    alone = perplexity(before, tmp_path / "one" / "out", HERE, Threads())
    with workers(2, quiet=True) as team:
        perplexity(before, tmp_path / "two" / "out", team, Threads())
    assert alone.report["bits_per_byte"]["before"]["0%"] == alone.report["bits_per_byte"]["before"]["100%"] == 1
    assert digests(tmp_path / "one") == digests(tmp_path / "two") and three_threads() == 3


@pytest.mark.parametrize(
    "most, least, told", [(1, 2, "nothing would be kept"), (0, None, "above 0"), (None, math.inf, "above 0")]
)
def test_bounds_that_cannot_be_met_are_refused(tmp_path, most, least, told):
    with pytest.raises(ValueError, match=told):
        perplexity(Folder(tmp_path), tmp_path / "out", HERE, Letters(), most, least)


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    _, before = documents(tmp_path, 3)
    with pytest.raises(ValueError, match="no finite score"):
        perplexity(before, tmp_path / "out", HERE, Letters(broken=True))
    assert not (tmp_path / "out").exists()


def trained(data, folder, objective="clm", steps=50):
    """The output folder of a run of a few seconds, made as people make one."""
    from typer.testing import CliRunner

    from ds_pretrain.cli import app

    wanted = {
        "model.layers": 2, "model.hidden": 64, "objective.name": objective, "data.path": data, "batch.seq_len": 64,
        "optimizer.warmup_steps": 0, "train.max_steps": steps, "train.eval_every": 0, "output": folder / "run",
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in wanted.items()]
    done = CliRunner().invoke(app, ["train", "quickstart", *overrides], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "run"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(TOOL))


@pytest.fixture(scope="module")
def real(corpus):
    """Short stretches of text like what the run was trained on."""
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    return [text[start : start + 150] for text in texts for start in (500, 2000) if len(text) > start + 150][:40]


def evaluated(run, data, text, folder):
    """Bits per byte by the evaluation of a prepared folder that holds this document alone."""
    from ds_pretrain.data.dataset import PretrainingDataset
    from ds_pretrain.evaluation.perplexity import evaluate
    from ds_pretrain.objectives import create
    from ds_pretrain.training.inference import FrozenModel

    tokenizer = TextTokenizer.load(data / "tokenizer")
    digest, eod = tokenizer.digest, tokenizer.vocabulary.eod
    with StoreWriter(folder / "test", vocab_size=len(tokenizer), eod=eod, tokenizer_digest=digest) as store:
        store.add(tokenizer.encode(text), text)
    dataset = PretrainingDataset(folder, tokenizer, 64, "clm", "test")
    return evaluate(FrozenModel(run, create("clm")), dataset)


def test_a_run_scores_a_document_as_its_evaluation_does(run, data, tool, real, tmp_path):
    """Alone or among others of other lengths; one that is longer than a row by the row that it begins with."""
    score = tool["Judged"].of(run)()
    texts = [*(text[:90] for text in real[:12]), "x", "naïve — 日本語 text, with ünïcode", real[3][:30]]
    found = score(texts)
    for i, text in enumerate(texts):
        scores = evaluated(run, data, text, tmp_path / str(i))
        assert scores.tokens <= 64, "the document is one row"
        assert found[i] == pytest.approx(scores.bits_per_byte, rel=1e-5)
        assert score([text])[0] == pytest.approx(found[i], rel=1e-5)
    tokenizer = TextTokenizer.load(data / "tokenizer")
    long = " ".join(real)
    start = tokenizer.decode(tokenizer.encode(long)[:64])
    assert tokenizer.encode(start).tolist() == tokenizer.encode(long)[:64].tolist() and long.startswith(start)
    scores = evaluated(run, data, start, tmp_path / "long")  # of 65 tokens, its end in a piece of its own
    assert scores.tokens == 65
    end = scores.nats / math.log(2) - score([long])[0] * len(start.encode())
    assert 0 < end < 25, "all but the bits of the end"


def test_shuffled_text_is_stranger_than_real_text(run, tool, real, tmp_path):
    draw = random.Random(0)
    shuffled = ["".join(draw.sample(text, len(text))) for text in real]
    score = tool["Judged"].of(run)()
    of_real, of_shuffled = score(real), score(shuffled)
    assert np.mean(of_shuffled) > 1.2 * np.mean(of_real)
    assert np.mean(np.array(of_shuffled) > of_real) > 0.95
    before = read([str(jsonl(tmp_path / "in.jsonl", real + shuffled))], tmp_path / "read", HERE)
    bound = float(np.median(of_real + of_shuffled))
    found = perplexity(before, tmp_path / "out", HERE, tool["Judged"].of(run), bound)
    gone = {d.row.text for d in found.dropped()}
    assert len(gone & set(shuffled)) > 0.8 * len(real) and len(gone) == len(real)


def test_the_tool_scores_the_same_on_mpi_ranks(run, real, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PART", 1)
    before = read([corpus_of(tmp_path / "in", real)], tmp_path / "read", HERE)
    perplexity(before, tmp_path / "alone" / "out", HERE, tool["Judged"].of(run), 2.5)
    ranks = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "-n", "2", sys.executable, "-m", "mpi4py"]
    options = ["perplexity", before.path, "--run", run, "--most", 2.5, "-o", tmp_path / "several" / "out"]
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = {**plain, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ran = subprocess.run([*ranks, str(TOOL), *map(str, options)], env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "bits per byte" in ran.stderr, ran.stderr
    assert digests(tmp_path / "alone") == digests(tmp_path / "several")


def test_the_chain_scores_before_it_compares(run, data, real, tmp_path, monkeypatch, capsys):
    from test_semantic import tiny_model

    source = corpus_of(tmp_path / "in", [*real, *real[:3], "qzjx" * 30])
    model = tiny_model(tmp_path / "model")
    steps = {"--perplexity": run, "--most": 9, "--near": 0, "--semantic": model, "--cosine": 1}
    options = [*chain.from_iterable(steps.items()), "--tokenizer", data / "tokenizer", "--split", "0.6,0.2,0.2"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "run", source, "-o", str(tmp_path / "out"), *map(str, options)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert not end.value.code, capsys.readouterr().err
    reports = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(reports) == ["read", "perplexity", "exact", "semantic"]
    assert reports["perplexity"]["dropped"] == {"perplexity/too_high": 1} and reports["exact"]["dropped"] == {"exact copy": 3}
    assert "perplexity/too_high" in (tmp_path / "out" / "report.md").read_text()


def test_what_gives_no_likelihood_is_refused(data, run, tool, tmp_path):
    with pytest.raises(ValueError, match="mlm, whose loss is no likelihood"):
        tool["Judged"].of(trained(data, tmp_path, "mlm", 1))
    with pytest.raises(ValueError, match=r"run.yaml does not exist"):
        tool["Judged"].of(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.yaml").write_bytes((run / "run.yaml").read_bytes())
    with pytest.raises(ValueError, match="no checkpoint"):
        tool["Judged"].of(tmp_path / "empty")
