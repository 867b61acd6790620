"""What a run says about itself: one JSON object per line, and a progress bar for whoever watches.

Only rank 0 writes. A line is flushed whole; a reader skips a last line that a kill cut short.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ds_pretrain.core.batch import Batch
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives.base import Objective

log = logging.getLogger(__name__)

SAY_EVERY = 30.0
"""Seconds between two lines of a log."""
PEAK_FLOPS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}
"""Dense bf16 peak by device name, FLOP/s (NVIDIA data sheets)."""


class MetricsLog:
    """Appends to `metrics.jsonl`; without a path (on other ranks) it does nothing.

    step: where the run stands. Lines of later steps, which a run wrote before it fell back to this one, and a last line that
    a kill cut short are dropped: every step has one line.
    """

    def __init__(self, path: Path | None, step: int = 0) -> None:
        if path and path.exists():
            _cut(path, step)
        self._file = path.open("a", encoding="utf-8") if path else None
        self._told = False

    def write(self, values: Mapping[str, Any]) -> None:
        if self._file:
            with self._patience():
                self._file.write(json.dumps({k: _plain(v) for k, v in values.items()}) + "\n")
                self._file.flush()

    def close(self) -> None:
        if self._file:
            with self._patience():
                self._file.close()

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """A full disk costs no run: it is told once, and what the file did not take is tried again with the next line."""
        try:
            yield
        except OSError as error:
            if not self._told:
                log.warning("metrics are not being written (%s): make room; the run goes on", error)
            self._told = True


class Watch:
    """What whoever watches sees on rank 0: a bar, and lines beside it; a line every half minute where nobody sees a bar."""

    def __init__(self, name: str, step: int, total: int, shown: bool) -> None:
        self.shown = shown
        terminal = Console(stderr=False)
        self.bar = shown and terminal.is_terminal and not terminal.is_dumb_terminal
        self.console = terminal if self.bar else Console(width=200)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(TextColumn("{task.description}"), *columns, console=self.console, disable=not self.bar)
        self._task = self._bar.add_task(name, total=total, completed=step, loss="")
        self._total, self._said = total, time.monotonic()

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        if self.shown:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def step(self, step: int, loss: float, rate: float) -> None:
        self._bar.update(self._task, completed=step, loss=f"loss {loss:.4f}")
        if not self.bar and time.monotonic() - self._said > SAY_EVERY:
            self._said = time.monotonic()
            self.say(f"step {step:,} of {self._total:,}: loss {loss:.4f}, {rate:,.0f} tokens/s")


def told(found: Mapping[str, Any]) -> str:
    """An evaluation in one line."""
    shown = {"loss": ".4f", "perplexity": ",.2f", "bits_per_byte": ".4f", "bits_per_byte_bound": ".4f", "accuracy": ".2%"}
    figures = ", ".join(f"{key.replace('_', ' ')} {found[key]:{form}}" for key, form in shown.items() if key in found)
    return f"{found['split']} {figures}"


def packed(fit: Mapping[str, float]) -> str:
    """How a source's documents fill rows, in one line."""
    lost = f"{fit['too_short']:,} are too short and left out ({fit['lost_tokens']:,} tokens)" if fit["too_short"] else ""
    told = [f"{fit['documents']:,} documents", f"{fit['cut']:,} are longer than a row and cut", lost]
    return ", ".join(filter(None, [*told, f"{fit['waste']:.2%} of the positions stay empty"]))


def _cut(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if kept != lines:
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(path)


def _step_of(line: str) -> float:
    """The step of a line; infinite for what is no such line, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is not finite is written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def real_tokens(batches: Sequence[Batch]) -> int:
    """Positions that are not padding."""
    return sum(int((batch.attention.segment != 0).sum()) for batch in batches)


def attended_pairs(batches: Sequence[Batch]) -> float:
    """(query, key) pairs that the masks let through: sums over documents, not over rows."""
    return float(sum(_pairs(batch) for batch in batches))


def _pairs(batch: Batch) -> int:
    real = batch.attention.segment != 0
    position = batch.attention.offset()[real]
    if batch.attention.kind == "causal":
        return int((position + 1).sum())
    if batch.attention.kind == "full":  # sum over a document of (2 p + 1) is its length squared
        return int((2 * position + 1).sum())
    index = torch.arange(batch.inputs.shape[1], device=real.device).expand_as(real)[real]
    return int((batch.attention.horizon[real] - (index - position) + 1).sum())


def step_flops(model: ModelConfig, objective: Objective, batches: Sequence[Batch]) -> float:
    """Model FLOPs of training on these batches, a generator's included.

    Counted are the pairs that the masks let through and the positions that are scored, not the whole square and rows.
    """
    return counted_flops(model, objective, *counts(objective, batches))


def counts(objective: Objective, batches: Sequence[Batch]) -> tuple[float, int, int]:
    """Pairs that are attended, positions that are not padding, positions at which words are predicted."""
    words = [head.name for head in objective.heads if head.classes is None]
    scored = sum(int((batch.targets[name].weights != 0).sum()) for batch in batches for name in words)
    return attended_pairs(batches), real_tokens(batches), scored


def counted_flops(model: ModelConfig, objective: Objective, attended: float, tokens: float, scored: float) -> float:
    """Model FLOPs of training on so much."""
    if objective.generator is None:
        return model.flops(attended, tokens, scored)
    small = model.narrower(objective.generator[1])
    return model.flops(attended, tokens, 0) + small.flops(attended, tokens, scored, model.hidden)


def mfu(flops: float, seconds: float, devices: int) -> float | None:
    """Model FLOP utilisation of `devices` that took so long; None where the device's peak is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    return None if peak is None else flops / seconds / (peak * devices)
