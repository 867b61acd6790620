"""Near-duplicates: what is found, what is wrongly dropped, and MB/s, beside datasketch and rensa on the same texts.

    pip install datasketch rensa
    python benchmarks/duplicates.py --megabytes 24

The texts are stretches of the embedded corpus, each with up to three edited copies planted beside it. The truth is the
Jaccard similarity of word 5-grams for every pair that shares one, counted with Python sets. Ours is timed from a folder of
documents to a folder of documents, pairs verified and files written, in one process; the others from texts in memory to the
numbers of the dropped, with their own hashing where they have one, as their manuals show it, `jaccard` asked before a
candidate counts. All have signatures of 128 and the same threshold. A second table shows ours at three sizes: time and peak
memory; there the words of a stretch are in random order, for else the more stretches are cut from one bounded corpus, the more
of them overlap, and pairs grow faster than the text.
"""

from __future__ import annotations

import json
import platform
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.curation.documents import Folder
from ds_pretrain.curation.duplicates import near
from ds_pretrain.curation.minhash import MinHash
from ds_pretrain.curation.passages import passages
from ds_pretrain.curation.reading import read
from ds_pretrain.curation.workers import Workers
from ds_pretrain.data import corpus

WORD = re.compile(r"[^\W_]+")
NGRAM, BINS = 5, 128
BANDS = 32
"""Of rensa, which takes only divisors of its signature's length; 32 find 99.9% at 0.7."""
FILE = 5
"""MB of a file in the second table."""
out = Console(width=140, highlight=False)


def planted(megabytes: float, seed: int = 0, shuffled: bool = False) -> list[str]:
    """Stretches of 60 to 900 words of real text, half of them with edited copies. shuffled: words in random order."""
    draw, texts = random.Random(seed), list[str]()
    size = 0
    source = [each.text.split(" ") for each in corpus.read("embedded")]
    while size < megabytes * 1e6:
        words = draw.choice(source)
        length = draw.randrange(60, 900)
        start = draw.randrange(max(1, len(words) - length))
        text = words[start : start + length]
        if shuffled:
            draw.shuffle(text)
        group = [" ".join(text)]
        for _ in range(draw.choice([0, 0, 0, 1, 2, 3])):
            share = draw.choice([0.005, 0.01, 0.02, 0.04, 0.08])
            group.append(" ".join(draw.choice(words) if draw.random() < share else word for word in text))
        texts += group
        size += sum(map(len, group))
    draw.shuffle(texts)
    return texts


def grams(text: str) -> set[str]:
    words = WORD.findall(text.lower())
    return {" ".join(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))}


def dropped_by(pairs: list[tuple[int, int]]) -> set[int]:
    """All but the first of every chain of pairs."""
    root: dict[int, int] = {}

    def find(x: int) -> int:
        while root.setdefault(x, x) != x:
            x = root[x]
        return x

    for a, b in pairs:
        low, high = sorted((find(a), find(b)))
        root[high] = low
    return {x for x in root if find(x) != x}


def truth(texts: list[str], threshold: float) -> set[int]:
    """By counting common n-grams of every pair that has one; those of more than 200 texts join no pair by themselves."""
    sets = [grams(text) for text in texts]
    where: dict[str, list[int]] = defaultdict(list)
    for number, each in enumerate(sets):
        for gram in each:
            where[gram].append(number)
    common: Counter[tuple[int, int]] = Counter()
    for numbers in where.values():
        if len(numbers) <= 200:
            common.update((a, b) for i, b in enumerate(numbers) for a in numbers[:i])
    likely = (pair for pair, count in common.items() if count >= threshold * max(len(sets[pair[0]]), len(sets[pair[1]])) * 0.5)
    return dropped_by([(a, b) for a, b in likely if len(sets[a] & sets[b]) >= threshold * len(sets[a] | sets[b])])


def ours(texts: list[str], threshold: float) -> tuple[set[int], float]:
    with tempfile.TemporaryDirectory() as name:
        folder, team = Path(name), Workers(quiet=True)
        before = stored(texts, folder)
        started = time.perf_counter()
        found = near(before, folder / "near", team, MinHash(threshold=threshold, bins=BINS))
        seconds = time.perf_counter() - started
        return {each.row.number for each in found.dropped()}, seconds


def stored(texts: list[str], folder: Path) -> Folder:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return read([str(path)], folder / "read", Workers(quiet=True))


def datasketch(texts: list[str], threshold: float) -> tuple[set[int], float]:
    from datasketch import MinHash as Theirs
    from datasketch import MinHashLSH

    started = time.perf_counter()
    index, pairs, signatures = MinHashLSH(threshold=threshold, num_perm=BINS), list[tuple[int, int]](), []
    for number, text in enumerate(texts):
        signature = Theirs(num_perm=BINS)
        signature.update_batch([gram.encode() for gram in grams(text)])
        pairs += [(other, number) for other in index.query(signature) if signature.jaccard(signatures[other]) >= threshold]
        index.insert(number, signature)
        signatures.append(signature)
    return dropped_by(pairs), time.perf_counter() - started


def rensa(texts: list[str], threshold: float) -> tuple[set[int], float]:
    from rensa import RMinHash, RMinHashLSH

    started = time.perf_counter()
    signatures = RMinHash.from_token_sets([list(grams(text)) for text in texts], BINS, 42)
    index, pairs = RMinHashLSH(threshold, BINS, BANDS), list[tuple[int, int]]()
    index.insert_many(signatures)
    for number, found in enumerate(index.query_all(signatures)):
        pairs += [(a, number) for a in found if a < number and signatures[a].jaccard(signatures[number]) >= threshold]
    return dropped_by(pairs), time.perf_counter() - started


CONTENDERS: dict[str, Callable[[list[str], float], tuple[set[int], float]]] = {
    "ds_pretrain": ours, "datasketch": datasketch, "rensa": rensa,
}  # fmt: skip


def compare(megabytes: float, threshold: float, turns: int) -> Table:
    texts = planted(megabytes)
    size, true = sum(len(text.encode()) for text in texts) / 1e6, truth(texts, threshold)
    table = Table("", "MB/s", "of ours", "dropped", "recall", "precision", title=f"{len(texts):,} texts, {size:.1f} MB, "
                  f"{len(true):,} near copies at {threshold}")  # fmt: skip
    best: dict[str, tuple[set[int], float]] = {}
    for _ in range(turns):
        for name, contender in CONTENDERS.items():
            found, seconds = contender(texts, threshold)
            best[name] = (found, min(seconds, best.get(name, (found, seconds))[1]))
    for name, (found, seconds) in best.items():
        right = len(found & true)
        told = (f"{size / seconds:.1f}", f"{best['ds_pretrain'][1] / seconds:.2f}", f"{len(found):,}")
        table.add_row(name, *told, f"{right / len(true):.4f}", f"{right / max(1, len(found)):.4f}")
    return table


def licences(megabytes: float) -> Table:
    """What repeats in the Python sources of the installed packages: all of it, and in the comments that files begin with."""
    size, held = 0, list[str]()
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    random.Random(0).shuffle(files)
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        held, size = [*held, text], size + len(text.encode())
        if size > megabytes * 1e6:
            break
    headers = ["\n".join(takewhile(lambda line: line[:1] in "# \n", text.split("\n"))).strip() for text in held]
    table = Table("", "documents", "MB", "cut, MB", "of all sources", "MB/s", title="passages of 50 words, installed packages")
    for name, texts in (("whole files", held), ("the comments they begin with", [each for each in headers if each])):
        with tempfile.TemporaryDirectory() as folder:
            before = stored(texts, Path(folder))
            started = time.perf_counter()
            after = passages(before, Path(folder) / "out", Workers(quiet=True)).report
            seconds = time.perf_counter() - started
        mine = sum(len(each.encode()) for each in texts)
        told = (f"{mine / 1e6:.2f}", f"{(mine - after['bytes']) / 1e6:.2f}", f"{(mine - after['bytes']) / size:.1%}")
        table.add_row(name, f"{len(texts):,}", *told, f"{mine / 1e6 / seconds:.1f}")
    return table


def alone(megabytes: float, threshold: float) -> None:
    """Ours at one size in a process of its own: seconds and peak memory, as a line of JSON."""
    texts = planted(megabytes, shuffled=True)
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = max(1, round(megabytes / FILE))
        for i in range(files):
            (folder / "in").mkdir(exist_ok=True)
            lines = (json.dumps({"text": text}) + "\n" for text in texts[i::files])
            (folder / "in" / f"{i}.jsonl").write_text("".join(lines), encoding="utf-8")
        del texts
        child = subprocess.run([sys.executable, __file__, "--folder", name], capture_output=True, text=True, check=True)
    print(json.dumps({"size": size, **json.loads(child.stdout.splitlines()[-1])}))


def steps(folder: Path, threshold: float) -> None:
    team = Workers(quiet=True)
    started = time.perf_counter()
    before = read([str(folder / "in")], folder / "read", team)
    reading = time.perf_counter() - started
    pairs = near(before, folder / "near", team, MinHash(threshold=threshold, bins=BINS)).report["candidates"]
    print(json.dumps({"read": reading, "near": time.perf_counter() - started - reading, "pairs": pairs, "peak": peak()}))


def peak() -> float:
    """MB that this process held at most; what getrusage tells has what its parent held at its birth."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def main(
    megabytes: Annotated[float, typer.Option(help="Text of the comparison.")] = 24,
    threshold: Annotated[float, typer.Option(help="Jaccard similarity of near copies.")] = 0.7,
    turns: Annotated[int, typer.Option(help="The best of so many counts.")] = 2,
    sizes: Annotated[str, typer.Option(help="Sizes of the second table, MB.")] = "40,160,640",
    one: Annotated[float, typer.Option(hidden=True)] = 0,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Near-duplicates beside datasketch and rensa; then ours at several sizes."""
    if folder:
        return steps(folder, threshold)
    if one:
        return alone(one, threshold)
    names = ("ds_pretrain", "datasketch", "rensa", "numpy")
    out.print(f"{platform.processor() or platform.machine()}, " + ", ".join(f"{name} {version(name)}" for name in names))
    out.print(compare(megabytes, threshold, turns))
    out.print(licences(megabytes))
    table = Table("MB", "pairs", "read, MB/s", "near, MB/s", "peak memory, MB", title=f"one process, files of {FILE} MB")
    for each in filter(None, sizes.split(",")):
        ran = subprocess.run([sys.executable, __file__, "--one", each], capture_output=True, text=True, check=True)
        told = json.loads(ran.stdout.splitlines()[-1])
        speeds = (f"{told['size'] / told[key]:.1f}" for key in ("read", "near"))
        table.add_row(f"{told['size']:.0f}", f"{told['pairs']:,}", *speeds, f"{told['peak']:.0f}")
    out.print(table)
    return None


if __name__ == "__main__":
    typer.run(main)
