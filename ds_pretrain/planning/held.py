"""What a rank of a layout holds of a model: its parameters, each with its dimensions there.

`parallel/shards.py` cuts real tensors by the same rules; here they are applied to shapes, for ranks that do not exist.
"""

from __future__ import annotations

from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective
from ds_pretrain.parallel.plan import ParallelPlan, stage_of_layer

VOCABULARY = ("word.weight", "output.weight", "output_bias.bias")
"""Parameters with a row for each word: tensor ranks share them padded to as many rows each."""
ROWS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
"""Matrices that tensor ranks share evenly, by what goes out or by what comes in (Shoeybi et al. 2019)."""
BUCKET, PREFETCH, PERSISTS, REUSE = 500_000_000, 50_000_000, 100_000, 1_000_000_000
"""DeepSpeed's defaults, in elements: reduce_bucket_size and stage3_ prefetch_bucket_size, param_persistence_threshold,
max_reuse_distance."""


def predicts_words(objective: Objective) -> bool:
    """Whether the network itself predicts words: with a generator, that one does."""
    return objective.generator is None and any(head.classes is None for head in objective.heads)


def is_tied(model: ModelConfig, objective: Objective) -> bool:
    """Whether words are predicted with the matrix that embeds them."""
    return model.tie_embeddings and predicts_words(objective)


def parameters(model: ModelConfig, objective: Objective, plan: ParallelPlan, stage: int) -> dict[str, tuple[int, ...]]:
    """Names and dimensions of what a rank of a pipeline stage holds, about in the order of their use; a tied matrix is on the
    first stage and, last of all, on the last."""
    whole = parameter_shapes(model, objective)
    mine = [name for name in whole if stage_of(name, model, plan.pipeline) == stage]
    copy = ["word.weight"] * (is_tied(model, objective) and 0 < stage == plan.pipeline - 1)
    return {name: _cut(name, whole[name], plan.tensor) for name in mine + copy}


def stage_of(name: str, model: ModelConfig, stages: int) -> int:
    """The pipeline stage that a parameter is on, a tied matrix's copy left out."""
    part, _, rest = name.partition(".")
    if part == "layers":
        return stage_of_layer(model.layers, stages)[int(rest.partition(".")[0])]
    return 0 if part in ("word", "embed", "generator") else stages - 1


def _cut(name: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    if name.endswith(COLUMNS):
        return shape[0], shape[1] // ranks
    return (-(-shape[0] // ranks), *shape[1:]) if name.endswith((*ROWS, *VOCABULARY)) else shape
