"""How long a step will take on ranks that we know only by their speed at matrix products and at sending.

A step is its matrix products at a share of the speed that products alone reach, longer by the pipeline's bubble, then what its
collectives send, then a latency for each of them. Nothing overlaps. That is so on CPU ranks; on GPUs, where DeepSpeed sends
gradients during the backward pass, the prediction is an upper bound. The share is measured on one rank (`bench scaling`): it
holds all that is neither product nor sending, such as norms, the optimizer and Python.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache

from ds_pretrain.config import RunConfig
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.pace import Pace
from ds_pretrain.planning.traffic import Collective, Cost, predicted

RECOMPUTED = 4 / 3
"""Products with activation checkpointing, over those without: the forward pass is done twice."""
ROWS = 64
"""Rows that are made to see what an objective makes of them."""


def step_flops(config: RunConfig, model: ModelConfig) -> float:
    """Model FLOPs of a step whose rows an objective makes of documents that are as long as they may be: with the padding, the
    masks and the scored positions that these have."""
    from ds_pretrain.training.metrics import counted_flops

    counts = _of_a_row(json.dumps(config.objective, sort_keys=True), config.batch.seq_len)
    return counted_flops(model, config.make_objective(), *(config.batch.global_size * each for each in counts))


@cache
def _of_a_row(objective: str, length: int) -> tuple[float, float, float]:
    """Pairs attended, positions and scored positions of a row, from a few that are made of random text. objective: in JSON."""
    from ds_pretrain.data.dataset import Cursor
    from ds_pretrain.data.loader import Loader
    from ds_pretrain.objectives import create
    from ds_pretrain.planning.memory import random_text
    from ds_pretrain.training.metrics import counts

    made = create(**json.loads(objective))
    with Loader(random_text(made, length, ROWS), ROWS, ROWS, 0, 1, Cursor()) as loader:
        attended, tokens, scored = counts(made, next(loader).batches)
    return attended / ROWS, tokens / ROWS, scored / ROWS


def step_seconds(
    config: RunConfig, model: ModelConfig, world: int, pace: Pace, share: float, costs: Mapping[str, Cost]
) -> dict[str, float]:
    """Seconds of a step by what they go into, on the pipeline stage that sends most. share: of the products' speed."""
    plan = config.parallel.plan()
    _, batches = config.batch.micro_batches(plan.data(world))
    again = RECOMPUTED if config.train.activation_checkpointing else 1.0
    products = again * step_flops(config, model) / world / (pace.products * share)
    traffic = predicted(config, model, world)
    sent, messages = max((sent, _messages(stage)) for sent, stage in zip(traffic.sent(costs), traffic.stages, strict=True))
    return {
        "matrix products and what goes with them": products,
        "pipeline bubble": products * (plan.pipeline - 1) / batches,
        "sending": sent / pace.link if sent else 0.0,
        "latency": messages * pace.latency,
    }


def _messages(stage: Sequence[Collective]) -> float:
    return sum(each.times for each in stage)
