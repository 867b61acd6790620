"""What a chain of steps did, on one page: how much each took away and why, with examples and pictures.

`report.md` is for people, `report.json` holds the reports of all steps as they are; both are made from the step folders alone,
so they can be made again at any time.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_pretrain.curation.documents import Dropped, Folder
from ds_pretrain.curation.minhash import found_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#1f5fa8", "#d9621e", "#5b6470"
EXAMPLES = 3
"""Dropped documents that are shown for each reason."""
LOOKED_AT = 20_000
"""Dropped documents among which examples are looked for."""
HEAD = 160
"""Characters shown of an example."""
Steps = Sequence[tuple[str, Folder]]


def write_report(steps: Steps, out: Path) -> Path:
    """`report.md`, `report.json` and pictures in a folder. steps: names and finished folders, in order."""
    out.mkdir(parents=True, exist_ok=True)
    reports = {name: folder.report for name, folder in steps}
    (out / "report.json").write_text(json.dumps(reports, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = [_draw_amounts(reports, out / "report_amounts.png")]
    pictures += [_draw_near(each, out / f"report_{name}.png") for name, each in reports.items() if "estimate_and_truth" in each]
    sections = [_table(reports), *(f"![]({picture.name})" for picture in pictures)]
    sections += [_section(name, folder) for name, folder in steps]
    page = out / "report.md"
    page.write_text("# Documents, step by step\n\n" + "\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def rows(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each step: what is left and what went, with the most frequent reason."""
    found: list[tuple[str, ...]] = []
    for name, each in reports.items():
        gone, kept = sum(each["dropped"].values()), each["documents"]
        reason = next(iter(each["dropped"].items()), ("", 0))
        share = f"{gone / (gone + kept):.1%}" if gone + kept else "-"
        most = f"{reason[0]} {reason[1]:,}" if gone else ""
        found.append((name, f"{kept:,}", f"{each['bytes'] / 1e6:,.2f}", f"{gone:,}", share, most))
    return found


COLUMNS = ("step", "documents", "MB", "dropped", "share", "most often")


def _table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    return _lines([COLUMNS, ("---",) + ("---:",) * 4 + ("---",), *rows(reports)])


def _lines(cells: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _section(name: str, folder: Folder) -> str:
    report = folder.report
    asked = ", ".join(
        f"{key} {value}" for key, value in report["request"]["asked"].items() if key not in ("sources", "against")
    )
    parts = [f"## {name}\n\n{asked}".rstrip()]
    for what in ("quarantined", "dropped", "broken", "lines", "languages", "tiers", "clusters"):
        if counts := report.get(what):
            parts.append(f"**{what}** " + ", ".join(f"{key} {count:,}" for key, count in counts.items()))
    for what in ("would_drop", "bits_per_byte"):
        if told := report.get(what):
            parts.append(f"**{what}** {json.dumps(told)}")
    for what in ("benchmark_ngrams", "benchmark_too_short", "candidates", "passed", "cut"):
        if what in report:
            parts.append(f"**{what}** {report[what]:,}")
    parts += [f"**{text!r}** cut {times} times" for text, times in report.get("passages", [])[:EXAMPLES]]
    parts += [_example(folder, each) for found in _examples(folder.dropped()).values() for each in found]
    return "\n\n".join(parts)


def _examples(dropped: Iterable[Dropped]) -> dict[str, list[Dropped]]:
    found: dict[str, list[Dropped]] = defaultdict(list)
    for each in islice(dropped, LOOKED_AT):
        if len(found[each.reason]) < EXAMPLES:
            found[each.reason].append(each)
    return dict(sorted(found.items()))


def _example(folder: Folder, each: Dropped) -> str:
    text = " ".join(each.row.text.split())[:HEAD].replace("`", "'")
    where = f"{each.row.file}:{each.row.line}" + (f", copy of document {each.of}" if each.of >= 0 else "")
    return f"- *{each.reason}* `{text}` ({where})"


def _draw_amounts(reports: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Text left after each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(reports) + 1.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    names, left = list(reports), np.array([each["bytes"] / 1e6 for each in reports.values()])
    told = [f"{mb:,.2f} MB, {each['documents']:,} documents" for mb, each in zip(left, reports.values(), strict=True)]
    bars = axes.barh(names, left, color=BLUE, height=0.6)
    axes.bar_label(bars, told, padding=4, fontsize=8, color=GREY)
    axes.set(xlim=(0, max(left.max(), 1e-6) * 1.5), xlabel="text left (MB)")
    axes.invert_yaxis()
    _plain(axes)
    figure.savefig(path)
    return path


def _draw_near(report: Mapping[str, Any], path: Path) -> Path:
    """How near duplicates were found: the S-curve of the bands, and the estimates of similarity beside the truth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    threshold, x = report["request"]["asked"]["threshold"], np.linspace(0, 1, 201)
    left.plot(x, found_by(x, report["bands"], report["rows"]), color=BLUE)
    left.axvline(threshold, color=ORANGE, lw=1)
    left.text(threshold, 0.03, " threshold", color=ORANGE, fontsize=8)
    left.set(
        xlabel="Jaccard similarity", ylabel="probability to be compared", title=f"{report['bands']} bands of {report['rows']}"
    )
    pairs = np.array(report["estimate_and_truth"]).reshape(-1, 2)
    right.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    right.scatter(pairs[:, 1], pairs[:, 0], s=8, color=BLUE, alpha=0.4, lw=0)
    right.axvline(threshold, color=ORANGE, lw=1)
    right.set(xlim=(0, 1), ylim=(0, 1), xlabel="true similarity", ylabel="estimated by signatures",
              title=f"{report['passed']:,} of {report['candidates']:,} pairs pass")  # fmt: skip
    for axes in (left, right):
        _plain(axes)
    figure.savefig(path)
    return path


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(9)
    axes.tick_params(labelsize=8)
