"""The launchers over several hosts, for real: the losses of one process, and an end in time where a host or a cable fails."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts, missing, needed
from running import losses, unbroken

from ds_pretrain.core.exits import HUNG

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
QUIET = {
    "DS_ACCELERATOR": "cpu",
    "DS_PRETRAIN_JOIN_SECONDS": "60",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
LONG = ("train.watchdog_seconds=40", "train.max_steps=2000")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    needed(missing("pdsh"))
    with Hosts() as made:
        file = tmp_path_factory.mktemp("hosts") / "hosts.txt"
        file.write_text("host1 slots=2\nhost2 slots=2\n")
        made.file = file
        yield made


def launched(hosts, launcher):
    """A launcher's command up to what it trains, by its name."""
    mpi = [LAUNCHERS / "mpi.sh", "--host", "host1:2,host2:2", "--mca", "btl_tcp_if_include", "eth0", "--"]
    return {"hostfile.sh": [LAUNCHERS / "hostfile.sh", hosts.file], "mpi.sh": mpi}[launcher]


def environment():
    return {**QUIET, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"}


@pytest.fixture
def starts(hosts, run_file, tmp_path):
    """Start a launcher with its training; stop what is left of it."""
    running = []

    def start(launcher, *overrides, **env):
        command = [*launched(hosts, launcher), "train", run_file, f"output={tmp_path / 'out'}", *overrides]
        running.append(hosts.start("host1", command, **environment(), **env))
        return running[-1]

    yield start
    for process in running:
        process.kill()
    for host in hosts.names:
        if host in hosts._inner:
            hosts.run(host, ["pkill", "-9", "-f", "ds_pretrain --local_rank|ds_pretrain train"])


def reaches(out, step, process, seconds=90):
    deadline = time.monotonic() + seconds
    while max(losses(out), default=0) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"step {step} is not reached"
        time.sleep(0.1)


@pytest.mark.parametrize("launcher, layout, logs", [
    ("hostfile.sh", [], 4),
    ("hostfile.sh", ["parallel.tensor=2", "parallel.pipeline=2"], 0),
    ("mpi.sh", [], 0),
    ("mpi.sh", ["parallel.tensor=2", "parallel.pipeline=2"], 4),
], ids=["pdsh-zero1", "pdsh-tp2xpp2", "mpi-zero1", "mpi-tp2xpp2"])  # fmt: skip
def test_two_hosts_of_two_ranks_train_as_one_process(starts, expected, tmp_path, launcher, layout, logs):
    process = starts(launcher, *layout, DS_PRETRAIN_LOGS=str(tmp_path / "logs") if logs else "")
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    of_ranks = [path.read_text() for path in tmp_path.glob("logs/*")]
    assert len(of_ranks) == logs and sum("trained to step" in log for log in of_ranks) == (logs > 0)
    assert "\x1b" not in said + "".join(of_ranks), "a bar in a log"
    assert unbroken(tmp_path / "out", expected)


def test_ranks_meet_at_the_interface_that_was_chosen(hosts, starts, expected, tmp_path):
    """A network that the names of hosts do not lead to."""
    process = starts("hostfile.sh", DS_PRETRAIN_INTERFACE="ib0")
    reaches(tmp_path / "out", 5, process)
    assert hosts.meets("host1", 29500)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and unbroken(tmp_path / "out", expected), said


def test_ranks_that_are_signalled_save_and_say_so_in_their_logs(hosts, starts, tmp_path):
    process = starts("mpi.sh", *LONG, DS_PRETRAIN_LOGS=str(tmp_path / "logs"))
    reaches(tmp_path / "out", 12, process)
    hosts.run("host1", ["pkill", "-USR1", "-x", "mpirun|prterun"])
    said, _ = process.communicate(timeout=60)
    logs = [path.read_text() for path in (tmp_path / "logs").iterdir()]
    assert process.returncode == 0 and "Broken pipe" not in "".join(logs), said
    (said,) = re.findall(r"stopped after step (\d+)", (tmp_path / "logs" / "rank-0.out").read_text())
    assert (tmp_path / "out" / "checkpoints" / f"step-{said}").is_dir()


def test_a_killed_rank_ends_the_job_on_both_hosts(hosts, starts, tmp_path):
    process = starts("hostfile.sh", *LONG)
    reaches(tmp_path / "out", 12, process)
    hosts.run("host2", ["pkill", "-9", "-o", "-f", "ds_pretrain --local_rank"])
    killed = time.monotonic()
    said, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - killed < 60, said
    while left := [host for host in hosts.names if hosts.run(host, ["pgrep", "-f", "ds_pretrain --local_rank"]).stdout]:
        assert time.monotonic() - killed < 60, f"ranks are left on {left}"
        time.sleep(0.5)


def test_a_pulled_cable_ends_the_job_within_the_watchdogs_limit(hosts, starts, tmp_path):
    process = starts("hostfile.sh", *LONG)
    reaches(tmp_path / "out", 12, process)
    hosts.plug("host2", False)
    pulled, at = time.monotonic(), time.time()
    try:
        said, _ = process.communicate(timeout=150)  # ssh gives a host up a minute after it
        assert process.returncode != 0 and time.monotonic() - pulled < 130, said
        assert max(path.stat().st_mtime for path in (tmp_path / "out" / "stacks").iterdir()) < at + 60, "40 s, and the writing"
        assert "has not moved for 40 s" in said and f"it ends with exit code {HUNG}" in said, said
        assert {path.name for path in (tmp_path / "out" / "stacks").iterdir()} == {f"rank-{rank}.txt" for rank in range(4)}
    finally:
        hosts.plug("host2", True)


def test_a_host_that_does_not_answer_is_named_before_anything_starts(hosts, starts, tmp_path):
    hosts.plug("host2", False)
    began = time.monotonic()
    try:
        process = starts("hostfile.sh")
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and "no ssh to host2 of" in said and time.monotonic() - began < 40, said
        assert not (tmp_path / "out").exists()
    finally:
        hosts.plug("host2", True)


def test_a_crashed_host_ends_the_job(hosts, starts, tmp_path):
    process = starts("hostfile.sh", *LONG)
    reaches(tmp_path / "out", 12, process)
    hosts.crash("host2")
    crashed = time.monotonic()
    try:
        said, _ = process.communicate(timeout=120)
        assert process.returncode != 0 and time.monotonic() - crashed < 90, said
    finally:
        hosts.restart("host2")
