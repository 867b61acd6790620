"""Balanced texts: how much of each language or source a tokenizer (or a mixture) should see.

Source i, with share_i of all bytes, is drawn with p_i proportional to share_i^(1/T): T = 1 leaves the shares as they are, a
large T makes them equal (multilingual BERT: exponent 0.7, T = 1.43; XLM-R: exponent 0.3, T = 3.33; Conneau et al. 2020, 3.1).
Shares are counted in UTF-8 bytes, so a script of three bytes a character counts threefold; that is what there is to read.

Nothing is drawn at random: a source's share of the budget is its whole text so many times over, and of the rest the
documents of lowest hash, the last one cut, so the bytes come out exactly, whatever order the documents come in. The price:
the texts are read twice (sizes first), and come source by source, which no trainer of tokenizers minds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import xxhash
from rich.table import Table

Texts = Callable[[], Iterable[str]]
"""Reads a source anew, the same each time."""


@dataclass(frozen=True)
class Share:
    """One source of a balanced corpus.

    size: bytes that there are. probability: its share of what is drawn. drawn: bytes of it that are drawn.
    """

    name: str
    size: int
    probability: float
    drawn: int

    @property
    def epochs(self) -> float:
        """How often its text is read; above 1 it is repeated."""
        return self.drawn / self.size


def shares(sizes: Mapping[str, int], temperature: float, budget: int | None = None) -> tuple[Share, ...]:
    """What to draw of sources of these sizes in bytes: `budget` bytes in all, as many as there are if left out."""
    if empty := [name for name, size in sizes.items() if size <= 0]:
        raise ValueError(f"source {empty[0]} has no text: leave it out, it cannot be balanced")
    if not sizes or not temperature > 0:
        raise ValueError(f"temperature must be above 0 (1 keeps the shares) and there must be a source, got {temperature}")
    total = sum(sizes.values())
    powers = {name: (size / total) ** (1 / temperature) for name, size in sizes.items()}
    scale = sum(powers.values())
    wanted = total if budget is None else budget
    return tuple(Share(name, sizes[name], p / scale, round(p / scale * wanted)) for name, p in powers.items())


def measure(sources: Mapping[str, Texts]) -> dict[str, int]:
    """Bytes of each source."""
    return {name: sum(len(text.encode()) for text in texts()) for name, texts in sources.items()}


def balance(sources: Mapping[str, Texts], plan: Iterable[Share], seed: int = 0) -> Iterator[str]:
    """The texts that a plan draws, source by source."""
    for share in plan:
        yield from draw(sources[share.name], share.drawn, share.size, seed)


def draw(texts: Texts, wanted: int, size: int, seed: int = 0) -> Iterator[str]:
    """`wanted` bytes out of a source of `size`, less at most three where a character is not cut."""
    for _ in range(wanted // size):
        yield from texts()
    rest = wanted % size
    parts = _lowest(texts(), rest, seed) if rest else {}
    for place, text in enumerate(texts() if rest else ()):
        if room := parts.get(place):
            yield text.encode()[:room].decode(errors="ignore")


def _lowest(texts: Iterable[str], wanted: int, seed: int) -> dict[int, int]:
    """Bytes to take of the documents of lowest hash, by their place."""
    keys = sorted(
        (xxhash.xxh3_64_intdigest(text.encode(), seed), place, len(text.encode())) for place, text in enumerate(texts)
    )
    taken: dict[int, int] = {}
    for _, place, length in keys:
        taken[place] = min(length, wanted)
        wanted -= taken[place]
        if not wanted:
            break
    return taken


def table(plan: Iterable[Share], temperature: float) -> Table:
    """The plan for people."""
    plan = tuple(plan)
    total = sum(share.size for share in plan)
    made = Table(title=f"balanced at temperature {temperature:g}")
    for name in ("source", "bytes", "share", "drawn", "share drawn", "epochs"):
        made.add_column(name, justify="left" if name == "source" else "right")
    for share in plan:
        made.add_row(
            share.name,
            f"{share.size:,}",
            f"{share.size / total:.1%}",
            f"{share.drawn:,}",
            f"{share.probability:.1%}",
            f"{share.epochs:.2f}",
        )
    return made
