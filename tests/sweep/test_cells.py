"""Cells as processes: each runs once, whoever starts, stops or kills them; what came of them is one table."""

import contextlib
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import yaml

from ds_pretrain import runs
from ds_pretrain.config import ConfigError
from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.evaluation.perplexity import evaluate
from ds_pretrain.evaluation.plots import History
from ds_pretrain.evaluation.scaling import fit
from ds_pretrain.evaluation.scaling import read as scaling_runs
from ds_pretrain.objectives import create
from ds_pretrain.runs import checkpoint_size, tokenizer_size
from ds_pretrain.sweep import cells, report, results
from ds_pretrain.sweep.scores import Asked, figures
from ds_pretrain.sweep.spec import parameters, read
from ds_pretrain.training.inference import FrozenModel

STEPS, LONG = 40, 300
DIVERGES = 1e30


@pytest.fixture(scope="module")
def run_file(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "run.yaml"
    values = {
        "model": {"layers": 2, "hidden": 32, "heads": 4},
        "data": {"path": str(data)},
        "batch": {"global_size": 8, "seq_len": 64},
        "deepspeed": {"config": "zero1_fp32"},
        "optimizer": {"warmup_steps": 2},
        "train": {"max_steps": STEPS, "save_every": 10, "eval_tokens": 2000},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def sweep_file(run_file, folder, grid, **values):
    folder.mkdir(exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"run": str(run_file), "output": str(folder / "out"), "grid": grid, **values}, sort_keys=False)
    )
    return path


def command(*words):
    return [sys.executable, "-m", "ds_pretrain", "sweep", *map(str, words)]


def started(*words):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(command(*words), text=True, env={**env, "DS_ACCELERATOR": "cpu"}, **pipes)


def said(*words):
    process = started(*words)
    text, _ = process.communicate(timeout=300)
    return process.returncode, text


class Screen:
    """A command that writes to a terminal."""

    def __init__(self, *words):
        self.end, terminal = os.openpty()
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "TERM": "xterm", "COLUMNS": "140"}
        self.process = subprocess.Popen(command(*words), stdout=terminal, stderr=terminal, env=env)
        os.close(terminal)

    def text(self):
        """All that it wrote, when it has ended."""
        pieces = []
        with contextlib.suppress(OSError):  # how a terminal ends
            while piece := os.read(self.end, 1 << 16):
                pieces.append(piece)
        self.process.wait(timeout=60)
        os.close(self.end)
        return b"".join(pieces).decode(errors="replace")


def statuses(path):
    return {name: at.status for name, at in results.states(read(str(path))).items()}


def until(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def swept(run_file, tmp_path_factory):
    """A sweep of three cells, one of which diverges, run twice at once: its file, and what the first of the two said."""
    grid = {"optimizer.lr": [1e-3, 3e-3, DIVERGES]}
    path = sweep_file(run_file, tmp_path_factory.mktemp("swept"), grid)
    quiet, screen = started("run", path, "--at-once", 2), Screen("run", path, "--at-once", 2)
    return path, [screen.text(), quiet.communicate(timeout=300)[0]]


def test_every_cell_runs_once_although_two_ran_the_sweep(swept):
    path, _ = swept
    assert statuses(path) == {"lr=0.001": "finished", "lr=0.003": "finished", "lr=1e+30": "failed"}
    for cell in read(str(path)).cells[:2]:
        log = (cell.folder / "log.txt").read_text()
        assert log.count("start: clm") == 1, log
        assert [json.loads(line)["step"] for line in (cell.folder / "metrics.jsonl").open()][:STEPS] == list(
            range(1, STEPS + 1)
        )


def test_a_terminal_shows_the_cells_as_they_go_on(swept):
    _, (screen, quiet) = swept
    tables = [set(re.findall(r"waiting|running|finished|failed", table)) for table in screen.split("training loss")[1:]]
    assert {"running", "waiting"} in tables and {"finished", "failed"} in tables and len(tables) > 5, screen
    assert quiet.count("training loss") == 1


def test_a_failed_cell_is_told_with_its_reason_and_waits(swept):
    path, told = swept
    code, text = said("run", path)
    assert (
        code == 1 and "failed lr=1e+30: diverged at step" in text and "with a lower optimizer.lr" in text.replace("\n", " ")
    ), text
    assert f"sweep run {path} --again" in text.replace("\n", "")
    assert any("lr=1e+30: failed, step" in text for text in told) and any("lr=0.001: running, step" in text for text in told)
    before = (path.parent / "out/cells/lr=1e+30/log.txt").stat().st_size
    said("run", path)
    assert (path.parent / "out/cells/lr=1e+30/log.txt").stat().st_size == before
    assert said("run", path, "--again")[0] == 1
    assert (path.parent / "out/cells/lr=1e+30/log.txt").stat().st_size > before


def test_the_cells_are_one_tidy_table(swept):
    path, _ = swept
    code, text = said("collect", path)
    assert code == 0 and "2 finished, 1 failed" in text and "sweep report" in text, text
    rows = list(csv.DictReader((path.parent / "out/cells.csv").open()))
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    first, spec = rows[0], read(str(path))
    assert float(first["flops"]) == 6 * int(first["parameters"]) * int(first["tokens"])
    assert 0.9 * STEPS * 8 * 64 < int(first["tokens"]) <= STEPS * 8 * 64
    assert float(first["model_flops"]) > float(first["flops"]), "it counts the head too"
    last = [json.loads(line) for line in (spec.cells[0].folder / "metrics.jsonl").open()][-1]
    assert float(first["loss"]) == pytest.approx(last["loss"]) and last["split"] == "validation"
    assert "lower optimizer.lr" in rows[2]["reason"]
    table = pyarrow.parquet.read_table(path.parent / "out/cells.parquet")
    assert table.column_names == list(first) and table.num_rows == 3
    points = list(csv.DictReader((path.parent / "out/curves.csv").open()))
    told = [(row["run"], row["status"], int(row["step"])) for row in points]
    assert told == [("lr=0.001", "finished", STEPS), ("lr=0.003", "finished", STEPS)]


def test_run_files_that_vary_and_a_compute_that_is_asked_for_have_columns_of_their_own(run_file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(run_file.read_text())
    grid = {"run": [str(run_file), str(other)], "optimizer.lr": [1e-3, 3e-3]}
    rows = results.rows(read(str(sweep_file(run_file, tmp_path / "runs", grid, budget={"model_flops": [1e10]}))))
    assert len({row["run"] for row in rows}) == 4 and [row["run_file"] for row in rows[1:3]] == [str(run_file), str(other)]
    assert all("model_flops" not in row for row in rows), "it is what was reached, not what was asked for"


def test_a_collected_sweep_is_what_scaling_laws_are_fitted_to(run_file, tmp_path):
    sizes = {str(hidden): {"model.hidden": hidden} for hidden in (16, 32, 64, 128)}
    path = sweep_file(run_file, tmp_path / "planted", {"size": sizes, "seed": [0, 1]}, budget={"tokens": [8e4, 1e5, 2e5, 4e5]})
    spec = read(str(path))
    for cell in spec.cells:
        n, d = parameters(cell.config), 512 * cell.config.train.max_steps
        cell.folder.mkdir(parents=True)
        (cell.folder / "run.yaml").write_text(
            yaml.safe_dump({"model": {**cell.config.model.model_dump(mode="json"), "vocab": 64}})
        )
        trained = {"step": cell.config.train.max_steps, "tokens": d, "loss": 9.0, "lr": 0.1, "tokens_per_second": 1.0}
        evaluated = {"step": trained["step"], "tokens": d, "split": "validation", "loss": 1.7 + 20 / n**0.34 + 90 / d**0.28}
        before = {**evaluated, "step": 0, "tokens": 0}  # as of a run that began with weights
        (cell.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in (before, trained, evaluated)))
        cells.note(cell, "finished")
    code, text = said("collect", path)
    assert code == 0 and "32 finished" in text and "scaling fit" in text, text
    assert len(scaling_runs(path.parent / "out/curves.csv").n) == 32, "there is no compute before the first step"
    (group,) = fit(scaling_runs(path.parent / "out/cells.csv"), resamples=20).groups
    found = group.fit("chinchilla_3").values
    assert [found[name][0] for name in ("alpha", "beta", "E")] == pytest.approx([0.34, 0.28, 1.7], rel=1e-3)


def test_a_stopped_cell_goes_on_and_a_killed_one_is_told(run_file, tmp_path):
    path = sweep_file(run_file, tmp_path / "stopped", {"seed": [0, 1]}, set={"train.max_steps": LONG})
    stopped, killed = read(str(path)).cells
    process = started("run", path, "--at-once", 2)
    until(lambda: all(cells.last_line(cell.folder / "metrics.jsonl").get("step", 0) >= 5 for cell in (stopped, killed)))
    assert set(statuses(path).values()) == {"running"}
    subprocess.run(["pkill", "-9", "-f", f"sweep cell {path} {killed.name}"], check=True)
    until(lambda: cells.state(killed).status == "failed")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert cells.state(stopped).status == "stopped" and "killed by signal 9 after step" in cells.state(killed).reason
    with pytest.raises(ValueError, match=r"run with other settings \(optimizer.lr: \S+ -> 0.5\)"):
        cells.state(replace(stopped, settings={**stopped.settings, "optimizer.lr": 0.5}))
    assert said("run", path, "--again")[0] == 0
    assert set(statuses(path).values()) == {"finished"}
    for cell in (stopped, killed):
        assert [step for step, _ in losses(cell.folder)] == list(range(1, LONG + 1))
    assert "resuming at step" in (stopped.folder / "log.txt").read_text()


def test_a_sweep_that_was_killed_loses_no_cell_and_runs_none_twice(run_file, tmp_path):
    """Its cell goes on by itself; the next sweep leaves it alone and trains the other."""
    path = sweep_file(run_file, tmp_path / "killed", {"seed": [0, 1]}, set={"train.max_steps": LONG})
    first, second = read(str(path)).cells
    process = started("run", path)
    until(lambda: cells.last_line(first.folder / "metrics.jsonl").get("step", 0) >= 5)
    process.kill()
    process.communicate(timeout=60)
    assert (cells.state(first).status, cells.state(second).status) == ("running", "waiting")
    assert said("run", path)[0] == 0
    until(lambda: set(statuses(path).values()) == {"finished"})
    for cell in (first, second):
        assert (cell.folder / "log.txt").read_text().count("start: clm") == 1
        assert [step for step, _ in losses(cell.folder)] == list(range(1, LONG + 1))


def losses(folder):
    return [(line["step"], line["loss"]) for line in map(json.loads, (folder / "metrics.jsonl").open()) if "lr" in line]


def test_other_settings_under_the_same_name_are_refused(swept, run_file):
    path, _ = swept
    other = path.with_name("other.yaml")
    other.write_text(path.read_text() + "set: {batch.global_size: 16}\n")
    code, text = said("status", other)
    assert code == 2 and "run with other settings (batch.global_size: 8 -> 16)" in text.replace("\n", " ")


def test_cells_that_would_share_gpus_are_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert cells.crowded(4, 2) == "" and "--at-once 2 gives each its own" in cells.crowded(4, 3)
    assert "lower the sweep's ranks to 8" in cells.crowded(16, 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cells.crowded(4, 3) == ""


def test_cells_of_several_ranks_give_the_same_losses(swept, run_file, tmp_path):
    path = sweep_file(run_file, tmp_path / "ranks", {"optimizer.lr": [1e-3]}, ranks=2)
    code, text = said("run", path)
    assert code == 0, text + (read(str(path)).cells[0].folder / "log.txt").read_text()
    one, two = losses(read(str(swept[0])).cells[0].folder), losses(read(str(path)).cells[0].folder)
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5)


def test_finished_cells_are_scored_once_and_the_sweep_is_a_page(swept, data, tmp_path):
    path, _ = swept
    rows = [f"{word} is the {word} of {word}s number {number}\t{word}" for word in ("list", "import") for number in range(20)]
    (tmp_path / "words.tsv").write_text("\n".join(rows))
    scores = {
        "clean": {"by": "eval", "data": str(data)},
        "words": {"by": "probe", "texts": str(tmp_path / "words.tsv")},
        "recall": {"by": "memorised", "prompt": 8, "tokens": 2, "windows": 4},
    }
    scored = path.with_name("scored.yaml")
    head = "# Rates of learning\n#\n# Which is best?\n#\n#     ds-pretrain sweep run rates\n"
    scored.write_text(head + path.read_text() + yaml.safe_dump({"scores": scores}))
    code, text = said("score", scored)
    assert code == 0 and "2 of 3 cells are scored" in text, text
    files = [cell.folder / "scores.json" for cell in read(str(scored)).cells[:2]]
    before = [file.stat().st_mtime_ns for file in files]
    assert said("score", scored)[0] == 0 and [file.stat().st_mtime_ns for file in files] == before
    asked = read(str(scored)).asked
    (tmp_path / "words.tsv").write_text("\n".join(reversed(rows)))
    assert "words/accuracy" not in results.rows(read(str(scored)))[0], "another test has no figures yet"
    assert said("score", scored)[0] == 0 and figures(files[0].parent, STEPS, asked)["words/texts"] > 0
    first, *_ = results.rows(read(str(scored)))
    alone = evaluate(
        FrozenModel(files[0].parent, create("clm")), PretrainingDataset(data, seq_len=64, objective="clm").split("test")
    )
    assert first["clean/perplexity"] == pytest.approx(alone.perplexity) and first["words/accuracy"] > 0.8
    assert 0 <= first["recall/1"] <= 1 and first["words/majority"] < 0.8
    (tmp_path / "page").mkdir()
    (tmp_path / "page/conclusions.md").write_text("The lower, the slower.\n")
    code, text = said("report", scored, "-o", tmp_path / "page")
    page = (tmp_path / "page/report.md").read_text()
    assert code == 0 and page.startswith("# Rates of learning\n\nWhich is best?\n\n    ds-pretrain sweep run rates\n"), text
    assert "\n## What came of it\n\nThe lower, the slower.\n" in page and "Before, during" not in page
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    known = sum(column.startswith("recall/") and " " not in column for column in first)
    assert len(lines) == 2 + 3 + 2 * (2 + 2) + 2 + known and "**words**: `probe` with texts" in page
    assert f"| 0.001 | 1 of 1 | {first['clean/loss']:.4g} |" in page
    words = math.log(first["clean/word_perplexity"])
    assert f"nats of all targets / {round(first['clean/loss'] * first['clean/tokens_scored'] / words):,} words" in page
    assert "| validation targets |" in page and f" {first['tokens_scored']:,} |" in page
    assert "lr=1e+30 (failed after step 2): " in page and "lower optimizer.lr" in page
    assert {file.name for file in (tmp_path / "page").iterdir()} == {"report.md", "conclusions.md", "curves.png", "scores.png"}


def test_runs_that_began_with_weights_are_told_before_during_and_after():
    def history(scale):
        texts = {"validation": [8.0, 4.0], "validation of general": [2.0, 3.0]}
        told = [
            {"step": 10 * i, "split": split, "loss": 0.0, "perplexity": scale * value, "tokens_scored": 7}
            for split, values in texts.items()
            for i, value in enumerate(values)
        ]
        return History([{"step": 10, "tokens": 100}], told)

    replayed = report.Line({"replay": "with"}, [{"status": "finished"}] * 2, [history(1), history(1.5)])
    _, text = report.way([replayed])
    assert text.splitlines()[2:] == [
        "| with | validation | 7 | perplexity (per token) | 10.00 ± 2.83 | 5.00 ± 1.41 |",
        "| with | validation of general | 7 | perplexity (per token) | 2.50 ± 0.71 | 3.75 ± 1.06 |",
    ]
    anew = History(replayed.histories[0].train, replayed.histories[0].evaluations[1::2])
    assert not [*report.way([replayed._replace(histories=[anew, anew])])]


def test_seeds_are_one_line_and_what_has_not_finished_is_in_no_figure(monkeypatch, tmp_path):
    def row(seed, status, steps, loss):
        return {"run": f"seed={seed}", "status": status, "steps": steps, "loss": loss, "tokens": 512 * steps}

    found = [row(0, "finished", 40, 3.0), row(1, "finished", 40, 4.0), row(2, "stopped", 10, 5.5), row(3, "failed", 7, "NaN")]
    found[3]["reason"] = "out of memory"
    cells_ = [SimpleNamespace(labels={"size": "small", "seed": str(seed)}, folder=tmp_path) for seed in range(4)]
    monkeypatch.setattr(report, "rows", lambda spec: found)
    (line,) = report.lines(SimpleNamespace(cells=cells_))
    text, several, left = report.table([line])
    assert text.splitlines()[2] == "| small | 2 of 4 | 20,480 | 3.5000 ± 0.7071 |" and "mean ±" in several
    assert left.splitlines()[2:] == ["- seed=2 (stopped after step 10)", "- seed=3 (failed after step 7): out of memory"]


def test_combinations_without_a_step_are_on_the_page(monkeypatch, tmp_path):
    history = History([{"step": 1, "tokens": 9, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0}])
    failed = {"run": "size=big", "status": "failed", "steps": 0, "reason": "out of memory"}
    found = [
        report.Line({"size": "small"}, [{"run": "size=small", "status": "finished", "steps": 1, "loss": 2.0}], [history]),
        report.Line({"size": "big"}, [failed], [History()]),
        report.Line({"size": "vast"}, [{"run": "size=vast", "status": "waiting", "steps": 0, "reason": ""}], [History()]),
    ]
    monkeypatch.setattr(report, "lines", lambda spec: found)
    (tmp_path / "a.yaml").write_text("# Sizes\n")
    page = report.write(SimpleNamespace(cells=[], asked=[], output="runs/a"), tmp_path / "a.yaml", tmp_path).read_text()
    assert "| big | 0 of 1 | - |" in page and "| vast | 0 of 1 | - |" in page
    assert "- size=big (failed after step 0): out of memory\n- size=vast (waiting after step 0)\n" in page


def test_figures_that_are_not_finite_are_shown_as_they_are(tmp_path):
    """A run whose loss overflowed is no reason to hide it, or to break off."""

    def line(name, tokens, *losses):
        rows = [
            {"status": "finished", "seed": i, "tokens": tokens, "loss_tokens": tokens, "text/loss": loss}
            for i, loss in enumerate(losses)
        ]
        return report.Line({"lr": name, "tokens": str(tokens)}, rows, [History()] * len(rows))

    found = [
        line("low", 100, 3.0, 4.0),
        line("low", 200, 2.0, 3.0),
        line("high", 100, 2.0, "nan"),
        line("high", 200, "inf", 3.0),
    ]
    asked = Asked.of("text", {"by": "eval", "data": "data/a"})
    _, table, note = report.score_table(found, asked)
    assert [row.split(" | ")[-1] for row in table.splitlines()[2:]] == [
        "3.5 ± 0.7071 |",
        "2.5 ± 0.7071 |",
        "2, nan |",
        "inf, 3 |",
    ]
    assert note.endswith("not in it: high, 100 (1 of 2 cells); high, 200 (1 of 2 cells).")
    low, high = report.panels(found, [asked]).axes[0].containers
    assert [list(each[0].get_ydata()) for each in (low, high)] == [[3.5, 2.5], [2.0, 3.0]]
    report.panels(found[::2], [asked]).savefig(tmp_path / "b.png")
    none = [line("low", 100, "inf"), line("low", 200, "nan"), line("high", 100, "nan"), line("high", 200, 3.0)]
    assert [*report.score_table(none, asked)][-1].endswith("not in it: low; high, 100.")
    assert not [*report.to_equal_quality(none, asked)]
    for some in (none, none[:2], none[:1]):
        report.panels(some, [asked]).savefig(tmp_path / "c.png")


def test_what_is_drawn_beside_a_probe_is_of_the_lines_that_are_drawn():
    def line(name, accuracy, untrained):
        row = {"status": "finished", "it/accuracy": accuracy, "it/untrained": untrained, "it/majority": 0.1}
        return report.Line({"size": name}, [row], [History()])

    found = [line("small", None, 0.2), line("big", 0.5, 0.3), line("huge", 0.6, None)]
    *_, marks = report.panels(found, [Asked.of("it", {"by": "probe", "texts": "a"})]).axes[0].lines
    assert [*marks.get_ydata()] == [0, 1] and marks.get_xdata()[0] == 0.3 and math.isnan(marks.get_xdata()[1])


def test_figures_that_few_have_are_a_list_and_losses_far_apart_are_shares():
    def line(name, loss, **more):
        history = History([{"step": 1, "tokens": 9, "loss": 2 * loss}], [{"step": 1, "split": "validation", "loss": loss}])
        return report.Line({"objective": name}, [{"status": "finished", "text/loss": loss, **more}], [history])

    found = [line("clm", 3.0), line("mlm", 4.0), line("ul2", 5.0), line("mdlm", 5.0, **{"text/bits_per_byte_bound": 2.5})]
    _, table, rest = report.score_table(found, Asked.of("text", {"by": "eval", "data": "data/a"}))
    assert table.splitlines()[0] == "| objective | finished | loss (nats per target) |"
    assert rest.splitlines()[2:] == ["- mdlm: bits_per_byte_bound 2.5"]
    some = [line("clm", 3.0, **{"text/bits_per_byte": 2.0}), line("mdlm", 5.0)]
    *_, note = report.score_table(some, Asked.of("text", {"by": "eval", "data": "data/a"}))
    assert note == "The picture is of bits_per_byte; not in it: mdlm."
    assert report.curves(found).axes[0].get_ylabel() == "loss"
    begins = report.Line({}, [{"status": "running"}], [History()])
    assert report.curves([*found, begins]).axes[0].get_ylabel() == "loss", "a run without a step is of no scale"
    panel = report.curves([*found, line("electra", 26.0), begins]).axes[1]
    assert panel.get_ylabel() == "loss / training loss of the first step"
    assert {float(drawn.get_ydata()[0]) for drawn in panel.lines} == {0.5}


def test_what_equals_what_is_read_off_between_budgets():
    """The second way needs four times the tokens, by the logarithm of which scores grow here, and never gets to the last."""

    def line(name, tokens, accuracies):
        rows = [
            {"seed": seed, "status": "finished", "tokens": tokens, "loss_tokens": tokens // 2, "files/accuracy": accuracy}
            for seed, accuracy in enumerate(accuracies)
        ]
        return report.Line({"objective": name, "tokens": str(tokens)}, rows, [])

    first = [line("clm", 1000 * 2**i, [0.3 + 0.1 * i] * 2) for i in range(3)]
    second = [line("mlm", 1000 * 2**i, [0.1 + 0.1 * i, 0.1 + 0.1 * i]) for i in (1, 2, 3)]
    asked = Asked.of("files", {"by": "probe", "texts": "passages.tsv"})
    _, text = report.to_equal_quality([*first, *second], asked)
    never = "more than 8,000 (more than 2.00 x) | more than 4,000 (more than 2.00 x)"
    assert text.splitlines()[2:] == [
        "| 30.00%: 1,000 tokens, 500 of them scored | 4,000 (4.00 x) | 2,000 (4.00 x) |",
        "| 40.00%: 2,000 tokens, 1,000 of them scored | 8,000 (4.00 x) | 4,000 (4.00 x) |",
        f"| 50.00%: 4,000 tokens, 2,000 of them scored | {never} |",
    ]
    first[1] = line("clm", 2000, [0.35, 0.39])
    _, text = report.to_equal_quality([*first, *second], asked)
    assert "2,000 tokens, 1,000 of them scored | 6,561 (3.28 x, 2.83 to 3.73) |" in text, "the first has its own noise"
    never = [line("mlm", 1000 * 2**i, [0.1 + 0.1 * i, 0.1]) for i in (1, 2, 3)]
    _, text = report.to_equal_quality([*first, *never], asked)
    assert "500 of them scored | 4,000 to more than 8,000 (4.00 to more than 8.00 x) |" in text, "no mean of what is unknown"
    early = [line("mlm", 1000 * 2**i, [0.1 + 0.1 * i, 0.35 + 0.1 * i]) for i in (1, 2, 3)]
    assert "500 of them scored | less than 2,000 to 4,000 (less than 2.00 to 4.00 x) |" in "".join(
        report.to_equal_quality([*first, *early], asked)
    )
    second[1].rows.pop()  # of the second seed a straight line from 2,000 to 8,000 would be none of its own
    second[0].rows[1]["files/accuracy"] = 0.25
    assert "500 of them scored | 4,000 (4.00 x) |" in "".join(report.to_equal_quality([*first, *second], asked))
    assert not list(report.to_equal_quality(first, asked)), "there is nothing to hold it against"
    assert next(iter(report.to_equal_quality([*second, *first], asked))) and "less than 1,000" in "".join(
        report.to_equal_quality([*second[:2], *first], asked)
    )


@pytest.mark.parametrize("scores, message", [
    ({"works": {"by": "prob"}}, "unknown score 'prob': did you mean 'probe'"),
    ({"works": {"by": "probe", "text": "a"}}, "scores.works: .*(of probe)"),
    ({"works": {"texts": "a"}}, "unknown score ''"),
])  # fmt: skip
def test_scores_that_are_none_are_refused_with_the_sweep(run_file, tmp_path, scores, message):
    with pytest.raises(ConfigError, match=message):
        read(str(sweep_file(run_file, tmp_path / "none", {"seed": [0]}, scores=scores)))


def test_an_edit_of_a_sweep_or_its_base_changes_no_cell_that_waits(run_file, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\nfor last; do :; done\necho $last\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    own = tmp_path / "run.yaml"
    own.write_text(run_file.read_text())
    base = sweep_file(own, tmp_path / "base", {"seed": [0, 1, 2]})
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "output": str(tmp_path / "out"), "set": {"train.max_steps": 4}}))
    spec = read(str(path))
    kept = cells.submit(spec, spec.cells[1:], 2, [])
    for each in (base, path):
        each.write_text("")
    assert read(kept).cells == spec.cells
    own.write_text(run_file.read_text().replace("warmup_steps: 2", "warmup_steps: 3"))
    with pytest.raises(ValueError, match=r"seed=1 was run with other settings \(optimizer.warmup_steps: 2 -> 3\)"):
        cells.train(read(kept).cells[1])
    assert cells.state(read(kept).cells[1]).status == "waiting", "here, or submitted again, it may have them"
    cells.note(read(kept).cells[1], "failed", "its settings")  # as the batch script says
    assert cells.state(read(kept).cells[1]).status == "failed" and cells.todo(read(kept), again=True), "nothing was trained"


def test_a_refused_array_leaves_what_was_known(run_file, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    spec = read(str(sweep_file(run_file, tmp_path / "sweep", {"seed": [0, 1]})))
    cells.note(spec.cells[0], "failed", "it diverged")
    with pytest.raises(ValueError, match="sbatch refuses the array: invalid partition"):
        cells.submit(spec, spec.cells, 1, [])
    assert cells.state(spec.cells[0]).reason == "it diverged" and not cells.noted(spec.cells[1].folder)


def test_what_a_cell_was_run_with(run_file, tmp_path):
    """A checkpoint before the first logged step counts; the positions of weights that came in grow; files of other versions."""
    cell = read(str(sweep_file(run_file, tmp_path / "sweep", {"seed": [0]}))).cells[0]

    def with_its(**changed):
        return SimpleNamespace(folder=cell.folder, config=cell.config.model_copy(update=changed))

    cells.note(cell, "stopped")
    assert cells.state(with_its(seed=5)).status == "waiting"
    (cell.folder / "checkpoints" / "step-5").mkdir(parents=True)
    assert cells.state(cell).status == "stopped"
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 -> 5\)"):
        cells.state(with_its(seed=5))
    for init, agrees in (("weights", True), (None, False)):
        models = [cell.config.model.model_copy(update={"positions": n}) for n in (128, 256)]
        begun, gone_on = (with_its(init=init, model=model) for model in models)
        cells.note(begun, "stopped")
        with contextlib.nullcontext() if agrees else pytest.raises(ValueError, match=r"model\.positions: 128 -> 256"):
            cells.state(gone_on)
    (cell.folder / "cell.json").write_text(json.dumps({"status": "stopped", "reason": "", "settings": {"optimizer.lr": 1}}))
    with pytest.raises(ValueError, match=r"cell\.json is of another version .* remove this file"):
        cells.state(cell)


def test_a_cell_on_another_number_of_ranks_is_refused(run_file, tmp_path):
    """Its world would not be the one that the table tells."""
    cell = read(str(sweep_file(run_file, tmp_path, {"seed": [0]}, ranks=2))).cells[0]
    with pytest.raises(ValueError, match="seed=0 is a cell of 2 ranks, this job has 1: start it by `ds-pretrain sweep run`"):
        cells.train(cell)
    assert not cell.folder.exists()


def test_a_disk_that_has_room_for_each_cell_but_not_for_all_is_told_before_the_first(run_file, tmp_path, monkeypatch):
    saves = {"train.max_steps": 40, "train.save_every": 10, "train.keep": 2}
    many = read(str(sweep_file(run_file, tmp_path, {"seed": [0, 1, 2, 3]}, set=saves))).cells
    size = checkpoint_size(many[0].config, tokenizer_size(many[0].config))
    room = SimpleNamespace(free=0)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: room)

    def takes(checkpoints, cells_, at_once):
        room.free = checkpoints * size
        cells.check_disk(cells_, at_once)
        room.free -= 1
        with pytest.raises(ValueError, match=rf"the checkpoints of 4 cells will take {checkpoints * size / 1e9:.1f} GB more"):
            cells.check_disk(cells_, at_once)

    takes(9, many, 1)  # two each are kept, one is written beside them
    takes(11, many, 3)
    (many[0].folder / "checkpoints" / "step-10").mkdir(parents=True)
    takes(8, many, 1)
    takes(4, read(str(sweep_file(run_file, tmp_path / "last", {"seed": [0, 1, 2, 3]}, set={"train.save_every": 0}))).cells, 3)
    cells.check_disk([], 1)
