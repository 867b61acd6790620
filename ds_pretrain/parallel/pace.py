"""How fast the ranks of a job are at the two things that a step consists of: matrix products, and sending."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from ds_pretrain.parallel.mesh import Mesh

PIECE = 1 << 22
"""Bytes of the all-reduce whose speed is the link's."""
ROUNDS = 5


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


def _took(work: Callable[[], object], mesh: Mesh) -> float:
    mesh.barrier()
    began = time.perf_counter()
    work()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
