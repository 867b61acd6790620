"""One training step of ours beside a plain PyTorch loop of the same model, on the same rows from the same weights.

    python benchmarks/step.py --layers 6 --hidden 256 --seq-len 256 --rows 8

Ours is the whole step: `create_engine` (DeepSpeed ZeRO-1, megatron-core's layers) and `Engine.step` with its counting,
reductions and read-outs. Beside it an `nn.Module` with fused attention, cross entropy over all logits and fused AdamW,
without DeepSpeed and without megatron-core; in bf16 it is autocast over fp32 weights. Both clip, and both read their
loss at every step. They take turns in one process; the median step of each counts.

The rows are collated before the clock starts: reading them is what `loader.py` measures.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Batch
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.presets import PRESETS
from ds_pretrain.objectives import create
from ds_pretrain.training.metrics import real_tokens
from ds_pretrain.training.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[1]
SEED = 7
OPTIMIZER = OptimizerConfig(lr=1e-4)
WARM_UP = 3
"""Steps before the clock starts; their losses are compared."""
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference of the first losses. bf16: weights in bf16 round elsewhere than autocast does."""


@dataclass(frozen=True)
class Recipe:
    """What is run. packed: several documents share a row, and the plain loop needs a dense mask."""

    objective: str
    """clm or mlm."""
    model: ModelConfig
    seq_len: int
    rows: int
    steps: int
    precision: str
    """fp32 or bf16."""
    packed: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        heads = {"clm": "causal LM", "mlm": "masked LM (plain: logits everywhere)"}
        return f"{heads[self.objective]}, {self.precision}" + ", packed" * self.packed + ", compiled" * self.compile


@dataclass
class Figures:
    """Seconds of each timed step, by side; losses of the warm-up."""

    tokens: int
    wall: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "plain": []})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "plain": []})
    losses: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "plain": []})

    def rate(self, side: str, clock: str = "wall") -> float:
        """Tokens per second of the median step."""
        return self.tokens / statistics.median(getattr(self, clock)[side])

    def ratio(self, clock: str = "wall") -> float:
        """Median over the turns of plain's time over ours: the two steps of a turn saw the same load."""
        clocks = getattr(self, clock)
        return statistics.median(p / o for o, p in zip(clocks["ours"], clocks["plain"], strict=True))

    @property
    def loss_error(self) -> float:
        """Relative difference of the first step's loss, which is of the same weights."""
        ours, plain = self.losses["ours"][0], self.losses["plain"][0]
        return abs(ours - plain) / abs(plain)


# The plain loop: what one would write by hand. Its parameters carry our logical names, so that weights go in by name.


class PlainLayer(nn.Module):
    """GPT-2's (pre-norm) or BERT's (post-norm) layer."""

    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        self.heads, self.pre = m.heads, m.norm_position == "pre"
        self.gelu = "tanh" if m.activation == "gelu_tanh" else "none"
        qkv, proj = nn.Linear(m.hidden, 3 * m.hidden, m.bias), nn.Linear(m.hidden, m.hidden, m.bias)
        fc1, fc2 = nn.Linear(m.hidden, m.ffn_width, m.bias), nn.Linear(m.ffn_width, m.hidden, m.bias)
        self.self_attention = nn.ModuleDict({"linear_qkv": qkv, "linear_proj": proj})
        self.mlp = nn.ModuleDict({"linear_fc1": fc1, "linear_fc2": fc2})
        first, second = _norm(m), _norm(m)
        if self.pre:
            self.input_layernorm, self.pre_mlp_layernorm = first, second
        else:
            self.pre_cross_attn_layernorm, self.output_norm = first, second

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if self.pre:
            x = x + self.attend(self.input_layernorm(x), mask, causal)
            return x + self.feed(self.pre_mlp_layernorm(x))
        x = self.pre_cross_attn_layernorm(x + self.attend(x, mask, causal))
        return self.output_norm(x + self.feed(x))

    def attend(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        rows, length, hidden = x.shape
        qkv = self.self_attention["linear_qkv"](x).view(rows, length, self.heads, 3, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.self_attention["linear_proj"](out.transpose(1, 2).reshape(rows, length, hidden))

    def feed(self, x: Tensor) -> Tensor:
        return self.mlp["linear_fc2"](F.gelu(self.mlp["linear_fc1"](x), approximate=self.gelu))


class PlainModel(nn.Module):
    """The whole model with its loss; logits at every position."""

    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(m.vocab_size, m.hidden)
        self.embed, self.head = nn.ModuleDict({"position": nn.Embedding(m.positions or 0, m.hidden)}), nn.ModuleDict()
        self.pre, self.transform = m.norm_position == "pre", m.head_transform
        if m.token_types:
            self.embed["types"] = nn.Embedding(m.token_types, m.hidden)
        if not self.pre:
            self.embed["norm"] = _norm(m)
        self.layers = nn.ModuleList(PlainLayer(m) for _ in range(m.layers))
        if self.pre:
            self.head["final_norm"] = _norm(m)
        if m.head_transform:
            self.head["dense"], self.head["dense_norm"] = nn.Linear(m.hidden, m.hidden), _norm(m)
            self.head["output_bias"] = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(m.vocab_size))})

    def forward(self, tokens: Tensor, position: Tensor, labels: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Summed loss; labels are -100 where nothing is predicted."""
        x = self.word(tokens) + self.embed["position"](position)
        if "types" in self.embed:
            x = x + self.embed["types"].weight[0]
        x = x if self.pre else self.embed["norm"](x)
        for layer in self.layers:
            x = layer(x, mask, causal)
        x = self.head["final_norm"](x) if self.pre else x
        bias = None
        if self.transform:
            x = self.head["dense_norm"](F.gelu(self.head["dense"](x)))
            bias = self.head["output_bias"]["bias"]
        logits = F.linear(x, self.word.weight, bias)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def _norm(m: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(m.hidden, m.norm_eps)


class PlainLoop:
    """Model, optimizer and step of the plain side."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        model = PlainModel(recipe.model)
        model.load_state_dict(initial_weights(recipe))
        self.model = model.to(device)
        self.parameters = list(model.parameters())
        decayed, rest = ([p for p in self.parameters if (p.ndim > 1) == matrix] for matrix in (True, False))
        groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        o = OPTIMIZER
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
        self.run: Callable[..., Tensor] = torch.compile(model, dynamic=False) if recipe.compile else model

    def step(self, batch: Batch) -> float:
        target, kind = batch.targets[self.recipe.objective], batch.attention.kind
        labels = target.labels.masked_fill(target.weights == 0, -100)
        inputs = [x.to(self.device, non_blocking=True) for x in (batch.inputs, batch.position, labels)]
        mask = self.mask(batch) if self.recipe.packed else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            loss = self.run(*inputs, mask, kind == "causal" and mask is None) / target.total
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, OPTIMIZER.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def mask(self, batch: Batch) -> Tensor:
        """bool [B, 1, S, S], made where it is used."""
        pattern = batch.attention
        on_device = type(pattern)(pattern.segment.to(self.device), pattern.horizon.to(self.device), pattern.kind)
        return on_device.dense()[:, None]


class OurLoop:
    """Our engine on this process alone."""

    def __init__(self, recipe: Recipe) -> None:
        from ds_pretrain.models.transformer import Build
        from ds_pretrain.parallel.mesh import Mesh
        from ds_pretrain.parallel.plan import ParallelPlan
        from ds_pretrain.training.engine import create_engine

        objective = create(recipe.objective)
        build = Build(recipe.model, Mesh.build(ParallelPlan()), objective.kind, recipe.seq_len)
        self.engine = create_engine(build, objective, OPTIMIZER, deepspeed_json(recipe.precision, recipe.rows), SEED)
        if recipe.compile:
            self.engine.compile()
        self.number = 0

    def step(self, batch: Batch) -> float:
        self.number += 1
        return self.engine.step([batch], self.number, OPTIMIZER.lr).loss


def deepspeed_json(precision: str, rows: int, clip: float = OPTIMIZER.clip) -> dict[str, Any]:
    """ds_configs/deepspeed/zero1_<precision>.json with its sizes filled in."""
    config = json.loads((ROOT / "ds_configs" / "deepspeed" / f"zero1_{precision}.json").read_text(encoding="utf-8"))
    sizes = {"train_batch_size": rows, "train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": 1}
    owned = {"gradient_clipping": clip, "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 30}
    return {**config, **sizes, **owned}


def initial_weights(recipe: Recipe) -> dict[str, Tensor]:
    """What our engine starts from, under the same names."""
    from ds_pretrain.models.transformer import initial_value

    shapes = parameter_shapes(recipe.model, create(recipe.objective))
    return {name: initial_value(name, shape, recipe.model, SEED) for name, shape in shapes.items()}


class Documents:
    """A store in memory: random words."""

    digest = "random"

    def __init__(self, vocab: int, lengths: np.ndarray) -> None:
        self.lengths = lengths
        self.text = np.stack([lengths * 4, lengths], axis=1)
        self.documents = [rng.generator("step", i).integers(8, vocab, n, dtype=np.int32) for i, n in enumerate(lengths)]

    def slice(self, i: int, start: int, stop: int) -> np.ndarray:
        return self.documents[i][start:stop]


def batches(recipe: Recipe, count: int) -> list[Batch]:
    """Rows of `Samples`, collated."""
    size = recipe.model.vocab_size
    vocab = Vocabulary(size, pad=0, unk=1, eod=2, cls=3, sep=4, mask=5, sentinels=(6, 7), specials=frozenset(range(8)))
    needed = recipe.rows * count
    if recipe.packed:
        draw = rng.generator("step lengths").lognormal(np.log(recipe.seq_len / 4), 1.0, needed * 4)
        lengths = np.clip(draw.astype(np.int64), 8, recipe.seq_len)
    else:  # one document per row: the masked objective adds [CLS] and [SEP] and leaves the end-of-document id out
        lengths = np.full(needed, recipe.seq_len - (1 if recipe.objective == "mlm" else 0), dtype=np.int64)
    samples = Samples(Documents(size, lengths), vocab, recipe.seq_len, recipe.objective, "benchmark", SEED)
    made, cursor = [], Cursor()
    for _ in range(count):
        rows, cursor = samples.rows(cursor, recipe.rows)
        made.append(samples.collate(rows))
    return made


def measure(recipe: Recipe, device: torch.device, data: list[Batch] | None = None) -> Figures:
    """Warm up, compare the losses, then time step after step, taking turns."""
    data = data or batches(recipe, 4)
    ours, plain = OurLoop(recipe), PlainLoop(recipe, device)
    loops: dict[str, OurLoop | PlainLoop] = {"ours": ours, "plain": plain}
    figures = Figures(tokens=sum(real_tokens([batch]) for batch in data) // len(data))
    for number in range(WARM_UP):
        for side, loop in loops.items():
            figures.losses[side].append(loop.step(data[number % len(data)]))
    for number in range(recipe.steps):
        for side in ("ours", "plain") if number % 2 == 0 else ("plain", "ours"):
            _synchronise(device)
            wall, cpu = time.perf_counter(), time.process_time()
            loops[side].step(data[number % len(data)])
            _synchronise(device)
            figures.wall[side].append(time.perf_counter() - wall)
            figures.cpu[side].append(time.process_time() - cpu)
    return figures


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> str:
    """Hardware, versions and commit in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    load = f"load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "deepspeed", "megatron-core"))
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return f"{device}; {load}; {packages}; commit {git.stdout.strip() or 'unknown'}"


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def models(layers: int, hidden: int, heads: int, seq_len: int, vocab: int) -> dict[str, ModelConfig]:
    """GPT-2 and BERT of this size, without dropout (the two sides would drop differently)."""
    size = {"layers": layers, "hidden": hidden, "heads": heads, "positions": seq_len, "vocab": vocab, "dropout": 0.0}
    return {
        "clm": ModelConfig(**{**PRESETS["gpt2-small"], **size}),
        "mlm": ModelConfig(**{**PRESETS["bert-base"], **size}),
    }


def table(results: list[tuple[Recipe, Figures]], title: str) -> Table:
    """One line per recipe. The ratio is ours over plain, in tokens per second: above 1 ours is faster."""
    cpu = not torch.cuda.is_available()
    columns = ["", "ours tok/s", "plain tok/s", "RATIO"] + ["ratio, CPU time"] * cpu + ["loss ours", "plain", "error"]
    made = Table(*columns, title=title)
    for recipe, f in results:
        made.add_row(
            recipe.name, f"{f.rate('ours'):,.0f}", f"{f.rate('plain'):,.0f}", f"{f.ratio():.3f}",
            *([f"{f.ratio('cpu'):.3f}"] * cpu),
            f"{f.losses['ours'][0]:.6f}", f"{f.losses['plain'][0]:.6f}", f"{f.loss_error:.1e}",
        )  # fmt: skip
    return made


def as_json(recipe: Recipe, figures: Figures) -> dict[str, Any]:
    return {"recipe": {**asdict(recipe), "model": recipe.model.model_dump()}, "ratio": figures.ratio(),
            "ratio_cpu": figures.ratio("cpu"), "loss_error": figures.loss_error, **asdict(figures)}  # fmt: skip


def main(
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 6,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    vocab: Annotated[int, typer.Option(help="Vocabulary; a larger one makes the heads cost more.")] = 8192,
    seq_len: Annotated[int, typer.Option(help="Positions of a row.")] = 256,
    rows: Annotated[int, typer.Option(help="Rows of a step, one micro-batch.")] = 8,
    steps: Annotated[int, typer.Option(help="Timed steps of each side, after 3 of warm-up; the median counts.")] = 20,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "both",
    objective: Annotated[str, typer.Option(help="clm, mlm or both.")] = "both",
    packed: Annotated[bool, typer.Option(help="Several documents per row; plain: dense mask.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile on both sides.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every timed step to this file.")] = None,
) -> None:
    """Tokens per second of our training step beside a plain PyTorch loop, and the RATIO (above 1: ours is faster).

    Exits 1 when the two do not have the same first loss: then the figures compare different computations.
    """
    quiet()
    torch.set_num_threads(threads)
    for value, known in ((precision, ("fp32", "bf16", "both")), (objective, ("clm", "mlm", "both"))):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}")
    console = Console(width=150)
    console.print(machine(), highlight=False)
    shapes = models(layers, hidden, heads, seq_len, vocab)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    results = []
    for number_format in ("fp32", "bf16") if precision == "both" else (precision,):
        for name in ("clm", "mlm") if objective == "both" else (objective,):
            recipe = Recipe(name, shapes[name], seq_len, rows, steps, number_format, packed, compiled)
            results.append((recipe, measure(recipe, device)))
    size = f"{layers} x {hidden}, {heads} heads, vocabulary {vocab:,}, {rows} rows of {seq_len}"
    title = f"Training step, ZeRO-1 engine beside plain PyTorch: {size}, median of {steps} steps"
    console.print(table(results, title), highlight=False)
    if json_file:
        json_file.write_text(json.dumps([as_json(*result) for result in results], indent=1) + "\n", encoding="utf-8")
    wrong = [recipe.name for recipe, f in results if not f.loss_error <= LIMITS[recipe.precision]]
    if wrong:
        console.print(f"the two sides do not compute the same loss: {'; '.join(wrong)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
