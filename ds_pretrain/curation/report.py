"""What a chain of steps did, on one page: how much each took away and why, with examples and pictures.

`report.md` is for people, `report.json` holds the reports of all steps as they are; both are made from the step folders and the
manifest of the stores alone, so they can be made again at any time.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_pretrain.curation.documents import SHIFT, Dropped, Folder, Row, part_name, read_part
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
    return write_page(steps, out)


def write_page(steps: Steps, out: Path) -> Path:
    """`report.md` and pictures alone, as in the folder of a single step, which has its own `report.json`."""
    reports = {name: folder.report for name, folder in steps}
    pictures = [_draw_amounts(reports, out / "report_amounts.png")] if len(steps) > 1 else []
    pictures += [_draw_near(each, out / f"report_{name}.png") for name, each in reports.items() if "estimate_and_truth" in each]
    sections = [_table(reports), *(f"![]({picture.name})" for picture in pictures)]
    sections += [_section(name, folder) for name, folder in steps]
    if (made := out / "data" / "manifest.json").exists():
        sections.append(_stores(json.loads(made.read_bytes())))
    page = out / "report.md"
    page.write_text("# Documents, step by step\n\n" + "\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def rows(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each step: what is left and what went, with the most frequent reason."""
    found, before = list[tuple[str, ...]](), 0
    for name, each in reports.items():
        gone, kept = sum(each["dropped"].values()), each["documents"]
        reason = next(iter(each["dropped"].items()), ("", 0))
        most = f"{reason[0]} {reason[1]:,}" if gone else ""
        text = _share(before - each["bytes"], before)
        found.append((name, f"{kept:,}", f"{each['bytes'] / 1e6:,.2f}", f"{gone:,}", _share(gone, gone + kept), text, most))
        before = each["bytes"]
    return found


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


COLUMNS = ("step", "documents", "MB", "dropped", "of documents", "of text", "most often")


def _table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    return _lines([COLUMNS, ("---",) + ("---:",) * 5 + ("---",), *rows(reports)])


def _lines(cells: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


COUNTS = {
    "quarantined": "records that could not be read, by reason (quarantine/)", "dropped": "documents dropped, by reason",
    "lines": "lines removed, by reason", "languages": "documents by language", "tiers": "documents by tier",
    "clusters": "groups of copies, by their size",
}  # fmt: skip
NUMBERS = {
    "benchmark_ngrams": "n-grams of the benchmark", "benchmark_too_short": "texts of the benchmark too short to be found",
    "candidates": "pairs compared", "passed": "pairs that pass", "pairs": "pairs that reach the threshold",
    "cut": "passages cut",
}  # fmt: skip
TABLES = {"would_drop": "documents that other thresholds would drop", "bits_per_byte": "bits per byte, by share of documents"}


def _section(name: str, folder: Folder) -> str:
    report = folder.report
    parts = [f"## {name}", ", ".join(f"{key} {_said(value)}" for key, value in _asked(report["request"]["asked"]).items())]
    parts += [f"licence of {source}: {text}" for source, text in report.get("licences", {}).items()]
    if broken := report.get("broken"):
        parts.append(_rules(broken, report["dropped"]))
    for what, told in COUNTS.items():
        if (counts := report.get(what)) and not (broken and what == "dropped"):
            listed = counts.items() if what == "clusters" else _frequent(counts)
            parts.append(f"**{told}**: " + ", ".join(f"{key}: {count:,}" for key, count in listed))
    parts += [f"**{told}**: {report[what]:,}" for what, told in NUMBERS.items() if what in report]
    parts += [f"**{told}**\n\n{_grid(report[what])}" for what, told in TABLES.items() if report.get(what)]
    parts += report.get("notes", [])
    parts += [f"- cut {times:,} x `{_head(text)}`" for text, times in report.get("passages", [])[:EXAMPLES]]
    parts += [f"- cosine {cosine} `{_head(a)}`, `{_head(b)}`" for cosine, a, b in report.get("examples", [])[:EXAMPLES]]
    parts += [_example(folder, each) for found in _examples(folder.dropped()).values() for each in found]
    return "\n\n".join(filter(None, parts))


def _stores(manifest: Mapping[str, Any]) -> str:
    """What the chain ends in."""
    columns = ("documents", "tokens", "bytes", "words")
    body = [(name, *(f"{split[key]:,}" for key in columns)) for name, split in manifest["splits"].items()]
    told = f"tokenizer of {manifest['tokenizer']['size']:,} ids, stores in `data`"
    return f"## store\n\n{told}\n\n{_lines([('split', *columns), ('---', *['---:'] * len(columns)), *body])}"


def _asked(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked of a step, with sources and benchmarks by their names alone."""
    told = dict(asked)
    if files := told.pop("files", None):
        named = Counter(str(each[-1]) for each in files)
        told = {"sources": [f"{name} ({count:,} files)" if count > 1 else name for name, count in named.items()], **told}
    return told | ({"against": list(told["against"])} if "against" in told else {})


def _frequent(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _rules(broken: Mapping[str, int], dropped: Mapping[str, int]) -> str:
    """Every rule that some document breaks; a document is dropped for the first that it does."""
    body = [(rule, f"{count:,}", f"{dropped.get(rule, 0):,}") for rule, count in _frequent(broken)]
    return _lines([("rule", "documents that break it", "dropped for it"), ("---", "---:", "---:"), *body])


def _said(value: Any) -> str:
    """A setting in words: of rule sets their names, of settings each with its value."""
    if isinstance(value, list):
        return " ".join(str(each[0]) if isinstance(each, list) else str(each) for each in value) or "none"
    if isinstance(value, Mapping):
        return " ".join(f"{key} {each}" for key, each in value.items())
    return "none" if value is None else str(value)


def _grid(told: Mapping[str, Any]) -> str:
    """Numbers as a table; one of tables a line for each."""
    lines = told if all(isinstance(each, Mapping) for each in told.values()) else {"": told}
    heads = list(dict.fromkeys(key for line in lines.values() for key in line))
    body = [(name, *(f"{line.get(head, '')}" for head in heads)) for name, line in lines.items()]
    return _lines([("", *heads), ("---", *["---:"] * len(heads)), *body])


def _examples(dropped: Iterable[Dropped]) -> dict[str, list[Dropped]]:
    found: dict[str, list[Dropped]] = defaultdict(list)
    for each in islice(dropped, LOOKED_AT):
        if len(found[each.reason]) < EXAMPLES:
            found[each.reason].append(each)
    return dict(sorted(found.items()))


def _example(folder: Folder, each: Dropped) -> str:
    """A dropped document and, of a copy, the one that was kept instead."""
    kept = _kept(folder, each.of) if each.of >= 0 else None
    instead = f", kept is `{_head(kept.text)}` ({kept.file}:{kept.line})" if kept else ""
    return f"- *{each.reason}* `{_head(each.row.text)}` ({each.row.file}:{each.row.line}){instead}"


def _kept(folder: Folder, number: int) -> Row | None:
    part = folder.path / "kept" / part_name(number >> SHIFT)
    return next((row for row in read_part(part) if row.number == number), None)


def _head(text: str) -> str:
    return " ".join(text.split())[:HEAD].replace("`", "'")


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
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= left.max()])  # what is beyond is room for words
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
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(9)
