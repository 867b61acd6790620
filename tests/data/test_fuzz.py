"""10,000 fuzzed inputs: none crashes, none is lost without a word, and kept + quarantined is exactly what was written.

Most records are made together with the verdict they must get; the others are damaged at random, where only the account
can be checked: each line is kept or quarantined, once.
"""

import gzip
import io
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ds_pretrain.data import corpus
from ds_pretrain.data.corpus import Ledger, cut, read

SMALL = 4000
"""Bytes of a giant record here."""
LETTERS = 'abc xyz,.é日本😀\u2028\ufeff\t"\\/{}[]\x7f\x85'
SHARES = {"jsonl": 5000, "damaged": 2500, "txt": 1000, "parquet": 600, "cut": 300, "flipped": 600}


def text(rng: random.Random) -> str:
    return "t" + "".join(rng.choices(LETTERS, k=rng.randrange(60)))


def row(rng: random.Random, **fields) -> bytes:
    return json.dumps({"id": rng.random(), **fields}, ensure_ascii=rng.random() < 0.5).encode()


def sound(rng: random.Random) -> tuple[bytes, str]:
    """A line of JSON and the text that it must give."""
    found = text(rng)
    nested = json.loads("[" * (depth := rng.randrange(1, 60)) + "]" * depth)
    line = rng.choice([row(rng, text=found), row(rng, text=found, meta=nested), b"  " + row(rng, text=found) + b" \r"])
    return line, found


BAD = {
    "broken JSON": [
        lambda r: row(r, text=text(r))[: r.randrange(1, 20)], lambda r: b"[" * r.choice([900, 3900]),
        lambda r: row(r, text=text(r)) + b"}", lambda r: row(r, text="a") * 2, lambda r: b"\xef\xbb\xbf" + row(r, text="a"),
        lambda r: b"{'text': 'a'}", lambda r: b'{"text": "a\tb\x01"}', lambda r: b'{"n": ' + b"9" * 3000 + b',"text"}',
    ],
    "no field 'text'": [lambda r: row(r, Text="a"), lambda r: b'["text"]', lambda r: r.choice([b"null", b'"text"', b"1e999"])],
    "field 'text' is not text": [
        lambda r: row(r, text=r.choice([None, 5, 0.5, True, ["a"], {"text": "a"}])), lambda r: b'{"text": NaN}',
    ],
    "invalid UTF-8": [
        lambda r: b'{"text": "' + r.choice([b"\xff", b"\xc0\xaf", b"\xe6\x97", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"]) + b'"}',
        lambda r: b'{"text": "\\ud83d"}', lambda r: "ab".encode("utf-16"),
    ],
    "NUL": [lambda r: row(r, text=text(r) + "\0" + text(r))],
    "empty": [lambda r: b"", lambda r: b" \r", lambda r: row(r, text=r.choice(["", " ", "\n\t\u2003"]))],
    "giant": [lambda r: row(r, text="x" * (SMALL + r.randrange(SMALL))), lambda r: b"{" * 3 * SMALL],
}  # fmt: skip


def packed(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    return rng.choice([("", data), (".gz", gzip.compress(data)), (".zst", zstandard.compress(data))])


def account(path: Path, folder: Path) -> tuple[dict[int, str], dict[int, str], Ledger]:
    """Texts and reasons by line."""
    ledger = Ledger(folder / f"{random.random()}.jsonl")
    kept = [(document.line, document.text) for document in read(path, ledger)]
    rows = [json.loads(line) for line in ledger.quarantine.read_text().split("\n")[:-1]] if ledger.quarantine.exists() else []
    assert all(set(row) == {"file", "line", "reason", "head"} and len(row["head"]) <= corpus.SHOWN for row in rows)
    assert ledger.kept.total() == len(kept) == len(dict(kept)) and ledger.refused == Counter(row["reason"] for row in rows)
    return dict(kept), {row["line"]: row["reason"] for row in rows}, ledger


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(corpus, "GIANT", SMALL)


def test_the_inputs_are_ten_thousand():
    assert sum(SHARES.values()) == 10_000


@pytest.mark.parametrize("seed", range(50))
def test_every_line_of_json_gets_its_verdict(tmp_path, seed):
    rng = random.Random(seed)
    lines, expected = [], {}
    for number in range(1, SHARES["jsonl"] // 50 + 1):
        if rng.random() < 0.4 or number == 1:
            line, expected[number] = sound(rng)
        else:
            reason = rng.choice(list(BAD))
            line, expected[number] = rng.choice(BAD[reason])(rng), f"!{reason}"
        lines.append(line)
    suffix, data = packed(rng, rng.choice([b"", b"\xef\xbb\xbf"]) + b"\n".join(lines) + b"\n")
    path = tmp_path / f"..{seed}.{rng.choice(['jsonl', 'ndjson'])}{suffix}"
    path.write_bytes(data)
    kept, refused, _ = account(path, tmp_path)
    assert kept | {line: f"!{reason}" for line, reason in refused.items()} == expected
    assert len(kept) + len(refused) == len(lines)


@pytest.mark.parametrize("seed", range(25))
def test_each_damaged_line_is_kept_or_quarantined_once(tmp_path, seed):
    rng = random.Random(1000 + seed)
    data = bytearray(b"\n".join([b'{"text": "one is sound"}', *(sound(rng)[0] for _ in range(99))]))
    for _ in range(rng.choice([30, 300, 3000])):
        place = rng.randrange(25, len(data))
        data[place : place + rng.randrange(3)] = rng.choice(
            [rng.randbytes(rng.randrange(3)), b"\n", b"\r\n", b"\0", b'"', b"\\u"]
        )
    data += b"\nx" * (SHARES["damaged"] // 25 - 1 - data.count(b"\n"))
    lines = bytes(data).split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    suffix, raw = packed(rng, bytes(data))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(raw)
    kept, refused, _ = account(path, tmp_path)
    assert not kept.keys() & refused.keys() and kept.keys() | refused.keys() == set(range(1, len(lines) + 1))
    for line, found in kept.items():
        assert json.loads(lines[line - 1].decode("utf-8-sig"))["text"] == found
    assert len(kept) + len(refused) >= SHARES["damaged"] // 25


@pytest.mark.parametrize("seed", range(10))
def test_every_text_between_form_feeds_gets_its_verdict(tmp_path, seed):
    rng = random.Random(2000 + seed)
    bad = {"invalid UTF-8": b"a\xff\xfe", "NUL": b"a\n\0", "empty": b" \r\n\n"}
    parts, expected = [], []
    for _ in range(SHARES["txt"] // 10 - 1):
        if rng.random() < 0.6:
            found = "".join(text(rng) + rng.choice(["\n", "\r\n", "\n\n"]) for _ in range(rng.randrange(1, 4)))
            parts.append(found.encode())
            expected.append(found)
        else:
            parts.append(bad[reason := rng.choice(list(bad))])
            expected.append(f"!{reason}")
    suffix, data = packed(rng, b"\xef\xbb\xbf" + b"\f".join([*parts, b"the last"]))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data)
    ledger = Ledger(tmp_path / "quarantine.jsonl")
    kept = [document.text for document in read(path, ledger)]
    assert kept == [part for part in expected if part[0] != "!"] + ["the last"]
    assert ledger.refused == Counter(part[1:] for part in expected if part[0] == "!")


@pytest.mark.parametrize("seed", range(200))
def test_cutting_loses_no_byte(seed):
    rng = random.Random(seed)
    lines = [(rng.choice([b"a", b"", b" ", b"b\fc", b"\f", b"\f\f "]) * rng.randrange(3) + b"\n", False) for _ in range(40)]
    lines = [rng.choice([line, line, line, (b"G" * 30, True)]) for line in lines]
    found = list(cut(iter(lines), soft=rng.randrange(1, 20), hard=rng.randrange(20, 40)))
    assert sum(giant for *_, giant in found) == sum(giant for _, giant in lines)
    before = b"".join(line for line, _ in lines).replace(b"\f", b"")
    after = b"".join(part for _, part, _ in found)
    assert before.startswith(after) and not before[len(after) :].strip()
    assert [line for line, *_ in found] == sorted(line for line, *_ in found)


@pytest.mark.parametrize("seed", range(10))
def test_every_row_of_parquet_gets_its_verdict(tmp_path, seed):
    rng = random.Random(3000 + seed)
    bad = {
        "no field 'text'": None, "empty": b" ", "NUL": b"a\0", "invalid UTF-8": b"\xed\xa0\x80", "giant": b"x" * (SMALL + 1)
    }  # fmt: skip
    expected = {row: rng.choice([text(rng), f"!{rng.choice(list(bad))}"]) for row in range(1, SHARES["parquet"] // 10 + 1)}
    expected[1] = "\ufeff" * rng.randrange(2) + "first"
    values = [bad[found[1:]] if found[0] == "!" else found.encode() for found in expected.values()]
    column = pa.array(values, pa.binary()).view(pa.string()).cast(rng.choice([pa.string(), pa.large_string()]), safe=False)
    data = io.BytesIO()
    pq.write_table(pa.table({"text": column}), data, row_group_size=rng.randrange(1, 60))
    suffix, raw = packed(rng, data.getvalue())
    path = tmp_path / f"a.parquet{suffix}"
    path.write_bytes(raw)
    kept, refused, _ = account(path, tmp_path)
    expected[1] = "first"
    assert kept | {row: f"!{reason}" for row, reason in refused.items()} == expected


def whole(rng: random.Random, kind: str) -> bytes:
    texts = [text(rng) * 9 for _ in range(40)]
    if kind == "parquet":
        data = io.BytesIO()
        pq.write_table(pa.table({"text": texts}), data, row_group_size=10)
        return data.getvalue()
    return "".join(json.dumps({"text": found}) + "\n" for found in texts).encode()


@pytest.mark.parametrize("kind, suffix", [("jsonl", ".gz"), ("jsonl", ".zst"), ("parquet", "")])
def test_a_file_that_is_cut_anywhere_is_named_even_beside_a_sound_one(tmp_path, kind, suffix):
    rng = random.Random(kind + suffix)
    (tmp_path / "a.jsonl").write_text('{"text": "sound"}\n')
    raw = whole(rng, kind)
    raw = {".gz": gzip.compress, ".zst": zstandard.compress, "": bytes}[suffix](raw)
    for length in [0, 1, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(SHARES["cut"] // 3 - 3))]:
        (tmp_path / f"b.{kind}{suffix}").write_bytes(raw[:length])
        with pytest.raises(ValueError, match=rf"b\.{kind}{suffix} is damaged"):
            list(read(tmp_path))


@pytest.mark.parametrize("kind, suffix, share", [("jsonl", ".gz", 0.2), ("jsonl", ".zst", 0.2), ("parquet", "", 0.6)])
def test_flipped_bytes_stop_with_the_name_or_change_nothing_in_the_account(tmp_path, kind, suffix, share):
    rng = random.Random(kind + suffix + "flip")
    raw = whole(rng, kind)
    raw = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress, "": bytes}[suffix](raw)
    path = tmp_path / f"b.{kind}{suffix}"
    outcomes: Counter[str] = Counter()
    for _ in range(int(SHARES["flipped"] * share)):
        damaged = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(raw) // 2 * (kind == "parquet"), len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        ledger = Ledger()
        try:
            list(read(path, ledger))
            outcomes["read"] += 1
            assert ledger.kept.total() + ledger.refused.total() == 40
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["named"] += 1
    print(kind, suffix, dict(outcomes))
    assert outcomes["named"] > 30


def test_strange_names_are_read_and_paths_may_climb(tmp_path):
    folder = tmp_path / "in" / "..hidden"
    folder.mkdir(parents=True)
    names = ["..a.jsonl", " .jsonl", "new\nline.jsonl", "日本.jsonl", os.fsdecode(b"\xff\xfe.jsonl"), "[*]?.jsonl"]
    for name in names:
        (folder / name).write_text('{"text": "a"}\nbad\n')
    kept, refused, ledger = 0, 0, Ledger(tmp_path / "q.jsonl")
    for source in (folder, folder / ".." / "..hidden", f"{tmp_path}/in/../in/..hidden/..a.jsonl"):
        list(read(source, ledger))
    kept, refused = ledger.kept.total(), ledger.refused.total()
    assert kept == refused == 2 * len(names) + 1 == len((tmp_path / "q.jsonl").read_text().split("\n")) - 1
    assert Counter(str(p) for p in tmp_path.iterdir()) == Counter(str(tmp_path / n) for n in ("in", "q.jsonl"))
