"""A prepared corpus as an endless stream of rows, each a pure function of its number.

    piece -> sample (an epoch of a piece) -> block (pieces planned together) -> row (samples that share it) -> batch

The pieces of an epoch are put in a keyed order and planned in blocks of about a thousand rows. A plan needs sizes only,
so every rank makes the same one, and a `Cursor` is the whole position: row i of step t does not depend on the number of
data ranks, on worker counts or on where a run was resumed. Each epoch is a whole number of blocks and uses every piece
exactly once. The price: the last row of a block may stay unfilled (0.1% of positions), and the first row waits for one
block's plan (milliseconds).

A sample's number is `((epoch * pieces + piece) * slots + slot) * variants + variant`. Which variant makes it (a mixture has
several) is drawn before a token is read, or goes by the sample's place among the rows (`in_turn`). Slot 0 is the whole
piece; a curriculum of lengths cuts early pieces into more, one slot each. Evaluation is the epoch -1, whose
masks are the same every time; -2, -3 ... are further draws.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Batch, Document, Example
from ds_pretrain.core.registry import unknown
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.collate import Layout, collate, collate_causal
from ds_pretrain.data.order import permute, uniform
from ds_pretrain.data.packing import Cut, Packing, Pieces, Slots, alone, pack, waste
from ds_pretrain.data.store import SPLITS, Store
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.objectives import CausalLanguageModeling, Objective, create
from ds_pretrain.objectives.base import LAST_ORDINAL, Variant

BLOCK_ROWS = 1024
"""Rows of one plan at least, where the epoch has as many: 0.1% waste, and a plan of a few milliseconds."""
BLOCK_PIECES = 1 << 16
"""Pieces of one plan at most, so that tiny documents in long rows cannot make a plan slow."""
EVALUATION = -1
LOOKED_AT = 200
"""Documents that are checked before training where an objective asks for more than text."""

Row = tuple[int, ...]


class Cursor(NamedTuple):
    """The complete position in the stream: the next row is this one of this block."""

    block: int = 0
    row: int = 0


class Number(NamedTuple):
    """What sample numbers stand for, arrays of one length."""

    epoch: np.ndarray
    piece: np.ndarray
    slot: np.ndarray
    variant: np.ndarray


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
    """The rows of one store under one objective.

    lengths: a curriculum, pieces consumed to the most positions that an example has from there on; rows stay as long as
    they are and hold more examples.
    """

    def __init__(
        self,
        store: Documents,
        vocab: Vocabulary,
        seq_len: int,
        objective: Objective | str,
        source: str,
        seed: int,
        lengths: Mapping[int, int] | None = None,
    ) -> None:
        objective = create(objective) if isinstance(objective, str) else objective
        self.lengths = dict(sorted((lengths or {}).items()))
        refuse([*objective.check(vocab, seq_len), *_check_lengths(self.lengths, objective, vocab, seq_len)])
        self.store, self.vocab, self.seq_len, self.source, self.seed = store, vocab, seq_len, source, seed
        self.objective = objective
        usable = np.asarray(store.lengths, np.int64) - (not objective.eod)
        self.pieces = Pieces(usable, objective.piece(seq_len), objective.shortest)
        self.slots = Slots(self.pieces, [objective.piece(length) for length in self.lengths.values()])
        self.variants = objective.variants
        self.drawn = len(self.variants) > 1 and not objective.in_turn
        refuse(self._problems())
        self.blocks = self._blocks()
        self._planned: tuple[int, list[Row]] = (-1, [])

    def __len__(self) -> int:
        """Pieces, that is samples per epoch."""
        return len(self.pieces)

    @property
    def digest(self) -> str:
        """Changes with everything that gives a cursor its meaning."""
        objective, size = self.objective, self.pieces.size
        sizes = objective.size(np.arange(1, size + 1)).tobytes().hex()
        shape: tuple[int | str, ...] = (size, sizes, objective.shortest, int(objective.packed), int(objective.eod))
        if len(self.variants) > 1:
            shape += (repr(objective) if self.drawn else len(self.variants),)
        if self.lengths:
            shape += (repr(self.lengths),)
        return f"{rng.key(self.store.digest, self.source, self.seed, self.seq_len, *shape):032x}"

    @property
    def first(self) -> Cursor:
        return Cursor()

    def position(self, saved: Sequence[int]) -> Cursor:
        """A cursor from what JSON made of it."""
        return Cursor(*saved)

    def epochs(self, cursor: Cursor) -> float:
        """How often the text has been read before this position."""
        return (cursor.block + cursor.row / len(self._plan(cursor.block))) / self.blocks

    def progress(self, cursor: Cursor) -> dict[str, dict[str, float]]:
        """Of each source, how often it has been read and its share of all tokens that have been."""
        return {self.source: {"epochs": self.epochs(cursor), "share": 1.0}}

    def packing(self) -> dict[str, dict[str, float]]:
        """Of each source, its documents, how many do not fit one row, how many are too short and their tokens, and the share
        of positions that stays empty. No token of the others is left out."""
        short = self.pieces.usable < self.objective.shortest
        found = {"documents": len(short), "cut": self.pieces.severed, "too_short": self.pieces.unusable}
        return {self.source: {**found, "lost_tokens": int(self.pieces.usable[short].sum()), "waste": self.waste()}}

    def per_row(self) -> tuple[float, float]:
        """Tokens and samples of a row, in the mean of the first block; of a curriculum of lengths, of its beginning."""
        plan = self._plan(0)
        number = self.decode(np.array([sample for row in plan for sample in row]))
        cut = self.slots.cut(number.piece, number.slot)
        return int((cut.stop - cut.start).sum()) / len(plan), len(number.piece) / len(plan)

    def piece(self, i: int) -> Document:
        """A piece of the corpus by its number."""
        return self._documents(self.pieces.cut(np.array([i])))[0]

    def consumed(self, rows: Sequence[Row]) -> Counter[str]:
        """Samples of these rows by the component that makes them; empty where there is but one."""
        if not self.drawn:
            return Counter()
        variants = self.decode(np.array([sample for row in rows for sample in row], dtype=np.int64)).variant
        return Counter(getattr(self.variants[i], "name", str(i)) for i in variants.tolist())

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
        number = self.decode(np.array(samples, dtype=np.int64))
        cut = self.slots.cut(number.piece, number.slot)
        layout = Layout.of([len(row) for row in rows], cut.stop - cut.start, self.seq_len)
        fresh = (cut.start == 0) | (not self.objective.reset_attention)
        bounds = zip(cut.document.tolist(), (cut.start - ~fresh).tolist(), cut.stop.tolist(), strict=True)
        read = self.store.slice
        return collate_causal(layout, [read(*bound) for bound in bounds], fresh, self.objective, self.vocab)

    def evaluation(self, max_tokens: int | None = None, draw: int = 0) -> Evaluation:
        """The longest run of documents from the first on that has at most `max_tokens` tokens; one at least.

        draw: another number, other masks, for what is averaged over them.
        """
        ends = np.cumsum(self.store.lengths, dtype=np.int64)
        count = len(ends) if max_tokens is None else max(1, int(np.searchsorted(ends, max_tokens, side="right")))
        pieces = int(self.pieces.ends[count - 1])
        rows: list[Row] = []
        for start in range(0, pieces, BLOCK_PIECES):
            chunk = np.arange(start, min(start + BLOCK_PIECES, pieces))
            rows += self._rows(EVALUATION - draw, chunk, np.full(len(chunk), LAST_ORDINAL))
        rows = self._in_turn(_when(EVALUATION - draw), rows)
        text = np.asarray(self.store.text[:count], dtype=np.int64).sum(axis=0)
        return Evaluation(rows, count, int(ends[count - 1]), int(text[0]), int(text[1]))

    def waste(self, block: int = 0) -> float:
        """The share of positions of a block that no example was planned for. Where `objective.size` is an upper bound, as for
        pairs of segments, examples leave more than this free: `useful` of the audit is what they fill."""
        sizes, _ = self._planning(*self._ordered(block))
        return waste(sizes, self._pack(sizes), self.seq_len)

    def decode(self, samples: np.ndarray) -> Number:
        """What sample numbers stand for."""
        samples, variant = np.divmod(np.asarray(samples, dtype=np.int64), len(self.variants))
        samples, slot = np.divmod(samples, len(self.slots))
        return Number(*np.divmod(samples, len(self)), slot, variant)

    def _problems(self) -> list[str]:
        problems, shortest = [], self.objective.shortest
        documents = int(np.count_nonzero(self.pieces.usable >= shortest))
        if documents < self.objective.documents:
            problems.append(
                f"{self.objective.name} makes an example from {self.objective.documents} documents of at least {shortest} "
                f"token{'s' * (shortest > 1)}, {self.source} has {documents} of {len(self.store.lengths)}: prepare it from "
                "more text"
            )
        return problems + self._unusable()

    def _unusable(self) -> list[str]:
        """One problem if a look at `LOOKED_AT` documents, or all where each must be one example, finds some that the objective
        cannot use."""
        every = len(self.store.lengths)
        look = every if self.objective.whole else min(every, LOOKED_AT)
        documents = np.unique(np.linspace(0, every - 1, look).astype(np.int64)).tolist()
        whole = [Document(self.store.slice(i, 0, int(self.store.lengths[i]) - 1)) for i in documents]
        found = [(i, why) for i, doc in zip(documents, whole, strict=True) if (why := self._unfit(doc))]
        if not found:
            return []
        return [
            f"{len(found)} of {len(documents)} documents looked at have no example of {self.objective.name}: document "
            f"{found[0][0]} has {found[0][1]}"
        ]

    def _unfit(self, doc: Document) -> str | None:
        room = self.pieces.size
        if self.objective.whole and len(doc.tokens) > room:
            return f"{len(doc.tokens)} tokens, {room} fit a row of {self.seq_len}: raise batch.seq_len or leave long ones out"
        return self.objective.unusable(doc, self.vocab)

    def _blocks(self) -> int:
        mean = np.array([max(1, int(self.pieces.usable.sum()) // len(self))])
        share = float(self.objective.size(mean)[0]) / self.seq_len if self.objective.packed else 1
        return max(1, int(len(self) * share) // BLOCK_ROWS, -(-len(self) // BLOCK_PIECES))

    def _plan(self, block: int) -> list[Row]:
        number, rows = self._planned  # read at once: the loader's thread may be ahead
        if number != block:
            rows = self._rows(*self._ordered(block))
            # Packing leaves rows of long pieces in front: without a shuffle the lengths would drift within a block.
            shuffled = rng.generator("rows", self.seed, block, self.source).permutation(len(rows)).tolist()
            rows = self._in_turn(block, [rows[i] for i in shuffled])
            self._planned = (block, rows)
        return rows

    def _in_turn(self, block: int | str, rows: list[Row]) -> list[Row]:
        """The rows as they are trained, made by one variant after the other where the objective wants that."""
        if not self.objective.in_turn:
            return rows
        count = len(self.variants)
        first = int(rng.generator("turn", self.seed, block, self.source).integers(count))
        turns = (number % count for number in itertools.count(first))
        return [tuple(sample + next(turns) for sample in row) for row in rows]

    def _rows(self, epoch: int, pieces: np.ndarray, ordinal: np.ndarray) -> list[Row]:
        """These pieces as packed rows of samples."""
        sizes, samples = self._planning(epoch, pieces, ordinal)
        return self._pack(sizes).rows(samples)

    def _planning(self, epoch: int, pieces: np.ndarray, ordinal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sizes and numbers of the samples that these pieces give."""
        which, slot = self.slots.of(pieces, np.searchsorted(list(self.lengths), ordinal, side="right"))
        pieces, ordinal = pieces[which], ordinal[which]
        variant = self._variant(epoch, pieces * len(self.slots) + slot, ordinal)
        cut = self.slots.cut(pieces, slot)
        tokens = cut.stop - cut.start
        sizes = np.empty_like(tokens)
        for number in np.unique(variant).tolist():
            mine = variant == number
            sizes[mine] = self.variants[number].size(tokens[mine])
        return sizes, ((epoch * len(self) + pieces) * len(self.slots) + slot) * len(self.variants) + variant

    def _ordered(self, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        """A block's epoch, its pieces in order, and how many samples come before each."""
        epoch, part = divmod(block, self.blocks)
        first, stop = (len(self) * i // self.blocks for i in (part, part + 1))
        places = np.arange(first, stop)
        return epoch, permute(places, len(self), self.seed, epoch, self.source), epoch * len(self) + places

    def _variant(self, epoch: int, numbers: np.ndarray, ordinal: np.ndarray) -> np.ndarray:
        """Which of the objective's variants makes each sample."""
        if not self.drawn:
            return np.zeros(len(numbers), dtype=np.int64)
        return self.objective.pick(uniform(numbers, self.seed, _when(epoch), self.source, self.objective.name), ordinal)

    def _pack(self, sizes: np.ndarray) -> Packing:
        return pack(sizes, self.seq_len) if self.objective.packed else alone(sizes)

    def sources(self, samples: Sequence[int]) -> list[tuple[Variant, tuple[Document, ...]]]:
        """What makes each of these samples, and the documents that it is given."""
        epochs, pieces, slots, variants = self.decode(np.asarray(samples))
        partners = [self._partners(epochs, pieces, k) for k in range(1, self.objective.documents)]
        cuts = [self.slots.cut(pieces, slots), *(self.pieces.cut(column) for column in partners)]
        columns = [self._documents(cut) for cut in cuts]
        makers = [self.variants[variant] for variant in variants.tolist()]
        return list(zip(makers, zip(*columns, strict=True), strict=True))

    def _examples(self, samples: Sequence[int]) -> list[Example]:
        epochs, pieces, slots, _ = self.decode(np.asarray(samples))
        keys = zip(epochs.tolist(), pieces.tolist(), slots.tolist(), strict=True)
        return [
            maker.example(docs, self.vocab, self.seq_len, self._generator(epoch, piece, *["slot", slot] * (slot > 0)))
            for (maker, docs), (epoch, piece, slot) in zip(self.sources(samples), keys, strict=True)
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
        drawn = np.array([self._generator(epoch, piece, "partner", k).integers(n) for epoch, piece, n in keys], dtype=np.int64)
        return drawn + np.where(drawn >= first, stop - first, 0)

    def _generator(self, epoch: int, piece: int, *use: int | str) -> np.random.Generator:
        return rng.generator(self.seed, _when(epoch), self.source, piece, self.objective.name, *use)


class PretrainingDataset(Samples):
    """The rows of one split of a prepared data folder.

    data_path: the folder that `prepare` wrote. tokenizer: the one it was prepared with; read from the folder if None.
    seq_len: positions of a row. objective: a name or an Objective. seed: of order, packing and masks. verify: "full" compares
    the store with its checksums; "sizes" is for the processes of a node that open what another has verified.
    """

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: TextTokenizer | None = None,
        seq_len: int = 512,
        objective: Objective | str = "mlm",
        split: str = "train",
        seed: int = 0,
        lengths: Mapping[int, int] | None = None,
        verify: Literal["full", "sizes"] = "full",
    ) -> None:
        self.verify: Literal["full", "sizes"] = verify
        self._splits: dict[tuple[str, str], PretrainingDataset] = {}
        self.data_path = Path(data_path)
        if split not in SPLITS:
            raise ValueError(unknown("split", split, SPLITS))
        self.tokenizer = TextTokenizer.load(self.data_path / "tokenizer") if tokenizer is None else tokenizer
        store = Store(self.data_path / split, verify)
        if store.tokenizer_digest != self.tokenizer.digest:
            raise ValueError(
                f"{self.data_path / split} was prepared with tokenizer {store.tokenizer_digest}, but the one given is "
                f"{self.tokenizer.digest}: prepare the data again with it, or use {self.data_path / 'tokenizer'}"
            )
        super().__init__(store, self.tokenizer.vocabulary, seq_len, objective, split, seed, lengths)

    def split(self, name: str, objective: Objective | None = None) -> PretrainingDataset:
        """Another split of the same folder under the same settings, or under another objective; opened once."""
        objective = objective or self.objective
        key = name, repr(objective)
        if key not in self._splits:
            self._splits[key] = PretrainingDataset(
                self.data_path, self.tokenizer, self.seq_len, objective, name, self.seed, self.lengths, self.verify
            )
        return self._splits[key]

    def parts(self, name: str, objective: Objective | None = None) -> dict[str, PretrainingDataset]:
        """This split of each folder, the main one under no name."""
        return {"": self.split(name, objective)}


def _check_lengths(lengths: Mapping[int, int], objective: Objective, vocab: Vocabulary, seq_len: int) -> list[str]:
    """What is wrong with a curriculum of lengths."""
    problems = [f"length schedule starts at {start} pieces: it must start at 0" for start in [*lengths][:1] if start != 0]
    for start, length in lengths.items():
        if length > seq_len:
            problems.append(
                f"length schedule has {length} positions from piece {start} on, batch.seq_len is {seq_len}: lower it"
            )
        problems += objective.check(vocab, length)
    return problems


def _when(epoch: int) -> int | str:
    if epoch >= 0:
        return epoch
    return "evaluation" if epoch == EVALUATION else f"evaluation {EVALUATION - epoch}"


def refuse(problems: Iterable[str]) -> None:
    """One ValueError that lists everything that is wrong."""
    problems = list(problems)
    if problems:
        raise ValueError("; ".join(problems))
