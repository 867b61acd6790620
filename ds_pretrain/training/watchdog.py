"""Ends a process that has not moved for too long, with the stacks of all its threads: a hung job costs minutes, not a night.

Collectives have timeouts of their own, but not all of them (DeepSpeed makes groups by itself), and a loader, a disk or a driver
has none. So each rank watches itself: no step, evaluation or save for `seconds`, and it writes its stacks to stderr and to
OUTPUT/stacks/rank-N.txt and leaves with exit code 76. The others hang in a collective then and do the same: a rank waits a
moment before it goes, as most launchers kill the rest at once. The price: one thread, and a limit that must be longer than the
longest step, the first one's compilation included.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ds_pretrain.core.exits import HUNG

STDERR = 2
GRACE = 5.0
"""Seconds for the other ranks to write down where they are."""


class Watchdog:
    """Inside `with`, `beat` must be called at least every `seconds`; 0: never. folder: where stacks go; None: stderr only."""

    def __init__(self, seconds: float, rank: int, folder: Path | None) -> None:
        self.seconds, self.rank, self.folder = seconds, rank, folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self.beat("the start")

    def beat(self, what: str) -> None:
        """Something was done."""
        self._what, self._when = what, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._last_resort()
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()  # so that it does not set the last resort again
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            self._last_resort()
            if time.monotonic() - self._when > self.seconds:
                self._end()

    def _last_resort(self) -> None:
        """For when this watch itself cannot run, as some thread holds Python's lock: the interpreter's own, in C."""
        faulthandler.dump_traceback_later(4 * self.seconds + GRACE, exit=True, file=STDERR)

    def _end(self) -> None:
        told = (
            f"rank {self.rank} on {socket.gethostname()} has not moved for {self.seconds:g} s since {self._what}: it ends with "
            f"exit code {HUNG}. Its stacks follow: a rank that waits for others is in a collective, the one to blame is not "
            "(train.watchdog_seconds is the limit)"
        )
        print(f"error {told}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(STDERR)
        if self.folder:
            self._write(told)
        time.sleep(GRACE)
        os._exit(HUNG)

    def _write(self, told: str) -> None:
        assert self.folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("w") as file:
                print(told, file=file, flush=True)
                faulthandler.dump_traceback(file)
        except OSError as error:  # the disk may be what hangs or is full
            print(f"stacks could not be written to {self.folder}: {error}", file=sys.stderr)
