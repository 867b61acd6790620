"""A folder in the making: one maker at a time, taken up again where it was left, under its own name only when it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_pretrain.core.differing import differing
from ds_pretrain.core.files import sync, whole

LOCK, REQUEST = "lock", "request.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk."""


@contextmanager
def unfinished(out: Path, request: Mapping[str, Any]) -> Iterator[Path]:
    """OUT.unfinished as far as this request got before; takes its name when the block ends well.

    What lies in its `work` folder goes then. ValueError if it was begun by another request, or is being made by someone else;
    where the block finds a mistake before anything was made, nothing stays.
    """
    building = out.with_name(out.name + ".unfinished")
    building.mkdir(parents=True, exist_ok=True)
    with _alone(building):
        _begin(building, request)
        try:
            yield building
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise OSError(error.errno, _no_room(building, error.errno)) from error
        except KeyboardInterrupt:
            print(f"stopped in {building}: the same command goes on from there", file=sys.stderr)
            raise
        except ValueError:
            if not any(path.is_file() for path in building.rglob("*") if path.name not in (LOCK, REQUEST)):
                shutil.rmtree(building)
            raise
        _finish(building, out)


def otherwise(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What was asked for differently; of another version of this program only which."""
    if was.get("version") != now.get("version"):
        return f"by version {was.get('version')} of these tools, which are version {now.get('version')} now"
    return differing(was, now)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file that is whole or not there."""
    path.parent.mkdir(exist_ok=True)
    with whole(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _no_room(building: Path, code: int) -> str:
    return (
        f"{os.strerror(code)}: stopped in {building}, whose disk has {shutil.disk_usage(building).free:,} bytes left. "
        "Make room there and run the same command again: what is finished is kept"
    )


def _begin(building: Path, request: Mapping[str, Any]) -> None:
    (building / "work").mkdir(exist_ok=True)
    mark, request = building / REQUEST, json.loads(json.dumps(request))
    if mark.exists() and (was := json.loads(mark.read_bytes())) != request:
        raise ValueError(
            f"{building} was begun by other means ({otherwise(was, request)}): ask for the same again, or remove it"
        )
    if not mark.exists():
        write_json(mark, request)


def _finish(building: Path, out: Path) -> None:
    """The request stays beside what it made until that has its name, so that nothing else takes it for its own."""
    shutil.rmtree(building / "work", ignore_errors=True)
    for left in building.rglob("*.tmp"):  # by a worker that was killed
        left.unlink()
    for folder in [building, *(path for path in building.rglob("*") if path.is_dir())]:
        sync(folder)
    building.rename(out)
    sync(out.parent)
    for name in (REQUEST, LOCK):
        (out / name).unlink()


@contextmanager
def _alone(building: Path) -> Iterator[None]:
    """ValueError if another process works here; its lock ends with it, however it ends."""
    with (building / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {building}: wait for it") from None
        except OSError as error:
            raise ValueError(f"{building} lies on a file system without locks ({error.strerror}): choose another") from None
        yield
