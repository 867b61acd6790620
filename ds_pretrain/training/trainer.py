"""A run: from a dataset, a model and an objective to checkpoints, metrics and a learning curve.

The loop holds no state of its own: the step number and the data cursor say everything, so a run that finds a checkpoint in
its output continues from it exactly where it stopped, and a run that finds itself finished does nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from ds_pretrain.core.batch import Batch
from ds_pretrain.core.differing import differing
from ds_pretrain.core.files import BusyError, hold
from ds_pretrain.data.audit import Audit
from ds_pretrain.data.dataset import Cursor, PretrainingDataset
from ds_pretrain.data.loader import Loader, Step, check_sizes
from ds_pretrain.data.mixing import MixedCursor, MixedDataset
from ds_pretrain.evaluation.perplexity import evaluate
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives.base import Objective
from ds_pretrain.parallel.mesh import Mesh, start
from ds_pretrain.parallel.plan import ParallelPlan, layout_of
from ds_pretrain.training import agreement, checkpoint, deepspeed_json, state
from ds_pretrain.training.engine import Engine, StepResult, build_for, create_engine
from ds_pretrain.training.metrics import MetricsLog, Watch, mfu, packed, step_flops, told
from ds_pretrain.training.optimizer import OptimizerConfig
from ds_pretrain.training.signals import FILE, InterruptedRun, StopRequest
from ds_pretrain.training.watchdog import Watchdog

ZERO_1: dict[str, Any] = {"zero_optimization": {"stage": 1}}
"""DeepSpeed's configuration when none is given: fp32, optimizer states divided over the data ranks."""
FAR = 1.5
"""A loss this many times that of the first step is said to diverge."""


class DivergedError(ArithmeticError):
    """The loss or the gradient is not a number any more."""


class PreTrainer:
    """Trains `model` for `objective` on `dataset`.

    model: a description; weights appear on the mesh, as `trainer.model` (the running engine). batch_size: rows of a step over
    all data ranks; micro_batch_size: rows of one micro-batch, all of a data rank's rows if None. deepspeed: a DeepSpeed JSON;
    batch sizes, clipping and "auto" values are filled in from here. output: folder of checkpoints, metrics and plots; None
    keeps nothing. facts: saved as run.yaml. Everything that is wrong is raised as one ValueError before anything starts.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        objective: Objective,
        dataset: PretrainingDataset | MixedDataset,
        plan: ParallelPlan = ParallelPlan(),
        batch_size: int = 32,
        micro_batch_size: int | None = None,
        learning_rate: float | None = None,
        max_steps: int = 1000,
        optimizer: OptimizerConfig | None = None,
        deepspeed: Mapping[str, Any] = ZERO_1,
        eval_every: int = 0,
        eval_tokens: int | None = 1 << 20,
        save_every: int = 0,
        keep: int = 2,
        log_every: int = 1,
        check_every: int = 1000,
        watchdog_seconds: float = 1800,
        max_minutes: float | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        init: str | Path | None = None,
        output: str | Path | None = None,
        seed: int = 0,
        facts: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        where = start()
        data_size = plan.data(where.world)
        micro_batch_size = micro_batch_size or max(1, batch_size // data_size)
        check_sizes(batch_size, micro_batch_size, data_size)
        if dataset.objective != objective:
            raise ValueError(f"the dataset was made for {dataset.objective}, the trainer is given {objective}")
        problems = [
            *model.problems(),
            *model.misfits(dataset.vocab.size, dataset.seq_len),
            *model.undividable(plan, dataset.seq_len),
            *deepspeed_json.problems(deepspeed, plan.pipeline),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        if optimizer is not None and learning_rate is not None:
            raise ValueError(f"learning_rate {learning_rate} and optimizer (lr {optimizer.lr}) are both given: use one")
        self.dataset, self.objective, self.plan = dataset, objective, plan
        self.batch_size, self.micro_batch_size, self.max_steps = batch_size, micro_batch_size, max_steps
        self.eval_every, self.eval_tokens, self.save_every = eval_every, eval_tokens, save_every
        self.keep, self.log_every, self.seed = keep, log_every, seed
        self.check_every, self._checked = check_every, False
        self.watchdog_seconds, self.max_minutes = watchdog_seconds, max_minutes
        self.optimizer = optimizer or OptimizerConfig(lr=learning_rate or 3e-4)
        self.output = Path(output) if output is not None else None
        self.facts = dict(facts or {})
        self.mesh = Mesh.build(plan)
        reach = max(model.positions or 0, dataset.seq_len) if model.position == "rope" else model.positions or dataset.seq_len
        self.shape = model.model_copy(update={"vocab": model.vocab or dataset.vocab.size, "positions": reach})
        build = build_for(objective, self.shape, self.mesh, dataset.seq_len, activation_checkpointing)
        accumulation = batch_size // (micro_batch_size * data_size)
        self.deepspeed = deepspeed_json.filled(
            deepspeed, self.mesh.replicas, micro_batch_size, accumulation, self.optimizer.clip
        )
        self.model: Engine = create_engine(build, objective, self.optimizer, self.deepspeed, seed)
        if compile:
            self.model.compile()
        self.progress = progress and self.mesh.rank == 0
        self.step, self.tokens, self.consumed = 0, 0, Counter[str]()
        self.cursor: Cursor | MixedCursor = dataset.first
        self._first_loss, self.diverging, self.changed, self.begun = 0.0, False, "", bool(init)
        self.origin: Mapping[str, Any] = {}
        self.audit = Audit(objective, dataset.vocab)
        self._held: IO[str] | None = None
        if self.output:
            self._open(self.output, init)
        elif init:
            self._begin_from(Path(init))

    def train(self) -> StepResult | None:
        """Run to `max_steps`; returns the last step's result (None if there was nothing left to do).

        A request to stop on any rank (see `signals`) ends it after the step at hand with a checkpoint of it and InterruptedRun.
        """
        if self.output and self._held and self._held.closed:  # it trained before, and gave the folder back
            self._held = hold(self.output / "lock")
        with self._held or contextlib.nullcontext():
            return self._train()

    def _train(self) -> StepResult | None:
        metrics = MetricsLog(self.output / "metrics.jsonl" if self.output and self.mesh.rank == 0 else None, self.step)
        loader = Loader(
            self.dataset, self.batch_size, self.micro_batch_size, self.mesh.at.data, self.mesh.data_size, self.cursor
        )
        result = None
        stop = StopRequest(self.output / "stop" if self.output and self.mesh.rank == 0 else None, self.max_minutes)
        watchdog = Watchdog(self.watchdog_seconds, self.mesh.rank, self.output / "stacks" if self.output else None)
        watch = Watch(self.objective.name, self.step, self.max_steps, self.progress)
        with watchdog, loader, stop, watch:
            watch.say("\n".join(filter(None, [self._header(), self.changed])))
            for name, fit in self.dataset.packing().items() if watch.shown else ():
                watch.say(f"{name}: {packed(fit)}")
            if self.begun and self.step == 0 and self.eval_every:  # what the weights know before they learn
                self._evaluate_all(metrics, watch, watchdog)
            while self.step < self.max_steps:
                result = self._one_step(loader, metrics, watch)
                watchdog.beat(f"step {self.step}")
                stopped = int(self.mesh.max(stop.reason))
                last = self.step == self.max_steps
                if self.eval_every and (self.step % self.eval_every == 0 or last) and not stopped:
                    self._evaluate_all(metrics, watch, watchdog)
                if self.output and (last or stopped or (self.save_every and self.step % self.save_every == 0)):
                    self.save()
                    watchdog.beat(f"the checkpoint of step {self.step}")
                if stopped and not last:
                    metrics.close()
                    raise InterruptedRun(
                        stopped,
                        f"stopped after step {self.step:,} of {self.max_steps:,}: {self._kept(stopped)}",
                        kept=self.output is not None,
                    )
        metrics.close()
        return result

    def _kept(self, stopped: int) -> str:
        """How a run that was stopped goes on."""
        if not self.output:
            return "nothing is kept"
        remove = f"remove {self.output / 'stop'}, and " if stopped == FILE else ""
        return f"it is saved; {remove}the same command goes on from there ({self.output})"

    def _header(self) -> str:
        """The run in one line."""
        if self.step >= self.max_steps:
            return f"already trained to step {self.step:,}: raise train.max_steps to go on"
        here = {shard.name: math.prod(shard.shape) for shard, _ in state.local_parameters(self.model)}
        parameters = sum({name: size for stage in self.mesh.gather(here) for name, size in stage.items()}.values()) / 1e6
        where = "start" if self.step == 0 else f"resuming at step {self.step:,}"
        layout = layout_of(self.plan, self.mesh.world)
        return (
            f"{where}: {self.objective.name}, {parameters:,.1f}M parameters, {self.batch_size} x {self.dataset.seq_len} "
            f"positions a step, {self.max_steps:,} steps, layout {layout} on {self.mesh.world} x {self.mesh.device.type}, "
            f"ZeRO-{self.model.stage}, output {self.output or 'none'}"
        )

    def evaluate(self, split: str, max_tokens: int | None = None) -> dict[str, Any]:
        """Loss and what it means (perplexity and bits per byte, or accuracy) on another split of the dataset."""
        return self._scored(split, self.dataset.split(split), max_tokens or self.eval_tokens)

    def _scored(self, name: str, part: PretrainingDataset, max_tokens: int | None) -> dict[str, Any]:
        return {"split": name, **evaluate(self.model, part, max_tokens).as_metrics(self.objective.measure)}

    def _evaluate_all(self, metrics: MetricsLog, watch: Watch, watchdog: Watchdog) -> None:
        """The validation split of every folder; with the first what the batches held and where they came from."""
        seen = {"realised": self.audit.shares, "sources": self.dataset.progress(self.cursor)}  # type: ignore[arg-type]
        for folder, part in self.dataset.parts("validation").items():
            found = self._scored(f"validation of {folder}" if folder else "validation", part, self.eval_tokens)
            metrics.write({"step": self.step, "tokens": self.tokens, **found, **seen})
            watch.say(f"step {self.step:,} of {self.max_steps:,}: {told(found)}")
            watchdog.beat(f"the evaluation after step {self.step}")
            seen = {}

    def save(self) -> Path:
        """Write a checkpoint of this step now (collective)."""
        if self.output is None:
            raise ValueError("this trainer has no output folder: give PreTrainer(output=...)")
        facts = {
            "model": self.shape.model_dump(),
            "objective": self.objective.name,
            "objective_fields": repr(self.objective),
            "first_loss": self._first_loss,
            "data": self.dataset.digest,
            "tokenizer": self.dataset.tokenizer.digest,
            "cursor": list(self.cursor),
            "tokens": self.tokens,
            "consumed": dict(sorted(self.consumed.items())),
            "layout": str(self.plan),
            "world": self.mesh.world,
            "seed": self.seed,
            "origin": self.origin,
        }
        return checkpoint.save(self.output / "checkpoints", self.model, self.step, facts, self.keep)

    def _one_step(self, loader: Loader, metrics: MetricsLog, watch: Watch) -> StepResult:
        began = time.perf_counter()
        batches, cursor, consumed = next(loader)
        lr = self.optimizer.rate(self.step + 1, self.max_steps)
        result = self.model.step(batches, self.step + 1, lr)
        self.step, self.cursor, self.consumed = self.step + 1, cursor, self.consumed + consumed
        self.tokens += result.tokens
        seconds = time.perf_counter() - began
        watch.step(self.step, result.loss, result.tokens / seconds)
        if self.step % self.log_every == 0 or self.step == self.max_steps or not result.finite:
            self._log(result, Step(batches, cursor, consumed), lr, seconds, metrics, watch)
        self._judge(result, watch)
        self._compare()
        return result

    def _compare(self) -> None:
        """Whether ranks still hold their copies alike: after the first step here and every so many."""
        if self.check_every and self.mesh.world > 1 and (not self._checked or self.step % self.check_every == 0):
            agreement.check(self.model, self.step)
            self._checked = True

    def _log(self, result: StepResult, step: Step, lr: float, seconds: float, metrics: MetricsLog, watch: Watch) -> None:
        """A line of metrics, and a look at what the batches hold."""
        if self.mesh.rank > 0:
            return
        metrics.write(self._line(result, step.batches, lr, seconds))
        self.audit.add(step.batches, step.consumed)
        for surprise in self.audit.surprises():
            watch.say(surprise)

    def _judge(self, result: StepResult, watch: Watch) -> None:
        """Stops at what is not a number; says once when the loss has gone far above where it began."""
        if not result.finite:
            raise DivergedError(
                f"diverged at step {self.step}: loss {result.loss:.6g}, gradient norm {result.grad_norm or math.nan:.6g}. "
                "Nothing was saved after it; go on from the last checkpoint, or start anew where there is none, with a lower "
                "optimizer.lr or a tighter optimizer.clip"
            )
        self._first_loss = self._first_loss or result.loss
        if result.loss > FAR * self._first_loss and not self.diverging:
            self.diverging = True
            watch.say(
                f"warning: the loss of step {self.step:,} is {result.loss:.4g}, it began with {self._first_loss:.4g}: the run "
                "is diverging; stop it and lower optimizer.lr or raise optimizer.warmup_steps"
            )

    def _line(self, result: StepResult, batches: list[Batch], lr: float, seconds: float) -> dict[str, Any]:
        heads = {name: result.sums[name] / total for name, total in result.totals.items() if total}
        line = {
            "step": self.step,
            "loss": result.loss,
            **heads,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "target_tokens": sum(result.totals.values()),
            "tokens": self.tokens,
            "tokens_per_second": round(result.tokens / seconds, 1),
            "skipped_steps": result.skipped,
        }
        here = step_flops(self.shape, self.objective, batches)
        share = mfu(here, seconds, self.plan.tensor * self.plan.pipeline)
        line["flops"] = here * self.mesh.data_size
        return line if share is None else {**line, "mfu": share}

    def _open(self, output: Path, init: str | Path | None) -> None:
        """Take over the output folder: continue from its newest sound checkpoint, or start it, with other weights if asked."""
        if refused := self.mesh.agree(self._take(output) if self.mesh.rank == 0 else None):
            raise refused
        found = checkpoint.newest(output / "checkpoints", self.mesh)
        if found:
            self._resume(checkpoint.Snapshot(found))
        elif init:
            self._begin_from(Path(init))
        if failed := self.mesh.agree(self._write_down(output) if self.mesh.rank == 0 else ""):
            raise OSError(failed)

    def _take(self, output: Path) -> OSError | None:
        """Keep other jobs out of the output folder; returns why it cannot be had."""
        try:
            output.mkdir(parents=True, exist_ok=True)
            self._held = hold(output / "lock")
        except BusyError as error:
            return BusyError(f"{error}: wait for it, or choose another output")
        except OSError as error:
            return OSError(f"output {output} cannot be written: {error}")
        return None

    def _write_down(self, output: Path) -> str:
        """run.yaml and the DeepSpeed settings as they run; returns what went wrong."""
        try:
            if (output / "stop").exists():
                return f"{output / 'stop'} is there to keep this run from training: remove it to go on"
            if self.facts:
                facts = {**self.facts, "model": self.shape.model_dump(mode="json")}
                self._keep_old(output / "run.yaml", facts)
                (output / "run.yaml").write_text(yaml.safe_dump(facts, sort_keys=False), encoding="utf-8")
                (output / "deepspeed.json").write_text(json.dumps(self.deepspeed, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            return f"output {output} cannot be written: {error}"
        return ""

    def _keep_old(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Where a run goes on with other settings, these are said and the old ones stay as run-until-STEP.yaml."""
        was = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else facts
        if changed := differing(was, facts):
            path.rename(path.with_name(f"run-until-{self.step}.yaml"))
            self.changed = "\n".join(filter(None, [self.changed, f"other settings from here on: {changed}"]))

    def _begin_from(self, folder: Path) -> None:
        """Take the weights of another run or of an import, nothing else of it."""
        found = checkpoint.newest(folder / "checkpoints", self.mesh)
        if found is None:
            raise ValueError(f"init {folder} has no checkpoints: give the output folder of a run that was trained or imported")
        snapshot = checkpoint.Snapshot(found)
        fresh, left = checkpoint.adopt(snapshot, self.model)
        self.origin = snapshot.manifest.get("origin", {})
        told = [f"begins with the weights of {found}", *(["fresh: " + ", ".join(fresh)] if fresh else [])]
        self.changed = "; ".join([*told, *(["left behind: " + ", ".join(left)] if left else [])])

    def _resume(self, snapshot: checkpoint.Snapshot) -> None:
        m = snapshot.manifest
        if "imported" in m:
            raise ValueError(f"{snapshot.path} was imported: begin a run with init={self.output} and an output of its own")
        if (m["data"], m["objective"]) != (self.dataset.digest, self.objective.name):
            resized = f", or resize it again with --data {self.dataset.digest}" if "resized" in m["data"] else ""
            raise ValueError(
                f"{snapshot.path} was trained with {m['objective']} on data {m['data']}, this run has {self.objective.name} "
                f"on {self.dataset.digest} (text, seq_len, seed and split count): use another output{resized}"
            )
        if m["objective_fields"] != repr(self.objective):
            raise ValueError(
                f"{snapshot.path} was trained with {m['objective_fields']}, this run has {self.objective!r}: a run keeps its "
                "objective; use another output"
            )
        checkpoint.load(snapshot, self.model)
        self.origin = m.get("origin", {})
        self._first_loss = m["first_loss"]
        self.step, self.tokens = m["step"], m["tokens"]
        self.cursor = self.dataset.position(m["cursor"]) if m["cursor"] else self.dataset.first  # none after a resize
        self.consumed = Counter(m["consumed"])
