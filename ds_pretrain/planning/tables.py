"""What a run will take, by arithmetic: places, parameters, memory (`memory.py`) and batches for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table

from ds_pretrain.config import RunConfig
from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.plan import stage_of_layer
from ds_pretrain.planning import traffic
from ds_pretrain.planning.memory import BUCKETS, fullest
from ds_pretrain.planning.points import Cluster, costs_on
from ds_pretrain.planning.speed import step_flops, step_seconds

GIB = 1 << 30
MANY = 16
"""Ranks that are shown one by one."""


def tables(config: RunConfig, world: int, tokenizer_size: int | None, cluster: Cluster | None = None) -> list[Table]:
    """The plan of a checked run as tables; with the speeds of a cluster also the time of a step."""
    model = config.model.model_copy(
        update={
            "vocab": config.model.vocab or tokenizer_size,
            "positions": config.model.positions or config.batch.seq_len,
        }
    )
    return [
        _places(config, model, world),
        _parameters(config, model),
        _memory(config, model, world, cluster.peaks if cluster else {}),
        *(traffic.tables(traffic.predicted(config, model, world)) if world > 1 else ()),
        *([_time(config, model, world, cluster)] if cluster else ()),
        _batches(config, world),
    ]


def _places(config: RunConfig, model: ModelConfig, world: int) -> Table:
    """A row for each rank; of many ranks, for each place in a replica."""
    plan = config.parallel.plan()
    stages = stage_of_layer(model.layers, plan.pipeline)
    table = Table("rank", "pipeline", "data", "context", "tensor", "layers", title=f"places: {world} ranks, layout {plan}")
    alike: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world):
        at = plan.coordinate(rank, world)
        alike.setdefault((at.pipeline, at.context, at.tensor, *([at.data] if world <= MANY else [])), []).append(rank)
    for (pipeline, context, tensor, *_), ranks in alike.items():
        layers = [i for i, stage in enumerate(stages) if stage == pipeline]
        ends = "embedding, " * (pipeline == 0) + f"{layers[0]}-{layers[-1]}" + ", head" * (pipeline == plan.pipeline - 1)
        data = _span([plan.coordinate(rank, world).data for rank in ranks])
        table.add_row(_span(ranks), str(pipeline), data, str(context), str(tensor), ends)
    return table


def _span(numbers: list[int]) -> str:
    """Numbers at one distance: 3, 0-7, or 0, 2, ... 14."""
    if len(numbers) < 4:
        return ", ".join(map(str, numbers))
    first, second, *_, last = numbers
    return f"{first}-{last}" if second == first + 1 else f"{first}, {second}, ... {last}"


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


def _memory(config: RunConfig, model: ModelConfig, world: int, peaks: Mapping[str, float]) -> Table:
    table = Table("memory of the fullest rank, GiB", "on a GPU", "on a CPU", title=f"memory: {config.deepspeed.config}")
    found = [fullest(config, model, world, cuda) for cuda in (True, False)]
    (rank, gpu), (_, cpu) = found
    for part in dict.fromkeys([*gpu.parts, *cpu.parts]):
        table.add_row(part, *(f"{moment.parts.get(part, 0) / GIB:.3f}" for moment in (gpu, cpu)))
    table.add_row("peak", *(f"{moment.total / GIB:.3f}" for moment in (gpu, cpu)), style="bold")
    table.add_row("when", gpu.name, cpu.name)
    if config.parallel.pipeline > 1:
        table.add_row("pipeline stage", *(str(rank.place) for rank, _ in found))
    table.caption = (
        "Tensors only: CUDA's context, NCCL and fragmentation come on top. "
        "Measured within 5% on CPU, in 137 cases, while this project was tested; no GPU was tried then."
    )
    if peaks:
        table.caption += f" On the measured points the peak was predicted off by: {_errors(peaks)}."
    if gpu.parts.get(BUCKETS) and rank.bucket > rank.elements:
        table.caption += (
            f" The reduce bucket is larger than what it is for: zero_optimization.reduce_bucket_size {rank.elements} in the "
            f"DeepSpeed JSON would do instead of {rank.bucket}."
        )
    return table


def _time(config: RunConfig, model: ModelConfig, world: int, cluster: Cluster) -> Table:
    table = Table("step", "ms", title="time of a step, nothing overlapped")
    pace = cluster.pace
    found = step_seconds(config, model, world, pace, cluster.share, costs_on(cluster.device))
    for part, seconds in found.items():
        table.add_row(part, f"{1e3 * seconds:,.2f}")
    whole = sum(found.values())
    table.add_row("a step", f"{1e3 * whole:,.2f}", style="bold")
    tokens = config.batch.global_size * config.batch.seq_len / whole
    table.add_row("tokens a second", f"{tokens:,.0f}")
    table.add_row("share of the products' speed (MFU)", f"{step_flops(config, model) / world / pace.products / whole:.0%}")
    table.add_row("hours of the run", f"{whole * config.train.max_steps / 3600:,.2f}")
    link = f"; {pace.link / 1e9:.3g} GB/s sent, {pace.latency * 1e6:.3g} us a message" if world > 1 else ""
    speed = f"{pace.products / 1e12:.3g} TFLOP/s in matrix products, of which a step reaches {cluster.share:.0%}"
    table.caption = f"At {speed}{link}. {_trust(cluster.errors)}"
    return table


def _trust(errors: Mapping[str, float]) -> str:
    """How far to believe it."""
    if not errors:
        return "None of it was measured here, and no step reaches all of a speed: see `ds-pretrain bench scaling --out`."
    return f"The same arithmetic is off on the measured points by: {_errors(errors)}."


def _errors(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{where} {error:+.0%}" for where, error in errors.items())


def _batches(config: RunConfig, world: int) -> Table:
    data = config.parallel.plan().data(world)
    rows, length = config.batch.global_size, config.batch.seq_len
    micro, accumulation = config.batch.micro_batches(data)
    table = Table("batch", "", title="batch arithmetic")
    table.add_row("rows of a step", f"{rows} = {data} data ranks x {accumulation} micro-batches x {micro}")
    table.add_row("positions of a step", f"{rows * length:,}")
    table.add_row("positions of the run", f"{rows * length * config.train.max_steps:,} in {config.train.max_steps:,} steps")
    if config.parallel.pipeline > 1:
        bubble = (config.parallel.pipeline - 1) / (accumulation + config.parallel.pipeline - 1)
        table.add_row("pipeline bubble", f"{bubble:.0%} of the time: more micro-batches make it smaller")
    return table
