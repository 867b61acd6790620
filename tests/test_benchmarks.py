"""The benchmarks start, and what they can do without a GPU and in a moment is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


def start(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, FOLDER / name, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(FOLDER))
    import gpu

    yield gpu
    sys.path.remove(str(FOLDER))


def test_loader_explains_itself():
    done = start("loader.py", "--help")
    assert done.returncode == 0 and "GPTDataset" in done.stdout


def test_step_compares_the_two_sides_and_writes_json(tmp_path):
    size = ("--layers", "1", "--hidden", "32", "--heads", "2", "--vocab", "199", "--seq-len", "32", "--rows", "2")
    file = tmp_path / "step.json"
    done = start("step.py", *size, "--steps", "2", "--threads", "1", "--precision", "fp32", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RATIO" in done.stdout and "causal LM" in done.stdout and "masked LM" in done.stdout
    lines = json.loads(file.read_text())
    assert [line["recipe"]["objective"] for line in lines] == ["clm", "mlm"]
    assert all(line["loss_error"] < 1e-5 and len(line["wall"]["ours"]) == 2 for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the checks would run")
def test_gpu_says_why_it_does_not_run():
    done = start("gpu.py")
    assert done.returncode == 0, done.stderr
    reason = f"needs a CUDA device: torch.cuda.is_available() is False on this machine (torch {torch.__version__})"
    assert done.stdout.strip() == reason


@pytest.mark.parametrize(
    "name, options", [("nccl", {}), ("adamw", {}), ("flex", {}), ("parity", {}), ("fp16", {"precision": "bf16"})]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine would be on the GPU")
def test_gpu_checks_hold_on_the_cpu(gpu, name, options):
    checks = gpu.run(name, CPU, **options)
    assert checks and all(check.passed for check in checks), [c for c in checks if not c.passed]
    gpu.table({name: checks})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine would be on the GPU")
def test_gpu_checks_of_fp16_hold_on_the_cpu(gpu, fp16):
    checks = gpu.run("fp16", CPU)
    assert len(checks) == 3 and all(check.passed for check in checks), [c for c in checks if not c.passed]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine would be on the GPU")
def test_gpu_speed_compares_packed_rows(gpu):
    model = gpu.step.models(1, 32, 2, 64, 199)["mlm"]
    check = gpu.speed("tiny", gpu.step.Recipe("mlm", model, 64, 4, 2, "fp32", packed=True), CPU)
    assert "unknown peak" in check.figure and "ratio" in check.figure
    assert set(gpu.speed_recipes(2)) == {"gpt2-small, 32 x 1024", "bert-base, 64 x 512, packed"}


def test_gpu_check_that_raises_is_a_failed_line(gpu, monkeypatch):
    monkeypatch.setitem(gpu.CHECKS, "adamw", lambda device: 1 / 0)
    (check,) = gpu.run("adamw", CPU)
    assert not check.passed and "ZeroDivisionError" in check.figure
