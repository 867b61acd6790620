"""A prepared corpus as an endless stream of rows, each a pure function of its number.

    piece -> sample (an epoch of a piece) -> block (pieces planned together) -> row (samples that share it) -> batch

The pieces of an epoch are put in a keyed order and planned in blocks of about a thousand rows. A plan needs sizes only,
so every rank makes the same one, and a `Cursor` is the whole position: row i of step t does not depend on the number of
data ranks, on worker counts or on where a run was resumed. Each epoch is a whole number of blocks and uses every piece
exactly once. The price: the last row of a block may stay unfilled (0.1% of positions), and the first row waits for one
block's plan (milliseconds).

A sample's number is `epoch * pieces + piece`; evaluation is the epoch -1, whose masks are the same every time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Batch, Document, Example
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.collate import Layout, collate, collate_causal
from ds_pretrain.data.order import permute
from ds_pretrain.data.packing import Cut, Packing, Pieces, alone, pack, waste
from ds_pretrain.data.store import Store
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.objectives import CausalLanguageModeling, Objective, create

log = logging.getLogger(__name__)

BLOCK_ROWS = 1024
"""Rows of one plan at least, where the epoch has as many: 0.1% waste, and a plan of a few milliseconds."""
BLOCK_PIECES = 1 << 16
"""Pieces of one plan at most, so that tiny documents in long rows cannot make a plan slow."""
EVALUATION = -1

Row = tuple[int, ...]


class Cursor(NamedTuple):
    """The complete position in the stream: the next row is this one of this block."""

    block: int = 0
    row: int = 0


class Documents(Protocol):
    """What a stream of rows needs of a store."""

    lengths: np.ndarray
    """int [documents]: tokens of each, its end-of-document id included."""
    text: np.ndarray
    """int64 [documents, 2]: bytes and words of the original text."""
    digest: str

    def slice(self, i: int, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Evaluation:
    """A finite set of rows, and the text that exactly these rows predict."""

    rows: list[Row]
    documents: int
    tokens: int
    bytes: int
    words: int


class Samples:
    """The rows of one store under one objective."""

    def __init__(
        self, store: Documents, vocab: Vocabulary, seq_len: int, objective: Objective | str, source: str, seed: int
    ) -> None:
        objective = create(objective) if isinstance(objective, str) else objective
        refuse(objective.check(vocab, seq_len))
        self.store, self.vocab, self.seq_len, self.source, self.seed = store, vocab, seq_len, source, seed
        self.objective = objective
        self.pieces = Pieces(np.asarray(store.lengths, np.int64) - (not objective.eod), objective.piece(seq_len))
        refuse(self._problems())
        self.blocks = self._blocks()
        self._planned: tuple[int, list[Row]] = (-1, [])
        if self.pieces.unusable:
            log.warning("%s: %d documents are empty and give no example", source, self.pieces.unusable)

    def __len__(self) -> int:
        """Pieces, that is samples per epoch."""
        return len(self.pieces)

    @property
    def digest(self) -> str:
        """Changes with everything that gives a cursor its meaning."""
        objective, size = self.objective, self.pieces.size
        shape = (size, int(objective.size(np.array([size]))[0]), int(objective.packed), int(objective.eod))
        return f"{rng.key(self.store.digest, self.source, self.seed, self.seq_len, *shape):032x}"

    def piece(self, i: int) -> Document:
        """A piece of the corpus by its number."""
        return self._documents(self.pieces.cut(np.array([i])))[0]

    def example(self, sample: int) -> Example:
        return self._examples([sample])[0]

    def rows(self, cursor: Cursor, count: int) -> tuple[list[Row], Cursor]:
        """The next `count` rows, and the position after them."""
        taken: list[Row] = []
        block, row = cursor
        while len(taken) < count:
            plan = self._plan(block)
            if not 0 <= row < len(plan):
                raise ValueError(f"{cursor} is not a position in these data (its block has {len(plan)} rows)")
            found = plan[row : row + count - len(taken)]
            taken += found
            row += len(found)
            block, row = (block, row) if row < len(plan) else (block + 1, 0)
        return taken, Cursor(block, row)

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Rows as planes; a row without samples is all padding and contributes exactly 0."""
        samples = [sample for row in rows for sample in row]
        if type(self.objective) is not CausalLanguageModeling:
            made = iter(self._examples(samples))
            return collate([[next(made) for _ in row] for row in rows], self.objective, self.vocab, self.seq_len)
        cut = self.pieces.cut(np.array(samples, dtype=np.int64) % len(self))
        layout = Layout.of([len(row) for row in rows], cut.stop - cut.start, self.seq_len)
        fresh = cut.start == 0
        bounds = zip(cut.document.tolist(), (cut.start - ~fresh).tolist(), cut.stop.tolist(), strict=True)
        read = self.store.slice
        return collate_causal(layout, [read(*bound) for bound in bounds], fresh, self.objective, self.vocab)

    def evaluation(self, max_tokens: int | None = None) -> Evaluation:
        """The longest run of documents from the first on that has at most `max_tokens` tokens; one at least."""
        ends = np.cumsum(self.store.lengths, dtype=np.int64)
        count = len(ends) if max_tokens is None else max(1, int(np.searchsorted(ends, max_tokens, side="right")))
        pieces = int(self.pieces.ends[count - 1])
        rows: list[Row] = []
        for start in range(0, pieces, BLOCK_PIECES):
            chunk = np.arange(start, min(start + BLOCK_PIECES, pieces))
            rows += self._pack(self._sizes(chunk)).rows(chunk + EVALUATION * len(self))
        text = np.asarray(self.store.text[:count], dtype=np.int64).sum(axis=0)
        return Evaluation(rows, count, int(ends[count - 1]), int(text[0]), int(text[1]))

    def waste(self, block: int = 0) -> float:
        """The share of positions of a block that hold no example."""
        sizes = self._sizes(self._ordered(block)[1])
        return waste(sizes, self._pack(sizes), self.seq_len)

    def _problems(self) -> list[str]:
        problems, documents = [], int(np.count_nonzero(self.pieces.usable))
        if documents < self.objective.documents:
            problems.append(
                f"{self.objective.name} makes an example from {self.objective.documents} documents that have text, "
                f"{self.source} has {documents} of {len(self.store.lengths)}: prepare it from more text"
            )
        return problems

    def _blocks(self) -> int:
        mean = np.array([max(1, int(self.pieces.usable.sum()) // len(self))])
        share = float(self.objective.size(mean)[0]) / self.seq_len if self.objective.packed else 1
        return max(1, int(len(self) * share) // BLOCK_ROWS, -(-len(self) // BLOCK_PIECES))

    def _plan(self, block: int) -> list[Row]:
        if self._planned[0] != block:
            epoch, pieces = self._ordered(block)
            rows = self._pack(self._sizes(pieces)).rows(epoch * len(self) + pieces)
            # Packing leaves rows of long pieces in front: without a shuffle the lengths would drift within a block.
            shuffled = rng.generator("rows", self.seed, block, self.source).permutation(len(rows)).tolist()
            self._planned = (block, [rows[i] for i in shuffled])
        return self._planned[1]

    def _ordered(self, block: int) -> tuple[int, np.ndarray]:
        epoch, part = divmod(block, self.blocks)
        first, stop = (len(self) * i // self.blocks for i in (part, part + 1))
        return epoch, permute(np.arange(first, stop), len(self), self.seed, epoch, self.source)

    def _sizes(self, pieces: np.ndarray) -> np.ndarray:
        cut = self.pieces.cut(pieces)
        return self.objective.size(cut.stop - cut.start)

    def _pack(self, sizes: np.ndarray) -> Packing:
        return pack(sizes, self.seq_len) if self.objective.packed else alone(sizes)

    def _examples(self, samples: Sequence[int]) -> list[Example]:
        epochs, pieces = np.divmod(np.asarray(samples, dtype=np.int64), len(self))
        chosen = [pieces, *(self._partners(epochs, pieces, k) for k in range(1, self.objective.documents))]
        columns = [self._documents(self.pieces.cut(column)) for column in chosen]
        return [
            self.objective.example(docs, self.vocab, self.seq_len, self._generator(epoch, piece))
            for docs, epoch, piece in zip(zip(*columns, strict=True), epochs.tolist(), pieces.tolist(), strict=True)
        ]

    def _documents(self, cut: Cut) -> list[Document]:
        bounds = zip(cut.document.tolist(), cut.start.tolist(), cut.stop.tolist(), strict=True)
        return [self._document(*bound) for bound in bounds]

    def _document(self, document: int, start: int, stop: int) -> Document:
        if start == 0:
            return Document(self.store.slice(document, 0, stop))
        tokens = self.store.slice(document, start - 1, stop)
        return Document(tokens[1:], int(tokens[0]))

    def _partners(self, epochs: np.ndarray, pieces: np.ndarray, k: int) -> np.ndarray:
        """For each piece a uniformly random one of ANOTHER document."""
        document = self.pieces.cut(pieces).document
        first, stop = self.pieces.first(document), self.pieces.ends[document]
        others = (len(self) - (stop - first)).tolist()
        keys = zip(epochs.tolist(), pieces.tolist(), others, strict=True)
        drawn = np.array([self._generator(epoch, piece, k).integers(n) for epoch, piece, n in keys], dtype=np.int64)
        return drawn + np.where(drawn >= first, stop - first, 0)

    def _generator(self, epoch: int, piece: int, *use: int) -> np.random.Generator:
        when = "evaluation" if epoch == EVALUATION else epoch
        return rng.generator(self.seed, when, self.source, piece, self.objective.name, *use)


class PretrainingDataset(Samples):
    """The rows of one split of a prepared data folder.

    data_path: the folder that `prepare` wrote. tokenizer: the one it was prepared with; read from the folder if None.
    seq_len: positions of a row. objective: a name or an Objective. seed: of order, packing and masks.
    """

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: TextTokenizer | None = None,
        seq_len: int = 512,
        objective: Objective | str = "mlm",
        split: str = "train",
        seed: int = 0,
    ) -> None:
        self.data_path = Path(data_path)
        self.tokenizer = TextTokenizer.load(self.data_path / "tokenizer") if tokenizer is None else tokenizer
        store = Store(self.data_path / split)
        if store.tokenizer_digest != self.tokenizer.digest:
            raise ValueError(
                f"{self.data_path / split} was prepared with tokenizer {store.tokenizer_digest}, but the one given is "
                f"{self.tokenizer.digest}: prepare the data again with it, or use {self.data_path / 'tokenizer'}"
            )
        super().__init__(store, self.tokenizer.vocabulary, seq_len, objective, split, seed)

    def split(self, name: str) -> PretrainingDataset:
        """Another split of the same folder under the same settings."""
        return PretrainingDataset(self.data_path, self.tokenizer, self.seq_len, self.objective, name, self.seed)


def refuse(problems: Iterable[str]) -> None:
    """One ValueError that lists everything that is wrong."""
    problems = list(problems)
    if problems:
        raise ValueError("; ".join(problems))
