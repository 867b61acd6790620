"""Rule sets put to every document: what breaks one is dropped, what stays can be labelled with language and tier.

A document counts under the first rule that it breaks, so that the drops add up to the documents; the report also says how many
break each rule at all, and how many lines were taken out by which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ds_pretrain.curation.documents import Dropped, Folder, Row, Work, number_of, read_part, step, write_part
from ds_pretrain.curation.language import identify
from ds_pretrain.curation.quality import Rules, screen, tier
from ds_pretrain.curation.workers import Workers

Label = Literal["language", "tier"]
COUNTED = ("broken", "lines", "languages", "tiers")


def screening(before: Folder, out: Path, workers: Workers, rules: Sequence[Rules] = (), label: Sequence[Label] = ()) -> Folder:
    """Documents that break none of these rules. label: what is written down of those that stay."""
    asked = {"rules": [[type(each).__name__, asdict(each)] for each in rules], "label": list(label)}  # type: ignore[call-overload]

    def do(work: Work) -> dict[str, Any]:
        work.write("screen", partial(_screen, work.folder, tuple(rules), tuple(label)))
        told = work.told()
        return {what: dict(sum((Counter(each[what]) for each in told), Counter())) for what in COUNTED}

    return step("screen", out, before, asked, workers, do)


def _screen(folder: Path, rules: Sequence[Rules], label: Sequence[Label], part: Path) -> None:
    counts: dict[str, Counter[str]] = {what: Counter() for what in COUNTED}
    rows = (_judged(row, rules, label, counts) for row in read_part(part))
    write_part(folder, number_of(part), rows, lambda: counts)


def _judged(row: Row, rules: Sequence[Rules], label: Sequence[Label], counts: dict[str, Counter[str]]) -> Row | Dropped:
    verdict = screen(row.text, rules)
    counts["broken"].update(verdict.reasons)
    counts["lines"].update(verdict.removed)
    if verdict.reasons:
        return Dropped(row, verdict.reasons[0])
    kept = replace(row, text=verdict.text)
    if "language" in label:
        kept = replace(kept, language=identify([kept.text])[0][0])
    if "tier" in label:
        kept = replace(kept, tier=tier(kept.text, ()))
    counts["languages"][kept.language] += "language" in label
    counts["tiers"][kept.tier] += "tier" in label
    return kept
