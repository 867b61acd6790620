"""A request to stop, noted now and obeyed between two steps, with a checkpoint.

Ctrl-C; the SIGTERM of whoever cancels; the SIGUSR1 that clusters send before a limit or a pre-emption, after which the job is
to come back; a file `stop` in the output folder; and an end that was set beforehand (`train.max_minutes`).
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FILE, TIME = 1001, 1002
"""Reasons that are no signals."""


class InterruptedRun(Exception):
    """A run that was asked to stop and did. reason: a signal's number, `FILE` or `TIME`; `exit_code` is what shells expect.

    kept: whether there is a checkpoint to go on from.
    """

    def __init__(self, reason: int, told: str, kept: bool = True) -> None:
        self.reason, self.kept = reason, kept
        name = {FILE: "its file `stop`", TIME: "train.max_minutes"}.get(reason) or signal.Signals(reason).name
        super().__init__(f"{name}: {told}")

    @property
    def exit_code(self) -> int:
        """128 + the signal for an interruption; 0 for an end in good order, which USR1 is with a checkpoint."""
        broken = (signal.SIGINT, signal.SIGTERM) if self.kept else CAUGHT
        return 128 + self.reason if self.reason in broken else 0


class StopRequest:
    """Inside `with`, the first signal is noted; a second Ctrl-C or SIGTERM acts as it always does, a second SIGUSR1 is none.

    file: stops when it is there; None on ranks that do not look. minutes: stops when so many have passed; None: never.
    """

    def __init__(self, file: Path | None = None, minutes: float | None = None) -> None:
        self._signal, self._file = 0, file
        self._end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> int:
        """Why to stop now, as `InterruptedRun` names it; 0: go on."""
        if self._signal:
            return self._signal
        if self._file and self._file.exists():
            return FILE
        return TIME if time.monotonic() > self._end else 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {each: signal.signal(each, self._note) for each in CAUGHT}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore(*self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number
        self._restore(*({signal.SIGINT, signal.SIGTERM} & self._before.keys()))

    def _restore(self, *which: int) -> None:
        for each in which:
            signal.signal(each, self._before.pop(each))
