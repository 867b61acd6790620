"""Any layout is the same computation: measured, case by case, against plain PyTorch.

Each case trains one small fp32 model for some steps under one layout, ZeRO stage and accumulation, on real gloo or NCCL
ranks, and compares the loss of every step and the first gradient of every parameter with `reference`. Gradients are read
from Adam's first moment after step 1, (1 - beta1) times the clipped gradient, through the layout-free checkpoint: one way
for both engines and all stages, which checks clipping and checkpoint on the way. The models leave no part untried: the causal
one has rotary positions, grouped keys, SwiGLU and an untied head, the masked one is a BERT; the vocabulary is odd.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Batch
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.data.loader import Loader
from ds_pretrain.evaluation import reference
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import create
from ds_pretrain.parallel.mesh import Mesh, place
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn

LAYOUTS = {
    1: [ParallelPlan()],
    2: [ParallelPlan(), ParallelPlan(tensor=2), ParallelPlan(tensor=2, sequence=True), ParallelPlan(pipeline=2)],
    4: [ParallelPlan(tensor=2, pipeline=2), ParallelPlan(tensor=2), ParallelPlan(pipeline=2)],
}
"""Plans by world size; what a plan leaves of the world is data parallel."""
ACCUMULATION = (1, 4)
ROWS, SEQ_LEN, VOCAB, LR, SEED = 8, 32, 509, 1e-3, 11
LOSS_LIMIT, GRADIENT_LIMIT = 1e-6, 1e-5
_SHAPE = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128, "vocab": VOCAB, "positions": SEQ_LEN}
CAUSAL = ModelConfig(
    **_SHAPE, kv_heads=2, norm="rmsnorm", activation="swiglu", position="rope", bias=False, tie_embeddings=False
)
MASKED = ModelConfig(**_SHAPE, norm_position="post", activation="gelu", token_types=2, head_transform=True)


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    objective: str
    plan: ParallelPlan
    world: int
    stage: int
    accumulation: int

    @property
    def layout(self) -> str:
        data = self.plan.data(self.world)
        plan = "" if str(self.plan) == "1" and data > 1 else str(self.plan)
        return plan + ("x" if plan and data > 1 else "") + (f"DP{data}" if data > 1 else "")


@dataclass(frozen=True)
class Result:
    """A case and its distance from the reference, both relative; `worst` is the parameter with the largest."""

    case: Case
    loss_error: float
    gradient_error: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.loss_error <= LOSS_LIMIT and self.gradient_error <= GRADIENT_LIMIT


@dataclass
class RandomDocuments:
    """A store in memory: documents of random ids and lengths, the same on every rank."""

    count: int = 400
    digest: str = "random"
    documents: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = rng.generator("parity documents")
        lengths = draw.integers(4, 60, self.count)
        self.documents = [np.append(draw.integers(8, VOCAB, n), 2).astype(np.int32) for n in lengths]
        self.lengths = lengths + 1
        self.text = np.stack([lengths * 3, lengths], axis=1)

    def slice(self, i: int, start: int, stop: int) -> np.ndarray:
        return self.documents[i][start:stop]


VOCABULARY = Vocabulary(VOCAB, pad=0, unk=1, eod=2, cls=3, sep=4, mask=5, sentinels=(6, 7), specials=frozenset(range(8)))


def cases(world: int, objectives: Sequence[str]) -> list[Case]:
    """Every legal case of a world size: ZeRO 0 to 3 without a pipeline, 1 with it."""
    return [
        Case(objective, plan, world, stage, accumulation)
        for plan in LAYOUTS.get(world, [ParallelPlan()])
        for objective in objectives
        for stage in ((0, 1, 2, 3) if plan.pipeline == 1 else (1,))
        for accumulation in ACCUMULATION
    ]


def run(worlds: Sequence[int], objectives: Sequence[str], steps: int) -> list[Result] | None:
    """All cases of these world sizes, started here; under a launcher those of its own world (None but on rank 0)."""
    where = place()
    if where.world > 1:
        results = run_cases(cases(where.world, objectives), steps)
        return results if where.rank == 0 else None
    return [result for world in worlds for result in spawn(world, run_cases, cases(world, objectives), steps)]


def run_cases(todo: Sequence[Case], steps: int) -> list[Result]:
    """Run cases one after the other on the ranks of this job (collective); results on rank 0."""
    truth = {name: expected(name, steps) for name in {case.objective for case in todo}}
    shown = track(todo, "parity", console=Console(stderr=True), disable=place().rank != 0)
    return [compare(case, *observed(case, steps), *truth[case.objective]) for case in shown]


def model_for(objective: str) -> ModelConfig:
    return CAUSAL if create(objective).kind == "causal" else MASKED


def samples(objective: str) -> Samples:
    return Samples(RandomDocuments(), VOCABULARY, SEQ_LEN, objective, "parity", SEED)


def expected(objective: str, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps and the clipped gradients of the first, by plain PyTorch."""
    from ds_pretrain.models.transformer import initial_value

    shape = model_for(objective)
    weights = {n: initial_value(n, s, shape, SEED).requires_grad_() for n, s in parameter_shapes(shape).items()}
    optimizer = torch.optim.AdamW(_groups(weights), lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for batches in _steps(samples(objective), steps):
        optimizer.zero_grad()
        loss = reference.loss(weights, shape, batches, create(objective).heads[0].name)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        first = first or {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


def observed(case: Case, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same by the engine of this case (collective); gradients on rank 0 only."""
    from ds_pretrain.training.engine import build_for, create_engine
    from ds_pretrain.training.optimizer import OptimizerConfig

    mesh = Mesh.build(case.plan)
    objective = create(case.objective)
    build = build_for(objective, model_for(case.objective), mesh, SEQ_LEN)
    micro = ROWS // mesh.data_size // case.accumulation
    engine = create_engine(build, objective, OptimizerConfig(lr=LR), _deepspeed(case, micro), SEED)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    with Loader(samples(case.objective), ROWS, micro, mesh.at.data, mesh.data_size) as loader:
        for number in range(1, steps + 1):
            losses.append(engine.step(next(loader).batches, number, LR).loss)
            first = first or _first_gradients(engine)
    return losses, first


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


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical names and whole shapes, written out independently of the modules that the engines build."""
    h, f, v = model.hidden, model.ffn_width, model.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"word.weight": (v, h)}
    post, up = model.norm_position == "post", f * (2 if model.activation == "swiglu" else 1)
    norms = ["pre_cross_attn_layernorm", "output_norm"] if post else ["input_layernorm", "pre_mlp_layernorm"]
    qkv = h + 2 * model.groups * model.head_dim
    matrices = {"self_attention.linear_qkv": (qkv, h), "self_attention.linear_proj": (h, h)}
    matrices |= {"mlp.linear_fc1": (up, h), "mlp.linear_fc2": (h, f)}
    for layer in range(model.layers):
        for name, shape in matrices.items():
            shapes |= dict(_with_bias(f"layers.{layer}.{name}", shape, model.bias))
        for name in norms:
            shapes |= dict(_with_bias(f"layers.{layer}.{name}", (h,), model.norm == "layernorm"))
    layernorm = model.norm == "layernorm"
    shapes |= {"embed.position.weight": (model.positions or 0, h)} if model.position == "learned" else {}
    shapes |= {"embed.types.weight": (model.token_types, h)} if model.token_types else {}
    shapes |= dict(_with_bias("embed.norm" if post else "head.final_norm", (h,), layernorm))
    if model.head_transform:
        shapes |= dict(_with_bias("head.dense", (h, h), True)) | dict(_with_bias("head.dense_norm", (h,), layernorm))
        shapes["head.output_bias.bias"] = (v,)
    return shapes if model.tie_embeddings else {**shapes, "output.weight": (v, h)}


def _with_bias(name: str, shape: tuple[int, ...], bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _steps(data: Samples, steps: int) -> Iterator[list[Batch]]:
    cursor = Cursor()
    for _ in range(steps):
        rows, cursor = data.rows(cursor, ROWS)
        yield [data.collate(rows)]


def _groups(weights: dict[str, Tensor]) -> list[dict]:
    decayed = [w for w in weights.values() if w.ndim > 1]
    plain = [w for w in weights.values() if w.ndim == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def _deepspeed(case: Case, micro: int) -> dict:
    return {
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


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


def table(results: Sequence[Result]) -> Table:
    """The results for people."""
    made = Table(
        "objective", "layout", "ZeRO", "accumulation", "loss error", "gradient error", "worst parameter", "",
        title=f"parity with plain PyTorch, fp32: loss within {LOSS_LIMIT:g}, gradients within {GRADIENT_LIMIT:g}, relative",
        caption=f"{sum(r.passed for r in results)} of {len(results)} cases pass; largest loss error "
        f"{max(r.loss_error for r in results):.1e}, largest gradient error {max(r.gradient_error for r in results):.1e}",
    )  # fmt: skip
    for row, result in zip(_rows(results), results, strict=True):
        made.add_row(*row, style=None if result.passed else "bold red")
    return made


def markdown(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    head = ["objective", "layout", "ZeRO", "accumulation", "loss error", "gradient error", "worst parameter", "passes"]
    lines = [head, ["---"] * len(head), *_rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _rows(results: Sequence[Result]) -> Iterator[list[str]]:
    for r in results:
        c = r.case
        yield [c.objective, c.layout, str(c.stage), str(c.accumulation), f"{r.loss_error:.1e}", f"{r.gradient_error:.1e}",
               r.worst, "yes" if r.passed else "NO"]  # fmt: skip
