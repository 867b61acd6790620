"""The examination of three hosts: a slow cable, a private folder, other sources, hosts that do not reach each other; each is
named, and nothing hangs."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts, missing, needed

import ds_pretrain
from ds_pretrain.core.exits import MISTAKE

NAMES = ("host1", "host2", "host3")
MBIT = 40
JOB = """
import json, sys, time
from pathlib import Path
import torch.distributed as dist
from rich.console import Console
from ds_pretrain.parallel import doctor, links
from ds_pretrain.parallel.mesh import start

output, seconds, parted = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
where, told = start(), {}
doctor.SEEN, links.LIMIT = 3.0, 5.0

def reach(name):
    try:
        links.reach(dist.PrefixStore(name, doctor._get_default_store()), where)
        return []
    except ConnectionError as error:
        return error.found

if parted.is_dir():
    told["joined"] = reach("joined")
    (parted / f"ready{where.rank}").touch()
    while not (parted / "now").exists():
        time.sleep(0.1)
    told["parted"] = reach("parted")
found = doctor.examine(output, seconds)
if where.rank == 0:
    for table in found.tables():
        Console(file=sys.stderr, width=120).print(table)
told["rates"] = {f"{found.nodes[link.source]}>{found.nodes[link.target]}": link.rate for link in found.links}
print(json.dumps({"problems": found.problems(), "warnings": found.warnings(), **told}))
"""


@pytest.fixture(scope="module")
def hosts():
    needed(missing())
    with Hosts(*NAMES) as made:
        yield made


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A file, not a -c: that would look for the package in the working directory first."""
    path = tmp_path_factory.mktemp("job") / "job.py"
    path.write_text(JOB)
    return path


def started(hosts, script, output, seconds, parted="-", **env):
    """A rank on each host; env: of single hosts."""
    meet = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "12345", "LOCAL_RANK": "0", "WORLD_SIZE": str(len(NAMES))}
    command = [sys.executable, script, output, seconds, parted]
    return [hosts.start(host, command, RANK=str(rank), **meet, **env.get(host, {})) for rank, host in enumerate(NAMES)]


def ended(ranks):
    """What they agree on."""
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), told
    print(told[0])
    found = [json.loads(text.splitlines()[-1]) for text in told]
    assert all(each == found[0] for each in found)
    return found[0]


def test_a_slow_cable_is_named_and_measured(hosts, script, tmp_path):
    hosts.limit("host3", MBIT)
    try:
        found = ended(started(hosts, script, tmp_path / "out", 5))
    finally:
        hosts.limit("host3", 0)
    assert found["problems"] == []
    assert [text.split()[0] for text in found["warnings"] if " is slow: " in text] == ["host3"]
    limited = [rate for pair, rate in found["rates"].items() if "host3" in pair]
    assert len(limited) == 4 and limited == pytest.approx([MBIT / 8 * 1e6] * 4, rel=0.25)
    assert min(found["rates"]["host1>host2"], found["rates"]["host2>host1"]) > 3 * MBIT / 8 * 1e6
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_everything_that_is_wrong_with_hosts_is_told_at_once(hosts, script, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    shutil.copytree(Path(ds_pretrain.__file__).parent, other / "ds_pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "ds_pretrain" / "__init__.py").open("a") as file:
        file.write("# not committed\n")
    hosts.run("host2", ["mount", "-t", "tmpfs", "tmpfs", out])
    hosts.run("host3", ["mount", "--bind", out, out])
    hosts.run("host3", ["mount", "-o", "remount,ro,bind", out])
    problems = ended(started(hosts, script, out, 0, host2={"PYTHONPATH": str(other)}))["problems"]
    sources, readonly, private = problems
    assert sources.startswith("sources: ") and " on host2, but " in sources and "on host1, host3" in sources
    assert private.startswith(
        f"what host1 has written in output {out} is not there on host2 ({out}): output is not on a shared"
    )
    assert readonly.startswith(f"output {out} cannot be written on host3 (Read-only file system): ")
    assert [*out.iterdir()] == []


def test_a_job_on_hosts_that_share_no_output_never_trains(hosts, run_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    hosts.run("host2", ["mount", "-t", "tmpfs", "tmpfs", out])
    meet = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "12346", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "ds_pretrain", "train", run_file, f"output={out}"]
    ranks = [hosts.start(host, command, RANK=str(rank), **meet) for rank, host in enumerate(NAMES[:2])]
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [MISTAKE, MISTAKE], told
    assert "the nodes of this job: 1 problem" in told[0] and f"is not there on host2 ({out})" in told[0], told[0]
    assert [*out.iterdir()] == []


def test_hosts_that_do_not_reach_each_other_are_named_and_the_job_ends(hosts, script, tmp_path):
    ranks = started(hosts, script, tmp_path / "out", 2, tmp_path)
    deadline = time.monotonic() + 90
    while len([*tmp_path.glob("ready*")]) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    hosts.part("host2", "host3")
    try:
        (tmp_path / "now").touch()
        found = ended(ranks)
    finally:
        hosts.rejoin("host2", "host3")
    [problem] = found["problems"]
    assert problem.startswith("host2 and host3 do not get through to each other (Timed out waiting 5000ms")
    pairs, fix = found["parted"]
    assert "host2 cannot open a connection to host3 (10.77.0.3): no answer within 5 s" in pairs
    assert "host3 cannot open a connection to host2 (10.77.0.2)" in pairs and "host1" not in pairs and "firewalls" in fix
    assert found["joined"] == []
