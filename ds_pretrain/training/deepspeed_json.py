"""DeepSpeed's JSON: it stays DeepSpeed's, said in DeepSpeed's words (stage, precision, offload, buckets).

What the run decides itself (batch sizes, clipping, optimizer) stands there as "auto" or not at all, and is filled in from the
run. What cannot run, or runs wrongly, is refused before a device is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer",
    "scheduler",
)  # fmt: skip
"""Keys that are the run's to decide."""
SECTIONS = ("zero_optimization", "bf16", "fp16")
"""Keys that we look into."""


def read(path: Path) -> dict[str, Any]:
    """The settings of a file, without those it leaves to the run. ValueError naming the file if it is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed.config {path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed.config {path}: holds {type(config).__name__}, not a mapping of settings")
    return {key: value for key, value in config.items() if value != "auto"}


def stage_of(config: Mapping[str, Any]) -> int:
    """The ZeRO stage."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def half(config: Mapping[str, Any]) -> str | None:
    """ "bf16" or "fp16", None in fp32."""
    return next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")), None)


def asks_offload(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's states are to live on the CPU of a GPU machine."""
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return bool(device != "none")


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether they do so on this machine."""
    return asks_offload(config) and _cuda()


def problems(config: Mapping[str, Any], pipeline: int, here: bool = True) -> Iterator[str]:
    """What of these settings does not run, or not rightly, with so many pipeline stages; each with its fix. here: on this
    machine, or else on some machine."""
    if shapeless := [*_shapeless(config)]:
        yield from shapeless
        return
    for key in OWNED:
        if config.get(key, "auto") != "auto":
            yield f'the DeepSpeed JSON sets {key} to {config[key]!r}, which belongs to the run: set it to "auto"'
    yield from _unsound(config, pipeline)
    if half(config) == "fp16" and here and not _cuda():
        yield "fp16 needs a GPU: use zero1_bf16.json or zero1_fp32.json on CPU"


def _shapeless(config: Mapping[str, Any]) -> Iterator[str]:
    for key in SECTIONS:
        section = config.get(key, {})
        if not isinstance(section, Mapping):
            yield f"the DeepSpeed JSON sets {key} to {section!r}, which is a section: write it as a mapping"
            continue
        for name, value in section.items():
            if value == "auto":
                yield f'the DeepSpeed JSON sets {key}.{name} to "auto", which the run does not decide: give a value or drop it'
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if stage not in (0, 1, 2, 3, "auto"):
        yield f"the DeepSpeed JSON sets zero_optimization.stage to {stage!r}: there are 0, 1, 2 and 3"


def _unsound(config: Mapping[str, Any], pipeline: int) -> Iterator[str]:
    stage, kind = stage_of(config), half(config)
    if stage >= 2 and pipeline > 1:
        yield f"ZeRO stage {stage} does not run with parallel.pipeline {pipeline}: use a stage 1 JSON, or no pipeline"
    if stage == 0 and pipeline > 1:
        yield (
            f"ZeRO stage 0 with parallel.pipeline {pipeline} leaves parameters out of the gradient norm: use a stage 1 "
            "JSON (zero1_fp32.json)"
        )
    if stage == 0 and kind:
        yield f"{kind} with ZeRO stage 0 counts Adam's steps wrongly: use a stage 1 JSON (zero1_{kind}.json)"
    if config.get("zero_optimization", {}).get("round_robin_gradients"):
        yield "zero_optimization.round_robin_gradients breaks checkpoints silently: set it to false"


def filled(config: Mapping[str, Any], replicas: int, micro: int, accumulation: int, clip: float) -> dict[str, Any]:
    """The settings with what the run decides; DeepSpeed itself would raise on "auto". replicas: data ranks x context ranks,
    which are data ranks to DeepSpeed: its batch size counts a row once for each rank that has a part of it."""
    return {
        **config,
        "train_batch_size": replicas * micro * accumulation,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
