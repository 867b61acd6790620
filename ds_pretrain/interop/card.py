"""The card of a model that is handed out: what it was trained for, on what, and how well it did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ds_pretrain.config import RunConfig
from ds_pretrain.core.files import json_lines
from ds_pretrain.interop.rules import Side
from ds_pretrain.objectives import Objective
from ds_pretrain.training.checkpoint import Snapshot

TASKS = {"causal": "text-generation", "full": "fill-mask"}
"""By what a model of words reads, what hubs call it."""


def card(output: Path, config: RunConfig, snapshot: Snapshot, sides: Mapping[str, Side], precision: str) -> str:
    """Markdown with the header that model hubs read."""
    facts, objective = snapshot.manifest, config.make_objective()
    lines = ["---", "library_name: transformers", *_task(objective), "---", f"# {output.name}", ""]
    lines += [
        f"Trained with ds_pretrain for `{objective.name}`: {facts.get('objective_fields', 'weights as they were imported')}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _rows(config, facts, sides, precision)),
    ]
    if scores := _scores(output / "metrics.jsonl", facts["step"]):
        lines += [
            "",
            "## Last evaluation",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in scores.items()),
        ]
    lines += ["", "## How to open it", "", "```python", *_opening(sides), "```", ""]
    lines += ["## The run", "", "```yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip(), "```", ""]
    return "\n".join(lines)


def _task(objective: Objective) -> list[str]:
    """What hubs call it; nothing where they have no word for it, as for a discriminator or the order of sentences."""
    if any(head.classes == 0 for head in objective.heads):
        return ["pipeline_tag: sentence-similarity"]
    speaks = objective.generator is None and any(head.classes is None for head in objective.heads)
    return [f"pipeline_tag: {TASKS[objective.kind]}"] * speaks


def _rows(config: RunConfig, facts: Mapping[str, Any], sides: Mapping[str, Side], precision: str) -> list[tuple[str, Any]]:
    return [
        ("architecture", ", ".join(side.architecture for side in sides.values())),
        ("precision of the file", precision),
        *(_training(config, facts) if "imported" not in facts else _import(facts)),
    ]


def _import(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    ids = facts.get("origin", {}).get("ids", facts["model"]["vocab"])
    grown = ids - facts["resized"]["from"] if "resized" in facts else 0
    made = [("made since", f"{grown:,} ids, whose rows are not trained")] if grown else []
    return [("imported from", "transformers, and not trained since"), *made]


def _training(config: RunConfig, facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("step", f"{facts['step']:,}"),
        ("tokens read", f"{facts.get('tokens', 0):,}"),
        ("data", f"{config.data.path}, digest {facts.get('data')}"),
        ("layout it was trained under", facts.get("layout", "none")),
        ("began from", config.init or "fresh weights"),
    ]


def _scores(metrics: Path, step: int) -> dict[str, Any]:
    """The last evaluation up to a step, of the run's own validation split."""
    found: dict[str, Any] = {}
    for line in json_lines(metrics, "step") if metrics.is_file() else ():
        found = line if line.get("split") == "validation" and line["step"] <= step else found
    return {name: value for name, value in found.items() if isinstance(value, int | float | str)}


def _opening(sides: Mapping[str, Side]) -> list[str]:
    names = [side.architecture for side in sides.values()]
    return [
        f"from transformers import {', '.join(names)}",
        *(f'model = {side.architecture}.from_pretrained("{place or "."}")' for place, side in sides.items()),
    ]
