"""Screening and decontamination count what they drop; the tool runs the chain to stores that can be trained on."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
from planted import jsonl, planted
from test_semantic import tiny_model

import ds_pretrain
from ds_pretrain.curation.contamination import decontaminate
from ds_pretrain.curation.documents import Folder
from ds_pretrain.curation.quality import RULES, Gopher
from ds_pretrain.curation.reading import read
from ds_pretrain.curation.screening import screening
from ds_pretrain.curation.workers import Workers
from ds_pretrain.data.store import SPLITS, Store

HERE = Workers(quiet=True)
TOOL = Path(ds_pretrain.__file__).parents[1] / "tools" / "prepare_data.py"
PROSE = "It was the best of times, and that was the way they lived with all of it to the end. "


def tool(monkeypatch, capsys, *arguments):
    """(exit code, what was told) of tools/prepare_data.py."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as end:
        return end.code or 0, capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_screening_drops_by_the_first_broken_rule_and_counts_all(tmp_path):
    texts = [PROSE * 4, "short", "#" * 40 + " word" * 60, PROSE * 5]
    found = screening(
        read([str(jsonl(tmp_path / "in.jsonl", texts))], tmp_path / "read", HERE), tmp_path / "out", HERE, [Gopher()]
    )
    assert [row.text for row in found.rows()] == [texts[0], texts[3]]
    report = found.report
    assert sum(report["dropped"].values()) == 2 and set(report["dropped"]) <= set(report["broken"])
    assert sum(report["broken"].values()) > 2, "one document breaks several"
    assert [row.tier for row in found.rows()] == ["", ""]


def test_labels_are_written_and_no_reason_to_drop(tmp_path):
    texts = [PROSE * 5, "x", "Der Hund und die Katze sind nicht in dem Haus, das wir gestern gesehen haben."]
    before = read([str(jsonl(tmp_path / "in.jsonl", texts))], tmp_path / "read", HERE)
    found = screening(before, tmp_path / "out", HERE, label=["tier", "language"])
    rows = list(found.rows())
    assert len(rows) == 3 and rows[1].tier == "low" and all(row.tier for row in rows)
    assert [rows[i].language for i in (0, 2)] == ["en", "de"] and sum(found.report["tiers"].values()) == 3


def test_what_shares_thirteen_words_with_the_benchmark_goes(tmp_path):
    draw = random.Random(0)
    words = [f"v{draw.randrange(10**9)}" for _ in range(400)]
    question = " ".join(words[100:130])
    texts = [" ".join(words[i : i + 60]) for i in range(0, 400, 20)]
    spoilt = [text for text in texts if any(" ".join(words[i : i + 13]) in text for i in range(100, 118))]
    benchmark = jsonl(tmp_path / "test.jsonl", [question.upper().replace(" ", ",  "), "too short"])
    before = read([str(jsonl(tmp_path / "in.jsonl", texts))], tmp_path / "read", HERE)
    found = decontaminate(before, tmp_path / "out", HERE, [str(benchmark)])
    assert [d.row.text for d in found.dropped()] == spoilt and 0 < len(spoilt) < len(texts)
    assert found.report["benchmark_ngrams"] == 18 and found.report["benchmark_too_short"] == 1
    quoted = jsonl(tmp_path / "quoted.jsonl", ["\u201c" + question.replace(" ", "\u00a0\u2014 ") + "\u201d"])
    again = decontaminate(before, tmp_path / "again", HERE, [str(quoted)])
    assert [d.row.text for d in again.dropped()] == spoilt, "typographic quotes, dashes and spaces are no words"
    with pytest.raises(ValueError, match="has 13 words, so n"):
        decontaminate(before, tmp_path / "short", HERE, [str(jsonl(tmp_path / "short.jsonl", ["too short"]))])
    with pytest.raises(ValueError, match="no benchmark"):
        decontaminate(before, tmp_path / "other", HERE, [])


@pytest.fixture
def source(tmp_path):
    texts, _ = planted(20, 60)
    texts = [PROSE + text for text in texts]
    return jsonl(tmp_path / "in" / "a.jsonl", texts + texts[:4] + ["tiny"])


def test_the_tool_makes_stores_a_report_and_pictures(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    chain = ["run", source, "-o", out, "--rules", "gopher", "--passages", 60, "--vocab-size", 600, "--split", "0.8,0.1,0.1"]
    code, told = tool(monkeypatch, capsys, *chain)
    assert code == 0, told
    stores = [Store(out / "data" / name) for name in SPLITS]
    last = Folder(out / "steps" / "passages")
    assert sum(len(store) for store in stores) == last.report["documents"]
    reports = json.loads((out / "report.json").read_text())
    assert list(reports) == ["read", "screen", "exact", "near", "passages"]
    for before, after in zip(list(reports.values()), list(reports.values())[1:], strict=False):
        assert after["documents"] + sum(after["dropped"].values()) == before["documents"]
    page, short = (out / "report.md").read_text(), reports["screen"]["dropped"]["gopher/word_count"]
    assert "exact copy" in page and ", kept is `" in page and f"| gopher/word_count | {short} | {short} |" in page
    assert f"| train | {len(stores[0])} | {sum(stores[0].lengths):,} | " in page and "tokenizer of 600 ids" in page
    assert f"sources {source}, text_field text" in page and f"next: ds-pretrain train quickstart data.path={out}/data" in told
    assert (out / "report_near.png").stat().st_size > 5000
    was = page, {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    assert tool(monkeypatch, capsys, *chain)[0] == 0
    assert was == ((out / "report.md").read_text(), {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")})
    (out / "report.md").unlink()
    assert tool(monkeypatch, capsys, "report", out)[0] == 0 and (out / "report.md").read_text() == page
    near = out / "steps" / "near"
    was = (near / "report.json").read_bytes()
    assert tool(monkeypatch, capsys, "report", near)[0] == 0 and (near / "report.json").read_bytes() == was
    assert (near / "report.md").read_text().count("## ") == 1 and (near / "report_near.png").exists()
    assert tool(monkeypatch, capsys, *chain)[0] == 0, "it is no part of the step"
    code, told = tool(monkeypatch, capsys, "report", source)
    assert code == 2 and "holds no finished documents" in told


def test_every_step_runs_alone(source, tmp_path, monkeypatch, capsys):
    chain = [
        ["read", source],
        ["screen", "--rules", "gopher", "--labels", "tier"],
        ["exact"],
        ["passages", "--words", 60],
        ["near", "--near", 0.8],
        ["semantic", "--model", tiny_model(tmp_path / "model"), "--cosine", 0.999],
        ["decontaminate", "--against", source.with_name("b.jsonl")],
        ["store", "--vocab-size", 600, "--split", "0.8,0.1,0.1"],
    ]
    jsonl(source.with_name("b.jsonl"), ["nothing of the kind " * 5])
    for number, (name, *options) in enumerate(chain):
        before = [] if number == 0 else [tmp_path / str(number - 1)]
        code, told = tool(monkeypatch, capsys, name, *before, *options, "-o", tmp_path / str(number))
        assert code == 0, told
    assert len(Store(tmp_path / "7" / "train")) > 30


@pytest.mark.parametrize(
    "options, told",
    [
        (["--rules", "gophr"], "did you mean 'gopher'"),
        (["--labels", "colour"], "language and tier"),
        (["--language", "english"], "unknown language 'english'"),
        (["--near", "1.5"], "threshold 1.5"),
        (["--semantic", "nowhere"], "has no config.json"),
        (["--semantic", "nowhere", "--cosine", "2"], "cosine threshold 2"),
        (["--perplexity", "nowhere"], "run.yaml does not exist"),
        (["--most", "3"], "give a run to score by"),
        (["--perplexity", "nowhere", "--least", "-1"], "above 0, got -1"),
        (["nowhere.txt"], "no corpus at nowhere.txt"),
        (["--split", "0.9,0.1"], "three shares"),
        (["--split", "nan,0.5,0.5"], "above 0 that sum to 1"),
        (["--kind", "foo"], "unknown kind of tokenizer 'foo'"),
        (["--vocab-size", "300"], "vocab_size 300 is too small"),
        (["--against", "nowhere.txt"], "no such file"),
        (["--passages", "3"], "at least 10"),
        (["--tokenizer", "nowhere"], "no tokenizer"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--unit", "byte"], "'word' or 'char'"),
    ],
)
def test_mistakes_are_told_before_any_work(options, told, source, tmp_path, monkeypatch, capsys):
    code, said = tool(monkeypatch, capsys, "run", source, "-o", tmp_path / "out", *options)
    assert code == 2 and told in said, said
    assert not (tmp_path / "out").exists()


def test_every_rule_set_can_be_named(source, tmp_path, monkeypatch, capsys):
    names = ",".join(sorted(set(RULES) - {"language"}))
    tool(monkeypatch, capsys, "read", source, "-o", tmp_path / "read")
    assert tool(monkeypatch, capsys, "screen", tmp_path / "read", "-o", tmp_path / "out", "--rules", names)[0] == 0
