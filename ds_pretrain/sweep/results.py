"""What came of a sweep: its cells as a live table, and as one tidy table for fits and plots (parquet and CSV)."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.table import Table

from ds_pretrain.core.files import whole
from ds_pretrain.evaluation.plots import History
from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.sweep.cells import State, Status, state
from ds_pretrain.sweep.scores import Asked, figures
from ds_pretrain.sweep.spec import Cell, Spec, parameters

COLOURS: dict[Status, str] = {
    "finished": "green",
    "failed": "bold red",
    "running": "cyan",
    "stopped": "yellow",
    "waiting": "dim",
}
REASON = 240
"""Characters of a reason in the table."""
SCORES = ("loss", "tokens_scored", "perplexity", "word_perplexity", "bits_per_byte", "accuracy")
"""What is kept of the last evaluation."""
OWN = ("run", "seed", "objective", "tokens", "flops", "model_flops")
"""Axes that have columns of their own, with what was reached."""
LATEST = 0.05
"""The share of a run's steps at its end that its training loss is a mean of."""


def states(spec: Spec) -> dict[str, State]:
    """How far every cell is."""
    return {cell.name: state(cell) for cell in spec.cells}


def summary(found: dict[str, State]) -> str:
    """The cells in one line."""
    counts = Counter(each.status for each in found.values())
    told = ", ".join(f"{counts[status]} {status}" for status in COLOURS if counts[status])
    return f"{len(found)} cells: {told}"


def table(spec: Spec, found: dict[str, State], only: Collection[Status] = COLOURS) -> Table:
    """The cells, or those of some states, with what they have reached."""
    shown = Table(
        "", "cell", "state", "step", "of", "training loss", title=f"{spec.output}, {summary(found)}", title_justify="left"
    )
    for number, cell in enumerate(spec.cells):
        at = found[cell.name]
        if at.status in only:
            loss = "" if at.loss is None else f"{at.loss:.4f}"
            steps = f"{cell.config.train.max_steps:,}"
            shown.add_row(str(number), cell.name, f"[{COLOURS[at.status]}]{at.status}[/]", f"{at.step:,}", steps, loss)
    return shown


def failures(found: dict[str, State]) -> list[str]:
    """Why cells failed, a line each."""
    return [f"{name}: {' '.join(at.reason.split())[:REASON]}" for name, at in found.items() if at.status == "failed"]


def rows(spec: Spec) -> list[dict[str, Any]]:
    """A row for each cell, as `collect` writes them."""
    return [_row(cell, state(cell), spec.asked) for cell in spec.cells]


def collect(spec: Spec) -> tuple[Path, Path]:
    """Write cells.csv and cells.parquet, a row for each cell, and curves.csv, a row for each evaluation; the first and last."""
    import pyarrow.csv
    import pyarrow.parquet

    found = rows(spec)
    columns = list(dict.fromkeys(key for row in found for key in row))
    cells, curves = spec.folder / "cells.csv", spec.folder / "curves.csv"
    spec.folder.mkdir(parents=True, exist_ok=True)
    _write(cells, columns, found)
    with whole(cells.with_suffix(".parquet")) as file:
        pyarrow.parquet.write_table(pyarrow.csv.read_csv(cells), file)
    points = [point for cell, row in zip(spec.cells, found, strict=True) for point in _points(cell, row)]
    _write(curves, list(dict.fromkeys(key for point in points for key in point)), points)
    return cells, curves


def _row(cell: Cell, at: State, asked: list[Asked]) -> dict[str, Any]:
    """A cell: what it is, what it cost, what it reached. run: its name; run_file: where that varies; parameters: N without
    embeddings; flops: 6 N tokens; model_flops: with its masks and scored positions counted; loss_tokens: targets that the
    losses were sums over; loss: of the validation split at the end, in nats per target, a mean over tokens_scored of them;
    NAME/figure: of the sweep's scores."""
    config = cell.config
    size = parameters(config)
    row: dict[str, Any] = {
        "run": cell.name,
        "status": at.status,
        **({"run_file": cell.run} if "run" in cell.labels else {}),
        **{axis: label for axis, label in cell.labels.items() if axis not in OWN},
        "objective": cell.labels.get("objective", config.objective["name"]),
        "seed": config.seed,
        "parameters": size,
        "steps": at.step,
    }
    if at.step:
        row |= _reached(cell, size) | figures(cell.folder, at.step, asked)
    return {**row, "ranks": cell.ranks, "reason": " ".join(at.reason.split())}


def _reached(cell: Cell, size: int) -> dict[str, Any]:
    import yaml

    history = History.read(cell.folder / "metrics.jsonl")
    model = ModelConfig.model_validate(yaml.safe_load((cell.folder / "run.yaml").read_text(encoding="utf-8"))["model"])
    last, count = history.train[-1], len(history.train)
    latest = [float(line["loss"]) for line in history.train[-max(1, round(LATEST * count)) :]]
    evaluated: dict[str, Any] = next((line for line in reversed(history.evaluations) if line["split"] == "validation"), {})
    scores = {key: value for key, value in evaluated.items() if key in SCORES}
    return {
        "parameters_total": sum(map(math.prod, parameter_shapes(model, cell.config.make_objective()).values())),
        "tokens": last["tokens"],
        "loss_tokens": _mean(history, "target_tokens") * last["step"],
        "flops": 6.0 * size * last["tokens"],
        "model_flops": _mean(history, "flops") * last["step"] or None,
        "train_loss": sum(latest) / len(latest),
        **scores,
        "tokens_per_second": sorted(line["tokens_per_second"] for line in history.train)[count // 2],
    }


def _mean(history: History, key: str) -> float:
    """Of a metric of training over the steps that were logged; 0 where there is none."""
    values = history.column(key)[1]
    return float(values.mean()) if len(values) else 0.0


def _points(cell: Cell, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of a cell on its way, without that before its first step: there is no compute to hold it against."""
    if not row["steps"]:
        return []
    history = History.read(cell.folder / "metrics.jsonl")
    known = {key: row[key] for key in ("run", "status", "objective", "seed", "parameters", "parameters_total")}
    return [
        {
            **known,
            "step": line["step"],
            "tokens": line["tokens"],
            "flops": 6.0 * row["parameters"] * line["tokens"],
            "loss": line["loss"],
        }
        for line in history.evaluations
        if line["split"] == "validation" and line["step"]
    ]


def _write(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole(path) as file:
        file.write(text.getvalue().encode())
