"""From sources to a folder: nothing lost, nothing moved, nothing half made, nothing done twice."""

import json
import re
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from planted import digests, jsonl

from ds_pretrain.curation.prepare import prepare, split_of
from ds_pretrain.curation.workers import workers
from ds_pretrain.data import corpus, embedded, sources
from ds_pretrain.data.sources import fingerprint
from ds_pretrain.data.store import SPLITS, Store
from ds_pretrain.data.tokenizer import KINDS, TextTokenizer

SHARES = (0.8, 0.1, 0.1)
STDLIB = Path(sysconfig.get_paths()["stdlib"])
WORDS = (STDLIB / "argparse.py").read_text("utf-8") + (STDLIB / "textwrap.py").read_text("utf-8")
TEXTS = [WORDS[i : i + 900] for i in range(0, 108_000, 900)]


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    (folder / "a.jsonl").write_text(lines(TEXTS[:60]) + '{"text": ""}\nbroken\n')
    (folder / "b.jsonl").write_text(lines(TEXTS[60:]))
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "out"
    return output, prepare(source, output, vocab_size=900, split=SHARES, quiet=True)


def test_every_document_is_in_its_split_and_comes_back(made, source):
    output, report = made
    tokenizer = TextTokenizer.load(output / "tokenizer")
    for name in SPLITS:
        expected = [text for text in TEXTS if split_of(text, SHARES) == name]
        store = Store(output / name)
        assert store.tokenizer_digest == tokenizer.digest and store.vocab_size == len(tokenizer) == 900
        assert [tokenizer.decode(store[i], skip_specials=True) for i in range(len(store))] == expected
        assert all(store.slice(i, n - 1, n)[0] == tokenizer.vocabulary.eod for i, n in enumerate(store.lengths.tolist()))
        assert store.text[:].tolist() == [[len(text.encode()), len(text.split())] for text in expected]
        assert report.splits[name]["documents"] == len(expected) and report.splits[name]["tokens"] == store.lengths.sum()


def test_the_manifest_accounts_for_everything(made, source):
    output, report = made
    manifest = json.loads((output / "manifest.json").read_text())
    read = sum(len(path.read_text().splitlines()) for path in source.iterdir())
    rows = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert manifest["documents"] == {"read": read, "kept": len(TEXTS)} and len(rows) == read - len(TEXTS) == 2
    assert report.quarantined == manifest["quarantined"] == {"empty": 1, "broken JSON": 1}
    assert sum(row["documents"] for row in manifest["splits"].values()) == len(TEXTS)
    assert manifest["stores"] == {name: Store(output / name).digest for name in SPLITS}
    assert manifest["request"]["split"] == list(SHARES)
    assert sorted(path.name for path in output.parent.iterdir()) == ["out"]


def test_twice_is_done_once(made, source, tmp_path):
    output, report = made
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = prepare(source, output, vocab_size=900, split=SHARES, quiet=True)
    assert again.reused and not report.reused and again.splits == report.splits
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    fresh = prepare(source, tmp_path / "fresh", vocab_size=900, split=SHARES, quiet=True)
    digests = [[Store(folder / name).digest for name in SPLITS] for folder in (output, fresh.output)]
    assert digests[0] == digests[1]


def test_an_output_from_other_inputs_is_refused(made, source, tmp_path):
    output, _ = made
    with pytest.raises(ValueError, match=r"prepared from other inputs \(tokenizer.vocab_size: 900 -> 950\): choose another"):
        prepare(source, output, vocab_size=950, split=SHARES, quiet=True)
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    with pytest.raises(ValueError, match="from other inputs \\(sources: "):
        prepare(tmp_path / "a.jsonl", output, vocab_size=900, split=SHARES, quiet=True)
    before = fingerprint(str(tmp_path))
    (tmp_path / "a.jsonl").write_text(lines([*TEXTS[:-1], TEXTS[-1][::-1]]))
    assert fingerprint(str(tmp_path)) != before
    with pytest.raises(ValueError, match="was not made by prepare"):
        prepare(source, tmp_path, quiet=True)
    with pytest.raises(ValueError, match="lies inside of the source"):
        prepare(tmp_path, tmp_path / "out", quiet=True)
    assert "python" in fingerprint("embedded") and fingerprint("datasets:x") == "datasets:x"


def test_a_damaged_output_is_not_taken_for_finished(source, tmp_path):
    output = tmp_path / "out"
    args = {"vocab_size": 600, "split": SHARES, "quiet": True}
    prepare(source, output, **args)
    sound = (output / "train.bin").read_bytes()
    (output / "train.bin").write_bytes(sound[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"train\.bin is damaged"):
        prepare(source, output, **args)
    (output / "train.bin").write_bytes(sound)
    assert prepare(source, output, **args).reused
    prepare(source, tmp_path / "other", **(args | {"vocab_size": 601}))
    for name in ("tokenizer/tokenizer.json", "tokenizer/specials.json"):
        (output / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer is not the tokenizer that manifest\.json names"):
        prepare(source, output, **args)
    for path in (tmp_path / "other").glob("test.*"):
        (output / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"test is not the store that manifest\.json names"):
        prepare(source, output, **args)


def test_a_grown_corpus_moves_no_document(source, made, tmp_path):
    output, _ = made
    for path in source.iterdir():
        jsonl(tmp_path / "in" / f"0{path.name}", TEXTS[:60] if path.name == "a.jsonl" else TEXTS[60:])
    jsonl(tmp_path / "in" / "00-new.jsonl", [text[::-1] for text in TEXTS])
    grown = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=output / "tokenizer", split=SHARES, quiet=True)
    for name in SPLITS:
        old, new = Store(output / name), Store(grown.output / name)
        kept = {new[i].tobytes() for i in range(len(new))}
        assert {old[i].tobytes() for i in range(len(old))} <= kept and len(new) > len(old)


def test_shares_hold_on_average():
    counts = {name: 0 for name in SPLITS}
    for i in range(20_000):
        counts[split_of(f"document {i}", SHARES)] += 1
    for name, share in zip(SPLITS, SHARES, strict=True):
        assert abs(counts[name] - 20_000 * share) < 5 * np.sqrt(20_000 * share * (1 - share))


def test_the_tokenizer_sees_the_train_split_only(tmp_path):
    texts = [f"{word} common words " * 9 for word in (f"w{i:03d}" for i in range(200))]
    marked = [text + " zqxzqx" * 50 if split_of(text + " zqxzqx" * 50, SHARES) != "train" else text for text in texts]
    held_out = [text for text in marked if "zqx" in text and split_of(text, SHARES) != "train"]
    assert len(held_out) > 10
    (tmp_path / "a.jsonl").write_text(lines(marked))
    tokenizer = TextTokenizer.load(
        prepare(tmp_path / "a.jsonl", tmp_path / "out", vocab_size=700, split=SHARES, quiet=True).output / "tokenizer"
    )
    assert len(tokenizer.encode(" zqxzqx")) == 7 and len(tokenizer.encode(" common")) == 1


def test_the_sample_is_bounded_and_does_not_depend_on_order(source, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS[::-1]))
    args = {"vocab_size": 700, "split": SHARES, "sample_bytes": 20_000, "quiet": True}
    small = [prepare(path, tmp_path / name, **args) for path, name in ((source, "x"), (tmp_path / "a.jsonl", "y"))]
    digests = [TextTokenizer.load(report.output / "tokenizer").digest for report in small]
    full = prepare(source, tmp_path / "z", **(args | {"sample_bytes": 1 << 20}))
    assert digests[0] == digests[1] != TextTokenizer.load(full.output / "tokenizer").digest


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bpe"])
def test_every_kind(source, tmp_path, kind):
    report = prepare(source, tmp_path / "out", vocab_size=900, kind=kind, split=SHARES, quiet=True)
    assert report.vocab_size == 900 == Store(report.output / "train").vocab_size


def test_a_document_without_tokens_is_quarantined(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([*TEXTS, "\u200b\u200d", "\x01"]))
    args = {"vocab_size": 900, "kind": "wordpiece", "split": SHARES, "quiet": True}
    report = prepare(tmp_path / "a.jsonl", tmp_path / "out", **args)
    documents = json.loads((report.output / "manifest.json").read_text())["documents"]
    assert report.quarantined == {"no tokens": 2} and documents == {"read": len(TEXTS) + 2, "kept": len(TEXTS)}


def test_an_empty_split_says_what_to_raise(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS[:30]))
    few = r"too few documents: validation is empty, as 0.0001 of 30 are 0.00 on average. Ask for --split (.*), or give 50,000"
    with pytest.raises(ValueError, match=few) as told:
        prepare(tmp_path / "a.jsonl", tmp_path / "out", split=(0.9, 1e-4, 0.0999), quiet=True)
    better = re.search(few, str(told.value))[1]
    assert better == "0.66,0.17,0.17"
    prepare(tmp_path / "a.jsonl", tmp_path / "made", split=tuple(map(float, better.split(","))), vocab_size=600, quiet=True)
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "b.txt").write_text(TEXTS[0])
    with pytest.raises(ValueError, match=r"too few documents: .* 20 are the least, 500 enough for these shares"):
        prepare(tmp_path / "b.txt", tmp_path / "out", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.txt"]


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 1)  # every file is a unit
    args = {"vocab_size": 600, "split": SHARES, "quiet": True}
    whole = prepare(source, tmp_path / "whole", **args)
    sound, calls = TextTokenizer.encode_batch, []

    def interrupted(self, texts):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sound(self, texts)

    monkeypatch.setattr(TextTokenizer, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", **args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.unfinished", "whole"]
    with pytest.raises(ValueError, match="begun by other means"):
        prepare(source, tmp_path / "out", **(args | {"vocab_size": 601}))
    prepare(source, tmp_path / "out", **args)
    assert calls == [60, 60, 60], "the first unit was not tokenised again"
    assert digests(tmp_path / "out") == digests(whole.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_source_may_name_its_documents_otherwise(tmp_path, monkeypatch):
    def read(ledger, network=True):
        for i, text in enumerate(TEXTS):
            yield from ledger.screen(text, f"embedded:{i % 2}", f"{i}", 1)

    monkeypatch.setattr(embedded, "read", read)
    report = prepare("embedded", tmp_path / "out", vocab_size=600, split=SHARES, quiet=True)
    manifest = json.loads((report.output / "manifest.json").read_text())
    assert manifest["kept_by_source"] == {"embedded:0": 60, "embedded:1": 60}


def test_the_bytes_are_those_of_one_unit(source, made, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 1)
    with workers(2, quiet=True) as team:
        many = prepare(source, tmp_path / "out", vocab_size=900, split=SHARES, workers=team, quiet=True)
    assert digests(many.output) == digests(made[0])


def test_sources_that_change_while_read_are_refused(source, tmp_path, monkeypatch):
    sound, calls = corpus.read_file, []

    def read(*args):
        calls.append(args)
        documents = list(sound(*args))
        return iter(documents[: -len(calls)])

    monkeypatch.setattr(corpus, "read_file", read)
    with pytest.raises(ValueError, match="the sources changed while they were read"):
        prepare(source, tmp_path / "out", vocab_size=600, split=SHARES, quiet=True)


@pytest.mark.parametrize("split", [(0.9, 0.1, 0.0), (0.9, 0.2, 0.1), (0.5, 0.5)])
def test_impossible_requests_say_so(source, tmp_path, split):
    with pytest.raises(ValueError, match="three shares above 0 that sum to 1"):
        prepare(source, tmp_path / "out", split=split, quiet=True)
    with pytest.raises(ValueError, match="given twice"):
        prepare([source, source], tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match="given twice"):
        prepare([source, source / ".." / source.name], tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match="no source given"):
        prepare([], tmp_path / "out", quiet=True)


def test_a_person_sees_a_table(source, tmp_path, capsys):
    prepare(source, tmp_path / "out", vocab_size=60_000, split=SHARES)
    prepare(source, tmp_path / "out", vocab_size=60_000, split=SHARES)
    shown = capsys.readouterr().out
    for word in ("validation", "bytes/token", "quarantined: empty 1, broken JSON 1", "up to date", "vocabulary not 60,000"):
        assert word in shown.replace("\n", " ") or word in " ".join(shown.split())
