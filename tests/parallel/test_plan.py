"""Arithmetic of layouts."""

import dataclasses

import pytest

from ds_pretrain.parallel.plan import Coordinate, ParallelPlan, stage_of_layer


@pytest.mark.parametrize(
    ("plan", "world", "data"),
    [((1, 1), 1, 1), ((1, 1), 8, 8), ((2, 1), 8, 4), ((2, 2), 8, 2), ((4, 2), 8, 1), ((1, 3), 6, 2)],
)
def test_what_is_left_of_the_world_is_data_parallel(plan, world, data):
    assert ParallelPlan(tensor=plan[0], pipeline=plan[1]).data(world) == data


@pytest.mark.parametrize("world", [1, 2, 3, 5, 6])
def test_a_world_that_does_not_divide_is_refused_with_the_numbers_and_the_fix(world):
    message = rf"{world} ranks cannot be divided into parallel.tensor 2 x parallel.pipeline 2: start a multiple of 4 ranks"
    with pytest.raises(ValueError, match=message):
        ParallelPlan(tensor=2, pipeline=2).data(world)
    with pytest.raises(ValueError, match=message):
        ParallelPlan(tensor=2, pipeline=2).coordinate(0, world)


def test_tensor_counts_fastest_then_data_and_pipeline_is_outermost():
    at = [ParallelPlan(tensor=2, pipeline=2).coordinate(rank, 8) for rank in range(8)]
    assert at == [Coordinate(p, d, 0, t) for p in range(2) for d in range(2) for t in range(2)]


@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("data", [1, 2, 5])
def test_every_place_is_taken_once(tensor, pipeline, data, context):
    world = tensor * pipeline * data * context
    plan = ParallelPlan(tensor=tensor, pipeline=pipeline, context=context)
    at = [plan.coordinate(rank, world) for rank in range(world)]
    assert len(set(at)) == world
    assert max(at) == Coordinate(pipeline - 1, data - 1, context - 1, tensor - 1)
    numbers = [((c.pipeline * data + c.data) * context + c.context) * tensor + c.tensor for c in at]
    assert numbers == list(range(world))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("context", [1, 2])
def test_the_grid_is_the_one_deepspeed_means(tensor, pipeline, context):
    """Context ranks are data ranks to DeepSpeed."""
    topology = pytest.importorskip("deepspeed.runtime.pipe.topology")
    plan, world = ParallelPlan(tensor=tensor, pipeline=pipeline, context=context), tensor * pipeline * context * 2
    grid = topology.PipeModelDataParallelTopology(pipeline, tensor, 2 * context)
    for rank in range(world):
        place, at = grid.get_coord(rank), plan.coordinate(rank, world)
        assert (at.pipeline, at.data * context + at.context, at.tensor) == (place.pipe, place.data, place.model)


def test_a_plan_is_read_as_people_write_it():
    names = {
        ParallelPlan(): "1",
        ParallelPlan(tensor=2): "TP2",
        ParallelPlan(pipeline=4): "PP4",
        ParallelPlan(tensor=2, pipeline=4): "TP2xPP4",
        ParallelPlan(tensor=2, sequence=True): "TP2+SP",
        ParallelPlan(tensor=2, context=4, pipeline=2): "TP2xCP4xPP2",
    }
    assert {plan: str(plan) for plan in names} == names


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelPlan().tensor = 2


@pytest.mark.parametrize("layers", range(1, 14))
@pytest.mark.parametrize("stages", range(1, 6))
def test_layers_go_to_stages_in_order_and_as_evenly_as_can_be(layers, stages):
    stage = stage_of_layer(layers, stages)
    counts = [stage.count(s) for s in range(stages)]
    assert len(stage) == layers and stage == sorted(stage)
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


def test_the_remainder_goes_to_the_first_stages():
    assert stage_of_layer(7, 3) == [0, 0, 0, 1, 1, 2, 2]
