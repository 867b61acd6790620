"""A request to stop, noted now and obeyed between two steps: Ctrl-C, and the SIGTERM that clusters send before they preempt."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class InterruptedRun(Exception):
    """A run that was asked to stop and did. signal: the number; `exit_code` is what shells expect of it."""

    def __init__(self, number: int, told: str) -> None:
        self.signal = number
        super().__init__(f"{signal.Signals(number).name}: {told}")

    @property
    def exit_code(self) -> int:
        return 128 + self.signal


class StopRequest:
    """Inside `with`, the first signal is noted in `number` (0 before); a second one acts as it always does."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {each: signal.signal(each, self._note) for each in CAUGHT}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}
