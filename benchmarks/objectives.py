"""How many examples a core makes of each objective, beside what transformers and megatron-core ship for the same.

    python benchmarks/objectives.py

Every contender runs in this process on one thread and is charged CPU time; contenders take turns, and the best turn of
each counts. Texts are random words held in memory, in sentences of 25 tokens, so no disk and no tokenizer is timed. Ours
is `Objective.example`, its keyed generator included; where the other side returns a batch, ours is collated too. Megatron's
datasets return padded examples without a collator; their index is made by hand and not timed. What they mask is nearly
but not quite the same: its T5 draws n-grams of up to 10 words, its BERT swaps segments (ALBERT's task) and masks words.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from loader import machine

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Document, Example
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.collate import collate
from ds_pretrain.objectives import REGISTRY, Objective, create

ROWS = 32
"""Examples of a batch, ours and theirs."""
SENTENCE = 25
"""Tokens of a sentence; the last one ends in a full stop."""
BASE = Vocabulary.synthetic(30_000)
STOP = BASE.size - 1
INSIDE = np.arange(BASE.size) % 3 == 0
"""Every third id continues a word."""
SURFACES = ["w" if inside else " w" for inside in INSIDE[:-1]] + ["."]
VOCAB = replace(BASE, surfaces=lambda: SURFACES)
Work = Callable[[], int]
"""Does some work and returns how many examples it was."""


def main(
    seq_len: Annotated[int, typer.Option(help="Positions of an example.")] = 512,
    batches: Annotated[int, typer.Option(help="Batches of 32 examples in a turn.")] = 4,
    turns: Annotated[int, typer.Option(help="Turns of each contender; the best counts.")] = 5,
) -> None:
    """Examples per second of one core: ours, and transformers' and megatron-core's where they ship the same."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    console = Console(width=118)
    console.print(machine())
    console.print(f"examples of {seq_len} positions, {ROWS * batches} of them in a turn, best of {turns} turns")
    texts = [text(seq_len, number) for number in range(ROWS * batches)]
    word = create("mlm", unit="word", selection="bernoulli")
    groups = {
        "mlm": {
            "ds_pretrain, a batch": batch(create("mlm"), texts, seq_len),
            "transformers collator, torch": collator(texts, seq_len, "pt"),
            "transformers collator, numpy": collator(texts, seq_len, "np"),
        },
        "mlm, whole words": {
            "ds_pretrain, a batch": batch(word, texts, seq_len),
            "transformers collator, torch": collator(texts, seq_len, "pt", words=True),
            "transformers collator, numpy": collator(texts, seq_len, "np", words=True),
        },
        "albert (swapped segments, masked words)": {
            "ds_pretrain": single(create("albert", unit="word"), texts, seq_len),
            "megatron-core BERT dataset": megatron("bert", texts, seq_len),
        },
        "span_corruption": {
            "ds_pretrain": single(create("span_corruption"), texts, seq_len),
            "megatron-core T5 dataset": megatron("t5", texts, seq_len),
        },
    }
    for title, contenders in groups.items():
        report(console, title, contenders, turns)
    report(console, "Every objective, to the first", {n: single(create(n), texts, seq_len) for n in REGISTRY}, turns)


def text(seq_len: int, number: int) -> np.ndarray:
    """Random words, a full stop at the end of each sentence."""
    tokens = np.random.default_rng(number).choice(VOCAB.words[:-1], seq_len).astype(np.int32)
    tokens[SENTENCE - 1 :: SENTENCE] = STOP
    return tokens


def examples(objective: Objective, texts: list[np.ndarray], seq_len: int) -> Iterator[Example]:
    size = objective.piece(seq_len)
    for number, tokens in enumerate(texts):
        docs = [Document(other[:size]) for other in (tokens, texts[number - 1])][: objective.documents]
        yield objective.example(docs, VOCAB, seq_len, rng.generator(0, number))


def single(objective: Objective, texts: list[np.ndarray], seq_len: int) -> Work:
    return lambda: sum(1 for _ in examples(objective, texts, seq_len))


def batch(objective: Objective, texts: list[np.ndarray], seq_len: int) -> Work:
    def work() -> int:
        made = [[example] for example in examples(objective, texts, seq_len)]
        for i in range(0, len(made), ROWS):
            collate(made[i : i + ROWS], objective, VOCAB, seq_len)
        return len(made)

    return work


def collator(texts: list[np.ndarray], seq_len: int, tensors: str, words: bool = False) -> Work:
    """transformers' collator on rows that already have [CLS] and [SEP], their special mask and offsets."""
    from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(VOCAB.size - 5))]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(names)})
    collate = DataCollatorForLanguageModeling(tokenizer=tokenizer, return_tensors=tensors, whole_word_mask=words)
    special = np.zeros(seq_len, dtype=np.int64)
    special[[0, -1]] = 1
    features = []
    for tokens in texts:
        ids = np.concatenate(([2], tokens[: seq_len - 2], [3]))
        feature = {"input_ids": ids, "special_tokens_mask": special}
        features.append(feature | ({"offset_mapping": offsets(ids)} if words else {}))

    def work() -> int:
        for i in range(0, len(features), ROWS):
            collate([dict(feature) for feature in features[i : i + ROWS]])
        return len(features)

    return work


def offsets(ids: np.ndarray) -> np.ndarray:
    """Where each token stands in the text: one character, behind a space where a word begins."""
    ends = np.cumsum(2 - INSIDE[ids])
    return np.stack([ends - 1, ends], axis=1)


def megatron(kind: str, texts: list[np.ndarray], seq_len: int) -> Work:
    """Megatron's own `__getitem__` over sentences in memory."""
    from megatron.core.datasets import bert_dataset, t5_dataset

    cls: Any = bert_dataset.BERTMaskedWordPieceDataset if kind == "bert" else t5_dataset.T5MaskedWordPieceDataset
    inverse = {i: f"##{i}" if INSIDE[i] else str(i) for i in range(VOCAB.size)}
    names = {"cls": VOCAB.cls, "sep": VOCAB.sep, "mask": VOCAB.mask, "inv_vocab": inverse, "bos": VOCAB.cls, "eos": VOCAB.eod}
    data = cls.__new__(cls)
    data.config = SimpleNamespace(
        random_seed=0,
        sequence_length=seq_len,
        sequence_length_encoder=seq_len,
        sequence_length_decoder=seq_len,
        masking_probability=0.15,
        masking_max_ngram=10 if kind == "t5" else 1,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=kind == "t5",
        classification_head=True,
        tokenizer=SimpleNamespace(**names, additional_special_tokens_ids=list(VOCAB.sentinels)),
    )
    data._pad_token_id, data.token_lookup = -1, list(inverse)
    data.dataset = [part for tokens in texts for part in np.split(tokens, range(SENTENCE, seq_len, SENTENCE))]
    each = len(data.dataset) // len(texts)
    data.sample_index = [(i * each, (i + 1) * each, seq_len - 3) for i in range(len(texts))]
    index = cycle(range(len(texts)))
    return lambda: sum(1 for _ in range(len(texts)) if data[next(index)])


def report(console: Console, title: str, contenders: dict[str, Work], turns: int) -> None:
    """One table: the best rate of each, and what the first is to it."""
    best = dict.fromkeys(contenders, 0.0)
    for work in contenders.values():
        work()
    for _ in range(turns):
        for name, work in contenders.items():
            start = time.thread_time()
            best[name] = max(best[name], work() / (time.thread_time() - start))
    table = Table("contender", "examples/s", "us each", "the first is", title=title)
    first = next(iter(best.values()))
    for name, rate in best.items():
        table.add_row(name, f"{rate:,.0f}", f"{1e6 / rate:.0f}", f"{first / rate:.2f}x")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
