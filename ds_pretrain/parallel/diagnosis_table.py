"""Findings as tables: nodes, the slowest links, and what nodes have alike."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ds_pretrain.parallel import diagnosis
from ds_pretrain.parallel.diagnosis import GB, Clock, Findings, Folder, Link, few, told_flops, told_rate

ROWS = 12
"""Links in a table."""


def nodes(found: Findings) -> Table:
    """A row for each node: of its ranks the slowest, of its links the median."""
    title = f"ranks: {len(found.ranks)}, nodes: {len(found.leaders)}"
    reduced = f"all-reduce over all ranks: {told_rate(found.reduced)} for each" if found.reduced else None
    heads = ["node", "ranks", "memory free", "load", "computes"]
    disk = ["disk free", "seen", "writes"] if found.folders else []
    several = ["clock", "links"] if len(found.leaders) > 1 else []
    table, rates = Table(*heads, *disk, *several, title=title, caption=reduced), diagnosis.end_rates(found.links)
    for node, ranks in diagnosis.by_node(found).items():
        rank, first = next(iter(ranks.items()))
        free, total = min((each.free, each.total) for each in ranks.values())
        memory, load = f"{free / GB:.1f}/{total / GB:.1f} GB", f"{first.load:.1f}/{first.cores}"
        row = [escape(node), str(len(ranks)), memory, load, told_flops(min(each.flops for each in ranks.values()))]
        row += _folder(found.folders.get(rank)) if disk else []
        row += [_clock(found.clocks.get(rank)), told_rate(rates[rank]) if rank in rates else "-"] if several else []
        table.add_row(*row)
    return table


def _clock(clock: Clock | None) -> str:
    return f"{clock.offset * 1000:+.1f}±{clock.error * 1000:.1f} ms" if clock else "-"


def _folder(folder: Folder | None) -> list[str]:
    if folder is None or folder.seen is None:
        return ["-", "never" if folder else "-", "-"]
    seen = f"{folder.seen:.2f} s"
    return ["-", seen, "cannot"] if folder.error else [f"{folder.free / GB:.1f} GB", seen, told_rate(folder.rate)]


def links(found: Findings) -> Table:
    """The slowest links between nodes."""
    several = len(found.leaders)
    return _slowest(found.links, found.nodes, f"links: {len(found.links)} of {several * (several - 1)} directions")


def inside(found: Findings) -> Table:
    """The slowest links between GPUs of a node."""
    several = sum(len(gpus) * (len(gpus) - 1) for gpus in found.gpus)
    names = [f"rank {number} on {node}" for number, node in enumerate(found.nodes)]
    return _slowest(found.inside, names, f"links inside nodes: {len(found.inside)} of {several} directions")


def _slowest(found: Sequence[Link], names: Sequence[str], title: str) -> Table:
    slowest = sorted(found, key=lambda link: link.rate)[:ROWS]
    table = Table("from", "to", "carries", "latency", title=title)
    for link in slowest:
        carries = ("nothing", "-") if link.error else (told_rate(link.rate), f"{link.latency * 1000:.3f} ms")
        table.add_row(escape(names[link.source]), escape(names[link.target]), *carries)
    if len(found) > ROWS:
        table.add_row("...", "", "", f"{len(found) - ROWS} faster")
    return table


def facts(found: Findings) -> Table:
    """What the nodes have in common, and who has something else."""
    table = Table("what", "which", "where", title="what nodes should have alike")
    for fact, values in diagnosis.camps(found).items():
        for value, ranks in values.items():
            table.add_row(fact, escape(value), "everywhere" if len(values) == 1 else escape(few(diagnosis.once(ranks))))
    return table
