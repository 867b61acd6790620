"""Files that are whole or not there, after a kill and after a power failure too, and files that one process holds."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

log = logging.getLogger(__name__)
Read = TypeVar("Read", dict[str, Any], list[Any])


def beside(path: Path) -> Path:
    """Where this process writes a file before it takes its name; ends in .tmp."""
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes its name once it is on the disk; if the block fails, nothing stays."""
    try:
        with beside(path).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside(path).replace(path)
    finally:
        beside(path).unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Put a file on the disk, or what was renamed in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends. ValueError if something is there already."""
    folder = folder.resolve()  # a link to an empty folder stays a link
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: give the name of a folder that is not there yet, or empty it")
    attempt = beside(folder)
    attempt.mkdir(parents=True)
    try:
        yield attempt
        for path in (*attempt.rglob("*"), attempt):
            sync(path)
        if folder.exists():
            folder.rmdir()
        attempt.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(attempt, ignore_errors=True)
        raise


def read_json(path: Path, otherwise: Read) -> Read:
    """The mapping or list in a file of JSON, or `otherwise`, which is of its kind, where there is no file. ValueError with its
    name if it holds something else."""
    if not path.exists():
        return otherwise
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from None
    if not isinstance(found, type(otherwise)):
        raise ValueError(f"{path} holds no {'mapping' if isinstance(otherwise, dict) else 'list'}: copy it again")
    return found


def json_lines(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines that have this key; lines that a kill cut short are passed over."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and key in line:
                    yield line


class BusyError(OSError):
    """What another process holds."""


def hold(path: Path) -> IO[str] | None:
    """Hold a file until it is closed or this process ends, however it ends; BusyError naming who else holds it.

    A lock of POSIX, which shared file systems know too (NFS 4, Lustre mounted with flock); None where they do not.
    """
    file = path.open("a+", encoding="utf-8")
    for last in (False, False, True):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError) as error:
            if last:
                raise BusyError(f"{path.parent} is in use by {path.read_text(encoding='utf-8').strip()}") from error
            time.sleep(0.2)  # `held` may have been looking
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): nothing keeps two jobs from training into %s at once", path, error, path.parent
            )
            return None
    file.truncate(0)
    job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    file.write(f"process {os.getpid()} on {platform.node()}{job}, since {time.strftime('%F %T')}\n")
    file.flush()
    return file


def held(path: Path) -> bool:
    """Whether another process holds a file. Not for a file that this one holds: looking would let it go."""
    try:
        file = path.open("r", encoding="utf-8")
    except OSError:
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return False
    return False


def text_lines(path: str | Path) -> list[str]:
    """The lines of a file as editors count them: Unicode knows more ends of lines than \\n, and texts have them inside."""
    with Path(path).open(encoding="utf-8") as file:
        return [line.removesuffix("\n") for line in file]
