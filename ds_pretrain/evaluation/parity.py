"""Any objective under any layout is the same computation: measured, cell by cell, against plain PyTorch.

Each case trains one small model for some steps under one layout, ZeRO stage, accumulation, recomputation and precision, on
real gloo or NCCL ranks, and compares the loss of every step and the first gradient of every parameter with `reference`.
Gradients are read from Adam's first moment after step 1, (1 - beta1) times the clipped gradient, through the layout-free
checkpoint: one way for both engines and all stages, which checks clipping and checkpoint on the way. Last, single tokens are
changed, and exactly the outputs that attention lets see them may move. The models leave no
part untried: the causal one has rotary positions, grouped keys, SwiGLU and an untied head, the others are a BERT, both drop
a tenth of their hidden states; the vocabulary is odd, and `fim` has three layers for two stages and a single key head for two
tensor ranks. bf16 is held against the same fp32 reference, within a band that was measured.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Batch
from ds_pretrain.core.registry import unknown
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.data.loader import Loader
from ds_pretrain.evaluation import reference
from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import REGISTRY, Objective, create
from ds_pretrain.parallel.launch import place
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan, layout_of
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training import deepspeed_json

if TYPE_CHECKING:
    from ds_pretrain.evaluation.parity_table import Record
    from ds_pretrain.training.engine import Engine

T = TypeVar("T")
STAGES, ACCUMULATION, RECOMPUTE, PRECISION = (0, 1, 2, 3), (1, 4), (False, True), ("fp32", "bf16")
ROWS, SEQ_LEN, VOCAB, LR, SEED = 8, 32, 509, 1e-3, 11
PAIRS = 32
"""Rows of a step where a row is one question with two answers: the mean of eight such losses keeps 1e-6 of rounding."""
AT_ONCE = 200
"""Cases of one start of the ranks: DeepSpeed keeps some 2 MB of each engine that it ever made."""
LIMITS = {"fp32": (1e-6, 1e-6), "bf16": (3e-2, 1e-1)}
"""Largest relative error of a loss and of a parameter's gradient. Measured in bf16: see benchmarks/parity.md."""
ORDER = 1e-5
"""The gradient's limit where only the order of a sum differs and a parameter's gradient is a small rest of large terms."""
NORM = "norm before clipping"
"""Compared like a gradient: clipping hides a factor that all of them share."""
OPTIONS = {"electra": {"generator_size": 0.5}, "simcse": {"temperature": 0.5}, "mdlm": {"eps": 0.1}}
"""Fields that are not the default: a generator whose heads two tensor and two context ranks can share; a temperature and a
least masking probability that do not multiply fp32's rounding by 20 and by 1,000."""
_SHAPE = {
    "layers": 2, "hidden": 64, "heads": 8, "ffn": 128, "vocab": VOCAB, "positions": SEQ_LEN, "dropout": 0.1,
    "attention_dropout": 0.0,
}  # fmt: skip
CAUSAL = ModelConfig(
    **_SHAPE, kv_heads=2, norm="rmsnorm", activation="swiglu", position="rope", bias=False, tie_embeddings=False
)
UNEVEN = CAUSAL.model_copy(update={"layers": 3, "kv_heads": 1})
MASKED = ModelConfig(**_SHAPE, init_std=0.1, norm_position="post", activation="gelu", token_types=2, head_transform=True)


@dataclass(frozen=True)
class Case:
    """One measurement."""

    objective: str
    plan: ParallelPlan
    world: int
    stage: int
    accumulation: int
    recompute: bool = False
    precision: str = "fp32"

    @property
    def layout(self) -> str:
        return layout_of(self.plan, self.world)

    @property
    def rows(self) -> int:
        """Rows of a step: as many as everybody's, where they can be dealt out."""
        unit = self.plan.data(self.world) * self.accumulation
        rows = PAIRS if {head.classes for head in objective_for(self.objective).heads} == {2} else ROWS
        return rows if rows % unit == 0 else unit

    @property
    def micro(self) -> int:
        """Rows of a micro-batch."""
        return self.rows // self.plan.data(self.world) // self.accumulation

    @property
    def deepspeed(self) -> dict:
        half = {} if self.precision == "fp32" else {self.precision: {"enabled": True}}
        return {"zero_optimization": {"stage": self.stage}, **half}

    @property
    def illegal(self) -> str | None:
        """Why there is no such run."""
        refused = next(deepspeed_json.problems(self.deepspeed, self.plan.pipeline), None)
        return refused and refused.split(":")[0].replace(f"parallel.pipeline {self.plan.pipeline}", "a pipeline")


@dataclass(frozen=True)
class Result:
    """A case and its distance from the reference, both relative; `worst` is the parameter with the largest. strayed: outputs
    that a changed token moved and should not have, or did not and should have (`influence`). seconds: of measuring it."""

    case: Case
    loss_error: float
    gradient_error: float
    worst: str
    strayed: int = 0
    seconds: float = 0.0

    @property
    def by_order(self) -> bool:
        """Whether fp32's own limit is passed only because sums may have another order (`ORDER`)."""
        return self.case.precision == "fp32" and self.gradient_error > LIMITS["fp32"][1]

    @property
    def passed(self) -> bool:
        loss, gradient = LIMITS[self.case.precision]
        return self.loss_error <= loss and self.gradient_error <= max(gradient, ORDER) and not self.strayed


@dataclass
class RandomDocuments:
    """A store in memory: documents of random ids and lengths, the same on every rank."""

    count: int = 400
    digest: str = "random"
    documents: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = rng.generator("parity documents")
        lengths = draw.integers(10, 60, self.count)
        self.documents = [np.append(draw.choice(VOCABULARY.words, n), VOCABULARY.eod).astype(np.int32) for n in lengths]
        self.lengths = lengths + 1
        self.text = np.stack([lengths * 3, lengths], axis=1)

    def slice(self, i: int, start: int, stop: int) -> np.ndarray:
        return self.documents[i][start:stop]


VOCABULARY = Vocabulary.synthetic(VOCAB)
Truth = tuple[list[float], dict[str, Tensor]]
"""Losses of all steps and the clipped gradients of the first, by name."""


def plans(world: int) -> list[ParallelPlan]:
    """Every plan of a world size that these small models can have."""
    return [
        plan
        for tensor, context, pipeline, sequence in product((1, 2), (1, 2), (1, 2), (False, True))
        if tensor > 1 or not sequence
        if world % (plan := ParallelPlan(tensor=tensor, pipeline=pipeline, sequence=sequence, context=context)).unit == 0
    ]


def cases(world: int, objectives: Sequence[str] = (), layouts: Sequence[str] = ()) -> list[Case]:
    """The full product for a world size, of these objectives and layouts (all by default), illegal cells included."""
    chosen = [(plan, objective) for plan in plans(world) for objective in objectives or REGISTRY]
    settings = list(product(PRECISION, STAGES, ACCUMULATION, RECOMPUTE))
    found = [Case(name, plan, world, s, a, r, p) for plan, name in chosen for p, s, a, r in settings]
    return [case for case in found if not layouts or case.layout in layouts]


def thinned(full: Iterable[Case]) -> list[Case]:
    """One legal case for each objective and layout, its settings taken in turn, so that a few cells use all of them."""
    cells: dict[tuple[str, str], list[Case]] = {}
    for case in full:
        if case.illegal is None:
            cells.setdefault((case.objective, case.layout), []).append(case)
    return [cell[7 * number % len(cell)] for number, cell in enumerate(cells.values())]


def known_layouts(worlds: Sequence[int]) -> list[str]:
    """The names of the layouts of these world sizes."""
    return list(dict.fromkeys(case.layout for world in worlds for case in cases(world, ["clm"])))


def run(
    worlds: Sequence[int],
    objectives: Sequence[str] = (),
    layouts: Sequence[str] = (),
    steps: int = 20,
    quick: bool = False,
    record: Record | None = None,
) -> list[Result] | None:
    """All legal cases of these world sizes, or one for each cell, started here; under a launcher those of its own world (None
    but on rank 0). What the record has is not measured again. ValueError for a name that nothing has."""
    where = place()
    worlds = [where.world] if where.world > 1 else worlds
    for kind, names, known in (("objective", objectives, [*REGISTRY]), ("layout", layouts, known_layouts(worlds))):
        if strange := [name for name in names if name not in known]:
            raise ValueError(unknown(kind, strange[0], known))
    if record and where.rank == 0:
        record.start()
    todo = {world: cases(world, objectives, layouts) for world in worlds}
    legal = {w: thinned(all_) if quick else [case for case in all_ if case.illegal is None] for w, all_ in todo.items()}
    if where.world > 1:
        results = run_cases(legal[where.world], steps, record)
        return results if where.rank == 0 else None
    recorded = record.passed() if record else {}
    left = {world: [case for case in legal[world] if case not in recorded] for world in worlds}
    goes = [(world, left[world][i : i + AT_ONCE]) for world in worlds for i in range(0, len(left[world]), AT_ONCE)]
    measured = {result.case: result for world, some in goes for result in spawn(world, run_cases, some, steps, record)}
    found = recorded | measured
    return [found[case] for world in worlds for case in legal[world]]


def run_cases(todo: Sequence[Case], steps: int, record: Record | None = None) -> list[Result]:
    """Run cases one after the other on the ranks of this job (collective); results on rank 0, each recorded as it comes."""
    truth = functools.cache(lambda objective, rows: expected(objective, rows, steps))
    mesh = Mesh.build(ParallelPlan())
    mine = record if mesh.rank == 0 else None
    known = mesh.agree(mine.passed() if mine else {})
    for case in tracked([case for case in todo if case not in known], "parity"):
        started = time.perf_counter()
        result = measure(case, steps, truth)
        known[case] = replace(result, seconds=time.perf_counter() - started)
        if mine:
            mine.add(known[case])
    return [known[case] for case in todo]


def tracked(todo: Sequence[T], what: str) -> Iterable[T]:
    """The same, with a progress bar on rank 0."""
    return track(todo, what, console=Console(stderr=True), disable=place().rank != 0)


def measure(case: Case, steps: int, truth: Callable[[str, int], Truth]) -> Result:
    """One case (collective). truth: about an objective and a number of rows, which rank 0 alone asks for: the others wait, and
    their result means nothing."""
    losses, gradients, strayed = observed(case, steps)
    if place().rank > 0:
        return Result(case, math.inf, math.inf, "")
    return replace(compare(case, losses, gradients, *truth(case.objective, case.rows)), strayed=strayed)


def objective_for(name: str) -> Objective:
    """The objective with its defaults, but for what small models force."""
    return create(name, **OPTIONS.get(name, {}))


def model_for(objective: str) -> ModelConfig:
    if objective == "fim":
        return UNEVEN
    return CAUSAL if objective_for(objective).kind == "causal" else MASKED


def samples(objective: str, seq_len: int = SEQ_LEN) -> Samples:
    return Samples(RandomDocuments(), VOCABULARY, seq_len, objective_for(objective), "parity", SEED)


def expected(objective: str, rows: int, steps: int) -> Truth:
    """What plain PyTorch makes of it."""
    from ds_pretrain.models.transformer import initial_value

    made, shape = objective_for(objective), model_for(objective)
    weights = {n: initial_value(n, s, shape, SEED).requires_grad_() for n, s in parameter_shapes(shape, made).items()}
    optimizer = torch.optim.AdamW(_groups(weights), lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for number, batches in enumerate(_steps(samples(objective), rows, steps), start=1):
        optimizer.zero_grad()
        loss = reference.loss(weights, shape, made, batches, rng.torch_seed("dropout", SEED, number))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        first = first or {NORM: norm} | {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


def observed(case: Case, steps: int) -> tuple[list[float], dict[str, Tensor], int]:
    """The same by the engine of this case (collective), gradients on rank 0 only; and the outputs that stray."""
    from ds_pretrain.evaluation.influence import strayed
    from ds_pretrain.training import agreement

    engine = engine_for(case)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    with loader_for(case, engine.mesh) as loader:
        for number in range(1, steps + 1):
            result = engine.step(next(loader).batches, number, LR)
            losses.append(result.loss)
            if number == 1:
                agreement.check(engine, number)
                first = {NORM: torch.tensor(result.grad_norm), **_first_gradients(engine)}
    data = samples(case.objective)
    batch = data.collate(data.rows(Cursor(), case.micro)[0])
    return losses, first, strayed(engine, batch, case.precision == "fp32")


def engine_for(case: Case) -> Engine:
    """The engine of a case (collective)."""
    from ds_pretrain.training.engine import build_for, create_engine, share_groups
    from ds_pretrain.training.optimizer import OptimizerConfig

    share_groups()
    mesh, objective = Mesh.build(case.plan), objective_for(case.objective)
    build = build_for(objective, model_for(case.objective), mesh, SEQ_LEN, case.recompute)
    config = deepspeed_json.filled(case.deepspeed, mesh.replicas, case.micro, case.accumulation, 1.0)
    return create_engine(build, objective, OptimizerConfig(lr=LR), config, SEED)


def loader_for(case: Case, mesh: Mesh, cursor: Cursor = Cursor()) -> Loader:
    """This rank's batches of a case."""
    return Loader(samples(case.objective), case.rows, case.micro, mesh.at.data, mesh.data_size, cursor)


def compare(
    case: Case, losses: list[float], gradients: dict[str, Tensor], true_losses: list[float], truth: dict[str, Tensor]
) -> Result:
    """Distances of one case; a parameter that is missing counts as infinitely far."""
    loss_error = max(abs(a - b) / abs(b) for a, b in zip(losses, true_losses, strict=True))
    errors = {
        name: float((gradients[name] - true).norm() / true.norm()) if name in gradients else float("inf")
        for name, true in truth.items()
    }
    errors = {name: error if math.isfinite(error) else math.inf for name, error in errors.items()}
    worst = max(errors, key=lambda name: errors[name])
    return Result(case, loss_error if all(map(math.isfinite, losses)) else math.inf, errors[worst], worst)


def _steps(data: Samples, count: int, steps: int) -> Iterator[list[Batch]]:
    cursor = Cursor()
    for _ in range(steps):
        rows, cursor = data.rows(cursor, count)
        yield [data.collate(rows)]


def _groups(weights: dict[str, Tensor]) -> list[dict]:
    decayed = [w for w in weights.values() if w.ndim > 1]
    plain = [w for w in weights.values() if w.ndim == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def _first_gradients(engine: object) -> dict[str, Tensor]:
    """Clipped gradients of step 1 out of Adam's first moment, whole, on rank 0."""
    from ds_pretrain.training import checkpoint

    mesh = engine.mesh  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        shared = mesh.agree(folder)
        path = checkpoint.save(Path(shared), engine, 1, {})  # type: ignore[arg-type]
        found = {"": torch.zeros(1)}
        if mesh.rank == 0:
            snapshot = checkpoint.Snapshot(path)
            found = {name: snapshot.whole(name, "exp_avg") / (1 - 0.9) for name in snapshot.shapes}
        mesh.barrier()
    return found
