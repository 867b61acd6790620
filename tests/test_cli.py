"""Every command as a person types it; the launchers for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ds_pretrain import cli, runs
from ds_pretrain.cli import app, main
from ds_pretrain.config import load_run
from ds_pretrain.core.files import BusyError
from ds_pretrain.objectives import REGISTRY
from ds_pretrain.training.checkpoint import Snapshot
from ds_pretrain.training.signals import InterruptedRun

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def run_file(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "run.yaml"
    values = {
        "model": {"layers": 2, "hidden": 32, "heads": 4},
        "data": {"path": str(data)},
        "batch": {"global_size": 8, "seq_len": 64},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "deepspeed": {"config": "zero1_fp32"},
        "train": {"max_steps": 6, "eval_every": 3, "save_every": 3},
        "output": str(folder / "out"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "140"})


def ok(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def environment():
    """Of a shell that nobody launched a rank in."""
    given = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in given.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def process(*command, cwd=ROOT):
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def losses(output):
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "lr" in line]


@pytest.fixture(scope="module")
def trained(run_file):
    assert "trained to step 6" in ok("train", run_file)
    return Path(yaml.safe_load(run_file.read_text())["output"])


def test_prepare_makes_a_folder_and_says_what_is_in_it(corpus, tmp_path):
    out = ok("prepare", corpus, "-o", tmp_path / "made", "--vocab-size", 700, "--split", "0.8,0.1,0.1")
    assert "train" in out and (tmp_path / "made" / "manifest.json").is_file()
    assert "nothing done" in ok("prepare", corpus, "-o", tmp_path / "made", "--vocab-size", 700, "--split", "0.8,0.1,0.1")


def test_the_output_holds_what_the_contract_names(trained):
    assert {p.name for p in trained.iterdir()} >= {"run.yaml", "metrics.jsonl", "checkpoints", "plots"}
    assert (trained / "plots" / "learning_curve.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    step = {"step", "loss", "clm", "grad_norm", "lr", "target_tokens", "tokens", "tokens_per_second", "skipped_steps"}
    assert step <= lines[0].keys()
    assert {"split", "loss", "perplexity", "bits_per_byte"} <= next(line for line in lines if "split" in line).keys()
    resolved = yaml.safe_load((trained / "run.yaml").read_text())
    assert resolved["train"]["max_steps"] == 6
    assert resolved["model"]["vocab"] == 1000 and resolved["model"]["positions"] == resolved["batch"]["seq_len"]
    engine = json.loads((trained / "deepspeed.json").read_text())
    assert engine["train_batch_size"] == resolved["batch"]["global_size"] and "auto" not in engine.values()


def test_training_again_goes_on_where_it_stopped(trained, run_file):
    before = losses(trained)
    ok("train", run_file)
    assert losses(trained) == before and not list(trained.glob("run-until-*"))
    said = ok("train", run_file, "train.max_steps=8")
    assert losses(trained)[:6] == before and len(losses(trained)) == 8
    assert "other settings from here on: train.max_steps: 6 -> 8" in said and (trained / "run-until-6.yaml").exists()


def test_eval_generate_and_preview(trained, run_file, tmp_path):
    out = ok("eval", trained, "--baselines", "--split", "test")
    assert "bigram" in out and "unigram" in out
    assert {"unigram", "bigram"} <= json.loads((trained / "eval-test.json").read_text()).keys()
    (tmp_path / "prompts.txt").write_text("A class\nfor x in\n")
    said = ok("generate", trained, "--prompt", "The", "--prompts", tmp_path / "prompts.txt", "--tokens", 5)
    assert [line[:3] for line in said.splitlines() if line[:3] in ("The", "A c", "for")] == ["The", "A c", "for"]
    ok("preview", run_file, "objective.name=mlm", "--png", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_preview_of_an_objective(run_file, tmp_path):
    out = ok("preview", "mlm", "objective.mask_prob=0.5", "--rows", 1, "--png", tmp_path / "mlm.png")
    assert "mask_prob=0.5" in out and "before: " in out and "after: " in out and "(asked: 80.0%)" in out
    assert (tmp_path / "mlm.png").stat().st_size > 10_000
    assert "A fox." in ok("preview", "clm", "--text", "A fox.", "--run", run_file).replace(" ", "").replace("▁", " ")
    assert "examples of at most 64 positions" in ok("preview", "sop", "--run", run_file)


def test_preview_of_all_objectives(tmp_path):
    out = ok("preview", "--all", "batch.seq_len=32", "--png", tmp_path / "all.png")
    for name in REGISTRY:
        assert f"example 1 of {name}" in out
    assert (tmp_path / "all.png").stat().st_size > 100_000


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["mml"], "unknown objective or run 'mml': did you mean the objective 'mlm'?"),
        (["span_coruption"], "did you mean the objective 'span_corruption' or the run 'quickstart_span_corruption'?"),
        (["quickstart_mlmm"], "did you mean the run 'quickstart_mlm'?"),
        ([], "name an objective or a run, or use --all"),
        (["nsp", "--text", "hello there"], "too short for nsp: it takes 2 documents of 4 tokens at least"),
        (["mlm", "--text", ""], "too short for mlm"),
        (["mlm", "objective.mask_pro=0.3"], "did you mean 'mask_prob'?"),
        (["mlm", "objective.mask_prob=2"], "mask_prob must lie between 0 and 1, got 2"),
        (["mlm", "objective.name=clm"], "objective.name=clm contradicts mlm"),
        (["mlm", "data.path=/absent", "--run", "quickstart"], "holds no prepared data"),
        (["quickstart", "--text", "hello"], "quickstart is a run"),
        (["mlm", "--all"], "leave out 'mlm'"),
        (["mlm", "--png", "/absent/mlm.png"], "/absent is no folder"),
    ],
)
def test_a_mistake_in_a_preview_ends_with_2(monkeypatch, capsys, arguments, said):
    code, text = ends(monkeypatch, capsys, "preview", *arguments)
    assert code == 2 and said in text and "Traceback" not in text


@pytest.mark.parametrize("world", [1, 8, 96])
def test_plan_for_any_number_of_ranks(run_file, world):
    tensor = 2 if world > 1 else 1
    out = ok("plan", run_file, "--world", world, f"parallel.tensor={tensor}", f"batch.global_size={world * 4}",
             f"parallel.pipeline={tensor}")  # fmt: skip
    assert "memory of the fullest rank" in out and "parameters" in out and "embedding" in out
    assert ("MB that a rank sends" in out) == (world > 1) and "time of a step" not in out


def test_plan_times_a_step_on_a_cluster_that_is_not_there(run_file):
    speeds = ("--tflops", 400, "--gb-per-second", 40, "--latency-us", 20)
    out = " ".join(ok("plan", run_file, "--world", 8, "batch.global_size=16", *speeds).split())
    assert "time of a step" in out and "400 TFLOP/s" in out and "None of it was measured" in out
    half = invoke("plan", run_file, "--tflops", 400)
    assert "nothing tells the speed of link and latency" in str(half.exception)


def test_plan_refuses_what_cannot_be(run_file):
    result = invoke("plan", run_file, "--world", 3, "parallel.tensor=2")
    assert "3 ranks: not a multiple" in str(result.exception)


def test_list_names_what_there_is():
    out = ok("list")
    for name in ("clm", "mlm", "mask_prob", "gpt2-small", "quickstart", "zero1_bf16.json"):
        assert name in out
    assert "did you mean 'presets'" in str(invoke("list", "preset").exception)


def test_bad_input_exits_with_2_and_leaves_nothing(run_file, tmp_path):
    out = tmp_path / "out"
    result = process(sys.executable, "-m", "ds_pretrain", "train", run_file, "model.hiden=3", "batch.seqlen=1", f"output={out}")
    assert result.returncode == 2 and not out.exists()
    assert "did you mean 'hidden'" in result.stderr and "did you mean 'seq_len'" in result.stderr
    result = process(
        sys.executable, "-m", "ds_pretrain", "train", run_file, "data.path=/absent", "model.heads=3", f"output={out}"
    )
    assert result.returncode == 2 and not out.exists()
    assert "holds no prepared data" in result.stderr and "not divisible by model.heads 3" in result.stderr


def test_debug_previews_and_trains_in_one_process(run_file, tmp_path):
    result = process(
        sys.executable, "-m", "ds_pretrain", "train", run_file, "--debug", f"output={tmp_path}", "train.max_steps=3"
    )
    assert result.returncode == 0, result.stderr
    assert "row 0" in result.stdout and "pdb" in result.stdout
    assert len(losses(tmp_path)) == 3


def test_every_launcher_trains_the_same_run(run_file, tmp_path):
    arguments = ["train", run_file, "train.eval_every=0", "parallel.tensor=2"]
    launchers = {
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "ds_pretrain"],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--module", "ds_pretrain"],
        "local": [ROOT / "launchers" / "local.sh", "-n", "2"],
    }
    found = {}
    for name, command in launchers.items():
        result = process(*command, *arguments, f"output={tmp_path / name}")
        assert result.returncode == 0, (name, result.stderr[-2000:])
        found[name] = losses(tmp_path / name)
    assert found["torchrun"] == found["deepspeed"] == found["local"] and len(found["local"]) == 6


def test_without_an_mpi_its_launcher_says_what_brings_one(tmp_path):
    for tool in ("bash", "dirname", "grep", "sed"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    command = [tmp_path / "bash", ROOT / "launchers" / "mpi.sh", "-n", "2", "--", "train", "quickstart"]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (
        result.returncode == 2 and "no mpirun of Open MPI here" in result.stderr and "pip install -e '.[mpi]'" in result.stderr
    )


def launched(folder, launcher, *arguments, tools, **env):
    """A launcher whose tools are these lines of shell."""
    for name, line in tools.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", ROOT / "launchers" / launcher, *arguments]
    return subprocess.run(command, env={"PATH": path, **env}, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("gpus, ranks", [("4", 4), ("a100:4", 4), ("a100", 1), ("volta:3,kepler:1", 4), ("0", 1)])
def test_a_node_has_as_many_ranks_of_torchrun_as_gpus_were_asked_for(tmp_path, gpus, ranks):
    """They share its cores."""
    tools = {"scontrol": "echo localhost", "srun": 'echo "$DS_PRETRAIN_RANKS ranks, $OMP_NUM_THREADS threads"'}
    slurm = {"SUBMIT_DIR": ROOT, "JOB_ID": "1", "JOB_NODELIST": "localhost", "GPUS_PER_NODE": gpus, "CPUS_PER_TASK": "6"}
    env = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    result = launched(tmp_path, "slurm_torchrun.sbatch", "train", tools=tools, **env)
    assert result.stdout == f"{ranks} ranks, {6 // ranks} threads\n", result.stderr


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    """A login may greet; without a file deepspeed would train here alone."""
    tools = {"deepspeed": 'echo "$@"', "ssh": 'echo "Welcome to gpu17 of lab"; eval "${!#}"'}
    missing = launched(tmp_path, "hostfile.sh", tmp_path / "hosts", "train", tools=tools)
    assert missing.returncode == 2 and f"no hostfile {tmp_path / 'hosts'}" in missing.stderr
    (tmp_path / "hosts").write_text("# two\n  # spare\nhost1 slots=2\n\nhost2 slots=2\n")
    for interface, told in (("lo", "--master_addr 127.0.0.1"), ("ib7", "--launcher pdsh --module")):
        found = launched(tmp_path, "hostfile.sh", tmp_path / "hosts", "train", tools=tools, DS_PRETRAIN_INTERFACE=interface)
        assert told in found.stdout and not found.stderr
    found = launched(tmp_path, "hostfile.sh", tmp_path / "hosts", "train", tools={**tools, "ssh": '[[ "$*" != *host2* ]]'})
    assert found.returncode == 2 and "no ssh to host2 of" in found.stderr and not found.stdout


def test_a_rank_that_dies_ends_the_run_within_a_minute_and_is_named(run_file, tmp_path):
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "ds_pretrain", "train", run_file]
    overrides = [f"output={tmp_path / 'out'}", "train.max_steps=100000", "train.eval_every=0"]
    with subprocess.Popen(
        list(map(str, command + overrides)), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    ) as run:
        metrics = tmp_path / "out" / "metrics.jsonl"
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
            assert run.poll() is None
            time.sleep(0.2)
        ranks = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        os.kill(ranks[-1], signal.SIGKILL)
        _, told = run.communicate(timeout=60)
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in told and "local_rank: 1" in told


def test_deterministic_runs_are_the_same_bit_for_bit(run_file, tmp_path):
    for name in ("a", "b"):
        arguments = ["train", run_file, "--deterministic", "model.dropout=0.1", f"output={tmp_path / name}"]
        result = process("torchrun", "--standalone", "--nproc_per_node", "2", "-m", "ds_pretrain", *arguments)
        assert result.returncode == 0, result.stderr[-2000:]
    first, second = (Snapshot(tmp_path / name / "checkpoints" / "step-6") for name in ("a", "b"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(torch.equal(first.whole(*key), second.whole(*key)) for key in first.index)


def ends(monkeypatch, capsys, *arguments):
    """Exit code of the real entry point in this process, and what it wrote to stderr on one line."""
    monkeypatch.setattr(sys, "argv", ["ds-pretrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("wrong"), 2),
        (FileNotFoundError(2, "no such file", "data"), 2),
        (PermissionError(13, "not allowed", "data"), 2),
        (FloatingPointError("not a number"), 3),
        (OSError(28, "no space left", "out"), 74),
        (BusyError("in use"), 75),
        (InterruptedRun(signal.SIGTERM, "stopped"), 143),
        (InterruptedRun(signal.SIGUSR1, "stopped"), 0),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Exception) else "",
)
def test_what_a_process_ends_with_says_what_happened(monkeypatch, capsys, error, code):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    found, text = ends(monkeypatch, capsys, "train")
    assert found == code and str(error).replace("'", "")[:5] in text.replace("'", "")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["model.hiden=3"], "did you mean 'hidden'"),
        (["objective=mlm"], "objective is a section: write objective.name=mlm"),
        (["train.max_steps=2"], "add optimizer.warmup_steps=0"),
        (["model"], "override 'model' must look like section.key=value"),
        (["data.path=/absent"], "holds no prepared data"),
        (["model.heads=3", "optimizer.warmup_steps=6"], "2 problems"),
        (["objective.name=mml"], "did you mean 'mlm'"),
        (["objective.mask_prob=0.5"], "objective:"),
        (["deepspeed.config=zero9"], "unknown deepspeed configuration 'zero9'"),
        (["parallel.tensor=2"], "1 rank: not a multiple of parallel.tensor 2 x parallel.pipeline 1 = 2: start that many"),
        (["batch.global_size=10", "batch.micro_size=4"], "batch.global_size 10 is not divisible"),
    ],
)
def test_a_mistake_in_a_run_ends_with_2_a_message_and_no_folder(run_file, tmp_path, monkeypatch, capsys, arguments, said):
    output = tmp_path / "out"
    code, text = ends(monkeypatch, capsys, "train", run_file, *arguments, f"output={output}")
    assert code == 2 and said in text and "Traceback" not in text
    assert not output.exists()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(run_file, tmp_path, kind):
    command = [sys.executable, "-m", "ds_pretrain", "train", run_file, "train.max_steps=100000", f"output={tmp_path}"]
    started = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    limit = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "step-3").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    started.send_signal(kind)
    out, error = started.communicate(timeout=60)
    assert started.returncode == 128 + kind, error
    (told,) = re.findall(r"stopped after step ([\d,]+) of 100,000: it is saved", error)
    assert "start: clm" in out and "Traceback" not in error
    step = int(told.replace(",", ""))
    assert max(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()) == step
    again = ok("train", run_file, f"train.max_steps={step + 2}", f"output={tmp_path}")
    assert f"resuming at step {step:,}" in again
    assert len(losses(tmp_path)) == step + 2


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_what_was_never_trained_is_refused(tmp_path, monkeypatch, capsys, command):
    code, text = ends(monkeypatch, capsys, command, tmp_path / "none")
    assert code == 2 and "does not exist: give the output folder of a run that was trained" in text
    assert not (tmp_path / "none").exists()


def test_a_run_that_diverges_ends_with_3(run_file, tmp_path, monkeypatch, capsys):
    run = [run_file, "optimizer.lr=1e38", "optimizer.warmup_steps=0", "train.eval_every=0", f"output={tmp_path / 'out'}"]
    code, text = ends(monkeypatch, capsys, "train", *run)
    assert code == 3 and "Nothing was saved after it" in text
    assert not list((tmp_path / "out").glob("checkpoints/step-6"))


@pytest.mark.parametrize(
    "section, name",
    [
        ("objectives", "mlm"),
        ("presets", "bert-base"),
        ("runs", "quickstart"),
        ("sweeps", "sizes"),
        ("deepspeed", "zero1_bf16.json"),
    ],
)
def test_list_shows_one_section_alone(section, name):
    out = ok("list", section)
    assert out.startswith(section) and name in out
    assert not any(
        other in out.splitlines() for other in ("objectives", "presets", "runs", "sweeps", "deepspeed") if other != section
    )


@pytest.mark.parametrize("kind, key", [("run", "optimizer.min_lr"), ("sweep", "budget.flops")])
def test_list_says_what_the_keys_of_a_file_mean(kind, key):
    assert key in ok("list", kind)


def test_a_disk_and_a_watchdog_that_would_end_a_run_are_told_before_it(run_file, monkeypatch):
    room = SimpleNamespace(free=500_000)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: room)
    crowded, impatient = runs.problems(load_run(str(run_file), {"train.watchdog_seconds": 4000, "output": "/new/one"}), 1)[::-1]
    assert "is on a disk with 0.0 GB free, checkpoints will take" in crowded and "lower train.keep" in crowded
    assert "train.watchdog_seconds 4000 is not below the 3600 after which" in impatient
    room.free = 10**12
    assert runs.problems(load_run(str(run_file)), 1) == []


def test_an_output_that_another_job_trains_into_is_left_alone(run_file, tmp_path):
    (tmp_path / "lock").touch()
    hold = "f = hold(pathlib.Path('lock')); print(flush=True); sys.stdin.read()"
    holding = f"import sys, pathlib; from ds_pretrain.core.files import hold; {hold}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", holding], cwd=tmp_path, env=environment(), **pipes)
    try:
        holder.stdout.readline()
        ran = process(sys.executable, "-m", "ds_pretrain", "train", run_file, f"output={tmp_path}")
    finally:
        holder.communicate()
    assert ran.returncode == 75 and f"is in use by process {holder.pid}" in ran.stderr.replace("\n", " "), ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_nodes_are_examined_and_said_to_be_fit(tmp_path):
    assert "fit to train; examined in " in ok("doctor", tmp_path / "out", "--seconds", 1)


def test_scaling_laws_are_fitted_to_a_table_of_runs(tmp_path, monkeypatch, capsys):
    rows = [(n, d, 1.7 + 400 / n**0.34 + 410 / d**0.28) for n in (1e7, 3e7, 1e8, 3e8) for d in (1e9, 3e9, 1e10)]
    lines = ["size,tokens,val_loss", *(f"{n:.0f},{d:.0f},{loss:.6f}" for n, d, loss in rows)]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    told = ok(
        "scaling", "fit", tmp_path / "runs.csv", "--column", "parameters=size", "--column", "loss=val_loss", "--resamples", 20
    )
    assert "Chinchilla approach 3" in told and "parameters without embeddings" in told
    assert {path.suffix for path in (tmp_path / "scaling").iterdir()} == {".json", ".png"}
    code, told = ends(monkeypatch, capsys, "scaling", "fit", tmp_path / "runs.csv", "--size", "parametres")
    assert code == 2 and "did you mean 'parameters'" in told
