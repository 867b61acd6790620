"""Who a process is and where all meet: every launcher's word, contradictions between them, and who did not come."""

import os
import socket
import subprocess
import sys

import pytest

from ds_pretrain.parallel import launch
from ds_pretrain.parallel.launch import Place, hosts_of, interface_to, place, port_of

SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "GROUP_WORLD_SIZE": "2"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu1", "gpu1"), ("gpu[003-010,12],cpu1", "gpu003"), ("a,b[1-2]", "a"), ("r[1-2]n[07,9]-ib", "r1n07-ib"), ("n[5]", "n5")],
)
def test_the_first_node_of_a_list(nodes, first):
    assert hosts_of(nodes)[0] == first


def test_all_nodes_of_a_list():
    assert hosts_of("gpu[003-005,12],cpu1") == ["gpu003", "gpu004", "gpu005", "gpu12", "cpu1"]
    assert hosts_of("r[1-2]n[9-10]") == ["r1n9", "r1n10", "r2n9", "r2n10"]


def test_inner_launchers_count():
    assert place(SRUN | TORCHRUN) == Place(2, 4, 0)
    assert place(SRUN | MPIRUN) == Place(3, 4, 1)
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) == Place(0, 1, 0)  # a batch shell


@pytest.mark.parametrize(
    "environ, told",
    [
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "srun has started 2 tasks"),
        (SRUN | TORCHRUN | {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}, "Give torchrun --nnodes 2"),
        (MPIRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "mpirun has started 4 tasks"),
    ],
)
def test_tasks_that_would_train_apart_are_refused(environ, told):
    with pytest.raises(ValueError, match=told):
        place(environ)


def test_jobs_next_to_each_other_have_other_ports():
    assert len({port_of(job) for job in range(1000, 1100)}) == 100 and port_of(10**9) in launch.PORTS


def test_a_name_that_only_its_own_host_knows_is_no_place_to_meet(monkeypatch):
    """Debian writes its own name as 127.0.1.1 into /etc/hosts: others would never get through."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 0, 0, "", ("127.0.1.1", 0))])
    with launch._listen("node1", 0) as everywhere, launch._listen("127.0.1.1", 0) as here:
        assert everywhere.getsockname()[0] == "0.0.0.0" and here.getsockname()[0] == "127.0.1.1"
    monkeypatch.setattr(launch, "interface_to", lambda host: {launch.ELSEWHERE: "eth0"}.get(host, "lo"))
    for host, interface in (("node1", "eth0"), ("localhost", "lo")):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        launch._choose_interface(host)
        assert os.environ["GLOO_SOCKET_IFNAME"] == interface
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_the_way_to_this_host_is_its_loopback():
    assert interface_to("127.0.0.1") == "lo" and interface_to("no.such.host.invalid") is None


def started(rank, world, port, **env):
    """A rank that joins and says what it finds."""
    main = """
import sys, torch.distributed
from ds_pretrain.parallel.mesh import start
try:
    start()
    torch.distributed.barrier()
    print("met", torch.distributed.get_rank())
except (ValueError, OSError) as error:
    sys.exit(print(error) or 2)
"""
    place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    told = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_PRETRAIN_JOIN_SECONDS": "4", **env}
    return subprocess.Popen(
        [sys.executable, "-c", main], env=told, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_ranks_meet_and_listen_at_one_address_only():
    port = free_port()
    ranks = [started(rank, 2, port) for rank in range(2)]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == ["met 0", "met 1"]
    with launch._listen("127.0.0.1", port) as own:
        assert own.getsockname()[0] == "127.0.0.1"


def test_a_rank_beyond_the_world_is_refused():
    with pytest.raises(ValueError, match="rank 5 is none of a world of 4"):
        launch.place({"RANK": "5", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})


def test_what_keeps_ranks_apart_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first = started(0, 2, port)
        assert f"rank 0 on {socket.gethostname()} cannot listen at 127.0.0.1:{port}" in first.communicate(timeout=60)[0]
    lonely, lost = started(0, 2, free_port(), SLURM_JOB_NODELIST="cpu[1-2]"), started(1, 2, free_port())
    wrong = started(0, 2, free_port(), DS_PRETRAIN_INTERFACE="ib7")
    told = lonely.communicate(timeout=60)[0]
    assert "no answer from rank 1 (its name, within 4 s)" in told
    assert "no rank came from cpu1, cpu2" in told
    assert "waited 4 s at 127.0.0.1:" in lost.communicate(timeout=60)[0]
    assert "DS_PRETRAIN_INTERFACE is ib7, but" in wrong.communicate(timeout=60)[0]
