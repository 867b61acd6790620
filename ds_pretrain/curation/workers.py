"""Who does the work: this process, the cores of this machine, or MPI ranks on many, behind one function.

A piece of work is a pure function of a picklable unit that writes its own file, so it does not matter who does it, how many
there are or in what order: the bytes are the same. Under `mpirun -n N python -m mpi4py ...` rank 0 hands out the units and
the other N - 1 ranks work (mpi4py.futures). Processes end with the one that started them, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TypeVar, cast

from rich.console import Console
from rich.progress import track

U = TypeVar("U")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """Does units of work. pool: None does them here. quiet: no progress bar."""

    pool: Executor | None = None
    quiet: bool = False

    def here(self, what: str, work: Callable[[], R]) -> R:
        """Work that cannot be shared, by this process."""
        return replace(self, pool=None).map(what, lambda _: work(), [None])[0]

    def map(self, what: str, work: Callable[[U], R], units: Sequence[U]) -> list[R]:
        """What `work` gives for each unit, in their order. RuntimeError if a worker dies; what others have finished stays.

        Nobody works any more when this ends, by an error too.
        """
        if self.pool is None:
            return list(self._told(what, map(work, units), len(units)))
        asked = [self.pool.submit(work, unit) for unit in units]
        try:
            return list(self._told(what, (each.result() for each in asked), len(units)))
        except BaseException as error:
            for each in asked:
                each.cancel()
            wait(asked)
            if not isinstance(error, BrokenProcessPool):
                raise
            raise RuntimeError(
                f"a worker was killed while it did {what!r} (out of memory?): run the same command again, with fewer --jobs if "
                "need be; finished parts are kept"
            ) from None

    def _told(self, what: str, done: Iterator[R], count: int) -> Iterator[R]:
        """These results, with a progress bar for whoever watches."""
        console = Console(stderr=True)
        yield from track(done, what, count, console=console, disable=self.quiet or not console.is_terminal, transient=True)


@contextmanager
def workers(jobs: int, quiet: bool = False) -> Iterator[Workers | None]:
    """Workers on this rank 0; None on other MPI ranks, once there is no more work for them. jobs: processes without MPI."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if _ranks() > 1:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor

        if MPI.COMM_WORLD.rank:
            _lone_tokenizers()
        with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
            yield Workers(cast(Executor, pool), quiet) if pool else None
    elif jobs == 1:
        yield Workers(quiet=quiet)
    else:
        context = multiprocessing.get_context("forkserver")
        theirs, ours = context.Pipe(duplex=False)
        with ours, theirs, ProcessPoolExecutor(jobs, context, _begin, (theirs,)) as pool:
            yield Workers(pool, quiet)


def _begin(alive: Connection) -> None:
    """What a worker does first."""
    _lone_tokenizers()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    """End this process when the one at the other end of the pipe does: a killed one cannot tell its workers, and they would
    write into the files of those of the next run."""
    alive.poll(None)  # nothing is ever sent: it is closed
    os._exit(1)


def _lone_tokenizers() -> None:
    """A worker is one of as many as there are cores, so its tokenizers need no threads of their own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def one_thread() -> Iterator[None]:
    """Models on one thread: their sums are taken in one order, whatever cores there are, and workers are not in each other's
    way. The price: a core without a worker idles."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ranks() -> int:
    """Ranks of this MPI job; 1 outside of one."""
    if "mpi4py" in sys.modules:
        from mpi4py import MPI

        return MPI.COMM_WORLD.size
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    count = int(next((value for name in names if (value := os.environ.get(name))), 1))
    if count > 1:
        raise RuntimeError("start as `mpirun -n N python -m mpi4py ...`: else an error on one rank leaves the others hanging")
    return count
