"""A batch as a person reads it: its text with the labels under it, its documents, its attention, its statistics.

Every position is a cell of two lines or more: the input, and below it the label of each head that predicts there. So
one form shows the shift of a causal model and the hidden words of a masked one. What a token is for (a word, a special
token, hidden, kept ...) is its role; this file gives roles the styles of a terminal, `preview_plot` colours on paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from ds_pretrain.core.attention import AttentionPattern, Span
from ds_pretrain.core.batch import Batch, Head
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.collate import realised

Role = Literal["word", "special", "marker", "masked", "random", "kept", "label", "note"]
WIDEST = 16
"""Columns of a token at most."""
DOCUMENTS, LINES = 4, 2
"""Documents of a row, and lines of a document before its last one, that are shown."""
PICTURE = 48
"""Columns of the attention picture; half as many lines."""
STYLES: Mapping[Role, str] = {
    "word": "",
    "special": "blue",
    "marker": "bold white on blue",
    "masked": "black on yellow",
    "random": "black on magenta",
    "kept": "black on green",
    "label": "cyan",
    "note": "dim",
}
FATES: Mapping[Role, str] = {"masked": "masked", "random": "random word", "kept": "kept"}
"""What may become of a predicted word, in words."""
AHEAD = "underline"
"""Style of a position that sees beyond itself, where others do not."""
SHADES = ("cyan", "magenta", "yellow", "green", "blue", "red")
"""Of documents, in turn."""
SIGNS = str.maketrans({"Ġ": "▁", "Ċ": "↵", "ĉ": "⇥", "\n": "↵", "\t": "⇥", " ": "▁"})
"""What byte-level vocabularies call space, line end and tab, and those themselves."""


class Token(NamedTuple):
    """What is written at a position, and as what. Nothing at all: an empty text."""

    text: str
    role: Role = "note"


@dataclass(frozen=True)
class Reader:
    """What it takes to read a batch: its tokenizer, and what its heads predict.

    classes: heads that predict classes, whose labels are no ids. hiding: heads that predict what stands at their own
    position, known from [MASK] among their inputs.
    """

    vocab: Vocabulary
    token_text: Callable[[int], str]
    classes: frozenset[str]
    hiding: frozenset[str]

    @staticmethod
    def of(batch: Batch, vocab: Vocabulary, token_text: Callable[[int], str], heads: Sequence[Head]) -> Reader:
        classes = frozenset(head.name for head in heads if head.classes is not None)
        masked = {name for name, t in batch.targets.items() if bool((batch.inputs[t.weights != 0] == vocab.mask).any())}
        return Reader(vocab, token_text, classes, frozenset(masked - classes))

    def token(self, token: int) -> Token:
        return Token(clean(self.token_text(token)), self._role(token))

    def _role(self, token: int) -> Role:
        v = self.vocab
        if not v.is_special[token]:
            return "word"
        return "special" if token in (v.pad, v.eod, v.unk, v.cls, v.sep, v.mask) else "marker"

    def lines(self, batch: Batch, span: Span) -> dict[str, list[Token]]:
        """The inputs of a document, then for each head the labels where it has any and the weights that are not plain."""
        at = slice(span.start, span.stop)
        inputs = batch.inputs[span.row, at].tolist()
        first = [self.token(token) for token in inputs]
        found = {"input": first}
        for name, target in batch.targets.items():
            labels, weights = target.labels[span.row, at].tolist(), target.weights[span.row, at].tolist()
            found[name] = [self._label(name, *pair) for pair in zip(labels, weights, strict=True)]
            if not {0, 1}.issuperset(weights):
                found[f"{name} weight"] = [Token(f"x{weight:.3g}" if weight else "") for weight in weights]
            for i in range(len(inputs)):
                if name in self.hiding and weights[i]:
                    first[i] = Token(first[i].text, self._fate(inputs[i], labels[i]))
        if batch.token_type is not None:
            found["type"] = [Token(str(kind)) for kind in batch.token_type[span.row, at].tolist()]
        return found

    def _label(self, head: str, label: int, weight: float) -> Token:
        """A class is shown without a weight too, if it is not 0: it tells parts of an example apart."""
        if not weight and not (label and head in self.classes):
            return Token("")
        text = str(label) if head in self.classes else clean(self.token_text(label))
        return Token(text, "label" if weight else "note")

    def _fate(self, token: int, label: int) -> Role:
        return "masked" if token == self.vocab.mask else "kept" if token == label else "random"


def preview(
    batch: Batch, vocab: Vocabulary, token_text: Callable[[int], str], heads: Sequence[Head], rows: int = 2
) -> RenderableType:
    """The first rows of a batch, then the attention of the one with most documents beside the statistics of all."""
    shown, reader = max(1, min(rows, batch.inputs.shape[0])), Reader.of(batch, vocab, token_text, heads)
    parts: list[RenderableType] = [legend(bool(reader.hiding))]
    for row in range(shown):
        parts += _row(batch, row, reader)
    drawn = max(range(shown), key=lambda row: len(spans_of(batch, row)))
    title = f"row {drawn}: who sees whom; the whole batch in numbers"
    foot = beside(Group(*picture(batch, drawn)), _statistics(batch, vocab, heads))
    return Group(*parts, Rule(title, style="bold"), foot)


def legend(hides: bool) -> Text:
    """What the colours mean."""
    line = Text("In front: the position. Below an input: the ").append("label", STYLES["label"]).append(" predicted there.")
    if hides:
        for role, name in FATES.items():
            line.append("  ").append(f" {name} ", STYLES[role])
    line.append("  ").append("special", STYLES["special"]).append("  ").append(" marker ", STYLES["marker"])
    return line.append("  ").append("sees ahead", AHEAD)


def beside(*parts: RenderableType) -> Table:
    """Parts in one line of columns, of which only the last may wrap."""
    table = Table.grid(padding=(0, 2))
    for _ in parts[1:]:
        table.add_column(no_wrap=True)
    table.add_row(*parts)
    return table


@dataclass(frozen=True)
class Cell:
    """One position: the texts of its lines, with their styles."""

    lines: tuple[tuple[str, str], ...]

    @property
    def width(self) -> int:
        return max(cell_len(text) for text, _ in self.lines)


@dataclass(frozen=True)
class Stretch:
    """Aligned lines of cells, broken to the width of the console.

    names: of the lines, in front of each. first: the position number of the first cell, shown at every break. most: lines
    that are shown before the last one.
    """

    cells: tuple[Cell, ...]
    names: tuple[str, ...]
    first: int = 0
    most: int = LINES

    @staticmethod
    def of(lines: Mapping[str, Sequence[Token]], ahead: Sequence[bool] = (), first: int = 0, most: int = LINES) -> Stretch:
        """ahead: positions of the first line to mark."""
        styled = [[(token.text, STYLES[token.role]) for token in line] for line in lines.values()]
        for i in (i for i, sees in enumerate(ahead) if sees):
            styled[0][i] = (styled[0][i][0], f"{styled[0][i][1]} {AHEAD}".strip())
        return Stretch(tuple(Cell(column) for column in zip(*styled, strict=True)), tuple(lines), first, most)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        gutter = max(map(len, self.names))
        broken = list(self._break(options.max_width - gutter - 7))
        shown = broken if len(broken) <= self.most + 1 else [*broken[: self.most], None, broken[-1]]
        hidden = sum(len(part) for part in broken[self.most : -1])
        for part in shown:
            if part is None:
                yield Text(f"       ... {hidden} positions more ...", style="dim")
            else:
                yield from self._lines(part, gutter)

    def _break(self, width: int) -> Iterator[range]:
        start, used = 0, 0
        for i, cell in enumerate(self.cells):
            if used + cell.width > width and i > start:
                yield range(start, i)
                start, used = i, 0
            used += cell.width + 1
        yield range(start, len(self.cells))

    def _lines(self, part: range, gutter: int) -> Iterator[Text]:
        for n, name in enumerate(self.names):
            line = Text(no_wrap=True)
            line.append(f"{self.first + part.start if n == 0 else '':>5} {name:<{gutter}} ", "dim")
            for cell in self.cells[part.start : part.stop]:
                text, style = cell.lines[n]
                line.append(text, style).append(" " * (cell.width - cell_len(text) + 1))
            if line.plain.strip() != name:  # a head that predicts nothing here takes no line
                yield line


def _row(batch: Batch, row: int, reader: Reader) -> Iterator[RenderableType]:
    spans, length = spans_of(batch, row), batch.inputs.shape[1]
    padding = length - sum(span.stop - span.start for span in spans)
    facts = [f"{length} positions", count(len(spans), "document"), f"{padding} padding"]
    yield Rule(f"row {row}: {', '.join(facts)}", style="bold")
    for number, span in enumerate(spans[:DOCUMENTS], start=1):
        yield _heading(batch, span, number)
        first = int(batch.position[span.row, span.start])
        yield Stretch.of(reader.lines(batch, span), ahead(batch, span), first)
    if len(spans) > DOCUMENTS:
        rest = spans[DOCUMENTS:]
        yield Text(f"... {count(len(rest), 'document')} more, positions {rest[0].start}-{rest[-1].stop - 1} ...", "dim")


def _heading(batch: Batch, span: Span, number: int) -> Text:
    at = slice(span.start, span.stop)
    heads = [f"{int((t.weights[span.row, at] != 0).sum())} targets of {name}" for name, t in batch.targets.items()]
    where = f"row positions {span.start}-{span.stop - 1}, numbered from {int(batch.position[span.row, span.start])}"
    line = Text(f"document {number}", style=f"bold {SHADES[(number - 1) % len(SHADES)]}")
    return line.append(f"  {span.stop - span.start} tokens ({where}), {', '.join(heads)}", "not bold default")


def _statistics(batch: Batch, vocab: Vocabulary, heads: Sequence[Head]) -> Table:
    numbers = told(realised([batch], vocab, heads))
    numbers.append((f"{batch.inputs.shape[0]:,}", f"rows of {batch.inputs.shape[1]:,} positions"))
    numbers.append((f"{len(batch.attention.spans()):,}", "documents or pieces of them"))
    numbers += [(f"{target.total:,.0f}", f"{name}: divisor of the summed loss") for name, target in batch.targets.items()]
    return table_of(numbers)


def table_of(numbers: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    for value, meaning in numbers:
        table.add_row(value, Text(meaning))
    return table


def told(found: Mapping[str, float], asked: Mapping[str, float] | None = None) -> list[tuple[str, str]]:
    """What `realised` found, as numbers with their meaning. asked: what was asked for, by the same keys."""
    lines = []
    for key, value in found.items():
        head, _, name = key.rpartition("/")
        form, meaning = MEANING.get(name, ("{:.3g}", "{}"))
        meaning = f"{head}: {meaning}" if head else meaning
        if asked and key in asked:
            meaning += f" (asked: {form.format(asked[key])})"
        lines.append((form.format(value), meaning.format(name)))
    return lines


MEANING: Mapping[str, tuple[str, str]] = {
    "useful": ("{:.1%}", "of the positions are not padding"),
    "ahead": ("{:.1%}", "of these see beyond themselves"),
    "targets": ("{:.1%}", "of the positions in use are predicted"),
    "rate": ("{:.1%}", "of the words are predicted"),
    "rewritten": ("{:.1%}", "of the documents are rewritten"),
    "spm": ("{:.1%}", "of these have the suffix first"),
    "samples": ("{:.1%}", "of the samples"),
    "loss_tokens": ("{:.1%}", "of the loss tokens"),
    "mask": ("{:.1%}", "of the predicted are masked"),
    "random": ("{:.1%}", "of the predicted are a random word"),
    "kept": ("{:.1%}", "of the predicted are kept"),
    "cut": ("{:.1%}", "of the text is cut out"),
    "spans": ("{:.2f}", "spans are cut out of an example"),
    "span_length": ("{:.2f}", "tokens are the mean length of a span"),
}
"""The keys of `realised`: how their values are written, and what they mean."""


def picture(batch: Batch, row: int, most: int = PICTURE) -> Iterator[Text]:
    """The dense pattern of a row, two lines of pixels to a line of text; a pixel is lit if anything in it is seen."""
    size = min(most, batch.inputs.shape[1])
    seen, segment = seen_in(batch, row), batch.attention.segment[row]
    pixels = adaptive_max_pool2d((seen * segment[:, None]).float()[None], (size + size % 2, size))[0].int()
    yield Text(f"query ↓ key →  ({len(segment) / size:.3g} a column)", style="dim")
    for top, bottom in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        line = Text(no_wrap=True).append("│", "dim")
        for a, b in zip(top, bottom, strict=True):
            line.append(*_half_block(a, b))
        yield line


def _half_block(top: int, bottom: int) -> tuple[str, str]:
    """One character for two pixels. A pixel is a document's number, or 0."""
    above, below = (SHADES[(n - 1) % len(SHADES)] for n in (top, bottom))
    if top and bottom:
        return ("█", above) if top == bottom else ("▀", f"{above} on {below}")
    return ("▀", above) if top else ("▄", below) if bottom else (" ", "")


def seen_in(batch: Batch, row: int) -> Tensor:
    pattern, one = batch.attention, slice(row, row + 1)
    return AttentionPattern(pattern.segment[one], pattern.horizon[one], pattern.kind).dense()[0]


def ahead(batch: Batch, span: Span) -> list[bool]:
    """The positions that see beyond themselves, where that tells them from others."""
    horizon = batch.attention.horizon[span.row, span.start : span.stop]
    sees = (horizon > torch.arange(span.start, span.stop)).tolist()
    return sees if batch.attention.kind == "mixed" else [False] * len(sees)


def spans_of(batch: Batch, row: int) -> list[Span]:
    one = slice(row, row + 1)
    pattern = AttentionPattern(batch.attention.segment[one], batch.attention.horizon[one], batch.attention.kind)
    return [Span(row, span.start, span.stop) for span in pattern.spans()]


def clean(text: str) -> str:
    """A token in one line: visible spaces, nothing that a terminal would act on, not too long."""
    shown = "".join(char if char.isprintable() else "�" for char in text.translate(SIGNS)) or "�"
    return shown if cell_len(shown) <= WIDEST else set_cell_size(shown, WIDEST - 1).rstrip() + "…"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
