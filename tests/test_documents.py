"""Commands in the documents are legal for the ranks that they start."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from ds_pretrain.config import configs, load_run

ROOT = Path(__file__).parents[1]
GPUS = 8
"""Of a node of a cluster."""


def commands():
    """(file, command, ranks, run, overrides) of every line that plans or trains a shipped run."""
    for path in (ROOT / "README.md", ROOT / "launchers" / "README.md"):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:\$ )?((?:ds-pretrain|launchers/|torchrun|sbatch) ?.*\b(?:train|plan) \w+.*)$", text, re.M):
            words = shlex.split(line, comments=True)
            at = words.index("train") if "train" in words else words.index("plan")
            run, *rest = words[at + 1 :]
            if (configs() / "runs" / f"{run}.yaml").is_file():
                yield path.name, line, ranks(words), run, [word for word in rest if re.match(r"[a-z_.]+=", word)]


def ranks(words):
    """What a command starts."""
    told = dict(itertools.pairwise(words))
    if words[0] == "sbatch":
        return int(told["-N"]) * int(next((word.partition("=")[2] for word in words if "ntasks-per-node" in word), GPUS))
    return int(told.get("--world") or told.get("-n") or told.get("--nproc_per_node") or 1)


@pytest.mark.parametrize("path, line, world, run, overrides", commands(), ids=str)
def test_a_documented_command_fits_its_ranks(path, line, world, run, overrides):
    kept = [each for each in overrides if not each.startswith("init=")]
    assert load_run(run, kept).check(world, 8192, here=False) == [], line


def test_there_are_such_commands():
    assert len(list(commands())) > 10
