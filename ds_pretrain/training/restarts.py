"""Whether a run that failed is worth another start, for the launchers that requeue jobs.

A node that dies, a full network or a killed rank are got over by starting again from the newest checkpoint. A failure that
comes back without a step more is not, nor one before the first step (mostly a mistake in the run file, unless a connection or a
disk failed), nor a divergence: these would burn an allocation for nothing. Launchers hide exit codes (torchrun's is always 1,
srun makes 143 of 75), so what happened is read from the output folder too. What failed is kept in OUTPUT/failures.jsonl. The
price: bad luck twice in a row without progress is taken for a lasting failure.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_pretrain.core.exits import BUSY, DIVERGED, FAILED, MISTAKE
from ds_pretrain.core.files import held, json_lines

LASTING = {MISTAKE: "a mistake in the run or its data", DIVERGED: "divergence"}
"""Exit codes that another start gives again."""
REPEATS = 2
"""Failures in a row without a step more that are taken for a lasting one."""


def why_not(output: Path, code: int, most: int, job: str = "", signalled: bool = False) -> str:
    """Why this run should not start again; nothing if it should. Notes the failure.

    code: what the job ended with. most: failures of this `job` that are got over; starts after a limit or a pre-emption are
    none. signalled: it was asked to stop before it failed, which says nothing of the steps that it did not get to.
    """
    if code == BUSY or held(output / "lock"):
        return "another job trains into it"
    steps, earlier = _lines(output / "metrics.jsonl"), _lines(output / "failures.jsonl")
    at = max([0, *(int(line["step"]) for line in steps), *_saved(output / "checkpoints")])
    told = {"time": time.strftime("%F %T"), "job": job, "code": code, "step": at, "signalled": signalled}
    if trouble := _note(output, told):
        return trouble
    if code in LASTING:
        return f"exit code {code} is {LASTING[code]}"
    if steps and not math.isfinite(float(steps[-1].get("loss", 0))):
        return f"its loss is {steps[-1]['loss']} after step {at}: {LASTING[DIVERGED]}"
    if not (at or signalled or code == FAILED):
        return "it failed before its first step: see its log"
    if (output / "stop").exists():
        return f"{output / 'stop'} keeps it from training"
    mine = sum(line.get("job", "") == job for line in earlier)
    if mine >= most:
        return f"it has failed {mine + 1} times, {most} are got over (DS_PRETRAIN_RESTARTS)"
    last = [int(line["step"]) for line in earlier if not line.get("signalled")][1 - REPEATS :]
    if not signalled and len(last) == REPEATS - 1 and at <= min(last):
        return f"it failed {REPEATS} times in a row, now after step {at}: read the log of the last start before another"
    return ""


def _note(output: Path, told: dict[str, Any]) -> str:
    """Append a failure to what a run knows of itself. Nodes that did not meet have made no folder for it, but without this line
    the next start would take its failure for the first. Returns why that cannot be."""
    try:
        if told["code"] == FAILED:
            output.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            with (output / "failures.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
    except OSError as error:
        return f"{output} cannot be written ({error.strerror})"
    return ""


def _saved(checkpoints: Path) -> Iterator[int]:
    """Steps of whole checkpoints: of a run that logs seldom they tell more."""
    return (int(found[1]) for path in checkpoints.glob("step-*") if (found := re.fullmatch(r"step-(\d+)", path.name)))


def _lines(path: Path) -> list[dict[str, Any]]:
    return list(json_lines(path, "step")) if path.is_file() else []
