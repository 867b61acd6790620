"""Where DeepSpeed keeps a parameter's fp32 master and Adam moments, for every ZeRO stage, as views.

This is the one file that reads what DeepSpeed does not publish (`_hp_mapping`, `grad_position`,
`fp32_partitioned_groups_flat`): DeepSpeed is pinned, and a parity test goes red if any of it moves. A `Fragment` is the
part of a parameter that this rank owns; reading and writing its views is all that checkpoints and parity need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_pretrain.parallel.shards import Shard, shards
from ds_pretrain.training.engine import Engine

KINDS = ("master", "exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""All that DeepSpeed's dynamic loss scaler remembers."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of this tensor rank's flattened slice of a parameter.

    views: fp32 [numel] by kind, writable.
    """

    shard: Shard
    start: int
    views: dict[str, Tensor]


def local_parameters(engine: Engine) -> Iterator[tuple[Shard, nn.Parameter]]:
    """The parameters on this pipeline stage, whatever wraps them."""
    return shards(engine.module, engine.mesh.at.tensor, engine.mesh.plan.tensor)


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Everything this rank owns of the training state. Adam's moments exist from here on, zero before the first step."""
    prime(engine)
    for shard, parameter in local_parameters(engine):
        found = _locate(engine, parameter)
        if found is not None:
            start, master, flat, offset = found
            state = engine.optimizer.state[flat]
            views = {kind: state[kind].view(-1).narrow(0, offset, master.numel()) for kind in KINDS[1:]}
            yield Fragment(shard, start, {"master": master, **views})


def prime(engine: Engine) -> None:
    """Create the Adam state that torch would create at the first step, so that it can be read and written before."""
    for group in engine.optimizer.param_groups:
        for flat in _flats(engine, group):
            if not engine.optimizer.state.get(flat):
                engine.optimizer.state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                    "exp_avg": torch.zeros_like(flat),
                    "exp_avg_sq": torch.zeros_like(flat),
                }


def counters(engine: Engine) -> dict[str, Any]:
    """What counts along with the weights: Adam's updates (skipped steps are none), skipped steps, fp16's loss scaler."""
    updates = max((int(state["step"]) for state in engine.optimizer.state.values() if state), default=0)
    scaler = engine.scaler
    return {
        "adam_step": updates,
        "skipped": engine.deepspeed.skipped_steps,
        "loss_scale": {name: getattr(scaler, name) for name in SCALER} if scaler else None,
    }


def restore_counters(engine: Engine, step: int, saved: Mapping[str, Any]) -> None:
    """Set them again, and DeepSpeed's own step. A loss scale that only one side has is left as it is."""
    for state in engine.optimizer.state.values():
        state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), saved["adam_step"])
    engine.deepspeed.global_steps = step
    engine.deepspeed.skipped_steps = saved["skipped"]
    if engine.scaler and saved["loss_scale"]:
        vars(engine.scaler).update(saved["loss_scale"])


def refresh_weights(engine: Engine, shard: Shard, parameter: nn.Parameter, local: Tensor) -> None:
    """Set the working copy of a parameter to this rank's whole slice of its master weights."""
    if engine.stage < 3:
        parameter.data.copy_(local)
        return
    part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    start = engine.mesh.replica * part.numel()
    mine = local.reshape(-1)[start : start + part.numel()]
    part.data[: mine.numel()].copy_(mine)


def _locate(engine: Engine, parameter: Any) -> tuple[int, Tensor, Tensor, int] | None:
    """(start in the slice, master view, the optimizer's flat tensor, offset in it); None if nothing of it is here."""
    if engine.stage == 0:
        return 0, parameter.data.view(-1), parameter, 0
    if engine.stage == 3:
        return _locate_stage3(engine, parameter)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (flat,) = _flats(engine, engine.optimizer.param_groups[mapping.param_group_index])
    return mapping.lp_fragment_address.start, mapping.hp_fragment.detach(), flat, mapping.hp_fragment_address.start


def _locate_stage3(engine: Engine, parameter: Any) -> tuple[int, Tensor, Tensor, int] | None:
    zero = engine.deepspeed.optimizer
    group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
    start = engine.mesh.replica * numel
    numel = min(numel, parameter.ds_numel - start)  # the last ranks hold padding
    if numel <= 0:
        return None
    flat = zero.fp32_partitioned_groups_flat[group]
    return start, flat.data.narrow(0, offset, numel), flat, offset


def _flats(engine: Engine, group: dict) -> list[Tensor]:
    """The tensors that the torch optimizer updates for one of its groups."""
    if engine.stage == 3:
        return engine.deepspeed.optimizer.fp32_partitioned_groups_flat
    return group["params"]
