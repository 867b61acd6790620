#!/usr/bin/env python3
"""The two commands of a fresh checkout, with nothing but the standard library:

    python3 run.py quickstart     install, prepare the embedded corpus, pre-train, evaluate, sample, plot
    python3 run.py test           install, lint, type-check, run every test (three quarters of an hour on two cores)

    python3 run.py quickstart train.max_steps=2000 optimizer.lr=1e-3      with other settings of its run file
    python3 run.py test tests/core -k files                               some tests, as pytest takes them

Both make `.venv` here once and reuse it while pyproject.toml and the Python version stay the same. Extra arguments for pip
(a CUDA index, a mirror) go into DS_PRETRAIN_PIP_ARGS.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed"
RUN = ROOT / "runs" / "quickstart"
ON_TWO_CORES = ("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")
"""A file of tests, with what its tests share, is one worker's; more workers would start too many ranks at once. They are taken
in the order of `tests/conftest.py`."""


def main():
    commands = {"quickstart": quickstart, "test": test}
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before anything has checked it)
        sys.exit("ds_pretrain needs Python 3.11 or newer, this is {}.{}".format(*sys.version_info[:2]))
    commands[sys.argv[1]](sys.argv[2:])


def quickstart(arguments):
    """Everything from raw text to a sampled model; arguments are overrides of ds_configs/runs/quickstart.yaml."""
    started = time.time()
    warm = install("")
    installed = time.time()
    data = ROOT / "data" / "embedded"
    tool("prepare", "embedded", "-o", data, "--split", "0.96,0.02,0.02", "--vocab-size", "4096")
    tool("train", "quickstart", *precision(arguments), *arguments)
    output = next((Path(a.partition("=")[2]) for a in arguments if a.startswith("output=")), RUN)
    tool("eval", output, "--split", "validation", "--baselines")
    for prompt in ("HAMLET.\nTo be, or not to be", "def main(arguments):\n"):
        tool("generate", output, "--prompt", prompt, "--tokens", "80")
    print("\nlearning curve: {}".format(output / "plots" / "learning_curve.png"))
    print(
        "{} start: {:.0f} s to install, {:.0f} s for the rest".format(
            "warm" if warm else "cold", installed - started, time.time() - installed
        )
    )


def precision(arguments):
    """fp32 where the CPU would imitate bf16, unless the arguments say something."""
    if any(argument.startswith("deepspeed") for argument in arguments):
        return []
    asked = "from ds_pretrain.parallel.pace import dear; import torch; print(dear(torch.bfloat16))"
    told = subprocess.run([str(VENV / "bin" / "python"), "-c", asked], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    return ["deepspeed.config=zero1_fp32.json"] if float(told) else []


def test(arguments):
    """Lint, types, tests with coverage; arguments go to pytest (then without the coverage bar)."""
    install("dev")
    call("ruff", "check", ".")
    call("ruff", "format", "--check", ".")
    call("mypy")
    if arguments:
        call("pytest", *arguments)
        return
    call("pytest", *ON_TWO_CORES, "-rs", "--durations=8", "--cov", "--cov-report=term:skip-covered", "--cov-fail-under=90")


def install(extra):
    """Make .venv and install the package once; returns whether nothing had to be done."""
    state = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    done = STAMP.read_text().split() if STAMP.exists() else []
    if done and done[0] == state and (not extra or extra in done[1:]):
        return True
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        sys.exit("this Python has no venv module: on Debian or Ubuntu install the package python3-venv")
    if not (VENV / "bin" / "python").exists():
        print(f"making {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    print("installing (a minute or two the first time)", flush=True)
    pip = [
        "-m",
        "pip",
        "install",
        *([] if sys.stdout.isatty() else ["--quiet"]),
        "--disable-pip-version-check",
        *shlex.split(os.environ.get("DS_PRETRAIN_PIP_ARGS", "")),
    ]
    call("python", *pip, *torch_first())
    call("python", *pip, "-e", target)
    extras = sorted({extra, *(done[1:] if done and done[0] == state else [])} - {""})
    STAMP.write_text(" ".join([state, *extras]))
    return False


def torch_first():
    """A torch for this machine: what pip finds where there is a GPU, a build of the tested version elsewhere."""
    return ["torch>=2.6,<2.14"] if os.path.exists("/proc/driver/nvidia/version") else ["torch==2.13.0"]


def tool(*arguments):
    print(f"\n$ ds-pretrain {shlex.join(map(str, arguments))}", flush=True)
    call("python", "-m", "ds_pretrain", *arguments)


def call(program, *arguments):
    """Run a program of the virtual environment in the checkout; its failure is ours."""
    environment = {
        **os.environ,
        "PATH": "{}:{}".format(VENV / "bin", os.environ.get("PATH", "")),
        "VIRTUAL_ENV": str(VENV),
    }
    code = subprocess.run([str(VENV / "bin" / program), *map(str, arguments)], cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
