"""`ds-pretrain sweep ...`: many runs from one file."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress

from ds_pretrain.config import find
from ds_pretrain.sweep import cells, results, scores, spec
from ds_pretrain.sweep import report as reports

app = typer.Typer(
    no_args_is_help=True,
    help="Many runs from one file: a grid, or an iso-FLOP ladder of sizes and budgets.\n\n"
    "`status` shows the cells, before and after; `run` trains them here, `submit` as a SLURM array; each goes on where it was "
    "stopped and none runs twice; `collect` makes one table of them, for `scaling fit`; "
    "`score` holds them against other tasks, and `report` is the page of it all.",
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
Sweep = Annotated[
    str, typer.Argument(help="A sweep file, or the name of one in ds_configs/sweeps such as sizes.", metavar="SPEC")
]
Again = Annotated[bool, typer.Option(help="Also the cells that failed.")]
SHORT: set[cells.Status] = {"running", "failed", "stopped"}
"""States of the cells that a live table shows one by one, where there are many."""
MANY = 24
TOLD: set[cells.Status] = {"failed", "finished"}
"""States that are told in a line of their own when a cell reaches them; where there is no live table, running too."""


@app.command()
def run(
    sweep: Sweep,
    at_once: Annotated[int, typer.Option(min=1, help="Cells at a time; each gets its share of the cores or its own GPUs.")] = 1,
    again: Again = False,
) -> None:
    """Train the cells on this machine, so many at a time. Ctrl-C stops each with a checkpoint; the same command goes on."""
    plan = _open(sweep)
    waiting = cells.todo(plan, again)
    cells.check_disk(waiting, at_once)
    if crowded := cells.crowded(plan.ranks, at_once):
        out.print(f"[yellow]warning[/] {crowded}")
    told = {name: at.status for name, at in results.states(plan).items()}
    with Live(console=out, auto_refresh=False, transient=True) as live:

        def show() -> None:
            found = results.states(plan)
            if out.is_terminal:
                live.update(results.table(plan, found, SHORT if len(plan.cells) > MANY else results.COLOURS), refresh=True)
            for name, at in found.items():
                if at.status != told[name] and at.status in (TOLD if out.is_terminal else {*TOLD, "running"}):
                    out.print(f"{name}: {at.status}, step {at.step:,}{f': {escape(at.reason)}' if at.reason else ''}")
                told[name] = at.status

        try:
            cells.run(sweep, waiting, at_once, show)
        except KeyboardInterrupt:
            live.stop()
            out.print(f"stopped, {results.summary(results.states(plan))}; next: ds-pretrain sweep run {sweep}")
            raise typer.Exit(128 + signal.SIGINT) from None
    if _report(plan, sweep):
        raise typer.Exit(1)


@app.command()
def submit(
    sweep: Sweep,
    options: Annotated[list[str] | None, typer.Argument(help="Options of sbatch, after --: -- --time=2:00:00 -p gpu")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 8,
    again: Again = False,
) -> None:
    """Submit the cells that are left as a SLURM array (launchers/sweep.sbatch), a task for each."""
    plan = _open(sweep)
    waiting = cells.todo(plan, again)
    if not waiting:
        out.print(f"{results.summary(results.states(plan))}: nothing to submit")
        return
    out.print(f"{len(waiting)} cells: {cells.submit(plan, waiting, at_once, options or [])}")
    out.print(f"next: ds-pretrain sweep status {sweep}")


@app.command()
def cell(
    sweep: Sweep,
    which: Annotated[str, typer.Argument(help="A cell's name or number, as `sweep status` shows them.")],
) -> None:
    """Train one cell in this process, or on the ranks of this job: what `run` and the SLURM array do."""
    told = cells.train(spec.read(sweep).find(which))
    out.print(told)


@app.command()
def status(sweep: Sweep) -> None:
    """Show the cells, how far each is, and why some failed; of cells that cannot run, what is wrong with them."""
    _report(_open(sweep), sweep)


@app.command()
def collect(sweep: Sweep) -> None:
    """Write one table of all cells, as CSV and parquet, and one of their evaluations on the way."""
    plan = spec.read(sweep)
    table, curves = results.collect(plan)
    out.print(f"{results.summary(results.states(plan))}\n{table} and {table.with_suffix('.parquet').name}, {curves.name}")
    sizes = {spec.parameters(each.config) for each in plan.cells}
    out.print(f"next: {f'ds-pretrain scaling fit {table}' if len(sizes) > 1 else f'ds-pretrain sweep report {sweep}'}")


@app.command()
def score(sweep: Sweep) -> None:
    """Score the finished cells on what the sweep file asks for under `scores`; what was computed before is kept."""
    plan = spec.read(sweep)
    if not plan.asked:
        raise ValueError(f"{sweep} asks for no scores: add some, such as scores: {{works: {{by: probe, texts: FILE}}}}")
    done = [(each, at.step) for each in plan.cells if (at := cells.state(each)).status == "finished"]
    failed: list[str] = []
    with Progress(console=out, transient=True) as bar:
        task = bar.add_task("score", total=len(done))
        for each, step in done:
            bar.update(task, description=f"score {each.name}")
            try:
                scores.score(each.folder, step, plan.asked)
            except (ValueError, OSError) as error:
                failed.append(f"{each.name}: {error}")
            bar.advance(task)
    for line in failed:
        out.print(f"[bold red]not scored[/bold red] {escape(line)}", soft_wrap=True)
    told = f"{len(done) - len(failed)} of {len(plan.cells)} cells are scored"
    out.print(f"{told}; next: ds-pretrain sweep report {sweep}")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    sweep: Sweep,
    folder: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the page; else that of the sweep.")] = None,
) -> None:
    """Write the sweep as one page: why and how, from the head of its file; what came of it, from a conclusions.md of yours in
    the folder; a table; learning curves; scores."""
    plan = spec.read(sweep)
    out.print(reports.write(plan, find(sweep, "sweeps", ".yaml"), folder or plan.folder))


def _open(sweep: str) -> spec.Spec:
    plan = spec.read(sweep)
    plan.check(str(find(sweep, "sweeps", ".yaml")))
    return plan


def _report(plan: spec.Spec, sweep: str) -> bool:
    """Show the cells; whether some have failed."""
    found = results.states(plan)
    out.print(results.table(plan, found))
    failed = results.failures(found)
    for line in failed:
        out.print(f"[bold red]failed[/bold red] {escape(line)}", soft_wrap=True)
    left = sum(at.status in ("waiting", "stopped") for at in found.values())
    if any(at.status == "running" for at in found.values()) and not left:
        out.print(f"next: ds-pretrain sweep status {sweep}")
        return bool(failed)
    ways = [f"ds-pretrain sweep run {sweep}"] * bool(left)
    ways += [f"ds-pretrain sweep run {sweep} --again   # those that failed too"] * bool(failed)
    for way in ways or [f"ds-pretrain sweep collect {sweep}"]:
        out.print(f"next: {way}")
    return bool(failed)
