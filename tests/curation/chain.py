"""A chain of steps to be started and killed: chain.py JOBS SOURCE OUT.

SLOW: seconds that each unit of the work STAGE takes longer ("read: read" if not given); then worker.pid is who did the last of
them, and host-NAME which hosts did any.
"""

import os
import platform
import sys
import time
from functools import partial
from pathlib import Path

from ds_pretrain.curation import duplicates, reading
from ds_pretrain.curation.duplicates import exact, near
from ds_pretrain.curation.passages import passages
from ds_pretrain.curation.prepare import prepare
from ds_pretrain.curation.workers import Workers, workers
from ds_pretrain.data import sources

OUT = Path(sys.argv[3])
OUT.mkdir(parents=True, exist_ok=True)
os.chdir(OUT)  # so that the last step's sources have the same names everywhere: they are in its manifest
sources.UNIT, reading.PART, duplicates.AT_ONCE = 1, 10_000, 2_000
plain = Workers.map


def slowly(work, unit):
    done = work(unit)
    beside = OUT.joinpath(f"worker.{os.getpid()}")
    beside.write_text(str(os.getpid()))
    beside.replace(OUT.joinpath("worker.pid"))
    OUT.joinpath(f"host-{platform.node()}").write_text(platform.node())
    time.sleep(float(os.environ["SLOW"]))
    return done


def slow_map(self, what, work, units):
    return plain(self, what, partial(slowly, work) if what == os.environ.get("STAGE", "read: read") else work, units)


def main():
    if os.environ.get("SLOW"):
        Workers.map = slow_map
    with workers(int(sys.argv[1]), quiet=True) as team:
        if team:
            found = reading.read([sys.argv[2]], OUT / "read", team)
            found = exact(found, OUT / "exact", team)
            found = passages(found, OUT / "passages", team)
            near(found, OUT / "near", team)
            prepare("near/kept", "data", vocab_size=600, split=(0.8, 0.1, 0.1), workers=team, quiet=True)


if __name__ == "__main__":
    main()
