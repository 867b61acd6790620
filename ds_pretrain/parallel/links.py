"""What the network between nodes carries: whether each node reaches each, latency and bandwidth of pairs, an all-reduce.

One rank of each node plays a round-robin tournament: in a round every node has one partner, so disjoint pairs measure at the
same time and n nodes need n - 1 rounds; the GPUs of each node then do the same among themselves, all nodes at once. Messages
grow until one takes its share of the time there is, so a slow link costs as long as a fast one. The transport is that of
training, NCCL with CUDA and gloo without; of a node with many network cards one rank uses one, and only the all-reduce over all
ranks uses them all.
"""

from __future__ import annotations

import math
import os
import re
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from itertools import chain, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pretrain.parallel.board import DONE, Board, CutShortError
from ds_pretrain.parallel.diagnosis import Link, few
from ds_pretrain.parallel.launch import Place, address_of

LIMIT = 10.0
"""Seconds after which a message is lost."""
NCCL = 60.0
"""The same for NCCL, whose first message waits for its set-up."""
REACH = 5.0
"""Seconds after which a node is out of reach."""
SMALL, LARGE = 1 << 16, 1 << 26
"""Bytes of the first message, and of the largest."""
GROWTH = 8
"""A small message may tell nothing of a large one: it can pass in one burst."""
TRIPS = 5
"""Round trips, of which the shortest counts."""
ROUNDS = 3
"""Rounds that are played however short the time."""
STOP = -1


def schedule(players: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs, each pair once (circle method); of an odd number one rests in each round."""
    seats: list[int | None] = [*players, *[None] * (len(players) % 2)]
    half, rounds = len(seats) // 2, []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def grown(size: int, took: float, share: float) -> int:
    """Bytes of the next message, after one of `size` bytes took so long, for it to take `share` seconds."""
    return min(LARGE, GROWTH * size, math.ceil(size * share / max(took, 1e-9)))


def tournament(board: Board, name: str, groups: Sequence[Sequence[int]], device: torch.device, seconds: float) -> list[Link]:
    """Both directions of pairs in each of `groups` of ranks, in about so many seconds (collective over all ranks).

    name: of the links, once on this board. groups: disjoint, rank 0 in one of them; all play at the same time. In a large
    cluster the time may end before every pair has met, after `ROUNDS` at the earliest. Stops after a round in which a link is
    broken: a transport that has lost one message answers no other.
    """
    played = zip_longest(*map(schedule, groups), fillvalue=[])
    rounds = [[*chain.from_iterable(of_groups)] for of_groups in played]
    keeps = device.type == "cuda"  # NCCL keeps what it sends by, for each pair, as long as the group
    group = dist.new_group(timeout=timedelta(seconds=_patience(device)), backend="nccl") if keeps else None
    players, began, found = sorted(chain.from_iterable(groups)), time.monotonic(), list[Link]()
    share = min(1.0, max(0.01, seconds / (3 * max(1, len(rounds)))))
    for number, pairs in enumerate(rounds, start=1):
        peer = next((a + b - board.rank for a, b in pairs if board.rank in (a, b)), None)

        def play(peer: int | None = peer) -> tuple[Link | None, bool]:
            link = None if peer is None else _link(board.rank, _Far(peer, device, group), share)
            return link, time.monotonic() - began > seconds

        told = board.gather(f"{name}, round {number}", play, players, _patience(device))
        found += [Link(*link) for link, _ in told if link]
        late = told[0][1]  # rank 0's watch
        if (late and number >= ROUNDS) or any(link.error for link in found):
            break
    if group and not any(link.error for link in found):
        dist.destroy_process_group(group)
    return found


def _patience(device: torch.device) -> float:
    """Seconds for what is measured; NCCL first builds what it sends by, the longer the more ranks there are."""
    return 2 * NCCL if device.type == "cuda" else DONE


def _link(rank: int, far: _Far, share: float) -> Link:
    """What this rank sends to its partner, before or after the partner sends to it."""
    peer = far.peer
    try:
        if rank < peer:
            latency, rate = far.send(share)
            far.receive()
        else:
            far.receive()
            latency, rate = far.send(share)
    except (RuntimeError, TimeoutError) as error:
        return Link(rank, peer, 0.0, 0.0, re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]))  # gloo's line of its source
    return Link(rank, peer, latency, rate)


class _Far:
    """The other end of a link. A message is its size and as many bytes; the other end says when it has it."""

    def __init__(self, peer: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self.peer, self.group, self.word = peer, group, torch.zeros(1, dtype=torch.int64, device=device)

    def send(self, share: float) -> tuple[float, float]:
        """Latency (seconds) and rate (bytes a second) of what goes from here to there."""
        trip = min(self._trip(0) for _ in range(TRIPS))
        size, took = SMALL, self._trip(SMALL)
        while took < share / 2 and size < LARGE:
            size = grown(size, took, share)
            took = self._trip(size)
        self._put(self.word.fill_(STOP))
        return trip / 2, size / max(took - trip, took / 2)

    def _trip(self, size: int) -> float:
        message = torch.zeros(size, dtype=torch.uint8, device=self.word.device)
        began = time.perf_counter()
        self._put(self.word.fill_(size))
        if size:
            self._put(message)
        self._get(self.word)
        return time.perf_counter() - began

    def receive(self) -> None:
        while (size := int(self._get(self.word))) != STOP:
            if size:
                self._get(torch.empty(size, dtype=torch.uint8, device=self.word.device))
            self._put(self.word)

    def _put(self, x: Tensor) -> None:
        _finish(dist.isend(x, self.peer, group=self.group), x)

    def _get(self, x: Tensor) -> Tensor:
        _finish(dist.irecv(x, self.peer, group=self.group), x)
        return x


def _finish(work: dist.Work | None, x: Tensor) -> None:
    """Wait, but not for ever. NCCL's own waiting only orders streams, gloo never says that a message is done."""
    assert work
    if not x.is_cuda:
        work.wait(timedelta(seconds=LIMIT))
        return
    end = time.monotonic() + NCCL
    while not work.is_completed():
        if time.monotonic() > end:
            raise TimeoutError(f"NCCL has not moved {x.numel() * x.element_size():,} bytes in {NCCL:g} s")


def all_reduce_rate(board: Board, device: torch.device, seconds: float) -> float:
    """Bytes a second that each rank sends and receives in an all-reduce over all ranks, 2 (n - 1) / n of the tensor's each
    (the bus bandwidth of nccl-tests; collective)."""

    def measure() -> float:
        backend = "nccl" if device.type == "cuda" else "gloo"
        patience = timedelta(seconds=_patience(device) / 2)  # the default group would wait for minutes
        group = dist.new_group(timeout=patience, backend=backend)
        size, took = SMALL, min(_all_reduce(group, SMALL, device) for _ in range(2))
        while took < seconds / 2 and size < LARGE:
            size = grown(size, took, seconds)
            took = _all_reduce(group, size, device)
        dist.destroy_process_group(group)
        return 2 * (board.world - 1) / board.world * size / took

    return float(min(board.gather("all-reduce over all ranks", measure, seconds=_patience(device))))


def _all_reduce(group: dist.ProcessGroup, size: int, device: torch.device) -> float:
    """Seconds that the slowest rank took, the same on every rank."""
    x, took = torch.zeros(size // 4, device=device), torch.zeros(1, device=device)
    began = time.perf_counter()
    _finish(dist.all_reduce(x, group=group, async_op=True), x)
    took.fill_(time.perf_counter() - began)
    _finish(dist.all_reduce(took, dist.ReduceOp.MAX, group=group, async_op=True), took)
    return float(took)


def reach(store: dist.Store, where: Place) -> None:
    """Whether each node can open a connection to each, before any process group tries (collective over all ranks).

    For between the meeting of ranks and the first group: gloo waits for minutes for a node that another cannot reach, and says
    nothing of who it was. ConnectionError, on every rank alike, names the pairs.
    """
    if where.world > 1:
        with Board(store, where.rank, where.world, "reach") as board:
            _reach(board)


def _reach(board: Board) -> None:
    hosts = board.meet()
    leaders = sorted({host: rank for rank, host in reversed([*enumerate(hosts)])}.values())
    if len(leaders) == 1:
        return
    with ExitStack() as stack:
        doors = board.gather("an address to be reached at", lambda: stack.enter_context(_listening()).getsockname(), leaders)
        closed = board.gather("connections to other nodes", lambda: _knock(doors, leaders.index(board.rank)), leaders)
    pairs = [
        f"{hosts[rank]} cannot open a connection to {hosts[leaders[at]]} ({doors[at][0]}): {why}"
        for rank, found in zip(leaders, closed, strict=True)
        for at, why in found
    ]
    if pairs:
        fix = (
            "nodes of a job must reach each other on every port: look at firewalls, routes and cables between these and at "
            "DS_PRETRAIN_INTERFACE, or start the job without the node that is in all of them"
        )
        raise CutShortError([few(pairs, "; "), fix])


def _listening() -> socket.socket:
    """A socket where gloo will listen; the system completes connections by itself."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    at = address_of(interface) if interface else socket.gethostname()
    return socket.create_server((at, 0), backlog=4096)


def _knock(doors: Sequence[tuple[str, int]], own: int) -> list[tuple[int, str]]:
    """The doors but one's own that do not open, and why."""

    def one(at: int) -> tuple[int, str]:
        try:
            with socket.create_connection((doors[at][0], doors[at][1]), REACH):
                return at, ""
        except OSError as error:
            return at, error.strerror or f"no answer within {REACH:g} s"

    with ThreadPoolExecutor(32) as pool:
        return [(at, why) for at, why in pool.map(one, {*range(len(doors))} - {own}) if why]
