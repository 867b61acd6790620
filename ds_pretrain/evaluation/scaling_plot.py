"""A report on scaling laws as pictures: one sheet per objective, six panels.

Loss against size and against compute with the fitted law, iso-FLOP valleys with their minima, residuals, and N_opt and D_opt
against C with 95% bands. Colours of sizes, tokens and budgets are scales rather than labels, because dozens of runs leave no
room for names; the price is that a single run is found by its place only.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_pretrain.evaluation.plots import BLUE, DPI, EXTRA, GREY, ORANGE, plain
from ds_pretrain.evaluation.scaling import Envelope, Fit, Group, IsoFlop, Report, power, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"chinchilla_1": EXTRA[0], "chinchilla_2": EXTRA[1], "chinchilla_3": BLUE, "kaplan_nd": ORANGE}
CURVES = 6
"""Fitted curves in a panel, at most."""


def draw(report: Report, folder: str | Path) -> list[Path]:
    """Write `scaling-OBJECTIVE.png` for every group and say where."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for group in report.groups:
        paths.append(Path(folder) / f"scaling-{re.sub('[^A-Za-z0-9_.-]+', '_', group.name)}.png")
        sheet(report, group).savefig(paths[-1], dpi=DPI)
    return paths


def sheet(report: Report, group: Group) -> Figure:
    """The six panels of a group."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(17, 10), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1, wspace=0.04), facecolor="white")
    panels = figure.subplots(2, 3)
    facts = f"{group.points.runs} runs. {report.size}. D: tokens. {report.units(group)}"
    figure.suptitle(f"Scaling laws of {group.name}\n", x=0.012, ha="left", fontsize=15, fontweight="bold")
    figure.text(0.012, 0.948, facts, fontsize=10, color=GREY)
    _loss_by_size(figure, panels[0, 0], group)
    _loss_by_compute(figure, panels[0, 1], group)
    _valleys(figure, panels[0, 2], group)
    _residuals(panels[1, 0], group)
    _allocation(panels[1, 1], group, "N")
    _allocation(panels[1, 2], group, "D")
    for axes in panels.flat:
        plain(axes)
        axes.tick_params(labelsize=9)
    return figure


def _law(group: Group) -> list[Fit]:
    """The law of N and D that curves are drawn of, if there is one: that of approach 3, else Kaplan's."""
    return [fit for fit in map(group.fit, ("chinchilla_3", "kaplan_nd")) if not fit.problem][:1]


def _loss_by_size(figure: Figure, axes: Axes, group: Group) -> None:
    points, alone = group.points.ends(), group.fit("kaplan_n")
    colour = _scale(figure, axes, points.d, "D (tokens)")
    axes.scatter(points.n, points.loss, c=colour(points.d), s=22, zorder=3, linewidths=0)
    n = _spaced(points.n)
    for law, (i, d) in product(_law(group), enumerate(_some(points.d))):
        label = f"{law.form.name}, tokens by colour" if i == 0 else None
        axes.plot(n, _losses(law, n, np.full_like(n, d)), color=colour(d), linewidth=1.3, label=label)
    if not alone.problem:
        n = _spaced(alone.form.points.n)
        axes.plot(n, _losses(alone, n, n), color=GREY, linestyle=(0, (5, 3)), linewidth=1.3, label=alone.form.title)
    _legend(axes)
    _titled(axes, "Loss against size", "N (parameters)", "loss (nats per target)")
    _logs(axes, points.n, points.loss)


def _loss_by_compute(figure: Figure, axes: Axes, group: Group) -> None:
    points, alone = group.points, group.fit("kaplan_d")
    colour = _scale(figure, axes, points.n, "N (parameters)")
    axes.scatter(points.c, points.loss, c=colour(points.n), s=22 if len(points.c) < 300 else 6, zorder=3, linewidths=0)
    for law, (i, n) in product(_law(group), enumerate(_some(points.n))):
        near = np.abs(np.log(points.n / n)) < 0.05
        d = _spaced(points.d[near]) if near.sum() > 1 else _spaced(points.d)
        label = f"{law.form.name}, sizes by colour" if i == 0 else None
        axes.plot(points.k * n * d, _losses(law, np.full_like(d, n), d), color=colour(n), linewidth=1.3, label=label)
    for law in _law(group):
        c = _spaced(points.c)
        best = law.form.best_loss(law.theta, c)
        axes.plot(c, best, color="black", linestyle=(0, (1, 1.2)), linewidth=1.6, label="at its optimal N and D")
    if not alone.problem:
        d = _spaced(alone.form.points.d)
        c = points.k * np.median(alone.form.points.n) * d
        axes.plot(c, _losses(alone, d, d), color=GREY, linestyle=(0, (5, 3)), linewidth=1.3, label=alone.form.title)
    _legend(axes)
    _titled(axes, "Loss against compute", "C (FLOPs)", "loss (nats per target)")
    _logs(axes, points.c, points.loss, flops=True)


def _valleys(figure: Figure, axes: Axes, group: Group) -> None:
    fit = group.fit("chinchilla_2")
    form = fit.form
    assert isinstance(form, IsoFlop)
    _titled(axes, "Iso-FLOP profiles (approach 2) and their minima", "N (parameters)", "loss (nats per target)")
    valleys = form.valleys(np.ones(form.points.runs))
    if not valleys:
        _say(axes, f"No profiles: {fit.problem}.")
        return
    colour = _scale(figure, axes, np.array([valley.c for valley in valleys]), "C (FLOPs)", flops=True)
    for valley in valleys:
        n = np.linspace(valley.n.min(), valley.n.max(), 100)
        axes.scatter(np.exp(valley.n), valley.loss, color=colour(valley.c), s=22, linewidths=0, zorder=3)
        axes.plot(np.exp(n), np.polyval(valley.parabola, n), color=colour(valley.c), linewidth=1.3)
        if not valley.problem:
            low = np.polyval(valley.parabola, valley.best)
            axes.scatter(np.exp(valley.best), low, color=ORANGE, marker="v", s=60, edgecolors="white", zorder=4)
    if fit.problem:
        axes.text(
            0.5,
            0.98,
            textwrap.fill(f"no law through them: {fit.problem}", 60),
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=8,
            color=ORANGE,
        )
    everything = [np.concatenate([getattr(valley, name) for valley in valleys]) for name in ("n", "loss")]
    _logs(axes, np.exp(everything[0]), everything[1])


def _residuals(axes: Axes, group: Group) -> None:
    _titled(axes, "Residuals", "measured loss (nats per target)", "fitted / measured - 1 (%)")
    laws = [fit for fit in (group.fit("chinchilla_3"), group.fit("kaplan_nd")) if not fit.problem]
    laws = laws or [fit for fit in (group.fit("kaplan_n"), group.fit("kaplan_d")) if not fit.problem]
    for fit, marker in zip(laws, "os", strict=False):
        points, colour = fit.form.points, COLOURS.get(fit.form.key, GREY)
        label = f"{fit.form.title}, rms {fit.rms:.2%}"
        off = 100 * fit.form.relative(fit.theta, points)
        axes.scatter(points.loss, off, s=22, color=colour, marker=marker, alpha=0.75, linewidths=0, label=label)
    if not laws:
        _say(axes, "No law of the loss could be fitted.")
        return
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_ylim(top=axes.get_ylim()[1] + 0.15 * np.ptp(axes.get_ylim()))
    _legend(axes, "upper left")


def _allocation(axes: Axes, group: Group, letter: str) -> None:
    words = "parameters" if letter == "N" else "tokens"
    _titled(axes, f"Compute-optimal {letter} with 95% bands", "C (FLOPs)", f"{letter}_opt ({words})")
    points, budgets = group.points, [one.c for one in group.optima]
    c = _spaced(np.array([*points.c, *budgets]))
    fits = [fit for fit in group.fits if fit.form.allocates and not fit.problem]
    for fit in fits:
        _band(axes, fit, c, letter)
    if not fits:
        _say(axes, "No form tells how to spend a budget: see the table for what each takes.")
        return
    for fit in fits:
        _found(axes, fit, letter)
    axes.axvspan(points.c.min(), points.c.max(), color="#e9edf1", zorder=0, linewidth=0, label="compute of the runs")
    for budget in sorted(set(budgets)):
        axes.axvline(budget, color=GREY, linewidth=1, linestyle=(0, (2, 2)))
    _legend(axes, "upper left")
    mean = np.concatenate([_opt(fit, fit.theta, c, letter) for fit in fits])
    _logs(axes, c, None, flops=True)
    axes.set(yscale="log", ylim=(mean.min() / 3, mean.max() * 8))
    _thousands(axes.yaxis, mean)


def _band(axes: Axes, fit: Fit, c: np.ndarray, letter: str) -> None:
    colour = COLOURS[fit.form.key]
    low, high = np.percentile(_opt(fit, fit.draws[:, None], c, letter), [2.5, 97.5], axis=0)
    a = fit.values["a" if letter == "N" else "b"].value
    axes.fill_between(c, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(c, _opt(fit, fit.theta, c, letter), color=colour, linewidth=1.6, label=f"{fit.form.name}: C^{a:.3f}")


def _found(axes: Axes, fit: Fit, letter: str) -> None:
    """The optima that a line goes through."""
    form = fit.form
    if isinstance(form, Envelope | IsoFlop):
        c, n = (np.exp(x) for x in form.optima(np.ones(form.points.runs)))
        marker = "v" if isinstance(form, IsoFlop) else "o"
        y = n if letter == "N" else c / form.points.k / n
        axes.scatter(c, y, color=COLOURS[form.key], marker=marker, s=28, edgecolors="white", linewidths=0.6, zorder=4)


def _opt(fit: Fit, theta: np.ndarray, c: np.ndarray, letter: str) -> np.ndarray:
    n = fit.form.optimum(theta, c)
    return n if letter == "N" else c / fit.form.points.k / n


def _losses(fit: Fit, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.exp(fit.form.log_loss(fit.theta, n, d))


def _spaced(values: np.ndarray) -> np.ndarray:
    return np.geomspace(values.min(), values.max(), 200)


def _some(values: np.ndarray) -> np.ndarray:
    """A few of the values, spread over them without the outermost."""
    there = np.unique(np.sort(values)[:: max(1, len(values) // 200)])
    inner = np.quantile(values, np.linspace(0.04, 0.96, CURVES), method="nearest")
    return there if len(there) <= CURVES else np.unique(inner)


def _scale(figure: Figure, axes: Axes, values: np.ndarray, label: str, flops: bool = False) -> Any:
    """Colours of values on a log scale that stands beside the panel."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import NullLocator

    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
    low, high = float(values.min()), float(values.max())
    norm = LogNorm(low / 1.1, high * 1.1) if high < 1.2 * low else LogNorm(low, high)
    mappable = ScalarMappable(norm, colours)
    bar = figure.colorbar(mappable, ax=axes, pad=0.015, aspect=35)
    bar.outline.set_visible(False)
    bar.ax.set_title(label, fontsize=8, color=GREY, pad=6)
    ticks = np.geomspace(low, high, 5) if high >= 1.2 * low else np.array([low])
    bar.set_ticks(list(ticks), labels=[(power if flops else short)(x) for x in ticks], fontsize=8)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return mappable.to_rgba


def _titled(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _legend(axes: Axes, place: Any = "best") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc=place, facecolor="white", framealpha=0.85, edgecolor="none")


def _say(axes: Axes, text: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, textwrap.fill(text, 44), transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=10)


def _logs(axes: Axes, x: np.ndarray, loss: np.ndarray | None, flops: bool = False) -> None:
    """Log axes: x with few ticks, the loss with plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.set_xscale("log")
    room = (x.max() / x.min()) ** 0.04 if x.max() > x.min() else 1.5
    axes.set_xlim(x.min() / room, x.max() * room)
    _thousands(axes.xaxis, x, flops)
    if loss is not None:
        low, high = loss.min(), loss.max()
        axes.set(yscale="log", ylim=(low - 0.06 * (high - low) - 0.01, high + 0.06 * (high - low) + 0.01))
        axes.yaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _thousands(axis: Any, values: Sequence[float] | np.ndarray, flops: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = np.log10(np.max(values) / np.min(values))
    subs = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 3.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value) if flops else short(value)))
