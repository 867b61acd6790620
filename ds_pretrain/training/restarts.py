"""Whether a run that failed is worth another start, for the launchers that requeue jobs.

A node that dies, a full network or a killed rank are got over by starting again from the newest checkpoint. A failure that
comes back at the same step is not, nor one before the first step (mostly a mistake in the run file; srun hides its exit code),
nor a divergence: these would burn an allocation for nothing. What failed is kept in OUTPUT/failures.jsonl. The price: bad luck
twice at one step is taken for a lasting failure.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from ds_pretrain.core.exits import BUSY, DIVERGED, MISTAKE
from ds_pretrain.core.files import json_lines

LASTING = {MISTAKE: "a mistake in the run or its data", DIVERGED: "divergence"}
"""Exit codes that another start gives again."""
REPEATS = 2
"""Failures in a row at one step that are taken for a lasting one."""


def why_not(output: Path, code: int, most: int) -> str:
    """Why this run should not start again; nothing if it should. Notes the failure.

    code: what the job ended with. most: failures that are got over; starts after a limit or a pre-emption are none.
    """
    if code == BUSY:
        return "another job trains into it"
    at, earlier = reached(output), failures(output)
    if output.is_dir():
        with (output / "failures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.strftime("%F %T"), "code": code, "step": at}) + "\n")
    if code in LASTING:
        return f"exit code {code} is {LASTING[code]}"
    if not at:
        return "it failed before its first step: see its log"
    if (output / "stop").exists():
        return f"{output / 'stop'} keeps it from training"
    if len(earlier) >= most:
        return f"it has failed {len(earlier) + 1} times, {most} are got over (DS_PRETRAIN_RESTARTS)"
    if len(earlier) >= REPEATS - 1 and all(step == at for step in earlier[1 - REPEATS :]):
        return f"it failed {REPEATS} times in a row after step {at}: read the log of the last start before another"
    return ""


def reached(output: Path) -> int:
    """The last step that a run logged; 0 before the first."""
    return max(_steps(output / "metrics.jsonl"), default=0)


def _steps(path: Path) -> list[int]:
    return [int(line["step"]) for line in json_lines(path, "step")] if path.is_file() else []


def failures(output: Path) -> list[int]:
    """The steps after which earlier starts failed."""
    return _steps(output / "failures.jsonl")
