"""What a run will take, by arithmetic: places, parameters, memory and batches for any number of ranks.

Memory counts weights, gradients, fp32 master and Adam moments by ZeRO stage (Rajbhandari et al. 2020) and activations by the
formula of Korthikanti et al. 2022; buffers of the libraries are not in it.
"""

from __future__ import annotations

from rich.table import Table

from ds_pretrain.config import RunConfig
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
    return [_places(config, model, world), _parameters(model), _memory(config, model, world), _batches(config, world)]


def _places(config: RunConfig, model: ModelConfig, world: int) -> Table:
    plan = config.parallel.plan()
    stages = stage_of_layer(model.layers, plan.pipeline)
    table = Table("rank", "pipeline", "data", "tensor", "layers", title=f"places: {world} ranks, layout {plan}")
    for rank in range(min(world, 64)):
        at = plan.coordinate(rank, world)
        layers = [i for i, stage in enumerate(stages) if stage == at.pipeline]
        ends = "embedding, " * (at.pipeline == 0) + f"{layers[0]}-{layers[-1]}" + ", head" * (at.pipeline == plan.pipeline - 1)
        table.add_row(*map(str, (rank, at.pipeline, at.data, at.tensor, ends)))
    if world > 64:
        table.add_row("...", "", "", "", f"{world - 64} more")
    return table


def _parameters(model: ModelConfig) -> Table:
    table = Table("part", "parameters", title="parameters")
    for part, count in model.parameter_table():
        table.add_row(part, f"{count:,}")
    table.add_row("total", f"{model.count_parameters():,}", style="bold")
    table.add_row("without embeddings (N of scaling laws)", f"{model.count_parameters(embeddings=False):,}")
    return table


def memory(config: RunConfig, model: ModelConfig, world: int) -> dict[str, float]:
    """Bytes per rank by use, for the fullest pipeline stage taken as an even share."""
    json, plan = config.deepspeed_json(), config.parallel.plan()
    data, stage = plan.data(world), stage_of(json)
    width = 2 if half(json) else 4
    mine = model.count_parameters() / plan.tensor / plan.pipeline
    micro = config.batch.micro_size or max(1, config.batch.global_size // data)
    rows = micro * config.batch.seq_len / plan.tensor * width
    per_layer = rows * model.hidden * (1 if config.train.activation_checkpointing else 17)
    return {
        "weights": mine * width / (data if stage == 3 else 1),
        "gradients": mine * width / (data if stage >= 2 else 1),
        "fp32 master": mine * 4 * (width == 2 or stage > 0) / (data if stage else 1),
        "Adam moments": mine * 8 / (data if stage else 1),
        "activations": per_layer * model.layers,  # 1F1B keeps as many micro-batches as stages, each a stage's layers
    }


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
