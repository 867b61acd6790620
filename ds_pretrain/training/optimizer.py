"""AdamW and its learning-rate schedules.

A schedule is a pure function of the step: nothing of it is saved and nothing can drift on resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "linear", "inverse_sqrt", "wsd", "constant"]


class OptimizerConfig(BaseModel):
    """AdamW (Loshchilov & Hutter 2019)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean and variance of the gradient."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the variance."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices and embeddings; biases and norms are not decayed."""
    clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    schedule: Schedule = "cosine"
    """After the warm-up: cosine or linear to min_lr, inverse square root, warmup-stable-decay, or constant."""
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the rate rises linearly from 0."""
    min_lr: float = Field(0.0, ge=0)
    """Rate at the last step."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """Share of the steps over which `wsd` falls linearly to min_lr at the end."""

    def rate(self, step: int, max_steps: int) -> float:
        """The learning rate of step 1, 2, ... max_steps."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        return max(self.min_lr, self._after_warmup(step, max_steps))

    def _after_warmup(self, step: int, max_steps: int) -> float:
        done = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        span = self.lr - self.min_lr
        match self.schedule:
            case "cosine":
                return self.min_lr + span * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            case "linear":
                return self.lr - span * min(1.0, done)
            case "inverse_sqrt":
                return self.lr * math.sqrt(max(1, self.warmup_steps) / step)
            case "wsd":
                left = (max_steps - step) / max(1, round(self.decay_share * max_steps))
                return self.min_lr + span * min(1.0, max(0.0, left))
            case "constant":
                return self.lr


def adamw(config: OptimizerConfig, module: nn.Module, offload: bool) -> torch.optim.Optimizer:
    """AdamW over two groups: what has rows is decayed, the rest is not. Fused wherever torch has it.

    offload: the states live on the CPU of a GPU machine, for which DeepSpeed has its own AdamW (it compiles at first use).
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": list(_of(parameters, True)), "weight_decay": config.weight_decay},
        {"params": list(_of(parameters, False)), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kwargs: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **kwargs)
    return torch.optim.AdamW(groups, fused=True, **kwargs)


def _of(parameters: Iterable[nn.Parameter], decayed: bool) -> Iterable[nn.Parameter]:
    return (p for p in parameters if (p.ndim > 1) == decayed)
