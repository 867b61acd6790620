"""Bytes of tensors on this rank, counted by torch's own allocator: now, and at the fullest moment of some work.

On CUDA the allocator always counts. On CPU it does where a debugging flag of its library is set, in all threads, and tells its
count with every allocation that the profiler sees. Not the process's resident size: that one has libraries and freed pages in
it, and lacks what was never touched (of DeepSpeed's reduce bucket of 2 GB the part that no gradient filled). The price: what
was made before the flag was set is not counted, and work that is watched runs slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FLAG = "FLAGS_caffe2_report_cpu_memory_usage"


@dataclass
class Fullest:
    """bytes: of all tensors at the fullest moment; known when the work is done."""

    bytes: int = 0


@functools.cache
def start() -> None:
    """Count CPU tensors that are made from here on."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, FLAG).value = True
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler of torch 2.13 tells of each start and stop otherwise


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[Fullest]:
    """Count what is done inside. What Python has not yet collected is collected first, so that none of it is counted."""
    found = Fullest()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device)
        return
    start()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        torch.empty(1)  # an event tells the count from which the work starts
        yield found
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    found.bytes = max(_totals(profiler.profiler.kineto_results.experimental_event_tree()))


def held(device: torch.device) -> int:
    """Bytes of all tensors now."""
    with watched(device) as found:
        pass
    return found.bytes


def _totals(events: Iterable[Any]) -> Iterator[int]:
    """The allocator's count at each of its events."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        total = getattr(event.extra_fields, "total_allocated", None)
        if total is not None:
            yield total
