"""What it costs to get tokens off the disk and into rows, what is wasted on the way, and what a GPU pays for it.

    python benchmarks/reading.py --tokens 20000000

Reading: plain memmap (no documents, no order to speak of), documents by index from our store and from Megatron's
IndexedDataset, and whole rows from us and from Megatron's GPTDataset, all over the same .bin, in this process, on one
thread, in turns, by CPU time; the best turn counts. The file is in the page cache, so no disk is measured. Waste: the
share of positions that hold no token, and the documents that were cut although they fit a row. Loader: the CPU time of
one data rank's step, with everything that every rank does for all rows.
"""

from __future__ import annotations

import os
import time
from typing import Annotated

import numpy as np
import torch
import typer
from loader import VOCAB, Work, gpt_dataset, items, made_corpus, report, stream
from rich.table import Table

from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.data.loader import own_rows
from ds_pretrain.data.store import Store

LENGTHS = (512, 1024, 2048, 8192)
RANKS = (1, 8, 64, 512)
MICRO = 8
"""Rows of a rank's step."""


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the corpus; documents are log-normal, median 400.")] = 20_000_000,
    seq_len: Annotated[int, typer.Option(help="Positions of a row, where it is not varied.")] = 1024,
    turns: Annotated[int, typer.Option(help="Turns of each contender; the best counts.")] = 5,
) -> None:
    """Reading beside megatron-core and a plain memmap, packing waste, and the loader's cost per GPU."""
    with made_corpus(tokens) as (console, prefix, folder):
        store = Store(prefix)
        console.print(f"{tokens:,} tokens in {len(store):,} documents, {store.info['dtype']}; rows of {seq_len}")
        data = Samples(store, VOCAB, seq_len, "clm", "train", 0)
        report(console, "Whole rows", rows(data, prefix, folder), turns)
        report(console, "Documents and stretches by index, in random order", pieces(store, prefix, seq_len), turns)
        console.print(waste(store))
        console.print(cost(data, turns))


def rows(data: Samples, prefix: str, cache: str) -> dict[str, Work]:
    return {
        "ds_pretrain: planned, packed, documents apart": stream(data, 64),
        "megatron-core GPTDataset: documents mixed": items(gpt_dataset(prefix, cache, data.seq_len), 2000),
        "megatron-core GPTDataset: positions restart": items(gpt_dataset(prefix, cache, data.seq_len, restart=True), 1000),
        "plain memmap: stretches in file order, int64": stretches(prefix, data.seq_len, shuffled=False),
    }


def pieces(store: Store, prefix: str, seq_len: int) -> dict[str, Work]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(prefix)
    order = np.random.default_rng(0).permutation(len(store))[:20_000].tolist()
    return {
        "ds_pretrain Store.slice(i, ...), a copy in int32": lambda: sum(
            len(store.slice(i, 0, int(store.lengths[i]))) for i in order
        ),
        "megatron-core IndexedDataset.get(i), a view": lambda: sum(len(indexed.get(i)) for i in order),
        "megatron-core IndexedDataset.get(i), copied to int32": lambda: sum(
            len(indexed.get(i).astype(np.int32)) for i in order
        ),
        f"plain memmap: stretches of {seq_len}, int64": stretches(prefix, seq_len, shuffled=True),
    }


def stretches(prefix: str, seq_len: int, shuffled: bool) -> Work:
    """What nanoGPT does: a stretch of the file wherever it falls, as the int64 that an embedding takes."""
    data = np.memmap(f"{prefix}.bin", np.uint16, mode="r")
    starts = np.arange(0, len(data) - seq_len, seq_len)
    starts = (np.random.default_rng(0).permutation(starts) if shuffled else starts)[:10_000].tolist()
    return lambda: sum(len(torch.from_numpy(data[at : at + seq_len].astype(np.int64))) for at in starts)


def waste(store: Store) -> Table:
    """Ours is measured on the first block of a real plan; the others are what they do, counted."""
    table = Table("row", "best fit in blocks (ours)", "in order, no sorting", "a document a row", "cut at will (GPTDataset)")
    table.title = "Positions without a token; in brackets the documents that are cut although they fit a row"
    for seq_len in LENGTHS:
        ours = Samples(store, VOCAB, seq_len, "clm", "train", 0)
        lengths = np.asarray(store.lengths, dtype=np.int64)
        parts = np.concatenate([lengths[lengths <= seq_len], np.full((lengths // seq_len).sum(), seq_len), lengths % seq_len])
        parts = np.random.default_rng(0).permutation(parts[parts > 0])
        ends = np.cumsum(lengths)
        torn = ((ends - 1) // seq_len != (ends - lengths) // seq_len)[lengths <= seq_len].mean()
        alone = 1 - parts.sum() / (len(parts) * seq_len)
        cut = (np.diff(ours.pieces.ends, prepend=0) > 1)[lengths <= seq_len].mean()
        cells = (
            f"{ours.waste():.2%} ({cut:.0%})",
            f"{next_fit(parts, seq_len):.1%} (0%)",
            f"{alone:.1%} (0%)",
            f"0% ({torn:.0%})",
        )
        table.add_row(f"{seq_len:,}", *cells)
    return table


def next_fit(sizes: np.ndarray, capacity: int) -> float:
    """The waste of filling one row after the other in the order that the documents come."""
    used, count = capacity, 0
    for size in sizes.tolist():
        used += size
        if used > capacity:
            used, count = size, count + 1
    return 1 - float(sizes.sum()) / (count * capacity)


def cost(data: Samples, turns: int) -> Table:
    """CPU time of a step on one data rank: all rows are planned, its own are collated."""
    table = Table(
        "data ranks", "rows of a step", "ms a step", "million tokens/s of a rank", "of a core at 50,000 tokens/s a GPU"
    )
    table.title = f"The loader of one rank, {MICRO} rows of {data.seq_len} each, planning of all rows included"
    for ranks in RANKS:
        cursor, best = Cursor(), float("inf")
        for _ in range(turns):
            start, steps = time.thread_time(), max(8, 256 // ranks)
            for _ in range(steps):
                planned, cursor = data.rows(cursor, MICRO * ranks)
                for micro in own_rows(planned, MICRO, 0, ranks):
                    data.collate(micro)
            best = min(best, (time.thread_time() - start) / steps)
        rate = MICRO * data.seq_len / best
        table.add_row(str(ranks), f"{MICRO * ranks:,}", f"{1000 * best:.2f}", f"{rate / 1e6:.1f}", f"{50_000 / rate:.2%}")
    return table


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
