"""So much of a corpus, or of one quality tier: documents in the order of their hashes, whichever still fit.

One long document at the end would make a small sample a sixth larger than another of its size. So it is passed over, and
shorter ones behind it fill what is left. The price: a smaller sample is a part of a larger one but for those.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ds_pretrain.core.registry import unknown
from ds_pretrain.curation import runs
from ds_pretrain.curation.documents import Dropped, Folder, Place, Row, Work, number_of, read_part, step, write_part
from ds_pretrain.curation.prepare import rank, split_of
from ds_pretrain.curation.quality import TIERS
from ds_pretrain.curation.workers import Workers
from ds_pretrain.data.store import SPLITS

WEIGHED = np.dtype([("key", "<u8"), ("bytes", "<i8")])


def check(tier: str, size: int) -> None:
    """ValueError for a sample that cannot be."""
    if tier and tier not in TIERS:
        raise ValueError(unknown("tier", tier, TIERS))
    if size < 0:
        raise ValueError(f"a sample of {size} bytes cannot be: give a size above 0, or 0 for all")


def sample(
    before: Folder, out: Path, workers: Workers, tier: str = "", size: int = 0, shares: Sequence[float] = (1.0, 0.0, 0.0)
) -> Folder:
    """Documents of a tier ("": of all) with `size` bytes of text, or as few less as whole documents allow (0: all).

    shares: of a split to come (`prepare`), whose train documents alone are counted and left out: what it will hold out stays
    whole, so that samples of one size train on as much. ValueError if there is less text.
    """
    check(tier, size)

    def do(work: Work) -> dict[str, Any]:
        place = work.place
        work.each("weigh", place.parts, partial(_weigh, place, tier, tuple(shares)), partial(place.of, "weighed"))
        weighed = runs.joined(place.every("weighed"))
        if (there := int(weighed["bytes"].sum())) < max(1, size):
            for path in place.every("weighed"):
                path.unlink()  # so that nothing is left to go on with
            raise ValueError(_too_little(before, tier, there, size))
        work.write("draw", partial(_draw, work.folder, tier, tuple(shares), *_chosen(weighed, size)))
        return {}

    return step("sample", out, before, {"tier": tier, "bytes": size, "shares": list(shares)}, workers, do)


def _too_little(before: Folder, tier: str, there: int, size: int) -> str:
    what = f"of tier {tier} " if tier else ""
    hint = "ask for less, or add text" if there else "label its documents first (screen --labels tier), or ask for another tier"
    return f"{before.path} has {there:,} bytes {what}to train on, {size:,} are asked for: {hint}"


def _chosen(weighed: np.ndarray, size: int) -> tuple[int, frozenset[int]]:
    """The hash below which every document is of the sample, and the hashes of those above it that fill it up."""
    keys, copies = np.unique(weighed["key"], return_inverse=True)
    sizes = np.bincount(copies, weights=weighed["bytes"]).astype(np.int64)  # exact copies come together
    if not size:
        return int(keys[-1]) + 1, frozenset()
    whole = int(np.searchsorted(np.cumsum(sizes), size, "right"))
    left, more, at = size - int(sizes[:whole].sum()), list[int](), whole
    while len(fits := np.flatnonzero(sizes[at:] <= left)):
        at += int(fits[0]) + 1
        left -= int(sizes[at - 1])
        more.append(int(keys[at - 1]))
    return int(keys[whole]) if whole < len(keys) else int(keys[-1]) + 1, frozenset(more)


def _trains(row: Row, tier: str, shares: Sequence[float]) -> bool:
    return tier in ("", row.tier) and split_of(row.text, shares) == SPLITS[0]


def _weigh(place: Place, tier: str, shares: Sequence[float], part: Path) -> None:
    rows = [(rank(row.text), len(row.text.encode())) for row in read_part(part) if _trains(row, tier, shares)]
    runs.save(place.of("weighed", part), np.array(rows, dtype=WEIGHED))


def _draw(folder: Path, tier: str, shares: Sequence[float], below: int, more: frozenset[int], part: Path) -> None:
    write_part(folder, number_of(part), (_drawn(row, tier, shares, below, more) for row in read_part(part)))


def _drawn(row: Row, tier: str, shares: Sequence[float], below: int, more: frozenset[int]) -> Row | Dropped:
    if tier not in ("", row.tier):
        return Dropped(row, f"tier {row.tier or 'unlabelled'}")
    fits = not _trains(row, tier, shares) or (key := rank(row.text)) < below or key in more
    return row if fits else Dropped(row, "enough without it")
