"""Scaling measured: one run on several world sizes and layouts, beside what `plan` predicts of each.

Weak scaling keeps a data rank's rows, strong scaling the rows of a step. Every point measures, on its own ranks and while all
of them do the same, how fast matrix products of the model's shape are, how fast an all-reduce sends and how long an empty one
takes; `speed` makes a step's seconds of these, at the share of the products' speed that a step on one rank reached. So what is
predicted of two ranks and more is how a layout divides a step, not how fast this machine is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.table import Table

from ds_pretrain.config import ConfigError, RunConfig
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.launch import place
from ds_pretrain.parallel.mesh import start
from ds_pretrain.parallel.pace import Pace, pace
from ds_pretrain.parallel.plan import plan_of
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.parallel.wire import counts, since
from ds_pretrain.runs import make_trainer, problems, training_data
from ds_pretrain.speed import step_flops, step_seconds
from ds_pretrain.traffic import GLOO, NCCL, predicted

Kind = Literal["strong", "weak"]
WARM = 4
"""Steps before the first that counts: ZeRO-3 learns in two what it needs when."""


@dataclass(frozen=True)
class Point:
    """One world size and layout, measured. sent: payload bytes of each rank and step."""

    layout: str
    config: RunConfig
    model: ModelConfig
    world: int
    seconds: float
    sent: tuple[float, ...]
    pace: Pace
    share: float = 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.config.batch.global_size * self.config.batch.seq_len / self.seconds


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
        found = [measure(layout, run, steps) for layout, run, world in chosen if world == here]
        return found if place().rank == 0 else []
    return calibrated([spawn(world, measure, layout, run, steps) for layout, run, world in chosen])


def measure(layout: str, config: RunConfig, steps: int) -> Point:
    """One point (collective)."""
    start()
    trainer = make_trainer(config, training_data(config))
    trainer.progress = False
    trainer.train()
    before, began = counts(), time.perf_counter()
    trainer.max_steps = WARM + steps
    trainer.train()
    seconds, sent = (time.perf_counter() - began) / steps, since(before) / steps
    rows = (config.batch.micro_size or 1) * config.batch.seq_len
    found = pace(rows, trainer.shape.hidden, trainer.shape.ffn_width, trainer.mesh)
    everyone = trainer.mesh.gather((seconds, sent))
    took, told = max(each for each, _ in everyone), tuple(each for _, each in everyone)
    return Point(layout, config, trainer.shape, trainer.mesh.world, took, told, found)


def calibrated(points: Sequence[Point]) -> list[Point]:
    """The points with the share of the products' speed that the smallest world reached beside its sending."""
    least = min(points, key=lambda point: point.world)
    computing = least.seconds - sum(seconds_of(least)[name] for name in ("sending", "latency"))
    share = step_flops(least.config, least.model) / least.world / (least.pace.products * max(computing, 1e-9))
    return [replace(point, share=share) for point in points]


def seconds_of(point: Point) -> dict[str, float]:
    """What is predicted of a point's step."""
    costs = NCCL if torch.cuda.is_available() else GLOO
    return step_seconds(point.config, point.model, point.world, point.pace, point.share, costs)


def table(points: Sequence[Point], kind: Kind) -> Table:
    """Points beside their predictions. Efficiency: tokens a second of a rank, over those of the smallest world's."""
    heads = ("layout", "ranks", "s/step", "predicted", "tokens/s", "efficiency", "sent MB", "predicted", "least")
    shown = Table(*heads, title=f"{kind} scaling, sent by a rank in a step", title_justify="left")
    least = min(points, key=lambda point: point.world)
    for point in points:
        traffic = predicted(point.config, point.model, point.world)
        minimum = max(sum(traffic.minimum(stage).values()) for stage in range(len(traffic.stages)))
        efficiency = point.tokens_per_second / point.world / (least.tokens_per_second / least.world)
        shown.add_row(
            point.layout,
            str(point.world),
            f"{point.seconds:.3f}",
            f"{sum(seconds_of(point).values()):.3f}",
            f"{point.tokens_per_second:,.0f}",
            f"{efficiency:.0%}",
            f"{max(point.sent) / 1e6:.3f}",
            f"{max(traffic.sent(GLOO)) / 1e6:.3f}",
            f"{minimum / 1e6:.3f}",
        )
    return shown
