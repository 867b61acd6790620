"""A run's metrics.jsonl as one picture: loss, gradient norm and learning rate over steps and tokens.

Lines that a kill cut short are skipped. A run that was resumed has gone back: what it logged beyond the step it
continued from is dropped, so the picture shows the run that led to the newest checkpoint. The price of one axis for
steps and tokens: it takes the tokens per step for constant, which packed rows make true within a percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ds_pretrain.core.files import json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f5fa8", "#d9621e", "#5b6470"
EXTRA = ("#2a8f57", "#8a4fb0", "#b08a00", "#c2387a")
DPI = 120
SMOOTHING = 50
"""The smoothed curve is a mean over a window of one part in so many of the run."""


@dataclass(frozen=True)
class History:
    """The lines of a run, in the order of their steps. heads: names of the losses that the loss is the sum of."""

    train: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    heads: tuple[str, ...] = ()

    @staticmethod
    def read(path: str | Path) -> History:
        lines: dict[tuple[int, str], dict[str, Any]] = {}
        last = 0
        for line in json_lines(Path(path), "step"):
            step = int(line["step"])
            if step < last:  # the run was resumed
                lines = {key: line for key, line in lines.items() if key[0] <= step}
            lines[step, line.get("split", "")], last = line, step
        train = [line for (_, split), line in lines.items() if not split]
        if not train:
            raise ValueError(f"{path} has no line of training: has the run logged a step yet?")
        return History(train, [line for (_, split), line in lines.items() if split], _heads(train[-1]))

    def column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric of training, where it is a number."""
        return _points(self.train, key)

    def tokens_per_step(self) -> float:
        return self.train[-1].get("tokens", 0) / max(1, self.train[-1]["step"])


class Mark(NamedTuple):
    """A value to be named at the right edge of the loss."""

    value: float
    text: str
    colour: str


def learning_curve(metrics_path: str | Path, png_path: str | Path, baselines: Mapping[str, float] | None = None) -> None:
    """Draw the metrics of a run. baselines: losses of other models by name, drawn as horizontal lines."""
    history = History.read(metrics_path)
    draw(history, Path(metrics_path).resolve().parent.name, baselines or {}).savefig(png_path, dpi=DPI)


def draw(history: History, name: str, baselines: Mapping[str, float]) -> Figure:
    """The figure: three axes over one axis of steps."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 7.5), layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08), facecolor="white")
    loss, norm, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3.2, 1, 1))
    figure.suptitle(f"Learning curve of {name}", x=0.091, ha="left", fontsize=15, fontweight="bold")
    _draw_loss(loss, history, baselines)
    _draw_norm(norm, history)
    rate.plot(*history.column("lr"), color=GREY, linewidth=1.5)
    rate.set_ylabel("learning\nrate")
    rate.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    rate.set_ylim(bottom=0)
    rate.set_xlabel("step")
    rate.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    rate.xaxis.set_major_formatter("{x:,.0f}")
    rate.set_xlim(0, history.train[-1]["step"])
    for axes in (loss, norm, rate):
        plain(axes)
        axes.yaxis.set_label_coords(-0.065, 0.5)
    return figure


def _draw_loss(axes: Axes, history: History, baselines: Mapping[str, float]) -> None:
    steps, values = history.column("loss")
    window = len(values) // SMOOTHING | 1
    smooth = smoothed(values, window)
    raw, mean = ("train, as logged", f"train, mean of {window}") if window > 1 else ("", "train")
    axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8, label=raw)
    axes.plot(steps, smooth, color=BLUE, linewidth=2, label=mean)
    marks = [Mark(smooth[-1], "train", BLUE)] if len(values) else []
    marks += _draw_heads(axes, history, window) + _draw_evaluations(axes, history)
    evaluated = _points(history.evaluations, "loss")[1]
    for name, value in baselines.items():
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        marks.append(Mark(value, name, GREY))
    axes.set_ylabel("loss (nats per target)")
    if len(values):
        axes.set_ylim(*_limits(values, [*(mark.value for mark in marks), *evaluated]))
    axes.legend(loc="upper right", frameon=False)
    axes.set_title(_facts(history), loc="left", fontsize=10, color=GREY, pad=10)
    _name(axes, marks)
    _token_axis(axes, history)


def _draw_heads(axes: Axes, history: History, window: int) -> list[Mark]:
    """The losses of the heads, where the loss is a sum of several."""
    marks = []
    for name, colour in zip(history.heads if len(history.heads) > 1 else (), EXTRA, strict=False):
        steps, values = history.column(name)
        smooth = smoothed(values, window)
        axes.plot(steps, smooth, color=colour, linewidth=1.4, label=f"train, {name} alone")
        marks += [Mark(smooth[-1], name, colour)] if len(values) else []
    return marks


def _draw_evaluations(axes: Axes, history: History) -> list[Mark]:
    marks = []
    for split, colour in zip(dict.fromkeys(line["split"] for line in history.evaluations), cycle([ORANGE, *EXTRA[::-1]])):
        steps, values = _points([line for line in history.evaluations if line["split"] == split], "loss")
        if len(values):
            axes.plot(steps, values, "o-", color=colour, markersize=5, linewidth=1.2, label=split, zorder=3, clip_on=False)
            marks.append(Mark(values[-1], split.rpartition("/")[2], colour))
    return marks


def _draw_norm(axes: Axes, history: History) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    steps, values = history.column("grad_norm")
    steps, values = steps[values > 0], values[values > 0]
    axes.plot(steps, values, color=GREY, linewidth=0.9)
    axes.set_ylabel("gradient\nnorm (log)")
    axes.set_yscale("log")
    if len(values):
        room = 1.5 if values.max() > 5 * values.min() else 3.5  # a narrow range would have no tick
        low, high = values.min() / room, values.max() * room
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _name(axes: Axes, marks: list[Mark]) -> None:
    """The marks' values outside the right edge, pushed apart so that none covers another."""
    low, high = axes.get_ylim()
    marks = sorted(marks, key=lambda mark: mark.value)
    heights = _spread([(mark.value - low) / (high - low) for mark in marks], 0.055)
    for mark, height in zip(marks, heights, strict=True):
        axes.annotate(
            f"{mark.text} {mark.value:.3f}",
            xy=(1, (mark.value - low) / (high - low)),
            xytext=(1.025, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=mark.colour,
            fontsize=10,
            fontweight="bold",
            arrowprops={
                "arrowstyle": "-",
                "color": mark.colour,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def _token_axis(axes: Axes, history: History) -> None:
    from matplotlib.ticker import EngFormatter

    scale = history.tokens_per_step()

    def tokens(step: Any) -> Any:
        return step * scale

    def step(tokens: Any) -> Any:
        return tokens / scale

    if scale:
        top = axes.secondary_xaxis("top", functions=(tokens, step))
        top.xaxis.set_major_formatter(EngFormatter(sep=""))
        top.set_xlabel("tokens", color=GREY)
        top.tick_params(colors=GREY)
        top.spines["top"].set_color("#c8ccd2")


def plain(axes: Axes) -> None:
    """A light grid, and no frame."""
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c8ccd2")


def _facts(history: History) -> str:
    last, (_, speed) = history.train[-1], history.column("tokens_per_second")
    facts = [f"{last['step']:,} steps", f"{last.get('tokens', 0):,} tokens"]
    facts += [f"{np.median(speed):,.0f} tokens/s (median)"] if len(speed) else []
    facts += [f"{last['skipped_steps']} steps skipped"] if last.get("skipped_steps") else []
    return ", ".join(facts)


def _limits(values: np.ndarray, others: Sequence[float]) -> tuple[float, float]:
    """All that matters: not the few spikes that would press everything else to the floor."""
    low = min(values.min(), *others)
    high = max(values[0], np.percentile(values, 99.5), *others)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """A centred mean over `window` points, of those that there are at the ends."""
    if not len(values):
        return values
    count = np.convolve(np.ones(len(values)), np.ones(window), "same")
    return np.convolve(values, np.ones(window), "same") / count


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved up, then down, until neighbours are a gap apart and none is above the top."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], placed[i + 1] - gap if i + 1 < len(placed) else 1.0)
    return placed


def _heads(line: Mapping[str, Any]) -> tuple[str, ...]:
    """The names between the loss and the gradient norm: where the trainer writes them."""
    names = list(line)
    if "loss" not in names or "grad_norm" not in names:
        return ()
    return tuple(names[names.index("loss") + 1 : names.index("grad_norm")])


def _points(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], float(line[key])) for line in lines if line.get(key) is not None]
    found = np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=float).reshape(-1, 2)
    return found[:, 0], found[:, 1]
