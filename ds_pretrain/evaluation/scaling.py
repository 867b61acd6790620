"""Scaling laws of Kaplan et al. and of Hoffmann et al. (Chinchilla), fitted to a table of finished runs.

N is the size in parameters (without embeddings or with them: the caller's choice, said in every table), D the tokens trained
on, C the FLOPs, L the held-out loss in nats per target. Every form is a class that says what it takes, solves itself for
given weights of the runs, and gives what it can: values, a loss for any N and D, the N that a budget is best spent on. The
bootstrap, the held-out error and the budgets are then written once. Where the runs do not fix a form, the report has a
sentence in place of numbers. The price of the bootstrap by runs: it knows the noise between runs and nothing of a form that
is wrong; that shows in the residuals and in the held-out error.
"""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ds_pretrain.core.registry import unknown

Size = Literal["parameters", "parameters_total"]
SIZES = {"parameters": "parameters without embeddings", "parameters_total": "parameters with embeddings"}
COLUMNS = ("objective", "parameters", "parameters_total", "tokens", "flops", "loss", "seed", "status", "run")
"""What a table of runs may have, by our names; `tokens`, `loss` and one of the sizes it must have."""
DELTA = 1e-3
"""Where the Huber loss of a log loss turns from square to linear (Hoffmann et al., section 3.3)."""
EXPONENTS = (0.01, 3.0)
"""Bounds of the exponents of N and D."""
STARTS, FOLLOWED = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2), 8
"""Exponents of the starts, all pairs of them, and how many of the starts, the lowest, are followed down."""
SAME = 1.05
"""Runs whose FLOPs differ by less than this factor have the same budget."""
PROFILE = 4
"""Sizes that an iso-FLOP profile takes: three for a parabola, one for its error."""
FEW = 10
"""Runs below which resampling them understates what is not known."""
FLOPS_READ, BUDGETS_READ = 1500, 9
"""FLOP values at which curves are read (as many as in Hoffmann et al.), and how many budgets are where none is shared."""


class Unidentified(ValueError):
    """Runs that do not fix a form, in a sentence."""


@dataclass(frozen=True)
class Runs:
    """Finished runs of a file, an array entry for every row; several rows of one run are points of its curve.

    size: what n counts. flops: where c is from. left_out: rows that are not finished, by status.
    """

    path: str
    size: Size
    flops: str
    group: np.ndarray
    run: np.ndarray
    n: np.ndarray
    d: np.ndarray
    c: np.ndarray
    loss: np.ndarray
    left_out: Mapping[str, int] = field(default_factory=dict)

    def groups(self) -> Iterator[tuple[str, Points]]:
        """The runs of every objective, by name."""
        for name in sorted(set(self.group.tolist())):
            mine = self.group == name
            k = float(np.median(self.c[mine] / (self.n[mine] * self.d[mine])))
            yield name, Points(self.n, self.d, self.c, self.loss, self.run, k).where(mine)


@dataclass(frozen=True)
class Points:
    """Rows of one group. n, d, c, loss as in `Runs`; run: 0 to runs - 1; k: FLOPs per parameter and token, the median."""

    n: np.ndarray
    d: np.ndarray
    c: np.ndarray
    loss: np.ndarray
    run: np.ndarray
    k: float = 6.0

    @property
    def runs(self) -> int:
        return len(np.unique(self.run))

    def where(self, rows: np.ndarray) -> Points:
        """Some rows, by mask or number, their runs numbered anew."""
        run = np.unique(self.run[rows], return_inverse=True)[1]
        return Points(self.n[rows], self.d[rows], self.c[rows], self.loss[rows], run, self.k)

    def ends(self) -> Points:
        """The last row of every run, in the order of the runs."""
        order = np.lexsort((self.d, self.run))
        return self.where(order[np.append(np.diff(self.run[order]) > 0, True)])


def read(path: str | Path, columns: Mapping[str, str] | None = None, size: Size = "parameters") -> Runs:
    """Runs of a CSV or parquet file, as `sweep collect` writes them.

    columns: the file's name of a column by ours, where it differs (`{"loss": "val_loss"}`). size: the column that N is.
    `objective` groups the runs; rows whose `status` is not "finished" are counted and left out; rows of the same `run` (size
    and seed) are points of one curve; without `flops` C is 6 N D. ValueError naming every column and cell that is wrong.
    """
    names = _names(columns or {}, size)
    file, rows = Path(path).name, _rows(Path(path))
    there = set(filter(None, rows[0][1]))
    cells = [(where, {ours: row.get(theirs) for ours, theirs in names.items()}) for where, row in rows]
    finished = [(where, row) for where, row in cells if row["status"] in (None, "", "finished")]
    left_out = Counter(str(row["status"]) for _, row in cells if row["status"] not in (None, "", "finished"))
    needed = [size, "tokens", "loss"]
    wrong = [_lacking(file, names, name, there) for name in needed if names[name] not in there]
    wanted = [name for name in (*needed, "flops") if names[name] in there]
    numbers = {name: np.array([_number(row[name]) for _, row in finished]) for name in wanted}
    wrong += _wrong_cells(file, finished, names, numbers)
    wrong += [f"{file}: no run is finished, only {_counted(left_out)}; map 'status' if another column says it"] * (not finished)
    if wrong:
        raise ValueError("\n".join(wrong))
    n, d = numbers[size], numbers["tokens"]
    return Runs(
        path=str(path),
        size=size,
        flops=f"column {names['flops']!r}" if "flops" in numbers else "6 N D",
        group=np.array([str(row["objective"] or "all") for _, row in finished]),
        run=_run_numbers(finished, n),
        n=n,
        d=d,
        c=numbers["flops"] if "flops" in numbers else 6 * n * d,
        loss=numbers["loss"],
        left_out=dict(left_out),
    )


def _names(columns: Mapping[str, str], size: str) -> dict[str, str]:
    wrong = [unknown("column", name, COLUMNS) for name in columns if name not in COLUMNS]
    wrong += [] if size in SIZES else [unknown("size", size, SIZES)]
    if wrong:
        raise ValueError("\n".join(wrong))
    return {name: columns.get(name, name) for name in COLUMNS}


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What a row is called in the file, and its cells."""
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path} is neither .csv nor .parquet")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = [(f"row {i}", row) for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)]
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(f"line {reader.line_num}", row) for row in reader]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _lacking(file: str, names: Mapping[str, str], name: str, there: set[str]) -> str:
    other = next((size for size in SIZES if size != name and name in SIZES and names[size] in there), None)
    fix = f", or count N as {other!r}, which it has" if other else ""
    return f"{file}: {unknown('column', names[name], there)}. Map {name!r} to the column that holds it{fix}"


def _wrong_cells(
    file: str, rows: Sequence[tuple[str, dict]], names: Mapping[str, str], numbers: Mapping[str, np.ndarray]
) -> list[str]:
    wrong = [
        f"{file} {where}: {names[name]} is {'empty' if row[name] in (None, '') else repr(row[name])}, not a positive number"
        for i, (where, row) in enumerate(rows)
        for name in numbers
        if not 0 < numbers[name][i] < math.inf
    ]
    more = [f"and {len(wrong) - 20} more"] if len(wrong) > 20 else []
    fix = ["Correct these cells, or give the rows a status other than 'finished'"] if wrong else []
    return [*wrong[:20], *more, *fix]


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def _run_numbers(rows: Sequence[tuple[str, dict]], n: np.ndarray) -> np.ndarray:
    """Rows of the same run, objective, seed and size are one run; a row that names no run is one."""
    keys = [
        (row["objective"], row["run"], row["seed"], float(size)) if row["run"] not in (None, "") else where
        for (where, row), size in zip(rows, n, strict=True)
    ]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


@dataclass(frozen=True)
class Form(ABC):
    """A law or a procedure on some points. theta: what `solve` finds, [..., p], also of many resamples at once.

    predicts: it knows `log_loss`. allocates: it knows `optimum`.
    """

    key: ClassVar[str]
    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    predicts: ClassVar[bool] = False
    allocates: ClassVar[bool] = False
    points: Points

    @property
    def title(self) -> str:
        return self.name

    @abstractmethod
    def check(self) -> None:
        """Unidentified where there are too few runs, or they do not differ in what the form needs."""

    @abstractmethod
    def solve(self, weight: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
        """theta for weights of the runs, from the neighbourhood of another theta if there is one; Unidentified."""

    @abstractmethod
    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """What people call the parameters, by name."""

    def doubt(self, theta: np.ndarray, draws: np.ndarray) -> str:
        """Why a solution should not be believed, or nothing."""
        return ""

    def loose(self, draws: np.ndarray) -> dict[str, str]:
        """Values that are not fixed although the others are, and why."""
        return {}

    def notes(self) -> list[str]:
        """What to know of the data that a solution rests on."""
        return []

    def log_loss(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Log loss of sizes and tokens, [..., points]."""
        raise NotImplementedError

    def optimum(self, theta: np.ndarray, c: float | np.ndarray) -> np.ndarray:
        """N of the lowest loss for a budget in FLOPs."""
        raise NotImplementedError

    def span(self) -> tuple[float, float]:
        """FLOPs from which to which the form rests on data."""
        return float(self.points.c.min()), float(self.points.c.max())

    def best_loss(self, theta: np.ndarray, c: float | np.ndarray) -> np.ndarray:
        """The loss at the optimum."""
        n = self.optimum(theta, c)[..., None]
        return np.exp(self.log_loss(theta, n, np.asarray(c)[..., None] / self.points.k / n))[..., 0]

    def relative(self, theta: np.ndarray, points: Points) -> np.ndarray:
        """Predicted / measured - 1, [..., points]."""
        return np.exp(self.log_loss(theta, points.n, points.d)) / points.loss - 1


@dataclass(frozen=True)
class Alone(Form):
    """L(x) = (xc / x)^alpha_x of the size alone, or of the tokens alone, by least squares of the log loss.

    Kaplan et al. 2020, "Scaling Laws for Neural Language Models" (arXiv 2001.08361), equations 1.1 and 1.2. There the other
    quantity is not the bottleneck; here it is the same in all runs that are taken, and said.
    """

    letter: ClassVar[str]
    needs: ClassVar[str]
    predicts = True
    source = "Kaplan et al. 2020, equations 1.1 and 1.2"

    @abstractmethod
    def axes(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """What varies, and what does not."""

    def taken(self) -> Alone:
        """On those runs that differ most in this alone; of several such sets, on that where the other is largest."""
        ends = self.points.ends()
        moving, other = self.axes(ends)
        sets = _alike(other, 1.01)
        best = max(np.unique(sets), key=lambda i: (_distinct(moving[sets == i]), other[sets == i].max()))
        return replace(self, points=ends.where(sets == best))

    def check(self) -> None:
        if (count := _distinct(self.axes(self.points)[0])) < 3:
            raise Unidentified(f"takes {self.needs}; at most {count} {'does' if count == 1 else 'do'}")

    def solve(self, weight: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
        slope, height = _line(np.log(self.axes(self.points)[0]), np.log(self.points.loss), weight[self.points.run])
        return np.array([-slope, height])

    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        scale = np.exp(np.clip(theta[..., 1] / theta[..., 0], -700, 700))
        return {f"alpha_{self.letter}": theta[..., 0], f"{self.letter}c": scale}

    def doubt(self, theta: np.ndarray, draws: np.ndarray) -> str:
        rises = np.percentile(draws[:, 0], 2.5) <= 0
        return f"the loss does not reliably fall with {self.letter} in these runs" if rises else ""

    def log_loss(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        moving, _ = self.axes(Points(n, d, n, n, n))
        return theta[..., 1:2] - theta[..., 0:1] * np.log(moving)


class OfSize(Alone):
    """L(N) at one number of tokens."""

    key, name, letter, formula = "kaplan_n", "Kaplan L(N)", "N", "L = (Nc / N)^alpha_N"
    needs = "3 sizes trained on the same number of tokens"

    @property
    def title(self) -> str:
        return f"{self.name} at D = {short(np.median(self.points.d))}"

    def axes(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        return points.n, points.d


class OfTokens(Alone):
    """L(D) at one size."""

    key, name, letter, formula = "kaplan_d", "Kaplan L(D)", "D", "L = (Dc / D)^alpha_D"
    needs = "3 token counts at the same size"

    @property
    def title(self) -> str:
        return f"{self.name} at N = {short(np.median(self.points.n))}"

    def axes(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        return points.d, points.n


@dataclass(frozen=True)
class Joint(Form):
    """A law of N and D, fitted as in Hoffmann et al.: Huber loss (delta 1e-3) of the log loss, L-BFGS from a grid of starts.

    Besiroglu et al. 2024 ("Chinchilla Scaling: A replication attempt", arXiv 2404.10102) found the published numbers to come
    from an optimizer that stopped early, because the losses were averaged and small against its tolerance. Here they are
    summed, in units of delta squared; logs of N and D are centred, which takes most of the valley out of the problem; the
    grid is over the two exponents (36 starts, the lowest eight of them followed), because the coefficients that go with them
    follow by non-negative least squares. Resamples start from the solution. theta: the exponents, then the logs of the
    coefficients of centred terms.
    """

    predicts = allocates = True
    powers: ClassVar[tuple[str, str]]
    unknowns: ClassVar[int]

    @abstractmethod
    def evaluate(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log loss, its derivatives [parameters, points] and the terms' shares [terms, points], of centred logs."""

    @abstractmethod
    def terms(self, first: float, second: float) -> np.ndarray:
        """The terms without coefficients, [points, terms], for these exponents: over what they should sum to."""

    @cached_property
    def centre(self) -> tuple[float, float]:
        return float(np.log(self.points.n).mean()), float(np.log(self.points.d).mean())

    @cached_property
    def logs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of N and D, centred, and of the loss."""
        n, d = np.log(self.points.n) - self.centre[0], np.log(self.points.d) - self.centre[1]
        return n, d, np.log(self.points.loss)

    def check(self) -> None:
        counts = {f"{self.unknowns + 1} runs": self.points.runs, "3 sizes": len(np.unique(self.points.n))}
        counts["3 token counts"] = len(np.unique(self.points.d))
        lacking = [f"{need} (there {_are(count)})" for need, count in counts.items() if count < int(need.split()[0])]
        if lacking:
            raise Unidentified(f"takes {', '.join(lacking)}")
        n, d, _ = self.logs
        slope, height = _line(n, d, np.ones(len(n)))
        if np.std(d - slope * n - height) < 0.1:
            raise Unidentified("the size of a run tells its tokens, so what either does cannot be told apart; vary D at a size")

    def solve(self, weight: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
        each = weight[self.points.run]
        if near is not None:
            return self.descend(near, each)[1]
        starts = sorted((self._start(i, j, each) for i in STARTS for j in STARTS), key=lambda start: self._cost(start, each)[0])
        return min((self.descend(start, each) for start in starts[:FOLLOWED]), key=lambda found: found[0])[1]

    def _start(self, first: float, second: float, weight: np.ndarray) -> np.ndarray:
        from scipy.optimize import nnls

        terms, scale = self.terms(first, second), np.sqrt(weight)
        found, _ = nnls(terms * scale[:, None], scale)
        return np.array([first, second, *np.log(np.maximum(found, 1e-3 / terms.max(axis=0)))])

    def descend(self, start: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
        """The lowest cost below a start, and its theta; weight: of the rows."""
        from scipy.optimize import minimize

        bounds = [EXPONENTS, EXPONENTS, *[(-700.0, 700.0)] * (len(start) - 2)]
        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-7, "maxcor": 20}
        result = minimize(self._cost, start, (weight,), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return float(result.fun), result.x

    def _cost(self, theta: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
        """The Huber losses in units of delta squared, summed, and their derivatives."""
        n, d, log_loss = self.logs
        value, slopes, _ = self.evaluate(theta, n, d)
        off = (value - log_loss) / DELTA
        clipped = np.clip(off, -1, 1)
        return float(weight @ (clipped * (off - clipped / 2))), slopes @ (weight * clipped) / DELTA

    def log_loss(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        each = np.moveaxis(theta, -1, 0)[..., None]
        return self.evaluate(each, np.log(n) - self.centre[0], np.log(d) - self.centre[1])[0]

    def doubt(self, theta: np.ndarray, draws: np.ndarray) -> str:
        for name, values in zip(self.powers, draws.T, strict=False):
            low, high = np.percentile(values, [2.5, 97.5])
            if low < 1.01 * EXPONENTS[0] or high > 0.99 * EXPONENTS[1]:
                bound = EXPONENTS[0] if low < 1.01 * EXPONENTS[0] else EXPONENTS[1]
                return f"{name} reaches its bound of {bound:g} within the 95% interval: these runs do not fix it"
        shares = self.evaluate(theta, *self.logs[:2])[2].max(axis=1)
        missing = [letter for letter, share in zip("ND", shares, strict=False) if share < 0.01]
        return f"the loss does not depend on {' or '.join(missing)} in these runs (1% of it at most)" if missing else ""


class Kaplan(Joint):
    """L(N, D) = [(Nc/N)^(alpha_N/alpha_D) + Dc/D]^alpha_D.

    Kaplan et al. 2020, equation 1.5. It has no irreducible loss. The compute-optimal size is the minimum at C = k N D, so
    a = alpha_D / (alpha_N + alpha_D), which leaves out what the paper's own a takes from batch sizes and early stopping.
    """

    key, name, unknowns = "kaplan_nd", "Kaplan L(N, D)", 4
    formula = "L = [(Nc/N)^(alpha_N/alpha_D) + Dc/D]^alpha_D"
    source = "Kaplan et al. 2020, equation 1.5"
    powers = ("alpha_N", "alpha_D")

    def evaluate(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        alpha_n, alpha_d, size, tokens = theta
        ratio = alpha_n / alpha_d
        total, share = _log_sum(np.stack([size - ratio * n, tokens - d]))
        slopes = [-share[0] * n, total + share[0] * n * ratio, alpha_d * share[0], alpha_d * share[1]]
        return alpha_d * total, np.stack(slopes), share

    def terms(self, first: float, second: float) -> np.ndarray:
        n, d, log_loss = self.logs
        return np.exp(np.stack([-first / second * n, -d], axis=1) - log_loss[:, None] / second)

    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        alpha_n, alpha_d, size, tokens = np.moveaxis(theta, -1, 0)
        nc = np.exp(np.clip(size * alpha_d / alpha_n + self.centre[0], -700, 700))
        dc = np.exp(np.clip(tokens + self.centre[1], -700, 700))
        return {"alpha_N": alpha_n, "alpha_D": alpha_d, "Nc": nc, "Dc": dc} | _shared_out(alpha_d / (alpha_n + alpha_d))

    def optimum(self, theta: np.ndarray, c: float | np.ndarray) -> np.ndarray:
        alpha_n, alpha_d, size, tokens = np.moveaxis(theta, -1, 0)
        ratio = alpha_n / alpha_d
        gain = np.log(ratio) + size + ratio * self.centre[0] - tokens - self.centre[1]
        return np.exp((gain + np.log(c / self.points.k)) / (1 + ratio))


class Parametric(Joint):
    """L(N, D) = E + A/N^alpha + B/D^beta.

    Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (arXiv 2203.15556), approach 3, section 3.3 and
    appendix D.3. N_opt = G (C/k)^a with a = beta / (alpha + beta) and G = (alpha A / (beta B))^(1 / (alpha + beta)).
    """

    key, name, unknowns = "chinchilla_3", "Chinchilla approach 3", 5
    formula = "L = E + A/N^alpha + B/D^beta"
    source = "Hoffmann et al. 2022, section 3.3; Besiroglu et al. 2024"
    powers = ("alpha", "beta")

    def evaluate(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        alpha, beta, size, tokens, floor = theta
        total, share = _log_sum(np.stack([size - alpha * n, tokens - beta * d, floor + 0 * n]))
        return total, np.stack([-share[0] * n, -share[1] * d, *share]), share

    def terms(self, first: float, second: float) -> np.ndarray:
        n, d, log_loss = self.logs
        return np.exp(np.stack([-first * n, -second * d, 0 * n], axis=1) - log_loss[:, None])

    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        alpha, beta, size, tokens, floor = np.moveaxis(theta, -1, 0)
        a, b = np.exp(size + alpha * self.centre[0]), np.exp(tokens + beta * self.centre[1])
        law = {"E": np.exp(floor), "A": a, "B": b, "alpha": alpha, "beta": beta}
        return law | _shared_out(beta / (alpha + beta))

    def loose(self, draws: np.ndarray) -> dict[str, str]:
        least = np.percentile(np.exp(draws[:, 4]), 2.5)
        if least > 0.01 * self.points.loss.min():
            return {}
        return {"E": "is not fixed: a loss that falls to nothing fits these runs as well (they show no curvature)"}

    def optimum(self, theta: np.ndarray, c: float | np.ndarray) -> np.ndarray:
        alpha, beta, size, tokens, _ = np.moveaxis(theta, -1, 0)
        gain = np.log(alpha / beta) + size + alpha * self.centre[0] - tokens - beta * self.centre[1]
        return np.exp((gain + beta * np.log(c / self.points.k)) / (alpha + beta))


@dataclass(frozen=True)
class Allocation(Form):
    """A power law N_opt(C) through optima found one by one; D_opt = C / (k N_opt). theta: log N at the centre, and a."""

    allocates = True
    formula = "N_opt ~ C^a, D_opt ~ C^b"

    @abstractmethod
    def optima(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log C and log N; Unidentified where they are too few."""

    @cached_property
    def centre(self) -> float:
        return float(np.log(self.points.c).mean())

    def solve(self, weight: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
        c, n = self.optima(weight)
        slope, height = _line(c - self.centre, n, np.ones(len(c)))
        return np.array([height, slope])

    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        c, n = math.exp(self.centre), np.exp(theta[..., 0])
        at = f"at {power(c)} FLOPs"
        return _shared_out(theta[..., 1]) | {f"N_opt {at}": n, f"D_opt {at}": c / self.points.k / n}

    def notes(self) -> list[str]:
        two = len(np.unique(self.optima(np.ones(self.points.runs))[1])) == 2
        return ["two optima only: the line goes through both, whatever they are"] * two

    def doubt(self, theta: np.ndarray, draws: np.ndarray) -> str:
        low, high = np.percentile(draws[:, 1], [2.5, 97.5])
        wide = f"a may be anything from {low:.2g} to {high:.2g} (95% interval); train more budgets, or more sizes at each"
        return wide if low < 0 or high > 1 else ""

    def optimum(self, theta: np.ndarray, c: float | np.ndarray) -> np.ndarray:
        return np.exp(theta[..., 0] + theta[..., 1] * (np.log(c) - self.centre))

    def span(self) -> tuple[float, float]:
        c, _ = self.optima(np.ones(self.points.runs))
        return float(np.exp(c.min())), float(np.exp(c.max()))


class Envelope(Allocation):
    """The lowest loss at every FLOP over the curves of all sizes, and a power law through its passes from size to size.

    Hoffmann et al. 2022, approach 1, section 3.1. A size's curve is its points, of one run or of several, joined in logs.
    There the size that wins is fitted at each of 1,500 FLOP values; with few sizes that staircase is flatter than the law
    (11% with 8 sizes), so here its steps are: where two sizes are equally good the optimum lies between, at their geometric
    mean. Noise moves a pass along the FLOPs; where two curves overlap little, passes near an end are lost, which tilts a.
    """

    key, name = "chinchilla_1", "Chinchilla approach 1"
    source = "Hoffmann et al. 2022, section 3.1"

    def check(self) -> None:
        if (count := len(_curves(self.points, np.ones(self.points.runs)))) < 3:
            raise Unidentified(f"takes 3 sizes with at least 2 points each; there {_are(count)}")
        self.optima(np.ones(self.points.runs))

    def losses(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log N of the sizes that have a curve, log C, and the log losses read off there, [sizes, FLOPs]."""
        curves = _curves(self.points, weight)
        at = np.linspace(np.log(self.points.c.min()), np.log(self.points.c.max()), FLOPS_READ)
        return np.array([curve.size for curve in curves]), at, _read_off(curves, at)

    def optima(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes, at, losses = self.losses(weight)
        if len(sizes) < 2:
            raise Unidentified("fewer than two sizes have a curve")
        best, step = np.where(np.isfinite(losses), losses, np.inf).argmin(axis=0), np.arange(len(at) - 1)
        before, after = best[:-1], best[1:]
        there = np.isfinite(losses[[before, before, after, after], [step, step + 1, step, step + 1]]).all(axis=0)
        here = np.flatnonzero((before != after) & there)
        c, n = (at[here] + at[here + 1]) / 2, (sizes[before[here]] + sizes[after[here]]) / 2
        if (count := len(np.unique(n))) < 2:
            passes = f"{count} pair{'s' * (count != 1)} of sizes, where both have data"
            raise Unidentified(f"the envelope passes between {passes}; takes 2: train neighbouring sizes at overlapping FLOPs")
        return c, n


class Valley(NamedTuple):
    """Losses of sizes at one budget, their parabola in log N (highest power first), its minimum, or why there is none.

    n, best: logs.
    """

    c: float
    n: np.ndarray
    loss: np.ndarray
    parabola: np.ndarray
    best: float = math.nan
    problem: str = ""


class IsoFlop(Allocation):
    """For every budget a parabola of the loss in log N; a power law through their minima.

    Hoffmann et al. 2022, approach 2, section 3.2. Budgets are those that at least four sizes share within 5%; where fewer
    than two are, profiles are read off the sizes' curves at nine budgets, and the report says so. The parabola is an
    approximation: where alpha and beta differ, wide profiles shift their minimum.
    """

    key, name = "chinchilla_2", "Chinchilla approach 2"
    source = "Hoffmann et al. 2022, section 3.2"

    @cached_property
    def shared(self) -> list[np.ndarray]:
        """Rows of the last points, for every budget that enough sizes share."""
        ends = self.points.ends()
        sets = _alike(ends.c, SAME)
        rows = [np.flatnonzero(sets == i) for i in np.unique(sets)]
        return [each for each in rows if len(np.unique(ends.n[each])) >= PROFILE]

    @cached_property
    def read_at(self) -> np.ndarray:
        """log C of the budgets to read off the curves, none where budgets are shared."""
        at = np.linspace(np.log(self.points.c.min()), np.log(self.points.c.max()), FLOPS_READ)
        curves = _curves(self.points, np.ones(self.points.runs)) if len(self.shared) < 2 else []
        enough = at[np.isfinite(_read_off(curves, at)).sum(axis=0) >= PROFILE]
        return enough[np.linspace(0, len(enough) - 1, min(len(enough), BUDGETS_READ)).round().astype(int)]

    def check(self) -> None:
        if len(self.shared) < 2 and len(self.read_at) < 2:
            shared = f"{len(self.shared)} {'budget has' if len(self.shared) == 1 else 'budgets have'} them"
            overlap = f"and nowhere do the curves of {PROFILE} sizes overlap"
            raise Unidentified(f"takes {PROFILE} sizes at each of 2 budgets (within 5%): {shared}, {overlap}")
        self.optima(np.ones(self.points.runs))

    def valleys(self, weight: np.ndarray) -> list[Valley]:
        ends = self.points.ends()
        if not len(self.read_at):
            return [_valley(ends.c[i].mean(), np.log(ends.n[i]), ends.loss[i], weight[ends.run[i]]) for i in self.shared]
        curves = _curves(self.points, weight)
        losses, sizes = np.exp(_read_off(curves, self.read_at)), np.array([curve.size for curve in curves])
        there = np.isfinite(losses)
        each = zip(np.exp(self.read_at), there.T, losses.T, strict=True)
        return [_valley(float(c), sizes[i], loss[i], np.ones(i.sum())) for c, i, loss in each]

    def optima(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        valleys = self.valleys(weight)
        found = [valley for valley in valleys if not valley.problem]
        if len(found) < 2:
            why = "; ".join(f"{power(valley.c)} FLOPs: {valley.problem}" for valley in valleys if valley.problem)
            raise Unidentified(f"takes 2 budgets with a minimum among their sizes, there {_are(len(found))} ({why})")
        return np.log([valley.c for valley in found]), np.array([valley.best for valley in found])

    def notes(self) -> list[str]:
        valleys = self.valleys(np.ones(self.points.runs))
        told = [f"{power(valley.c)} FLOPs left out: {valley.problem}" for valley in valleys if valley.problem]
        read_off = f"no two budgets are shared by {PROFILE} sizes: profiles are read off the sizes' curves"
        return [*super().notes(), *told, *[read_off] * bool(len(self.read_at))]


def forms(points: Points) -> list[Form]:
    """All that are tried on a group."""
    ends = points.ends()
    alone = [OfSize(points).taken(), OfTokens(points).taken()]
    return [*alone, Kaplan(ends), Envelope(points), IsoFlop(points), Parametric(ends)]


class _Curve(NamedTuple):
    """Points of one size: its log, log C ascending and log loss."""

    size: float
    c: np.ndarray
    loss: np.ndarray


def _curves(points: Points, weight: np.ndarray) -> list[_Curve]:
    """Curves of the sizes that have two FLOP values, of runs with a weight; several losses at one FLOP value are averaged."""
    share, sets = weight[points.run], _alike(points.n, 1.01)
    curves = []
    for size in np.unique(sets[share > 0]):
        mine = (sets == size) & (share > 0)
        c, place = np.unique(points.c[mine], return_inverse=True)
        total = np.bincount(place, share[mine])
        loss = np.bincount(place, share[mine] * np.log(points.loss[mine])) / total
        curves.append(_Curve(float(np.log(points.n[mine]).mean()), np.log(c), loss))
    return [curve for curve in curves if len(curve.c) > 1]


def _read_off(curves: Sequence[_Curve], at: np.ndarray) -> np.ndarray:
    """Log losses [curves, values of log C], not a number where a curve has none."""
    return np.array([np.interp(at, curve.c, curve.loss, left=np.nan, right=np.nan) for curve in curves]).reshape(-1, len(at))


def _valley(c: float, n: np.ndarray, loss: np.ndarray, weight: np.ndarray) -> Valley:
    """n: log N. The parabola takes three sizes of some weight."""
    used = weight > 0
    if len(np.unique(n[used])) < 3:
        return Valley(c, n, loss, np.full(3, np.nan), problem="fewer than three sizes")
    middle = n.mean()
    bend, slope, height = np.polyfit(n[used] - middle, loss[used], 2, w=np.sqrt(weight[used]))
    parabola = np.array([bend, slope - 2 * bend * middle, height - slope * middle + bend * middle**2])
    if bend <= 0:
        return Valley(c, n, loss, parabola, problem="no minimum, its profile does not bend upwards")
    best = middle - slope / (2 * bend)
    if n.min() <= best <= n.max():
        return Valley(c, n, loss, parabola, best)
    edge, way = (n.min(), "smallest") if best < n.min() else (n.max(), "largest")
    return Valley(c, n, loss, parabola, best, f"the minimum lies beyond the {way} size, {short(np.exp(edge))}")


def _alike(values: np.ndarray, factor: float) -> np.ndarray:
    """A number for every value, the same for those within a factor of the smallest of them."""
    labels, label, first = np.zeros(len(values), dtype=int), -1, -math.inf
    for i in np.argsort(values, kind="stable"):
        if values[i] > first * factor or label < 0:
            label, first = label + 1, values[i]
        labels[i] = label
    return labels


def _distinct(values: np.ndarray) -> int:
    """How many there are, those of one plan counted once: rows of one budget differ by their padding."""
    return len(np.unique(_alike(values, 1.01)))


def _line(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Slope and height at zero of the weighted least squares; Unidentified where there is one x only."""
    total = weight.sum()
    x0, y0 = weight @ x / total, weight @ y / total
    spread = weight @ (x - x0) ** 2
    if spread <= 1e-12:
        raise Unidentified("all at one point")
    slope = weight @ ((x - x0) * (y - y0)) / spread
    return float(slope), float(y0 - slope * x0)


def _log_sum(terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the sum of exponentials over the first axis, and the shares of it."""
    top = terms.max(axis=0)
    each = np.exp(terms - top)
    total = each.sum(axis=0)
    return top + np.log(total), each / total


def _shared_out(a: np.ndarray) -> dict[str, np.ndarray]:
    """The exponents of N_opt(C) and D_opt(C)."""
    return {"a": a, "b": 1 - a}


class Estimate(NamedTuple):
    """A value with the percentile intervals of its bootstrap."""

    value: float
    within_80: tuple[float, float]
    within_95: tuple[float, float]

    @staticmethod
    def of(value: Any, draws: np.ndarray) -> Estimate:
        low95, low80, high80, high95 = (float(x) for x in np.percentile(draws, [2.5, 10, 90, 97.5]))
        return Estimate(float(value), (low80, high80), (low95, high95))

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "within_80": list(self.within_80), "within_95": list(self.within_95)}


class HeldOut(NamedTuple):
    """Runs of the most compute, left out of a fit and predicted by it.

    beyond: their most compute over the most of the rest. mean: of predicted / measured - 1 over the runs, with the intervals
    of the fit alone. absolute: mean of its absolute values. worst: the one of the largest absolute value.
    """

    runs: int
    beyond: float
    mean: Estimate
    absolute: float
    worst: float

    def as_json(self) -> dict[str, Any]:
        told = {"runs": self.runs, "compute_beyond": self.beyond, "mean_relative_error": self.mean.as_json()}
        return told | {"mean_absolute_relative_error": self.absolute, "worst_relative_error": self.worst}


@dataclass(frozen=True)
class Fit:
    """A form on a group. problem: why it has no numbers. draws: theta of the resamples that could be solved.

    held_out: None where the form predicts no loss, words where the rest of the runs do not fix it.
    """

    form: Form
    problem: str = ""
    notes: tuple[str, ...] = ()
    theta: np.ndarray = field(default_factory=lambda: np.zeros(0))
    draws: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    held_out: HeldOut | str | None = None

    @property
    def rms(self) -> float | None:
        """Root mean square of the relative residuals."""
        if self.problem or not self.form.predicts:
            return None
        return float(np.sqrt(np.mean(self.form.relative(self.theta, self.form.points) ** 2)))

    @cached_property
    def values(self) -> dict[str, Estimate]:
        if self.problem:
            return {}
        drawn, loose = self.form.values(self.draws), self.form.loose(self.draws)
        found = self.form.values(self.theta).items()
        return {name: Estimate.of(value, drawn[name]) for name, value in found if name not in loose}

    def as_json(self) -> dict[str, Any]:
        form, held = self.form, self.held_out
        return {
            "form": form.key,
            "title": form.title,
            "formula": form.formula,
            "source": form.source,
            "runs": form.points.runs,
            "problem": self.problem or None,
            "notes": list(self.notes),
            "resamples": len(self.draws),
            "values": {name: value.as_json() for name, value in self.values.items()},
            "rms_relative_residual": self.rms,
            "held_out": held.as_json() if isinstance(held, HeldOut) else held and {"problem": held},
        }


class Optimum(NamedTuple):
    """How a form would spend a budget. beyond: the budget over the most (or, below 1, the least) compute the form rests on."""

    c: float
    form: Form
    n: Estimate
    d: Estimate
    per_parameter: Estimate
    loss: Estimate | None
    beyond: float

    @property
    def warning(self) -> str:
        if self.beyond > 1:
            return f"{self.beyond:.3g} TIMES BEYOND THE DATA"
        return f"{1 / self.beyond:.3g} TIMES BELOW THE DATA" if self.beyond < 1 else ""

    def as_json(self) -> dict[str, Any]:
        estimates = {"parameters": self.n, "tokens": self.d, "tokens_per_parameter": self.per_parameter, "loss": self.loss}
        told = {name: value and value.as_json() for name, value in estimates.items()}
        return {"flops": self.c, "form": self.form.key, **told, "beyond": self.beyond, "warning": self.warning or None}


@dataclass(frozen=True)
class Group:
    """An objective's runs and what was fitted to them."""

    name: str
    points: Points
    fits: tuple[Fit, ...]
    optima: tuple[Optimum, ...]

    def fit(self, key: str) -> Fit:
        return next(fit for fit in self.fits if fit.form.key == key)

    def notes(self) -> list[tuple[str, str]]:
        """What is not in numbers: titles of forms (or nothing), and sentences."""
        told = [(fit.form.name, f"not identified: {fit.problem}") for fit in self.fits if fit.problem]
        told += [(fit.form.title, note) for fit in self.fits for note in fit.notes]
        words = [(fit.form.title, fit.held_out) for fit in self.fits if isinstance(fit.held_out, str)]
        told += [(title, f"no held-out error: {why}") for title, why in words]
        ratios = self.points.c / (self.points.n * self.points.d)
        span = f"C is {ratios.min():.3g} to {ratios.max():.3g} times N D; D_opt takes the median, {self.points.k:.3g}"
        return told + [("", span)] * bool(ratios.max() > 1.1 * ratios.min())

    def as_json(self) -> dict[str, Any]:
        ranges = {"parameters": self.points.n, "tokens": self.points.d, "flops": self.points.c, "loss": self.points.loss}
        return {
            "objective": self.name,
            "runs": self.points.runs,
            "points": len(self.points.n),
            "flops_per_parameter_and_token": self.points.k,
            "ranges": {name: [float(x.min()), float(x.max())] for name, x in ranges.items()},
            "fits": [fit.as_json() for fit in self.fits],
            "budgets": [optimum.as_json() for optimum in self.optima],
            "notes": [": ".join(filter(None, note)) for note in self.notes()],
        }


@dataclass(frozen=True)
class Report:
    """All that was fitted to a file of runs, and with which settings."""

    runs: Runs
    groups: tuple[Group, ...]
    resamples: int
    seed: int
    held_out: float

    @property
    def size(self) -> str:
        """What N counts."""
        return f"N: {SIZES[self.runs.size]}"

    def units(self, group: Group) -> str:
        """What C and L are."""
        k = "" if self.runs.flops == "6 N D" else f", {group.points.k:.3g} N D"
        return f"C: {self.runs.flops}{k}. L: held-out loss, nats per target."

    def tables(self) -> list[Table]:
        """For people: per group the values, the held-out error, the budgets, and what is not in numbers."""
        makers = (_values_table, _held_out_table, _budget_table, _notes_table)
        tables = [make(self, group) for group in self.groups for make in makers]
        return [table for table in tables if table.row_count]

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.runs.path,
            "size": {"column": self.runs.size, "meaning": SIZES[self.runs.size]},
            "flops": self.runs.flops,
            "loss": "nats per target",
            "left_out": dict(self.runs.left_out),
            "resamples": self.resamples,
            "seed": self.seed,
            "held_out": self.held_out,
            "groups": [group.as_json() for group in self.groups],
        }


def fit(
    runs: Runs,
    budgets: Sequence[float] = (),
    resamples: int = 500,
    seed: int = 0,
    held_out: float = 0.2,
    quiet: bool = False,
) -> Report:
    """Every form on every group, with bootstrap intervals, held-out errors and the compute-optimal N and D of budgets.

    budgets: FLOPs. resamples: of the runs, with replacement, per form. held_out: the share of the runs, those of the most
    compute, that is left out and predicted. quiet: no progress bar. ValueError for wrong arguments, and where no form fits
    any group, with what each form takes.
    """
    wrong = [f"a budget must be positive FLOPs, got {c:g}" for c in budgets if not 0 < c < math.inf]
    wrong += [f"resamples must be at least 20, got {resamples}"] if resamples < 20 else []
    wrong += [f"held_out must be above 0 and below 1, got {held_out:g}"] if not 0 < held_out < 1 else []
    if wrong:
        raise ValueError("; ".join(wrong))
    found = [(name, points, forms(points)) for name, points in runs.groups()]
    hopeless = [_hopeless(*group) for group in found]
    if all(hopeless):
        told = (line for lines in hopeless for line in lines)
        raise ValueError("\n".join([f"{runs.path}:", *told, "Train more sizes and token counts; the fits need both to vary"]))
    console, groups = Console(stderr=True), list[Group]()
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=2 * resamples * sum(len(each) for *_, each in found))
        for name, points, each in found:
            fits = []
            for number, form in enumerate(each):
                bar.update(task, description=escape(f"{name}, {form.title}"))
                fits.append(_fitted(form, held_out, Resampling(resamples, (seed, number, *name.encode()), bar, task)))
                bar.update(task, completed=2 * resamples * (len(each) * len(groups) + number + 1))
            optima = [_optimum(one, c) for c in budgets for one in fits if one.form.allocates and not one.problem]
            groups.append(Group(name, points, tuple(fits), tuple(optima)))
    return Report(runs, tuple(groups), resamples, seed, held_out)


def _hopeless(name: str, points: Points, tried: Sequence[Form]) -> list[str]:
    """Why no form fits a group; nothing if one may."""
    problems = []
    for form in tried:
        try:
            form.check()
            return []
        except Unidentified as why:
            problems.append(f"  {form.name}: {why}")
    sizes, tokens = len(np.unique(points.n)), len(np.unique(points.d))
    varied = f"all of one size, N = {short(points.n[0])}" if sizes == 1 else f"{sizes} sizes"
    counts = f"{points.runs} run{'s' * (points.runs != 1)}, {varied}, {tokens} token count{'s' * (tokens != 1)}"
    return [f"{name}: nothing can be fitted ({counts})", *problems]


class Resampling(NamedTuple):
    """How often, from which seed, and the bar that is told."""

    times: int
    seed: tuple[int, ...]
    bar: Progress
    task: Any

    def draws(self, form: Form, near: np.ndarray) -> np.ndarray:
        """theta of the resamples that have a solution."""
        rng, runs, found = np.random.default_rng(list(self.seed)), form.points.runs, []
        for _ in range(self.times):
            weight = np.bincount(rng.integers(0, runs, runs), minlength=runs).astype(float)
            with suppress(Unidentified):
                found.append(form.solve(weight, near))
            self.bar.advance(self.task)
        return np.array(found)


def _solved(form: Form, resampling: Resampling) -> tuple[np.ndarray, np.ndarray]:
    """theta of all runs and of their resamples; Unidentified also where either should not be believed."""
    form.check()
    theta = form.solve(np.ones(form.points.runs))
    draws = resampling.draws(form, theta)
    if len(draws) < 0.8 * resampling.times:
        share = f"{len(draws) / resampling.times:.0%} of the resamples of these {form.points.runs} runs"
        raise Unidentified(f"only {share} have a solution; train more runs")
    if doubt := form.doubt(theta, draws):
        raise Unidentified(doubt)
    return theta, draws


def _fitted(form: Form, held_out: float, resampling: Resampling) -> Fit:
    try:
        theta, draws = _solved(form, resampling)
    except Unidentified as why:
        return Fit(form, problem=str(why))
    notes = [*form.notes(), *(f"{name} {why}" for name, why in form.loose(draws).items())]
    few = [f"{form.points.runs} runs only: intervals from so few come out too narrow"] * (form.points.runs < FEW)
    return Fit(form, "", (*notes, *few), theta, draws, _held_out(form, held_out, resampling) if form.predicts else None)


def _held_out(form: Form, share: float, resampling: Resampling) -> HeldOut | str:
    """Runs of the same budget stay together, although their steps are whole numbers and their FLOPs so not quite the same."""
    points = form.points
    budget = _alike(points.c, SAME)
    out = budget >= np.sort(budget)[-max(1, round(share * len(budget)))]
    if out.all():
        return "all runs have the same compute"
    rest = replace(form, points=points.where(~out))
    try:
        theta, draws = _solved(rest, resampling)
    except Unidentified as why:
        return f"the other {rest.points.runs} runs do not fix it: {why}"
    errors, drawn = (rest.relative(each, points.where(out)) for each in (theta, draws))
    mean, worst = Estimate.of(errors.mean(), drawn.mean(axis=1)), float(errors[np.abs(errors).argmax()])
    return HeldOut(int(out.sum()), points.c.max() / points.c[~out].max(), mean, float(np.abs(errors).mean()), worst)


def _optimum(fit: Fit, c: float) -> Optimum:
    form, k = fit.form, fit.form.points.k
    n, drawn = form.optimum(fit.theta, c), form.optimum(fit.draws, c)
    losses = [form.best_loss(theta, c) for theta in (fit.theta, fit.draws)] if form.predicts else None
    least, most = form.span()
    return Optimum(
        c=c,
        form=form,
        n=Estimate.of(n, drawn),
        d=Estimate.of(c / k / n, c / k / drawn),
        per_parameter=Estimate.of(c / k / n**2, c / k / drawn**2),
        loss=Estimate.of(*losses) if losses else None,
        beyond=c / most if c > most else c / least if c < least else 1.0,
    )


def short(x: float) -> str:
    """`11.4M`: three figures and a unit of thousands."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
    size, unit = next(((size, unit) for size, unit in units if x >= 0.9995 * size), (1.0, ""))
    return f"{x / size:.3g}{unit}" if x < 999.5 * size else power(x)


def power(x: float) -> str:
    """`1.2e19`"""
    digits, exponent = f"{x:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _number_shown(x: float) -> str:
    return power(x) if x and not 1e-3 <= abs(x) < 1e5 else f"{x:.4g}"


def _percent(x: float) -> str:
    return f"{100 * x:+.2f}%"


def _between(ends: tuple[float, float], form: Callable[[float], str]) -> str:
    return f"{form(ends[0])} to {form(ends[1])}"


def _table(report: Report, title: str, *columns: str, caption: str = "") -> Table:
    text = escape(f"{report.size}. {caption}".strip())
    view = Table(title=escape(title), caption=text, title_justify="left", caption_justify="left")
    for column in columns:
        view.add_column(column, justify="left" if column in ("form", "FLOPs", "") else "right")
    return view


def _values_table(report: Report, group: Group) -> Table:
    points, left_out = group.points, report.runs.left_out
    ranges = [f"{name} {short(x.min())} to {short(x.max())}" for name, x in (("N", points.n), ("D", points.d))]
    facts = f"{report.units(group)} {points.runs} runs, {', '.join(ranges)}; {report.resamples} resamples by run"
    facts += f"; left out of the file: {_counted(left_out)}" if left_out else ""
    view = _table(report, f"Scaling laws of {group.name}", "form", "", "value", "80%", "95%", "residual\n(rms)", caption=facts)
    for fit in group.fits:
        rms = "" if fit.rms is None else f"{fit.rms:.2%}"
        heads = [(fit.form.title, rms), (f"[dim]{escape(fit.form.formula)}[/dim]", ""), *[("", "")] * len(fit.values)]
        for (head, residual), (name, (value, most, nearly)) in zip(heads, fit.values.items(), strict=False):
            shown = short if "_opt" in name else _number_shown
            view.add_row(head, name, shown(value), _between(most, shown), _between(nearly, shown), residual)
        view.add_section()
    return view


def _held_out_table(report: Report, group: Group) -> Table:
    caption = f"The {report.held_out:.0%} of the runs with the most compute, predicted from the rest: predicted / measured - 1."
    heads = ("form", "runs", "compute beyond\nthe rest", "mean error", "80%", "95%", "mean\nabsolute", "worst")
    view = _table(report, f"Held-out error of {group.name}", *heads, caption=caption)
    for fit in group.fits:
        if isinstance(held := fit.held_out, HeldOut):
            value, most, nearly = held.mean
            shown = (_percent(value), _between(most, _percent), _between(nearly, _percent), f"{held.absolute:.2%}")
            view.add_row(fit.form.title, str(held.runs), f"x {held.beyond:.3g}", *shown, _percent(held.worst))
    return view


def _budget_table(report: Report, group: Group) -> Table:
    caption = f"C = {group.points.k:.3g} N D; 95% intervals in brackets."
    heads = ("FLOPs", "form", "N", "D", "tokens per\nparameter", "L", "")
    view = _table(report, f"Compute-optimal {group.name}", *heads, caption=caption)
    for one in group.optima:
        cells = ((one.n, short), (one.d, short), (one.per_parameter, _number_shown), (one.loss, _number_shown))
        warning = f"[bold red]{one.warning}[/bold red]" if one.warning else "within the data"
        view.add_row(power(one.c), one.form.title, *(_bracketed(x, form) for x, form in cells), warning, end_section=True)
    return view


def _notes_table(report: Report, group: Group) -> Table:
    view = _table(report, f"To know of {group.name}", "form", "")
    for title, note in group.notes():
        view.add_row(title, escape(note))
    return view


def _bracketed(x: Estimate | None, form: Callable[[float], str]) -> str:
    return "-" if x is None else f"{form(x.value)}\n\\[{_between(x.within_95, form)}]"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def _are(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"
