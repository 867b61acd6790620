"""A sweep on one page: what was asked and how it was run, a table, the curves, the scores.

The page begins with the comment at the head of the sweep file: its first line is the title, the rest says why and gives the
commands. Cells that differ by their seed alone are one line of the table, mean and standard deviation. Colours are the values
of the first axis that varies, line styles those of the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ds_pretrain.core.files import whole
from ds_pretrain.evaluation.plots import BLUE, DPI, EXTRA, GREY, ORANGE, History, plain, smoothed
from ds_pretrain.sweep.results import rows
from ds_pretrain.sweep.spec import Cell, Spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
COLOURS = (BLUE, ORANGE, *EXTRA, "#4f8fba", "#8c564b", GREY)
STYLES = ("-", "--", ":", "-.")
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("N (without embeddings)", "{:,.0f}".format),
    "tokens": ("tokens", "{:,.0f}".format),
    "loss_tokens": ("loss tokens", "{:,.0f}".format),
    "loss": ("validation loss (nats per target)", "{:.4f}".format),
    "perplexity": ("perplexity (per token)", "{:.2f}".format),
    "word_perplexity": ("perplexity (per word)", "{:,.1f}".format),
    "bits_per_byte": ("bits per byte", "{:.4f}".format),
    "accuracy": ("accuracy (per target)", "{:.2%}".format),
}
"""Columns of cells to headings and formats, in the order of the table."""
PANELS = ("training loss, smoothed", "validation loss", "gradient norm", "learning rate")
SHARES = ("accuracy", "untrained", "majority")
UNITS = {"loss": "nats per target", "perplexity": "per token", "word_perplexity": "per word", "tokens_scored": "targets"}


class Line(NamedTuple):
    """Cells that differ by their seed alone."""

    labels: Mapping[str, str]
    cells: Sequence[Cell]
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        return ", ".join(self.labels.values()) or "all"

    def values(self, column: str) -> list[float]:
        """Of the cells that have one; columns that do not vary among seeds have it once."""
        return [float(row[column]) for row in self.rows if isinstance(row.get(column), int | float)]


def write(spec: Spec, source: Path, folder: Path) -> Path:
    """Write report.md, curves.png and, where the sweep has scores, scores.png; returns the page. ValueError without a cell
    that has trained."""
    found = [line for line in lines(spec) if any(row["steps"] for row in line.rows)]
    if not found:
        raise ValueError(f"no cell of {spec.output} has trained yet: run them first with ds-pretrain sweep run")
    folder.mkdir(parents=True, exist_ok=True)
    curves(found).savefig(folder / "curves.png", dpi=DPI)
    pictures = ["![Learning curves](curves.png)"]
    if scored := [column for column in scores(found) if column.rpartition("/")[2] not in ("texts", "tokens_scored")]:
        panels(found, scored).savefig(folder / "scores.png", dpi=DPI)
        pictures.append("![Scores](scores.png)")
    page = folder / "report.md"
    with whole(page) as file:
        file.write("\n\n".join([*_head(source), *table(found), *pictures, ""]).encode())
    return page


def lines(spec: Spec) -> list[Line]:
    """The cells, those that differ by their seed together."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[Cell, Row]]] = {}
    for cell, row in zip(spec.cells, rows(spec), strict=True):
        varying = tuple((axis, label) for axis, label in cell.labels.items() if axis != "seed")
        groups.setdefault(varying, []).append((cell, row))
    return [Line(dict(key), *map(list, zip(*group, strict=True))) for key, group in groups.items()]


def scores(found: Sequence[Line]) -> list[str]:
    """The columns that are scores."""
    return list(dict.fromkeys(key for line in found for row in line.rows for key in row if "/" in key))


def _head(source: Path) -> Iterator[str]:
    """Title, text and commands, from the comment that the sweep file begins with."""
    text = source.read_text(encoding="utf-8").splitlines()
    stop = next((i for i, line in enumerate(text) if not line.startswith("#")), len(text))
    title, *rest = [line.removeprefix("#").removeprefix(" ") for line in text[:stop]] or [source.stem]
    yield f"# {title}"
    if body := "\n".join(rest).strip("\n"):
        yield body


def table(found: Sequence[Line]) -> Iterator[str]:
    """Markdown: a line for each combination, and what the figures are of."""
    axes = list(dict.fromkeys(axis for line in found for axis in line.labels))
    shown = [column for column in [*FIGURES, *scores(found)] if any(line.values(column) for line in found)]
    header = [*axes, "cells", *(_heading(column) for column in shown)]
    body = [
        [*(line.labels.get(axis, "") for axis in axes), str(len(line.rows)), *(_told(line, column) for column in shown)]
        for line in found
    ]
    yield "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))
    several = any(len(line.rows) > 1 for line in found)
    notes = ["Figures of several seeds: mean ± standard deviation of one."] * several + list(_denominators(found))
    if notes:
        yield " ".join(notes)


def _heading(column: str) -> str:
    if column in FIGURES:
        return FIGURES[column][0]
    figure = column.rpartition("/")[2]
    return f"{column} ({UNITS[figure]})" if figure in UNITS else column


def _told(line: Line, column: str) -> str:
    values = line.values(column)
    if not values:
        return "-"
    tell = FIGURES[column][1] if column in FIGURES else _format(column)
    mean = tell(statistics.fmean(values))
    return mean if len(values) == 1 or len(set(values)) == 1 else f"{mean} ± {tell(statistics.stdev(values))}"


def _format(column: str) -> Callable[[float], str]:
    figure = column.rpartition("/")[2]
    if figure in ("texts", "tokens_scored"):
        return "{:,.0f}".format
    return "{:.2%}".format if figure in SHARES or figure[:1].isdigit() else "{:.4g}".format


def _denominators(found: Sequence[Line]) -> Iterator[str]:
    """What the validation figures are divided by."""
    evaluated = [line for each in found for cell in each.cells for line in _validated(cell)[-1:]]
    scored = sorted({int(line["tokens_scored"]) for line in evaluated})
    if scored:
        span = f"{scored[0]:,}" if len(scored) == 1 else f"{scored[0]:,} to {scored[-1]:,}"
        yield f"Validation figures are means over {span} targets."


def _history(cell: Cell) -> History:
    try:
        return History.read(cell.folder / "metrics.jsonl")
    except (OSError, ValueError):
        return History()


def _validated(cell: Cell) -> list[dict[str, Any]]:
    """The evaluations of its own validation split."""
    return [line for line in _history(cell).evaluations if line["split"] == "validation"]


def _styles(found: Sequence[Line]) -> list[tuple[str, str]]:
    """Colour and line style of each line."""
    first = [next(iter(line.labels.values()), "") for line in found]
    rest = [tuple(line.labels.values())[1:] for line in found]
    colours = dict(zip(dict.fromkeys(first), cycle(COLOURS)))
    styles = dict(zip(dict.fromkeys(rest), cycle(STYLES)))
    return [(colours[a], styles[b]) for a, b in zip(first, rest, strict=True)]


def curves(found: Sequence[Line]) -> Figure:
    """Training loss, validation loss, gradient norm and learning rate against tokens, a line for each cell."""
    figure, axes = _figure(2, 2)
    for line, (colour, style) in zip(found, _styles(found), strict=True):
        for number, cell in enumerate(line.cells):
            look = {"color": colour, "linestyle": style, "linewidth": 1.3, "label": line.name if not number else None}
            _draw_run(axes, _history(cell), _validated(cell), look)
    for panel, title in zip(
        axes, ("training loss, smoothed", "validation loss", "gradient norm", "learning rate"), strict=True
    ):
        panel.set_title(title, loc="left", fontsize=11)
        _tokens(panel)
    axes[0].set_ylabel("nats per target")
    axes[2].set_yscale("log")
    _legend(figure, axes[0])
    return figure


def _draw_run(axes: Sequence[Axes], history: History, evaluated: Sequence[Row], look: Mapping[str, Any]) -> None:
    scale = history.tokens_per_step() if history.train else 0.0
    for panel, key in zip((axes[0], axes[2], axes[3]), ("loss", "grad_norm", "lr"), strict=True):
        steps, values = history.column(key)
        values = values if key == "lr" else smoothed(values, len(values) // 30 | 1)
        panel.plot(steps * scale, values, **look)
    points = [(line["step"] * scale, loss) for line in evaluated if math.isfinite(loss := float(line["loss"]))]
    if points:
        axes[1].plot(*zip(*points, strict=True), marker="o", markersize=3.5, **look)


def panels(found: Sequence[Line], columns: Sequence[str]) -> Figure:
    """A panel for each score: against tokens where these vary, else a bar for each line."""
    width = min(3, len(columns))
    figure, axes = _figure(-(-len(columns) // width), width)
    varying = len({round(math.log(line.rows[0]["tokens"]), 1) for line in found if line.rows[0].get("tokens")}) > 1
    for panel, column in zip(axes, columns, strict=False):
        (_against_tokens if varying else _bars)(panel, found, column)
        panel.set_title(_heading(column), loc="left", fontsize=11)
    for panel in axes[len(columns) :]:
        panel.set_visible(False)
    if varying:
        _legend(figure, axes[0])
    return figure


def _against_tokens(panel: Axes, found: Sequence[Line], column: str) -> None:
    """Lines of one first label joined: how the score grows."""
    first = [next(iter(line.labels.values()), "") for line in found]
    for name, colour in zip(dict.fromkeys(first), cycle(COLOURS)):
        mine = [line for line, label in zip(found, first, strict=True) if label == name and line.values(column)]
        points = sorted((statistics.fmean(line.values("tokens")), *_spread(line.values(column))) for line in mine)
        if points:
            tokens, means, spreads = map(np.array, zip(*points, strict=True))
            panel.errorbar(tokens, means, spreads, color=colour, marker="o", markersize=4, capsize=2, label=name)
    panel.set_xscale("log")
    _tokens(panel)


def _bars(panel: Axes, found: Sequence[Line], column: str) -> None:
    shown = [(line, colour) for line, (colour, _) in zip(found, _styles(found), strict=True) if line.values(column)]
    for place, (line, colour) in enumerate(shown):
        mean, spread = _spread(line.values(column))
        panel.barh(place, mean, xerr=spread or None, color=colour, height=0.65, capsize=3)
    panel.set_yticks(range(len(shown)), [line.name for line, _ in shown])
    panel.invert_yaxis()
    plain(panel)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _figure(height: int, width: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(5.2 * width + 1.6, 3.4 * height + 0.6), layout=layout, facecolor="white")
    return figure, list(np.atleast_1d(figure.subplots(height, width)).flat)


def _tokens(panel: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.set_xlabel("tokens")
    plain(panel)


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
