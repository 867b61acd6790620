"""Scaling over links of known speed, measured beside what `plan` predicts: two hosts in network namespaces of this machine
(root, and what tests/cluster/install.sh installs).

    ds-pretrain prepare embedded -o data/embedded
    python benchmarks/slow_links.py quickstart model.hidden=128 batch.seq_len=128 deepspeed.config=zero1_fp32

One rank with one thread on each host, so that ranks never wait for a core. The share of the products' speed that a step reaches
is measured on one rank without links; the speed of a link and its latency by an all-reduce on the very link, as
`bench scaling` does on a cluster.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from hosts import Hosts, missing  # noqa: E402

from ds_pretrain.planning.points import calibrated, read  # noqa: E402
from ds_pretrain.planning.traffic import GLOO, predicted  # noqa: E402

NAMES = ("host1", "host2")
MEET = {"MASTER_ADDR": "10.77.0.1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}


def main(
    run: Annotated[str, typer.Argument(help="A run file, by path or name.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields of it.")] = None,
    layouts: Annotated[str, typer.Option(help="Of two ranks.")] = "DP2,TP2,PP2",
    mbit: Annotated[str, typer.Option(help="Speeds; 0 is as fast as this machine.")] = "0,300,100",
    steps: Annotated[int, typer.Option(help="Steps of each that count.")] = 10,
) -> None:
    """Measure, predict, print."""
    if why := missing():
        sys.exit(f"slow_links.py needs hosts: {why}")
    folder = Path(tempfile.mkdtemp(prefix="links-"))
    command = [sys.executable, "-m", "ds_pretrain", "bench", "scaling", run, *(overrides or []), "--steps", str(steps)]
    alone = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([*command, "--layouts", "1", "--out", folder / "alone.json"], check=True, env=alone, cwd=ROOT)
    with Hosts(*NAMES) as hosts:
        for port, rate in enumerate(map(float, mbit.split(",")), start=29600):
            shutil.copy(folder / "alone.json", folder / f"{rate:g}.json")
            for name in NAMES if rate else ():
                hosts.limit(name, rate)
            over = [*command, "--layouts", layouts, "--out", folder / f"{rate:g}.json"]
            meet = {**MEET, "MASTER_PORT": str(port)}
            ranks = [hosts.start(name, over, RANK=str(rank), **meet) for rank, name in enumerate(NAMES)]
            if failed := [rank.communicate()[0] for rank in ranks if rank.wait()]:
                sys.exit(f"at {rate:g} Mbit/s:\n{failed[0]}")
            Console(width=128).print(table(folder / f"{rate:g}.json", rate))


def table(path: Path, rate: float) -> Table:
    """Points beside their predictions."""
    heads = ("layout", "s/step", "predicted", "off by", "sent MB", "predicted", "link MB/s")
    shown = Table(*heads, title=f"{rate:g} Mbit/s" if rate else "no limit", title_justify="left")
    points = read(path)
    share = calibrated(points)
    for point in points:
        expected = point.expected_seconds(share)
        sent = max(predicted(point.config, point.model, point.world).sent(GLOO))
        seconds = (f"{point.seconds:.3f}", f"{expected:.3f}", f"{expected / point.seconds - 1:+.0%}")
        shown.add_row(
            point.layout, *seconds, f"{max(point.sent) / 1e6:.3f}", f"{sent / 1e6:.3f}", f"{point.pace.link / 1e6:.1f}"
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
