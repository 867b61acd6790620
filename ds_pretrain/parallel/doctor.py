"""What is wrong with a cluster, found before a job trains on it: versions, devices, disks, clocks, links and pace of all nodes.

Every rank looks at itself and at its links; what they see comes together on a board (`board`), is judged by `diagnosis` and is
the same on every rank. Nothing here knows a model or a run, so the same examination opens a job (a second of links) and is a
command of its own (as many as are asked for). The price of looking for a moment only: what breaks later is the watchdog's.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

import ds_pretrain
from ds_pretrain.parallel.board import Board, CutShortError
from ds_pretrain.parallel.diagnosis import Clock, Findings, Folder, Rank
from ds_pretrain.parallel.links import all_reduce_rate, tournament

PACKAGES = ("torch", "deepspeed", "megatron-core", "ds_pretrain")
SEEN = 10.0
"""Seconds after which a file is not seen any more: it is elsewhere."""
WRITTEN = 4 << 20
"""Bytes that each node writes into the output folder and takes away again."""
TRIPS = 4
"""Questions for the time, of which the one that was answered first counts."""
COMPUTING = 0.2
"""Seconds of matrix products."""
_BOARDS = itertools.count()


def examine(output: Path | None, seconds: float) -> Findings:
    """Examine the nodes of this job (collective over all ranks of the default group; the same findings on every rank).

    output: the folder that all nodes must share; None: disks are left out. seconds: for the links of nodes and GPUs, which take
    about so long; 0: they are left out. All else takes about a second. Raises nothing for a rank that fails or is silent: that
    is a problem among the findings, and the examination ends there.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found = Findings()
    with _board() as board:
        try:
            board.meet()
            found = Findings([Rank(**told) for told in board.gather("versions and devices", lambda: asdict(_self(device)))])
            leaders = found.leaders
            found = replace(found, folders=_folders(board, output, leaders))
            found = replace(found, clocks=_clocks(board, leaders))
            if seconds and len(leaders) > 1:
                found = replace(found, links=tournament(board, "links between nodes", [leaders], device, 0.5 * seconds))
            if seconds and max(map(len, found.gpus), default=1) > 1 and not found.broken:
                inside = tournament(board, "links between GPUs of a node", found.gpus, device, 0.25 * seconds)
                found = replace(found, inside=inside)
            if seconds and board.world > 1 and not found.broken:
                found = replace(found, reduced=all_reduce_rate(board, device, 0.125 * seconds))
        except CutShortError as error:
            found = replace(found, cut=error.found)
    return found


def several() -> bool:
    """Whether this job is on several hosts or GPUs (collective, by the store alone; the same on every rank)."""
    with _board() as board:
        return len({*board.meet()}) > 1 or any(board.gather("its devices", torch.cuda.device_count))


def _board() -> Board:
    """A new one, for every rank's next examination."""
    return Board(_get_default_store(), dist.get_rank(), dist.get_world_size(), f"doctor/{next(_BOARDS)}")


def _self(device: torch.device) -> Rank:
    """This rank and its device."""
    import psutil

    memory = psutil.virtual_memory()
    rank = Rank(
        host=socket.gethostname(), boot=_read("/proc/sys/kernel/random/boot_id"), facts=_facts(device), free=memory.available,
        total=memory.total, cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0], flops=_flops(device),
    )  # fmt: skip
    return rank if device.type == "cpu" else _with_gpu(rank, device)


def _with_gpu(rank: Rank, device: torch.device) -> Rank:
    visible = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    own, (free, total) = visible[device.index or 0], torch.cuda.mem_get_info(device)
    return replace(
        rank, uuid=str(own.uuid), visible=[str(each.uuid) for each in visible], free=free, total=total,
        own=torch.cuda.memory_reserved(device),
    )  # fmt: skip


def _facts(device: torch.device) -> dict[str, str]:
    """What every node must have alike."""
    facts = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, "sources": _sources()}
    if device.type == "cpu":
        return {**facts, "computes on": "CPU", "device": platform.machine()}
    driver = re.search(r"NVRM version:.*?(\d+\.\d+[.\d]*)", _read("/proc/driver/nvidia/version"))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    cuda = {"CUDA": str(torch.version.cuda), "NCCL": nccl, "driver": driver[1] if driver else "unknown"}
    return {**facts, "computes on": "GPU", **cuda, "device": torch.cuda.get_device_name(device)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _sources() -> str:
    """A digest of this package's files: two checkouts of one version are not the same program."""
    import xxhash

    digest, root = xxhash.xxh3_64(), Path(ds_pretrain.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _flops(device: torch.device) -> float:
    """Floating-point operations a second of a fixed matrix product, as a rule: a moment of disturbance does not count."""
    size, kind = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    x = torch.ones(size, size, dtype=kind, device=device)
    took: list[float] = []
    while sum(took[2:]) < COMPUTING or len(took) < 5:  # the first ones also wake the device up
        began = time.perf_counter()
        (x @ x)[0, 0].item()  # which waits for the GPU
        took.append(time.perf_counter() - began)
    return 2 * size**3 / median(took[2:])


def _folders(board: Board, output: Path | None, leaders: Sequence[int]) -> dict[int, Folder]:
    """The output folder as each node has it: rank 0 leaves a file there, the others look for it."""
    with ExitStack() as left:

        def leave() -> tuple[str, str]:
            try:
                return (left.enter_context(_left(output)) if output else ""), ""
            except OSError as error:
                return "", error.strerror or str(error)

        [(name, error)] = board.gather("a file in the output folder", leave, [0])

        def look() -> Folder | None:
            if output is None:
                return None
            if error and board.rank == 0:
                return Folder(str(output), 0.0, error=error)
            return _looked(output, name)

        told = board.gather("the output folder", look, leaders)
    return {rank: Folder(*folder) for rank, folder in zip(leaders, told, strict=True) if folder}


@contextmanager
def _left(output: Path) -> Iterator[str]:
    """A file whose content is its name; gone afterwards, as are the folders that were made for it."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    path = output / f".doctor-{uuid4().hex}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
        yield path.name
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _looked(output: Path, name: str) -> Folder:
    """The folder from here. The file was there before anybody asked for it, as file systems remember what was not there."""
    began, path = time.monotonic(), str(output)
    while name and _read(str(output / name)) != name:
        if time.monotonic() - began > SEEN:
            return Folder(path, None)
        time.sleep(0.05)
    seen = time.monotonic() - began
    try:
        return Folder(path, seen, _free(output), _written(output))
    except OSError as error:
        return Folder(path, seen, error=error.strerror or str(error))


def _free(output: Path) -> int:
    """Bytes that this user may still write."""
    room = os.statvfs(output)
    return room.f_bavail * room.f_frsize


def _written(output: Path) -> float:
    """Bytes a second of a file that is on the disk; it has no name, so nothing stays, whatever happens."""
    with tempfile.TemporaryFile(dir=output) as file:
        began = time.perf_counter()
        file.write(os.urandom(WRITTEN))
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN / (time.perf_counter() - began)


def _clocks(board: Board, leaders: Sequence[int]) -> dict[int, Clock]:
    """The clock of each node beside rank 0's: half a round trip is what is not known (Cristian 1989)."""

    def ask() -> Clock:
        if board.rank == 0:
            _tell_time(board, leaders[1:])
            return Clock(0.0, 0.0)
        return min((_asked(board, trip) for trip in range(TRIPS)), key=lambda clock: clock.error)

    return {rank: Clock(*told) for rank, told in zip(leaders, board.gather("its clock", ask, leaders), strict=True)}


def _tell_time(board: Board, leaders: Sequence[int]) -> None:
    for rank in leaders:
        for trip in range(TRIPS):
            board.take(f"time/{rank}/{trip}/asked")
            board.put(f"time/{rank}/{trip}", repr(time.time()))


def _asked(board: Board, trip: int) -> Clock:
    key, began = f"time/{board.rank}/{trip}", time.time()
    board.put(f"{key}/asked", "")
    there = float(board.take(key))
    now = time.time()
    return Clock((began + now) / 2 - there, (now - began) / 2)
