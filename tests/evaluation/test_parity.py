"""The claim: any objective under any layout is the same computation. One case of each cell, on real gloo ranks."""

import dataclasses

import pytest
import torch

from ds_pretrain.data.dataset import Cursor
from ds_pretrain.evaluation import influence, parity
from ds_pretrain.evaluation.parity import Case, Result, cases, compare, model_for, objective_for, plans, run
from ds_pretrain.evaluation.parity_table import Record, left_out, markdown
from ds_pretrain.evaluation.parity_table import table as drawn
from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.models.transformer import Network
from ds_pretrain.objectives import REGISTRY
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.shards import shards
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training.engine import build_for

STEPS = {1: 20, 2: 10, 4: 2, 8: 1}
"""Eight ranks on two cores take their time; `ds-pretrain parity` does 20 everywhere."""
SHARE = {1: 1, 2: 4, 4: 9, 8: 12}
"""Of the cells of a world size every so manieth is run, in diagonals: every objective and every layout is among them."""


def chosen(world):
    legal = parity.thinned(cases(world))
    names, layouts = list(REGISTRY), list(dict.fromkeys(case.layout for case in legal))
    return [c for c in legal if (names.index(c.objective) + layouts.index(c.layout)) % SHARE[world] == 0]


@pytest.mark.parametrize("world", STEPS)
def test_every_objective_and_every_layout_trains_the_reference(world):
    todo = chosen(world)
    assert {case.objective for case in todo} == set(REGISTRY)
    assert {case.layout for case in todo} == {case.layout for case in cases(world, ["clm"])}
    failed = [r for r in spawn(world, parity.run_cases, todo, STEPS[world]) if not r.passed]
    assert not failed, markdown(failed)


def test_every_stage_accumulation_and_recomputation_trains_the_reference():
    legal = [case for case in cases(2, ["mlm"]) if case.illegal is None and case.precision == "fp32"]
    todo = [case for case in legal if case.recompute == (case.accumulation == 1)]
    results = spawn(2, parity.run_cases, todo, 2)
    assert len(results) == 34 and not [r for r in results if not r.passed], markdown(results)


def test_a_run_of_a_few_cells_is_what_was_asked_for():
    results = run([1], ["sop", "clm"], ["1"], steps=1, quick=True)
    assert [(r.case.objective, r.case.layout) for r in results] == [("sop", "1"), ("clm", "1")] and results[0].passed


def test_the_table_names_every_layout():
    found = {case.layout for world in (1, 2, 4, 8) for case in cases(world, ["clm"])}
    assert found >= {"1", "DP2", "TP2", "TP2+SP", "PP2", "TP2xPP2", "TP2xDP2", "PP2xDP2", "TP2xPP2xDP2", "TP2xPP2+SPxDP2"}


def test_a_few_cells_use_every_setting():
    few = [case for world in STEPS for case in chosen(world)]
    for axis in ("stage", "accumulation", "recompute", "precision"):
        assert {getattr(case, axis) for case in few} == {getattr(case, axis) for case in cases(1, ["clm"])}, axis


@pytest.mark.parametrize("objective", REGISTRY)
def test_the_reference_and_the_engine_have_the_same_parameters(mesh, objective):
    made, shape = objective_for(objective), model_for(objective)
    network = Network(build_for(made, shape, mesh, parity.SEQ_LEN))
    assert {s.name: s.shape for s, _ in shards(network, 0, 1)} == parameter_shapes(shape, made)


def test_every_cell_that_is_left_out_has_a_reason():
    told = left_out(cases(4))
    assert sum(int(line.split()[0]) for line in told) == sum(case.illegal is not None for case in cases(4))
    assert any("bf16 with ZeRO stage 0" in line for line in told) and any(
        "ZeRO stage 2 does not run with a pipeline" in x for x in told
    )


def test_an_unknown_name_is_told_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'simcse'"):
        run([1], ["simsce"])
    with pytest.raises(ValueError, match=r"did you mean 'TP2\+SP'"):
        run([2], [], ["TP2SP"])


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_rows_can_be_dealt_out_on_any_world(world):
    for case in cases(world, ["clm"]):
        assert case.rows % (case.plan.data(world) * case.accumulation) == 0
    assert ParallelPlan() in plans(world)


def test_a_wrong_gradient_or_loss_fails_the_case():
    case = Case("clm", ParallelPlan(), 1, 1, 1)
    truth = {"a": torch.ones(4), "b": torch.ones(4)}
    assert compare(case, [1.0], truth, [1.0], truth).passed
    assert not compare(case, [1.0 + 2e-6], truth, [1.0], truth).passed
    wrong = compare(case, [1.0], {**truth, "b": torch.ones(4) * (1 + 2e-5)}, [1.0], truth)
    assert not wrong.passed and wrong.worst == "b"
    assert not compare(case, [1.0], {"a": truth["a"]}, [1.0], truth).passed
    assert not compare(case, [float("nan")], truth, [1.0], truth).passed


def test_losing_the_global_divisor_is_seen(mesh, monkeypatch):
    """A mutant: the mean of per-micro-batch means that other trainers compute."""
    from ds_pretrain.training import engine

    def mean_of_means(sums, totals, heads, scale):
        (head,) = heads
        return sums[head.name] / 40

    monkeypatch.setattr(engine, "step_loss", mean_of_means)
    case = Case("mlm", ParallelPlan(), 1, 1, 4)
    result = parity.measure(case, 3, lambda objective, rows: parity.expected(objective, rows, 3))
    assert not result.passed and not result.strayed


def groups_after(engines):
    """On the ranks: process groups that are there after each of so many engines."""
    counts = []
    for _ in range(engines):
        parity.engine_for(Case("clm", ParallelPlan(pipeline=2), 2, 1, 1))
        counts.append(torch.distributed.get_pg_count())
    return counts


def test_engines_made_one_after_the_other_share_their_groups():
    first, second, third = spawn(2, groups_after, 3)
    assert first == second == third


def test_results_are_rendered():
    good = Result(Case("clm", ParallelPlan(tensor=2), 4, 1, 1), 1e-8, 1e-7, "word.weight")
    bad = dataclasses.replace(good, loss_error=1.0)
    assert "1 of 2 cases pass" in str(drawn([good, bad]).caption)
    assert "| clm | TP2xDP2 | fp32 | 1 | 1 | no | 1.000e-08 | 1.000e-07 | word.weight | 0 | 0.00 | yes |" in markdown([good])


def test_a_table_goes_on_where_its_file_stops(tmp_path):
    """Of three cases one is in the file, one is there as failed, one is missing: the first alone is not measured again."""
    record, asked = Record(tmp_path / "parity.md", 1), (["clm", "mlm", "sop"], ["1"])
    first = run([1], ["clm", "mlm"], ["1"], steps=1, quick=True, record=record)
    kept, failed = first[0], dataclasses.replace(first[1], gradient_error=1.0)
    record.path.unlink()
    record.start()
    for result in (dataclasses.replace(kept, seconds=77.0), failed):
        record.add(result)
    results = run([1], *asked, steps=1, quick=True, record=record)
    record.finish()
    assert [r.case.objective for r in results] == ["clm", "mlm", "sop"] and all(r.passed for r in results)
    assert [r.seconds == 77 for r in results] == [True, False, False]
    text = record.path.read_text()
    assert "3 of 3 cases pass" in text and text.count("| 77.00 |") == 1 and set(record.passed()) == {r.case for r in results}
    with pytest.raises(ValueError, match="Give --out another name"):
        run([1], *asked, steps=2, record=Record(record.path, 2))


@pytest.mark.parametrize("world", STEPS)
def test_a_line_of_the_table_names_its_case(world, tmp_path):
    record, every = Record(tmp_path / "parity.md", 1), cases(world, ["clm"])
    record.start()
    for case in every:
        record.add(Result(case, 0.0, 0.0, "word.weight"))
    assert list(record.passed()) == every


def cut(batch, row, kept):
    """The batch with only so many targets left in a row."""
    target = batch.targets["clm"]
    weights = target.weights.clone()
    weights[row] = 0
    weights[row, :kept] = 1
    return dataclasses.replace(batch, targets={"clm": dataclasses.replace(target, weights=weights, total=float(weights.sum()))})


def unequal_step(case, kept):
    """On the ranks: loss and gradients of a step in which the first of two rows has few targets or none."""
    engine, data = parity.engine_for(case), parity.samples("clm", 128)
    rows = data.rows(Cursor(), 2)[0]
    mine = data.collate([rows[engine.mesh.at.data]]) if engine.mesh.data_size > 1 else data.collate(rows)
    batch = cut(mine, 0, kept) if engine.mesh.at.data == 0 else mine
    result = engine.step([batch], 1, parity.LR)
    return result.loss, result.totals["clm"], parity._first_gradients(engine)


def unequal_steps(cases):
    """On the ranks: each case with one target and with none on the first data rank."""
    return [[unequal_step(case, kept) for case in cases] for kept in (1, 0)]


def test_targets_that_differ_by_a_hundred_times_weigh_alike():
    """A data rank with a single target, or none, beside one with more than a hundred: DP2, PP2 x DP2, CP2 x DP2."""
    alone, apart = Case("clm", ParallelPlan(), 1, 1, 1), Case("clm", ParallelPlan(), 2, 1, 1)
    both = [Case("clm", plan, 4, 1, 1) for plan in (ParallelPlan(pipeline=2), ParallelPlan(context=2))]
    truths, *worlds = (spawn(cases[0].world, unequal_steps, cases) for cases in ([alone], [apart], both))
    for kept, ((loss, total, truth),) in enumerate(truths):
        assert total > 100
        for again, counted, found in [result for world in worlds for result in world[kept]]:
            assert counted == total and compare(alone, [again], found, [loss], truth).passed


def stray_where_sight_is_wrong():
    """On one process: a batch whose pattern is another than the one that the network is given."""
    engine, data = parity.engine_for(Case("clm", ParallelPlan(), 1, 1, 1)), parity.samples("clm", 128)
    batch = data.collate(data.rows(Cursor(), 4)[0])
    joined = dataclasses.replace(batch.attention, segment=batch.attention.segment.clamp(max=1))
    apart = influence.strayed(engine, batch)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(influence, "_closure", lambda mask, layers: joined.dense())
        wide = influence.strayed(engine, batch)
        patched.setattr(influence, "_closure", lambda mask, layers: torch.eye(mask.shape[1], dtype=torch.bool).expand_as(mask))
        narrow = influence.strayed(engine, batch)
    return apart, wide, narrow


def test_sight_that_is_lost_or_leaks_is_counted():
    apart, wide, narrow = spawn(1, stray_where_sight_is_wrong)
    assert apart == 0 and wide > 0 and narrow > 0
