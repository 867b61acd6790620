"""What was trained goes out whole: weights, tokenizer, card; and a run begins with the weights of another."""

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
import theirs
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from ds_pretrain import use
from ds_pretrain.cli import app
from ds_pretrain.config import ConfigError, load_run
from ds_pretrain.core.batch import Document
from ds_pretrain.curation.prepare import prepare
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.evaluation import generate as evaluation
from ds_pretrain.evaluation.generate import ends_of, no_text
from ds_pretrain.interop.commands import bring_in, send_out
from ds_pretrain.interop.tokenizer import save_tokenizer
from ds_pretrain.objectives import create
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.runs import load_model, load_tokenizer, make_trainer, open_run, problems
from ds_pretrain.training import checkpoint, deepspeed_json, state
from ds_pretrain.training.checkpoint import Snapshot
from ds_pretrain.training.engine import build_for, create_engine
from ds_pretrain.training.optimizer import OptimizerConfig

SHAPES = {
    "clm": {"preset": "gpt2-small", "layers": 2, "hidden": 64, "heads": 4, "dropout": 0.0},
    "fim": {"preset": "llama-1m", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2},
    "mlm": {"preset": "bert-1m", "layers": 2},
    "bert": {"preset": "bert-1m", "layers": 2},
    "albert": {"preset": "bert-1m", "layers": 2},
    "simcse": {"preset": "bert-1m", "layers": 2},
    "mdlm": {"preset": "bert-1m", "layers": 2},
    "electra": {"preset": "bert-1m", "layers": 2},
}
ARCHITECTURES = {
    "clm": "GPT2LMHeadModel", "fim": "LlamaForCausalLM", "mlm": "BertForMaskedLM", "bert": "BertForPreTraining",
    "albert": "AlbertForPreTraining", "simcse": "BertModel", "mdlm": "BertForMaskedLM", "electra": "ElectraForPreTraining",
}  # fmt: skip


def run_file(folder, data, objective, **more):
    path = folder / f"{objective}.yaml"
    values = {
        "model": SHAPES[objective], "objective": {"name": objective}, "data": {"path": str(data)},
        "batch": {"global_size": 8, "seq_len": 64}, "train": {"max_steps": 3, "eval_every": 3},
        "optimizer": {"warmup_steps": 1}, "output": str(folder / f"{objective} run"), **more,
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return str(path)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A few steps of every objective whose network others know, and the folders that they went out into."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for objective in SHAPES:
        trainer = make_trainer(*open_run(run_file(folder, data, objective), []))
        trainer.progress = False
        trainer.train()
        found[objective] = folder / f"{objective} run", send_out(folder / f"{objective} run", folder / f"{objective} out")
    return found


@pytest.mark.parametrize("objective", SHAPES)
def test_a_trained_run_opens_whole(runs, objective):
    output, folders = runs[objective]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        model, told = getattr(transformers, config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
        assert model.config.vocab_size == len(TextTokenizer.load(_data(output)))
    assert json.loads((folders[0] / "config.json").read_text())["architectures"] == [ARCHITECTURES[objective]]
    card = (output.with_name(f"{objective} out") / "README.md").read_text()
    assert f"for `{objective}`" in card and "## Last evaluation" in card and "digest" in card


def _data(output):
    return load_run(str(output / "run.yaml")).data.path + "/tokenizer"


def test_the_exported_model_says_what_ours_says(runs):
    output, (folder,) = runs["clm"]
    model, tokenizer = load_model(str(output)), load_tokenizer(str(output))
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(tokenizer.encode("The import statement finds a module")).long()[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids)[0], exported(ids).logits[0, -1], rtol=0, atol=1e-5)
    said = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**said, "temperature": 0.6, "eos_token_id": [2, 1, 0]}))
    bring_in(folder, output.with_name("back"))
    send_out(output.with_name("back"), output.with_name("again"))
    again = json.loads((output.with_name("again") / "generation_config.json").read_text())
    assert again["temperature"] == 0.6 and again["eos_token_id"] == [2, 1, 0]
    assert TextTokenizer.load(output.with_name("back") / "tokenizer").digest == tokenizer.digest
    assert said["eos_token_id"] == tokenizer.vocabulary.eod


@pytest.mark.parametrize("objective", ["clm", "mlm", "electra"])
def test_the_exported_tokenizer_gives_the_same_ids(runs, objective):
    output, folders = runs[objective]
    ours = TextTokenizer.load(_data(output))
    for folder in folders:
        theirs_ = transformers.AutoTokenizer.from_pretrained(folder)
        text = "To be, or not to be: that is the <mask> question. 漢字"
        assert theirs_(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ours.encode(text).tolist()
        vocab = ours.vocabulary
        assert (theirs_.eos_token_id, theirs_.pad_token_id, theirs_.mask_token_id) == (vocab.eod, vocab.pad, vocab.mask)
        framed = theirs_("one", "two")
        if objective != "clm":
            one, two = (ours.encode(word).tolist() for word in ("one", "two"))
            assert framed["input_ids"] == [vocab.cls, *one, vocab.sep, *two, vocab.sep]
            assert framed["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(two) + 1)


@pytest.mark.parametrize("kind, alike", [("sp_bpe", 1.0), ("unigram", 0.97)])
def test_a_sentencepiece_tokenizer_goes_out_with_its_ids_and_comes_back_itself(kind, alike, tmp_path):
    """Of a unigram model all but texts that two splits are equally likely of."""
    texts = [*topics.values()]
    ours = TextTokenizer.train(iter(texts), 2000, kind)
    save_tokenizer(ours, create("clm"), tmp_path, {"model_max_length": 64})
    theirs_ = transformers.AutoTokenizer.from_pretrained(tmp_path)
    odd = ["", " ", "  a  b\n\tc ", "naïve ☕ 日本語 𝔘", "▁x ▁▁y", "a\r\nb\x00", "e\u0301 \u00a0", "<eod>a<mask>"]
    options = {"add_special_tokens": False, "split_special_tokens": True}
    lines = [line for text in texts for line in text.splitlines()] + odd
    same = [theirs_(line, **options)["input_ids"] == ours.encode(line).tolist() for line in lines]
    assert sum(same) >= alike * len(same) and len(theirs_) == len(ours)
    assert theirs_.eos_token_id == ours.vocabulary.eod and theirs_.decode(ours.encode(odd[2])) == odd[2]
    assert TextTokenizer.load(tmp_path).digest == ours.digest


def foreign(folder, specials, size=400):
    """A byte-level BPE with special tokens of its own names."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        ["a b c"], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=specials)
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))


def test_foreign_special_tokens_keep_their_ids_and_names(tmp_path):
    theirs.save("bert", tmp_path / "bert")
    foreign(tmp_path / "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    bring_in(tmp_path / "bert", tmp_path / "run")
    (out,) = send_out(tmp_path / "run", tmp_path / "out")
    made = transformers.AutoTokenizer.from_pretrained(out)
    assert (made.pad_token, made.cls_token, made.mask_token, made.mask_token_id) == ("[PAD]", "[CLS]", "[MASK]", 4)
    assert len(made) <= 1001


def test_a_causal_tokenizer_has_one_special_token_and_keeps_it_alone(tmp_path, data):
    theirs.save("gpt2", tmp_path / "gpt2")
    foreign(tmp_path / "gpt2", ["<|endoftext|>"])
    bring_in(tmp_path / "gpt2", tmp_path / "run")
    (out,) = send_out(tmp_path / "run", tmp_path / "out")
    made = transformers.AutoTokenizer.from_pretrained(out)
    assert (made.eos_token, made.eos_token_id, made.mask_token) == ("<|endoftext|>", 0, None)
    assert len(made) == len(TextTokenizer.load(tmp_path / "run" / "tokenizer"))
    masked = load_run(str(tmp_path / "run" / "run.yaml"), ["objective.name=mlm", f"data.path={data}"])
    assert any("special tokens that this tokenizer, of a causal model, lacks" in each for each in problems(masked, 1))


def test_texts_of_a_llama_begin_as_they_did(tmp_path):
    """With its own <s>, here and where it goes."""
    foreign(tmp_path / "llama", ["<unk>", "<s>", "</s>", "<|eot|>"])
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(names))
    shape = {**theirs.LLAMA, "vocab_size": len(TextTokenizer.load(tmp_path / "llama", stand_in=True))}
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, eos_token_id=[2, 3])).eval()
    network.save_pretrained(tmp_path / "llama")
    bring_in(tmp_path / "llama", tmp_path / "run")
    ours, model = load_tokenizer(str(tmp_path / "run")), load_model(str(tmp_path / "run"))
    assert (ours.vocabulary.begin, ours.vocabulary.eod) == (1, 2)
    ids = torch.tensor([[1, *ours.encode("a b").tolist()]])
    never = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [0, 1, 2, 3]}
    expected = network.generate(ids, max_new_tokens=8, min_new_tokens=8, **never)[0, ids.shape[1] :].tolist()
    how = ["--prompt", "a b", "--tokens", "8", "--temperature", "0"]
    told = CliRunner().invoke(app, ["generate", str(tmp_path / "run"), *how])
    assert told.output.startswith("a b" + ours.decode(expected[:1])), told.output
    document = np.append(ours.encode("b c a"), ours.vocabulary.eod)
    made = model.objective.example([Document(document)], ours.vocabulary, 64, np.random.default_rng(0))
    assert made.inputs.tolist() == [1, *document[:-1].tolist()]
    (out,) = send_out(tmp_path / "run", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 3]) and config.get("pad_token_id") is None
    left = transformers.AutoTokenizer.from_pretrained(out)
    assert (left.bos_token, left.eos_token) == ("<s>", "</s>")
    assert "imported from" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("said, ends", [(2, [2, 0]), ([2], [2, 0]), ([2, 0], [2, 0]), (0, 0), ([0], 0), (None, 0)])
def test_every_end_that_a_folder_names_ends_a_text_and_goes_out(said, ends, tmp_path):
    """Where its tokenizer names another one, that does too."""
    foreign(tmp_path / "in", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"])
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    shape = {**theirs.LLAMA, "vocab_size": len(TextTokenizer.load(tmp_path / "in", stand_in=True))}
    config = transformers.LlamaConfig(**shape, bos_token_id=0, eos_token_id=said)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    bring_in(tmp_path / "in", tmp_path / "run")
    model, tokenizer = load_model(str(tmp_path / "run")), load_tokenizer(str(tmp_path / "run"))
    assert ends_of(model, tokenizer.vocabulary) == frozenset(ends if isinstance(ends, list) else [ends])
    (out,) = send_out(tmp_path / "run", tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == ends


def test_the_marks_of_infilling_are_known_by_other_names(tmp_path):
    foreign(tmp_path, ["<s>", "</s>", "▁<PRE>", "▁<MID>", "▁<SUF>"])
    names = TextTokenizer.load(tmp_path, stand_in=True).vocabulary.names
    assert [names[f"<fim_{part}>"] for part in ("prefix", "middle", "suffix")] == [2, 3, 4]


def test_a_diffusion_model_with_rows_of_no_id_writes(tmp_path):
    theirs.save("bert", tmp_path / "bert")
    foreign(tmp_path / "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    bring_in(tmp_path / "bert", tmp_path / "run", objective="mdlm")
    told = CliRunner().invoke(app, ["generate", str(tmp_path / "run"), "--prompt", "a b", "--tokens", "20"])
    assert told.exit_code == 0 and told.output.startswith("a b"), told.output


def test_rows_may_be_longer_than_those_of_the_run_it_begins_with(data, runs, tmp_path):
    """Of a model with rotary positions, which then reads and writes as much."""
    trainer = begun(data, runs, tmp_path, "fim", "fim", "batch.seq_len=128")
    assert trainer.shape.positions == 128
    trainer.train()
    (out,) = send_out(tmp_path / "begun", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 128


@pytest.mark.parametrize("said", ["tokenizer", "config"])
def test_texts_end_as_the_folder_says_not_as_a_name_sounds(said, tmp_path, corpus):
    """An assistant's <|im_end|> beside <|endoftext|>; either ends what is generated, and both go out after more training."""
    foreign(tmp_path / "in", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"])
    told = {"chat_template": "{{ messages }}", **({"eos_token": "<|im_end|>"} if said == "tokenizer" else {})}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(told))
    shape = {**theirs.LLAMA, "vocab_size": len(TextTokenizer.load(tmp_path / "in", stand_in=True))}
    config = transformers.LlamaConfig(**shape, bos_token_id=0, eos_token_id=[2, 0])
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    bring_in(tmp_path / "in", tmp_path / "run")
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    assert (tokenizer.vocabulary.eod, tokenizer.vocabulary.begin) == (2, 0)
    prepare([str(corpus)], tmp_path / "data", tokenizer=tmp_path / "run" / "tokenizer", split=(0.8, 0.1, 0.1), quiet=True)
    run = {
        "model": {}, "data": {"path": str(tmp_path / "data")}, "batch": {"global_size": 4, "seq_len": 16},
        "train": {"max_steps": 1}, "optimizer": {"warmup_steps": 0}, "init": str(tmp_path / "run"),
        "output": str(tmp_path / "more"),
    }  # fmt: skip
    (tmp_path / "more.yaml").write_text(json.dumps(run))
    trainer = make_trainer(*open_run(str(tmp_path / "more.yaml"), []))
    trainer.progress = False
    trainer.train()
    model = load_model(str(tmp_path / "more"))
    assert ends_of(model, tokenizer.vocabulary) == {0, 2} == set(no_text(model, tokenizer.vocabulary)) - {1, 3}
    (out,) = send_out(tmp_path / "more", tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    left = transformers.AutoTokenizer.from_pretrained(out)
    assert (left.eos_token, left.bos_token, left.chat_template) == ("<|im_end|>", "<|endoftext|>", "{{ messages }}")


def test_a_generated_text_keeps_the_space_that_it_begins_with(monkeypatch, tmp_path):
    tokenizer = TextTokenizer.train(iter(topics.values()), 800, "sp_bpe")
    word = tokenizer.encode("x the")[-1:].tolist()
    model = SimpleNamespace(objective=create("clm"), origin={}, mesh=SimpleNamespace(rank=0), build=SimpleNamespace(
        model=SimpleNamespace(vocab_size=800)))  # fmt: skip
    monkeypatch.setattr(use, "load_model", lambda output: model)
    monkeypatch.setattr(use, "load_tokenizer", lambda output: tokenizer)
    monkeypatch.setattr(evaluation, "continue_all", lambda *_: iter([word]))
    told = CliRunner().invoke(app, ["generate", str(tmp_path), "--prompt", "The"])
    assert told.output == "The" + tokenizer.decode([*tokenizer.encode("x").tolist(), *word])[1:] + "\n"
    assert " " in told.output, tokenizer.token(word[0])


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    theirs.save("gpt2", tmp_path / "in")
    words = [f"<w{i}>" for i in range(900)]
    foreign(tmp_path / "in", ["<|endoftext|>", *words], size=1200)
    with pytest.raises(ValueError, match=r"has 1159 ids, the embedding 1001 rows"):
        bring_in(tmp_path / "in", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_out_with_its_own_tokenizer_or_not_at_all(data, runs, tmp_path, monkeypatch):
    """However it is looked at and wherever it was moved; another one, or none, in its place is told."""
    output, _ = runs["clm"]
    foreign(tmp_path / "in", ["<|endoftext|>"])
    theirs.save("gpt2", tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    bring_in(Path("in"), Path("run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    (out,) = send_out(tmp_path / "moved", tmp_path / "out")
    own = tmp_path / "moved" / "tokenizer"
    assert TextTokenizer.load(out, stand_in=True).model == TextTokenizer.load(own).model
    shutil.move(own, tmp_path / "kept")
    with pytest.raises(ValueError, match=r"moved/tokenizer does not exist, and .*moved was trained with it"):
        send_out(tmp_path / "moved", tmp_path / "without")
    shutil.copytree(_data(output), own)
    for look in (load_tokenizer, lambda output: send_out(Path(output), tmp_path / "other")):
        with pytest.raises(ValueError, match=r"moved/tokenizer is not the tokenizer that .*moved was trained with: it has"):
            look(str(tmp_path / "moved"))
    assert not (tmp_path / "without").exists() and not (tmp_path / "other").exists()
    shutil.copytree(output, tmp_path / "cut")
    whole = checkpoint.newest(tmp_path / "cut" / "checkpoints")
    cut = shutil.copytree(whole, whole.with_name("step-999"))
    (cut / "manifest.json").write_text("{")
    assert load_tokenizer(str(tmp_path / "cut")).digest == TextTokenizer.load(_data(output)).digest
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match=r"step-999/manifest\.json: not readable as a manifest"):
        load_tokenizer(str(tmp_path / "cut"))
    trained = Snapshot(checkpoint.newest(output / "checkpoints")).manifest
    assert trained["tokenizer"] == TextTokenizer.load(_data(output)).digest


def test_special_ids_stay_where_no_tokenizer_came(tmp_path):
    config = transformers.LlamaConfig(**theirs.LLAMA, bos_token_id=7, eos_token_id=6)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    generation = {"eos_token_id": [6, 8, 9], "pad_token_id": 5, "temperature": 0.6}
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(generation))
    bring_in(tmp_path / "in", tmp_path / "run")
    (out,) = send_out(tmp_path / "run", tmp_path / "out")
    left = transformers.AutoConfig.from_pretrained(out)
    assert (left.bos_token_id, left.eos_token_id, left.pad_token_id) == (7, 6, None)
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 7, **generation}


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    theirs.save("gpt2", tmp_path / "in")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    bring_in(tmp_path / "in", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "run.yaml").is_file()


def begun(data, runs, tmp_path, objective, source, *overrides):
    output = tmp_path / "begun"
    values = [f"init={runs[source][0]}", f"output={output}", "model={}", *overrides]
    trainer = make_trainer(*open_run(run_file(tmp_path, data, objective), values))
    trainer.progress = False
    return trainer


def test_a_run_begins_with_the_weights_and_the_shape_of_another(data, runs, tmp_path):
    trainer = begun(data, runs, tmp_path, "clm", "clm")
    source = Snapshot(checkpoint.newest(runs["clm"][0] / "checkpoints"))
    assert trainer.step == 0 and trainer.shape.hidden == 64 and "begins with the weights of" in trainer.changed
    for shard, parameter in state.local_parameters(trainer.model):
        assert torch.equal(parameter, source.whole(shard.name))
    first = trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "begun" / "metrics.jsonl").read_text().splitlines()]
    before, after = ([line for line in lines if "split" in line and line["step"] == step] for step in (0, 3))
    assert len(before) == len(after) == 1 and before[0]["perplexity"] > after[0]["perplexity"]
    again = begun(data, runs, tmp_path, "clm", "clm")  # goes on with its own checkpoint
    assert again.step == 3 and first is not None


def test_heads_may_differ_and_are_told(data, runs, tmp_path):
    trainer = begun(data, runs, tmp_path, "bert", "mlm")
    assert "fresh: head.classifiers.nsp.dense.bias" in trainer.changed
    (tmp_path / "other").mkdir()
    trainer = begun(data, runs, tmp_path / "other", "mlm", "bert")
    assert "left behind: head.classifiers.nsp.dense.bias" in trainer.changed


def adopted(folder, stage, precision, plan):
    """How far the master and working weights of an engine that began so are from the checkpoint's."""
    source = Snapshot(checkpoint.newest(folder / "checkpoints"))
    mesh, objective = Mesh.build(plan), create("clm")
    shape = load_run(str(folder / "run.yaml")).model
    json_ = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    }
    filled = deepspeed_json.filled(json_, mesh.replicas, 2, 1, 1.0)
    engine = create_engine(build_for(objective, shape, mesh, 64), objective, OptimizerConfig(), filled)
    assert checkpoint.adopt(source, engine) == ([], [])
    saved = checkpoint.save(folder.with_name(f"adopted {stage} {precision} {plan}"), engine, 0, {"model": shape.model_dump()})
    again = Snapshot(saved)
    return [name for name in source.shapes if not torch.equal(source.whole(name), again.whole(name))]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_every_zero_stage_begins_with_the_very_weights(runs, stage, precision):
    assert spawn(2, adopted, runs["clm"][0], stage, precision, ParallelPlan()) == []


def test_what_cannot_begin_is_refused_and_leaves_nothing(data, runs, tmp_path):
    with pytest.raises(ConfigError, match="has no checkpoints: give the output folder"):
        begun(data, {"clm": (tmp_path / "absent",)}, tmp_path, "clm", "clm")
    with pytest.raises(ConfigError, match=r"leave out model\.preset, or init"):
        begun(data, runs, tmp_path, "clm", "clm", "model={preset: gpt2-small}")
    with pytest.raises(ValueError, match="is a checkpoint of another model: heads 4 in the checkpoint, 2 in the model"):
        begun(data, runs, tmp_path, "clm", "clm", "model={heads: 2}")
    assert not (tmp_path / "begun" / "run.yaml").exists()
    theirs.save("gpt2", tmp_path / "in")
    bring_in(tmp_path / "in", tmp_path / "run")
    with pytest.raises(ValueError, match="was imported: begin a run with init="):
        make_trainer(*open_run(run_file(tmp_path, data, "clm"), [f"output={tmp_path / 'run'}"]))
