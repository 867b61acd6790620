"""One file outside the package is an objective like any other: in the list, the preview, the trainer and the laws."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_pretrain.objectives import plugins

TESTS = Path(__file__).parents[1]
FILE = TESTS / "plugin" / "backwards.py"


def started(*command, plugin=FILE):
    environment = {**os.environ, plugins.VARIABLE: str(plugin)}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=TESTS.parent)


def test_it_is_in_the_list():
    assert "backwards" in started("ds_pretrain", "list", "objectives").stdout
    assert "backwards" not in started("ds_pretrain", "list", "objectives", plugin="").stdout


def test_it_trains_and_is_previewed(data, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{layers: 1, hidden: 32, heads: 2}}\nobjective: {{name: backwards}}\ndata: {{path: {data}}}\n"
        f"batch: {{global_size: 4, seq_len: 32}}\noptimizer: {{warmup_steps: 1}}\ntrain: {{max_steps: 2}}\n"
        f"output: {tmp_path / 'out'}\n"
    )
    done = started("ds_pretrain", "train", str(run))
    assert done.returncode == 0, done.stderr
    assert "backwards" in (tmp_path / "out" / "metrics.jsonl").read_text()
    shown = started("ds_pretrain", "preview", str(run))
    assert shown.returncode == 0 and "targets of backwards" in shown.stdout, shown.stderr


def test_the_laws_cover_it():
    laws = [f"tests/{path}" for path in ("objectives/test_objectives.py", "data/test_dataset.py", "training/test_leaks.py")]
    done = started("pytest", "-k", "backwards", "-p", "no:cacheprovider", "-v", *laws)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20


@pytest.mark.parametrize(("name", "said"), [("absent.py", "no such file"), ("no_such_module", "No module named")])
def test_one_that_does_not_import_is_named(monkeypatch, name, said):
    monkeypatch.setenv(plugins.VARIABLE, name)
    with pytest.raises(ValueError, match=f"plug-in {name} .*{said}"):
        plugins.load()
