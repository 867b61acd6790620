"""`run.py`, which runs on any machine before anything is installed there."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run  # noqa: E402
from ds_pretrain import runs  # noqa: E402
from ds_pretrain.config import load_run  # noqa: E402
from ds_pretrain.parallel import pace  # noqa: E402


def test_help_is_no_mistake_and_installs_nothing(tmp_path):
    (alone := tmp_path / "run.py").write_bytes((ROOT / "run.py").read_bytes())
    for arguments, code in ((["--help"], 0), (["test", "--help"], 0), (["quickstart", "-h"], 0), ([], 1), (["tset"], 1)):
        told = subprocess.run([sys.executable, alone, *arguments], capture_output=True, text=True)
        assert (told.returncode, "python3 run.py quickstart" in told.stdout + told.stderr) == (code, True)
    assert [*tmp_path.iterdir()] == [alone]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="takes instructions away from an x86 CPU")
def test_quickstart_trains_in_fp32_where_bf16_is_imitated(monkeypatch):
    monkeypatch.setattr(run, "VENV", Path(sys.prefix))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert run.precision(["train.max_steps=60"]) == ["deepspeed.config=zero1_fp32.json"]
    assert run.precision(["deepspeed.config=zero1_bf16.json"]) == []


def test_a_run_in_bf16_says_that_it_is_imitated(monkeypatch, caplog):
    monkeypatch.setattr(pace, "dear", lambda dtype: 80.0)
    runs._priced(load_run("quickstart", ["deepspeed.config=zero2_bf16.json"]))
    assert "80 times" in caplog.text and "zero2_fp32.json" in caplog.text
    caplog.clear()
    runs._priced(load_run("quickstart", ["deepspeed.config=zero2_fp32.json"]))
    assert not caplog.text
