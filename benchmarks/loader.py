"""How many tokens a core reads and collates: this project beside megatron-core and transformers, on the same tokens.

    python benchmarks/loader.py --tokens 20000000

Every contender runs in this process on one thread and is charged CPU time; contenders take turns, and the best turn of
each counts. Reading: both sides open the same .bin and .idx. Megatron's GPTDataset is timed without a collator, which
favours it, in three settings: documents of a row mixed (its fastest, and another computation than ours), positions
that restart, and documents kept apart by its dense [S, S] mask, the only one that says what our planes say. Ours is
the whole way from the permutation to collated planes. Masking: transformers' collator gets rows that are already cut
and held in memory; ours is timed from the store.
"""

from __future__ import annotations

import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.data.store import Store, StoreWriter

VOCAB = Vocabulary(50_000, 0, 2, 1, 3, 4, 5, tuple(range(6, 262)), frozenset(range(262)))
ROWS = 32
"""Rows of a batch, ours and theirs."""
Work = Callable[[], int]
"""Does some work and returns how many tokens it was."""


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the corpus; documents are log-normal, median 400.")] = 20_000_000,
    seq_len: Annotated[int, typer.Option(help="Positions of a row.")] = 1024,
    turns: Annotated[int, typer.Option(help="Turns of each contender; the best counts.")] = 5,
) -> None:
    """Tokens per second of one core: reading against megatron-core's GPTDataset, masking against transformers."""
    with made_corpus(tokens) as (console, prefix, folder):
        ours = {name: Samples(Store(prefix), VOCAB, seq_len, name, "train", 0) for name in ("clm", "mlm")}
        console.print(f"{tokens:,} tokens in {len(ours['clm'].store.lengths):,} documents; rows of {seq_len}")
        report(console, "Reading, packed", reading(ours["clm"], prefix, folder), turns)
        report(console, "Masked language modelling", masking(ours["mlm"]), turns)


@contextmanager
def made_corpus(tokens: int) -> Iterator[tuple[Console, str, str]]:
    """One quiet thread, and a corpus on disk: where to print, the store's prefix, its folder."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(machine())
    with tempfile.TemporaryDirectory() as folder:
        yield console, write_corpus(Path(folder) / "corpus", tokens), folder


def machine() -> str:
    packages = ("torch", "numpy", "megatron-core", "transformers")
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return f"{cpu}, 1 thread; Python {platform.python_version()}; " + ", ".join(f"{p} {version(p)}" for p in packages)


def write_corpus(prefix: Path, tokens: int) -> str:
    """Documents of uniformly random words, their lengths log-normal as those of web text are."""
    random = np.random.default_rng(0)
    with StoreWriter(prefix, vocab_size=VOCAB.size, eod=VOCAB.eod, tokenizer_digest="random") as store:
        while tokens > 0:
            length = min(tokens, 1 + int(random.lognormal(np.log(400), 1)))
            store.add(random.integers(262, VOCAB.size, size=length - 1, dtype=np.int32), "")
            tokens -= length
    return str(prefix)


def reading(data: Samples, prefix: str, cache: str) -> dict[str, Work]:
    return {
        "ds_pretrain, documents apart": stream(data, 64),
        "GPTDataset, documents mixed": items(gpt_dataset(prefix, cache, data.seq_len), 2000),
        "GPTDataset, positions restart": items(gpt_dataset(prefix, cache, data.seq_len, restart=True), 1000),
        "GPTDataset, documents apart": items(gpt_dataset(prefix, cache, data.seq_len, restart=True, apart=True), 200),
    }


def masking(data: Samples) -> dict[str, Work]:
    rows = np.random.default_rng(0).integers(262, VOCAB.size, size=(8 * ROWS, data.seq_len))
    return {
        "ds_pretrain, from the store": stream(data, 8),
        "transformers, torch": collator(rows, "pt"),
        "transformers, numpy": collator(rows, "np"),
    }


def stream(data: Samples, batches: int) -> Work:
    """The next batches of our endless stream, plans included."""
    cursor = Cursor()

    def work() -> int:
        nonlocal cursor
        for _ in range(batches):
            rows, cursor = data.rows(cursor, ROWS)
            data.collate(rows)
        return batches * ROWS * data.seq_len

    return work


def gpt_dataset(prefix: str, cache: str, seq_len: int, restart: bool = False, apart: bool = False) -> Any:
    """Megatron's dataset over the same files; its index is built here and not timed."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    names: Any = SimpleNamespace(vocab_size=VOCAB.size, eod=VOCAB.eod, pad=VOCAB.pad, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_len,
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=names,
        reset_position_ids=restart,
        reset_attention_mask=apart,
        eod_mask_loss=False,
        create_attention_mask=apart,
    )
    indexed = IndexedDataset(prefix)
    return GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), None, Split.train, config)


def items(dataset: Any, count: int) -> Work:
    """The next items of a dataset, over and over."""

    def forever() -> Iterator[int]:
        while True:
            yield from range(len(dataset))

    index = forever()

    def work() -> int:
        return sum(len(dataset[next(index)]["tokens"]) for _ in range(count))

    return work


def collator(rows: np.ndarray, tensors: str) -> Work:
    from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(49_995))])}
    collate = DataCollatorForLanguageModeling(tokenizer=BertTokenizerFast(vocab=vocab), return_tensors=tensors)
    batches = [[{"input_ids": row} for row in rows[i : i + ROWS]] for i in range(0, len(rows), ROWS)]

    def work() -> int:
        for batch in batches:
            collate(batch)
        return rows.size

    return work


def report(console: Console, title: str, contenders: dict[str, Work], turns: int) -> None:
    """One table: the best rate of each, and what it is to the first."""
    best = dict.fromkeys(contenders, 0.0)
    for work in contenders.values():
        work()
    for _ in range(turns):
        for name, work in contenders.items():
            start = time.thread_time()
            best[name] = max(best[name], work() / (time.thread_time() - start))
    table = Table("contender", "million tokens/s", "ours is", title=title)
    ours = next(iter(best.values()))
    for name, rate in best.items():
        table.add_row(name, f"{rate / 1e6:.2f}", f"{ours / rate:.1f}x")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
