"""A sweep as a SLURM array on the two hosts of a cluster on this machine (root, and what tests/cluster/install.sh installs),
beside the same sweep trained here: both must come out alike.

    ds-pretrain sweep run sizes --at-once 2
    python benchmarks/sweep_array.py sizes

The array has an output of its own, NAME_array, goes on where an earlier one was stopped, and stays there to be fitted. The exit
code is 1 if a cell is missing or its loss is apart by more than `APART`.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from slurm import OVER, Slurm, missing  # noqa: E402

from ds_pretrain.sweep import results, spec  # noqa: E402

APART = 1e-5
LOOK = 10
"""Seconds between two looks at the queue: the cells train on the same cores."""


def main(
    sweep: Annotated[str, typer.Argument(help="A sweep whose cells are trained.")] = "sizes",
    at_once: Annotated[int, typer.Option(help="Cells at a time.")] = 2,
    hours: Annotated[float, typer.Option(help="Until the array is given up.")] = 3,
) -> None:
    """Submit, wait, compare."""
    if why := missing():
        sys.exit(f"sweep_array.py needs a cluster: {why}")
    here = spec.read(sweep)
    name = f"{here.output}_array"
    os.chdir(ROOT)
    path = Path(f"{name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(here.model_dump(exclude={"base"}) | {"output": name}))
    with Slurm() as cluster:
        command = [sys.executable, "-m", "ds_pretrain", "sweep", "submit", path, "--at-once", str(at_once), "--"]
        options = ["--time=60", "--parsable", f"--output={name}-%a.out"]
        env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        ran = cluster.run("head", [*command, *options], **env)
        if number := re.search(r"cells: (\d+)", ran.stdout):
            left = ["squeue", "-h", "-j", number[1], "-t", "all", "-o", "%T"]
            ends = f"array {number[1]} does not end"
            cluster.wait(lambda: {*cluster.client(*left).split()} <= OVER, 3600 * hours, ends, every=LOOK)
        elif "nothing to submit" not in ran.stdout:
            sys.exit(f"the array was not submitted: {ran.stdout}{ran.stderr}")
    there = spec.read(str(path))
    Console().print(results.summary(results.states(there)))
    compare(here, there)


def compare(here: spec.Spec, there: spec.Spec) -> None:
    """Print how far the last validation losses are apart; the process ends if that is too far."""
    one, other = ({row["run"]: row.get("loss") for row in results.rows(each)} for each in (here, there))
    both = [run for run in one if one[run] and other.get(run)]
    apart = max((abs(one[run] / other[run] - 1) for run in both), default=float("nan"))
    print(f"{len(both)} of {len(one)} cells finished in both; validation losses at most {apart:.1e} apart")
    if len(both) < len(one) or apart > APART:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
