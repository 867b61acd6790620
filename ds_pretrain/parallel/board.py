"""A board on which ranks tell each other what they have found, where the links between them are themselves in question.

Everything goes through the store that the ranks met in: a rank that reached rank 0 once can still speak when its way to every
other rank is broken. Rank 0 collects and hands out, as one packed JSON. What a rank has to do before it answers runs in a
thread beside it, so one that hangs in a disk or a driver says so itself, and nobody waits longer than a limit. The price is a
store that serves every rank in turn: for words, not for tensors.
"""

from __future__ import annotations

import json
import socket
import zlib
from base64 import b85decode, b85encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import Any

import torch.distributed as dist

from ds_pretrain.parallel.diagnosis import few
from ds_pretrain.parallel.launch import JOIN, hosts_of, nodes_of

DONE = 20.0
"""Seconds in which a rank must have done what it answers for."""
LATE = 10.0
"""Seconds more after which a rank that has said nothing is silent."""


class CutShortError(ConnectionError):
    """The ranks cannot go on together. found: who does not answer, or what failed where; the same on every rank."""

    def __init__(self, found: Sequence[str]) -> None:
        super().__init__("; ".join(found))
        self.found = list(found)


class Board:
    """One rank's view of it, inside `with`. name: under which nobody else in this job writes; the same on every rank."""

    def __init__(self, store: dist.Store, rank: int, world: int, name: str) -> None:
        self.store, self.rank, self.world = dist.PrefixStore(name, store), rank, world
        self.names = [f"rank {rank}" for rank in range(world)]

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        """Rank 0, which may hold the store and end after this, leaves last."""
        with suppress(dist.DistError):
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self.store.wait([f"left/{rank}" for rank in range(self.world)], timedelta(seconds=DONE / 2))

    def meet(self) -> list[str]:
        """The host of every rank (collective). Ranks may come as late as to the job itself; from here on they have names."""
        what, seconds = "its name", JOIN.total_seconds()
        answers = self._answers(what, socket.gethostname, range(self.world), seconds, DONE)
        hosts = [answer and answer["value"] for answer in answers]
        self.names = [f"rank {rank} on {host}" if host else f"rank {rank}" for rank, host in enumerate(hosts)]
        if silent := [rank for rank, host in enumerate(hosts) if not host]:
            raise CutShortError([self._silent(silent, what, seconds), _absent(list(dict.fromkeys(filter(None, hosts))))])
        return hosts

    def gather(
        self, what: str, make: Callable[[], Any], among: Sequence[int] | None = None, seconds: float | None = None
    ) -> list[Any]:
        """What `make` returns on each rank of `among` (all, if None; rank 0 is always of them), on every rank (collective).

        what: said once on this board, in words for people. seconds: for `make`, DONE if None. Values are what JSON holds.
        CutShortError, on every rank alike, if a rank does not answer or its `make` raises or hangs.
        """
        seconds = DONE if seconds is None else seconds
        among = range(self.world) if among is None else among
        told = self._answers(what, make, among, seconds + LATE, seconds)
        if silent := [rank for rank, answer in zip(among, told, strict=True) if answer is None]:
            raise CutShortError([self._silent(silent, what, seconds + LATE)])
        failed: dict[str, list[str]] = {}
        for rank, answer in zip(among, told, strict=True):
            if "error" in answer:
                failed.setdefault(answer["error"], []).append(self.names[rank])
        if failed:
            raise CutShortError([f"{few(names)}: {what}: {error}" for error, names in failed.items()])
        return [answer["value"] for answer in told]

    def put(self, key: str, word: str) -> None:
        self.store.set(key, word)

    def take(self, key: str) -> str:
        """The word of a key, once it is there. RuntimeError if it does not come."""
        self.store.wait([key], timedelta(seconds=DONE / 2))
        return self.store.get(key).decode()

    def _answers(self, what: str, make: Callable[[], Any], among: Sequence[int], seconds: float, done: float) -> list[Any]:
        """What each rank of `among` said within so many seconds, a value or an error; None of a silent one."""
        if self.rank in among:
            self.store.set(f"{what}/{self.rank}", _answer(make, done))
        if self.rank == 0:
            self._publish(what, among, seconds)
        return [answer and json.loads(answer) for answer in self._published(what, seconds)]

    def _publish(self, what: str, among: Sequence[int], seconds: float) -> None:
        keys = [f"{what}/{rank}" for rank in among]
        with suppress(dist.DistStoreError):
            self.store.wait(keys, timedelta(seconds=seconds))
        answers = [self.store.get(key).decode() if self.store.check([key]) else None for key in keys]
        self.store.set(f"{what}/all", b85encode(zlib.compress(json.dumps(answers).encode())).decode())
        for key, answer in zip(keys, answers, strict=True):
            if answer is not None:
                self.store.delete_key(key)

    def _published(self, what: str, seconds: float) -> list[Any]:
        """Rank 0 may itself be late by as much as it waits for others."""
        try:
            self.store.wait([f"{what}/all"], timedelta(seconds=3 * seconds))
            return json.loads(zlib.decompress(b85decode(self.store.get(f"{what}/all"))))
        except dist.DistError:
            raise CutShortError([self._silent([0], what, seconds)]) from None

    def _silent(self, ranks: Sequence[int], what: str, seconds: float) -> str:
        return (
            f"no answer from {few([self.names[rank] for rank in ranks])} ({what}, within {seconds:g} s): ended, hanging or cut "
            "off; look at the logs and the nodes, or start the job without these nodes"
        )


def _absent(came: Sequence[str]) -> str:
    """Hosts without a rank, where the scheduler tells them, else those that have one."""
    short = {host.partition(".")[0] for host in came}
    missing = [host for host in hosts_of(nodes_of() or ",".join(came)) if host.partition(".")[0] not in short]
    return f"no rank came from {few(missing)}" if missing else f"ranks came from {few(came)}"


def _answer(make: Callable[[], Any], done: float) -> str:
    """A rank that fails or hangs must still say so: the others wait."""
    said: list[str] = []

    def work() -> None:
        try:
            said.append(json.dumps({"value": make()}))
        except Exception as error:
            said.append(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}))

    thread = Thread(target=work, daemon=True, name="examination")
    thread.start()
    thread.join(done)
    return said[0] if said else json.dumps({"error": f"hangs, it is not done after {done:g} s"})
