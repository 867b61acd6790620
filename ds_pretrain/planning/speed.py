"""How long a step will take on ranks that we know only by their speed at matrix products and at sending.

A step is its matrix products at a share of the speed that products alone reach, longer by the pipeline's bubble, then what its
collectives send, then a latency for each of them. Nothing overlaps. That is so on CPU ranks; on GPUs, where DeepSpeed sends
gradients during the backward pass, the prediction is an upper bound. The share is measured on one rank (`bench scaling`): it
holds all that is neither product nor sending, such as norms, the optimizer and Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_pretrain.config import RunConfig
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.pace import Pace
from ds_pretrain.planning.traffic import Collective, Cost, predicted

RECOMPUTED = 4 / 3
"""Products with activation checkpointing, over those without: the forward pass is done twice."""


def step_flops(config: RunConfig, model: ModelConfig) -> float:
    """Model FLOPs of a step whose rows are one document each, with as many positions scored as the objective promises."""
    objective, rows, length = config.make_objective(), config.batch.global_size, config.batch.seq_len
    pairs = rows * length * (length + 1) / 2 if objective.kind == "causal" else rows * length**2
    rates = [objective.expected.get(f"{head.name}/rate", 1.0) for head in objective.heads if head.classes is None]
    scored = round(rows * length * min(1.0, sum(rates)))
    if objective.generator is None:
        return model.flops(pairs, rows * length, scored)
    small = model.narrower(objective.generator[1])
    return model.flops(pairs, rows * length, 0) + small.flops(pairs, rows * length, scored, model.hidden)


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
