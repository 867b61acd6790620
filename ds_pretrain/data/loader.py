"""Micro-batches of one data rank, made ahead of time by one background thread.

A thread and not processes: the work is numpy on a memory map, it takes a small share of one core, and a thread has no
start-up cost, no shared memory to lose and nothing to deadlock on a fork. An error in it is raised by the `next()` that
would have given the step. The price: collation holds the interpreter lock for part of its time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

from ds_pretrain.core.batch import Batch
from ds_pretrain.data.dataset import Cursor, Row, Samples
from ds_pretrain.data.mixing import MixedCursor, MixedDataset


class Step(NamedTuple):
    """This rank's micro-batches of one step, the position where the next step starts, and the step's samples over all ranks
    by the component of a mixture that makes them."""

    batches: list[Batch]
    cursor: Cursor | MixedCursor
    consumed: Counter[str] = Counter()


class Loader:
    """Iterates over steps without end.

    global_size: rows of a step over all data ranks. micro_size: rows of one micro-batch. prefetch: steps made ahead.
    Micro-batch m of data rank r holds rows [(m * data_size + r) * micro_size, + micro_size) of its step.
    """

    def __init__(
        self,
        dataset: Samples | MixedDataset,
        global_size: int,
        micro_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        cursor: Cursor | MixedCursor | None = None,
        prefetch: int = 2,
    ) -> None:
        check_sizes(global_size, micro_size, data_size)
        self.dataset, self.global_size, self.micro_size = dataset, global_size, micro_size
        self.data_rank, self.data_size = data_rank, data_size
        self._next: Any = dataset.first if cursor is None else cursor
        self._prefetch = max(1, prefetch)
        self._pending: deque[Future[Step]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        while len(self._pending) < self._prefetch:
            self._pending.append(self._thread.submit(self._build))
        step = self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._build))
        return step

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread after the step it is making. Safe to call twice."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _build(self) -> Step:
        """Runs in the one thread, so the cursor moves in order."""
        rows, cursor = self.dataset.rows(self._next, self.global_size)
        mine = own_rows(rows, self.micro_size, self.data_rank, self.data_size)
        step = Step([self.dataset.collate(micro) for micro in mine], cursor, self.dataset.consumed(rows))
        self._next = cursor
        return step


def check_sizes(global_size: int, micro_size: int, data_size: int) -> None:
    """Refuses a step that does not divide into whole micro-batches on every data rank."""
    unit = micro_size * data_size
    if min(global_size, unit) < 1 or global_size % unit:
        near = max(unit, round(global_size / unit) * unit) if unit > 0 else 1
        raise ValueError(
            f"global batch size {global_size} must be a multiple of micro batch size {micro_size} times data-parallel "
            f"size {data_size} = {unit}: use {near}, or another micro batch size"
        )


def own_rows(rows: list[Row], micro_size: int, data_rank: int, data_size: int) -> list[list[Row]]:
    """The rows of one data rank's micro-batches, out of all rows of a step."""
    first = range(data_rank * micro_size, len(rows), data_size * micro_size)
    return [rows[i : i + micro_size] for i in first]


def evaluation_batches(
    dataset: Samples, max_tokens: int | None, micro_size: int, data_rank: int = 0, data_size: int = 1, draw: int = 0
) -> Iterator[Batch]:
    """This rank's share of the evaluation, equally many on all ranks: what is missing is rows of padding."""
    rows = dataset.evaluation(max_tokens, draw).rows
    missing = -len(rows) % (micro_size * data_size)
    return (dataset.collate(m) for m in own_rows(rows + [()] * missing, micro_size, data_rank, data_size))
