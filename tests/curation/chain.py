"""A chain of steps to be started and killed: chain.py JOBS SOURCE OUT.

SLOW: seconds that each part takes longer to read; then worker.pid is who read last, and host-NAME which hosts did.
"""

import os
import platform
import sys
import time
from pathlib import Path

from ds_pretrain.curation import reading
from ds_pretrain.curation.duplicates import exact, near
from ds_pretrain.curation.passages import passages
from ds_pretrain.curation.workers import workers

OUT = Path(sys.argv[3])
reading.PART = 1
plain = reading._read


def slowly(*arguments):
    plain(*arguments)
    beside = OUT.joinpath(f"worker.{os.getpid()}")
    beside.write_text(str(os.getpid()))
    beside.replace(OUT.joinpath("worker.pid"))
    OUT.joinpath(f"host-{platform.node()}").write_text(platform.node())
    time.sleep(float(os.environ.get("SLOW", 0)))


def main():
    if os.environ.get("SLOW"):
        reading._read = slowly
    OUT.mkdir(parents=True, exist_ok=True)
    with workers(int(sys.argv[1]), quiet=True) as team:
        if team:
            found = reading.read([sys.argv[2]], OUT / "read", team)
            found = exact(found, OUT / "exact", team)
            found = passages(found, OUT / "passages", team)
            near(found, OUT / "near", team)


if __name__ in ("__main__", "__mp_main__"):
    if os.environ.get("SLOW"):
        reading._read = slowly
    if __name__ == "__main__":
        main()
