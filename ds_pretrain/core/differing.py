"""What two sets of settings do not share, in short: for whoever asked for the same again and did not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = 100
"""Characters of a setting that are shown."""


def differing(was: Any, now: Any, name: str = "") -> str:
    """`name: was -> now` for each setting that differs, named as in an override (`train.max_steps`)."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        return ", ".join(differing(was.get(key), now.get(key), f"{name}.{key}" if name else str(key)) for key in keys)
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now) > 3:
        places = [i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b]
        return f"{name}: {len(places)} of {len(was)} entries, first {_short(was[places[0]])} -> {_short(now[places[0]])}"
    return f"{name}: {_short(was)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
