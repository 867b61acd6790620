"""Who does the work: this process, the cores of this machine, or MPI ranks on many, behind one function.

A piece of work is a pure function of a picklable unit that writes its own file, so it does not matter who does it, how many
there are or in what order: the bytes are the same. Under `mpirun -n N python -m mpi4py ...` rank 0 hands out the units and
the other N - 1 ranks work (mpi4py.futures).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
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

    def map(self, what: str, work: Callable[[U], R], units: Sequence[U]) -> list[R]:
        """What `work` gives for each unit, in their order. RuntimeError if a worker dies; what others have finished stays."""
        done: Iterable[R] = self.pool.map(work, units) if self.pool else map(work, units)
        try:
            console = Console(stderr=True)
            return list(
                track(done, what, len(units), console=console, disable=self.quiet or not console.is_terminal, transient=True)
            )
        except BrokenProcessPool:
            raise RuntimeError(
                f"a worker was killed while it did {what!r} (out of memory?): run the same command again, with fewer --jobs if "
                "need be; finished parts are kept"
            ) from None


@contextmanager
def workers(jobs: int, quiet: bool = False) -> Iterator[Workers | None]:
    """Workers on this rank 0; None on other MPI ranks, once there is no more work for them. jobs: processes without MPI."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if _ranks() > 1:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
            yield Workers(cast(Executor, pool), quiet) if pool else None
    elif jobs == 1:
        yield Workers(quiet=quiet)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("forkserver")) as pool:
            yield Workers(pool, quiet)


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
