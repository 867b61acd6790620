"""Raw text to a store of ids, MB/s: `ds-pretrain prepare` beside Megatron's way and the bare tokenizer, ids compared.

    python benchmarks/tokenization.py --megabytes 30

All read the same .jsonl with the same tokenizer.json, on as many threads as the tokenizers library takes and on one.
Megatron's way is its `tools/preprocess_data.py` with one worker: a line, json, one `encode`, `IndexedDatasetBuilder.add_item`
(megatron-core's own class), document by document. The bare tokenizer encodes batches of the same texts from memory and writes
nothing. Ours reads twice (a survey finds empty splits first), hashes what it writes and counts bytes and words.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.curation.prepare import prepare
from ds_pretrain.data import corpus
from ds_pretrain.data.store import SPLITS, Store
from ds_pretrain.data.tokenizer import TextTokenizer

out = Console(width=120, highlight=False)
SPLIT = (0.98, 0.01, 0.01)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def ours(path: Path, tokenizer: Path, folder: Path) -> float:
    started = time.perf_counter()
    prepare(path, folder / "ours", tokenizer=tokenizer, split=SPLIT, quiet=True)
    return time.perf_counter() - started


def megatron(path: Path, tokenizer: Path, folder: Path) -> float:
    import tokenizers
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    raw = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    raw.encode_special_tokens = True
    eod = TextTokenizer.load(tokenizer).vocabulary.eod
    started = time.perf_counter()
    builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=DType.optimal_dtype(raw.get_vocab_size()))
    for line in path.open(encoding="utf-8"):
        ids = [*raw.encode(json.loads(line)["text"], add_special_tokens=False).ids, eod]
        builder.add_item(torch.IntTensor(ids))
        builder.end_document()
    builder.finalize(str(folder / "megatron.idx"))
    return time.perf_counter() - started


def bare(path: Path, tokenizer: Path, folder: Path) -> float:
    held, made = texts(path), TextTokenizer.load(tokenizer)
    started = time.perf_counter()
    for first in range(0, len(held), 500):
        made.encode_batch(held[first : first + 500])
    return time.perf_counter() - started


def same_ids(folder: Path) -> bool:
    """Whether both stores hold the same documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stores = [Store(folder / "ours" / name, "sizes") for name in SPLITS]
    mine = sorted(store[i].tobytes() for store in stores for i in range(len(store)))
    theirs = IndexedDataset(str(folder / "megatron"))
    return mine == sorted(np.asarray(theirs[i], dtype=np.int32).tobytes() for i in range(len(theirs)))


CONTENDERS = {"ds_pretrain": ours, "megatron-core": megatron, "tokenizers, batches": bare}


def measure(megabytes: float) -> dict[str, float | bool]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "in.jsonl"
        documents = [each.text for each in corpus.read("embedded")]
        size = sum(len(text.encode()) for text in documents)
        copies = max(1, round(megabytes * 1e6 / size))
        with path.open("w", encoding="utf-8") as file:
            for copy in range(copies):
                file.writelines(json.dumps({"text": f"{copy} {text}"}) + "\n" for text in documents)
        tokenizer = TextTokenizer.train(iter(documents), 32_000, "bpe")
        tokenizer.save(folder / "tokenizer")
        total = sum(len(text.encode()) for text in texts(path)) / 1e6
        found: dict[str, float | bool] = {key: total / do(path, folder / "tokenizer", folder) for key, do in CONTENDERS.items()}
        return {**found, "MB": total, "same ids": same_ids(folder)}


def main(
    megabytes: Annotated[float, typer.Option(help="Text, about.")] = 30,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Raw text to a store, beside Megatron's way and the bare tokenizer."""
    if child:
        print(json.dumps(measure(megabytes)))
        return
    names = ("ds_pretrain", "tokenizers", "megatron-core")
    out.print(f"{platform.machine()}, {os.cpu_count()} cores, " + ", ".join(f"{name} {version(name)}" for name in names))
    table = Table("threads", "MB", *(f"{name}, MB/s" for name in CONTENDERS), "same ids", title="raw text to ids")
    for threads in ("1", "all"):
        env = {**os.environ, "RAYON_NUM_THREADS": "1" if threads == "1" else str(os.cpu_count())}
        command = [sys.executable, __file__, "--child", "--megabytes", str(megabytes)]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        told = json.loads(ran.stdout.splitlines()[-1])
        cells = (f"{told[name]:.2f}" for name in CONTENDERS)
        table.add_row(threads, f"{told['MB']:.0f}", *cells, "yes" if told["same ids"] else "NO")
    out.print(table)


if __name__ == "__main__":
    typer.run(main)
