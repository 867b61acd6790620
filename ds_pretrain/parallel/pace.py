"""How fast the ranks of a job are at the two things that a step consists of: matrix products, and sending."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from ds_pretrain.parallel.mesh import Mesh

PIECE = 1 << 22
"""Bytes of the all-reduce whose speed is the link's."""
ROUNDS = 5
SIDE = 256
"""Of the matrices whose product tells what a precision costs."""
DEAR = 4
"""Times the seconds of fp32 from which a CPU is taken to imitate a precision."""


class Pace(NamedTuple):
    """Of the slowest rank, while all of them do the same."""

    products: float
    """FLOP/s in matrix products."""
    link: float
    """Bytes a second that a rank sends in an all-reduce; infinite where there is nobody to send to."""
    latency: float
    """Seconds of an all-reduce of one number."""


def pace(rows: int, width: int, out: int, mesh: Mesh, dtype: torch.dtype = torch.float32) -> Pace:
    """Measure products of [rows, width] by [width, out] in a precision, and all-reduces over all ranks (collective; the same on
    every rank)."""
    a, b = (torch.randn(shape, device=mesh.device).to(dtype) for shape in ((rows, width), (width, out)))
    product = max(mesh.gather(min(_took(lambda: a @ b, mesh) for _ in range(4 * ROUNDS))))
    products = 2 * rows * width * out / product
    if mesh.world == 1:
        return Pace(products, float("inf"), 0.0)
    piece, one = torch.zeros(PIECE // 4, device=mesh.device), torch.zeros(1, device=mesh.device)
    latency = max(mesh.gather(min(_took(lambda: dist.all_reduce(one), mesh) for _ in range(4 * ROUNDS))))
    sending = max(mesh.gather(min(_took(lambda: dist.all_reduce(piece), mesh) for _ in range(ROUNDS))))
    return Pace(products, 2 * (mesh.world - 1) / mesh.world * PIECE / sending, latency)


def dear(dtype: torch.dtype) -> float:
    """How many times as long as in fp32 a matrix product takes a CPU that imitates a precision; 0 without that and with
    CUDA. In bf16 80 times without AVX-512, 1.4 with it, a third with instructions for bf16 (on one AMD EPYC)."""
    if torch.cuda.is_available():
        return 0.0
    x = torch.randn(SIDE, SIDE)
    halves, floats = (min(timeit.repeat(partial(torch.matmul, y, y), number=1, repeat=ROUNDS)) for y in (x.to(dtype), x))
    return halves / floats if halves > DEAR * floats else 0.0


def _took(work: Callable[[], object], mesh: Mesh) -> float:
    mesh.barrier()
    began = time.perf_counter()
    work()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
