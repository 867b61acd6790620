"""Every seeded bug is seen at step 1 or 2: otherwise parity proves nothing."""

import pytest

from ds_pretrain.evaluation import mutants, parity
from ds_pretrain.evaluation.mutants import MUTANTS, Caught, table
from ds_pretrain.parallel.spawn import spawn


@pytest.fixture(scope="module")
def caught():
    return {result.mutant: result for result in mutants.run()}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(caught, name):
    assert caught[name].by is not None


def test_there_are_enough_of_them_and_all_checks_are_used(caught):
    assert len(MUTANTS) >= 20
    assert {by.by.split(" of ")[0] for by in caught.values()} == {"agreement", "gradient", "loss"}


def sound(names):
    """The cases of the mutants without their bugs."""
    return [mutants.caught_by(mutants.Mutant(name, MUTANTS[name].case, mutants.contextmanager(nothing))) for name in names]


def nothing():
    yield


@pytest.mark.parametrize("world", sorted({each.case.world for each in MUTANTS.values()}))
def test_without_its_bug_no_case_is_caught(world):
    names = {each.case: name for name, each in MUTANTS.items() if each.case.world == world}  # one of each case
    assert set(spawn(world, sound, list(names.values()))) == {None}


def test_a_mutant_that_nothing_sees_is_red():
    case = parity.Case("clm", parity.ParallelPlan(), 1, 1, 1)
    drawn = table([Caught("seen", case, "gradient"), Caught("unseen", case, None)])
    assert drawn.rows[1].style == "bold red" and "1 of 2 caught" in str(drawn.caption)
