"""A batch as a person reads it: its text with the labels under it, its documents, its attention, its statistics.

Every position is a cell of two lines or more: the input, and below it the label of each head that predicts there. So
one form shows the shift of a causal model and the hidden words of a masked one. The price: a batch does not say what a
label stands for, so a head whose labels are all below `CLASSES` is taken for one that predicts classes, not words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from ds_pretrain.core.attention import AttentionPattern, Span
from ds_pretrain.core.batch import Batch, Target
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.collate import realised

CLASSES = 3
"""Labels below this are classes: in a vocabulary they are reserved ids."""
WIDEST = 16
"""Columns of a token at most."""
DOCUMENTS, LINES = 4, 2
"""Documents of a row, and lines of a document before its last one, that are shown."""
PICTURE = 48
"""Positions of the attention picture: as many columns, half as many lines."""
HIDDEN, RANDOM, KEPT, LABEL = "black on yellow", "black on magenta", "black on green", "cyan"
SHADES = ("cyan", "magenta", "yellow", "green", "blue", "red")
"""Of documents, in turn."""
SIGNS = str.maketrans({"Ġ": "▁", "Ċ": "↵", "ĉ": "⇥", "\n": "↵", "\t": "⇥", " ": "▁"})
"""What byte-level vocabularies call space, line end and tab, and those themselves."""


def preview(batch: Batch, vocab: Vocabulary, token_text: Callable[[int], str], rows: int = 2) -> RenderableType:
    """The first rows of a batch, then the attention of the one with most documents beside the statistics of all."""
    shown = max(1, min(rows, batch.inputs.shape[0]))
    parts: list[RenderableType] = [_legend(batch, vocab)]
    for row in range(shown):
        parts += _row(batch, row, vocab, token_text)
    drawn = max(range(shown), key=lambda row: len(_spans(batch, row)))
    foot = Table.grid(padding=(0, 2))
    foot.add_column(no_wrap=True)
    foot.add_row(Group(*_picture(batch, drawn)), _statistics(batch, vocab))
    return Group(*parts, Rule(f"row {drawn}: who sees whom; the whole batch in numbers", style="bold"), foot)


def attention_png(batch: Batch, path: str | Path, rows: int = 4) -> None:
    """Draw the dense pattern of the first rows: queries down, keys across, one colour per document."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows = min(rows, batch.inputs.shape[0])
    across = min(rows, 2)
    down = -(-rows // across)
    figure = Figure(figsize=(5 * across, 5.2 * down), layout="constrained", facecolor="white")
    colours = ListedColormap(["#ffffff", "#1f5fa8", "#d9621e", "#2a8f57", "#8a4fb0", "#b08a00", "#c2387a"])
    for row, axes in enumerate(figure.subplots(down, across, squeeze=False).flat):
        if row >= rows:
            axes.set_visible(False)
            continue
        seen = _seen(batch, row)
        shade = (1 + (batch.attention.segment[row].long() - 1) % 6)[:, None] * seen
        axes.imshow(shade.numpy(), cmap=colours, vmin=0, vmax=6, interpolation="nearest")
        axes.set_title(f"row {row}: {_count(len(_spans(batch, row)), 'document')}", loc="left", fontweight="bold")
        axes.set_xlabel("key: what is seen")
        axes.set_ylabel("query: who sees")
    figure.suptitle(f"Attention of {batch.inputs.shape[1]} positions ({batch.attention.kind})")
    figure.savefig(path, dpi=120)


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

    names: of the lines, in front of each. first: the position number of the first cell, shown at every break.
    """

    cells: tuple[Cell, ...]
    names: tuple[str, ...]
    first: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        gutter = max(map(len, self.names))
        broken = list(self._break(options.max_width - gutter - 7))
        shown = broken if len(broken) <= LINES + 1 else [*broken[:LINES], None, broken[-1]]
        hidden = sum(len(part) for part in broken[LINES:-1])
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


def _row(batch: Batch, row: int, vocab: Vocabulary, token_text: Callable[[int], str]) -> Iterator[RenderableType]:
    spans, length = _spans(batch, row), batch.inputs.shape[1]
    padding = length - sum(span.stop - span.start for span in spans)
    facts = [f"{length} positions", _count(len(spans), "document"), f"{padding} padding"]
    yield Rule(f"row {row}: {', '.join(facts)}", style="bold")
    for number, span in enumerate(spans[:DOCUMENTS], start=1):
        yield _heading(batch, span, number)
        yield _stretch(batch, span, vocab, token_text)
    if len(spans) > DOCUMENTS:
        rest = spans[DOCUMENTS:]
        yield Text(f"... {_count(len(rest), 'document')} more, positions {rest[0].start}-{rest[-1].stop - 1} ...", "dim")


def _heading(batch: Batch, span: Span, number: int) -> Text:
    at = slice(span.start, span.stop)
    heads = [f"{int((t.weights[span.row, at] != 0).sum())} targets of {name}" for name, t in batch.targets.items()]
    where = f"row positions {span.start}-{span.stop - 1}, numbered from {int(batch.position[span.row, span.start])}"
    line = Text(f"document {number}", style=f"bold {SHADES[(number - 1) % len(SHADES)]}")
    return line.append(f"  {span.stop - span.start} tokens ({where}), {', '.join(heads)}", "not bold default")


def _stretch(batch: Batch, span: Span, vocab: Vocabulary, token_text: Callable[[int], str]) -> Stretch:
    def word(token: int) -> str:
        return _clean(token_text(token))

    at = slice(span.start, span.stop)
    inputs = batch.inputs[span.row, at].tolist()
    first = [(word(token), "dim" if vocab.is_special[token] else "") for token in inputs]
    lines: dict[str, list[tuple[str, str]]] = {"input": first}
    for name, target in batch.targets.items():
        labels, weights = target.labels[span.row, at].tolist(), target.weights[span.row, at].tolist()
        scored = [i for i, weight in enumerate(weights) if weight]
        say: Callable[[int], str] = str if _classes(target) else word
        lines[name] = _only([say(label) for label in labels], scored, LABEL)
        if not {0, 1}.issuperset(weights):
            lines[f"{name} weight"] = _only([f"x{weight:.3g}" for weight in weights], scored, "dim")
        if _hides(target, batch, vocab):
            for i in scored:
                first[i] = (first[i][0], _fate(inputs[i], labels[i], vocab))
    if batch.token_type is not None:
        lines["type"] = [(str(kind), "dim") for kind in batch.token_type[span.row, at].tolist()]
    cells = tuple(Cell(column) for column in zip(*lines.values(), strict=True))
    return Stretch(cells, tuple(lines), int(batch.position[span.row, span.start]))


def _only(texts: list[str], scored: list[int], style: str) -> list[tuple[str, str]]:
    """The texts at the scored positions, nothing elsewhere."""
    found = [("", "")] * len(texts)
    for i in scored:
        found[i] = (texts[i], style)
    return found


def _legend(batch: Batch, vocab: Vocabulary) -> Text:
    line = Text("In front: the position. Below an input: the ").append("label", LABEL).append(" predicted there.")
    if any(_hides(target, batch, vocab) for target in batch.targets.values()):
        for name, style in (("masked", HIDDEN), ("random word", RANDOM), ("kept", KEPT)):
            line.append("  ").append(f" {name} ", style)
    return line


def _statistics(batch: Batch, vocab: Vocabulary) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    for key, share in realised([batch], vocab).items():
        table.add_row(f"{share:.1%}", MEANING.get(key.split("/")[-1], "{0} {1}").format(*([*key.split("/"), ""])))
    table.add_row(f"{batch.inputs.shape[0]:,}", f"rows of {batch.inputs.shape[1]:,} positions")
    table.add_row(f"{len(batch.attention.spans()):,}", "documents or pieces of them")
    for name, target in batch.targets.items():
        table.add_row(f"{target.total:,.0f}", f"{name}: divisor of the summed loss")
    return table


MEANING: Mapping[str, str] = {
    "useful": "of the positions are not padding",
    "targets": "{0}: of these are predicted",
    "mask": "{0}: of the predicted are masked",
    "random": "{0}: of the predicted are a random word",
    "kept": "{0}: of the predicted are kept",
}
"""The keys of `realised`, in words."""


def _picture(batch: Batch, row: int) -> Iterator[Text]:
    """The dense pattern of a row, two lines of pixels to a line of text; a pixel is lit if anything in it is seen."""
    size = min(PICTURE, batch.inputs.shape[1])
    seen, segment = _seen(batch, row), batch.attention.segment[row]
    pixels = adaptive_max_pool2d((seen * segment[:, None]).float()[None], (size + size % 2, size))[0].int()
    yield Text(f"query ↓ key →   ({len(segment) / size:.3g} positions a column)", style="dim")
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


def _seen(batch: Batch, row: int) -> Tensor:
    pattern, one = batch.attention, slice(row, row + 1)
    return AttentionPattern(pattern.segment[one], pattern.horizon[one], pattern.kind).dense()[0]


def _spans(batch: Batch, row: int) -> list[Span]:
    one = slice(row, row + 1)
    pattern = AttentionPattern(batch.attention.segment[one], batch.attention.horizon[one], batch.attention.kind)
    return [Span(row, span.start, span.stop) for span in pattern.spans()]


def _hides(target: Target, batch: Batch, vocab: Vocabulary) -> bool:
    """Whether this head predicts what stands at its own position: [MASK] is then among its inputs."""
    return not _classes(target) and bool((batch.inputs[target.weights != 0] == vocab.mask).any())


def _fate(token: int, label: int, vocab: Vocabulary) -> str:
    return HIDDEN if token == vocab.mask else KEPT if token == label else RANDOM


def _classes(target: Target) -> bool:
    labels = target.labels[target.weights != 0]
    return len(labels) > 0 and int(labels.max()) < CLASSES


def _clean(text: str) -> str:
    """A token in one line: visible spaces, nothing that a terminal would act on, not too long."""
    shown = "".join(char if char.isprintable() else "�" for char in text.translate(SIGNS)) or "�"
    return shown if cell_len(shown) <= WIDEST else set_cell_size(shown, WIDEST - 1).rstrip() + "…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
