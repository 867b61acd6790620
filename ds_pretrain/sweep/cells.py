"""Running the cells of a sweep: here, so many at a time, or each as a task of a SLURM array.

What a cell's folder holds says how far it is, so there is no list of cells to keep or to lose: a lock held by who trains it,
the run's own metrics and checkpoints, and `cell.json`, its settings and its end. A cell that has finished is never run again,
one that was stopped goes on from its checkpoint, one that failed waits until it is asked for. Each cell is a process of its
own, which lives on when the sweep is killed. The price: the imports of each, a few seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ValidationError

from ds_pretrain.config import RunConfig
from ds_pretrain.core.differing import differing
from ds_pretrain.core.exits import BUSY
from ds_pretrain.core.files import BusyError, held, whole
from ds_pretrain.runs import checkpoint_size, free_at, tokenizer_size
from ds_pretrain.sweep.spec import Cell, Spec

Status = Literal["waiting", "running", "stopped", "failed", "finished"]
POLL = 0.5
"""Seconds between two looks at the cells that run."""
TAIL = 1 << 14
"""Bytes at the end of a file of metrics in which its last line lies."""
LAUNCHER = Path(__file__).parents[2] / "launchers" / "sweep.sbatch"
STOPPED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT, BUSY}
"""Exit codes of cells that are no failures."""


class State(NamedTuple):
    """How far a cell is. loss: of the last step that was logged; reason: why it failed."""

    status: Status
    step: int
    loss: float | None
    reason: str


def state(cell: Cell) -> State:
    """Read a cell's folder. ValueError if it was begun with other settings."""
    ended, line = noted(cell.folder), last_line(cell.folder / "metrics.jsonl")
    step, loss = line.get("step", 0), float(line["loss"]) if "loss" in line else None  # NaN is written as text
    if held(cell.folder / "lock"):
        found = State("running", step, loss, "")
    elif ended.get("status", "stopped") != "stopped":
        found = State(ended["status"], step, loss, ended["reason"])
    else:
        found = State("stopped" if _trained(cell) else "waiting", step, loss, "")
    if found.status == "running" or _trained(cell):
        _agree(cell, ended)
    return found


def _trained(cell: Cell) -> bool:
    """Whether there is something of it that other settings would spoil: a step in its metrics, a checkpoint."""
    return bool(last_line(cell.folder / "metrics.jsonl")) or any((cell.folder / "checkpoints").glob("step-*"))


def _agree(cell: Cell, ended: Mapping[str, Any]) -> None:
    """ValueError if a cell was noted with settings, its run file's among them, that it does not have now."""
    if not ended:
        return
    try:
        before = RunConfig.model_validate(ended["settings"])  # which fills in fields that were not there then
    except ValidationError as error:
        raise ValueError(
            f"{cell.folder / 'cell.json'} is of another version of ds_pretrain ({error.error_count()} fields differ): "
            "remove this file, and the cell goes on from its checkpoint with the settings of now"
        ) from error
    if changed := differing(_settings(before), _settings(cell.config)):
        raise ValueError(
            f"{cell.folder} was run with other settings ({changed}): name what varies in the grid, choose another output, or "
            "remove it"
        )


def noted(folder: Path) -> dict[str, Any]:
    """What is known of a cell that was begun: its settings and how it ended (stopped, as long as it has not)."""
    path = folder / "cell.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _settings(config: RunConfig) -> dict[str, Any]:
    """What a cell may not change. The shape of a model that comes with weights is not the run's to say: rotary positions grow
    with its rows."""
    told = config.model_dump(mode="json", exclude={"output"})
    return told | {"model": told["model"] | {"positions": None}} if config.init else told


def last_line(path: Path) -> dict[str, Any]:
    """The last step in a run's metrics; empty before the first."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        for text in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError):
                line: dict[str, Any] = json.loads(text)
                if "split" not in line:  # of an evaluation
                    return line
    return {}


def note(cell: Cell, status: Status, reason: str = "") -> None:
    """Write down how a cell has ended; or that it begins ("stopped"), and with which settings."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    begun = noted(cell.folder).get("settings") if status != "stopped" else None
    told = {"status": status, "reason": reason, "settings": begun or cell.config.model_dump(mode="json", exclude={"output"})}
    _write(cell.folder, told)


def _write(folder: Path, told: Mapping[str, Any]) -> None:
    with whole(folder / "cell.json") as file:
        file.write(json.dumps(told, indent=1).encode())


def train(cell: Cell) -> str:
    """Train a cell in this process, or on the ranks of this job, and note how it ends; says what came of it."""
    from ds_pretrain.parallel.launch import place
    from ds_pretrain.runs import make_trainer, open_run
    from ds_pretrain.training.signals import InterruptedRun

    ended, here = noted(cell.folder), place()
    _agree(cell, ended)
    if ended.get("status") == "finished":
        return f"{cell.name} has finished before: nothing is done"
    if here.world != cell.ranks:
        raise ValueError(
            f"{cell.name} is a cell of {cell.ranks} ranks, this job has {here.world}: start it by `ds-pretrain sweep run` or "
            f"`submit` (where --nodes times --ntasks-per-node is {cell.ranks}), or say ranks: {here.world} in the sweep file"
        )
    first = here.rank == 0
    try:
        trainer = make_trainer(*open_run(cell.run, cell.overrides))
        if first:
            note(cell, "stopped")
        trainer.train()
    except (InterruptedRun, BusyError):
        raise
    except Exception as error:
        if first and not held(cell.folder / "lock"):
            note(cell, "failed", str(error) or type(error).__name__)
        raise
    if first:
        note(cell, "finished")
    return f"{cell.name} has finished: {cell.folder}"


def todo(spec: Spec, again: bool) -> list[Cell]:
    """The cells that there is something to do for. again: those that failed too."""
    wanted = {"waiting", "stopped", *(["failed"] if again else [])}
    return [cell for cell in spec.cells if state(cell).status in wanted]


def check_disk(cells: Sequence[Cell], at_once: int) -> None:
    """ValueError if the disk has no room for the checkpoints that these cells keep and those that so many write at once."""
    need, beside = 0, list[int]()
    for cell in cells:
        train, size = cell.config.train, checkpoint_size(cell.config, tokenizer_size(cell.config) or 0)
        saves = math.ceil(train.max_steps / train.save_every) if train.save_every else 1
        there = len(list((cell.folder / "checkpoints").glob("step-*")))
        need += size * max(0, min(train.keep, saves) - there)
        beside.append(size if saves > train.keep else 0)
    need += sum(heapq.nlargest(at_once, beside))
    if cells and need > (free := free_at(cells[0].folder)):
        raise ValueError(
            f"{cells[0].folder.parent} is on a disk with {free / 1e9:,.1f} GB free, the checkpoints of {len(cells)} cells will "
            f"take {need / 1e9:,.1f} GB more: choose another output, or lower train.keep"
        )


def run(spec: str, cells: Iterable[Cell], at_once: int, show: Callable[[], None]) -> None:
    """Train cells as processes of this machine, so many at a time. show: called twice a second.

    A signal stops the cells that run, each with a checkpoint.
    """
    waiting, running = deque((cell, state(cell).status) for cell in cells), dict[int, tuple[Cell, subprocess.Popen[bytes]]]()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for slot in range(at_once):
                while slot not in running and waiting:
                    cell, was = waiting.popleft()
                    if state(cell).status in (was, "waiting", "stopped"):  # else another sweep has had it meanwhile
                        running[slot] = cell, _start(spec, cell, slot, at_once)
            time.sleep(POLL)
            for slot, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    _settle(cell, process.returncode)
            show()
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, previous)


def _start(spec: str, cell: Cell, slot: int, at_once: int) -> subprocess.Popen[bytes]:
    """A cell as a process of its own session: a Ctrl-C is for the sweep, which passes it on once."""
    command = ["-m", "ds_pretrain", "sweep", "cell", spec, cell.name]
    if cell.ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cell.ranks}", *command]
    note(cell, "stopped")
    with (cell.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **_share(cell.ranks, slot, at_once)},
            start_new_session=True,
        )


def crowded(ranks: int, at_once: int) -> str:
    """What to know of cells that would share GPUs; nothing where each has its own, or there are none."""
    import torch

    devices = torch.cuda.device_count()
    if not 0 < devices < ranks * at_once:
        return ""
    fix = f"--at-once {devices // ranks} gives each its own" if ranks <= devices else f"lower the sweep's ranks to {devices}"
    return f"{at_once} cells of {ranks} ranks share {devices} GPUs: {fix}"


def _share(ranks: int, slot: int, at_once: int) -> dict[str, str]:
    """A cell's part of the machine: its GPUs, or its share of the cores."""
    import torch

    if devices := torch.cuda.device_count():
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = names if len(names) == devices else list(map(str, range(devices)))
        mine = [names[(slot * ranks + rank) % devices] for rank in range(ranks)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(mine))}
    threads = max(1, len(os.sched_getaffinity(0)) // (at_once * ranks))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def _settle(cell: Cell, code: int) -> None:
    """Note the end of a process that could not do so itself."""
    if code and code not in STOPPED and noted(cell.folder)["status"] == "stopped" and not held(cell.folder / "lock"):
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        note(cell, "failed", f"{how} after step {state(cell).step}: {_last_words(cell)}")


def _last_words(cell: Cell) -> str:
    lines = (cell.folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


def submit(spec: Spec, cells: Sequence[Cell], at_once: int, options: Sequence[str]) -> str:
    """Submit cells as a SLURM array of tasks, so many at a time; what sbatch answers.

    The tasks read a copy of the sweep file, its base included, so that an edit of either changes no cell that waits; one whose
    run file was edited meanwhile refuses to train.
    """
    if not Path("launchers/env.sh").is_file():
        raise ValueError(
            f"the tasks of an array start in this folder, which has no launchers: submit from {LAUNCHER.parents[1]}"
        )
    check_disk(cells, at_once)
    text = yaml.safe_dump(spec.model_dump(exclude={"base"}), sort_keys=False).encode()
    kept = spec.folder / f"sweep-{hashlib.sha256(text).hexdigest()[:8]}.yaml"
    (spec.folder / "slurm").mkdir(parents=True, exist_ok=True)
    with whole(kept) as file:
        file.write(text)
    numbers = ",".join(str(spec.cells.index(cell)) for cell in cells)
    command = [
        "sbatch",
        f"--array={numbers}%{at_once}",
        f"--output={spec.folder}/slurm/%A_%a.out",
        f"--ntasks-per-node={spec.ranks}",
    ]
    with _begun(cells):
        try:
            ran = subprocess.run([*command, *options, str(LAUNCHER), str(kept)], capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError("there is no sbatch here: submit from a SLURM cluster, or use ds-pretrain sweep run") from None
        if ran.returncode:
            raise ValueError(f"sbatch refuses the array: {ran.stderr.strip()}")
    return ran.stdout.strip()


@contextlib.contextmanager
def _begun(cells: Sequence[Cell]) -> Iterator[None]:
    """Note that cells begin; if that fails, what was known of them before."""
    before = {cell.folder: noted(cell.folder) for cell in cells}
    for cell in cells:
        note(cell, "stopped")
    try:
        yield
    except BaseException:
        for folder, told in before.items():
            _write(folder, told) if told else (folder / "cell.json").unlink()
        raise
