"""The peak memory that `plan` predicts beside the one that a training step has, layout by layout, on gloo ranks.

    python benchmarks/peak_memory.py --record peaks.json      # all cases, those that the record has are not measured again
    python benchmarks/peak_memory.py --record peaks.json --quick

A case makes an engine and takes two steps of random text, the first of which makes Adam's state; the fullest moment of the
second counts, on the rank that has most. Both sides are bytes of tensors (`ds_pretrain/training/memory.py`), and the
prediction is told how many positions of the step are scored: what `plan` guesses of that is another matter, and exact where all
are. DeepSpeed's reduce bucket is a little smaller than the models here: its default of 2 GB would hide every error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.data.dataset import Cursor
from ds_pretrain.data.loader import Loader
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import create
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.planning import memory
from ds_pretrain.training import deepspeed_json

LIMIT = 0.05
LENGTH, SHORT = 256, 64
AT_ONCE = 8
"""Cases of one start of the ranks."""
_SIZE: dict[str, Any] = {"layers": 4, "hidden": 256, "heads": 4, "vocab": 8192, "positions": LENGTH}
MODELS = {
    "gpt": ("clm", ModelConfig(**_SIZE)),
    "llama": ("clm", ModelConfig(preset="llama-1m", **_SIZE)),
    "bert": ("mlm", ModelConfig(preset="bert-1m", **_SIZE, attention_dropout=0.0)),
    "bert, attention dropped": ("mlm", ModelConfig(preset="bert-1m", **_SIZE)),
    "prefix": ("prefix_lm", ModelConfig(**_SIZE)),
    "electra": ("electra", ModelConfig(preset="bert-1m", **_SIZE, dropout=0.0)),
}
"""By name, an objective and a model for it."""
SINGLE = ParallelPlan()
TENSOR, SEQUENCE = ParallelPlan(tensor=2), ParallelPlan(tensor=2, sequence=True)
PIPELINE, CONTEXT = ParallelPlan(pipeline=2), ParallelPlan(context=2)


@dataclass(frozen=True)
class Case:
    """One measurement. rows: of a micro-batch. bucket: elements of DeepSpeed's reduce bucket."""

    model: str = "gpt"
    plan: ParallelPlan = SINGLE
    world: int = 1
    zero: int = 1
    precision: str = "fp32"
    accumulation: int = 1
    recompute: bool = False
    rows: int = 4
    length: int = LENGTH
    bucket: int = 4_000_000

    @property
    def layout(self) -> str:
        data = self.plan.data(self.world)
        plan = "" if str(self.plan) == "1" and data > 1 else str(self.plan)
        return plan + "x" * bool(plan and data > 1) + f"DP{data}" * (data > 1)

    @property
    def deepspeed(self) -> dict[str, Any]:
        half = {} if self.precision == "fp32" else {self.precision: {"enabled": True}}
        return {"zero_optimization": {"stage": self.zero, "reduce_bucket_size": self.bucket}, **half}

    @property
    def legal(self) -> bool:
        return next(deepspeed_json.problems(self.deepspeed, self.plan.pipeline), None) is None

    def moment(self, load: memory.Load) -> memory.Moment:
        """The fullest moment of the fullest rank."""
        objective, model = create(MODELS[self.model][0]), MODELS[self.model][1]
        shared = (model, objective, self.plan, self.plan.replicas(self.world), self.deepspeed, load)
        ranks = [memory.Rank(*shared, self.accumulation, self.recompute, place) for place in range(self.plan.pipeline)]
        return max((memory.peak(rank) for rank in ranks), key=lambda moment: moment.total)


@dataclass(frozen=True)
class Result:
    """What a case took: bytes of its fullest rank, and what its heaviest micro-batch asked for."""

    case: Case
    measured: int
    load: memory.Load

    @property
    def predicted(self) -> memory.Moment:
        return self.case.moment(self.load)

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of the measured peak."""
        return self.predicted.total / self.measured - 1


def quick() -> list[Case]:
    """A few cases that use every layout, stage, precision and kind of model, and both ways to recompute and accumulate."""
    single = [Case(), Case("llama", zero=2, precision="bf16", recompute=True), Case("bert", zero=0, accumulation=2)]
    data = [
        Case(zero=0), Case("bert", zero=2), Case(zero=1, precision="bf16", accumulation=2), Case(zero=3, accumulation=2),
        Case("prefix", zero=1, recompute=True), Case("llama", zero=3, precision="bf16", recompute=True),
    ]  # fmt: skip
    shared = [
        Case(plan=TENSOR, recompute=True), Case(plan=SEQUENCE), Case(plan=CONTEXT, recompute=True),
        Case("electra", precision="bf16"),
        Case(plan=PIPELINE, accumulation=4, rows=2), Case("bert", PIPELINE, precision="bf16", accumulation=4, recompute=True),
    ]  # fmt: skip
    four = [Case(plan=replace(SEQUENCE, pipeline=2), accumulation=4, rows=2)]
    four += [Case(plan=PIPELINE, accumulation=4, rows=2), *(Case(plan=TENSOR, zero=zero) for zero in (2, 3))]
    worlds = ((1, single), (2, [*data, *shared]), (4, four))
    return _shorter(replace(case, world=world) for world, cases in worlds for case in cases)


def _shorter(cases: Iterable[Case]) -> list[Case]:
    """Those of bf16, which CPUs multiply slowly, with short rows."""
    return [case if case.precision == "fp32" else replace(case, length=SHORT) for case in cases]


def everything() -> list[Case]:
    """Every legal combination for one model, and the other models and a load of almost nothing under some."""
    layouts = [(1, SINGLE), *((2, plan) for plan in (SINGLE, TENSOR, SEQUENCE, CONTEXT, PIPELINE))]
    layouts += [(4, TENSOR), (4, replace(TENSOR, pipeline=2)), (4, replace(SEQUENCE, pipeline=2)), (4, PIPELINE)]
    found = list(quick())
    for number, (layout, zero, precision, recompute) in enumerate(
        product(layouts, (0, 1, 2, 3), ("fp32", "bf16"), (False, True))
    ):
        world, plan = layout
        accumulation = 4 if plan.pipeline > 1 else 1 + number // 2 % 2
        found.append(Case("gpt", plan, world, zero, precision, accumulation, recompute, 2 if plan.pipeline > 1 else 4))
    for model, zero in product([*MODELS][1:], (1, 3)):
        found += [Case(model, world=2, zero=zero, precision=precision) for precision in ("fp32", "bf16")]
    found += [Case("llama", TENSOR, 2, 3), Case("gpt", TENSOR, 4, 3, "bf16"), Case("electra", SINGLE, 2, 2)]
    found += [Case(world=2, zero=zero, precision=p, rows=1, length=SHORT) for zero in (0, 1, 2, 3) for p in ("fp32", "bf16")]
    return list(dict.fromkeys(case for case in _shorter(found) if case.legal))


def measure(case: Case) -> Result:
    """One case on the ranks of this job (collective)."""
    from ds_pretrain.parallel.mesh import Mesh
    from ds_pretrain.training.engine import build_for, create_engine, share_groups
    from ds_pretrain.training.memory import held, watched
    from ds_pretrain.training.optimizer import OptimizerConfig

    share_groups()
    objective, model = create(MODELS[case.model][0]), MODELS[case.model][1]
    mesh = Mesh.build(case.plan)
    before = held(mesh.device)
    build = build_for(objective, model, mesh, case.length, case.recompute)
    config = deepspeed_json.filled(case.deepspeed, mesh.replicas, case.rows, case.accumulation, 1.0)
    engine = create_engine(build, objective, OptimizerConfig(lr=1e-3), config)
    rows = case.rows * case.accumulation * mesh.data_size
    text = memory.random_text(objective, case.length, rows, seed=1)
    with Loader(text, rows, case.rows, mesh.at.data, mesh.data_size, Cursor()) as loader:
        engine.step(next(loader).batches, 1, 1e-3)
        batches = next(loader).batches
        with watched(mesh.device) as found:
            engine.step(batches, 2, 1e-3)
    heaviest = memory.heaviest([memory.Load.counted(batch) for batch in batches])
    return Result(case, max(mesh.gather(found.bytes - before)), memory.heaviest(mesh.gather(heaviest)))


def measure_all(cases: Sequence[Case]) -> list[Result]:
    """Cases one after the other, ZeRO-3 last: its linear layer stays in the process, and keeps less."""
    return [measure(case) for case in sorted(cases, key=lambda case: case.zero == 3)]


def measured(cases: Sequence[Case], record: Path | None = None) -> list[Result]:
    """The results of all cases, started here or taken from the record, which keeps them."""
    known = read(record) if record and record.exists() else {}
    for world in sorted({case.world for case in cases}):
        todo = [case for case in cases if case.world == world and case not in known]
        for start in range(0, len(todo), AT_ONCE):
            known |= {result.case: result for result in spawn(world, measure_all, todo[start : start + AT_ONCE])}
            if record:
                record.write_text(json.dumps([asdict(result) for result in known.values()], indent=1), encoding="utf-8")
    return [known[case] for case in cases]


def read(record: Path) -> dict[Case, Result]:
    """The results of a record."""
    found = {}
    for line in json.loads(record.read_text(encoding="utf-8")):
        case = Case(**{**line["case"], "plan": ParallelPlan(**line["case"]["plan"])})
        found[case] = Result(case, line["measured"], memory.Load(**line["load"]))
    return found


def table(results: Sequence[Result]) -> str:
    """The results in Markdown, those beyond the limit marked."""
    lines = [
        "| model | layout | ZeRO | precision | steps of | recompute | rows | measured MB | predicted MB | error | fullest at |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case, found = result.case, result.predicted
        error = f"{result.error:+.1%}" + " **beyond 5%**" * (abs(result.error) > LIMIT)
        lines.append(
            f"| {case.model} | {case.layout} | {case.zero} | {case.precision} | {case.accumulation} | "
            f"{'yes' if case.recompute else 'no'} | {case.rows} x {case.length} | {result.measured / 1e6:.1f} | "
            f"{found.total / 1e6:.1f} | {error} | {found.name} |"
        )
    return "\n".join(lines)


def main(
    record: Annotated[Path, typer.Option(help="JSON of what was measured; read first, then written after each start.")],
    few: Annotated[bool, typer.Option("--quick", help="The few cases of the test.")] = False,
) -> None:
    """Measure, predict, and print the table."""
    results = measured(quick() if few else everything(), record)
    worst = max(results, key=lambda result: abs(result.error))
    Console(width=200).print(table(results), markup=False, soft_wrap=True)
    print(f"{len(results)} cases, {sum(abs(r.error) <= LIMIT for r in results)} within 5%, the worst {worst.error:+.1%}")


if __name__ == "__main__":
    typer.run(main)
