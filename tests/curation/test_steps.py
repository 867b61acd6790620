"""Steps from folder to folder: what is dropped and why, the same bytes for any number of workers, and no work done twice."""

import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from planted import digests, edited, jaccard, jsonl, planted, words

from ds_pretrain.core.differing import differing
from ds_pretrain.curation import documents, duplicates, reading, runs
from ds_pretrain.curation.contamination import decontaminate
from ds_pretrain.curation.documents import Folder
from ds_pretrain.curation.duplicates import _together, clusters, exact, near
from ds_pretrain.curation.minhash import MinHash
from ds_pretrain.curation.passages import passages
from ds_pretrain.curation.quality import Gopher
from ds_pretrain.curation.reading import normalised, read
from ds_pretrain.curation.screening import screening
from ds_pretrain.curation.workers import Workers, workers
from ds_pretrain.data import corpus as data
from ds_pretrain.data import sources

HERE = Workers(quiet=True)
CHAIN = Path(__file__).with_name("chain.py")
PATIENCE = 900
"""Seconds after which a test gives up: nothing of it takes long but for a machine that does much else."""


def texts_of(folder):
    return [row.text for row in folder.rows()]


@pytest.fixture
def small_parts(monkeypatch):
    """Files are several parts, row groups and buckets are tiny: all the merging that large corpora need."""
    monkeypatch.setattr(sources, "UNIT", 1)
    monkeypatch.setattr(reading, "PART", 4000)
    monkeypatch.setattr(documents, "ROW_GROUP", 2000)
    monkeypatch.setattr(runs, "BUCKET", 500)
    monkeypatch.setattr(duplicates, "AT_ONCE", 8000)


def corpus(folder, texts, files=4):
    for i in range(files):
        jsonl(folder / f"{i}.jsonl", texts[i::files])
    return str(folder)


def order(texts, files=4):
    """The texts as they are read from `corpus`."""
    return [text for i in range(files) for text in texts[i::files]]


def test_reading_numbers_documents_and_counts_what_it_refuses(tmp_path, small_parts):
    folder = tmp_path / "in"
    jsonl(folder / "a.jsonl", ["one\r\ntwo", "", "e\u0301"])
    (folder / "b.jsonl").write_text('{"text": "three"}\nnonsense\n{"words": 1}\n')
    found = read([str(folder)], tmp_path / "out", HERE)
    rows = list(found.rows())
    assert [(row.number, row.text) for row in rows] == [(0, "one\ntwo"), (1, "é"), (1 << 42, "three")]
    assert rows[2].file.endswith("b.jsonl") and rows[2].line == 1 and rows[1].line == 3
    assert found.report["quarantined"] == {"empty": 1, "broken JSON": 1, "no field 'text'": 1}
    quarantined = [line for part in sorted((found.path / "quarantine").iterdir()) for line in part.read_text().splitlines()]
    assert len(quarantined) == 3 and {json.loads(line)["line"] for line in quarantined} == {2, 3}
    assert normalised("\ufeffa\x00b\rc") == "ab\nc"


def test_a_large_file_becomes_parts_of_bounded_size(tmp_path, monkeypatch):
    texts = [f"document {i} " * 5 for i in range(100)]
    path = jsonl(tmp_path / "a.jsonl", texts)
    whole = read([str(path)], tmp_path / "whole", HERE)
    monkeypatch.setattr(reading, "PART", 1000)
    cut = read([str(path)], tmp_path / "cut", HERE)
    assert [part.stem for part in whole.parts] == ["part-000000"]
    assert [part.stem for part in cut.parts[:3]] == ["part-000000", "part-000000_00001", "part-000000_00002"]
    sizes = [sum(len(row.text) for row in documents.read_part(part)) for part in cut.parts]
    assert len(sizes) > 5 and all(1000 <= size < 1100 for size in sizes[:-1])
    rows = list(cut.rows())
    assert [(row.text, row.line) for row in rows] == [(row.text, row.line) for row in whole.rows()]
    assert [row.number for row in rows] == sorted({row.number for row in rows})
    monkeypatch.setattr(reading, "ROLLS", 3)
    with pytest.raises(ValueError, match="has over 3,000 bytes of text: cut it up"):
        read([str(path)], tmp_path / "large", HERE)


def test_exact_copies_go_but_for_the_first(tmp_path, small_parts):
    draw = random.Random(0)
    base = [" ".join(words(draw, 20)) for _ in range(40)]
    texts = base + [base[i].replace(" ", "\n  ") for i in range(0, 40, 2)] + [base[3]] * 5
    draw.shuffle(texts)
    found = exact(read([corpus(tmp_path / "in", texts)], tmp_path / "read", HERE), tmp_path / "out", HERE)
    seen, kept = {}, []
    for text in order(texts):
        key = " ".join(text.split())
        kept += [] if key in seen else [text]
        seen.setdefault(key, text)
    assert texts_of(found) == kept
    first = {" ".join(row.text.split()): row.number for row in found.rows()}
    assert all(first[" ".join(d.row.text.split())] == d.of and d.reason == "exact copy" for d in found.dropped())
    assert found.report["dropped"] == {"exact copy": 25} and found.report["documents"] == 40


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_near_copies_are_those_that_brute_force_finds(tmp_path, small_parts, monkeypatch, threshold):
    """Beside all pairs by hand: no pair below the threshold is joined, and at most the promised share above it is missed."""
    texts, _ = planted(80, 120)
    chunks, whole = [], duplicates._verify
    monkeypatch.setattr(duplicates, "_verify", lambda *unit: chunks.append(unit) or whole(*unit))
    found = near(
        read([corpus(tmp_path / "in", texts)], tmp_path / "read", HERE), tmp_path / "out", HERE, MinHash(threshold=threshold)
    )
    texts = order(texts)
    pairs = [(a, b) for a in range(len(texts)) for b in range(a) if jaccard(texts[a], texts[b]) >= threshold]
    root = list(range(len(texts)))

    def find(x):
        return x if root[x] == x else find(root[x])

    for a, b in pairs:
        low, high = sorted((find(a), find(b)))
        root[high] = low
    true = {texts[x]: texts[find(x)] for x in range(len(texts)) if find(x) != x}
    by_number = {row.number: row.text for row in found.rows()}
    dropped = {d.row.text: by_number[d.of] for d in found.dropped()}
    assert len(true) > 80 and set(dropped) <= set(true)
    assert len(true) - len(dropped) <= 0.05 * len(true)
    agreeing = sum(true[text] == keeper for text, keeper in dropped.items())
    assert agreeing >= 0.95 * len(dropped)
    report = found.report
    assert len(chunks) > 5 and report["passed"] <= report["candidates"] and sum(report["clusters"].values()) > 40
    for estimated, truth in report["estimate_and_truth"]:
        assert abs(estimated - truth) < 0.3


def test_clusters_are_chains_and_their_first_stays():
    import numpy as np

    left, right = np.array([7, 5, 9, 1, 12]), np.array([5, 3, 7, 2, 12])
    assert clusters(left, right).tolist() == [(2, 1), (5, 3), (7, 3), (9, 3)]


def test_pairs_of_a_cluster_are_compared_together_and_each_once():
    import numpy as np

    rng = np.random.default_rng(0)
    pairs = np.unique(np.sort(rng.integers(0, 60, (80, 2)) * 2 + rng.integers(0, 2, (80, 1)), axis=1), axis=0)
    ordered = _together(pairs)
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, pairs.tolist()))
    roots = dict(clusters(pairs[:, 0], pairs[:, 1]).tolist())
    seen = [roots.get(a, a) for a, _ in ordered.tolist()]
    assert seen == sorted(seen) and len(set(seen)) > 5, "one cluster after the other"


@pytest.mark.parametrize("step", [exact, near, passages])
def test_no_document_left_is_told_by_whatever_comes_next(tmp_path, step):
    before = read([corpus(tmp_path / "in", ["short"] * 3, 1)], tmp_path / "read", HERE)
    nothing = screening(before, tmp_path / "screen", HERE, [Gopher()])
    told = (
        r"too few documents: none is left in .*screen. Its step screen dropped 3, most often for gopher/word_count \(3\): ask"
    )
    with pytest.raises(ValueError, match=told):
        step(nothing, tmp_path / "out", HERE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "read", "screen"]


def test_texts_without_words_resemble_nothing(tmp_path):
    texts = ["!!!", "...", "???", "--", "a b c"]
    found = near(read([corpus(tmp_path / "in", texts, 1)], tmp_path / "read", HERE), tmp_path / "out", HERE)
    assert texts_of(found) == texts and found.report["candidates"] == 0


LICENCE = "Licensed under the terms below, " + " ".join(f"term{i}" for i in range(60)) + " and no other."


def test_repeated_passages_are_cut_but_for_their_first(tmp_path, small_parts):
    draw = random.Random(0)
    bodies = [" ".join(f"v{draw.randrange(10**9)}" for _ in range(60)) + "." for _ in range(9)]
    texts = [
        f"# {LICENCE}\n# more{i}\n{body}" if i % 3 else f"{body}\n\n* {LICENCE.upper()}\n" for i, body in enumerate(bodies)
    ]
    texts += [f"Yes. {LICENCE} {bodies[8]}", LICENCE, " ".join(words(draw, 30, 10))]
    found = passages(read([corpus(tmp_path / "in", texts)], tmp_path / "read", HERE), tmp_path / "out", HERE)
    texts = order(texts)
    kept = {row.number: row.text for row in found.rows()}
    assert kept[0] == texts[0], "the first occurrence stays"
    everything = "\n".join(kept.values()).lower()
    assert everything.count("term30") == 1 and all(everything.count(body.lower()) == 1 for body in bodies)
    assert everything.count("# more") == 6 and any(text.startswith("Yes.") for text in kept.values())
    assert [d.reason for d in found.dropped()] == ["repeated passages only"]
    assert found.report["cut"] >= 9 and found.report["passages"][0][0].lower().lstrip("#* ").startswith("licensed under")


def test_passages_are_cut_as_a_search_by_hand_finds_them(tmp_path, small_parts):
    """Every run of 50 words that came before is gone, and no word that is in no such run."""
    draw = random.Random(5)
    blocks = [words(draw, draw.randrange(20, 90), 10**9) for _ in range(30)]
    texts = [" ".join(word for block in draw.choices(blocks, k=draw.randrange(1, 5)) for word in block) for _ in range(60)]
    found = passages(read([corpus(tmp_path / "in", texts)], tmp_path / "read", HERE), tmp_path / "out", HERE)
    seen, expected = set(), []
    for text in order(texts):
        each = text.split()
        marked = [False] * len(each)
        for i in range(len(each) - 49):
            gram = tuple(each[i : i + 50])
            if gram in seen:
                marked[i : i + 50] = [True] * 50
            seen.add(gram)
        left = [word for word, gone in zip(each, marked, strict=True) if not gone]
        expected += [left] if left else []
    assert [text.split() for text in texts_of(found)] == expected


CHAINS = {
    "processes": [sys.executable, str(CHAIN), "2"],
    "mpi": [
        str(Path(sys.executable).with_name("mpirun")),
        "--oversubscribe",
        "-n",
        "3",
        sys.executable,
        "-m",
        "mpi4py",
        str(CHAIN),
        "1",
    ],
}


ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def chained(command, source, out):
    return subprocess.run(
        [*command, source, str(out)], env={**os.environ, **ROOT}, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A corpus, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    texts, _ = planted(40, 60)
    texts += texts[:10]
    source = corpus(folder / "in", texts, 5)
    ran = chained([sys.executable, str(CHAIN), "1"], source, folder / "out")
    assert ran.returncode == 0, ran.stderr
    return source, digests(folder / "out")


@pytest.mark.parametrize("how", CHAINS)
def test_the_bytes_do_not_depend_on_who_works(how, alone, tmp_path):
    source, expected = alone
    ran = chained(CHAINS[how], source, tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    assert digests(tmp_path / "out") == expected


def killed(command, stage, victim, source, out):
    """Start a chain that is slow at a stage, and kill one of its workers or all but these once some of that is finished.

    The exit code, what was told, and the parts that were there and when they were made.
    """
    (out / "worker.pid").unlink(missing_ok=True)
    env = {**os.environ, **ROOT, "SLOW": "5", "STAGE": stage}
    with subprocess.Popen([*command, source, str(out)], env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while not (out / "worker.pid").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        worker = int((out / "worker.pid").read_text())
        made = {path: path.stat().st_mtime_ns for path in finished(out)}
        os.kill(worker if victim == "worker" else process.pid, signal.SIGKILL)
        _, told = process.communicate(timeout=300)  # an end only when no worker is left to write to it either
    return process.returncode, told, made


def finished(out):
    """The parts of an unfinished step; of sources, those of which all have been read."""
    read = {int(path.stem.removeprefix("unit-")) for path in out.glob("read.unfinished/work/unit-*.json")}
    parts = out.glob("*.unfinished/kept/part-*.parquet")
    return [
        path for path in parts if path.parts[-3] != "read.unfinished" or documents.number_of(path) // documents.ROLLS in read
    ]


KILLS = [
    ("processes", stage) for stage in ("read: read", "passages: cut", "near: hash", "near: verify", "near: write", "tokenise")
]


@pytest.mark.parametrize("how, stage", [*KILLS, ("mpi", "read: read")])
def test_the_run_after_a_kill_goes_on_to_the_same_bytes(how, stage, alone, tmp_path):
    """Of a worker, which is told; then of the process that leads, whose workers end with it (mpirun's own can do neither)."""
    (source, expected), out = alone, tmp_path / "out"
    step = "data" if stage == "tokenise" else stage.partition(":")[0]
    made = {}
    for victim in ("worker", "leader") if how == "processes" else ("worker",):
        code, told, there = killed(CHAINS[how], stage, victim, source, out)
        assert code != 0 and (out / f"{step}.unfinished").exists() and not (out / step).exists(), told
        assert victim == "leader" or "killed" in told.lower() or "signal 9" in told.lower(), told
        assert there or stage not in ("read: read", "passages: cut", "near: write")
        assert made.items() <= there.items(), "a finished part was made again"
        made = there
    if step != "data":
        with pytest.raises(ValueError, match="stopped: run it again"):
            _ = Folder(out / step).report
    for left in ("worker.pid", f"host-{platform.node()}"):
        (out / left).unlink()
    assert chained(CHAINS[how], source, out).returncode == 0
    assert digests(out) == expected
    named = {out / step / "kept" / path.name: when for path, when in made.items()}
    assert all(path.stat().st_mtime_ns == when for path, when in named.items()), "a finished part was made again"


def test_a_full_disk_is_told_and_the_next_run_goes_on_to_the_same_bytes(alone, tmp_path):
    """No file may grow beyond 30 kB, which stops a later step: what comes before it is whole."""
    source, expected = alone
    command = [sys.executable, str(CHAIN), "1", source, str(tmp_path / "out")]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30_000, 30_000))
    ran = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=PATIENCE)
    told = ran.stderr.splitlines()[-1]
    assert ran.returncode != 0 and "Make room there and run the same command again" in told, ran.stderr
    assert told.count("Errno") == told.count("File too large") == 1 and ".unfinished, whose disk has " in told
    assert list((tmp_path / "out").glob("*.unfinished"))
    assert chained([sys.executable, str(CHAIN), "1"], source, tmp_path / "out").returncode == 0
    assert digests(tmp_path / "out") == expected


def test_a_step_is_made_once_and_never_from_other_inputs(tmp_path):
    source = corpus(tmp_path / "in", [f"text number {i}" for i in range(20)])
    first = read([source], tmp_path / "read", HERE)
    before = digests(first.path)
    read([source], tmp_path / "read", HERE)
    assert digests(first.path) == before
    exact(first, tmp_path / "exact", HERE)
    with pytest.raises(ValueError, match="was made by other means"):
        near(first, tmp_path / "exact", HERE)
    with pytest.raises(ValueError, match="was made by other means"):
        read([source], tmp_path / "read", HERE, text_field="body")
    with pytest.raises(ValueError, match="holds no finished documents"):
        exact(Folder(tmp_path / "nothing"), tmp_path / "out", HERE)
    next(iter(first.parts)).unlink()
    with pytest.raises(ValueError, match=r"part-000000.parquet has no bytes instead of"):
        exact(first, tmp_path / "other", HERE)


def test_hours_of_other_settings_are_not_thrown_away(tmp_path):
    source = corpus(tmp_path / "in", [" ".join(edited(random.Random(i), ["a"] * 9, 0.5)) for i in range(9)])
    first = read([source], tmp_path / "read", HERE)
    left = tmp_path / "near.unfinished"
    left.mkdir()
    (left / "request.json").write_text('{"step": "near"}')
    with pytest.raises(ValueError, match=r"was begun by other means .* ask for the same again, or remove it"):
        near(first, tmp_path / "near", HERE)


def test_a_result_is_never_taken_for_another_requests(tmp_path, monkeypatch):
    """Killed when all is made but the name."""
    source = corpus(tmp_path / "in", [f"text {i}" for i in range(9)])
    first = read([source], tmp_path / "read", HERE)

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        near(first, tmp_path / "near", HERE, MinHash(threshold=0.9))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"was begun by other means \(asked.threshold: 0.9 -> 0.7\)"):
        near(first, tmp_path / "near", HERE, MinHash(threshold=0.7))
    assert near(first, tmp_path / "near", HERE, MinHash(threshold=0.9)).report["documents"] == 9


def test_a_mistake_before_any_work_leaves_nothing(tmp_path):
    other = jsonl(tmp_path / "in" / "b.jsonl", ["\x01\x02", "\ufeff "])
    with pytest.raises(ValueError, match=r"no text of .* has 13 words"):
        decontaminate(
            read([corpus(tmp_path / "c", ["a b"] * 9)], tmp_path / "read", HERE), tmp_path / "out", HERE, [str(other)]
        )
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_flipped_bit_between_steps_is_seen(tmp_path):
    source = corpus(tmp_path / "in", [" ".join(words(random.Random(i), 40)) for i in range(60)], 1)
    first = read([source], tmp_path / "read", HERE)
    sound = first.parts[0].read_bytes()
    seen, rows = 0, list(first.rows())
    for place in range(200, len(sound) - 200, len(sound) // 40):
        first.parts[0].write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        try:
            assert list(first.rows()) == rows, "changed without a word"
        except ValueError as error:
            assert "part-000000.parquet is damaged" in str(error)
            seen += 1
    assert seen > 20  # the rest are where nothing is read


def test_one_text_is_not_read_twice(tmp_path):
    path = jsonl(tmp_path / "in" / "a.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match=r"a.jsonl of .* was read as .*a.jsonl of .*in: every document"):
        read([str(tmp_path / "in"), str(path)], tmp_path / "out", HERE)
    with pytest.raises(ValueError, match="lies inside of the source"):
        read([str(tmp_path / "in")], tmp_path / "in" / "out", HERE)


def test_a_request_that_differs_is_told_in_short():
    was = {"asked": {"sources": [["a", i] for i in range(3000)], "field": "text"}}
    now = {"asked": {"sources": [["a", i + (i == 77)] for i in range(3000)], "field": "text"}}
    assert differing(was, now) == "asked.sources: 1 of 3000 entries, first ['a', 77] -> ['a', 78]"
    assert len(differing({"a": "x" * 9999}, {"a": "y"})) < 120


def test_two_at_once_are_refused(tmp_path):
    source = corpus(tmp_path / "in", [f"text {i}" for i in range(9)])
    first = read([source], tmp_path / "read", HERE)

    class Nosy(Workers):
        def map(self, what, work, units):
            with pytest.raises(ValueError, match="another process is at work in"):
                exact(first, tmp_path / "exact", HERE)
            return Workers.map(self, what, work, units)

    assert exact(first, tmp_path / "exact", Nosy(quiet=True)).report["documents"] == 9


@pytest.mark.parametrize("step", [read, exact, near, passages])
def test_a_kill_between_the_report_and_the_name_is_got_over(step, tmp_path, monkeypatch):
    source = corpus(tmp_path / "in", [f"text {i}" for i in range(9)])
    before = [source] if step is read else read([source], tmp_path / "read", HERE)
    rename = Path.rename

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        step(before, tmp_path / "out", HERE)
    monkeypatch.setattr(Path, "rename", rename)
    assert step(before, tmp_path / "out", HERE).report["documents"] == 9
    assert not (tmp_path / "out" / "work").exists() and not (tmp_path / "out" / "lock").exists()


def test_sources_that_change_or_have_no_text_are_told(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    other = jsonl(tmp_path / "b.jsonl", ["\x01\x02", "\ufeff "])
    with pytest.raises(ValueError, match=r"no document in .*b.jsonl .*empty: 2"):
        read([str(path), str(other)], tmp_path / "none", HERE)
    read([str(path)], tmp_path / "out", HERE)
    with pytest.raises(ValueError, match="given twice"):
        read([str(path), str(tmp_path / "." / "a.jsonl")], tmp_path / "twice", HERE)
    sound, plain = path.read_text(), data.read_file
    jsonl(path, ["one", "owt"])
    with pytest.raises(ValueError, match=r"made by other means \(asked.files: .*a.jsonl', 32, '.* -> .*a.jsonl', 32, '"):
        read([str(path)], tmp_path / "out", HERE)

    def edited_meanwhile(*arguments):
        yield from plain(*arguments)
        path.write_text(sound)

    monkeypatch.setattr(data, "read_file", edited_meanwhile)
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read"):
        read([str(path)], tmp_path / "changed", HERE)


def test_a_touch_is_no_change(tmp_path, monkeypatch):
    """Before, between a stop and the next run, and while a source is read."""
    source, plain = corpus(tmp_path / "in", ["one", "two", "three"], 3), data.read_file
    monkeypatch.setattr(sources, "UNIT", 1)
    first = digests(read([source], tmp_path / "out", HERE).path)

    def touched(path, *arguments):
        yield from plain(path, *arguments)
        os.utime(path, ns=(5, 5))
        if path.name == "2.jsonl":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "read_file", touched)
        read([source], tmp_path / "again" / "out", HERE)
    assert digests(read([source], tmp_path / "again" / "out", HERE).path) == first
    assert digests(read([source], tmp_path / "out", HERE).path) == first


def test_what_an_earlier_version_made_is_refused_as_such(tmp_path):
    source = corpus(tmp_path / "in", ["one", "two"], 1)
    report = read([source], tmp_path / "out", HERE).path / "report.json"
    report.write_text(report.read_text().replace(f'"version": {documents.VERSION}', '"version": 2'))
    with pytest.raises(ValueError, match=r"by other means \(by version 2 of these tools, which are version \d now\): choose"):
        read([source], tmp_path / "out", HERE)


def test_mpi_without_its_runner_is_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.delitem(sys.modules, "mpi4py", raising=False)
    with pytest.raises(RuntimeError, match="python -m mpi4py"), workers(1):
        pass
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    with pytest.raises(ValueError, match="jobs must be at least 1"), workers(0):
        pass
