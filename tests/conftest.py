"""What many tests share: no network, few threads, one small prepared corpus, one mesh of this process."""

import os
import pydoc_data.topics
import sysconfig
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from ds_pretrain.curation.prepare import prepare

torch.set_num_threads(1)
LONG = (
    "test_slurm",
    "test_parity",
    "test_traffic",
    "test_memory",
    "test_resume",
    "test_mutants",
    "test_launchers",
    "test_sick_hosts",
)
"""Files that take minutes, begun first so that neither of two workers is left with one at the end."""


def pytest_collection_modifyitems(items) -> None:
    places = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_terminal_summary(terminalreporter) -> None:
    """What a cluster does to a run, and how long each took."""
    if took := [report for report in terminalreporter.getreports("passed") if "/cluster/" in report.nodeid]:
        terminalreporter.section("on a cluster, seconds")
        for report in took:
            terminalreporter.write_line(f"{report.duration:6.0f}  {report.nodeid.partition('::')[2]}")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """About 400 KB of the standard library's own text, a file per document."""
    folder = tmp_path_factory.mktemp("text")
    for name, text in sorted(pydoc_data.topics.topics.items())[:60]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:25]:
        (folder / f"{path.stem}.py.txt").write_text(path.read_text(encoding="utf-8")[:16000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory) -> Path:
    """The same, prepared with a vocabulary of 1,000."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    prepare([str(corpus)], folder, vocab_size=1000, split=(0.8, 0.1, 0.1), quiet=True)
    return folder


@pytest.fixture
def fp16(monkeypatch):
    """fp16 on the CPU, which DeepSpeed otherwise refuses for its slowness."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr("ds_pretrain.training.deepspeed_json._cuda", lambda: True)


@pytest.fixture(scope="session")
def mesh():
    """A mesh of this process alone."""
    from ds_pretrain.parallel.mesh import Mesh
    from ds_pretrain.parallel.plan import ParallelPlan

    return Mesh.build(ParallelPlan())
