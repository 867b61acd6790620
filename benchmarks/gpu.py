"""What tests on a CPU cannot check: one command for a machine with a CUDA device.

    python benchmarks/gpu.py                       # every check, a few minutes on one GPU
    python benchmarks/gpu.py --only parity,flex
    python benchmarks/gpu.py --only speed --steps 50 --json speed.json

    nccl      start-up of the process group and an all-reduce of the float64 sums that a step makes
    adamw     fused AdamW against the unfused one
    flex      FlexAttention, forward and backward, against SDPA with the dense reference mask
    parity    losses and first gradients of the parity models against plain PyTorch on the CPU, fp32 and bf16
    fp16      dynamic loss scaling: steps run, overflows are skipped and counted, the trainer goes on
    speed     tokens/s and MFU of GPT-2 small and BERT-base beside a compiled plain loop

Every check is a function of the device. A check that raises has failed, and the others still run. Exits 1 if one fails,
0 without CUDA, saying so.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import step

from ds_pretrain.core.attention import AttentionPattern, Kind
from ds_pretrain.evaluation import parity
from ds_pretrain.models.presets import create_bert_base, create_gpt_small
from ds_pretrain.objectives import create
from ds_pretrain.training.metrics import mfu, step_flops
from ds_pretrain.training.optimizer import OptimizerConfig, adamw

PARITY_STEPS = 5
PARITY_LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (3e-3, 8e-2)}
"""Loss of any step and first gradient of the worst parameter, relative. bf16: three times a CPU's."""
FLEX_LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}
"""Output and gradients, relative, against fp32 SDPA."""
OVERFLOW_POWER = 40
"""A loss scale of 2^40 overflows every fp16 gradient: the first steps must be skipped."""
SLOWEST = 0.97
"""Our share of the plain loop's tokens/s below which the speed check fails."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    passed: bool
    figure: str


def missing_device() -> str | None:
    """Why nothing can be checked here; None where it can."""
    if torch.cuda.is_available():
        return None
    return f"needs a CUDA device: torch.cuda.is_available() is False on this machine (torch {torch.__version__})"


def relative(found: Tensor, true: Tensor) -> float:
    """Distance over length, in fp32 on the CPU."""
    found, true = found.detach().float().cpu(), true.detach().float().cpu()
    return float((found - true).norm() / true.norm())


# nccl


def check_nccl(device: torch.device) -> Iterator[Check]:
    from ds_pretrain.parallel.mesh import Mesh
    from ds_pretrain.parallel.plan import ParallelPlan

    began = time.perf_counter()
    mesh = Mesh.build(ParallelPlan())
    values = torch.tensor([1.5, 2.0], dtype=torch.float64, device=mesh.device)
    found = mesh.sum(values).tolist()
    seconds = time.perf_counter() - began
    on = mesh.device.type == device.type
    yield Check("start-up and all-reduce of float64", on and found == [1.5 * mesh.world, 2.0 * mesh.world],
                f"{mesh.world} rank(s) on {mesh.device}, {seconds:.1f} s")  # fmt: skip
    mesh.barrier()
    yield Check("barrier and broadcast of an object", mesh.agree("text") == "text", torch.distributed.get_backend())


# adamw


def check_adamw(device: torch.device) -> Iterator[Check]:
    ours, plain = (_small_module(device) for _ in range(2))
    config = OptimizerConfig(lr=1e-2)
    fused = adamw(config, ours, offload=False)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    unfused = torch.optim.AdamW(groups, config.lr, config.betas, config.eps, foreach=False, fused=False)
    for number in range(5):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(number)).to(device)
        for module, optimizer in ((ours, fused), (plain, unfused)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    error = max(relative(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    yield Check("fused equals unfused after 5 steps", error <= 1e-5, f"largest difference {error:.1e}")


def _small_module(device: torch.device) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 32)).to(device)


# flex


def check_flex(device: torch.device) -> Iterator[Check]:
    for kind in ("causal", "full", "mixed"):
        for length, query_heads, key_heads, size in ((512, 8, 8, 64), (320, 8, 2, 64), (32, 4, 2, 16)):
            pattern = packed_pattern(kind, 3, length, device)
            for dtype in FLEX_LIMITS:
                yield compare_attention(pattern, query_heads, key_heads, size, dtype)


def packed_pattern(kind: Kind, rows: int, length: int, device: torch.device) -> AttentionPattern:
    """Documents of unlike lengths; the last quarter of row 0 and an eighth of row 1 are padding, row 2 is full."""
    segment = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        real = length - (length // 4, length // 8, 0)[row % 3]
        cuts = [0, real // 5 + row, real // 2, real]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts), start=1):
            segment[row, start:stop] = number
    segment = segment.to(device)
    if kind == "mixed":
        return AttentionPattern.prefix(segment, torch.full_like(segment, max(2, length // 16)))
    return AttentionPattern.causal(segment) if kind == "causal" else AttentionPattern.full(segment)


def compare_attention(pattern: AttentionPattern, heads: int, groups: int, size: int, dtype: torch.dtype) -> Check:
    """Our core attention against SDPA with `dense()` in fp32, forward and backward."""
    from ds_pretrain.models.attention import CoreAttention, lower

    rows, length = pattern.segment.shape
    device = pattern.segment.device
    draw = torch.Generator().manual_seed(length)
    shapes = ((length, rows, heads, size), (length, rows, groups, size), (length, rows, groups, size))
    inputs = [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes]
    truth = [x.detach().float().requires_grad_() for x in inputs]
    weight = torch.randn(length, rows, heads * size, generator=draw).to(device)
    weight = weight * (pattern.segment != 0).t()[:, :, None]  # nothing reads padding

    core = CoreAttention(_NoDropout()).to(device)
    position = torch.arange(length, device=device).repeat(rows, 1)
    out = core(*inputs, lower(pattern.segment, pattern.horizon, position, pattern.kind, size, None))
    (out.float() * weight).sum().backward()

    q, k, v = (x.permute(1, 2, 0, 3) for x in truth)
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    true = F.scaled_dot_product_attention(q, k, v, pattern.dense()[:, None]).permute(2, 0, 1, 3).flatten(2)
    real = (pattern.segment != 0).t()[:, :, None]
    true = torch.where(real, true, 0.0)
    (true * weight).sum().backward()

    forward = relative(out, true)
    backward = max(relative(a.grad, b.grad) for a, b in zip(inputs, truth, strict=True))  # type: ignore[arg-type]
    zero = bool((out[(pattern.segment == 0).t()] == 0).all())
    limits = FLEX_LIMITS[dtype]
    name = f"{pattern.kind}, S {length}, heads {heads}/{groups} of {size}, {_short(dtype)}"
    passed = forward <= limits[0] and backward <= limits[1] and zero
    return Check(name, passed, f"out {forward:.1e}, gradients {backward:.1e}, padding {'zero' if zero else 'NOT zero'}")


class _NoDropout:
    """All that `CoreAttention` reads of megatron-core's config."""

    attention_dropout = 0.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# parity


def check_parity(device: torch.device, precisions: Iterable[str] = ("fp32", "bf16")) -> Iterator[Check]:
    for objective in ("clm", "mlm"):
        truth = parity.expected(objective, parity.ROWS, PARITY_STEPS)  # plain PyTorch on the CPU, fp32
        for precision in precisions:
            loss, gradient, worst = distance(*observed(objective, precision, PARITY_STEPS), *truth)
            limits = PARITY_LIMITS[precision]
            figure = f"loss {loss:.1e} (limit {limits[0]:g}), gradients {gradient:.1e} (limit {limits[1]:g}, {worst})"
            yield Check(f"{objective}, {precision}", loss <= limits[0] and gradient <= limits[1], figure)


def engine_for(objective: str, precision: str, **fp16: Any) -> Any:
    """A parity model under ZeRO-1 on this process alone. fp16: entries of the JSON's fp16 block."""
    from ds_pretrain.models.transformer import Build
    from ds_pretrain.parallel.mesh import Mesh
    from ds_pretrain.parallel.plan import ParallelPlan
    from ds_pretrain.training.engine import create_engine

    made = create(objective)
    build = Build(parity.model_for(objective), Mesh.build(ParallelPlan()), made.kind, parity.SEQ_LEN)
    config = step.deepspeed_json(precision, parity.ROWS)
    if fp16:
        config["fp16"] = {**config["fp16"], **fp16}
    return create_engine(build, made, OptimizerConfig(lr=parity.LR), config, parity.SEED)


def observed(objective: str, precision: str, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps and the first gradients, by the engine."""
    engine = engine_for(objective, precision)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for number, batches in enumerate(parity._steps(parity.samples(objective), parity.ROWS, steps), start=1):
        result = engine.step(batches, number, parity.LR)
        losses.append(result.loss)
        first = first or {parity.NORM: torch.tensor(result.grad_norm), **parity._first_gradients(engine)}
    return losses, first


def distance(
    losses: list[float], gradients: dict[str, Tensor], true_losses: list[float], truth: dict[str, Tensor]
) -> tuple[float, float, str]:
    """Largest relative errors of losses and gradients, and the parameter of the latter; a missing one is infinite."""
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses, true_losses, strict=True))
    errors = {n: relative(gradients[n], true) if n in gradients else float("inf") for n, true in truth.items()}
    worst = max(errors, key=lambda name: errors[name])
    return loss, errors[worst], worst


# fp16


def check_fp16(device: torch.device, precision: str = "fp16") -> Iterator[Check]:
    yield steps_run(precision)
    if precision == "fp16":
        yield overflows_are_skipped()
        yield trainer_survives()


def steps_run(precision: str) -> Check:
    """The JSON as it is shipped: losses are finite and fall, and with fp16 the scale is dynamic."""
    engine = engine_for("clm", precision)
    (batches,) = parity._steps(parity.samples("clm"), parity.ROWS, 1)
    results = [engine.step(batches, number, parity.LR) for number in range(1, 13)]  # the same rows: the loss must fall
    first, last = results[0], results[-1]
    scale = loss_scale(engine)
    dynamic = bool(getattr(engine.deepspeed.optimizer, "dynamic_loss_scale", False))
    passed = last.loss < first.loss and (dynamic or precision != "fp16")
    figure = f"loss {first.loss:.3f} -> {last.loss:.3f}, scale {scale:g}, dynamic {dynamic}, skipped {last.skipped}"
    return Check(f"zero1_{precision}.json, 12 steps", passed, figure)


def overflows_are_skipped() -> Check:
    """Skipped steps are counted, leave the weights alone and lower the scale."""
    engine = engine_for("clm", "fp16", initial_scale_power=OVERFLOW_POWER, hysteresis=1)
    (batches,) = parity._steps(parity.samples("clm"), parity.ROWS, 1)
    before = [p.detach().clone() for p in engine.module.parameters()]
    result = engine.step(batches, 1, parity.LR)
    same = all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
    scale = loss_scale(engine)
    passed = result.skipped == 1 and same and scale < 2.0**OVERFLOW_POWER
    figure = f"skipped {result.skipped}, weights {'untouched' if same else 'CHANGED'}, scale 2^40 -> {scale:g}"
    return Check("an overflow is skipped and counted", passed, figure)


def trainer_survives() -> Check:
    """An overflow is what dynamic scaling is for: the trainer must not call it divergence."""
    from ds_pretrain.training.trainer import DivergedError, PreTrainer

    config = {"fp16": {"enabled": True, "initial_scale_power": OVERFLOW_POWER, "hysteresis": 1}}
    trainer = PreTrainer(
        model=parity.model_for("clm"), objective=create("clm"), dataset=parity.samples("clm"),  # type: ignore[arg-type]
        batch_size=parity.ROWS, max_steps=40, deepspeed={**config, "zero_optimization": {"stage": 1}}, progress=False,
    )  # fmt: skip
    try:
        result = trainer.train()
    except DivergedError as error:
        return Check("the trainer goes on after an overflow", False, f"DivergedError: {error}")
    skipped = result.skipped if result else 0
    return Check("the trainer goes on after an overflow", 0 < skipped < 40, f"{skipped} of 40 steps skipped")


def loss_scale(engine: Any) -> float:
    return float(getattr(engine.deepspeed.optimizer, "loss_scale", 1.0))


# speed


def check_speed(device: torch.device, steps: int = 20) -> Iterator[Check]:
    for name, recipe in speed_recipes(steps).items():
        yield speed(name, recipe, device)
        gc.collect()
        torch.cuda.empty_cache()


def speed_recipes(steps: int) -> dict[str, step.Recipe]:
    """Without dropout: FlexAttention has none, and the two sides would drop differently."""
    gpt = create_gpt_small(dropout=0.0)
    bert = create_bert_base(dropout=0.0)
    return {
        "gpt2-small, 32 x 1024": step.Recipe("clm", gpt, 1024, 32, steps, "bf16", compile=True),
        "bert-base, 64 x 512, packed": step.Recipe("mlm", bert, 512, 64, steps, "bf16", packed=True, compile=True),
    }


def speed(name: str, recipe: step.Recipe, device: torch.device) -> Check:
    """Tokens/s of both sides, and MFU: model FLOPs of the mask as it is, logits counted at scored positions only."""
    data = step.batches(recipe, 4)
    figures = step.measure(recipe, device, data)
    seconds = [statistics.median(figures.wall[side]) for side in ("ours", "plain")]
    flops = step_flops(recipe.model, create(recipe.objective), data)
    shares = [mfu(flops, each * len(data), 1) for each in seconds]
    used = ["unknown peak" if share is None else f"MFU {share:.1%}" for share in shares]
    same = figures.loss_error <= step.LIMITS[recipe.precision]
    figure = (
        f"ours {figures.rate('ours'):,.0f} tok/s, {used[0]}; plain {figures.rate('plain'):,.0f} tok/s, {used[1]}; "
        f"ratio {figures.ratio():.3f}; loss {figures.losses['ours'][0]:.4f} and {figures.losses['plain'][0]:.4f}"
    )
    return Check(f"{name}, {recipe.precision}, compiled", same and figures.ratio() >= SLOWEST, figure)


CHECKS: dict[str, Callable[..., Iterator[Check]]] = {
    "nccl": check_nccl,
    "adamw": check_adamw,
    "flex": check_flex,
    "parity": check_parity,
    "fp16": check_fp16,
    "speed": check_speed,
}


def run(name: str, device: torch.device, **options: Any) -> list[Check]:
    """The lines of one check; an exception is a failed line, and what came before it is kept."""
    found: list[Check] = []
    try:
        for check in CHECKS[name](device, **options):
            found.append(check)
    except Exception as error:
        traceback.print_exc()
        found.append(Check("raised", False, f"{type(error).__name__}: {str(error)[:300]}"))
    return found


def table(results: dict[str, list[Check]]) -> Table:
    failed = sum(not check.passed for checks in results.values() for check in checks)
    caption = "every check passes" if not failed else f"{failed} failed"
    made = Table("", "check", "", "figures", title="checks on this GPU", caption=caption)
    for group, checks in results.items():
        for check in checks:
            style = None if check.passed else "bold red"
            made.add_row(group, check.name, "pass" if check.passed else "FAIL", check.figure, style=style)
    return made


def main(
    only: Annotated[str, typer.Option(help=f"Some of the checks, with commas: {', '.join(CHECKS)}.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each side of the speed check.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")] = None,
) -> None:
    """Check on a CUDA device what CPU tests cannot: attention, NCCL, fp16, parity, fused AdamW, speed.

    Prints a table and exits 1 if a check fails. Without a CUDA device it says so and exits 0.
    """
    chosen = [name.strip() for name in only.split(",") if name.strip()] or list(CHECKS)
    unknown = [name for name in chosen if name not in CHECKS]
    if unknown:
        raise typer.BadParameter(f"no check is called {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    reason = missing_device()
    if reason:
        print(reason)
        return
    step.quiet()
    torch.set_float32_matmul_precision("highest")  # TF32 off
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", 0)
    console = Console(width=160)
    console.print(step.machine(), highlight=False)
    results: dict[str, list[Check]] = {}
    for name in chosen:
        console.print(f"{name} ...", highlight=False)
        results[name] = run(name, device, **({"steps": steps} if name == "speed" else {}))
    console.print(table(results), highlight=False)
    if json_file:
        lines = [{"group": group, **asdict(check)} for group, checks in results.items() for check in checks]
        report = {"machine": step.machine(), "checks": lines}
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not all(check.passed for checks in results.values() for check in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
