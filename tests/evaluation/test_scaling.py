"""Scaling laws: planted values come back, intervals hold them, what is not fixed is said, wrong tables are told at once."""

import csv
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy.optimize import approx_fprime, minimize_scalar

from ds_pretrain.evaluation.scaling import (
    SIZES,
    Envelope,
    Fit,
    HeldOut,
    IsoFlop,
    Kaplan,
    OfSize,
    OfTokens,
    Parametric,
    Points,
    Unidentified,
    fit,
    forms,
    power,
    read,
    short,
)
from ds_pretrain.evaluation.scaling_plot import draw, sheet

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
SHARE = BETA / (ALPHA + BETA)
NC, DC, ALPHA_N, ALPHA_D = 6.4e13, 1.8e13, 0.076, 0.103


def chinchilla(n, d):
    return E + A / n**ALPHA + B / d**BETA


def kaplan(n, d):
    return ((NC / n) ** (ALPHA_N / ALPHA_D) + DC / d) ** ALPHA_D


def best(c):
    return (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (c / 6) ** SHARE


def points(n, d, law=chinchilla, noise=0.0, run=None, seed=0):
    n, d = np.asarray(n, float), np.asarray(d, float)
    loss = law(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))
    return Points(n, d, 6 * n * d, loss, np.arange(len(n)) if run is None else np.asarray(run))


def grid(sizes=6, tokens=6):
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(2e8, 2e10, tokens))
    return n.ravel(), d.ravel()


def profiles(ratios, budgets=(1e18, 1e19, 1e20)):
    c, ratio = (x.ravel() for x in np.meshgrid(budgets, ratios, indexing="ij"))
    return best(c) * ratio, c / 6 / (best(c) * ratio)


def curves(sizes=6, points_each=30):
    n, ratio = (x.ravel() for x in np.meshgrid(1e7 * 2.0 ** np.arange(sizes), np.geomspace(1, 160, points_each)))
    return n, n * ratio, np.unique(n, return_inverse=True)[1]


def ones(form):
    return np.ones(form.points.runs)


def write(path, groups, **more):
    """A CSV of groups of points, with columns that are the same in all rows."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["objective", "parameters", "parameters_total", "tokens", "loss", *more])
        for name, each in groups.items():
            rows.writerows(
                [name, n, 2 * n, d, loss, *more.values()] for n, d, loss in zip(each.n, each.d, each.loss, strict=True)
            )
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two objectives: one that fixes much, one of a single size."""
    n, d = grid()
    groups = {"clm": points(n, d, noise=0.005), "mlm": points(np.full(5, 1e8), np.geomspace(1e9, 1e10, 5), noise=0.001)}
    runs = read(write(tmp_path_factory.mktemp("runs") / "runs.csv", groups, status="finished"))
    return fit(runs, budgets=[1e18, 1e24], resamples=40, quiet=True)


def shown(table):
    console = Console(file=io.StringIO(), width=240)
    console.print(table)
    return console.file.getvalue()


def test_csv_and_parquet_are_read_alike(tmp_path):
    n, d = grid(3, 3)
    path = write(tmp_path / "runs.csv", {"clm": points(n, d)}, status="finished")
    rows = list(csv.DictReader(path.open()))
    typed = [{key: cell if key in ("objective", "status") else float(cell) for key, cell in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(typed), tmp_path / "runs.parquet")
    one, other = read(path), read(tmp_path / "runs.parquet")
    for name in ("n", "d", "c", "loss", "run"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.allclose(one.c, 6 * one.n * one.d) and one.flops == "6 N D"


def test_unfinished_rows_are_counted_and_left_out_whatever_is_in_them(tmp_path):
    (tmp_path / "runs.csv").write_text(
        "parameters,tokens,flops,loss,status\n1e6,1e7,7e13,5,finished\n1e6,1e7,,,failed\n1e6,2e7,1e14,4,running\n1e6,,,,failed\n"
    )
    runs = read(tmp_path / "runs.csv")
    assert runs.left_out == {"failed": 2, "running": 1}
    assert runs.c.tolist() == [7e13] and runs.flops == "column 'flops'" and runs.group.tolist() == ["all"]


def test_names_are_mapped_and_the_size_is_a_choice(tmp_path):
    (tmp_path / "runs.csv").write_text("parameters,parameters_total,tokens,val\n1e6,3e6,1e7,5\n")
    small, large = (read(tmp_path / "runs.csv", {"loss": "val"}, size) for size in SIZES)
    assert (small.n[0], large.n[0], large.c[0], small.loss[0]) == (1e6, 3e6, 6 * 3e6 * 1e7, 5)


def test_rows_of_a_run_are_points_of_one_curve(tmp_path):
    lines = ["a,1,1e6,1e7,5", "a,1,1e6,2e7,4", "a,2,1e6,1e7,5", "b,1,1e6,1e7,5", ",,1e6,1e7,5", ",,1e6,1e7,5"]
    (tmp_path / "runs.csv").write_text("\n".join(["run,seed,parameters,tokens,loss", *lines]))
    ((_, found),) = read(tmp_path / "runs.csv").groups()
    assert found.run.tolist() == [0, 0, 1, 2, 3, 4]
    assert found.ends().d.tolist() == [2e7, 1e7, 1e7, 1e7, 1e7]


def test_all_that_is_wrong_with_a_table_is_told_at_once(tmp_path):
    (tmp_path / "runs.csv").write_text("parameter_total,token,loss\n1,2,3\n1,2,abc\n1,2,\n1,2,-1\n1,2,inf\n")
    with pytest.raises(ValueError) as why:
        read(tmp_path / "runs.csv", size="parameters_total")
    lines = str(why.value).splitlines()
    assert "'parameters_total': did you mean 'parameter_total'?" in lines[0] and "Map 'parameters_total'" in lines[0]
    assert "'tokens': did you mean 'token'?" in lines[1]
    assert [line.split(", not")[0] for line in lines[2:6]] == [
        "runs.csv line 3: loss is 'abc'",
        "runs.csv line 4: loss is empty",
        "runs.csv line 5: loss is '-1'",
        "runs.csv line 6: loss is 'inf'",
    ]
    assert "status other than 'finished'" in lines[6]


@pytest.mark.parametrize(
    "text, options, told",
    [
        ("parameters_total,tokens,loss\n1,2,3\n", {}, "count N as 'parameters_total', which it has"),
        ("parameters,tokens,loss\n1,2,3\n", {"columns": {"los": "x"}}, "unknown column 'los': did you mean 'loss'?"),
        ("parameters,tokens,loss\n1,2,3\n", {"size": "total"}, "unknown size 'total'"),
        ("parameters,tokens,loss,status\n1,2,3,failed\n", {}, "no run is finished, only 1 failed"),
        ("parameters,tokens,loss\n", {}, "has no rows"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, text, options, told):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ValueError, match=told.replace("?", r"\?")):
        read(tmp_path / "runs.csv", **options)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is neither"):
        read(tmp_path / "runs.xlsx")
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path / "runs.csv")


@pytest.mark.parametrize("law, kind, truth", [
    (chinchilla, Parametric, {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA, "a": SHARE, "b": 1 - SHARE}),
    (kaplan, Kaplan, {"Nc": NC, "Dc": DC, "alpha_N": ALPHA_N, "alpha_D": ALPHA_D, "a": ALPHA_D / (ALPHA_N + ALPHA_D)}),
])  # fmt: skip
def test_planted_laws_of_size_and_tokens_come_back(law, kind, truth):
    form = kind(points(*grid(), law))
    found = form.values(form.solve(ones(form)))
    assert {name: float(found[name]) for name in truth} == pytest.approx(truth, rel=2e-3)


def test_planted_laws_of_one_quantity_come_back_from_the_runs_that_vary_it_alone():
    n, d = np.r_[np.geomspace(1e7, 1e9, 5), 3e7], np.r_[np.full(5, 1e11), 1e9]
    form = OfSize(points(n, d, lambda n, d: (8.8e13 / n) ** 0.076 + (d < 1e10))).taken()
    assert form.points.runs == 5 and form.title == "Kaplan L(N) at D = 100B"
    assert {k: float(v) for k, v in form.values(form.solve(ones(form))).items()} == pytest.approx(
        {"alpha_N": 0.076, "Nc": 8.8e13}
    )
    form = OfTokens(points(d, n, lambda n, d: (5.4e13 / d) ** 0.095)).taken()
    assert {k: float(v) for k, v in form.values(form.solve(ones(form))).items()} == pytest.approx(
        {"alpha_D": 0.095, "Dc": 5.4e13}
    )


def test_seeds_of_one_budget_are_no_counts_of_tokens():
    """Their rows are padded differently."""
    n, d = np.repeat(np.geomspace(1e7, 1e9, 4), 3), np.tile(1e9 * np.array([0.998, 1.0, 1.003]), 4)
    with pytest.raises(Unidentified, match="takes 3 token counts at the same size; at most 1 does"):
        OfTokens(points(n, d, lambda n, d: 3 + (1e9 - d) / 1e9)).taken().check()


def test_the_envelope_of_curves_has_the_planted_exponent():
    n, d, run = curves()
    form = Envelope(points(n, d, run=run))
    theta = form.solve(ones(form))
    assert theta[1] == pytest.approx(SHARE, rel=2e-3)
    assert form.optimum(theta, 1e19) == pytest.approx(best(1e19), rel=0.01)


def test_iso_flop_minima_have_the_planted_exponent():
    form = IsoFlop(points(*profiles(np.geomspace(0.35, 2.8, 7))))
    theta = form.solve(ones(form))
    assert theta[1] == pytest.approx(SHARE, rel=1e-6)
    assert form.optimum(theta, 1e19) == pytest.approx(best(1e19), rel=0.02)
    assert form.span() == pytest.approx((1e18, 1e20))


def test_iso_flop_profiles_are_read_off_curves_where_no_budget_is_shared():
    n, d, run = curves()
    form = IsoFlop(points(n, d, run=run))
    form.check()
    assert form.solve(ones(form))[1] == pytest.approx(SHARE, rel=0.02)
    assert any("read off" in note for note in form.notes())


@pytest.mark.parametrize("kind, theta", [(Parametric, [0.3, 0.4, -0.5, -0.2, 0.6]), (Kaplan, [0.08, 0.11, 9.0, 8.0])])
def test_derivatives_are_those_of_the_law(kind, theta):
    form = kind(points(*grid(3, 3)))
    n, d, _ = form.logs
    slopes = form.evaluate(np.array(theta), n, d)[1]
    assert np.allclose(approx_fprime(np.array(theta), lambda t: form.evaluate(t, n, d)[0]), slopes.T, atol=1e-5)


@pytest.mark.parametrize("kind, law", [(Parametric, chinchilla), (Kaplan, kaplan)])
def test_the_optimum_is_the_lowest_loss_of_the_budget(kind, law):
    form = kind(points(*grid(), law))
    theta = form.solve(ones(form))
    found = minimize_scalar(lambda n: law(np.exp(n), 1e20 / 6 / np.exp(n)), bounds=(10, 30), method="bounded")
    assert form.optimum(theta, 1e20) == pytest.approx(np.exp(found.x), rel=5e-3)
    assert form.best_loss(theta, 1e20) == pytest.approx(found.fun, rel=1e-4)
    both = form.best_loss(np.stack([theta, theta]), 1e20)
    assert both.shape == (2,) and both[1] == pytest.approx(found.fun, rel=1e-4)


def test_one_outlier_hardly_moves_a_law():
    data = points(*grid())
    data.loss[7] *= 1.5
    form = Parametric(data)
    assert form.values(form.solve(ones(form)))["a"] == pytest.approx(SHARE, rel=5e-3)


def test_several_runs_of_a_point_count_as_often_as_they_are():
    data = points(*grid(), noise=0.01)
    twice = data.where(np.repeat(np.arange(36), 2))
    weighted = Parametric(data).solve(np.full(36, 2.0))
    form = Parametric(Points(twice.n, twice.d, twice.c, twice.loss, np.arange(72)))
    assert form.values(form.solve(ones(form)))["a"] == pytest.approx(float(Parametric(data).values(weighted)["a"]), rel=1e-4)


@pytest.mark.parametrize("key, data, told", [
    ("chinchilla_2", points(*profiles(np.geomspace(0.3, 3, 6), [1e18])), "4 sizes at each of 2 budgets .*: 1 budget has them"),
    ("chinchilla_2", points(*profiles(np.geomspace(4, 20, 6))), "beyond the smallest size, 322M; 1e19"),
    ("chinchilla_2", points(*profiles(np.geomspace(0.05, 0.3, 6))), "beyond the largest size"),
    ("chinchilla_2", points(*profiles(np.geomspace(0.3, 3, 6)), lambda n, d: 3 - np.log(n / 1e9) ** 2 / 1e3), "not bend up"),
    ("chinchilla_1", points(*grid(2, 6)), "takes 3 sizes with at least 2 points each; there are 2"),
    ("chinchilla_1", points(*grid(3, 6), lambda n, d: chinchilla(1e9 + 0 * n, d)), "train neighbouring sizes"),
    ("chinchilla_3", points(*grid(2, 2)), r"6 runs \(there are 4\), 3 sizes \(there are 2\), 3 token counts \(there are 2\)"),
    ("chinchilla_3", points(np.geomspace(1e7, 1e9, 8), 20 * np.geomspace(1e7, 1e9, 8)), "the size of a run tells its tokens"),
    ("kaplan_nd", points([1e8] * 5, np.geomspace(1e9, 1e10, 5)), r"3 sizes \(there is 1\)"),
    ("kaplan_n", points(*profiles(np.geomspace(0.3, 3, 6))), "3 sizes trained on the same number of tokens; at most 1 does"),
])  # fmt: skip
def test_what_a_form_takes_is_said(key, data, told):
    (form,) = (form for form in forms(data) if form.key == key)
    with pytest.raises(Unidentified, match=told):
        form.check()
        form.solve(ones(form))


@pytest.mark.parametrize("key, law, told", [
    ("chinchilla_3", lambda n, d: 1.69 + 406.4 / n**0.34, "beta reaches its bound of|does not depend on D"),
    ("kaplan_n", lambda n, d: 2 + n / 1e10, "does not reliably fall with N"),
])  # fmt: skip
def test_solutions_that_should_not_be_believed_have_no_numbers(tmp_path, key, law, told):
    runs = read(write(tmp_path / "runs.csv", {"clm": points(*grid(5, 4), law, noise=0.002)}))
    (group,) = fit(runs, resamples=20, quiet=True).groups
    assert re.search(told, group.fit(key).problem)
    assert not group.fit(key).values and group.fit(key).as_json()["values"] == {}


def test_an_irreducible_loss_that_is_not_fixed_is_not_printed(tmp_path):
    law = points(*grid(), lambda n, d: 2e3 / n**0.3 + 2e3 / d**0.3, noise=0.002)
    (group,) = fit(read(write(tmp_path / "runs.csv", {"clm": law})), resamples=40, quiet=True).groups
    found = group.fit("chinchilla_3")
    assert not found.problem and "E" not in found.values and "alpha" in found.values
    assert any(note.startswith("E is not fixed") for note in found.notes)


def test_groups_that_fix_nothing_are_refused_with_what_each_form_takes(tmp_path):
    runs = read(write(tmp_path / "runs.csv", {"clm": points([1e8] * 2, [1e9, 2e9]), "mlm": points([1e8], [1e9])}))
    with pytest.raises(ValueError) as why:
        fit(runs, quiet=True)
    assert "clm: nothing can be fitted (2 runs, all of one size, N = 100M, 2 token counts)" in str(why.value)
    assert "mlm: nothing can be fitted (1 run, all of one size" in str(why.value)
    assert str(why.value).count("Chinchilla approach 3: takes 6 runs") == 2


def test_wrong_arguments_are_told_at_once(tmp_path):
    runs = read(write(tmp_path / "runs.csv", {"clm": points(*grid())}))
    with pytest.raises(ValueError, match=r"budget must be positive.*resamples must be at least 20.*held_out must be above 0"):
        fit(runs, budgets=[-1], resamples=1, held_out=1.0, quiet=True)


@pytest.mark.parametrize("kind, law, truth", [
    (Parametric, chinchilla, {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA, "a": SHARE}),
    (Kaplan, kaplan, {"Nc": NC, "Dc": DC, "alpha_N": ALPHA_N, "alpha_D": ALPHA_D}),
])  # fmt: skip
def test_intervals_hold_what_is_planted(kind, law, truth):
    held, wide = [], []
    for seed in range(3):
        found = fit_alone(kind(points(*grid(), law, noise=0.005, seed=seed)), seed)
        for name, true in truth.items():
            value, (low80, high80), (low95, high95) = found.values[name]
            assert low95 <= low80 < high80 <= high95
            held.append(low95 <= true <= high95)
            wide.append(np.log(high95 / low95) / max(1, abs(np.log(value))))
        assert found.rms == pytest.approx(0.005, rel=0.4)
    assert np.mean(held) >= 0.8 and max(wide) < 0.5, (held, wide)


def fit_alone(form, seed):
    theta, rng, runs = form.solve(ones(form)), np.random.default_rng(seed), form.points.runs
    draws = [form.solve(np.bincount(rng.integers(0, runs, runs), minlength=runs).astype(float), theta) for _ in range(60)]
    return Fit(form, theta=theta, draws=np.array(draws))


def test_the_runs_of_most_compute_are_predicted_from_the_rest(report):
    held = report.groups[0].fit("chinchilla_3").held_out
    c = np.sort(report.groups[0].points.c)
    assert isinstance(held, HeldOut) and 7 <= held.runs <= 11 and held.beyond == c[-1] / c[-held.runs - 1]
    assert (
        abs(held.mean.value) < 0.01
        and held.absolute < 0.01
        and held.mean.within_95[0] < held.mean.value < held.mean.within_95[1]
    )
    assert abs(held.worst) >= held.absolute


def test_runs_of_the_same_compute_are_held_out_together(tmp_path):
    n, d = grid(4, 4)
    data = points(np.repeat(n, 2), np.repeat(d, 2), noise=0.002)
    (group,) = fit(read(write(tmp_path / "runs.csv", {"clm": data})), resamples=20, held_out=0.01, quiet=True).groups
    assert group.fit("chinchilla_3").held_out.runs == 2


def test_runs_of_a_budget_are_held_out_together_although_steps_are_whole_numbers(tmp_path):
    """An iso-FLOP ladder: tokens of a budget are those of whole steps, more than a percent apart where steps are few."""
    n, d = profiles(np.geomspace(0.3, 3, 5))
    step = d.min() / 60
    data = points(n, np.ceil(d / step) * step, noise=0.002)
    assert len(np.unique(data.c)) > 10, "the budgets are not quite the same"
    (group,) = fit(read(write(tmp_path / "runs.csv", {"clm": data})), resamples=20, held_out=0.1, quiet=True).groups
    held = group.fit("chinchilla_3").held_out
    assert held.runs == 5 and held.beyond > 9


def test_a_held_out_error_that_cannot_be_had_is_explained(report):
    (group,) = (group for group in report.groups if group.name == "mlm")
    assert isinstance(group.fit("kaplan_d").held_out, HeldOut)
    assert group.fit("chinchilla_3").held_out is None
    assert any("5 runs only" in note for _, note in group.notes())


def test_budgets_beyond_the_data_are_loud(report):
    inside, outside = (
        next(o for o in report.groups[0].optima if o.form.key == "chinchilla_3" and o.c == c) for c in (1e18, 1e24)
    )
    assert inside.warning == "" and inside.n.within_95[0] < best(1e18) < inside.n.within_95[1]
    assert outside.warning == f"{1e24 / report.groups[0].points.c.max():.3g} TIMES BEYOND THE DATA"
    assert outside.n.value * outside.d.value * 6 == pytest.approx(1e24)
    assert outside.per_parameter.value == pytest.approx(outside.d.value / outside.n.value)
    assert outside.loss.value == pytest.approx(chinchilla(best(1e24), 1e24 / 6 / best(1e24)), rel=0.05)


def test_flops_of_the_file_are_used_as_they_are(tmp_path):
    n, d = grid(5, 5)
    loss = chinchilla(n, d) * np.exp(0.002 * np.random.default_rng(0).normal(size=25))
    flops = 8 * n * d * np.where(n > 5e8, 1.5, 1)
    with (tmp_path / "runs.csv").open("w") as file:
        file.write("parameters,tokens,flops,loss\n")
        file.writelines(f"{','.join(map(str, row))}\n" for row in zip(n, d, flops, loss, strict=True))
    (group,) = fit(read(tmp_path / "runs.csv"), [1e19], 20, quiet=True).groups
    found = next(each for each in group.optima if each.form.key == "chinchilla_3")
    assert 8 * found.n.value * found.d.value == pytest.approx(1e19)
    assert found.n.value == pytest.approx(best(1e19 * 6 / 8), rel=0.1)
    assert ("", "C is 8 to 12 times N D; D_opt takes the median, 8") in group.notes()


def test_a_budget_below_the_data_is_loud_too(report):
    form = report.groups[0].fit("chinchilla_3").form
    assert form.span()[0] > 1e16
    (low,) = (o for o in fit(report.runs, [1e15], 20, quiet=True).groups[0].optima if o.form.key == "chinchilla_3")
    assert low.warning == f"{form.span()[0] / 1e15:.3g} TIMES BELOW THE DATA"


def test_the_seed_fixes_the_intervals_and_other_groups_do_not_move_them(report, tmp_path):
    first = report.groups[1].fit("kaplan_d")
    alone = read(write(tmp_path / "runs.csv", {"mlm": report.groups[1].points}))
    again, other = (fit(alone, resamples=40, seed=seed, quiet=True).groups[0].fit("kaplan_d") for seed in (0, 1))
    assert np.allclose(again.draws, first.draws) and again.values == first.values
    assert not np.allclose(other.draws, first.draws) and np.allclose(other.theta, first.theta)


def test_the_bootstrap_draws_runs_not_points(tmp_path):
    n, d, run = curves()
    data = points(n, d, run=run)
    with (tmp_path / "runs.csv").open("w") as file:
        file.write("run,parameters,tokens,loss\n")
        file.writelines(f"{r},{n},{d},{loss}\n" for r, n, d, loss in zip(data.run, data.n, data.d, data.loss, strict=True))
    ((_, found),) = read(tmp_path / "runs.csv").groups()
    assert found.runs == 6 and len(found.n) == 180
    assert Parametric(found.ends()).points.runs == 6
    weight = np.array([1.0, 0, 1, 1, 1, 1])
    assert Envelope(found).solve(weight)[1] != pytest.approx(Envelope(found).solve(np.ones(6))[1], rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_every_table_and_the_json_say_what_n_counts(report, tmp_path, size):
    runs = read(report.runs.path, size=size)
    found = fit(runs, budgets=[1e24], resamples=20, quiet=True)
    tables = found.tables()
    assert len(tables) >= 6 and all(f"N: {SIZES[size]}." in shown(table) for table in tables)
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["size"] == {"column": size, "meaning": SIZES[size]}
    assert [group["objective"] for group in told["groups"]] == ["clm", "mlm"]
    third = next(each for each in told["groups"][0]["fits"] if each["form"] == "chinchilla_3")
    assert set(third["values"]) == {"E", "A", "B", "alpha", "beta", "a", "b"} and third["problem"] is None
    assert "1e24" in shown(tables[2]) and "TIMES BEYOND THE DATA" in shown(tables[2])


def test_numbers_for_people():
    assert [short(x) for x in (999, 1000, 11.44e6, 999.6e6, 1.2e12, 5e16)] == ["999", "1K", "11.4M", "1B", "1.2T", "5e16"]
    assert [power(x) for x in (1e19, 1.25e19, 9.96e18)] == ["1e19", "1.2e19", "1e19"]


def test_a_sheet_per_objective_with_units_on_every_axis(report, tmp_path):
    paths = draw(report, tmp_path / "pictures")
    assert [path.name for path in paths] == ["scaling-clm.png", "scaling-mlm.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in paths)
    figure = sheet(report, report.groups[0])
    panels = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(panels) == 6 and f"N: {SIZES['parameters']}" in figure.texts[-1].get_text()
    labels = [label for axes in panels for label in (axes.get_xlabel(), axes.get_ylabel())]
    assert all("(" in label and ")" in label for label in labels), labels


def test_the_pictures_hold_the_points_the_curves_and_the_minima(tmp_path):
    runs = read(write(tmp_path / "runs.csv", {"a/b c": points(*profiles(np.geomspace(0.35, 2.8, 6)), noise=0.002)}))
    report = fit(runs, resamples=20, quiet=True)
    assert [path.name for path in draw(report, tmp_path)] == ["scaling-a_b_c.png"]
    size, compute, valleys, residuals, n_opt, _ = (axes for axes in sheet(report, report.groups[0]).axes if axes.get_xlabel())
    assert len(size.collections[0].get_offsets()) == len(compute.collections[0].get_offsets()) == 18
    assert len(size.lines) == 6 and len(valleys.lines) == 3
    minima = [each.get_offsets()[0] for each in valleys.collections if len(each.get_offsets()) == 1]
    assert np.allclose([x for x, _ in minima], best(np.array([1e18, 1e19, 1e20])), rtol=0.15)
    assert len(residuals.collections[0].get_offsets()) == 18
    names = [text.get_text() for text in n_opt.get_legend().get_texts()]
    assert any(name.startswith("Chinchilla approach 2: C^0.4") for name in names), names


def test_a_sheet_says_what_is_not_there(report):
    (group,) = (group for group in report.groups if group.name == "mlm")
    words = [text.get_text() for axes in sheet(report, group).axes for text in axes.texts]
    assert any("No profiles" in text for text in words) and sum("No form tells" in text for text in words) == 2
