"""Ends of a run that nobody waits for: a hang, a request, a limit; and whether a failure is worth another start."""

import json
import os
import subprocess
import sys
import time

import pytest

from ds_pretrain.core.exits import BUSY, FAILED, HUNG
from ds_pretrain.training import restarts, signals
from ds_pretrain.training.restarts import why_not
from ds_pretrain.training.signals import InterruptedRun, StopRequest

HANGING = """
import sys, time, threading
from pathlib import Path
from ds_pretrain.training import watchdog
watchdog.GRACE = 0.2
def stuck_here():
    time.sleep(60)
with watchdog.Watchdog(0.5, 3, Path(sys.argv[1])) as dog:
    for step in range(4):
        time.sleep(0.2)
        dog.beat(f"step {step}")
    stuck_here()
"""


def test_a_rank_that_hangs_ends_with_its_stacks(tmp_path):
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", HANGING, tmp_path / "stacks"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == HUNG and time.monotonic() - began < 30
    for told in (ran.stderr, (tmp_path / "stacks" / "rank-3.txt").read_text()):
        assert "rank 3 on" in told and "since step 3" in told and "stuck_here" in told


STARTING = """
import sys, time
from ds_pretrain import runs
from ds_pretrain.training import watchdog
watchdog.GRACE = 0.2
runs.preflight = lambda output: time.sleep(60)
runs.make_trainer(*runs.open_run(sys.argv[1], sys.argv[2:]))
"""


def test_a_start_that_hangs_ends_too(tmp_path, data):
    run = ["quickstart", f"data.path={data}", f"output={tmp_path}", "train.watchdog_seconds=0.5"]
    ran = subprocess.run([sys.executable, "-c", STARTING, *run], capture_output=True, text=True, timeout=90)
    assert ran.returncode == HUNG and "has not moved for 0.5 s since the start" in ran.stderr, ran.stderr
    assert "rank 0 on" in (tmp_path / "stacks" / "rank-0.txt").read_text()


@pytest.fixture
def ctrl_c():
    """As in a terminal: what a script starts in the background has SIGINT ignored."""
    before = signals.signal.signal(signals.signal.SIGINT, signals.signal.default_int_handler)
    yield
    signals.signal.signal(signals.signal.SIGINT, before)


def test_a_file_and_a_limit_stop_too(tmp_path, ctrl_c):
    with StopRequest(tmp_path / "stop", minutes=0.002) as stop:
        assert stop.reason == 0
        (tmp_path / "stop").touch()
        assert stop.reason == signals.FILE
        (tmp_path / "stop").unlink()
        time.sleep(0.15)
        assert stop.reason == signals.TIME
    with StopRequest() as stop:
        for _ in range(2):  # by hand, and again by the cluster while the run saves
            os.kill(os.getpid(), signals.signal.SIGUSR1)
        assert stop.reason == signals.signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signals.signal.SIGINT)
            time.sleep(1)
    assert signals.signal.getsignal(signals.signal.SIGUSR1) == signals.signal.SIG_DFL


@pytest.mark.parametrize("reason, code", [(2, 130), (15, 143), (10, 0), (signals.FILE, 0), (signals.TIME, 0)])
def test_an_end_in_good_order_is_no_failure(reason, code):
    assert InterruptedRun(reason, "stopped").exit_code == code


@pytest.mark.parametrize("reason, code", [(15, 143), (10, 138), (signals.TIME, 0)])
def test_a_signal_to_a_run_that_keeps_nothing_is_a_failure(reason, code):
    """Which a batch script does not requeue."""
    assert InterruptedRun(reason, "stopped", kept=False).exit_code == code


def test_saved_steps_and_signals_count_for_another_start(tmp_path):
    assert "before its first step" in why_not(tmp_path, 1, 50)
    (tmp_path / "checkpoints" / "step-50").mkdir(parents=True)  # of a run that logs every 100 steps
    (tmp_path / "checkpoints" / "step-90.tmp").mkdir()
    assert why_not(tmp_path, 1, 50) == ""
    assert [why_not(tmp_path, 1, 50, signalled=True) for _ in range(2)] == ["", ""]
    assert "2 times in a row, now after step 50" in why_not(tmp_path, 1, 50)
    assert "it has failed 6 times" in why_not(tmp_path, 1, 4, signalled=True)


def test_what_is_worth_another_start(tmp_path, monkeypatch):
    def failed(step, code=1, most=50, loss=1.0, **more):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": step, "lr": 1, "loss": loss}) + "\n")
        return why_not(tmp_path, code, most, **more)

    assert failed(10) == "" and failed(20) == ""
    assert "2 times in a row, now after step 20" in failed(20)
    assert "2 times in a row, now after step 15" in failed(15)
    assert failed(30) == "" and "divergence" in failed(40, code=3)
    assert "its loss is NaN after step 45: divergence" in failed(45, loss="NaN")
    assert "it has failed 8 times, 7 are got over" in failed(50, most=7)
    assert failed(51, most=6, job="7") == "", "of another job"
    assert "another job" in failed(50, code=BUSY)  # which keeps its own account
    with monkeypatch.context() as busy:
        busy.setattr(restarts, "held", lambda path: path == tmp_path / "lock")
        assert "another job" in failed(50)  # whose code a launcher hid
    assert "before its first step" in why_not(tmp_path / "nothing", 1, 5)
    assert why_not(tmp_path / "nothing", 1, 5, signalled=True) == ""
    assert why_not(tmp_path / "new", FAILED, 5) == "", "nodes that did not meet may do so now"
    assert "2 times in a row" in why_not(tmp_path / "new", FAILED, 5)
    assert "cannot be written (Not a directory)" in why_not(tmp_path / "metrics.jsonl" / "new", FAILED, 5)
    (tmp_path / "stop").touch()
    assert "keeps it from training" in failed(60)
    assert [json.loads(line)["step"] for line in (tmp_path / "failures.jsonl").read_text().splitlines()] == [
        10, 20, 20, 15, 30, 40, 45, 50, 51, 60,
    ]  # fmt: skip
