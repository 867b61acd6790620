"""Infilling: which line is missing, what the model is shown, and what counts as right."""

import ast
from types import SimpleNamespace

import pytest

from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.evaluation import generate
from ds_pretrain.evaluation import infill as task
from ds_pretrain.evaluation.infill import Gap, Infilled, gaps, parses

CODE = Gap("def f(x):\n", "    return x\n", "y = f(1)\n")


@pytest.fixture(scope="module")
def dataset(data):
    return PretrainingDataset(data, seq_len=128, objective="fim").split("train")


def test_gaps_are_lines_of_documents(dataset):
    found = list(gaps(dataset, 20))
    assert len(found) == 20 and found == list(gaps(dataset, 20)) != list(gaps(dataset, 20, seed=1))
    texts = {
        dataset.tokenizer.decode(dataset.store.slice(i, 0, int(n) - 1).tolist()) for i, n in enumerate(dataset.store.lengths)
    }
    for gap in found:
        assert gap.before + gap.middle + gap.after in texts
        assert gap.before and gap.after and gap.middle.strip() and gap.middle.count("\n") == 1
    assert any(gap.python for gap in found) and not all(gap.python for gap in found)


@pytest.mark.parametrize(
    ("written", "exact", "good"),
    [
        ("    return x\n", True, True),
        ("    return x", True, False),
        ("    return 2\n", False, True),
        ("  return (\n", False, False),
    ],
)
def test_what_counts(written, exact, good):
    attempt = Infilled(CODE, written)
    assert (attempt.exact, attempt.parses) == (exact, good)
    assert CODE.python and not Gap("def (", "x\n", "").python


def test_a_gap_may_leave_python_without_its_line():
    assert CODE.idle == parses(CODE.before + CODE.after) and Gap("x = 1\n", "y = 2\n", "z = 3\n").idle


def test_what_is_no_python_is_no_error():
    assert not parses("\0") and not parses("(" * 10_000) and parses("")
    assert ast.parse(CODE.before + CODE.middle + CODE.after)


def test_the_prompt_is_the_document_in_the_order_of_training(dataset, monkeypatch):
    seen = []
    line = dataset.tokenizer.encode("    return x\n").tolist()
    monkeypatch.setattr(generate, "continue_all", lambda model, texts, *_: seen.extend(texts) or ([token] for token in line))
    shape = SimpleNamespace(positions=128, vocab_size=len(dataset.tokenizer))
    model = SimpleNamespace(origin={}, build=SimpleNamespace(model=shape))
    attempt = task.infill(model, dataset.tokenizer, CODE)
    pre, suf, mid = (dataset.vocab.names[name] for name in ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
    encode = dataset.tokenizer.encode
    begin = dataset.vocab.eod
    assert seen == [[begin, pre, *encode(CODE.before).tolist(), suf, *encode(CODE.after).tolist(), mid]]
    assert attempt.exact and attempt.parses
    long = Gap("x = 1\n" * 500, "y = 2\n", "z = 3\n" * 500)
    task.infill(model, dataset.tokenizer, long, tokens=16)
    assert len(seen[1]) <= 128 - 16 - 1 and seen[1][:2] == [begin, pre] and seen[1][-1] == mid
    assert dataset.tokenizer.decode(seen[1][2 : seen[1].index(suf)]).endswith("x = 1\n")
    with pytest.raises(ValueError, match=r"110 tokens leave no room .* in 128 positions: ask for at most 107"):
        task.infill(model, dataset.tokenizer, long, tokens=110)
    short = Gap("x\n", "y\n", "z\n")
    assert task.infill(model, dataset.tokenizer, short, tokens=110).gap is short, "nothing of it is cut off"
    line += dataset.tokenizer.encode("z = 3\n").tolist()
    assert task.infill(model, dataset.tokenizer, CODE, one_line=False).written == "    return x\nz = 3\n"
