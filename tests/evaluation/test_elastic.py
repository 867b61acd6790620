"""A checkpoint goes on under another layout, stage and precision as if nothing had changed; all pairs by `parity --resume`."""

from ds_pretrain.evaluation import elastic
from ds_pretrain.evaluation.elastic import CASES, Resumed, table
from ds_pretrain.parallel.plan import ParallelPlan

FEW = [case for case in CASES if case.plan in (ParallelPlan(pipeline=2), ParallelPlan(context=2)) or case.precision == "bf16"]


def test_pairs_of_layouts_stages_and_precisions_go_on_alike():
    results = elastic.run(8, FEW)
    assert len(results) == len(FEW) ** 2 == 9 and all(result.passed for result in results), [*results]
    assert {result.limit for result in results} == {1e-6, 3e-2}
    exact = [result for result in results if result.limit == 1e-6]
    assert len(exact) == 4 and "9 of 9 pairs pass" in str(table(results, 8).caption)


def test_a_pair_that_strays_is_red():
    drawn = table([Resumed(CASES[0], CASES[0], 1e-5)], 2)
    assert "FAIL" in next(iter(drawn.columns[1].cells)) and "0 of 1 pairs pass" in str(drawn.caption)
