"""Jobs on a real SLURM cluster: the same losses as one process, whatever happens to the job on the way."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hosts import needed
from running import losses, unbroken
from slurm import Slurm, missing

from ds_pretrain.parallel.launch import port_of
from ds_pretrain.sweep.results import states
from ds_pretrain.sweep.spec import read

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    needed(missing())
    with Slurm() as made:
        yield made


class Job:
    """A run on both nodes, two ranks each."""

    def __init__(self, cluster, run_file, out, *overrides, script="slurm.sbatch", options=(), **env):
        self.cluster, self.out = cluster, out
        ask = ["--nodes=2", "--gpus-per-node=2", "--time=30", f"--output={out}.log", f"--chdir={ROOT}"]
        ask += ["--ntasks-per-node=2"] if script == "slurm.sbatch" else []
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.number = cluster.sbatch(
            *ask, *options, ROOT / "launchers" / script, "train", run_file, f"output={out}", *overrides,
            PATH=path, DS_PRETRAIN_JOIN_SECONDS="60", **env,
        )  # fmt: skip

    def log(self):
        return Path(f"{self.out}.log").read_text(errors="replace")

    def went_on(self):
        """Whether it goes on from a checkpoint: from step 0 the losses would be the same."""
        return "resuming at step" in self.log()

    def trains(self, step=5):
        """Wait until this step is logged."""
        self.cluster.wait(lambda: max(losses(self.out), default=0) >= step, 240, f"job {self.number} does not train", self.log)

    def comes_back(self):
        """Wait until the job is in the queue again."""
        back = f"job {self.number} is not requeued"
        self.cluster.wait(lambda: int(self.cluster.job(self.number)["Restarts"]) > 0, 180, back, self.log)

    def ended(self):
        return self.cluster.ended(self.number, 600, self.log)


@pytest.mark.parametrize(
    "script, layout",
    [
        ("slurm.sbatch", []),
        ("slurm.sbatch", ["parallel.tensor=2", "parallel.pipeline=2"]),
        ("slurm_torchrun.sbatch", []),
        ("slurm_torchrun.sbatch", ["parallel.tensor=2", "parallel.pipeline=2"]),
    ],
    ids=["zero1", "tp2xpp2", "torchrun zero1", "torchrun tp2xpp2"],
)
def test_two_nodes_of_two_ranks_train_as_one_process(cluster, run_file, expected, tmp_path, script, layout):
    """Each task in what stands for a container, with the variables of a file, and a log of its own."""
    (tmp_path / "variables").write_text("NCCL_IB_HCA=mlx5\n")
    container = tmp_path / "container"
    container.write_text(f'#!/bin/sh\ntouch "{tmp_path}/$NCCL_IB_HCA-$SLURM_PROCID"\nexec "$@"\n')
    container.chmod(0o755)
    asked = {"EXEC": container, "ENV": tmp_path / "variables", "LOGS": tmp_path / "logs"}
    env = {f"DS_PRETRAIN_{name}": str(path) for name, path in asked.items()}
    job = Job(cluster, run_file, tmp_path / "out", *layout, script=script, **env)
    assert job.ended() == "COMPLETED", job.log()
    assert unbroken(job.out, expected)
    tasks = 4 if script == "slurm.sbatch" else 2
    assert {path.name for path in tmp_path.glob("mlx5-*")} == {f"mlx5-{task}" for task in range(tasks)}
    assert len(list((tmp_path / "logs").glob("*-task*.out"))) == tasks
    of_ranks = {(path.parts[-5], path.parts[-2]) for path in (tmp_path / "logs").rglob("stdout.log")}
    assert script == "slurm.sbatch" or of_ranks == {(f"node-{node}", f"{rank}") for node in range(2) for rank in range(2)}


def test_the_limit_of_a_job_sends_it_back(cluster, run_file, tmp_path):
    small = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"]
    job = Job(cluster, run_file, tmp_path / "out", "train.max_steps=100000", options=[*small, "--time=2", "--signal=B:USR1@45"])
    job.trains(1)
    job.comes_back()
    cluster.client("scancel", str(job.number))
    assert job.ended() == "CANCELLED" and "SIGUSR1: stopped after step" in job.log()


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_a_job_that_is_signalled_saves_and_goes_on_with_the_same_losses(cluster, run_file, expected, tmp_path, script):
    job = Job(cluster, run_file, tmp_path / "out", "train.save_every=0", script=script)
    job.trains()
    cluster.client("scancel", "--batch", "--signal=USR1", str(job.number))
    job.comes_back()
    assert max(losses(job.out)) < len(expected)
    assert job.ended() == "COMPLETED" and unbroken(job.out, expected), job.log()
    assert "SIGUSR1: stopped after step" in job.log() and job.went_on(), job.log()


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_a_job_that_is_cancelled_stays_dead(cluster, run_file, tmp_path, script):
    job = Job(cluster, run_file, tmp_path / "out", script=script)
    job.trains()
    cluster.client("scancel", str(job.number))
    assert job.ended() == "CANCELLED"
    time.sleep(4)
    assert cluster.job(job.number)["JobState"] == "CANCELLED" and cluster.job(job.number)["Restarts"] == "0"


def test_a_killed_rank_ends_the_job_which_starts_again(cluster, run_file, expected, tmp_path):
    job = Job(cluster, run_file, tmp_path / "out")
    job.trains(12)
    cluster.run("node2", ["pkill", "-9", "-o", "-f", "python -m ds_pretrain train"])
    job.comes_back()
    assert job.ended() == "COMPLETED" and unbroken(job.out, expected) and job.went_on(), job.log()
    (failure,) = map(json.loads, (job.out / "failures.jsonl").read_text().splitlines())
    assert failure["step"] >= 12 and failure["code"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_ranks_meet_at_the_interface_that_was_chosen(cluster, run_file, expected, tmp_path, script):
    """A network that the names of nodes do not lead to."""
    job = Job(cluster, run_file, tmp_path / "out", script=script, DS_PRETRAIN_INTERFACE="ib0")
    job.trains()
    assert cluster.meets("node1", port_of(job.number))
    assert job.ended() == "COMPLETED" and unbroken(job.out, expected), job.log()


def test_an_interface_that_is_none_is_told_with_those_that_are_there(cluster, run_file, tmp_path):
    job = Job(cluster, run_file, tmp_path / "out", DS_PRETRAIN_INTERFACE="ib7")
    assert job.ended() == "FAILED"
    assert "DS_PRETRAIN_INTERFACE is ib7, but node1 has lo, eth0, ib0: choose one of these" in job.log()


@pytest.mark.parametrize("asked", [True, False])
def test_a_port_that_is_taken_is_told_or_left_alone(cluster, run_file, expected, tmp_path, asked):
    """torchrun would wait for an answer of whoever listens."""
    number = cluster.sbatch("--wrap=true", "--output=/dev/null")
    port = port_of(number + 1)
    script = f"import socket, sys; held = socket.create_server(('', {port})); print(flush=True); sys.stdin.read()"
    command = cluster.entering("node1", [sys.executable, "-c", script])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()  # it listens
        given = {"MASTER_PORT": str(port)} if asked else {}
        job = Job(cluster, run_file, tmp_path / "out", script="slurm_torchrun.sbatch", **given)
        assert job.number == number + 1
        end = job.ended()
        assert (end, f"something listens at node1:{port}: set MASTER_PORT" in job.log()) == (
            ("FAILED", True) if asked else ("COMPLETED", False)
        )
        holder.stdin.close()
    assert asked or unbroken(job.out, expected)


def test_a_mistake_is_not_tried_again(cluster, run_file, tmp_path):
    job = Job(cluster, run_file, tmp_path / "out", "model.heads=3")
    assert job.ended() == "FAILED"
    assert "not divisible by model.heads 3" in job.log() and cluster.job(job.number)["Restarts"] == "0"


def test_a_run_of_higher_priority_takes_the_nodes_and_gives_them_back(cluster, run_file, expected, tmp_path):
    low = Job(cluster, run_file, tmp_path / "low", "train.save_every=0", options=["--partition=low"])
    low.trains()
    high = cluster.sbatch("--nodes=2", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    low.comes_back()
    assert cluster.ended(high) == "COMPLETED"
    assert low.ended() == "COMPLETED" and unbroken(low.out, expected), low.log()
    assert "SIGUSR1: stopped after step" in low.log() and low.went_on(), low.log()


def test_a_lost_node_is_got_over_without_it(cluster, run_file, expected, tmp_path):
    job = Job(cluster, run_file, tmp_path / "out")
    job.trains(12)
    with cluster.spare() as third:
        cluster.crash("node2")
        job.comes_back()
        assert job.ended() == "COMPLETED" and unbroken(job.out, expected) and job.went_on(), job.log()
        assert cluster.states("node2")["node2"].startswith("down")
        assert cluster.job(job.number)["NodeList"] == f"node[1,{third[-1]}]"
    cluster.boot("node2")
    cluster.wait(lambda: cluster.states("node2") == {"node2": "idle"}, 60, "node2 does not come back")


@pytest.fixture(scope="module")
def submitted(cluster, run_file, tmp_path_factory):
    """A sweep of three cells, one of which diverges, submitted as an array: its file and the array's number."""
    folder = tmp_path_factory.mktemp("array")
    path = folder / "sweep.yaml"
    values = {"run": str(run_file), "output": str(folder / "out"), "set": {"train.max_steps": 400, "train.eval_tokens": 2000}}
    path.write_text(yaml.safe_dump({**values, "grid": {"optimizer.lr": [1e30, 1e-3, 3e-3]}}))
    ran = cluster.run("head", [sys.executable, "-m", "ds_pretrain", "sweep", "submit", path, "--", "--time=30", "--parsable"])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return path, re.search(r"3 cells: (\d+)", ran.stdout)[1]


def test_a_cell_that_is_signalled_comes_back_alone(cluster, submitted):
    """The one whose job has the number of the whole array."""
    path, array = submitted
    spec = read(str(path))
    cluster.wait(lambda: all(max(losses(cell.folder), default=0) > 5 for cell in spec.cells[1:]), 120, "cells do not train")
    assert cluster.ended(f"{array}_0", 60) == "FAILED"
    (master,) = (task for task in range(3) if cluster.job(f"{array}_{task}")["JobId"] == array)
    assert master, "it trains"
    cluster.client("scancel", "--batch", "--signal=USR1", f"{array}_{master}")
    assert cluster.ended(f"{array}_{master}", 240) == "COMPLETED"
    restarts = [int(cluster.job(f"{array}_{task}")["Restarts"]) for task in range(3)]
    assert restarts == [int(task == master) for task in range(3)]
    log = (spec.folder / "slurm" / f"{array}_{master}.out").read_text()
    assert "SIGUSR1: stopped after step" in log and "resuming at step" in log


def test_an_array_runs_each_cell_and_tells_which_failed(cluster, submitted):
    path, array = submitted
    assert [cluster.ended(f"{array}_{task}", 400) for task in range(3)] == ["FAILED", "COMPLETED", "COMPLETED"]
    found = [*states(read(str(path))).values()]
    assert [at.status for at in found] == ["failed", "finished", "finished"]
    assert "diverged at step" in found[0].reason and "lower optimizer.lr" in found[0].reason
    again = cluster.run("head", [sys.executable, "-m", "ds_pretrain", "sweep", "submit", path])
    assert "nothing to submit" in again.stdout, again.stderr


def test_jobs_that_follow_an_array_start_or_not_as_it_ended(cluster, submitted, tmp_path):
    """A chain: what follows a failure runs, what needs a success does not."""
    _, array = submitted
    follow = {kind: cluster.sbatch(f"--dependency={kind}:{array}", "--kill-on-invalid-dep=yes", "--output=/dev/null",
                                   "--wrap", "true") for kind in ("afterok", "afternotok", "afterany")}  # fmt: skip
    assert {kind: cluster.ended(number) for kind, number in follow.items()} == {
        "afterok": "CANCELLED", "afternotok": "COMPLETED", "afterany": "COMPLETED",
    }  # fmt: skip
