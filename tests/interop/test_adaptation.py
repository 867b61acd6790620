"""Domain adaptation as the shipped run file has it: from weights of transformers, both texts evaluated on the way."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import theirs
import torch
import transformers
from typer.testing import CliRunner

from ds_pretrain.cli import app
from ds_pretrain.curation.prepare import prepare
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.interop.commands import bring_in
from ds_pretrain.interop.tokenizer import save_tokenizer
from ds_pretrain.objectives import create
from ds_pretrain.sweep.spec import read
from ds_pretrain.training.checkpoint import Snapshot

STEPS = 6
ROOT = Path(__file__).parents[2]


def evaluations(output):
    """Losses by split and step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {(line["split"], line["step"]): line["loss"] for line in lines if "split" in line}


@pytest.fixture
def place(corpus, data, tmp_path, monkeypatch, request):
    """A folder with what the shipped run asks for: imported weights, a domain and general text, of one tokenizer. Its
    parameter: rows of the embedding that are of no id."""
    tokenizer = TextTokenizer.load(data / "tokenizer")
    shape = {**theirs.LLAMA, "vocab_size": len(tokenizer) + getattr(request, "param", 0), "max_position_embeddings": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(tmp_path / "hf")
    save_tokenizer(tokenizer, create("clm"), tmp_path / "hf", {"model_max_length": 64})
    monkeypatch.chdir(tmp_path)
    bring_in(tmp_path / "hf", tmp_path / "runs/imported")
    for name in ("python", "general"):
        texts = sorted(str(path) for path in corpus.iterdir() if path.name.endswith(".py.txt") == (name == "python"))
        prepare(texts, f"data/{name}", tokenizer="runs/imported/tokenizer", split=(0.6, 0.2, 0.2), quiet=True)
    return tmp_path


def test_the_shipped_run_adapts_and_both_texts_are_followed(place):
    short = [f"train.max_steps={STEPS}", "train.eval_every=3", "batch.seq_len=64", "optimizer.warmup_steps=2"]
    told = CliRunner().invoke(app, ["train", "adapt", *short, "train.eval_tokens=4000"])
    assert told.exit_code == 0, told.output
    found = evaluations(place / "runs/adapt")
    assert set(found) == {(split, step) for split in ("validation", "validation of data/general") for step in (0, 3, STEPS)}
    assert found["validation", STEPS] < found["validation", 0], "the domain is learned"


@pytest.mark.parametrize("place", [0, 7, 64], indirect=True, ids=["", "some rows to spare", "rows enough"])
def test_a_model_that_came_in_learns_pieces_of_the_domain(place, corpus):
    """The four commands at the head of the run file."""
    tool = [sys.executable, str(ROOT / "tools" / "tokenizer.py")]
    texts = sorted(str(path) for path in corpus.iterdir() if path.name.endswith(".py.txt"))
    subprocess.run([*tool, "extend", "runs/imported/tokenizer", texts[0], "-o", "wider", "--pieces", "20"], check=True)
    prepare(texts, "data/domain", tokenizer="wider", split=(0.6, 0.2, 0.2), quiet=True)
    resize = ["resize", "runs/imported/checkpoints/step-0", "wider", "-o", "runs/wider", "--data", "data/domain"]
    told = subprocess.run([*tool, *resize], check=True, capture_output=True, text=True).stdout
    command = shlex.split(told.rpartition("next: ds-pretrain ")[2])
    was, now = (Snapshot(Path(f"runs/{name}/checkpoints/step-0")) for name in ("imported", "wider"))
    ids, rows = (len(TextTokenizer.load(Path(name))) for name in ("runs/imported/tokenizer", "wider"))
    old, new = (each.whole("word.weight") for each in (was, now))
    assert len(new) == max(rows, len(old)) and torch.equal(new[:ids], old[:ids]) and torch.equal(new[rows:], old[rows:])
    parts = json.loads(Path("wider/pieces.json").read_text())["parts"]
    assert len(parts) == rows - ids and torch.allclose(new[ids], old[parts[0]].mean(0))
    assert command[:3] == ["train", "adapt", "init=runs/wider"], told
    ran = CliRunner().invoke(app, [*command, f"train.max_steps={STEPS}", "batch.seq_len=64", "optimizer.warmup_steps=2"])
    assert ran.exit_code == 0 and "begins with the weights of runs/wider" in ran.output, ran.output


def test_the_sweep_with_and_without_replay_has_only_sound_cells(place):
    cells = [cell for cell in read("adaptation").cells if cell.labels["model"] == "generator"]
    assert {cell.labels["replay"] for cell in cells} == {"with", "without"} and len(cells) == 6
    assert not [problem for cell in cells for problem in cell.problems()]
