"""Names to things, with the nearest name in the error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary filled by a decorator. `what` is the noun used in messages."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.what} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise ValueError(unknown(self.what, name, self._items))
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def values(self) -> Iterator[T]:
        return (self._items[name] for name in self)

    def __contains__(self, name: str) -> bool:
        return name in self._items


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`unknown objective 'mml': did you mean 'mlm'? Known: clm, mlm`"""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known)}"
