"""Who this process is and where all of its job meet: what launchers put into the environment, read in one place.

torchrun, the deepspeed launcher, srun and mpirun each name rank and world size in their own way. The meeting point is
MASTER_ADDR and MASTER_PORT where the launcher gives them; else under SLURM the job's first node and a port made of the job's
number, and under MPI whatever rank 0 tells the others. The store that ranks meet in listens at that address alone, not on
every interface of its host, unless the host takes its own name for a loopback address; torchrun has a store of its own, which
listens on all of them. DS_PRETRAIN_INTERFACE chooses the interface of all that follows; without it gloo takes the one that
leads to the meeting point.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

LAUNCHERS = {
    "the launcher": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
"""Launcher to its names of rank, world size and local rank, the inner first: torchrun and deepspeed run inside of mpirun and
srun, and mpirun starts its own processes by srun."""
JOIN = timedelta(seconds=float(os.environ.get("DS_PRETRAIN_JOIN_SECONDS", 300)))
"""How long ranks wait for one another at the start."""
ELSEWHERE = "192.0.2.1"
"""An address that nobody has (RFC 5737): the interface that would lead to it is the one that leads out."""
PORTS = range(10_000, 30_000)
"""Below those that systems give out by themselves."""


class Place(NamedTuple):
    """This process among the processes of the job."""

    rank: int
    world: int
    local_rank: int


class Meeting(NamedTuple):
    """Where the ranks of a job meet. socket: rank 0's own, if it had to open one to find a free port."""

    host: str
    port: int
    socket: socket.socket | None = None


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """Read the launcher's variables; a world of one without them.

    ValueError if launchers contradict each other, as when every node of a SLURM job would train by itself.
    """
    for names in LAUNCHERS.values():
        if all(name in environ for name in names):
            found = Place(*(int(environ[name]) for name in names))
            _agree(found, environ)
            if not 0 <= found.rank < found.world:
                raise ValueError(f"rank {found.rank} is none of a world of {found.world}: mend {names[0]} and {names[1]}")
            return found
    return Place(0, 1, 0)


def _agree(found: Place, environ: Mapping[str, str]) -> None:
    for launcher in ("mpirun", "srun"):
        tasks = int(environ.get(LAUNCHERS[launcher][1], 1))
        agents = int(environ.get("GROUP_WORLD_SIZE", tasks))  # torchrun's, one for each task of the launcher around it
        if tasks > found.world or tasks > agents:
            raise ValueError(
                f"{launcher} has started {tasks} tasks, but this process is told of a world of {found.world} on {agents}: they "
                f"would train apart. Give torchrun --nnodes {tasks}, or let {launcher} start one task for each device and "
                "nothing inside"
            )


def join(where: Place) -> dist.Store:
    """The store that brings all ranks together. ConnectionError where they do not meet, with the address."""
    if where.world == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _choose_interface(os.environ["MASTER_ADDR"])
        return next(dist.rendezvous("env://"))[0]  # the agent's
    meeting = _meeting(where)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meeting.host, str(meeting.port)
    _choose_interface(meeting.host)
    return _store(where, meeting)


def _meeting(where: Place, environ: Mapping[str, str] = os.environ) -> Meeting:
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    nodes = nodes_of(environ)
    if not (host and port) and "OMPI_COMM_WORLD_SIZE" in environ:
        return _told_by_mpi(where)
    if nodes:
        host, port = host or hosts_of(nodes)[0], port or str(port_of(int(environ["SLURM_JOB_ID"])))
    if not host or not port:
        raise ValueError(
            f"rank {where.rank} of {where.world} is not told where to meet the others: set MASTER_ADDR and MASTER_PORT, or "
            "start by torchrun, deepspeed, srun or mpirun"
        )
    return Meeting(host, int(port))


def nodes_of(environ: Mapping[str, str] = os.environ) -> str | None:
    """The hosts of this job as SLURM writes them."""
    return environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")


def hosts_of(nodes: str) -> list[str]:
    """The names of a SLURM list of nodes, such as gpu[003-010,12],cpu1."""
    found = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not found:
        raise ValueError(f"{nodes!r} is no list of nodes")
    parts = [[_range(part) for part in re.findall(r"\[[^\]]*\]|[^\[]+", each)] for each in found]
    return ["".join(name) for each in parts for name in itertools.product(*each)]


def _range(part: str) -> list[str]:
    """What a part of a name stands for: [003-010,12], or itself."""
    if not part.startswith("["):
        return [part]
    ends = [each.split("-") for each in part[1:-1].split(",")]
    return [f"{number:0{len(low)}}" for low, *high in ends for number in range(int(low), int((high or [low])[0]) + 1)]


def port_of(job: int) -> int:
    """A port that other jobs on the same node most likely do not have."""
    return PORTS[job % len(PORTS)]


def _told_by_mpi(where: Place) -> Meeting:
    """Rank 0 opens a port and tells the others."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise ValueError("under mpirun, ranks meet by mpi4py: pip install mpi4py, or set MASTER_ADDR and MASTER_PORT") from None
    host = address_of(interface) if (interface := _asked()) else socket.gethostname()
    listening = _listen(host, 0) if where.rank == 0 else None
    host, port = MPI.COMM_WORLD.bcast((host, listening.getsockname()[1]) if listening else None)
    return Meeting(host, port, listening)


def _store(where: Place, meeting: Meeting) -> dist.Store:
    """The store of a job: rank 0 holds it."""
    own = None if where.rank else (meeting.socket or _listen(meeting.host, meeting.port)).detach()
    try:
        return dist.TCPStore(
            meeting.host, meeting.port, where.world, own is not None, JOIN, wait_for_workers=False, master_listen_fd=own
        )  # who does not come is told by name where they meet (`board`)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise ConnectionError(
            f"rank {where.rank} on {socket.gethostname()} waited {JOIN.total_seconds():.0f} s at "
            f"{meeting.host}:{meeting.port}, and it did not answer ({str(error).splitlines()[0]}). Is every node up, does each "
            f"reach {meeting.host}, is the port open between nodes, is DS_PRETRAIN_INTERFACE right? A rank 0 that still "
            "reads its data needs longer: DS_PRETRAIN_JOIN_SECONDS"
        ) from None


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address of this host alone; at all, where the name is local to its host."""
    try:
        family, _, _, _, at = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if _turned_in(host):
            at = ("", port)
        return socket.create_server(at, family=family, backlog=4096)
    except OSError as error:
        raise ValueError(
            f"rank 0 on {socket.gethostname()} cannot listen at {host}:{port} ({error.strerror}): another job has the port, or "
            "the address is another host's. Set MASTER_PORT to a free port, MASTER_ADDR to a name of the first node"
        ) from None


def _asked() -> str | None:
    """The interface that the user has chosen. ValueError if there is none of that name."""
    name = os.environ.get("DS_PRETRAIN_INTERFACE")
    names = [each for _, each in socket.if_nameindex()]
    if name and name not in names:
        raise ValueError(
            f"DS_PRETRAIN_INTERFACE is {name}, but {socket.gethostname()} has {', '.join(names)}: choose one of these"
        )
    return name


def _choose_interface(host: str) -> None:
    """Let gloo and NCCL use the interface that was chosen; gloo else the one that leads to this host."""
    if asked := _asked():
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = asked
    elif "GLOO_SOCKET_IFNAME" not in os.environ and (found := interface_to(ELSEWHERE if _turned_in(host) else host)):
        os.environ["GLOO_SOCKET_IFNAME"] = found  # else it takes what the host's own name resolves to


def _turned_in(host: str) -> bool:
    """Whether a host's name is an address that only itself has: 127.0.1.1 for its own on Debian."""
    if host == "localhost" or host.replace(".", "").isdigit() or ":" in host:
        return False
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def interface_to(host: str) -> str | None:
    """The interface that leads to a host; None where that cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _ipv4(name) == own), None)


def address_of(interface: str) -> str:
    """The IPv4 address of an interface. ValueError if it has none."""
    if found := _ipv4(interface):
        return found
    raise ValueError(
        f"interface {interface} of {socket.gethostname()} has no IPv4 address: choose another in DS_PRETRAIN_INTERFACE"
    )


def _ipv4(interface: str) -> str | None:
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])
