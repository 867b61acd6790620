"""megatron-core on a machine without CUDA.

Several of its modules ask for `torch.cuda.current_device()` or `device="cuda"`. Only the name `torch` inside
`megatron.core` modules is swapped, for a stand-in that answers "cpu" to those questions and passes everything else
through; torch itself is left alone. The random-state tracker gets a twin on the CPU generator. With CUDA: does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange")


class _Cuda(types.ModuleType):
    """`torch.cuda` as megatron-core sees it."""

    current_device = staticmethod(lambda: torch.device("cpu"))
    synchronize = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed = staticmethod(torch.manual_seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(types.ModuleType):
    """`torch` as megatron-core sees it."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda("torch.cuda")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        cuda = isinstance(device, str) and device.startswith("cuda")
        return factory(*args, device="cpu" if cuda else device, **kwargs)

    return make


def _cpu_tracker() -> Any:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    class Tracker(CudaRNGStatesTracker):
        """Keeps named states of the CPU generator: megatron-core's own warns when that generator moves."""

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    return Tracker()


@functools.cache
def _prepare() -> _Torch:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._CUDA_RNG_STATE_TRACKER = _cpu_tracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    return _Torch()


def adapt() -> None:
    """Make every megatron-core module imported so far run on CPU. Cheap to call again after further imports."""
    if torch.cuda.is_available():
        return
    stand_in = _prepare()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core.") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
