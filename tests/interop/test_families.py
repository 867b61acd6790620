"""Folders of every family come in and go out bit for bit, open in `transformers`, and what cannot come in is said."""

import json
import re
import shutil
from pathlib import Path

import pytest
import theirs
import torch
import transformers
from safetensors.torch import load_file, save_file

from ds_pretrain.core.batch import Head
from ds_pretrain.interop import transfer
from ds_pretrain.interop.commands import bring_in, send_out
from ds_pretrain.interop.folder import Stored
from ds_pretrain.interop.rules import FAMILIES
from ds_pretrain.interop.transfer import Arrival
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import create
from ds_pretrain.runs import load_model
from ds_pretrain.training import checkpoint
from ds_pretrain.training.checkpoint import Snapshot

BERT_PAIR = "bert with a pair head"


def tensors(folder):
    """Everything in a folder's safetensors, by file's place and name."""
    return {
        (path.parent.relative_to(folder), name): x
        for path in folder.rglob("*.safetensors")
        for name, x in load_file(path).items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", theirs.MODELS)
def test_what_comes_in_goes_out_bit_for_bit(tmp_path, name, dtype):
    theirs.save(name, tmp_path / "in", getattr(torch, dtype))
    bring_in(tmp_path / "in", tmp_path / "run")
    send_out(tmp_path / "run", tmp_path / "out", shard=100_000)
    identical(tmp_path / "in", tmp_path / "out")
    (config, *_) = (tmp_path / "out").rglob("config.json")
    assert json.loads(config.read_text())["dtype"] == dtype


def identical(one, other):
    was, now = tensors(one), tensors(other)
    assert was.keys() == now.keys()
    assert all(torch.equal(was[key], now[key]) and was[key].dtype == now[key].dtype for key in was)


def test_tensors_of_several_precisions_keep_theirs(tmp_path):
    theirs.save("llama grouped", tmp_path / "in", torch.bfloat16)
    state = load_file(tmp_path / "in" / "model.safetensors")
    norms = {name: x.float() + 1e-4 for name, x in state.items() if "norm" in name}
    keys = {name: x.float() + 1e-4 for name, x in state.items() if "k_proj" in name}  # a part of what is one for us
    save_file({**state, **norms, **keys}, tmp_path / "in" / "model.safetensors")
    bring_in(tmp_path / "in", tmp_path / "run")
    send_out(tmp_path / "run", tmp_path / "out")
    identical(tmp_path / "in", tmp_path / "out")
    send_out(tmp_path / "run", tmp_path / "asked", "float16")
    assert {x.dtype for x in tensors(tmp_path / "asked").values()} == {torch.float16}
    save_file({**state, "model.norm.weight": state["model.norm.weight"].double()}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is F64 in model\.safetensors: save it again as one of F32"):
        bring_in(tmp_path / "in", tmp_path / "wide")


def test_precisions_that_an_older_import_told_by_parameter_are_kept(tmp_path, monkeypatch):
    theirs.save("llama grouped", tmp_path / "in", torch.bfloat16)
    state = load_file(tmp_path / "in" / "model.safetensors")
    norm = "model.norm.weight"
    save_file({**state, norm: state[norm].float() + 1e-4}, tmp_path / "in" / "model.safetensors")
    (source,) = Arrival.of(tmp_path / "in").sources
    (logical,) = [rule.logical for rule in source.side.rules if norm in rule.stored]
    with monkeypatch.context() as patch:
        patch.setattr(transfer.Precision, "told", lambda self: {"most": "bfloat16", "others": {logical: "float32"}})
        bring_in(tmp_path / "in", tmp_path / "run")
    send_out(tmp_path / "run", tmp_path / "out")
    identical(tmp_path / "in", tmp_path / "out")


def test_what_is_no_parameter_has_no_say_in_the_precision(tmp_path):
    """A causal mask, the first tensor of an old GPT-2 file."""
    theirs.save("gpt2", tmp_path / "in", torch.bfloat16)
    state = load_file(tmp_path / "in" / "model.safetensors")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool)}
    save_file({**state, **mask}, tmp_path / "in" / "model.safetensors")
    bring_in(tmp_path / "in", tmp_path / "run")
    send_out(tmp_path / "run", tmp_path / "out")
    assert {x.dtype for x in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_tensors_come_and_go_one_at_a_time(tmp_path, monkeypatch):
    theirs.save("llama grouped", tmp_path / "in")
    read, whole, written = [], [], []
    tensor, of, write = Stored.tensor, Snapshot.whole, transfer.write
    monkeypatch.setattr(Stored, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    monkeypatch.setattr(Snapshot, "whole", lambda self, *name: whole.append(name) or of(self, *name))
    coming = Arrival.of(tmp_path / "in").parameters()
    for count, _ in enumerate(coming, start=1):
        assert len(read) <= 3 * count, "a fused QKV is made of three"
    bring_in(tmp_path / "in", tmp_path / "run")

    def watched(folder, entries, tensors, shard):
        def each():
            for count, made in enumerate(tensors, start=1):
                assert len(whole) <= count
                written.append(count)
                yield made

        return write(folder, entries, each(), shard)

    monkeypatch.setattr(transfer, "write", watched)
    send_out(tmp_path / "run", tmp_path / "out")
    assert len(written) == len(tensors(tmp_path / "out")) and len(whole) > 5


@pytest.mark.parametrize("name", theirs.MODELS)
def test_what_goes_out_opens_with_nothing_missing_and_nothing_left(tmp_path, name):
    model = theirs.save(name, tmp_path / "in")
    bring_in(tmp_path / "in", tmp_path / "run")
    for folder in send_out(tmp_path / "run", tmp_path / "out"):
        config = json.loads((folder / "config.json").read_text())
        opened, told = getattr(transformers, config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
        assert transformers.AutoModel.from_pretrained(folder) is not None
        if type(opened) is type(model):
            ours = {"dtype": torch.float32, "classifier_dropout_prob": 0.0}
            same = {key: ours.get(key, getattr(model.config, key)) for key in config if hasattr(model.config, key)}
            assert {key: getattr(opened.config, key) for key in same} == same
            assert all(torch.equal(x, opened.state_dict()[key]) for key, x in model.state_dict().items())


def test_every_family_is_tried():
    assert {theirs.make(name).config.model_type for name in theirs.MODELS} == set(FAMILIES)


def test_several_files_are_read_as_one(tmp_path):
    theirs.save("llama grouped", tmp_path / "one")
    theirs.save("llama grouped", tmp_path / "several", max_shard_size="100KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    found = [dict(Arrival.of(tmp_path / name).parameters()) for name in ("one", "several")]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_one_file_counts_before_an_index_as_it_does_for_transformers(tmp_path):
    """Saved in parts and then in one, a folder keeps the index of parts that are gone."""
    theirs.save("llama grouped", tmp_path / "in", max_shard_size="100KB")
    theirs.save("llama grouped", tmp_path / "one")
    for part in (tmp_path / "in").glob("*.safetensors"):
        part.unlink()
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "in")
    bring_in(tmp_path / "in", tmp_path / "run")
    send_out(tmp_path / "run", tmp_path / "out")
    identical(tmp_path / "one", tmp_path / "out")


def test_a_config_may_leave_out_what_the_library_knows(tmp_path):
    theirs.save("llama grouped", tmp_path / "in")
    fields = json.loads((tmp_path / "in" / "config.json").read_text())
    del fields["max_position_embeddings"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(fields))
    bring_in(tmp_path / "in", tmp_path / "run")
    (out,) = send_out(tmp_path / "run", tmp_path / "out")
    opened, meant = (transformers.AutoConfig.from_pretrained(folder) for folder in (out, tmp_path / "in"))
    assert opened.max_position_embeddings == meant.max_position_embeddings == 2048


def test_a_head_of_ones_own_is_not_taken_for_the_librarys():
    """Its classes and what lies between its matrices have to be those that the library's class has."""

    def taken(*heads, name="mlm"):
        objective = create(name)
        object.__setattr__(objective, "heads", heads)
        shape = ModelConfig.model_validate({"preset": "bert-1m"})
        return [name for name in FAMILIES if FAMILIES[name].takes(shape, objective)]

    words = Head("mlm")
    assert taken(words) == taken(words, Head("nsp", classes=2)) == taken(Head("any", classes=0)) == ["bert"]
    assert taken(words, Head("sop", classes=2)) == ["albert"]
    others = [Head("topic", classes=5), Head("topic", classes=2), Head("nsp", classes=2, activation="gelu")]
    others += [Head("nsp", classes=3), Head("sop", classes=2, activation="gelu"), Head("any", classes=0, activation="gelu")]
    assert [taken(words, head) for head in others] == [[]] * len(others)
    assert taken(words, Head("nsp", classes=2), Head("topic", classes=0)) == []
    assert taken(*create("electra").heads, name="electra") == ["electra"]
    assert taken(words, Head("rtd", classes=3, activation="gelu"), name="electra") == []


def test_an_idle_bias_is_told(tmp_path, caplog):
    theirs.save("bert untied, tanh gelu", tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    state["cls.predictions.bias"] += 1
    save_file(state, tmp_path / "in" / "model.safetensors")
    bring_in(tmp_path / "in", tmp_path / "run")
    assert "predictions.bias is not predictions.decoder.bias, which alone is added" in caplog.text
    whole = Snapshot(tmp_path / "run" / "checkpoints" / "step-0").whole("head.output_bias.bias")
    assert torch.equal(whole, state["cls.predictions.decoder.bias"])


def parameters(folder, state, config, **options):
    """What comes in of a state dict and a config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors")
    return Arrival.of(folder, **options)


def test_names_of_the_published_checkpoints_are_known(tmp_path):
    """GPT-2's file has no prefix and stores its causal mask; BERT's has gamma and beta, and repeats what is tied."""
    for name in ("gpt2", BERT_PAIR):
        theirs.save(name, tmp_path / name)
    gpt2 = load_file(tmp_path / "gpt2" / "model.safetensors")
    old = {name.removeprefix("transformer."): x for name, x in gpt2.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.zeros(1)}
    same(parameters(tmp_path / "a", old, {"model_type": "gpt2", **theirs.GPT2}), Arrival.of(tmp_path / "gpt2"))
    bert = load_file(tmp_path / BERT_PAIR / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in bert.items()
    }
    old["cls.predictions.decoder.weight"] = bert["bert.embeddings.word_embeddings.weight"].clone()
    old["bert.embeddings.position_ids"] = torch.arange(32)
    config = json.loads((tmp_path / BERT_PAIR / "config.json").read_text())
    same(parameters(tmp_path / "b", old, config), Arrival.of(tmp_path / BERT_PAIR))
    old["cls.predictions.decoder.weight"] += 1
    with pytest.raises(ValueError, match="should be one tensor by the config, but their values differ"):
        dict(parameters(tmp_path / "c", old, config).parameters())


def same(a, b):
    a, b = dict(a.parameters()), dict(b.parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_rotary_base_is_found_where_any_version_keeps_it(tmp_path):
    theirs.save("llama grouped", tmp_path / "in")
    fields = json.loads((tmp_path / "in" / "config.json").read_text())
    fields.pop("rope_parameters")
    for config, base in [
        (fields, 10000.0),
        ({**fields, "rope_theta": 5e5}, 5e5),
        ({**fields, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}, 3e5),
    ]:
        (tmp_path / "in" / "config.json").write_text(json.dumps(config))
        assert Arrival.of(tmp_path / "in").model.rope_base == base


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ],
)  # fmt: skip
def test_rotary_positions_of_every_kind_give_their_logits_far_out_and_go_out_as_they_came(scaling, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, rope_parameters={**scaling, "rope_theta": 5e5},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "in")
    bring_in(tmp_path / "in", tmp_path / "run")
    ids = torch.randint(0, 101, (1, 3000), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0]
    found = load_model(str(tmp_path / "run")).logits_at(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    send_out(tmp_path / "run", tmp_path / "out")
    left = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert left.rope_parameters == model.config.rope_parameters
    fields = json.loads((tmp_path / "in" / "config.json").read_text())
    scaled = fields.pop("rope_parameters")
    (tmp_path / "in" / "config.json").write_text(json.dumps({**fields, "rope_theta": 5e5, "rope_scaling": scaled}))
    assert Arrival.of(tmp_path / "in").model.rope_scaling == ModelConfig(**_model_of(tmp_path / "run")).rope_scaling


def _model_of(output):
    return Snapshot(output / "checkpoints" / "step-0").manifest["model"]


def test_a_head_may_be_missing_or_too_many_and_either_is_told(tmp_path):
    theirs.save(BERT_PAIR, tmp_path / "in")
    masked = Arrival.of(tmp_path / "in", objective="mlm")
    assert masked.fresh == [] and sorted(masked.left_out) == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "cls.seq_relationship.bias", "cls.seq_relationship.weight",
    ]  # fmt: skip
    theirs.save("bert", tmp_path / "alone")
    paired = bring_in(tmp_path / "alone", tmp_path / "run", objective="bert")
    assert paired.fresh == [f"head.classifiers.nsp.{layer}.{kind}" for layer in ("dense", "out") for kind in ("weight", "bias")]
    assert torch.equal(
        Snapshot(tmp_path / "run" / "checkpoints" / "step-0").whole("head.classifiers.nsp.out.bias"), torch.zeros(2)
    )


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"model_type": "gpt3"}, "unknown model type of transformers 'gpt3': did you mean 'gpt2'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"activation_function": "gelu_fast"}, "unknown activation 'gelu_fast'"),
        ("gpt2", {"n_layer": None}, "config.json has no 'n_layer': copy it again"),
        ("gpt2", {"model_type": 5}, "config.json has no model_type: it must be one of albert, bert"),
        ("gpt2", {"n_head": 5}, "config.json describes no model: model.hidden 48 is not divisible by model.heads 5"),
        ("llama grouped", {"num_key_value_heads": 3}, "config.json describes no model: model.heads 4 is not divisible by"),
        ("llama grouped", {"rms_norm_eps": 0}, "config.json describes no model: norm_eps: Input should be greater than 0"),
        (
            "gpt2",
            {"n_inner": 100},
            "transformer.h.0.mlp.c_fc.weight is (48, 192) in model.safetensors, by config.json it should be (48, 100)",
        ),
        ("gpt2", {"n_layer": 3}, "is no GPT2LMHeadModel: missing transformer.h.2.attn"),
        ("llama grouped", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        ("llama grouped", {"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "type 'yarn' are not ours"),
        ("llama grouped", {"attention_bias": True}, "mlp_bias = False (only True)"),
        ("llama grouped", {"head_dim": 16}, "head_dim = 16 (only 12)"),
        ("llama grouped", {"num_attention_heads": "4"}, "config.json has a field that is 0 or of another type"),
        ("llama grouped", {"num_attention_heads": 0}, "config.json has a field that is 0 or of another type"),
        ("llama grouped", {"rope_parameters": "linear"}, "config.json has a field that is 0 or of another type"),
        ("gpt2", {"activation_function": ["gelu"]}, "config.json has a field that is 0 or of another type"),
        ("bert", {"architectures": 5}, "config.json has a field that is 0 or of another type"),
        ("bert", {"is_decoder": True}, "is_decoder = True (only False)"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("albert with its order head", {"num_hidden_groups": 1}, "shares 1 groups of weights among 2 layers"),
        ("albert with its order head", {"embedding_size": 12}, "embeds words in 12 dimensions and computes in 48"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(tmp_path, name, fields, message):
    theirs.save(name, tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None or key != "n_layer"}))
    with pytest.raises(ValueError, match=re.escape(message)):
        bring_in(tmp_path / "in", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_albert_that_maps_its_embeddings_is_refused(tmp_path):
    theirs.save("albert with its order head", tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    state["albert.encoder.embedding_hidden_mapping_in.weight"][0, 1] = 0.5
    save_file(state, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match="maps its embeddings before the first layer"):
        bring_in(tmp_path / "in", tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.tmp").exists()


def test_a_generator_of_another_shape_or_with_other_embeddings_is_refused(tmp_path):
    theirs.save("electra", tmp_path / "in")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        Arrival.of(tmp_path / "in" / "discriminator", generator=tmp_path / "absent")
    path = tmp_path / "in" / "generator" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 44}))
    with pytest.raises(ValueError, match=r"generator has ffn 44: ours, with 0\.5 of the discriminator's heads, has 40"):
        Arrival.of(tmp_path / "in")
    path.write_text(json.dumps(config))
    state = load_file(path.with_name("model.safetensors"))
    state["electra.embeddings.LayerNorm.bias"] += 1
    save_file(state, path.with_name("model.safetensors"))
    with pytest.raises(ValueError, match=r"should share electra\.embeddings\.LayerNorm\.bias, but their values differ"):
        bring_in(tmp_path / "in", tmp_path / "run")


def test_damaged_folders_are_refused_by_file(tmp_path):
    theirs.save("llama grouped", tmp_path / "whole", max_shard_size="100KB")
    files = sorted((tmp_path / "whole").glob("*.safetensors"))

    def refused(message, change):
        shutil.copytree(tmp_path / "whole", tmp_path / "in")
        change(tmp_path / "in")
        with pytest.raises(ValueError, match=message):
            bring_in(tmp_path / "in", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        shutil.rmtree(tmp_path / "in")

    first = files[0].name
    refused(rf"{first} is missing, with \d+ of \d+ tensors: copy it again", lambda folder: (folder / first).unlink())
    refused("config.json does not exist", lambda folder: (folder / "config.json").unlink())
    refused("config.json is not JSON", lambda folder: (folder / "config.json").write_text("{"))
    refused("config.json holds no mapping", lambda folder: (folder / "config.json").write_text("[]"))
    index = "model.safetensors.index.json"
    refused(f"{index} is not JSON", lambda folder: (folder / index).write_text('{"weight_map'))
    refused(f"{index} has no weight_map", lambda folder: (folder / index).write_text("{}"))
    for strange in ("../whole/" + first, str(files[0]), None):
        map_ = json.dumps({"weight_map": {"model.norm.weight": strange}})
        refused(
            rf"{index} says that model\.norm\.weight lies in .*, which is no file of this folder",
            lambda folder, text=map_: (folder / index).write_text(text),
        )
    refused("generation_config.json holds no mapping", lambda folder: (folder / "generation_config.json").write_text("[]"))
    refused("tokenizer_config.json is not JSON", lambda folder: (folder / "tokenizer_config.json").write_text("{"))
    refused("modules.json lists layers without type and path", lambda folder: (folder / "modules.json").write_text("[1]"))
    refused(
        f"{first} is not a readable safetensors file", lambda folder: (folder / first).write_bytes(files[0].read_bytes()[:-9])
    )
    refused(
        rf"{first} lacks .*, which model.safetensors.index.json says",
        lambda folder: save_file({"x": torch.ones(1)}, folder / first),
    )
    refused("has no model.safetensors: give", lambda folder: [path.unlink() for path in folder.glob("model*")])


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_read_only_when_asked_for(tmp_path):
    model = theirs.save("gpt2", tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only a pickle, which can run code when it is read.*--allow-pickle"):
        bring_in(tmp_path / "in", tmp_path / "run")
    whole = (tmp_path / "in" / "pytorch_model.bin").read_bytes()
    went_off, other = tmp_path / "went-off", tmp_path / "other.bin"
    cut = [whole[:100], whole[: len(whole) // 2], b"", b"\x80\x02" + whole[200:400]]
    for i, content in enumerate([torch.ones(2), {"a": [1]}, {"a": Bomb(went_off)}, *cut]):
        if isinstance(content, bytes):
            other.write_bytes(content)
        else:
            torch.save(content, other)
        shutil.copytree(tmp_path / "in", tmp_path / f"in {i}")
        other.replace(tmp_path / f"in {i}" / "pytorch_model.bin")
        with pytest.raises(ValueError, match=rf"in {i}/pytorch_model\.bin is damaged, or holds other objects than tensors"):
            bring_in(tmp_path / f"in {i}", tmp_path / "run", pickles=True)
    assert not went_off.exists()
    bring_in(tmp_path / "in", tmp_path / "run", pickles=True)
    whole = Snapshot(tmp_path / "run" / "checkpoints" / "step-0").whole("word.weight")
    assert torch.equal(whole, model.transformer.wte.weight)


def test_nothing_is_written_over(tmp_path):
    theirs.save("gpt2", tmp_path / "in")
    bring_in(tmp_path / "in", tmp_path / "run")
    for work in (lambda: bring_in(tmp_path / "in", tmp_path / "run"), lambda: send_out(tmp_path / "run", tmp_path / "in")):
        with pytest.raises(ValueError, match="is not empty: give the name of a folder that is not there yet"):
            work()
    with pytest.raises(ValueError, match="unknown --dtype 'float64'"):
        send_out(tmp_path / "run", tmp_path / "out", "float64")
    with pytest.raises(ValueError, match=r"run\.yaml does not exist"):
        send_out(tmp_path / "in", tmp_path / "out")
    assert checkpoint.damages(tmp_path / "run" / "checkpoints" / "step-0") == [] and not (tmp_path / "out").exists()
