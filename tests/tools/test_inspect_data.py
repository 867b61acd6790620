"""What the tool shows of a store is what is in it, counted and searched here in the plainest way."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import inspect_data

from ds_pretrain.data import inspection
from ds_pretrain.data.store import SPLITS, SUFFIXES, Store, StoreWriter, _sealed
from ds_pretrain.data.tokenizer import TextTokenizer


def run(*arguments) -> str:
    done = CliRunner().invoke(inspect_data.app, [str(argument) for argument in arguments], catch_exceptions=False)
    run.code = done.exit_code
    return done.stdout


def refused(*arguments, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run(*arguments)


@pytest.fixture(scope="module")
def texts(data) -> dict[str, list[str]]:
    tokenizer = TextTokenizer.load(data / "tokenizer")
    stores = {name: Store(data / name) for name in SPLITS}
    return {name: [tokenizer.decode(store[i][:-1]) for i in range(len(store))] for name, store in stores.items()}


@pytest.fixture
def copy(data, tmp_path) -> Path:
    for path in (path for path in data.rglob("*") if path.is_file()):
        (tmp_path / path.relative_to(data)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(data)).write_bytes(path.read_bytes())
    return tmp_path


def test_a_document_is_shown_as_text_and_as_ids(data, texts):
    last = len(texts["test"]) - 1
    for number in (last, -1):
        shown = run("show", data / "test", "--document", number, "--limit", 10**6)
        head, _, body = shown.partition("\n")
        assert body.strip() == (texts["test"][last] + "<eod>").strip().replace("\f", "␌")
        assert head.startswith(f"test document {last}: {Store(data / 'test').lengths[-1]:,} tokens")
    shown = run("show", data / "test.bin", "--tokens", "--limit", 5)
    ids = [line.split("│")[2].strip() for line in shown.splitlines() if line.startswith("│")]
    assert ids == [str(token) for token in Store(data / "test")[0][:5]]
    assert run("show", data, "--limit", 1).startswith("train document 0:")
    refused("show", data / "test", "--document", last + 1, match=rf"no document {last + 1} in .*test, which has {last + 1}")


def test_nothing_in_a_text_steers_the_terminal(data, tmp_path):
    tokenizer = TextTokenizer.load(data / "tokenizer")
    names = {"vocab_size": len(tokenizer), "eod": tokenizer.vocabulary.eod, "tokenizer_digest": tokenizer.digest}
    text = "a\x1b[2Jb [bold]c[/] find me"
    with StoreWriter(tmp_path / "s", **names) as writer:
        writer.add(tokenizer.encode(text), text)
    (tmp_path / "tokenizer").symlink_to(data / "tokenizer")
    for shown in (run("show", tmp_path), run("search", tmp_path, "find")):
        assert "a␛[2Jb [bold]c[/] find me" in shown and "\x1b" not in shown


def test_statistics_are_those_of_the_lengths(data, tmp_path):
    shown = run("stats", data, "--png", tmp_path / "a.png")
    for name in SPLITS:
        store = Store(data / name)
        row = next(line for line in shown.splitlines() if line.startswith(f"│ {name} "))
        cells = [cell.strip().replace(",", "") for cell in row.split("│")[2:-1]]
        lengths = store.lengths
        quantiles = [np.quantile(lengths, share, method="inverted_cdf") for share in (0.5, 0.9, 0.99, 1)]
        assert [float(cell) for cell in cells[:3]] == [len(store), lengths.sum(), store.text[:, 0].sum()]
        assert [float(cell) for cell in cells[4:9]] == [round(float(lengths.mean()), 1), *quantiles]
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("step", [1, 3, 100])
def test_lengths_are_counted_in_pieces(data, step):
    store = Store(data / "train")
    lengths = inspection.Lengths.of(store, step)
    assert dict(zip(lengths.values.tolist(), lengths.counts.tolist(), strict=True)) == Counter(store.lengths.tolist())
    octaves = Counter(int(np.log2(length)) for length in store.lengths.tolist())
    assert {k: documents for k, documents, _ in lengths.octaves() if documents} == octaves
    assert sum(tokens for *_, tokens in lengths.octaves()) == store.lengths.sum()


def test_ids_are_counted_over_all_stores(data, monkeypatch):
    monkeypatch.setattr(Store.chunks, "__defaults__", (1000,))
    count = Counter(np.concatenate([Store(data / name)[i] for name in SPLITS for i in range(len(Store(data / name)))]).tolist())
    shown = run("tokens", data, "--top", 4)
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in shown.splitlines() if line.startswith("│")]
    assert [(int(i), int(n.replace(",", ""))) for i, n in rows[:4]] == sorted(count.items(), key=lambda x: (-x[1], x[0]))[:4]
    assert [int(n.replace(",", "")) for _, n in rows[4:]] == sorted(count.values())[:4]
    assert f"{count.total():,} tokens; {len(count):,} of 1,000 ids occur, {1000 - len(count)} never do" in shown


def documents(shown: str) -> list[tuple[str, int]]:
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in shown.splitlines() if line.startswith("│")]
    return [(name, int(number.replace(",", ""))) for name, number in rows if name]


@pytest.mark.parametrize("needle", ["import", "statement", "e", "\n\n", "th", "__init__", "not there at all", "é"])
def test_a_search_finds_what_the_text_holds(data, texts, needle, monkeypatch):
    monkeypatch.setattr(inspection, "PIECE", 64)
    expected = [(name, i) for name in SPLITS for i, text in enumerate(texts[name]) if needle in text]
    assert documents(run("search", data, needle, "--limit", 10**6)) == expected
    some = run("search", data, needle, "--limit", 2)
    assert documents(some) == expected[:2] and ("limit reached" in some) == (len(expected) > 1)


@pytest.mark.parametrize("chunk", [97, 1 << 22])
@pytest.mark.parametrize("needle", ["import", "statement", "e", "the statement"])
def test_a_search_by_ids_finds_the_sequence(data, needle, chunk, monkeypatch):
    monkeypatch.setattr(Store.chunks, "__defaults__", (chunk,))
    tokenizer, expected = TextTokenizer.load(data / "tokenizer"), []
    wanted = [" ".join(map(str, tokenizer.encode(spelling))) for spelling in (needle, f" {needle}")]
    for name in SPLITS:
        for i in range(len(store := Store(data / name))):
            inside = f" {' '.join(map(str, store[i]))} "
            expected += [(name, i)] if any(f" {ids} " in inside for ids in wanted) else []
    shown = run("search", data, needle, "--ids", "--limit", 10**6)
    assert documents(shown) == expected and shown.count(needle) >= len(expected)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1 << 22])
def test_sequences_are_found_across_the_pieces_of_a_store(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(Store.chunks, "__defaults__", (chunk,))
    with StoreWriter(tmp_path / "s", vocab_size=9, eod=2, tokenizer_digest="") as writer:
        writer.add(np.random.default_rng(0).integers(3, 6, size=500), "a")
    store, wanted = Store(tmp_path / "s"), {(3,), (3, 4, 4), (4, 5, 5, 3, 3, 4)}
    flat = store[0].tolist()
    expected = {(i, len(ids)) for i in range(501) for ids in wanted if tuple(flat[i : i + len(ids)]) == ids}
    assert set(inspection.places(store, wanted, bool)) == expected


def test_verify_finds_every_kind_of_damage_and_goes_on(copy):
    shown = run("verify", copy)
    assert run.code == 0 and shown.count("sound ") == 12 and shown.count("damaged") == 0
    stores = [Store(copy / name) for name in SPLITS]
    size = sum((copy / f"{name}.{suffix}").stat().st_size for name in SPLITS for suffix in SUFFIXES)
    documents, tokens = (sum(store.info[key] for store in stores) for key in ("documents", "tokens"))
    told = f"all is sound: every byte of 3 stores, {documents:,} documents, {tokens:,} tokens, {size:,} bytes"
    assert shown.splitlines()[-1] == told
    for suffix in (*SUFFIXES, "json"):
        path = copy / f"validation.{suffix}"
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        shown = run("verify", copy)
        assert run.code == 1 and shown.count("sound") >= 8 and shown.count("damaged") == 1, shown
        assert "all is sound" not in shown and " wrong, see above: " in shown
        path.unlink()
        shown = run("verify", copy)
        assert run.code == 1 and ("is missing" in shown or "which is not in" in " ".join(shown.split()))
        path.write_bytes(raw)
    assert run("verify", copy / "test").count("sound ") == 4 and run.code == 0


def test_verify_compares_with_the_manifest_and_never_leaves_the_folder(copy):
    for suffix in (*SUFFIXES, "json"):
        (copy / f"test.{suffix}").write_bytes((copy / f"validation.{suffix}").read_bytes())
    assert "not the store that manifest.json lists" in run("verify", copy) and run.code == 1
    for name in ("../train", "/etc/train", "..", "a/../train"):
        (copy / "manifest.json").write_text(json.dumps({"stores": {name: ""}}))
        refused("verify", copy, match="which is no name of a store in")
    (copy / "manifest.json").write_text("[]")
    refused("verify", copy, match=r"manifest\.json is damaged")


def test_verify_looks_at_the_ids_themselves(tmp_path):
    for name, claim in (("ids", {"vocab_size": 99}), ("ends", {"eod": 3})):
        with StoreWriter(tmp_path / name, vocab_size=200, eod=2, tokenizer_digest="") as writer:
            writer.add(np.array([150, 7]), "a")
        fields = json.loads((tmp_path / f"{name}.json").read_text()) | claim
        del fields["digest"]
        (tmp_path / f"{name}.json").write_text(_sealed(fields))
    shown = " ".join(run("verify", tmp_path).split())
    assert "ids 2..150, outside the vocabulary of 99" in shown
    assert "1 documents do not end in the end-of-document id 3" in shown and run.code == 1


def test_a_store_without_its_tokenizer_says_so(copy):
    other = TextTokenizer.train(iter(["some other words"]), 600, "bpe")
    other.save(copy / "tokenizer")
    refused("show", copy, match=r"train was made by tokenizer \w+, not by .*tokenizer")
    refused("stats", copy / "tokenizer", match="no store in .*tokenizer")
    refused("search", copy, "", match="TEXT is empty")


def test_adopt_makes_a_store_of_megatrons_one_that_can_be_looked_into(data, texts, tmp_path):
    for suffix in ("bin", "idx"):
        (tmp_path / f"m.{suffix}").write_bytes((data / f"test.{suffix}").read_bytes())
    assert "adopted" in run("adopt", tmp_path / "m", "--tokenizer", data / "tokenizer")
    assert Store(tmp_path / "m").text[:].tolist() == Store(data / "test").text[:].tolist()
    assert texts["test"][0].split()[0] in run("show", tmp_path / "m") and "*" in run("stats", tmp_path)
    assert run("verify", tmp_path).count("sound ") == 4 and run.code == 0
    TextTokenizer.train(iter(["some other words"]), 600, "bpe").save(tmp_path / "other")
    (tmp_path / "m.json").unlink()
    refused("adopt", tmp_path / "m", "--tokenizer", tmp_path / "other", match="is another tokenizer than")


def test_mistakes_end_with_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", "show", str(tmp_path)])
    with pytest.raises(SystemExit) as done:
        inspect_data.main()
    assert done.value.code == 2 and "no store in" in capsys.readouterr().err
