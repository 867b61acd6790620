"""A sweep on one page: what was asked and how it was run, a table, the curves, the scores.

The page begins with the comment at the head of the sweep file: its first line is the title, the rest says why and gives the
commands. What came of it is for you to write: `conclusions.md` in the folder of the page stands under the head. Cells that
differ by their seed alone are one line of the table, mean and standard deviation. Colours are the values of the first axis that
varies, line styles those of the others.
"""

from __future__ import annotations

import itertools
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
from ds_pretrain.sweep.scores import Asked
from ds_pretrain.sweep.spec import Budget, Cell, Spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Row = dict[str, Any]
COLOURS = (BLUE, ORANGE, *EXTRA, "#4f8fba", "#8c564b", GREY)
STYLES = ("-", "--", ":", "-.")
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("N (without embeddings)", "{:,.0f}".format),
    "tokens": ("tokens", "{:,.0f}".format),
    "loss_tokens": ("loss tokens", "{:,.0f}".format),
    "model_flops": ("model FLOPs", "{:.3g}".format),
    "loss": ("validation loss", "{:.4f}".format),
    "tokens_scored": ("validation targets", "{:,.0f}".format),
    "perplexity": ("perplexity (per token)", "{:.2f}".format),
    "word_perplexity": ("perplexity (per word)", "{:,.5g}".format),
    "bits_per_byte": ("bits per byte", "{:.4f}".format),
    "accuracy": ("accuracy (per target)", "{:.2%}".format),
}
"""Columns of cells to headings and formats, in the order of the table."""
APART = 4
"""How many times another a loss must be for neither to be seen beside it."""
RARE = 1 / 3
"""A figure of fewer lines than this share has no column of its own."""
SHARES = ("accuracy", "untrained", "majority")
UNITS = {"loss": "nats per target", "perplexity": "per token", "word_perplexity": "per word", "tokens_scored": "targets"}


class Line(NamedTuple):
    """Cells that differ by their seed alone, with their rows of the sweep's table and what they logged."""

    labels: Mapping[str, str]
    rows: Sequence[Row]
    histories: Sequence[History]

    @property
    def name(self) -> str:
        return ", ".join(self.labels.values()) or "all"

    @property
    def sound(self) -> list[History]:
        """Of the cells that have not failed."""
        return [history for history, row in zip(self.histories, self.rows, strict=True) if row["status"] != "failed"]

    @property
    def way(self) -> Mapping[str, str]:
        """What varies but for the budget."""
        return {axis: label for axis, label in self.labels.items() if axis not in Budget.model_fields}

    @property
    def way_name(self) -> str:
        return ", ".join(self.way.values())

    def values(self, column: str) -> list[float]:
        """Of the cells that have finished; also those that are not finite, which metrics write as text."""
        return [float(row[column]) for row in self.rows if row["status"] == "finished" and row.get(column) is not None]

    def known(self, column: str) -> list[float]:
        """Of these the finite ones."""
        return [value for value in self.values(column) if math.isfinite(value)]


def write(spec: Spec, source: Path, folder: Path) -> Path:
    """Write report.md, curves.png and, where the sweep has scores, scores.png; returns the page. ValueError without a cell
    that has trained."""
    every = lines(spec)
    found = [line for line in every if any(row["steps"] for row in line.rows)]
    if not found:
        raise ValueError(f"no cell of {spec.output} has trained yet: run them first with ds-pretrain sweep run")
    folder.mkdir(parents=True, exist_ok=True)
    sound = [line for line in found if any(row["status"] == "finished" for row in line.rows)]
    curves(found).savefig(folder / "curves.png", dpi=DPI)
    head = [*_head(source), *_conclusions(folder)]
    parts = [*head, *table(every), *_cautions(spec), *way(sound), "![Learning curves](curves.png)"]
    if scored := [each for each in spec.asked if any(column.startswith(f"{each.name}/") for column in scores(sound))]:
        panels(sound, scored).savefig(folder / "scores.png", dpi=DPI)
        parts += [part for each in scored for part in (*score_table(sound, each), *to_equal_quality(sound, each))]
        parts.append("![Scores](scores.png)")
    page = folder / "report.md"
    with whole(page) as file:
        file.write("\n\n".join([*parts, ""]).encode())
    return page


def lines(spec: Spec) -> list[Line]:
    """The cells, those that differ by their seed together."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[Row, History]]] = {}
    for cell, row in zip(spec.cells, rows(spec), strict=True):
        varying = tuple((axis, label) for axis, label in cell.labels.items() if axis != "seed")
        groups.setdefault(varying, []).append((row, _history(cell)))
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


def _conclusions(folder: Path) -> Iterator[str]:
    """What was written of it, with a title of its own."""
    if (file := folder / "conclusions.md").is_file():
        yield f"## What came of it\n\n{file.read_text(encoding='utf-8').strip()}"
        yield "## Figures"


def table(found: Sequence[Line]) -> Iterator[str]:
    """Markdown: a line for each combination, what it cost and reached, what the figures are of, and which have none."""
    yield _markdown(found, [column for column in FIGURES if any(line.values(column) for line in found)], _heading)
    several = any(len(line.rows) > 1 for line in found)
    notes = ["Figures of several seeds: mean ± standard deviation of one."] * several + list(_denominators(found))
    if notes:
        yield " ".join(notes)
    if left := [f"- {_left(row)}" for row in _rows(found) if row["status"] != "finished"]:
        yield "Not finished, and in no figure:\n\n" + "\n".join(left)


def _left(row: Row) -> str:
    """A cell that is not finished, with why."""
    why = f": {row['reason']}" if row.get("reason") else ""
    return f"{row['run']} ({row['status']} after step {row['steps']:,}){why}"


def way(found: Sequence[Line]) -> Iterator[str]:
    """Markdown: every evaluation of runs that began with weights, from before their first step on; nothing of others."""
    done = [(line, [history for history, row in zip(line.histories, line.rows, strict=True) if row["status"] == "finished"])
            for line in found]  # fmt: skip
    begun = [(line, histories) for line, histories in done if all(_evaluated_first(history) for history in histories)]
    if not begun:
        return
    steps = sorted({each["step"] for _, histories in begun for history in histories for each in history.evaluations})
    axes = list(dict.fromkeys(axis for line, _ in begun for axis in line.labels))
    body = [
        [*(line.labels.get(axis, "") for axis in axes), split, *_told_on_the_way(runs, steps)]
        for line, histories in begun
        for split in _splits(histories[0])
        for runs in [[_splits(history)[split] for history in histories]]
    ]
    header = [*axes, "text", "targets", "figure", *(f"step {step:,}" for step in steps)]
    yield "Before, during and after:"
    yield _grid(header, body)


def _evaluated_first(history: History) -> bool:
    return any(each["step"] == 0 for each in history.evaluations)


def _told_on_the_way(runs: Sequence[Sequence[Row]], steps: Sequence[int]) -> list[str]:
    """What evaluations are means over, the figure they are told by, perplexity where they have it, and it at each step."""
    targets = sorted({int(each["tokens_scored"]) for run in runs for each in run})
    key = "perplexity" if all("perplexity" in each for run in runs for each in run) else "loss"
    at = [[float(each[key]) for run in runs for each in run if each["step"] == step] for step in steps]
    return [_span(targets), _heading(key), *(_mean_and_spread(values, FIGURES[key][1]) for values in at)]


def _cautions(spec: Spec) -> Iterator[str]:
    """What may not be read out of the columns of validation."""
    runs = [cell.config for cell in spec.cells]
    told = ["A loss is in nats per target, of an objective with several heads the weighted sum of theirs."]
    if len({run.data.path for run in runs}) > 1:
        told.append("Each cell is validated on text of its own, so these figures do not compare the cells; scores do.")
    if len({run.objective["name"] for run in runs}) > 1:
        told.append("Losses of different objectives are no common scale.")
    yield " ".join(told)


def _rows(found: Sequence[Line]) -> list[Row]:
    return [row for line in found for row in line.rows]


def score_table(found: Sequence[Line], asked: Asked) -> Iterator[str]:
    """Markdown: the figures of one score."""
    yield f"**{asked.name}**: `{asked.by}` with {', '.join(f'{key} {value}' for key, value in asked.fields.items())}"
    if asked.by == "memorised":
        yield _recall_table(found, asked.name)
        return
    columns = [column for column in scores(found) if column.startswith(f"{asked.name}/")]
    few = [column for column in columns if sum(bool(line.values(column)) for line in found) < RARE * len(found)]
    yield _markdown(found, [column for column in columns if column not in few], _figure_name)
    rest = [
        f"- {line.name}: {', '.join(f'{_figure_name(column)} {_told(line, column)}' for column in few if line.values(column))}"
        for line in found
        if any(map(line.values, few))
    ]
    yield from ["Figures that few have:\n\n" + "\n".join(rest)] * bool(rest)
    yield from _denominators(found, f"{asked.name}/")
    drawn = _figure_of(asked, found)
    left = dict.fromkeys(_left_out(found, drawn))
    yield from [f"The picture is of {_figure_name(drawn)}; not in it: {'; '.join(left)}."] * bool(left)


def _left_out(found: Sequence[Line], column: str) -> Iterator[str]:
    """The lines, or the cells of a line, that have no finite figure to draw; under one name where none of a way has."""
    drawn = _ways(found, column)
    for line in found:
        there, known = len([row for row in line.rows if row["status"] == "finished"]), len(line.known(column))
        if known == 0:
            yield line.name if line.way_name in drawn else line.way_name or line.name
        elif known < there:
            yield f"{line.name} ({there - known} of {there} cells)"


def _figure_name(column: str) -> str:
    return _heading(column).partition("/")[2]


def _recall_table(found: Sequence[Line], name: str) -> str:
    """A row for each number of occurrences."""
    header = ["occurrences in training (0: test split)"]
    header += [f"{line.name}: {figure}" for line in found for figure in ("verbatim", "tried", "windows there")]
    body = [
        [column.rpartition("/")[2], *(_told(line, column + figure) for line in found for figure in ("", " tried", " there"))]
        for column in _occurrences(found, name)
    ]
    return _grid(header, body)


def _occurrences(found: Sequence[Line], name: str) -> list[str]:
    """The columns of a memorisation score that are shares, from the rarest windows on."""
    mine = [column for column in scores(found) if column.startswith(f"{name}/") and " " not in column.rpartition("/")[2]]
    return sorted(mine, key=_first)


def to_equal_quality(found: Sequence[Line], asked: Asked) -> Iterator[str]:
    """Markdown: what other ways to train need to be as good as the first is at each of its budgets; nothing where budgets do
    not vary, or nothing else. Between two budgets a score is a straight line over the logarithm of tokens."""
    column = _figure_of(asked, found)
    ways = list(_ways(found, column).items())
    if asked.by == "memorised" or len(ways) < 2 or len(ways[0][1]) < 2:
        return
    (first, reference), *others = ways
    tell = FIGURES["tokens"][1]
    axes = ("tokens", "loss_tokens")
    header = [f"as good as {first} with", *(f"{name}: {FIGURES[axis][0]}" for name, _ in others for axis in axes)]
    body = []
    for line in reference:
        levels, spent = line.known(column), [statistics.fmean(line.values(axis)) for axis in axes]
        at = f"{_format(column)(statistics.fmean(levels))}: {tell(spent[0])} tokens, {tell(spent[1])} of them scored"
        body.append([at, *(_needed(lines, column, axis, levels, base) for _, lines in others
                           for axis, base in zip(axes, spent, strict=True))])  # fmt: skip
    shown = "median, lowest and highest of all pairs of seeds"
    yield f"To equal {_figure_name(column)}, interpolated, and how many times as much ({shown}):"
    yield _grid(header, body)


def _ways(found: Sequence[Line], column: str) -> dict[str, list[Line]]:
    """Lines that differ by their budget alone, by what they have in common; of those with a finite score."""
    ways: dict[str, list[Line]] = {}
    for line in found:
        if line.known(column):
            ways.setdefault(line.way_name, []).append(line)
    return ways


def _needed(lines: Sequence[Line], column: str, axis: str, levels: Sequence[float], base: float) -> str:
    """How much of an axis a score takes: of every seed for every level, those of the seeds it is held against."""
    sign = 1.0 if column.endswith("accuracy") else -1.0
    seeds = _by_seed(lines, column, axis, sign)
    found = sorted(_reached(points, sign * level) for points in seeds for level in levels)
    spent = [point[0] for points in seeds for point in points]

    def told(amount: float, tell: Callable[[float], str], unit: float = 1) -> str:
        if math.isinf(amount):
            return f"more than {tell(max(spent) / unit)}"
        return tell(amount / unit) if amount else f"less than {tell(min(spent) / unit)}"

    amount, times = FIGURES[axis][1], "{:.2f}".format
    low, high = (told(found[end], times, base) for end in (0, -1))
    if math.isnan(middle := _median(found)):
        return f"{told(found[0], amount)} to {told(found[-1], amount)} ({low} to {high} x)"
    spread = f", {low} to {high}" if low != high else ""
    return f"{told(middle, amount)} ({told(middle, times, base)} x{spread})"


def _by_seed(lines: Sequence[Line], column: str, axis: str, sign: float) -> list[list[tuple[float, float]]]:
    """What each seed spent and reached, in order, of the seeds that have most of the lines: a gap would be a straight line."""
    seeds: dict[Any, list[tuple[float, float]]] = {}
    for row in (row for line in lines for row in line.rows if row["status"] == "finished" and column in row):
        if math.isfinite(reached := sign * float(row[column])):
            seeds.setdefault(row["seed"], []).append((float(row[axis]), reached))
    most = max(map(len, seeds.values()))
    return [sorted(points) for points in seeds.values() if len(points) == most]


def _median(amounts: Sequence[float]) -> float:
    """Of amounts in order, 0 for too little to tell and infinite for too much; NaN where it lies between such and another."""
    low, high = amounts[(len(amounts) - 1) // 2], amounts[len(amounts) // 2]
    return (low + high) / 2 if low == high or 0 < low < high < math.inf else math.nan


def _reached(points: Sequence[tuple[float, float]], level: float) -> float:
    """Where a growing score first has this level; 0 before the first point, infinite after the last."""
    if points[0][1] >= level:
        return 0.0 if points[0][1] > level else points[0][0]
    for (a, low), (b, high) in itertools.pairwise(points):
        if high >= level:
            return float(a * (b / a) ** ((level - low) / (high - low)))
    return math.inf


def _grid(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def _markdown(found: Sequence[Line], columns: Sequence[str], heading: Callable[[str], str]) -> str:
    axes = list(dict.fromkeys(axis for line in found for axis in line.labels))
    header = [*axes, "finished", *map(heading, columns)]
    body = [
        [*(line.labels.get(axis, "") for axis in axes), _finished(line), *(_told(line, column) for column in columns)]
        for line in found
    ]
    return _grid(header, body)


def _finished(line: Line) -> str:
    return f"{sum(row['status'] == 'finished' for row in line.rows)} of {len(line.rows)}"


def _heading(column: str) -> str:
    if column in FIGURES:
        return FIGURES[column][0]
    figure = column.rpartition("/")[2]
    return f"{column} ({UNITS[figure]})" if figure in UNITS else column


def _told(line: Line, column: str) -> str:
    return _mean_and_spread(line.values(column), FIGURES[column][1] if column in FIGURES else _format(column))


def _mean_and_spread(values: Sequence[float], tell: Callable[[float], str]) -> str:
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return ", ".join(map(tell, values))
    mean = tell(statistics.fmean(values))
    return mean if len(values) == 1 or len(set(values)) == 1 else f"{mean} ± {tell(statistics.stdev(values))}"


def _format(column: str) -> Callable[[float], str]:
    figure = column.rpartition("/")[2]
    if figure in ("texts", "tokens_scored") or figure.endswith((" tried", " there")):
        return "{:,.0f}".format
    return "{:.2%}".format if figure in SHARES or figure[:1].isdigit() else "{:.4g}".format


def _denominators(found: Sequence[Line], prefix: str = "") -> Iterator[str]:
    """What figures per word and per byte are divided by; those per target have a column. prefix: of a score's columns."""
    columns = [f"{prefix}{figure}" for figure in ("loss", "tokens_scored", "word_perplexity", "bits_per_byte")]
    known = [list(zip(*map(line.values, columns), strict=False)) for line in found]
    likely = [(loss * targets, *figures) for each in known for loss, targets, *figures in each if 1 < figures[0] < math.inf]
    words = sorted({round(nats / math.log(perplexity)) for nats, perplexity, _ in likely})
    octets = sorted({round(nats / math.log(2) / bits) for nats, _, bits in likely})
    if likely:
        yield f"Perplexity per word is exp(nats of all targets / {_span(words)} words); bits are of {_span(octets)} bytes."


def _span(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _history(cell: Cell) -> History:
    try:
        return History.read(cell.folder / "metrics.jsonl")
    except (OSError, ValueError):
        return History()


def _splits(history: History) -> dict[str, list[Row]]:
    """The evaluations on the way, of the run's own validation split and of those of other folders, by split."""
    found: dict[str, list[Row]] = {}
    for line in history.evaluations:
        found.setdefault(line["split"], []).append(line)
    return found


def _styles(found: Sequence[Line]) -> list[tuple[str, str]]:
    """Colour and line style of each line; how long it was trained is seen from where it ends."""
    varied = [list(line.way.values()) for line in found]
    first, rest = [next(iter(each), "") for each in varied], [tuple(each[1:]) for each in varied]
    colours, styles = list(dict.fromkeys(first)), list(dict.fromkeys(rest))
    looks = []
    for a, b in zip(first, rest, strict=True):
        turns, place = divmod(colours.index(a), len(COLOURS))
        looks.append((COLOURS[place], STYLES[(styles.index(b) + turns) % len(STYLES)]))
    return looks


def curves(found: Sequence[Line]) -> Figure:
    """Training loss, validation perplexity (where all have one, else loss), gradient norm and learning rate against tokens: a
    line for each sound cell. Losses of very different scales are drawn as shares of what they begin with."""
    evaluated = [each for line in found for history in line.histories for each in history.evaluations]
    shown = "perplexity" if all("perplexity" in each for each in evaluated) else "loss"
    name = "validation perplexity (per token)" if shown == "perplexity" else "validation loss"
    first = [_first_loss(history) for line in found for history in line.sound if len(history.column("loss")[1])]
    shares = shown == "loss" and max(first, default=1.0) > APART * min(first, default=1.0)
    figure, axes = _figure(2, 2)
    for line, (colour, style) in zip(found, _styles(found), strict=True):
        for history, label in zip(line.sound, [line.way_name or line.name, *[None] * len(line.sound)], strict=False):
            look = {"color": colour, "linestyle": style, "linewidth": 1.3, "label": label}
            _draw_run(axes, history, shown, look, _first_loss(history) if shares else 1.0)
    for panel, title in zip(axes, ("training loss, smoothed", name, "gradient norm", "learning rate"), strict=True):
        panel.set_title(title, loc="left", fontsize=11)
        _tokens(panel)
    for panel in axes[:2] if shares else axes[:1]:
        panel.set_ylabel("loss / training loss of the first step" if shares else "loss")
    if shown == "perplexity":
        axes[1].set_yscale("log")
        _plain_log(axes[1].yaxis, (1, 1.5, 2, 3, 4, 5, 7))
    others = sorted({split for line in found for history in line.histories for split in _splits(history)})[1:]
    if others:
        axes[1].set_title(f"{name}; other marks: {', '.join(others)}", loc="left", fontsize=9)
    axes[2].set_yscale("log")
    _legend(figure, axes[:1])
    return figure


def _first_loss(history: History) -> float:
    """What a run begins with; 1 where it has no loss."""
    return float(next(iter(history.column("loss")[1]), 1.0))


def _draw_run(axes: Sequence[Axes], history: History, figure: str, look: Mapping[str, Any], unit: float) -> None:
    """unit: of losses."""
    scale = history.tokens_per_step() if history.train else 0.0
    for panel, key in zip((axes[0], axes[2], axes[3]), ("loss", "grad_norm", "lr"), strict=True):
        steps, values = history.column(key)
        values = values if key == "lr" else smoothed(values, len(values) // 30 | 1)
        values = values / unit if key == "loss" else values
        panel.plot(steps * scale, values, **look)
    for marker, (_, evaluated) in zip("os^vD", sorted(_splits(history).items()), strict=False):
        told = [(line["step"] * scale, float(line[figure]) / unit) for line in evaluated]
        points = [point for point in told if math.isfinite(point[1])]
        if points:
            axes[1].plot(*zip(*points, strict=True), marker=marker, markersize=3.5, **look)


def panels(found: Sequence[Line], asked: Sequence[Asked]) -> Figure:
    """Each score in a panel; where cells differ by their tokens, against these, and against what the loss was a sum over."""
    growing = len({line.way_name for line in found}) < len(found)  # under several budgets
    axes = ("tokens", "loss_tokens") if growing else ("",)
    drawn = [(each, axis) for each in asked for axis in (axes if each.by != "memorised" else ("",))]
    width = min(2, len(drawn))
    figure, places = _figure(-(-len(drawn) // width), width)
    for panel, (each, axis) in zip(places, drawn, strict=False):
        panel.set_title(_caption(each, found), loc="left", fontsize=11)
        if each.by == "memorised":
            _by_occurrence(panel, found, each.name)
        elif axis:
            _growing(panel, found, _figure_of(each, found), axis)
        else:
            _dots(panel, found, _figure_of(each, found))
        if each.by == "probe":
            _beside(panel, found, each, bool(axis))
    for panel in places[len(drawn) :]:
        panel.set_visible(False)
    _legend(figure, places)
    return figure


def _figure_of(each: Asked, found: Sequence[Line]) -> str:
    """The column that a score is drawn by: the first of these that it has."""
    columns = [f"{each.name}/{figure}" for figure in ("bits_per_byte", "accuracy", "loss")]
    return next((column for column in columns if any(line.values(column) for line in found)), columns[-1])


def _caption(each: Asked, found: Sequence[Line]) -> str:
    if each.by == "memorised":
        return f"{each.name}: windows completed verbatim"
    return f"{_heading(_figure_of(each, found))}, {' and '.join(path.name for path in each.paths)}"


def _mean(found: Sequence[Line], column: str) -> float:
    """NaN, which is drawn as nothing, where there is none."""
    values = [value for line in found for value in line.known(column)]
    return statistics.fmean(values) if values else math.nan


def _growing(panel: Axes, found: Sequence[Line], column: str, axis: str) -> None:
    """Lines that differ by their budget alone joined: how the score grows with an axis."""
    for (name, mine), colour in zip(_ways(found, column).items(), cycle(COLOURS)):
        points = sorted((statistics.fmean(line.values(axis)), *_spread(line.known(column))) for line in mine)
        at, means, spreads = map(np.array, zip(*points, strict=True))
        panel.errorbar(at, means, spreads, color=colour, marker="o", markersize=4, capsize=2, label=name)
    panel.set_xscale("log")
    _plain_log(panel.xaxis, (1, 2, 5))
    _tokens(panel, FIGURES[axis][0])


def _beside(panel: Axes, found: Sequence[Line], probe: Asked, growing: bool) -> None:
    """The share of the commonest class, and what the same networks do with initial weights: a level of each way, or a mark
    beside each point."""
    drawn, majority, column = _figure_of(probe, found), f"{probe.name}/majority", f"{probe.name}/untrained"
    level = panel.axhline if growing else panel.axvline
    level(_mean(found, majority), color=GREY, linestyle="--", linewidth=1.2, label="majority")
    if growing:
        for mine, colour in zip(_ways(found, drawn).values(), cycle(COLOURS)):
            panel.axhline(_mean(mine, column), color=colour, linestyle=":", linewidth=1.2)
        panel.plot([], color=GREY, linestyle=":", label="untrained")
        return
    levels = [_mean([line], column) for line in found if line.known(drawn)]
    panel.plot(levels, range(len(levels)), color=GREY, linestyle="", marker="|", markersize=12, label="untrained")


def _dots(panel: Axes, found: Sequence[Line], column: str) -> None:
    """Means and deviations on an axis of their own range: a difference of a hundredth would be none on one from zero."""
    shown = [(line, colour) for line, (colour, _) in zip(found, _styles(found), strict=True) if line.known(column)]
    for place, (line, colour) in enumerate(shown):
        mean, spread = _spread(line.known(column))
        panel.errorbar(mean, place, xerr=spread or None, color=colour, marker="o", markersize=6, capsize=3)
    panel.set_yticks(range(len(shown)), [line.way_name or line.name for line, _ in shown])
    panel.set_ylim(len(shown) - 0.4, -0.6)
    plain(panel)


def _by_occurrence(panel: Axes, found: Sequence[Line], name: str) -> None:
    columns = _occurrences(found, name)
    places = {column: place for place, column in enumerate(columns)}
    for line, (colour, style) in zip(found, _styles(found), strict=True):
        points = [(places[column], 100 * statistics.fmean(line.values(column))) for column in columns if line.values(column)]
        if points:
            panel.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=style,
                marker="o",
                markersize=4,
                label=line.way_name or line.name,
            )
    panel.set_xticks(range(len(columns)), [_short(_first(column)) for column in columns])
    panel.set(xlabel="occurrences in the training text, so many up to the next (0: test split)", ylabel="%")
    plain(panel)


def _short(count: int) -> str:
    """2k of 2,048: powers of two stand close."""
    return f"{count // 1024}k" if count >= 1024 else str(count)


def _first(column: str) -> int:
    """The number that a range of occurrences begins with."""
    return int(column.rpartition("/")[2].partition("-")[0])


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and deviation; none of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _figure(height: int, width: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(5.2 * width + 1.6, 3.4 * height + 0.6), layout=layout, facecolor="white")
    return figure, list(np.atleast_1d(figure.subplots(height, width)).flat)


def _tokens(panel: Axes, label: str = "tokens") -> None:
    from matplotlib.ticker import EngFormatter

    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.set_xlabel(label)
    plain(panel)


def _plain_log(axis: Axis, numbers: Sequence[float]) -> None:
    """Ticks of a logarithmic axis as people write them."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=numbers, numticks=50))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_locator(NullLocator())


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Each label of the panels once, beside them."""
    named = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if named:
        figure.legend([*named.values()], [*named], loc="outside right upper", frameon=False, fontsize=9)
