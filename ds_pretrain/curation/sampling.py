"""So much of a corpus, or of one quality tier: the documents of lowest hash, so a smaller sample is a part of a larger one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ds_pretrain.core.registry import unknown
from ds_pretrain.curation import runs
from ds_pretrain.curation.documents import Dropped, Folder, Place, Row, Work, number_of, read_part, step, write_part
from ds_pretrain.curation.quality import TIERS
from ds_pretrain.curation.workers import Workers

WEIGHED = np.dtype([("key", "<u8"), ("bytes", "<i8")])


def check(tier: str, size: int) -> None:
    """ValueError for a sample that cannot be."""
    if tier and tier not in TIERS:
        raise ValueError(unknown("tier", tier, TIERS))
    if size < 0:
        raise ValueError(f"a sample of {size} bytes cannot be: give a size above 0, or 0 for all")


def sample(before: Folder, out: Path, workers: Workers, tier: str = "", size: int = 0) -> Folder:
    """Documents of a tier ("": of all) up to `size` bytes of text (0: all). ValueError if there are fewer, or no labels."""
    check(tier, size)

    def do(work: Work) -> dict[str, Any]:
        place = work.place
        work.each("weigh", place.parts, partial(_weigh, place, tier), partial(place.of, "weighed"))
        last = _last(np.concatenate([runs.load(path) for path in place.every("weighed")]), before, tier, size)
        work.write("draw", partial(_draw, work.folder, tier, last))
        return {}

    return step("sample", out, before, {"tier": tier, "bytes": size}, workers, do)


def _last(weighed: np.ndarray, before: Folder, tier: str, size: int) -> int:
    """The highest hash of the sample."""
    there = int(weighed["bytes"].sum())
    if not there or there < size:
        of = f"{before.path} has {there:,} bytes" + (f" of tier {tier}" if tier else "")
        hint = "" if there or not tier else ": label its documents first (screen --labels tier)"
        raise ValueError(f"{of}, {max(size, 1):,} are asked for{hint or ': ask for less, or add text'}")
    ordered = np.sort(weighed, order="key")
    enough = int(np.searchsorted(np.cumsum(ordered["bytes"]), size)) if size else len(ordered) - 1
    return int(ordered["key"][enough])


def _key(row: Row) -> int:
    return xxhash.xxh3_64_intdigest(row.text.encode(), seed=1)  # another one than splits are drawn by


def _weigh(place: Place, tier: str, part: Path) -> None:
    rows = [(_key(row), len(row.text.encode())) for row in read_part(part) if tier in ("", row.tier)]
    runs.save(place.of("weighed", part), np.array(rows, dtype=WEIGHED))


def _draw(folder: Path, tier: str, last: int, part: Path) -> None:
    write_part(folder, number_of(part), (_drawn(row, tier, last) for row in read_part(part)))


def _drawn(row: Row, tier: str, last: int) -> Row | Dropped:
    if tier not in ("", row.tier):
        return Dropped(row, f"tier {row.tier or 'unlabelled'}")
    return row if _key(row) <= last else Dropped(row, "enough without it")
