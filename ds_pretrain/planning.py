"""What a run will take, by arithmetic: places, parameters, memory and batches for any number of ranks.

Memory counts weights, gradients, fp32 master and Adam moments by ZeRO stage (Rajbhandari et al. 2020) and activations by the
formula of Korthikanti et al. 2022; buffers of the libraries are not in it.
"""

from __future__ import annotations

import math

from rich.table import Table

from ds_pretrain.config import RunConfig
from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.plan import stage_of_layer
from ds_pretrain.training.deepspeed_json import half, stage_of

GIB = 1 << 30


def tables(config: RunConfig, world: int, tokenizer_size: int | None) -> list[Table]:
    """The plan of a checked run as tables."""
    model = config.model.model_copy(
        update={
            "vocab": config.model.vocab or tokenizer_size,
            "positions": config.model.positions or config.batch.seq_len,
        }
    )
    return [_places(config, model, world), _parameters(config, model), _memory(config, model, world), _batches(config, world)]


def _places(config: RunConfig, model: ModelConfig, world: int) -> Table:
    plan = config.parallel.plan()
    stages = stage_of_layer(model.layers, plan.pipeline)
    table = Table("rank", "pipeline", "data", "context", "tensor", "layers", title=f"places: {world} ranks, layout {plan}")
    for rank in range(min(world, 64)):
        at = plan.coordinate(rank, world)
        layers = [i for i, stage in enumerate(stages) if stage == at.pipeline]
        ends = "embedding, " * (at.pipeline == 0) + f"{layers[0]}-{layers[-1]}" + ", head" * (at.pipeline == plan.pipeline - 1)
        table.add_row(*map(str, (rank, at.pipeline, at.data, at.context, at.tensor, ends)))
    if world > 64:
        table.add_row("...", "", "", "", "", f"{world - 64} more")
    return table


def _parameters(config: RunConfig, model: ModelConfig) -> Table:
    table = Table("part", "parameters", title="parameters")
    for part, count in model.parameter_table():
        table.add_row(part, f"{count:,}")
    objective = config.make_objective()
    every = sum(math.prod(shape) for shape in parameter_shapes(model, objective).values())
    if every != model.count_parameters():
        table.add_row(
            f"heads of {objective.name}" + " and generator" * bool(objective.generator), f"{every - model.count_parameters():,}"
        )
    table.add_row("total", f"{every:,}", style="bold")
    table.add_row("without embeddings (N of scaling laws)", f"{model.count_parameters(embeddings=False):,}")
    return table


def stage_parameters(model: ModelConfig, stages: int) -> list[int]:
    """Parameters on each pipeline stage: embeddings on the first; norm, head and output matrix (a tied one's copy too) on
    the last."""
    table, layers = dict(model.parameter_table()), stage_of_layer(model.layers, stages)
    norm = table["norms"] // (2 * model.layers + 1)
    layer = (table["attention"] + table["feed-forward"] + table["norms"] - norm) // model.layers
    found = [layer * layers.count(stage) for stage in range(stages)]
    found[0] += table["word embedding"] + table["position and type embedding"]
    copy = table["word embedding"] if model.tie_embeddings and stages > 1 else 0
    found[-1] += norm + table["head"] + table["output embedding"] + copy
    return found


def memory(config: RunConfig, model: ModelConfig, world: int) -> dict[str, float]:
    """Bytes per rank by use, on the pipeline stage that needs most."""
    stages = range(config.parallel.pipeline)
    return max((_stage_memory(config, model, world, stage) for stage in stages), key=lambda found: sum(found.values()))


def _stage_memory(config: RunConfig, model: ModelConfig, world: int, stage: int) -> dict[str, float]:
    json, plan = config.deepspeed_json(), config.parallel.plan()
    data, replicas = plan.data(world), plan.replicas(world)
    zero, width = stage_of(json), 2 if half(json) else 4
    small = _generator(config, model)
    mine = (stage_parameters(model, plan.pipeline)[stage] + (small.count_parameters(False) if small else 0)) / plan.tensor
    micro = config.batch.micro_size or max(1, config.batch.global_size // data)
    accumulation = config.batch.global_size // (micro * data)
    rows, layers = micro * config.batch.seq_len / plan.context, stage_of_layer(model.layers, plan.pipeline).count(stage)
    flying = min(plan.pipeline - stage, accumulation)  # 1F1B: micro-batches that wait for their backward pass here
    last = stage == plan.pipeline - 1
    return {
        "weights": mine * width / (replicas if zero == 3 else 1),
        "gradients": mine * width / (replicas if zero >= 2 else 1),
        "fp32 master": mine * 4 * (width == 2 or zero > 0) / (replicas if zero else 1),
        "Adam moments": mine * 8 / (replicas if zero else 1),
        "activations": rows * width * layers * flying * (_kept(config, model) + (_kept(config, small) if small else 0)),
        "logits and their gradient, were every position scored": last * rows * 2 * 4 * model.vocab_size / plan.tensor,
    }


def _generator(config: RunConfig, model: ModelConfig) -> ModelConfig | None:
    generator = config.make_objective().generator
    return model.narrower(generator[1]) if generator else None


def _kept(config: RunConfig, model: ModelConfig) -> float:
    """Numbers that one layer keeps of each position for its backward pass, without attention scores (Korthikanti et al.,
    equations 1, 2, 4 and section 5, in halves of their bytes)."""
    t = config.parallel.tensor
    if config.train.activation_checkpointing:
        return model.hidden / (t if config.parallel.sequence else 1)
    return model.hidden * (17 / t if config.parallel.sequence else 5 + 12 / t)


def _memory(config: RunConfig, model: ModelConfig, world: int) -> Table:
    table = Table("memory per rank", "GiB", title=f"memory: {config.deepspeed.config}")
    found = memory(config, model, world)
    for name, size in found.items():
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_row("sum (library buffers not counted)", f"{sum(found.values()) / GIB:.3f}", style="bold")
    return table


def _batches(config: RunConfig, world: int) -> Table:
    data = config.parallel.plan().data(world)
    rows, length = config.batch.global_size, config.batch.seq_len
    micro = config.batch.micro_size or max(1, rows // data)
    accumulation = rows // (data * micro)
    table = Table("batch", "", title="batch arithmetic")
    table.add_row("rows of a step", f"{rows} = {data} data ranks x {accumulation} micro-batches x {micro}")
    table.add_row("positions of a step", f"{rows * length:,}")
    table.add_row("positions of the run", f"{rows * length * config.train.max_steps:,} in {config.train.max_steps:,} steps")
    if config.parallel.pipeline > 1:
        bubble = (config.parallel.pipeline - 1) / (accumulation + config.parallel.pipeline - 1)
        table.add_row("pipeline bubble", f"{bubble:.0%} of the time: more micro-batches make it smaller")
    return table
