"""The claim: any layout is the same computation. The whole table, on real gloo ranks started once per world size."""

import dataclasses

import pytest
import torch

from ds_pretrain.evaluation import parity
from ds_pretrain.evaluation.parity import Case, Result, cases, compare, markdown, model_for, parameter_shapes, run, table
from ds_pretrain.models.transformer import Build, Network
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.shards import shards

STEPS = 20


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_trains_the_reference(world):
    results = run([world], ["clm", "mlm"], STEPS)
    assert len(results) == {1: 16, 2: 52, 4: 24}[world]
    failed = [r for r in results if not r.passed]
    assert not failed, markdown(failed)
    print(markdown(results))


def test_the_table_names_every_layout_of_the_issue():
    found = {case.layout for world in (1, 2, 4) for case in cases(world, ["clm"])}
    assert found == {"1", "DP2", "TP2", "TP2+SP", "PP2", "TP2xPP2", "TP2xDP2", "PP2xDP2"}


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_the_reference_and_the_engine_have_the_same_parameters(mesh, objective):
    shape = model_for(objective)
    network = Network(Build(shape, mesh, "mixed", parity.SEQ_LEN))
    assert {s.name: s.shape for s, _ in shards(network, 0, 1)} == parameter_shapes(shape)


def test_a_wrong_gradient_or_loss_fails_the_case():
    case = Case("clm", ParallelPlan(), 1, 1, 1)
    truth = {"a": torch.ones(4), "b": torch.ones(4)}
    assert compare(case, [1.0], truth, [1.0], truth).passed
    assert not compare(case, [1.0 + 2e-6], truth, [1.0], truth).passed
    wrong = compare(case, [1.0], {**truth, "b": torch.ones(4) * (1 + 2e-5)}, [1.0], truth)
    assert not wrong.passed and wrong.worst == "b"
    assert not compare(case, [1.0], {"a": truth["a"]}, [1.0], truth).passed


def test_losing_the_global_divisor_is_seen(mesh, monkeypatch):
    """A mutant: the mean of per-micro-batch means that other trainers compute."""
    from ds_pretrain.training import engine

    def mean_of_means(sums, totals, heads, scale):
        (head,) = heads
        return sums[head.name] / 40

    monkeypatch.setattr(engine, "step_loss", mean_of_means)
    case = Case("mlm", ParallelPlan(), 1, 1, 4)
    assert not compare(case, *parity.observed(case, 3), *parity.expected("mlm", 3)).passed


def test_results_are_rendered():
    good = Result(Case("clm", ParallelPlan(tensor=2), 4, 1, 1), 1e-8, 1e-7, "word.weight")
    bad = dataclasses.replace(good, loss_error=1.0)
    assert "1 of 2 cases pass" in str(table([good, bad]).caption)
    assert "| clm | TP2xDP2 | 1 | 1 | 1.0e-08 | 1.0e-07 | word.weight | yes |" in markdown([good])
