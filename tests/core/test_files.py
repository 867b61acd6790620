"""Files that are whole or not there, and files that one process holds."""

import subprocess
import sys

import pytest

from ds_pretrain.core.files import BusyError, held, hold, whole

HOLDER = """
import sys, time
from pathlib import Path
from ds_pretrain.core.files import hold
file = hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    with whole(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), whole(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE)
    try:
        assert not held(tmp_path / "none")
        holder.stdout.readline()
        assert held(path)
        with pytest.raises(BusyError, match=rf"is in use by process {holder.pid} on \S+, since 2"):
            hold(path)
    finally:
        holder.kill()
        holder.wait()
    assert not held(path)
    with hold(path):
        assert "process" in path.read_text()
