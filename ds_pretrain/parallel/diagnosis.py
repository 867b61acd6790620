"""What an examination of a cluster has found: the figures of all ranks, what is wrong with them, and tables for people.

Judging is pure: figures in, sentences out, each of which names the node, the numbers and the fix. A node is held against the
others, not against a catalogue of what it should be: whoever differs from the majority is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from statistics import median_high
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

GB, MB = 1e9, 1e6
SHOWN = 4
"""Names in a sentence."""
DIFFER = ("driver", "device")
"""Facts in which nodes may differ at the price of the slowest."""
FOREIGN = 2 * GB
"""Bytes of a device that somebody else has; less is what CUDA and NCCL take for themselves."""
ROOM = 5 * GB
"""Bytes that should be free in the output folder."""
SLOW_DISK = 20 * MB
LATE = 1.0
"""Seconds after which a file that is written on one node should be seen on all."""
SKEW = 1.0
"""Seconds by which clocks may differ."""
SLOW_LINK, SLOW_RANK = 0.5, 0.7
"""Share of the median under which a node's links, or a rank's computing, are called slow."""
SLOW_NETWORK = 100 * MB
"""Bytes a second: less is not what a cluster is joined by."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A rank and what it stands on. Memory in bytes; with CUDA the device's, else the host's.

    boot: an id of its host's start: two hosts can have one name. facts: what all must have alike. uuid: of its GPU, "" without;
    visible: of all that it sees. own: of the device's memory, this process's. flops: a second, in a matrix product.
    """

    host: str
    boot: str
    facts: Mapping[str, str]
    uuid: str = ""
    visible: Sequence[str] = ()
    free: int
    total: int
    own: int = 0
    cores: int
    load: float
    flops: float


class Folder(NamedTuple):
    """The output folder as one node has it. seen: seconds until rank 0's file was there, None: it never was; free: bytes; rate:
    bytes a second of a write that is on the disk; error: why it cannot be written."""

    path: str
    seen: float | None
    free: int = 0
    rate: float = 0.0
    error: str = ""


class Clock(NamedTuple):
    """Seconds by which a node's clock is before rank 0's, and by how much that may be wrong."""

    offset: float
    error: float


class Link(NamedTuple):
    """What goes from one rank to another: seconds of latency, bytes a second; or why nothing came through."""

    source: int
    target: int
    latency: float
    rate: float
    error: str = ""


class Verdict(NamedTuple):
    """stops: whether a job must not start with this."""

    stops: bool
    text: str


stop, note = partial(Verdict, True), partial(Verdict, False)


@dataclass(frozen=True)
class Findings:
    """What is known of a cluster; folders and clocks by the first rank of each node, as far as the examination came.

    links: between the first ranks of nodes; inside: between the GPUs of each node. reduced: bytes a second of each rank in an
    all-reduce; 0: not measured. cut: why the examination did not come to its end.
    """

    ranks: Sequence[Rank] = ()
    folders: Mapping[int, Folder] = field(default_factory=dict)
    clocks: Mapping[int, Clock] = field(default_factory=dict)
    links: Sequence[Link] = ()
    inside: Sequence[Link] = ()
    reduced: float = 0.0
    cut: Sequence[str] = ()

    @property
    def nodes(self) -> list[str]:
        """The name of every rank's node; hosts of one name are told apart by their first rank."""
        first: dict[tuple[str, str], int] = {}
        for number, rank in enumerate(self.ranks):
            first.setdefault((rank.host, rank.boot), number)
        hosts = Counter(host for host, _ in first)
        return [r.host if hosts[r.host] == 1 else f"{r.host} (from rank {first[r.host, r.boot]})" for r in self.ranks]

    @property
    def leaders(self) -> list[int]:
        """The first rank of each node."""
        return sorted({node: rank for rank, node in reversed([*enumerate(self.nodes)])}.values())

    @property
    def gpus(self) -> list[list[int]]:
        """Of each node the ranks that stand for its GPUs, the first of those that share one; none without CUDA."""
        if not all(rank.uuid for rank in self.ranks):
            return []
        nodes = by_node(self).values()
        return [sorted({rank.uuid: number for number, rank in reversed(ranks.items())}.values()) for ranks in nodes]

    @property
    def broken(self) -> bool:
        """Whether nothing comes through some link."""
        return any(link.error for link in chain(self.links, self.inside))

    def problems(self) -> list[str]:
        """What must stop a job."""
        return [*self.cut, *(verdict.text for verdict in self._verdicts() if verdict.stops)]

    def warnings(self) -> list[str]:
        """What a person should know."""
        return [verdict.text for verdict in self._verdicts() if not verdict.stops]

    def _verdicts(self) -> Iterator[Verdict]:
        return chain.from_iterable(judge(self) for judge in (differing, devices, folders, clocks, links, inside, computing))

    def tables(self) -> list[Table]:
        """Nodes and links, as far as there are several of them, and what the nodes have in common."""
        from ds_pretrain.parallel import diagnosis_table as shown

        between, inside = [shown.links(self)] if self.links else [], [shown.inside(self)] if self.inside else []
        return [shown.nodes(self), *between, *inside, shown.facts(self)] if self.ranks else []


def few(names: Sequence[str], separator: str = ", ") -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more


def differing(found: Findings) -> Iterator[Verdict]:
    """Facts that nodes do not have alike: who differs from most others (from rank 0, where there is no majority)."""
    for fact, values in camps(found).items():
        most = max(values, key=lambda value: len(values[value]))  # the first of equals: rank 0's
        others = "; ".join(f"{value} on {few(once(nodes))}" for value, nodes in values.items() if value != most)
        told = f"{fact}: {others}, but {most} on {few(once(values[most]))}"
        if others and fact in DIFFER:
            yield note(f"{told}: expect the pace of the slowest")
        elif others:
            yield stop(f"{told}: use the same environment and the same sources on every node")


def camps(found: Findings) -> dict[str, dict[str, list[str]]]:
    """Of each fact its values, and for each of these the node of every rank that has it."""
    known = dict.fromkeys(chain.from_iterable(rank.facts for rank in found.ranks))
    told: dict[str, dict[str, list[str]]] = {fact: {} for fact in known}
    for rank, node in zip(found.ranks, found.nodes, strict=True):
        for fact, values in told.items():
            values.setdefault(rank.facts.get(fact, "none"), []).append(node)
    return told


def once(names: Sequence[str]) -> list[str]:
    """Names without repetitions."""
    return [*dict.fromkeys(names)]


def devices(found: Findings) -> Iterator[Verdict]:
    """Ranks that share a GPU, GPUs without a rank, memory that is somebody else's, cores that are too few or busy."""
    for node, ranks in by_node(found).items():
        yield from _gpus(node, ranks)
    yield from _cores({node: [*ranks.values()] for node, ranks in by_node(found).items()})


def _gpus(node: str, ranks: Mapping[int, Rank]) -> Iterator[Verdict]:
    users: dict[str, list[int]] = {}
    for number, rank in ranks.items():
        if rank.uuid:
            users.setdefault(rank.uuid, []).append(number)
    for uuid, sharing in users.items():
        rank = ranks[sharing[0]]
        foreign = rank.total - rank.free - rank.own
        if len(sharing) > 1:
            yield stop(
                f"ranks {few([*map(str, sharing)])} on {node} share one GPU ({uuid}): give each its own by LOCAL_RANK or "
                "CUDA_VISIBLE_DEVICES, and start no more ranks than there are GPUs"
            )
        elif foreign > FOREIGN:
            yield note(
                f"of the GPU of rank {sharing[0]} on {node} ({uuid}) another process holds {foreign / GB:.1f} "
                f"of {rank.total / GB:.1f} GB: end it (nvidia-smi shows it)"
            )
    idle = len({uuid for rank in ranks.values() for uuid in rank.visible} - {*users})
    if idle:
        yield note(f"{node} has {idle + len(users)} GPUs and {len(ranks)} ranks: {idle} GPUs stay idle; start a rank for each")


def _cores(nodes: Mapping[str, Sequence[Rank]]) -> Iterator[Verdict]:
    busy, crowded, full = list[str](), list[str](), list[str]()
    for node, ranks in nodes.items():
        first = ranks[0]
        if first.load > first.cores + len(ranks):
            busy.append(f"{node} ({first.load:.1f} on {first.cores} cores)")
        if not first.uuid and len(ranks) > first.cores:
            crowded.append(f"{node} ({len(ranks)} on {first.cores})")
        if not first.uuid and first.free < first.total / 10:
            full.append(f"{node} ({first.free / GB:.1f} of {first.total / GB:.1f} GB)")
    if busy:
        yield note(f"the load is more than this job's on {few(busy)}: end what else computes there, or leave the node out")
    if crowded:
        yield note(f"there are more ranks than cores on {few(crowded)}: they wait for each other; start fewer there")
    if full:
        yield note(f"little memory is free on {few(full)}: end what holds it, or leave the node out")


def by_node(found: Findings) -> dict[str, dict[int, Rank]]:
    """The ranks of each node by their numbers."""
    ranks: dict[str, dict[int, Rank]] = {}
    for number, (node, rank) in enumerate(zip(found.nodes, found.ranks, strict=True)):
        ranks.setdefault(node, {})[number] = rank
    return ranks


def folders(found: Findings) -> Iterator[Verdict]:
    """Whether all nodes can write the output folder, have the same one, and room in it."""
    named = {found.nodes[rank]: folder for rank, folder in found.folders.items()}
    closed: dict[tuple[str, str], list[str]] = {}
    for node, folder in named.items():
        if folder.error:
            closed.setdefault((folder.path, folder.error), []).append(node)
    for (path, error), nodes in closed.items():
        yield stop(
            f"output {path} cannot be written on {few(nodes)} ({error}): make it writable there, or choose another folder"
        )
    if elsewhere := [f"{node} ({folder.path})" for node, folder in named.items() if folder.seen is None]:
        yield stop(
            f"what {found.nodes[0]} has written in output {found.folders[0].path} is not there on {few(elsewhere)}: output is "
            "not on a shared file system; give a folder that all nodes have in common, by an absolute path"
        )
    yield from _pace({node: folder for node, folder in named.items() if not folder.error and folder.seen is not None})


def _pace(named: Mapping[str, Folder]) -> Iterator[Verdict]:
    if full := [f"{node} ({folder.free / GB:.2f} GB)" for node, folder in named.items() if folder.free < ROOM]:
        yield note(f"little room is left in output on {few(full)}: checkpoints may not fit; make room")
    if slow := [f"{node} ({folder.rate / MB:.1f} MB/s)" for node, folder in named.items() if folder.rate < SLOW_DISK]:
        yield note(f"output is written slowly on {few(slow)}: checkpoints will take long; save less often, or on a faster disk")
    if late := [f"{node} (after {folder.seen:.1f} s)" for node, folder in named.items() if (folder.seen or 0) > LATE]:
        yield note(
            f"new files in output are seen late on {few(late)}: names are cached there; mount NFS with a smaller actimeo"
        )


def clocks(found: Findings) -> Iterator[Verdict]:
    """Clocks that are surely off by more than `SKEW`."""
    for rank, clock in found.clocks.items():
        if abs(clock.offset) - clock.error > SKEW:
            side = "ahead of" if clock.offset > 0 else "behind"
            yield note(
                f"the clock of {found.nodes[rank]} is {abs(clock.offset):.2f} s {side} that of {found.nodes[0]} (to "
                f"{clock.error * 1000:.1f} ms): logs and times of files will not fit together; let chrony or ntpd run there"
            )


def links(found: Findings) -> Iterator[Verdict]:
    """Pairs of nodes through which nothing comes, nodes whose links are slow beside those of others, a network that is slow."""
    yield from _uneven(
        found.links, found.nodes, "node", "look at the cable, the routes and the firewalls between the two, or start the job "
        "without one of them", "look at its cable, its port and its interface, or start the job without it",
    )  # fmt: skip
    rates = {(link.source, link.target): link.rate for link in found.links if not link.error}
    ends = {end for link in found.links for end in (link.source, link.target)}
    for (a, b), rate in rates.items() if len(ends) == 2 else ():  # of two nodes none is the usual one
        if rate < SLOW_LINK * (back := rates.get((b, a), 0.0)):
            yield note(
                f"from {found.nodes[a]} to {found.nodes[b]} goes {told_rate(rate)}, back {told_rate(back)}, and two nodes "
                "cannot tell which of them is slow: look at the cables and ports of both, or run doctor on a third one too"
            )
    typical = median_high(end_rates(found.links).values() or [SLOW_NETWORK])
    if typical < SLOW_NETWORK:
        yield note(
            f"nodes are joined by {told_rate(typical)} only: if there is a faster network, choose its interface by "
            "DS_PRETRAIN_INTERFACE"
        )


def inside(found: Findings) -> Iterator[Verdict]:
    """The same of the GPUs of each node, held against those of all nodes."""
    fix = "look at `nvidia-smi topo -m` and `nvidia-smi nvlink -s` there, or start the job without this node"
    yield from _uneven(found.inside, [f"rank {n} on {node}" for n, node in enumerate(found.nodes)], "GPU", fix, fix)


def _uneven(found: Sequence[Link], names: Sequence[str], kind: str, joining: str, hastening: str) -> Iterator[Verdict]:
    for (a, b), error in {_pair(link): link.error for link in found if link.error}.items():
        yield stop(f"{names[a]} and {names[b]} do not get through to each other ({error}): {joining}")
    rates = end_rates(found)
    typical = median_high(rates.values() or [0.0])
    for end, rate in rates.items():
        if rate < SLOW_LINK * typical:
            told = f"its links carry {told_rate(rate)}, those of a usual {kind} {told_rate(typical)}"
            yield note(f"{names[end]} is slow: {told}; {hastening}")


def end_rates(found: Sequence[Link]) -> dict[int, float]:
    """The median of each rank's pairs, of which the slower direction counts: bytes a second by rank."""
    pairs: dict[tuple[int, int], float] = {}
    for link in found:
        if not link.error:
            pairs[_pair(link)] = min(link.rate, pairs.get(_pair(link), link.rate))
    ends = sorted({end for pair in pairs for end in pair})
    return {end: median_high(rate for pair, rate in pairs.items() if end in pair) for end in ends}


def _pair(link: Link) -> tuple[int, int]:
    return min(link.source, link.target), max(link.source, link.target)


def computing(found: Findings) -> Iterator[Verdict]:
    """Ranks that compute more slowly than the others."""
    typical = median_high(rank.flops for rank in found.ranks) if found.ranks else 0.0
    slow = [number for number, rank in enumerate(found.ranks) if rank.flops < SLOW_RANK * typical]
    if slow:
        nodes = found.nodes
        named = few([f"rank {n} on {nodes[n]} ({found.ranks[n].flops / typical:.0%})" for n in slow])
        yield note(
            f"slower than the median of {told_flops(typical)}: {named}: a throttled or shared GPU, or a busy core; every step "
            "waits for the slowest: leave such a node out"
        )


def told_rate(rate: float) -> str:
    """Bytes a second, for people."""
    return f"{rate / GB:.2f} GB/s" if rate >= GB else f"{rate / MB:.3g} MB/s"


def told_flops(flops: float) -> str:
    """Floating-point operations a second, for people."""
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"
