"""A wider vocabulary under every layout: old rows to the bit, old logits, new rows by the rule, and training goes on."""

import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ds_pretrain.cli
from ds_pretrain.curation.prepare import prepare
from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.data.extend import extend
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training import checkpoint, state
from ds_pretrain.training.checkpoint import Snapshot, damages
from ds_pretrain.training.inference import FrozenModel
from ds_pretrain.training.resize import SPREAD, new_rows, resize
from ds_pretrain.training.trainer import PreTrainer

SIZE = {"layers": 2, "hidden": 32, "heads": 4, "positions": 32, "dropout": 0.0}
MODELS = {
    "clm": ModelConfig(**SIZE, tie_embeddings=False),
    "mlm": ModelConfig(preset="bert-1m", **SIZE),
    "electra": ModelConfig(preset="bert-1m", **SIZE),
}
ROWS = {
    "clm": {"word.weight", "output.weight"},
    "mlm": {"word.weight", "head.output_bias.bias"},
    "electra": {"word.weight", "generator.head.output_bias.bias"},
}
NEW = "zygomorphic actinomorphic zygomorphy "
LAYOUTS = {"clm": ParallelPlan(pipeline=2), "mlm": ParallelPlan(tensor=2), "electra": ParallelPlan()}


def trainer(data, output, objective, plan=ParallelPlan(), steps=3, **more):
    dataset = PretrainingDataset(data, seq_len=32, objective=objective)
    return PreTrainer(
        model=MODELS[objective], objective=dataset.objective, dataset=dataset, plan=plan, batch_size=4, max_steps=steps,
        deepspeed={"zero_optimization": {"stage": 1}}, output=output, progress=False, **more,
    )  # fmt: skip


def on_two_ranks(data, folder, wider):
    """Train under three layouts, resize on the first rank, and answer on two tensor ranks."""
    found = {}
    for objective, plan in LAYOUTS.items():
        made = trainer(data, folder / objective, objective, plan)
        made.train()
        if made.mesh.rank == 0:
            step = folder / objective / "checkpoints" / "step-3"
            resize(step, folder / f"{objective}-wider", len(wider.tokenizer), wider.parts)
            resize(step, folder / f"{objective}-drawn", len(wider.tokenizer))
        made.mesh.barrier()
        if objective != "electra":  # whose generator has one head
            found[objective] = logits(folder, objective, made.objective, ParallelPlan(tensor=2))
    return found


def logits(folder, name, objective, plan):
    """Of the same tokens before and after."""
    tokens = torch.randint(300, 1000, (3, 16), generator=torch.Generator().manual_seed(0))
    models = [FrozenModel(folder / f"{name}{kind}", objective, plan) for kind in ("", "-wider")]
    return [model.logits_at(tokens, torch.ones_like(tokens, dtype=torch.bool)) for model in models]


@pytest.fixture(scope="module")
def wider(data):
    old = TextTokenizer.load(data / "tokenizer")
    return extend(old, [NEW * 5], 21)  # 1,021 ids: odd, so that two tensor ranks need padding


@pytest.fixture(scope="module")
def runs(data, wider, tmp_path_factory):
    """A folder of runs and their resized checkpoints, and logits from two tensor ranks."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, spawn(2, on_two_ranks, data, folder, wider)


def pair(runs, objective, kind="wider"):
    return (Snapshot(runs[0] / name / "checkpoints" / "step-3") for name in (objective, f"{objective}-{kind}"))


@pytest.mark.parametrize("objective", LAYOUTS)
@pytest.mark.parametrize("kind", ["wider", "drawn"])
def test_only_the_vocabulary_has_grown(runs, wider, objective, kind):
    old, new = pair(runs, objective, kind)
    assert damages(new.path) == [] and set(new.index) == set(old.index) and len(old.index) > 40
    assert new.manifest["model"] == old.manifest["model"] | {"vocab": len(wider.tokenizer)}
    grown = set()
    for name, moment in old.index:
        a, b = old.whole(name, moment), new.whole(name, moment)
        assert torch.equal(a, b[: len(a)])
        if len(b) > len(a):
            grown.add(name)
            assert len(b) == len(wider.tokenizer) and len(a) == wider.first
            if moment != "master":
                assert not b[len(a) :].any() and a.any()
            elif kind == "wider":
                expected = np.stack([a.numpy()[list(ids)].mean(0) for ids in wider.parts])
                assert np.allclose(b[len(a) :].numpy(), expected, atol=1e-7)
    assert grown == ROWS[objective]


def test_what_was_resized_twice_grew_from_what_it_was_first(runs, wider, tmp_path):
    _, new = pair(runs, "clm")
    vocab = len(wider.tokenizer)
    again = Snapshot(resize(new.path, tmp_path, vocab + 5)).manifest
    assert (again["resized"], again["origin"]["ids"]) == ({"from": wider.first}, vocab + 5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["clm", "mlm"])
def test_old_logits_stay_and_new_ones_are_the_mean_of_their_parts(data, runs, wider, name, ranks):
    folder, on_two = runs
    objective = PretrainingDataset(data, seq_len=32, objective=name).objective
    old, new = logits(folder, name, objective, ParallelPlan()) if ranks == 1 else on_two[name]
    assert old.shape[1] == wider.first and new.shape[1] == len(wider.tokenizer) and old.std() > 0.01
    assert (new[:, : wider.first] - old).abs().max() <= 1e-6
    means = torch.stack([old[:, list(ids)].mean(1) for ids in wider.parts], 1)
    assert (new[:, wider.first :] - means).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(4000, 6), (4000,)])
def test_drawn_rows_have_the_mean_and_a_billionth_of_the_covariance(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e4  # so that fp32 resolves the spread
    rows = rows @ torch.triu(torch.ones(6, 6)) if len(shape) > 1 else rows
    drawn = new_rows(rows, 20_000, None, torch.Generator().manual_seed(2)).double()
    rows = rows.double()
    noise = (drawn - rows.mean(0)).view(20_000, -1)
    covariance = torch.cov(rows.view(4000, -1).T, correction=0).view(noise.shape[1], -1) * SPREAD
    scale = covariance.diagonal().max()
    assert (noise.T @ noise / 20_000 - covariance).abs().max() < 0.08 * scale + 1e-7
    again = [new_rows(rows, 5, None, torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_drawn_rows_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with torch.no_grad():
        rows = model.get_input_embeddings().weight.mul_(100).add_(5).clone()
    theirs = model.resize_token_embeddings(340, mean_resizing=True).weight.detach()[300:]
    ours = new_rows(rows, 40, None, torch.Generator().manual_seed(0))
    spread = rows.std(0) * SPREAD**0.5
    assert ((ours - theirs).abs() < 8 * spread + 2e-6).all() and (ours - rows.mean(0)).abs().max() > 0


def test_a_token_that_nothing_spells_gets_the_mean_of_all():
    rows = torch.arange(12.0).view(6, 2)
    made = new_rows(rows, 2, [(), (0, 2)], torch.Generator())
    assert made.tolist() == [[5, 6], [2, 3]]


def test_training_goes_on_over_the_new_data_and_elsewhere_is_refused(corpus, runs, wider, tmp_path):
    wider.tokenizer.save(tmp_path / "tokenizer")
    data = prepare([str(corpus)], tmp_path / "data", tokenizer=tmp_path / "tokenizer", split=(0.8, 0.1, 0.1), quiet=True).output
    digest = PretrainingDataset(data, seq_len=32, objective="clm").digest
    step = runs[0] / "clm" / "checkpoints" / "step-3"
    resize(step, tmp_path / "run", len(wider.tokenizer), wider.parts, digest)
    run = trainer(data, tmp_path / "run", "clm", steps=5)
    assert run.step == 3 and run.cursor.row == 0 and run.model.build.model.vocab == len(wider.tokenizer)
    fragment = next(f for f in state.fragments(run.model) if f.shard.name == "word.weight")
    assert fragment.views["exp_avg"].any() and not fragment.views["exp_avg"].view(-1, 32)[wider.first :].any()
    run.train()
    assert run.step == 5
    shutil.copytree(runs[0] / "clm-wider", tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained with clm on data .*, resized, this run has"):
        trainer(data, tmp_path / "other", "clm")


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(Path(ds_pretrain.__file__).parents[1] / "tools" / "tokenizer.py"))


def said(app, *words):
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_tool_tells_the_command_that_goes_on(data, corpus, wider, tool, tmp_path):
    small = {"model.layers": 1, "model.hidden": 32, "batch.seq_len": 32, "optimizer.warmup_steps": 0, "data.path": data}
    said(
        ds_pretrain.cli.app,
        "train",
        "quickstart",
        *(f"{k}={v}" for k, v in small.items()),
        "train.max_steps=2",
        f"output={tmp_path / 'run'}",
    )
    wider.save(tmp_path / "wider")
    more = tmp_path / "more data"
    prepare([str(corpus)], more, tokenizer=tmp_path / "wider", split=(0.8, 0.1, 0.1), quiet=True)
    words = ["resize", tmp_path / "run" / "checkpoints" / "step-2", tmp_path / "wider", "-o"]
    told = said(tool["app"], *words, tmp_path / "resized", "--data", more)
    program, *command = shlex.split(told.partition("next: ")[2])
    assert program == "ds-pretrain" and command == ["train", str(tmp_path / "resized" / "run.yaml"), "train.max_steps=4"]
    assert "trained to step 4" in said(ds_pretrain.cli.app, *command)
    told = said(tool["app"], *words, tmp_path / "no data")
    assert shlex.split(told.partition("next: ")[2].partition("\n")[0])[-2:] == ["--tokenizer", str(tmp_path / "wider")]
    digest = PretrainingDataset(more, seq_len=32, objective="clm").digest
    told = said(tool["app"], *words, tmp_path / "by digest", "--data", digest)
    command = [word.replace("DATA", str(more)) for word in shlex.split(told.partition("next: ")[2])[1:]]
    assert "trained to step 3" in said(ds_pretrain.cli.app, *command, "train.max_steps=3")
    for wrong, why in (
        (data, "was prepared with another tokenizer"), (tmp_path, "holds no prepared data"), (more, "run.yaml exists"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            said(tool["app"], *words, tmp_path / ("resized" if wrong == more else "not made"), "--data", wrong)
    assert not (tmp_path / "not made").exists()


def test_impossible_requests_say_so(runs, wider, tmp_path):
    step = runs[0] / "clm" / "checkpoints" / "step-3"
    with pytest.raises(ValueError, match=r"1000 ids, 1000 are asked for: a vocabulary grows only"):
        resize(step, tmp_path, 1000)
    with pytest.raises(ValueError, match=r"1003 ids are 3 more than .* but 2 are spelled out"):
        resize(step, tmp_path, 1003, [(1,), (2,)])
    with pytest.raises(ValueError, match=r"spelled with id 1000, .* has ids below 1000"):
        resize(step, tmp_path, 1001, [(1000,)])
    with pytest.raises(ValueError, match="step-3 exists: choose another output"):
        resize(step, runs[0] / "clm", 1001)
    shutil.copytree(step, tmp_path / "step-3")
    next((tmp_path / "step-3").glob("*.safetensors")).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is not a sound checkpoint: .*safetensors: has 1 bytes"):
        resize(tmp_path / "step-3", tmp_path / "new", 1001)
    assert not (tmp_path / "new").exists() and not (tmp_path / "checkpoints").exists()


def test_a_full_disk_leaves_nothing(runs, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        resize(runs[0] / "clm" / "checkpoints" / "step-3", tmp_path, 1001)
    assert list((tmp_path / "checkpoints").iterdir()) == []
