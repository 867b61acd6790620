"""Bugs of the kinds that other trainers shipped, switched on one at a time: a check that misses one of them is no check.

A mutant is a patch that holds on every rank while one case of `parity` takes two steps. It is caught by whatever notices
first: ranks that disagree after step 1 (`training.agreement`), a gradient of step 1, a loss of step 1 or 2, or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor

from ds_pretrain.core import loss as losses
from ds_pretrain.core.batch import Batch, Target
from ds_pretrain.data import loader
from ds_pretrain.evaluation import parity
from ds_pretrain.evaluation.parity import Case
from ds_pretrain.models import attention, heads, transformer
from ds_pretrain.parallel import comm
from ds_pretrain.parallel.launch import place
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.shards import Shard
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training import engine, optimizer, pipeline
from ds_pretrain.training.agreement import DisagreementError

STEPS = 2
ALONE, DATA = ParallelPlan(), ParallelPlan()
TENSOR, SEQUENCE, PIPELINE = ParallelPlan(tensor=2), ParallelPlan(tensor=2, sequence=True), ParallelPlan(pipeline=2)
CONTEXT = ParallelPlan(context=2)


@dataclass(frozen=True)
class Mutant:
    """A bug, the case that shows it, and the patch that makes it."""

    name: str
    case: Case
    patch: Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Caught:
    """By which check a mutant was noticed, None if by none."""

    mutant: str
    case: Case
    by: str | None


MUTANTS: dict[str, Mutant] = {}


def _mutant(
    objective: str, plan: ParallelPlan = ALONE, world: int = 1, stage: int = 1, accumulation: int = 1
) -> Callable[[Callable[[], Iterator[None]]], None]:
    """Registers a patch under its function's name, in words."""

    def add(function: Callable[[], Iterator[None]]) -> None:
        name = function.__name__.replace("_", " ")
        MUTANTS[name] = Mutant(name, Case(objective, plan, world, stage, accumulation), contextmanager(function))

    return add


def run(names: Sequence[str] = ()) -> list[Caught]:
    """Each mutant on ranks started here, those of one world size on the same ones."""
    chosen = [mutant for name, mutant in MUTANTS.items() if not names or name in names]
    found = [
        caught
        for world in sorted({mutant.case.world for mutant in chosen})
        for caught in spawn(world, run_here, [mutant.name for mutant in chosen if mutant.case.world == world])
    ]
    order = {mutant.name: i for i, mutant in enumerate(chosen)}
    return sorted(found, key=lambda caught: order[caught.mutant])


def run_here(names: Sequence[str]) -> list[Caught]:
    """Mutants on the ranks of this job (collective); results on rank 0."""
    return [Caught(name, MUTANTS[name].case, caught_by(MUTANTS[name])) for name in names]


def caught_by(mutant: Mutant) -> str | None:
    """The first check that notices."""
    case = mutant.case
    truth = parity.expected(case.objective, case.rows, STEPS) if place().rank == 0 else ([], {})  # before the bug is there
    try:
        with mutant.patch():
            result = parity.measure(case, STEPS, lambda objective, rows: truth)
    except DisagreementError as error:
        return f"agreement of ranks: {error.found[0]}"
    if place().rank > 0 or result.passed:
        return None
    if result.gradient_error > max(parity.LIMITS[case.precision][1], parity.ORDER):
        return f"gradient of step 1: {result.worst} by {result.gradient_error:.1e}"
    if result.strayed:
        return f"influence: {result.strayed} outputs stray"
    return f"loss of {STEPS} steps by {result.loss_error:.1e}"


def table(results: Sequence[Caught]) -> Table:
    """What was caught, and by what."""
    made = Table("bug", "objective", "layout", "caught by", title="mutants: seeded bugs and the check that sees them")
    for r in results:
        made.add_row(r.mutant, r.case.objective, r.case.layout, r.by or "NOTHING", style=None if r.by else "bold red")
    made.caption = f"{sum(r.by is not None for r in results)} of {len(results)} caught at step 1 or 2"
    return made


def _moved(change: Callable[[Batch], Batch]) -> AbstractContextManager:
    """Batches that change on their way to the device."""
    real = engine.to_device
    return patch.object(engine, "to_device", lambda batch, device: change(real(batch, device)))


def _targets(batch: Batch, change: Callable[[Target], Target]) -> Batch:
    return replace(batch, targets={name: change(target) for name, target in batch.targets.items()})


def _pattern(change: Callable[..., tuple]) -> AbstractContextManager:
    """Attention of changed planes (segment, horizon, position)."""
    real = attention.lower

    def lower(segment: Any, horizon: Any, position: Any, *others: Any) -> Any:
        return real(*change(segment, horizon, position), *others)

    return patch.object(transformer, "lower", lower)


@_mutant("clm", SEQUENCE, 2)
def norms_not_summed_under_sequence_parallelism() -> Iterator[None]:
    with patch.object(transformer, "_sum_over", lambda group, gradient: gradient):
        yield


@_mutant("mlm", PIPELINE, 2)
def tied_embedding_not_summed_over_stages() -> Iterator[None]:
    with patch("deepspeed.pipe.PipelineModule.get_tied_weights_and_groups", lambda self: []):
        yield


@_mutant("mlm", PIPELINE, 6)
def tied_embedding_summed_stage_by_stage() -> Iterator[None]:
    """As DeepSpeed does it: over three data ranks the two stages round differently."""
    with patch.object(pipeline, "tie_everywhere", lambda module, mesh: None):
        yield


@_mutant("clm", ParallelPlan(tensor=2, pipeline=2, sequence=True), 4)
def sequence_cut_up_between_stages() -> Iterator[None]:
    """DeepSpeed takes what travels between stages for copies, and sends each tensor rank's share of them."""
    with patch.dict(pipeline.WHOLE, {"pipe_partitioned": True, "grad_partitioned": True}):
        yield


@_mutant("mlm", accumulation=4)
def mean_of_means() -> Iterator[None]:
    real = engine.Criterion.__call__

    def call(self: Any, read: Any, batch: Batch) -> Any:
        own = {name: target.total * self.scale for name, target in batch.targets.items()}
        kept, self.totals = self.totals, own
        found = real(self, read, batch)
        self.totals = kept
        return found

    with patch.object(engine.Criterion, "__call__", call):
        yield


@_mutant("mlm", DATA, 2)
def targets_counted_on_one_data_rank() -> Iterator[None]:
    def count(batches: Sequence[Batch], of: Any) -> dict[str, float]:
        return {name: total * 2 * (place().rank == 0) for name, total in losses.count_totals(batches, of).items()}

    with patch.object(engine, "count_totals", count):
        yield


@_mutant("mlm")
def padding_in_the_divisor() -> Iterator[None]:
    def count(batches: Sequence[Batch], of: Any) -> dict[str, float]:
        return {head.name: float(sum(batch.inputs.numel() for batch in batches)) for head in of}

    with patch.object(engine, "count_totals", count):
        yield


@_mutant("clm")
def labels_shifted_by_one() -> Iterator[None]:
    with _moved(lambda b: _targets(b, lambda t: replace(t, labels=t.labels.roll(1, 1)))):
        yield


@_mutant("mdlm")
def weights_of_the_loss_lost() -> Iterator[None]:
    with _moved(lambda b: _targets(b, lambda t: replace(t, weights=(t.weights != 0).float()))):
        yield


@_mutant("electra", TENSOR, 2)
def clipping_over_part_of_the_ranks() -> Iterator[None]:
    norm = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._model_parallel_all_reduce"
    with patch(norm, lambda self, tensor, op: None):
        yield


@_mutant("electra")
def factor_of_a_head_lost() -> Iterator[None]:
    def flat(sums: Any, totals: Any, of: Any, scale: float) -> Any:
        return losses.step_loss(sums, totals, [replace(head, coefficient=1.0) for head in of], scale)

    with patch.object(engine, "step_loss", flat):
        yield


@_mutant("mlm", TENSOR, 2)
def other_dropout_on_each_tensor_rank() -> Iterator[None]:
    real = transformer.row_keys
    with patch.object(transformer, "row_keys", lambda tokens, seed: real(tokens, seed + place().rank)):
        yield


@_mutant("mlm", SEQUENCE, 2)
def dropout_of_the_first_part_of_the_sequence_everywhere() -> Iterator[None]:
    def first(self: Any, plane: Tensor) -> Tensor:
        return self.own(plane).t().chunk(self.mesh.plan.tensor)[0]

    with patch.object(transformer.Build, "own_states", first):
        yield


@_mutant("clm", CONTEXT, 2)
def every_context_rank_embeds_the_first_positions() -> Iterator[None]:
    def first(self: Any, plane: Tensor) -> Tensor:
        return plane.narrow(1, 0, plane.shape[1] // self.mesh.plan.context)

    with patch.object(transformer.Build, "own", first):
        yield


@_mutant("simcse", CONTEXT, 2)
def embeddings_counted_by_every_context_rank() -> Iterator[None]:
    def embed(self: Any, head: str, chosen: Tensor) -> Tensor:
        vectors: Tensor = self.head.classifiers[head](self._normed(self._everywhere()[chosen]), embed=True)
        return vectors

    with patch.object(heads.Answers, "embed", embed):
        yield


@_mutant("mlm", CONTEXT, 2)
def heads_of_the_context_ranks_in_another_order() -> Iterator[None]:
    real = attention.CoreAttention.local

    def turned(self: Any, query: Tensor, key: Tensor, value: Tensor, lowered: Any) -> Tensor:
        return real(self, query, key.roll(1, 2), value.roll(1, 2), lowered)

    with patch.object(attention.CoreAttention, "local", turned):
        yield


@_mutant("electra", TENSOR, 2)
def another_generator_on_each_tensor_rank() -> Iterator[None]:
    real = heads.row_keys
    with patch.object(heads, "row_keys", lambda tokens: real(tokens) + place().rank):
        yield


@_mutant("electra", PIPELINE, 2)
def gradient_of_the_generator_lost() -> Iterator[None]:
    class Loose:
        @staticmethod
        def apply(hidden: Any, loss: Any) -> Any:
            return hidden + 0 * loss

    with patch.object(engine, "_Tied", Loose):
        yield


@_mutant("electra", PIPELINE, 2, accumulation=4)
def gradient_of_the_generator_not_divided_by_accumulation() -> Iterator[None]:
    real = engine.Criterion.generated

    def generated(self: Any, *given: Any) -> Any:
        self.unit = lambda: 1.0
        return real(self, *given)

    with patch.object(engine.Criterion, "generated", generated):
        yield


@_mutant("mlm")
def adam_one_step_ahead() -> Iterator[None]:
    real = optimizer.adamw

    def ahead(*given: Any) -> Any:
        made = real(*given)

        def hook(opt: Any, *_: Any) -> None:
            for group in opt.param_groups:
                for p in group["params"]:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    opt.state.setdefault(p, {"step": torch.ones(()), **zeros}) if p.grad is not None else None

        made.register_step_pre_hook(hook)
        return made

    with patch.object(engine, "adamw", ahead), patch.object(pipeline, "adamw", ahead):
        yield


@_mutant("mlm")
def decay_of_norms_and_biases() -> Iterator[None]:
    with patch.object(optimizer, "_of", lambda parameters, decayed: [p for p in parameters if decayed]):
        yield


@_mutant("prefix_lm")
def prefix_one_too_short() -> Iterator[None]:
    def change(segment: Any, horizon: Any, position: Any) -> tuple:
        here = torch.arange(horizon.shape[1])
        return segment, torch.where(horizon > here, horizon - 1, horizon), position

    with _pattern(change):
        yield


@_mutant("clm")
def documents_see_one_another() -> Iterator[None]:
    with _pattern(lambda segment, horizon, position: ((segment > 0).to(segment.dtype), horizon, position)):
        yield


@_mutant("mlm")
def positions_run_on_over_documents() -> Iterator[None]:
    with _moved(lambda b: replace(b, position=torch.arange(b.position.shape[1]).repeat(len(b.position), 1))):
        yield


@_mutant("bert")
def token_types_lost() -> Iterator[None]:
    real = transformer.first_inputs
    with patch.object(transformer, "first_inputs", lambda batch, build: real(replace(batch, token_type=None), build)):
        yield


@_mutant("clm")
def key_heads_of_another_group() -> Iterator[None]:
    real = attention._attend
    with patch.object(attention, "_attend", lambda q, k, v, *others: real(q, k.roll(1, 2), v, *others)):
        yield


@_mutant("clm", TENSOR, 2)
def gate_and_value_mixed_up_under_tensor_parallelism() -> Iterator[None]:
    real = Shard.take
    with patch.object(Shard, "take", lambda self, whole: real(replace(self, stride=1), whole)):
        yield


@_mutant("clm", TENSOR, 2)
def padding_of_the_vocabulary_trained() -> Iterator[None]:
    def project(self: Any, hidden: Any, vocabulary: Any) -> Any:
        return vocabulary(self.transform(hidden), project=True)

    with patch.object(heads.Head, "project", project):
        yield


@_mutant("simcse", DATA, 2)
def negatives_of_other_ranks_without_gradient() -> Iterator[None]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0][comm.dist.get_rank(ctx.group)], None

    with patch.object(comm._Gather, "backward", staticmethod(backward)):
        yield


@_mutant("simcse", accumulation=4)
def pool_of_one_micro_batch() -> Iterator[None]:
    with patch.object(engine.Engine, "_look", lambda self, batches, number: None):
        yield


@_mutant("mixture")
def heads_of_a_mixture_divided_one_by_one() -> Iterator[None]:
    with patch.object(losses, "divisors", lambda totals, of: {head.name: totals[head.name] for head in of}):
        yield


@_mutant("mlm", accumulation=4)
def accumulation_divided_twice() -> Iterator[None]:
    real = engine.step_loss
    with patch.object(engine, "step_loss", lambda sums, totals, of, scale: real(sums, totals, of, 1.0)):
        yield


@_mutant("clm", DATA, 2)
def the_same_rows_on_every_data_rank() -> Iterator[None]:
    real = loader.own_rows
    with patch.object(loader, "own_rows", lambda rows, micro, rank, size: real(rows, micro, 0, size)):
        yield


@_mutant("mlm", DATA, 2, stage=0)
def a_flipped_bit_on_one_rank() -> Iterator[None]:
    real = engine.Engine.step

    def step(self: Any, *given: Any) -> Any:
        if place().rank == 1:
            next(self.module.parameters()).data.view(torch.int32).view(-1)[7] ^= 1
        return real(self, *given)

    with patch.object(engine.Engine, "step", step):
        yield


@_mutant("nsp", TENSOR, 2)
def head_with_classes_summed_over_tensor_ranks() -> Iterator[None]:
    real = heads.Classifier.forward

    def forward(self: Any, hidden: Any, embed: bool = False) -> Any:
        return real(self, transformer.copy_to_tensor_model_parallel_region(hidden), embed)

    with patch.object(heads.Classifier, "forward", forward):
        yield
