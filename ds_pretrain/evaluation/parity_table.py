"""The table of parity: for the terminal, and as a Markdown file that grows by a line with every case.

The file is the record as well. Started again with the same file, `parity` takes the cases that passed from it and measures
the others, so a table of hours can be made in pieces; what fails is always measured again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.table import Table

from ds_pretrain.evaluation.parity import Case, Result
from ds_pretrain.parallel.plan import plan_of

HEAD = (
    "objective", "layout", "precision", "ZeRO", "accumulation", "recompute", "loss error", "gradient error",
    "worst parameter", "stray outputs", "seconds", "passes",
)  # fmt: skip
RULE = ("---",) * len(HEAD)
PASSED = ("yes", "yes, by the order of sums")


def table(results: Sequence[Result]) -> Table:
    """The results for people: objective by layout, the largest gradient error of a cell; red where a case fails."""
    layouts = list(dict.fromkeys(r.case.layout for r in results))
    made = Table("objective", *layouts, title="parity with plain PyTorch: largest relative error of a gradient in fp32 (cases)")
    for objective in dict.fromkeys(r.case.objective for r in results):
        cells = [[r for r in results if (r.case.objective, r.case.layout) == (objective, layout)] for layout in layouts]
        made.add_row(objective, *(_red(cell) if any(not r.passed for r in cell) else _cell(cell) for cell in cells))
    made.caption = summary(results)
    return made


def _red(found: Sequence[Result]) -> str:
    return f"[bold red]{_cell(found)}[/]"


def _cell(found: Sequence[Result]) -> str:
    if not found:
        return "-"
    exact = [r.gradient_error for r in found if r.case.precision == "fp32"] or [r.gradient_error for r in found]
    failed = sum(not r.passed for r in found)
    return f"{max(exact):.1e} ({len(found)})" + (f" {failed} FAIL" if failed else "")


def summary(results: Sequence[Result]) -> str:
    """Counts, time and the largest errors, by precision."""
    told = [f"{sum(r.passed for r in results):,} of {len(results):,} cases pass, in {_hours(sum(r.seconds for r in results))}"]
    for precision in dict.fromkeys(r.case.precision for r in results):
        mine = [r for r in results if r.case.precision == precision]
        order = sum(r.by_order for r in mine)
        told.append(
            f"{precision}: loss within {max(r.loss_error for r in mine):.1e}, gradients within "
            f"{max(r.gradient_error for r in mine):.1e}"
            + (f" ({order:,} of {len(mine):,} above 1e-6, by the order of sums)" if order else "")
        )
    return "; ".join(told)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds:.0f} s"


def left_out(todo: Iterable[Case]) -> list[str]:
    """Why cells are not there, with their number."""
    reasons = Counter(f"{case.objective}: {why}" if "ZeRO" not in why else why for case in todo if (why := case.illegal))
    return [f"{count} cells left out: {why}" for why, count in reasons.most_common()]


def markdown(results: Sequence[Result]) -> str:
    """Every case as a line of a Markdown table."""
    return _lines([HEAD, RULE, *map(_row, results)]) + f"\n{summary(results)}\n"


def _lines(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(r: Result) -> tuple[str, ...]:
    c = r.case
    return (
        c.objective, c.layout, c.precision, str(c.stage), str(c.accumulation), "yes" if c.recompute else "no",
        f"{r.loss_error:.3e}", f"{r.gradient_error:.3e}", r.worst, str(r.strayed), f"{r.seconds:.2f}",
        PASSED[r.by_order] if r.passed else "NO",
    )  # fmt: skip


def _result(row: Sequence[str]) -> Result:
    """What `_row` wrote."""
    objective, layout, precision, stage, accumulation, recompute, loss, gradient, worst, strayed, seconds, _ = row
    plan, world = plan_of(layout)
    case = Case(objective, plan, world, int(stage), int(accumulation), recompute == "yes", precision)
    return Result(case, float(loss), float(gradient), worst, int(strayed), float(seconds))


@dataclass(frozen=True)
class Record:
    """The file of a table in the making: `start`, `add` a line for each case, `finish`.

    steps: of each case; figures of another number of steps, or of other versions, do not belong into one table.
    """

    path: Path
    steps: int

    def passed(self) -> dict[Case, Result]:
        """What need not be measured again. ValueError if the file is of another kind of run."""
        return {result.case: result for result in self._read() if result.passed} if self.path.exists() else {}

    def _read(self) -> list[Result]:
        first, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
        if first != self._heading:
            raise ValueError(
                f"{self.path} does not go on here: it begins with {first!r}, this run would write {self._heading!r}. "
                "Give --out another name, or remove the file to measure anew"
            )
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.endswith("|")]
        return [_result(row) for row in rows if len(row) == len(HEAD) and row[-1] in (*PASSED, "NO")]

    def start(self) -> None:
        """Make the file, or leave in it what passed."""
        self._write(_lines([HEAD, RULE, *map(_row, self.passed().values())]))

    def add(self, result: Result) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines([_row(result)]))

    def finish(self) -> None:
        """Close with the summary of all that is in the file."""
        self._write(markdown(self._read()))

    def _write(self, text: str) -> None:
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text(f"{self._heading}\n\n{text}", encoding="utf-8")
        beside.replace(self.path)

    @property
    def _heading(self) -> str:
        versions = ", ".join(f"{name} {version(name)}" for name in ("ds_pretrain", "torch", "deepspeed", "megatron-core"))
        return f"{self.steps} steps with {versions}"
