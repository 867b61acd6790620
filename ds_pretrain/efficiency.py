"""Scaling measured: one run on several world sizes and layouts, beside what `plan` predicts of each.

Weak scaling keeps a data rank's rows, strong scaling the rows of a step. Every point measures, on its own ranks and while all
of them do the same, how fast matrix products of the model's shape are, how fast an all-reduce sends and how long an empty one
takes; `speed` makes a step's seconds of these, at the share of the products' speed that a step on one rank reached. So what is
predicted of two ranks and more is how a layout divides a step, not how fast this machine is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from rich.table import Table

from ds_pretrain.config import ConfigError, RunConfig
from ds_pretrain.parallel.launch import place
from ds_pretrain.parallel.mesh import device, start
from ds_pretrain.parallel.pace import pace
from ds_pretrain.parallel.plan import plan_of
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.parallel.wire import counts, since
from ds_pretrain.planning.points import Point, calibrated, costs_on
from ds_pretrain.planning.traffic import predicted
from ds_pretrain.runs import make_trainer, problems, training_data
from ds_pretrain.training.deepspeed_json import half
from ds_pretrain.training.memory import held, watched

Kind = Literal["strong", "weak"]
WARM = 4
"""Steps before the first that counts: ZeRO-3 learns in two what it needs when."""


def configured(config: RunConfig, layout: str, kind: Kind) -> tuple[RunConfig, int]:
    """The run under a layout, and its world size."""
    plan, world = plan_of(layout)
    rows = config.batch.global_size * (plan.data(world) if kind == "weak" else 1)
    parallel = {"tensor": plan.tensor, "pipeline": plan.pipeline, "sequence": plan.sequence, "context": plan.context}
    train = config.train.model_copy(update={"max_steps": WARM, "eval_every": 0, "save_every": 0, "check_every": 0})
    changed = {
        "parallel": config.parallel.model_copy(update=parallel),
        "batch": config.batch.model_copy(update={"global_size": rows}),
        "optimizer": config.optimizer.model_copy(update={"warmup_steps": 0}),
        "train": train,
        "output": None,
    }
    return config.model_copy(update=changed), world


def run(config: RunConfig, layouts: Sequence[str], kind: Kind, steps: int) -> list[Point]:
    """Measure layouts on ranks of this machine, or under a launcher those that its ranks fit (empty but on rank 0).

    ConfigError with every layout that the run cannot have.
    """
    here = place().world
    chosen = [(layout, *configured(config, layout, kind)) for layout in layouts]
    if wrong := [f"{layout}: {each}" for layout, run, world in chosen for each in problems(run, world)]:
        raise ConfigError("bench scaling", wrong)
    if here > 1:
        if here not in {world for *_, world in chosen}:
            needs = ", ".join(f"{layout} {world}" for layout, _, world in chosen)
            raise ConfigError(
                "bench scaling", [f"no layout is of the {here} ranks of this job ({needs}): add one to --layouts"]
            )
        found = [measure(layout, run, steps, kind) for layout, run, world in chosen if world == here]
        return found if place().rank == 0 else []
    return [spawn(world, measure, layout, run, steps, kind) for layout, run, world in chosen]


def measure(layout: str, config: RunConfig, steps: int, kind: Kind) -> Point:
    """One point (collective)."""
    here = device(start().local_rank)
    others = held(here)
    trainer = make_trainer(config, training_data(config))
    trainer.progress = False
    trainer.train()
    before, began = counts(), time.perf_counter()
    trainer.max_steps = WARM + steps
    trainer.train()
    seconds, sent = (time.perf_counter() - began) / steps, since(before) / steps
    with watched(here) as fullest:
        trainer.max_steps += 1
        trainer.train()
    mesh, rows = trainer.mesh, config.batch.micro_batches(trainer.mesh.data_size)[0] * config.batch.seq_len
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(half(trainer.deepspeed) or "", torch.float32)
    found = pace(rows, trainer.shape.hidden, trainer.shape.ffn_width // mesh.plan.tensor, mesh, dtype)
    every_seconds, every_sent, every_peak = zip(*mesh.gather((seconds, sent, fullest.bytes - others)), strict=True)
    return Point(
        kind, layout, config, trainer.shape, mesh.world, here.type, max(every_seconds), every_sent, max(every_peak), found
    )


def tables(points: Sequence[Point], kind: Kind) -> list[Table]:
    """Points of a kind of scaling beside their predictions."""
    chosen = [point for point in points if point.kind == kind]
    return [_speeds(chosen, kind), _sizes(chosen)]


def _speeds(points: Sequence[Point], kind: Kind) -> Table:
    """Efficiency: tokens a second of a rank, over those of the smallest world's."""
    heads = ("layout", "ranks", "s/step", "predicted", "tokens/s", "efficiency")
    shown = Table(*heads, title=f"{kind} scaling", title_justify="left")
    least, share = min(points, key=lambda point: point.world), calibrated(points)
    for point in points:
        efficiency = point.tokens_per_second / point.world / (least.tokens_per_second / least.world)
        seconds = (f"{point.seconds:.3f}", f"{point.expected_seconds(share):.3f}")
        shown.add_row(point.layout, str(point.world), *seconds, f"{point.tokens_per_second:,.0f}", f"{efficiency:.0%}")
    return shown


def _sizes(points: Sequence[Point]) -> Table:
    """Bytes of the rank that sends most, of the rank that holds most. least: what the layout cannot do without."""
    heads = ("layout", "ranks", "sent MB", "predicted", "least", "peak MB", "predicted")
    shown = Table(*heads, title="sent by a rank in a step; tensors at the fullest moment", title_justify="left")
    for point in points:
        traffic = predicted(point.config, point.model, point.world)
        least = max(sum(traffic.minimum(stage).values()) for stage in range(len(traffic.stages)))
        counted = [max(point.sent)] if point.device == "cpu" else []  # NCCL sends over connections that are not counted
        sent = [*counted, max(traffic.sent(costs_on(point.device))), least]
        figures = ["-"] * (not counted) + [f"{size / 1e6:,.3f}" for size in sent]
        peak = (f"{size / 1e6:,.1f}" for size in (point.peak, point.expected_peak().total))
        shown.add_row(point.layout, str(point.world), *figures, *peak)
    return shown
