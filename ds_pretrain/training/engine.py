"""One step, whichever DeepSpeed engine makes it.

`Engine.step(micro_batches)` returns per-head sums and totals over the whole job. The two engines differ in who calls the
layers; the loss, its divisor, the metrics and the state are the same code. All that touches DeepSpeed lives in this room.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch, Readout, Target
from ds_pretrain.core.loss import count_totals, step_loss, weighted_mean
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.transformer import Block, Build, Network, initialise
from ds_pretrain.objectives.base import Objective
from ds_pretrain.parallel.comm import DataComm, all_reduce
from ds_pretrain.parallel.mesh import TIMEOUT, Mesh, Mpu
from ds_pretrain.training.context import divide_positions
from ds_pretrain.training.deepspeed_json import offloads
from ds_pretrain.training.metrics import real_tokens
from ds_pretrain.training.optimizer import OptimizerConfig, adamw
from ds_pretrain.training.pool import Pool

AT_ONCE = 32
"""Micro-batches of an evaluation in memory at a time."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, summed over the job.

    sums, totals: per head. grad_norm: before clipping; None where DeepSpeed has none, as for a step that fp16's loss scaler
    skipped. skipped: steps skipped so far.
    """

    loss: float
    sums: Mapping[str, float]
    totals: Mapping[str, float]
    grad_norm: float | None
    skipped: int
    tokens: int
    """Positions of the step that are not padding."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and (self.grad_norm is None or math.isfinite(self.grad_norm))


@dataclass(frozen=True)
class Evaluated:
    """Per-head sums over an evaluation, in nats. tallies: what the objective counts (`Objective.tallied`)."""

    loss: float
    sums: Mapping[str, float]
    totals: Mapping[str, float]
    tallies: Mapping[str, float]


@dataclass
class Criterion:
    """From answers to the scalar that backward is called on, keeping the sums on the way."""

    objective: Objective
    comm: DataComm
    scale: float
    totals: Mapping[str, float] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)
    tally: bool = False
    unit: Callable[[], float] = lambda: 1.0
    """What the engine makes of a gradient of 1 on its way to the layers."""
    copies: tuple[str, ...] = ()
    """Heads whose sums another rank counts already."""
    pool: Pool | None = None
    """The pool of a step whose micro-batches are walked twice."""

    def start(self, totals: Mapping[str, float], tally: bool = False) -> None:
        self.totals, self.tally, self.sums, self.tallies = totals, tally, {}, {}

    def __call__(self, read: Readout, batch: Batch) -> Tensor:
        if self.pool and not torch.is_grad_enabled():
            self.pool.look(read, batch)
            return torch.zeros(())
        if self.pool:
            sums, loss = self.pool.answer(read, batch, self.totals, self.scale)
        else:
            sums = self.objective.loss(read, batch, self.comm)
            loss = step_loss(sums, self.totals, self.objective.heads, self.scale)
        self._keep(self.sums, sums)
        if self.tally:
            self._keep(self.tallies, self.objective.tallies(read, batch, self.comm))
        return loss

    def _keep(self, kept: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if not any(name == copy or name.startswith(f"{copy}/") for copy in self.copies):
                kept[name] = kept.get(name, 0) + value.detach().double()

    def generated(self, read: Readout, labels: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """Hear a generator's answers, which the objective's other heads do not see: their sums are kept, and the gradient of
        their loss is tied to `hidden`, whose own gradient comes back through the same backward pass."""
        assert self.objective.generator is not None
        name = self.objective.generator[0]
        (head,) = (h for h in self.objective.heads if h.name == name)
        summed = (read.nll(name, labels, weights) * weights).sum()
        self._keep(self.sums, {name: summed})
        if self.tally:
            self._keep(self.tallies, {f"{name}/correct": read.correct(name, labels, weights).sum()})
        loss = step_loss({name: summed}, self.totals, (head,), self.scale)
        return _Tied.apply(hidden, loss * self.unit())


class _Tied(torch.autograd.Function):
    """Hidden states as they are; going back, the loss beside them gets a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_ones((), dtype=torch.float32)


class Model(ABC):
    """Weights on a mesh that can be evaluated for an objective: a running engine, or a frozen model."""

    build: Build
    objective: Objective
    criterion: Criterion
    micro_size: int

    @property
    def mesh(self) -> Mesh:
        return self.build.mesh

    def evaluate(self, batches: Iterable[Batch]) -> Evaluated:
        """Sums over these micro-batches of every data rank, without dropout; all ranks must bring equally many."""
        counts: Counter[str] = Counter()
        self.criterion.start({head.name: 1.0 for head in self.objective.heads}, tally=True)
        coming = iter(batches)
        while some := [to_device(batch, self.mesh.device) for batch in islice(coming, AT_ONCE)]:
            counts.update(count_totals(some, self.objective.heads))
            with torch.no_grad():
                self._evaluate(some)
        totals = self._global({head.name: counts[head.name] for head in self.objective.heads})
        sums = self._global(self._measured(self.criterion.sums, totals), parts=True)
        tallies = self._global(self._measured(self.criterion.tallies, self.objective.tallied), parts=True)
        self.criterion.start({})
        return Evaluated(weighted_mean(sums, totals, self.objective.heads), sums, totals, tallies)

    @staticmethod
    def _measured(values: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
        """What the criterion kept, 0 on the stages where it did not run."""
        return {name: float(values.get(name, 0.0)) for name in names}

    def _global(self, values: Mapping[str, float], parts: bool = False) -> dict[str, float]:
        """Sum numbers over the job: those of each data rank once, or, where its stages and context ranks hold parts, of all of
        these. Tensor ranks hold copies."""
        whole = self.mesh.last_stage and self.mesh.at.context == 0
        speaks = (whole or parts) and self.mesh.at.tensor == 0
        local = torch.tensor([v if speaks else 0.0 for v in values.values()], dtype=torch.float64, device=self.mesh.device)
        return dict(zip(values, self.mesh.sum(local).tolist(), strict=True))

    @abstractmethod
    def _evaluate(self, batches: Sequence[Batch], dropout: bool = False) -> None: ...


class Engine(Model):
    """A model in training: an optimizer and DeepSpeed around it. Build one with `create_engine`."""

    def __init__(self, build: Build, objective: Objective, optimizer: OptimizerConfig, deepspeed: dict, seed: int) -> None:
        self.build, self.objective, self.seed = build, objective, seed
        self.micro_size = deepspeed["train_micro_batch_size_per_gpu"]
        scale = deepspeed["gradient_accumulation_steps"] * self.mesh.replicas
        self.criterion = Criterion(objective, DataComm(self.mesh), scale)
        if self.mesh.at.context:  # embeddings are whole on every context rank
            self.criterion.copies = tuple(head.name for head in objective.heads if head.classes == 0)
        quiet_deepspeed()
        with quiet_stdout():
            self.deepspeed = self._start(optimizer, deepspeed)
        self.stage = self.deepspeed.zero_optimization_stage()
        self.criterion.unit = lambda: self._loss_scale / deepspeed["gradient_accumulation_steps"]

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer underneath DeepSpeed's."""
        return getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)

    @property
    def _loss_scale(self) -> float:
        """What DeepSpeed multiplies the loss by before it goes back (fp16); 1 elsewhere."""
        return float(getattr(self.deepspeed.optimizer, "loss_scale", 1.0))

    @property
    def scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler of fp16, None elsewhere."""
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def _norm(self) -> float | None:
        """DeepSpeed's norm of the gradient before clipping. A step that the loss scaler skipped has none, unless the scale
        can fall no further: then the gradient itself overflows."""
        scaler = self.scaler
        if scaler and self.deepspeed.optimizer.overflow:
            return None if scaler.cur_scale > scaler.min_scale else math.inf
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def step(self, batches: Sequence[Batch], number: int, lr: float) -> StepResult:
        """Train on this rank's micro-batches of step `number` (counted from 1) at this learning rate."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.mesh.seed(self.seed, number)
        totals = self._global({**count_totals(batches, self.objective.heads), "tokens": real_tokens(batches)})
        batches = [to_device(batch, self.mesh.device) for batch in batches]
        tokens = int(totals.pop("tokens"))
        self.criterion.start(totals)
        if self.objective.pooled and len(batches) > 1:
            self._look(batches, number)
        norm = self._train(batches)
        self.criterion.pool = None
        sums = self._global(self._measured(self.criterion.sums, totals), parts=True)
        loss = weighted_mean(sums, totals, self.objective.heads)
        return StepResult(loss, sums, totals, norm, self.deepspeed.skipped_steps, tokens)

    def _look(self, batches: Sequence[Batch], number: int) -> None:
        """The first of two walks over the step; the second one draws the same dropout."""
        self.criterion.pool = pool = Pool.empty(self.objective)
        with torch.no_grad():
            self._evaluate(batches, dropout=True)
        if self.mesh.last_stage:
            pool.close(self.criterion.totals, self.criterion.scale, self.criterion.comm)
        self.mesh.seed(self.seed, number)

    def compile(self) -> None:
        """Compile each transformer layer on its own, so that one graph serves them all."""
        for layer in self.module.modules():
            if isinstance(layer, Block):
                layer.compile(dynamic=False)

    @abstractmethod
    def _start(self, optimizer: OptimizerConfig, config: dict) -> Any: ...

    @abstractmethod
    def _train(self, batches: Sequence[Batch]) -> float | None: ...


class PlainEngine(Engine):
    """The engine without a pipeline: ZeRO 0 to 3, the model called once per micro-batch."""

    def _start(self, optimizer: OptimizerConfig, config: dict) -> Any:
        import deepspeed

        network = Network(self.build).to(self.mesh.device)
        initialise(network, self.build, self.seed)
        divide_positions(network, self.mesh)
        torch_optimizer = adamw(optimizer, network, offloads(config))
        return deepspeed.initialize(model=network, optimizer=torch_optimizer, config=config, mpu=Mpu())[0]

    def _train(self, batches: Sequence[Batch]) -> float | None:
        self.deepspeed.train()
        norm = None
        for number, batch in enumerate(batches, start=1):
            loss = self.deepspeed(batch, self.criterion)
            self.deepspeed.backward(loss)
            if number == len(batches) and self.stage == 0:
                norm = self._gradient_norm()
                if not math.isfinite(norm):
                    return norm  # the step is not taken; the trainer records it and stops
            self.deepspeed.step()
        return norm if self.stage == 0 else self._norm()

    def _evaluate(self, batches: Sequence[Batch], dropout: bool = False) -> None:
        self.deepspeed.train(dropout)
        for batch in batches:
            self.deepspeed(batch, self.criterion)
        self.deepspeed.train()

    def _gradient_norm(self) -> float:
        """Stage 0 has no norm of its own. Replicas count on the first tensor rank only."""
        mine = [
            p.grad.double().pow(2).sum()
            for p in self.module.parameters()
            if p.grad is not None and (getattr(p, "tensor_model_parallel", False) or self.mesh.at.tensor == 0)
        ]
        square = torch.stack(mine).sum() if mine else torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return float(all_reduce(square, self.mesh.tensor_group).sqrt())


def create_engine(build: Build, objective: Objective, optimizer: OptimizerConfig, deepspeed: dict, seed: int = 0) -> Engine:
    """The engine that the plan asks for. deepspeed: a resolved DeepSpeed JSON, without "auto"."""
    from ds_pretrain.training.pipeline import PipelineEngine

    limit_groups()
    kind = PipelineEngine if build.mesh.plan.pipeline > 1 else PlainEngine
    return kind(build, objective, optimizer, deepspeed, seed)


@functools.cache
def limit_groups() -> None:
    """Collectives in DeepSpeed's own groups end with an error after `TIMEOUT`, not after half an hour."""
    from deepspeed.comm.torch import TorchBackend

    TorchBackend.new_group = lambda self, ranks: torch.distributed.new_group([*ranks], timeout=TIMEOUT)


@functools.cache
def share_groups() -> None:
    """From now on all engines of this process have the same group for the same ranks. DeepSpeed makes its groups anew for each
    engine and ends none: engines made one after the other would run out of sockets, and wait for them to be connected."""
    from deepspeed.comm.torch import TorchBackend

    limit_groups()
    made: dict[tuple[int, ...], Any] = {}
    make = TorchBackend.new_group

    def new_group(self: Any, ranks: Sequence[int]) -> Any:
        if (key := tuple(ranks)) not in made:
            made[key] = make(self, ranks)
        return made[key]

    TorchBackend.new_group = new_group


def build_for(objective: Objective, model: ModelConfig, mesh: Mesh, seq_len: int, recompute: bool = False) -> Build:
    """What the layers of `model` need to know to serve this objective on this mesh."""
    return Build(model, mesh, objective.kind, seq_len, recompute, objective.heads, objective.generator)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its planes on the device."""
    if device.type == "cpu":
        return batch

    def move(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

    pattern = batch.attention
    return replace(
        batch,
        inputs=move(batch.inputs),
        position=move(batch.position),
        attention=AttentionPattern(move(pattern.segment), move(pattern.horizon), pattern.kind),
        targets={name: Target(move(t.labels), move(t.weights), t.total) for name, t in batch.targets.items()},
        token_type=move(batch.token_type),
    )


def quiet_deepspeed() -> None:
    """Warnings and errors only; and on CPU nothing is compiled at start (its shared-memory collectives need a compiler)."""
    import deepspeed
    import deepspeed.ops

    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    # DeepSpeed spreads tied parameters before training without no_grad; nothing is ever differentiated through it.
    warnings.filterwarnings("ignore", message=r".*c10d::broadcast_.*autograd kernel")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """DeepSpeed prints while it starts; show it with DS_PRETRAIN_VERBOSE=1."""
    if os.environ.get("DS_PRETRAIN_VERBOSE"):
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield
