import os

import pytest
import torch

from ds_pretrain.parallel.comm import DataComm
from ds_pretrain.parallel.cross_entropy import argmax, nll
from ds_pretrain.parallel.launch import place
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}, (5, 8, 2)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            (1, 2, 1),
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "9"}, (0, 2, 0)),
    ],
)  # fmt: skip
def test_every_launcher_tells_the_place(environ, expected):
    assert place(environ) == expected


def test_dropout_streams_are_a_function_of_seed_and_step(mesh):
    mesh.seed(1, 5)
    first = torch.rand(4)
    torch.rand(100)
    mesh.seed(1, 5)
    assert torch.equal(torch.rand(4), first)
    mesh.seed(1, 6)
    assert not torch.equal(torch.rand(4), first)


def vocabulary_parallel():
    """On two tensor ranks: losses, gradients and guesses of divided logits against whole ones."""
    mesh = Mesh.build(ParallelPlan(tensor=2))
    whole = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    whole[3, 2] = whole[3, 8] = 9.0  # a tie across the ranks goes to the smaller id
    labels = torch.tensor([0, 4, 5, 9, 2, 7, 1])
    mine = whole.chunk(2, 1)[mesh.at.tensor].clone().requires_grad_()
    losses = nll(mine, labels)
    losses.sum().backward()
    guesses = argmax(mine.detach(), 5 * mesh.at.tensor, mesh.tensor_group)
    probe = whole.clone().requires_grad_()
    torch.nn.functional.cross_entropy(probe, labels, reduction="sum").backward()
    loss_error = (losses - torch.nn.functional.cross_entropy(whole, labels, reduction="none")).abs().max()
    gradient_error = (mine.grad - probe.grad.chunk(2, 1)[mesh.at.tensor]).abs().max()
    return float(loss_error), float(gradient_error), guesses.tolist(), whole.argmax(1).tolist()


def test_divided_softmax_equals_the_whole_one():
    loss_error, gradient_error, guesses, expected = spawn(2, vocabulary_parallel)
    assert loss_error < 1e-6 and gradient_error < 1e-6 and guesses == expected


def gathered():
    """On two data ranks with 1 and 3 rows: rows in rank order, and gradients that reach their owner."""
    mesh = Mesh.build(ParallelPlan())
    comm, rank = DataComm(mesh), mesh.at.data
    mine = torch.full((1 + 2 * rank, 3), float(rank + 1), requires_grad=True)
    everyone, first = comm.gather(mine)
    (everyone * torch.arange(12.0).view(4, 3)).sum().backward()
    found: list = [None, None]
    torch.distributed.all_gather_object(found, (first, everyone[:, 0].tolist(), mine.grad.tolist()))
    return found


def test_gather_brings_all_rows_and_sends_gradients_back():
    first, second = spawn(2, gathered)
    assert (first[0], second[0]) == (0, 1) and first[1] == second[1] == [1, 2, 2, 2]
    assert first[2] == [[0, 2, 4]]  # both ranks use the rows, so both send their share
    assert second[2] == [[6, 8, 10], [12, 14, 16], [18, 20, 22]]


def test_one_process_gathers_itself(mesh):
    x = torch.ones(2)
    found, first = DataComm(mesh).gather(x)
    assert found is x and first == 0


def fails():
    raise RuntimeError(f"rank {os.environ['RANK']} has had enough")


def test_a_failing_rank_ends_the_job():
    with pytest.raises(Exception, match="has had enough"):
        spawn(2, fails)
