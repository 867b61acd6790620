import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from running import RUN, losses


@pytest.fixture(scope="session")
def run_file(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cluster") / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "data": {"path": str(data)}}))
    return path


@pytest.fixture(scope="session")
def expected(run_file, tmp_path_factory):
    """The losses of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    command = [sys.executable, "-m", "ds_pretrain", "train", run_file, f"output={out}"]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return losses(out)
