"""Ranks on this machine, for checks and tests: one function on N processes over gloo or NCCL."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(world: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` on `world` ranks; returns what rank 0 returned. A rank that raises ends them all."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # ours: no port to race for
        mp.spawn(_rank, (world, store.port, str(answer), function, args), nprocs=world)
        return pickle.loads(answer.read_bytes())  # written a moment ago by our own rank 0


def _rank(rank: int, world: int, port: int, answer: str, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # under nohup; torch sends it to ranks whose parent has died
        signal.signal(signal.SIGINT, signal.default_int_handler)
    result = function(*args)
    if rank == 0:
        Path(answer).write_bytes(pickle.dumps(result))
