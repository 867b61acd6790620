"""Tokenizers held against each other on the same texts: how finely they cut, what they lose, whom they cost more, how fast.

fertility: tokens per word (Rust et al. 2021, "How Good is Your Tokenizer?"), a word being what `core.vocabulary` takes for
one: a run of letters, their marks and digits, and each ideograph by itself. continued: share of words of more than one token
(ibid.). parity: tokens over those of the reference language on parallel text (Petrov et al. 2023, "Language model tokenizers
introduce unfairness between languages"). unknown: share of tokens that are <unk>; a WordPiece tokenizer hides whole words in
them, so where it is not near 0 the other numbers flatter.

Words are encoded one by one, with the space before them, and ideographs in the runs they stand in, so that tokens across
several count as such. The price: a script without spaces other than Chinese (kana, Thai, Khmer) has runs for words; hold it
against another tokenizer, or use tokens per character and parity.
"""

from __future__ import annotations

import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from ds_pretrain.core.registry import unknown
from ds_pretrain.core.vocabulary import IDEOGRAPHS
from ds_pretrain.data.tokenizer import TextTokenizer

TIMED = 1 << 20
"""Characters of a text that are encoded to measure speed."""
TURNS = 3
"""Times that they are; the best counts."""
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e0912f", "#6a4c93", "#4a5568", "#00a6a6", "#a05a2c")


@dataclass(frozen=True)
class Measure:
    """One tokenizer on one text, in counts.

    word_tokens: tokens of the words by themselves. han, han_tokens: ideographs among the words, and what their runs take.
    speed: megabytes of text a second, on as many cores as the library takes.
    """

    tokenizer: str
    text: str
    tokens: int
    characters: int
    bytes: int
    words: int
    word_tokens: int
    continued_words: int
    unknown_tokens: int
    han: int
    han_tokens: int
    speed: float

    @property
    def per_character(self) -> float:
        return self.tokens / self.characters

    @property
    def per_han(self) -> float | None:
        """Tokens per ideograph."""
        return self.han_tokens / self.han if self.han else None

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def fertility(self) -> float | None:
        return self.word_tokens / self.words if self.words else None

    @property
    def continued(self) -> float | None:
        return self.continued_words / self.words if self.words else None

    @property
    def unknown(self) -> float:
        return self.unknown_tokens / self.tokens


@dataclass(frozen=True)
class Comparison:
    """Every tokenizer on every text. reference: the text that parity is measured against, None where texts are not parallel."""

    rows: tuple[Measure, ...]
    reference: str | None

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(row.text for row in self.rows))

    @property
    def tokenizers(self) -> list[str]:
        return list(dict.fromkeys(row.tokenizer for row in self.rows))

    def at(self, tokenizer: str, text: str) -> Measure:
        return next(row for row in self.rows if (row.tokenizer, row.text) == (tokenizer, text))

    def parity(self, row: Measure) -> float | None:
        """Tokens over those of the reference text."""
        return row.tokens / self.at(row.tokenizer, self.reference).tokens if self.reference else None

    def as_dict(self) -> dict[str, Any]:
        """Counts and measures, for a file."""
        names = ("per_character", "per_han", "bytes_per_token", "fertility", "continued", "unknown")
        rows = [asdict(r) | {name: getattr(r, name) for name in names} | {"parity": self.parity(r)} for r in self.rows]
        return {"reference": self.reference, "rows": rows}


def compare(
    tokenizers: Mapping[str, TextTokenizer], texts: Mapping[str, Sequence[str]], reference: str | None = None
) -> Comparison:
    """Measure each tokenizer on each text, a sequence of documents. The texts are parallel if there is a reference."""
    if not tokenizers or not texts:
        raise ValueError("nothing to compare: give at least one tokenizer and one text")
    if reference is not None and reference not in texts:
        raise ValueError(unknown("reference text", reference, texts))
    if empty := [name for name, documents in texts.items() if not any(document.strip() for document in documents)]:
        raise ValueError(f"text {empty[0]} is empty: leave it out")
    rows = [
        measure(name, tokenizer, text, documents) for text, documents in texts.items() for name, tokenizer in tokenizers.items()
    ]
    return Comparison(tuple(rows), reference)


def measure(name: str, tokenizer: TextTokenizer, text: str, documents: Sequence[str]) -> Measure:
    """One tokenizer on one text."""
    encoded = tokenizer.encode_batch(documents)
    tokens = sum(map(len, encoded))
    if not tokens:
        raise ValueError(f"{name} makes no token of {text}: it does not know a single character of it")
    runs = Counter(run for document in documents for run in find_runs(document))
    cost = dict(zip(runs, _alone(tokenizer, list(runs)), strict=True))
    han = Counter(run for run in runs.elements() if _kind(run[-1]) == 2)
    characters = Counter[str]()
    for run, times in han.items():
        characters.update({char: times * n for char, n in Counter(run).items()})
    alone = dict(zip(characters, _alone(tokenizer, list(characters)), strict=True))
    spelled = sum(times for run, times in runs.items() if run not in han and cost[run] > 1)
    return Measure(
        tokenizer=name,
        text=text,
        tokens=tokens,
        characters=sum(map(len, documents)),
        bytes=sum(len(document.encode()) for document in documents),
        words=runs.total() - han.total() + characters.total(),
        word_tokens=sum(cost[run] * times for run, times in runs.items()),
        continued_words=spelled + sum(times for char, times in characters.items() if alone[char] > 1),
        unknown_tokens=sum(int((ids == tokenizer.vocabulary.unk).sum()) for ids in encoded),
        han=characters.total(),
        han_tokens=sum(cost[run] * times for run, times in han.items()),
        speed=_speed(tokenizer, documents),
    )


def find_runs(text: str) -> Iterator[str]:
    """Words, with the space before them if there is one; neighbouring ideographs are one run, without it."""
    before = ""
    for kind, group in groupby(text, _kind):
        run = "".join(group)
        if kind:
            yield " " + run if kind == 1 and before == " " else run
        before = run[-1]


@cache
def _kind(char: str) -> int:
    """2 for an ideograph, 1 for another character of words, 0 for the rest."""
    if any(low <= ord(char) <= high for low, high in IDEOGRAPHS):
        return 2
    return int(char.isalnum() or unicodedata.category(char)[0] == "M")


def _alone(tokenizer: TextTokenizer, runs: Sequence[str]) -> list[int]:
    """Tokens of each run inside a text: after a line end, so that the space mark some put before a text is not counted."""
    start = len(tokenizer.encode("\n"))
    return [len(ids) - start for ids in tokenizer.encode_batch(["\n" + run for run in runs])]


def _speed(tokenizer: TextTokenizer, documents: Sequence[str]) -> float:
    chosen, room = [], TIMED
    for document in documents:
        chosen.append(document[:room])
        room -= len(chosen[-1])
        if room <= 0:
            break
    seconds = []
    for _ in range(TURNS):
        started = time.perf_counter()
        tokenizer.encode_batch(chosen)
        seconds.append(time.perf_counter() - started)
    return sum(len(document.encode()) for document in chosen) / min(seconds) / 1e6


def table(found: Comparison) -> Table:
    """Every number, text by text."""
    made = Table(title="tokenizers" + (f", parity against {found.reference}" if found.reference else ""))
    heads = ("text", "tokenizer", "tokens", "per char", "per Han", "bytes/token", "per word", "continued", "unknown", "parity")
    for name in (*heads, "MB/s"):
        made.add_column(name, justify="left" if name in heads[:2] else "right")
    for text in found.texts:
        for place, name in enumerate(found.tokenizers):
            row = found.at(name, text)
            made.add_row(
                "" if place else text,
                name,
                f"{row.tokens:,}",
                f"{row.per_character:.3f}",
                _shown(row.per_han, ".2f"),
                f"{row.bytes_per_token:.2f}",
                _shown(row.fertility, ".2f"),
                _shown(row.continued, ".1%"),
                f"{row.unknown:.2%}",
                _shown(found.parity(row), ".2f"),
                f"{row.speed:.1f}",
            )
        made.add_section()
    return made


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(found: Comparison, path: str | Path) -> None:
    """A line for each text, a point for each tokenizer; the texts that cost the first tokenizer most at the bottom."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, bool, Any]] = [
        ("tokens per word (Han: per character)", True, lambda row: row.fertility),
        ("continued words", False, lambda row: None if row.continued is None else 100 * row.continued),
        ("bytes per token", False, lambda row: row.bytes_per_token),
    ]
    if found.reference:
        panels.insert(0, (f"tokens, {found.reference} = 1", True, found.parity))
    first = found.tokenizers[0]
    order = sorted(found.texts, key=lambda text: found.parity(found.at(first, text)) or found.at(first, text).per_character)
    figure = Figure(
        figsize=(1.2 + 2.9 * len(panels), 1.2 + len(order) * max(0.32, 0.09 * len(found.tokenizers))), layout="constrained"
    )
    for place, (axes, (title, log, value)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)
    ):
        _panel(axes, found, order, value)
        axes.set_title(title, fontsize=9)
        if log:
            _log_axis(axes)
        elif title.startswith("continued"):
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}%")
            axes.set_xlim(left=-3)
        else:
            axes.set_xlim(left=0)
        axes.set_yticks(range(len(order)), order if place == 0 else [])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, found: Comparison, order: list[str], value: Any) -> None:
    count = len(found.tokenizers)
    for place, name in enumerate(found.tokenizers):
        points = [(value(found.at(name, text)), y) for y, text in enumerate(order)]
        shift = (place - (count - 1) / 2) * min(0.16, 0.7 / count)  # side by side, or equal ones would hide each other
        known = [(x, y + shift) for x, y in points if x is not None]
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(*zip(*known, strict=True), "o", color=colour, label=name, markersize=4.5)
    for y, text in enumerate(order):
        values = [x for name in found.tokenizers if (x := value(found.at(name, text))) is not None]
        if values:
            axes.plot([min(values), max(values)], [y, y], color="#c9ced6", linewidth=1.5, zorder=0)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.grid(axis="x", color="#e8eaee", zorder=-1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8)


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    marks = [m * 10**e for e in range(-2, 4) for m in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([mark for mark in (*marks, 0.7, 1.5, 3) if low <= mark <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
