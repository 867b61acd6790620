"""A checkpoint of any layout continues under any other: measured, pair by pair, against plain PyTorch.

Each source trains for the first half of the steps and saves; each target takes every source's checkpoint and cursor and
trains the other half. Its losses are those of one process that was never interrupted, or the pair fails.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.table import Table

from ds_pretrain.data.dataset import Cursor
from ds_pretrain.evaluation import parity
from ds_pretrain.evaluation.parity import LIMITS, Case
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn

OBJECTIVE = "mlm"
"""Its embedding is tied, so its checkpoint has what two stages share."""
_PLANS = [
    (ParallelPlan(), 1, 0),
    (ParallelPlan(), 2, 1),
    (ParallelPlan(), 4, 3),
    (ParallelPlan(tensor=2, sequence=True), 2, 2),
    (ParallelPlan(pipeline=2), 2, 1),
    (ParallelPlan(tensor=2, pipeline=2), 4, 1),
    (ParallelPlan(tensor=2), 4, 3),
    (ParallelPlan(context=2), 2, 3),
    (ParallelPlan(tensor=2, context=2), 4, 2),
]
CASES = [Case(OBJECTIVE, plan, world, stage, accumulation=2) for plan, world, stage in _PLANS]
CASES += [Case(OBJECTIVE, ParallelPlan(), 2, 2, accumulation=2, precision="bf16")]


@dataclass(frozen=True)
class Resumed:
    """How far the losses of the second half are from those of an uninterrupted run, relative, at most."""

    source: Case
    target: Case
    loss_error: float

    @property
    def limit(self) -> float:
        """Of both precisions the wider."""
        return max(LIMITS[case.precision][0] for case in (self.source, self.target))

    @property
    def passed(self) -> bool:
        return self.loss_error <= self.limit


def run(steps: int = 50, cases: Sequence[Case] = tuple(CASES)) -> list[Resumed]:
    """Every ordered pair of layouts, on ranks started here."""
    worlds = sorted({case.world for case in cases})
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            spawn(world, _save, [case for case in cases if case.world == world], Path(folder), steps // 2)
        return [
            resumed
            for world in worlds
            for resumed in spawn(world, _go_on, cases, [c for c in cases if c.world == world], Path(folder), steps)
        ]


def _folder(folder: Path, case: Case) -> Path:
    return folder / f"{case.layout}-{case.world}-{case.stage}-{case.precision}"


def _save(cases: Sequence[Case], folder: Path, steps: int) -> None:
    """On the ranks: train each case and save it."""
    from ds_pretrain.training import checkpoint

    for case in cases:
        engine = parity.engine_for(case)
        with parity.loader_for(case, engine.mesh) as loader:
            for number in range(1, steps + 1):
                step = next(loader)
                engine.step(step.batches, number, parity.LR)
        facts = {"model": engine.build.model.model_dump(), "cursor": list(step.cursor)}
        checkpoint.save(_folder(folder, case), engine, steps, facts)


def _go_on(sources: Sequence[Case], targets: Sequence[Case], folder: Path, steps: int) -> list[Resumed]:
    """On the ranks: each target from every source."""
    from ds_pretrain.training import checkpoint

    truth, _ = parity.expected(OBJECTIVE, targets[0].rows, steps)
    found = []
    for target, source in parity.tracked(list(product(targets, sources)), "resume"):
        engine = parity.engine_for(target)
        newest = checkpoint.newest(_folder(folder, source), engine.mesh)
        assert newest is not None
        snapshot = checkpoint.Snapshot(newest)
        checkpoint.load(snapshot, engine)
        first, cursor = snapshot.manifest["step"], Cursor(*snapshot.manifest["cursor"])
        with parity.loader_for(target, engine.mesh, cursor) as loader:
            losses = [engine.step(next(loader).batches, n, parity.LR).loss for n in range(first + 1, steps + 1)]
        error = max(abs(a - b) / abs(b) for a, b in zip(losses, truth[first:], strict=True))
        found.append(Resumed(source, target, error))
    return found


def table(results: Sequence[Resumed], steps: int) -> Table:
    """From the layouts on the left to those on top: the largest relative error of a loss."""
    names = {
        case: f"{case.layout} ZeRO-{case.stage}" + " bf16" * (case.precision == "bf16")
        for r in results
        for case in (r.source, r.target)
    }
    targets = list(dict.fromkeys(r.target for r in results))
    made = Table(
        "saved under", *(f"to {names[t]}" for t in targets), title=f"resume under another layout, {steps} steps in all"
    )
    for source in dict.fromkeys(r.source for r in results):
        row = {r.target: r for r in results if r.source == source}
        made.add_row(names[source], *(_cell(row[t]) for t in targets))
    told = [f"{sum(r.passed for r in results)} of {len(results)} pairs pass"]
    for limit in sorted({r.limit for r in results}):
        worst = max(r.loss_error for r in results if r.limit == limit)
        told.append(f"largest error where {limit:g} is allowed: {worst:.1e}")
    made.caption = "; ".join(told)
    return made


def _cell(result: Resumed) -> str:
    return f"{result.loss_error:.1e}" if result.passed else f"[bold red]{result.loss_error:.1e} FAIL[/]"
