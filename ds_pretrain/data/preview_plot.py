"""The preview on paper: documents before and after as strips of coloured cells, with attention and rates beside them.

A picture is laid out by hand, in inches from its upper left corner, because every cell is as wide as its token: what is
drawn is measured first and the page takes the height that it needs, so nothing overlaps and nothing is cut off. The
price: the widths hold for one fixed-width font, whose missing characters are drawn as boxes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len

from ds_pretrain.core.batch import Batch
from ds_pretrain.data.preview import FATES, Role, Token, count, seen_in, spans_of
from ds_pretrain.data.preview_objective import Part, Specimen, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
FONT, SIZE = "DejaVu Sans Mono", 7.5
"""Of tokens; everything else is set in the proportional sister."""
CHAR = 0.602 * SIZE / 72
"""Inches of a character of a token."""
ROW, GAP, MARGIN = 0.165, 0.08, 0.35
"""Inches: height of a line of cells, space between stretches, edge of the page."""
MOST = 8
"""Lines of a document at most."""
INK, GREY, AHEAD, SCORED = "#1c2530", "#5b6470", "#d9621e", "#1590a8"
FILLS: Mapping[Role, tuple[str, str]] = {
    "word": ("#ffffff", INK),
    "special": ("#d6e4f5", "#1f4f8a"),
    "marker": ("#1f5fa8", "#ffffff"),
    "masked": ("#f5c942", INK),
    "random": ("#e3a1dd", INK),
    "kept": ("#9fd6a6", INK),
    "label": ("#e2f4f7", "#0b6376"),
    "note": ("none", GREY),
}
"""Cell and text of each role."""
SEGMENTS = ("#1f5fa8", "#d9621e", "#2a8f57", "#8a4fb0", "#b08a00", "#c2387a")

Draw = Callable[["Axes", float, float], Any]


@dataclass
class Sheet:
    """Things to draw from an upper left corner, and the room they take so far; inches."""

    width: float
    height: float = 0.0
    things: list[tuple[float, float, Draw]] = field(default_factory=list)

    def put(self, x: float, y: float, draw: Draw) -> None:
        self.things.append((x, y, draw))

    def text(self, x: float, y: float, text: str, size: float = 8, **style: Any) -> None:
        """A line whose top is at y. Nothing in it is taken for mathematics."""
        given: dict[str, Any] = {"color": INK, "va": "top", "ha": "left", "parse_math": False, **style}
        self.put(x, y, lambda axes, x, y: axes.text(x, y, printable(text), fontsize=size, **given))

    def paragraph(self, text: str, size: float = 8, **style: Any) -> None:
        """Lines below everything so far, as wide as the sheet."""
        for line in textwrap.wrap(text, int(self.width / (0.62 * size / 72))):
            self.text(0, self.height, line, size, **style)
            self.height += 1.45 * size / 72

    def place(self, other: Sheet, x: float, y: float) -> None:
        self.things += [(x + dx, y + dy, draw) for dx, dy, draw in other.things]
        self.height = max(self.height, y + other.height)

    def figure(self) -> Figure:
        from matplotlib.figure import Figure

        size = (self.width + 2 * MARGIN, self.height + 2 * MARGIN)
        figure = Figure(figsize=size, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for x, y, draw in self.things:
            draw(axes, x + MARGIN, y + MARGIN)
        axes.set_aspect("auto")
        axes.set_xlim(0, size[0])
        axes.set_ylim(size[1], 0)
        return figure


def view_png(views: Sequence[View], path: str | Path) -> None:
    """One objective on a page of its own, or several on one sheet of two columns."""
    figure(views).savefig(path, dpi=DPI)


def figure(views: Sequence[View]) -> Figure:
    if len(views) == 1:
        page = panel(views[0], 11.0, 1.9)
        page.height += 2 * GAP
        page.place(legend(page.width), 0, page.height)
        return page.figure()
    columns, each, between = 2 if len(views) < 9 else 3, 8.2, 0.6
    page = Sheet(columns * (each + between) - between)
    page.text(0, 0, f"{len(views)} pre-training objectives: documents before and after", 17, fontweight="bold")
    page.place(legend(page.width), 0, 0.42)
    ends = [page.height + 3 * GAP] * columns
    for made in (panel(view, each, 1.6) for view in views):
        column = int(np.argmin(ends))
        page.place(made, column * (each + between), ends[column])
        ends[column] += made.height + 4 * GAP
    return page.figure()


def attention_png(batch: Batch, path: str | Path, rows: int = 4) -> None:
    """Draw the dense pattern of the first rows: queries down, keys across, one colour per document."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows = min(rows, batch.inputs.shape[0])
    across = min(rows, 2)
    down = -(-rows // across)
    figure = Figure(figsize=(5 * across, 5.2 * down), layout="constrained", facecolor="white")
    colours = ListedColormap(["#ffffff", *SEGMENTS])
    for row, axes in enumerate(figure.subplots(down, across, squeeze=False).flat):
        if row >= rows:
            axes.set_visible(False)
            continue
        shade = _shades(batch, row)
        axes.imshow(shade, cmap=colours, vmin=0, vmax=len(SEGMENTS), interpolation="nearest")
        axes.set_title(f"row {row}: {count(len(spans_of(batch, row)), 'document')}", loc="left", fontweight="bold")
        axes.set_xlabel("key: what is seen")
        axes.set_ylabel("query: who sees")
    figure.suptitle(f"Attention of {batch.inputs.shape[1]} positions ({batch.attention.kind})")
    figure.savefig(path, dpi=120)


def panel(view: View, width: float, matrix: float) -> Sheet:
    """An objective: its name and settings, its examples with their attention, its rates."""
    made = Sheet(width)
    made.put(0, 0, lambda axes, x, y: axes.plot([x, x + width], [y, y], color=INK, linewidth=1.2))
    made.text(0, 0.07, view.name, 13, fontweight="bold")
    made.height = 0.33
    made.paragraph(view.headline, 8.5)
    made.paragraph(view.settings, 7, color=GREY)
    for note in view.notes:
        made.paragraph(note, 7, color=GREY, style="italic")
    for specimen in view.specimens:
        made.place(example(specimen, width, matrix), 0, made.height + GAP)
    made.place(rates(view.rates, width), 0, made.height + 1.5 * GAP)
    return made


def example(specimen: Specimen, width: float, matrix: float) -> Sheet:
    """Documents above what became of them, the attention at the right."""
    left, drawn = Sheet(width - matrix - 0.45), Sheet(width)
    names = [name for part in specimen.parts for name in part.lines] + ["text"]
    gutter = max(len(_short(name)) for name in names) * CHAR * 6.5 / SIZE + 0.3
    of = f" · {specimen.component}" if specimen.component else ""
    for document in specimen.documents:
        _titled(left, f"before{of}", count(len(document), "token"))
        strip(left, Part({"text": document}), gutter)
    for part in specimen.parts:
        _titled(left, f"after{of}", part.facts)
        strip(left, part, gutter)
    drawn.place(left, 0, 0)
    drawn.place(attention(specimen.batch, matrix), width - matrix, 0.02)
    return drawn


def strip(sheet: Sheet, part: Part, gutter: float) -> None:
    """The lines of a part in cells, broken to the width of the sheet."""
    columns = list(zip(*part.lines.values(), strict=True))
    widths = [max(cell_len(token.text) for token in column) * CHAR + 0.055 for column in columns]
    broken = list(_broken(widths, sheet.width - gutter))
    hidden = sum(map(len, broken[MOST:]))
    for stretch in broken[:MOST]:
        y, left = sheet.height, gutter
        used = [n for n in range(len(part.lines)) if n == 0 or any(columns[i][n].text for i in stretch)]
        sheet.text(0, y + 0.03, str(stretch.start), 6, color=GREY)
        for down, n in enumerate(used):
            name = _short(list(part.lines)[n])
            sheet.text(gutter - 0.06, y + down * ROW + 0.025, name, 6.5, color=GREY, ha="right", family=FONT)
        for i in stretch:
            for down, n in enumerate(used):
                _cell(sheet, left, y + down * ROW, widths[i], columns[i][n])
            if part.ahead and part.ahead[i]:
                sheet.put(left, y, _bar(widths[i]))
            left += widths[i]
        sheet.height += len(used) * ROW + 0.045
    if hidden:
        sheet.text(gutter, sheet.height, f"... {count(hidden, 'position')} more ...", 6.5, color=GREY)
        sheet.height += 0.14
    sheet.height += GAP / 2


def attention(batch: Batch, size: float) -> Sheet:
    """The dense pattern of the only row of a batch; beside it the queries that bear loss."""
    from matplotlib.colors import ListedColormap

    drawn, shade = Sheet(size), _shades(batch, 0)
    scored = sum((t.weights[0] != 0).numpy() for t in batch.targets.values()) > 0
    colours = ListedColormap(["#f3f4f6", *SEGMENTS])
    n = len(shade)

    def paint(axes: Axes, x: float, y: float) -> None:
        axes.imshow(shade, cmap=colours, vmin=0, vmax=len(SEGMENTS), interpolation="nearest",
                    extent=(x, x + size, y + size, y), zorder=1)  # fmt: skip
        axes.plot([x, x + size, x + size, x, x], [y, y, y + size, y + size, y], color=INK, linewidth=0.7, zorder=2)
        for i in np.flatnonzero(scored):
            _rectangle(axes, x - 0.09, y + i * size / n, 0.06, size / n, facecolor=SCORED, edgecolor="none")

    drawn.put(0, 0.16, paint)
    drawn.text(0, 0, "key →", 6.5, color=GREY)
    drawn.text(size, 0, f"{n} positions", 6.5, color=GREY, ha="right")
    drawn.text(-0.13, 0.16, "query →", 6.5, color=GREY, ha="right", rotation=270)
    drawn.height = size + 0.2
    return drawn


def rates(numbers: Sequence[tuple[str, str]], width: float) -> Sheet:
    """Numbers with their meaning, as many columns of them as fit."""
    made, size = Sheet(width), 7.0
    longest = max(len(meaning) for _, meaning in numbers)
    columns = max(1, min(3, int(width / (0.56 + longest * 0.53 * size / 72))))
    down = -(-len(numbers) // columns)
    for i, (value, meaning) in enumerate(numbers):
        x, y = i // down * width / columns, i % down * 0.145
        made.text(x + 0.42, y, value, size, ha="right", fontweight="bold")
        made.text(x + 0.48, y, meaning, size)
    made.height = down * 0.145
    return made


def legend(width: float) -> Sheet:
    """What the colours mean."""
    made, x = Sheet(width), 0.0
    shown: dict[Role, str] = {"word": "as it was", **FATES, "special": "special", "marker": "sentinel, mode", "label": "label"}
    for role, name in shown.items():
        w = (len(name) + 1) * CHAR + 0.06
        _cell(made, x, 0, w, Token(name, role))
        x += w + 0.12
    made.put(x, 0.05, _bar(0.3))
    made.text(x + 0.36, 0.02, "sees ahead of itself", 7.5)
    made.put(x + 1.62, 0.02, lambda axes, x, y: _rectangle(axes, x, y, 0.06, 0.13, facecolor=SCORED, edgecolor="none"))
    made.text(x + 1.74, 0.02, "query that bears loss", 7.5)
    made.height = 0.2
    return made


def printable(text: str) -> str:
    """The text with a box for every character that the font of tokens lacks, and a point for the heavy sign of a space."""
    known = _glyphs()
    return "".join(char if ord(char) in known else "□" for char in text.replace("▁", "·"))


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(FONT)).get_charmap())


def _shades(batch: Batch, row: int) -> np.ndarray:
    """int [S, S]: the colour of the query's segment where it sees the key, 0 elsewhere."""
    return ((1 + (batch.attention.segment[row].long() - 1) % len(SEGMENTS))[:, None] * seen_in(batch, row)).numpy()


def _titled(sheet: Sheet, title: str, facts: str) -> None:
    sheet.text(0, sheet.height, title, 7.5, fontweight="bold")
    sheet.text(len(title) * 0.072 + 0.12, sheet.height, facts, 7.5, color=GREY)
    sheet.height += 0.17


def _broken(widths: Sequence[float], room: float) -> Iterator[range]:
    start, used = 0, 0.0
    for i, width in enumerate(widths):
        if used + width > room and i > start:
            yield range(start, i)
            start, used = i, 0.0
        used += width
    yield range(start, len(widths))


def _cell(sheet: Sheet, x: float, y: float, width: float, token: Token) -> None:
    if not token.text:
        return
    fill, ink = FILLS[token.role]
    edge = "#c9ced6" if fill != "none" else "none"
    high = ROW - 0.012
    sheet.put(x, y, lambda axes, x, y: _rectangle(axes, x, y, width, high, facecolor=fill, edgecolor=edge, linewidth=0.5))
    sheet.text(x + width / 2, y + high / 2 + 0.004, token.text, SIZE, color=ink, ha="center", va="center", family=FONT)


def _bar(width: float) -> Draw:
    return lambda axes, x, y: axes.plot([x, x + width], [y - 0.008] * 2, color=AHEAD, linewidth=2, solid_capstyle="butt")


def _rectangle(axes: Axes, x: float, y: float, width: float, height: float, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, **style))


def _short(name: str) -> str:
    return name.rpartition(" ")[2]
