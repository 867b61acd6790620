"""What the fits of scaling laws give on data whose answer is known.

    python benchmarks/scaling_laws.py
    python benchmarks/scaling_laws.py --chinchilla svg_extracted_data.csv    # also the runs read off Hoffmann et al.'s figure

Planted: losses of a published law at the sizes and tokens of a real design, times noise of 0.5%. First the 104 runs of
mlfoundations/scaling (Gadre et al. 2024, arXiv 2403.08540: six sizes, three data sets, 5 to 640 tokens per parameter, as far
as they were trained; their losses are not used) under the constants of Hoffmann et al. and under those of Besiroglu et al.
Then the share of repetitions whose interval holds the truth, for every form on a design that it is meant for; whether the
grid of starts finds what a hundred times as many find; and what is said of runs that fix nothing. `--chinchilla` takes
data/svg_extracted_data.csv of epoch-research/analyzing-chinchilla, which has no licence and is therefore not here.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.evaluation.scaling import Form, Parametric, Points, Unidentified, fit, forms, read
from ds_pretrain.evaluation.scaling_plot import draw

NOISE = 0.005
SIZES = (10569312, 78914048, 153677376, 411616256, 1439795200, 6889410560)
MULTIPLES = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
CONSOLE = Console(width=128)


class Chinchilla(NamedTuple):
    """L = E + A/N^alpha + B/D^beta."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        return self.e + self.a / n**self.alpha + self.b / d**self.beta

    def best(self, c: Any) -> Any:
        gain = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        return gain * (c / 6) ** self.share

    @property
    def share(self) -> float:
        return self.beta / (self.alpha + self.beta)

    def truth(self) -> dict[str, float]:
        named = {"E": self.e, "A": self.a, "B": self.b, "alpha": self.alpha, "beta": self.beta}
        return named | {"a": self.share, "b": 1 - self.share}


HOFFMANN = Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = Chinchilla(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
KAPLAN = {"alpha_N": 0.076, "alpha_D": 0.103, "Nc": 6.4e13, "Dc": 1.8e13}


def kaplan(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    power = KAPLAN["alpha_N"] / KAPLAN["alpha_D"]
    return ((KAPLAN["Nc"] / n) ** power + KAPLAN["Dc"] / d) ** KAPLAN["alpha_D"]


def points(n: Any, d: Any, loss: np.ndarray, run: np.ndarray | None = None) -> Points:
    n, d = np.asarray(n, float), np.asarray(d, float)
    return Points(n, d, 6 * n * d, loss, np.arange(len(n)) if run is None else run)


def noisy(law: Callable, n: Any, d: Any, rng: np.random.Generator) -> Points:
    n, d = np.asarray(n, float), np.asarray(d, float)
    return points(n, d, law(n, d) * np.exp(NOISE * rng.normal(size=len(n))))


def testbed() -> tuple[np.ndarray, np.ndarray]:
    """Sizes and tokens of the 104 runs."""
    small = [(n, m) for n, m in product(SIZES[:4], MULTIPLES)]
    c4 = [each for each in small if each != (SIZES[3], 32)] + [(SIZES[4], 1), (SIZES[4], 4), (SIZES[5], 1)]
    others = [*small, (SIZES[4], 1), (SIZES[4], 32), (SIZES[5], 1)]
    n, m = np.array([*c4, *others, *others], float).T
    return n, 20 * m * n


def grid(rng: np.random.Generator, law: Callable = HOFFMANN.loss) -> Points:
    return noisy(law, *testbed(), rng)


def profiles(rng: np.random.Generator) -> Points:
    """Six budgets of seven sizes within a factor of 2.8 of the best."""
    c, ratio = (x.ravel() for x in np.meshgrid(10.0 ** np.linspace(18, 20.5, 6), np.geomspace(2**-1.5, 2**1.5, 7)))
    n = HOFFMANN.best(c) * ratio
    return noisy(HOFFMANN.loss, n, c / 6 / n, rng)


def curves(rng: np.random.Generator) -> Points:
    """Eight sizes, three runs each: a run is off by 0.5% as a whole and each of its 40 points by 0.1%."""
    n, seed, ratio = (x.ravel() for x in np.meshgrid(2.0 ** np.arange(8) * 1e7, [0, 1, 2], np.geomspace(1, 160, 40)))
    run = np.unique(n * 10 + seed, return_inverse=True)[1]
    off = NOISE * rng.normal(size=run.max() + 1)[run] + 0.001 * rng.normal(size=len(n))
    return points(n, n * ratio, HOFFMANN.loss(n, n * ratio) * np.exp(off), run)


def sizes(rng: np.random.Generator) -> Points:
    n = np.geomspace(1e7, 1e9, 12)
    return noisy(lambda n, d: (8.8e13 / n) ** 0.076, n, np.full(12, 1e11), rng)


def tokens(rng: np.random.Generator) -> Points:
    d = np.geomspace(1e8, 1e10, 12)
    return noisy(lambda n, d: (5.4e13 / d) ** 0.095, np.full(12, 1e9), d, rng)


class Trial(NamedTuple):
    """A form on a design, and what it should find."""

    key: str
    design: Callable[[np.random.Generator], Points]
    words: str
    truth: dict[str, float]


SHARE = {"a": HOFFMANN.share}
TRIALS = (
    Trial("kaplan_n", sizes, "12 sizes", {"alpha_N": 0.076, "Nc": 8.8e13}),
    Trial("kaplan_d", tokens, "12 token counts", {"alpha_D": 0.095, "Dc": 5.4e13}),
    Trial("kaplan_nd", lambda rng: grid(rng, kaplan), "the 104 runs", KAPLAN),
    Trial("chinchilla_1", curves, "8 sizes x 3 runs x 40 points", SHARE),
    Trial("chinchilla_2", profiles, "6 budgets x 7 sizes", SHARE),
    Trial("chinchilla_2", curves, "8 sizes x 3 runs x 40 points", SHARE),
    Trial("chinchilla_3", grid, "the 104 runs", HOFFMANN.truth()),
    Trial("chinchilla_3", profiles, "6 budgets x 7 sizes", HOFFMANN.truth()),
)


def taken(key: str, data: Points) -> Form:
    return next(form for form in forms(data) if form.key == key)


def write(path: Path, groups: dict[str, Points]) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["objective", "parameters_total", "tokens", "loss"])
        for name, data in groups.items():
            rows.writerows(zip([name] * len(data.n), data.n, data.d, data.loss, strict=True))
    return path


def planted(resamples: int, folder: Path | None) -> None:
    """Both plants on the 104 runs: found beside true."""
    plants = {"Hoffmann's constants": HOFFMANN, "Besiroglu's constants": BESIROGLU}
    with tempfile.TemporaryDirectory() as scratch:
        groups = {name: grid(np.random.default_rng(i), law.loss) for i, (name, law) in enumerate(plants.items())}
        runs = read(write(Path(scratch) / "runs.csv", groups), size="parameters_total")
        report = fit(runs, budgets=[5.76e23], resamples=resamples)
    for group in report.groups:
        law = plants[group.name]
        table = Table(title=f"104 runs, {group.name}, noise 0.5%", title_justify="left")
        for head in ("form", "", "planted", "found", "95%", "in it"):
            table.add_column(head, justify="left" if head in ("form", "") else "right")
        for one in group.fits:
            for name, (value, _, (low, high)) in one.values.items():
                true = law.truth().get(name)
                if one.form.key.startswith("chinchilla") and true is not None:
                    held = "yes" if low <= true <= high else "NO"
                    table.add_row(one.form.title, name, f"{true:.4g}", f"{value:.4g}", f"{low:.4g} to {high:.4g}", held)
        CONSOLE.print(table)
        best = group.optima[-1]
        CONSOLE.print(f"N for 5.76e23 FLOPs: {best.n.value:.3g}, planted {law.best(5.76e23):.3g}; {best.warning}")
        held = group.fit("chinchilla_3").held_out
        CONSOLE.print(
            f"approach 3, {held.runs} runs held out: mean error {held.mean.value:+.2%}, mean absolute {held.absolute:.2%}"
        )
        for note in group.notes():
            CONSOLE.print("  " + ": ".join(filter(None, note)), style="dim")
    if folder:
        CONSOLE.print(*draw(report, folder))


def coverage(replications: int, resamples: int) -> None:
    """How often an interval holds the truth."""
    table = Table(title=f"{replications} repetitions, {resamples} resamples", title_justify="left")
    for head in ("form", "design", "", "95% holds", "80% holds", "mean error", "spread", "mean width of 95%"):
        table.add_column(head, justify="left" if head in ("form", "design", "") else "right")
    for trial in TRIALS:
        found: dict[str, list] = {name: [] for name in trial.truth}
        for i in track(range(replications), f"{trial.key}, {trial.words}", console=Console(stderr=True), transient=True):
            form = taken(trial.key, trial.design(np.random.default_rng([7, i])))
            theta, draws = solved(form, resamples, i)
            for name, true in trial.truth.items():
                ends = np.percentile(form.values(draws)[name], [2.5, 10, 90, 97.5])
                found[name].append([ends[0] <= true <= ends[3], ends[1] <= true <= ends[2],
                                    form.values(theta)[name] / true - 1, (ends[3] - ends[0]) / true])  # fmt: skip
        for name, rows in found.items():
            within95, within80, off, width = np.array(rows, float).T
            shown = (f"{within95.mean():.0%}", f"{within80.mean():.0%}", f"{off.mean():+.1%}", f"{off.std():.1%}")
            table.add_row(
                taken(trial.key, trial.design(np.random.default_rng(0))).name, trial.words, name, *shown, f"{width.mean():.1%}"
            )
        table.add_section()
    CONSOLE.print(table)


def solved(form: Form, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng, runs = np.random.default_rng([11, seed]), form.points.runs
    theta = form.solve(np.ones(runs))

    def draws() -> Iterator[np.ndarray]:
        for _ in range(resamples):
            try:
                yield form.solve(np.bincount(rng.integers(0, runs, runs), minlength=runs).astype(float), theta)
            except Unidentified:
                continue

    return theta, np.array(list(draws()))


def starts() -> None:
    """The 36 starts beside the 4,500 of Hoffmann et al. (alpha, beta, e, a, b), on one of the plants."""
    form = Parametric(grid(np.random.default_rng(0)).ends())
    weight, (n0, d0) = np.ones(len(form.points.n)), form.centre
    ours = form.descend(form.solve(weight), weight)[0]
    powers, floors, logs = np.arange(0, 2.1, 0.5), np.arange(-1, 1.1, 0.5), np.arange(0, 26, 5)
    theirs = []
    for alpha, beta, e, a, b in track(
        list(product(powers, powers, floors, logs, logs)), "4,500 starts", console=Console(stderr=True)
    ):
        start = np.array([max(alpha, 0.01), max(beta, 0.01), a - alpha * n0, b - beta * d0, e])
        theirs.append(form.descend(start, weight)[0])
    reached = np.mean(np.array(theirs) < ours * (1 + 1e-6))
    CONSOLE.print(
        f"lowest of our 36 starts {ours:.6f}, of Hoffmann's 4,500 {min(theirs):.6f}; {reached:.0%} of the 4,500 reach it"
    )


def staircase(replications: int = 50) -> None:
    """Approach 1 through the passes beside the size that wins at each of 1,500 FLOP values."""
    passes, stairs = [], []
    for i in range(replications):
        data = curves(np.random.default_rng([7, i]))
        form = taken("chinchilla_1", data)
        passes.append(form.solve(np.ones(data.runs))[1])
        sizes, at, losses = form.losses(np.ones(data.runs))
        best = np.where(np.isfinite(losses), losses, np.inf).argmin(axis=0)
        stairs.append(np.polyfit(at, sizes[best], 1)[0])
    for name, found in (("passes", passes), ("1,500 winners", stairs)):
        CONSOLE.print(f"approach 1 by {name}: a off by {np.mean(found) / HOFFMANN.share - 1:+.1%} on average")


def words() -> None:
    """What is said where nothing is fixed."""
    rng, at = np.random.default_rng(0), HOFFMANN.best(1e18)
    one = at * np.geomspace(0.2, 5, 7)
    n, d = (x.ravel() for x in np.meshgrid(10.0 ** np.arange(6, 10, 0.5), 10.0 ** np.arange(8, 11, 0.5)))
    edge = np.concatenate([HOFFMANN.best(c) * np.geomspace(3, 20, 6) for c in (1e18, 1e19, 1e20)])
    budgets = np.repeat([1e18, 1e19, 1e20], 6)
    cases = {
        "one budget": ("chinchilla_2", noisy(HOFFMANN.loss, one, 1e18 / 6 / one, rng)),
        "sizes all too large for their budgets": ("chinchilla_2", noisy(HOFFMANN.loss, edge, budgets / 6 / edge, rng)),
        "20 tokens per parameter in all runs": ("chinchilla_3", noisy(HOFFMANN.loss, n, 20 * n, rng)),
        "a loss of N alone": ("chinchilla_3", noisy(lambda n, d: 1.69 + 406.4 / n**0.34, n, d, rng)),
        "no irreducible loss": ("chinchilla_3", noisy(lambda n, d: 20 / n**0.08 + 20 / d**0.08, n, d, rng)),
        "four runs": ("chinchilla_3", noisy(HOFFMANN.loss, n[:4], d[:4], rng)),
    }
    for case, (key, data) in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            runs = read(write(Path(scratch) / "runs.csv", {"clm": data}), size="parameters_total")
        name = taken(key, data).name
        try:
            (group,) = fit(runs, resamples=50).groups
            told = [note for title, note in group.notes() if title == name]
        except ValueError as why:
            told = [line.split(": ", 1)[1] for line in str(why).splitlines() if line.strip().startswith(name)]
        CONSOLE.print(f"[bold]{case}[/bold], {name}: {'; '.join(told) or 'nothing is said'}")


def published(file: Path, resamples: int) -> None:
    """The 240 runs that Besiroglu et al. fitted: the five highest losses left out."""
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    n, c, loss = (np.array([float(row[name]) for row in rows]) for name in ("Model Size", "Training FLOP", "loss"))
    keep = np.sort(np.argsort(loss)[:-5])
    with tempfile.TemporaryDirectory() as scratch:
        data = Points(n[keep], (c / 6 / n)[keep], c[keep], loss[keep], np.arange(len(keep)))
        report = fit(
            read(write(Path(scratch) / "runs.csv", {"Chinchilla": data}), size="parameters_total"), [5.76e23], resamples
        )
    for table in report.tables():
        CONSOLE.print(table)


def main(
    replications: Annotated[int, typer.Option(help="Repetitions of every trial.")] = 50,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.")] = 200,
    chinchilla: Annotated[Path | None, typer.Option(help="svg_extracted_data.csv.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder for the sheets of the two plants.")] = None,
) -> None:
    if chinchilla:
        published(chinchilla, resamples)
    planted(resamples, pictures)
    words()
    staircase(replications)
    starts()
    coverage(replications, resamples)


if __name__ == "__main__":
    typer.run(main)
