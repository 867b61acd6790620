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

from ds_pretrain.curation import documents, reading, runs
from ds_pretrain.curation.documents import Folder
from ds_pretrain.curation.duplicates import clusters, exact, near
from ds_pretrain.curation.minhash import MinHash
from ds_pretrain.curation.passages import passages
from ds_pretrain.curation.reading import normalised, read
from ds_pretrain.curation.workers import Workers, workers

HERE = Workers(quiet=True)
CHAIN = Path(__file__).with_name("chain.py")


def texts_of(folder):
    return [row.text for row in folder.rows()]


@pytest.fixture
def small_parts(monkeypatch):
    """Every file is a part, row groups and buckets are tiny: all the merging that large corpora need."""
    monkeypatch.setattr(reading, "PART", 1)
    monkeypatch.setattr(documents, "ROW_GROUP", 2000)
    monkeypatch.setattr(runs, "BUCKET", 500)


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
    assert [(row.number, row.text) for row in rows] == [(0, "one\ntwo"), (1, "é"), (1 << 32, "three")]
    assert rows[2].file.endswith("b.jsonl") and rows[2].line == 1 and rows[1].line == 3
    assert found.report["quarantined"] == {"empty": 1, "broken JSON": 1, "no field 'text'": 1}
    quarantined = [line for part in sorted((found.path / "quarantine").iterdir()) for line in part.read_text().splitlines()]
    assert len(quarantined) == 3 and {json.loads(line)["line"] for line in quarantined} == {2, 3}
    assert normalised("\ufeffa\x00b\rc") == "ab\nc"


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
def test_near_copies_are_those_that_brute_force_finds(tmp_path, small_parts, threshold):
    """Beside all pairs by hand: no pair below the threshold is joined, and at most the promised share above it is missed."""
    texts, _ = planted(80, 120)
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
    assert report["passed"] <= report["candidates"] and sum(report["clusters"].values()) > 40
    for estimated, truth in report["estimate_and_truth"]:
        assert abs(estimated - truth) < 0.3


def test_clusters_are_chains_and_their_first_stays():
    import numpy as np

    pairs = np.zeros(5, dtype=[("a", "<i8"), ("b", "<i8")])
    pairs["a"], pairs["b"] = [7, 5, 9, 1, 12], [5, 3, 7, 2, 12]
    assert clusters(pairs).tolist() == [(2, 1), (5, 3), (7, 3), (9, 3)]


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


def chained(command, source, out, **env):
    env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **env}
    return subprocess.run([*command, source, str(out)], env=env, capture_output=True, text=True, timeout=120)


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


def killed_workers_parent(command, source, out):
    """Start a chain whose workers are slow, and kill one of them once something is finished."""
    env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "SLOW": "0.4"}
    with subprocess.Popen([*command, source, str(out)], env=env, stderr=subprocess.PIPE, text=True) as process:
        unfinished = out / "read.unfinished" / "kept"
        deadline = time.monotonic() + 60
        while not (list(unfinished.glob("*.parquet")) and (out / "worker.pid").exists()) and time.monotonic() < deadline:
            time.sleep(0.02)
        victim = (out / "worker.pid").read_text()
        os.kill(int(victim), signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    return process.returncode, told


@pytest.mark.parametrize("how", CHAINS)
def test_a_killed_worker_is_told_and_the_next_run_goes_on_to_the_same_bytes(how, alone, tmp_path):
    source, expected = alone
    code, told = killed_workers_parent(CHAINS[how], source, tmp_path / "out")
    assert code != 0 and ("killed" in told.lower() or "signal 9" in told.lower()), told
    with pytest.raises(ValueError, match="stopped: run it again"):
        _ = Folder(tmp_path / "out" / "read").report
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/read.unfinished/kept").glob("part-?????.parquet")}
    assert done
    for left in ("worker.pid", f"host-{platform.node()}"):
        (tmp_path / "out" / left).unlink()
    assert chained(CHAINS[how], source, tmp_path / "out").returncode == 0
    assert digests(tmp_path / "out") == expected
    kept = tmp_path / "out/read/kept"
    assert all((kept / name).stat().st_mtime_ns == when for name, when in done.items()), "a finished part was made again"


def test_a_full_disk_is_told_and_the_next_run_goes_on_to_the_same_bytes(alone, tmp_path):
    """No file may grow beyond 30 kB, which stops a later step: what comes before it is whole."""
    source, expected = alone
    command = [sys.executable, str(CHAIN), "1", source, str(tmp_path / "out")]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30_000, 30_000))
    ran = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=120)
    assert (
        ran.returncode != 0 and "Make room there and run the same command again" in ran.stderr and ".unfinished" in ran.stderr
    ), ran.stderr
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
    with pytest.raises(ValueError, match=r"part-00000.parquet has no bytes instead of"):
        exact(first, tmp_path / "other", HERE)


def test_hours_of_other_settings_are_not_thrown_away(tmp_path):
    source = corpus(tmp_path / "in", [" ".join(edited(random.Random(i), ["a"] * 9, 0.5)) for i in range(9)])
    first = read([source], tmp_path / "read", HERE)
    left = tmp_path / "near.unfinished"
    left.mkdir()
    (left / "request.json").write_text('{"step": "near"}')
    with pytest.raises(ValueError, match=r"was begun by other means .* ask for the same again, or remove it"):
        near(first, tmp_path / "near", HERE)


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
    with pytest.raises(ValueError, match=r"no document in .*b.jsonl .*'empty': 2"):
        read([str(path), str(other)], tmp_path / "none", HERE)
    read([str(path)], tmp_path / "out", HERE)
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="was made by other means"):
        read([str(path)], tmp_path / "out", HERE)
    with pytest.raises(ValueError, match="given twice"):
        read([str(path), str(tmp_path / "." / "a.jsonl")], tmp_path / "twice", HERE)
    plain = reading._rows

    def touched(*arguments):
        yield from plain(*arguments)
        os.utime(path, ns=(5, 5))

    monkeypatch.setattr(reading, "_rows", touched)
    with pytest.raises(ValueError, match="changed while it was read"):
        read([str(path)], tmp_path / "changed", HERE)


def test_mpi_without_its_runner_is_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.delitem(sys.modules, "mpi4py", raising=False)
    with pytest.raises(RuntimeError, match="python -m mpi4py"), workers(1):
        pass
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    with pytest.raises(ValueError, match="jobs must be at least 1"), workers(0):
        pass
