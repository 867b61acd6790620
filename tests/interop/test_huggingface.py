"""Imported weights give the logits that `transformers` gives; what cannot be imported is said, not dropped."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch
from ds_pretrain.interop.huggingface import convert, load_weights, read_folder
from ds_pretrain.models.transformer import Build, LayerSpec, Network, initialise, layer_list
from ds_pretrain.parallel.plan import ParallelPlan

transformers = pytest.importorskip("transformers")
VOCAB, ROWS, LENGTH = 101, 3, 19
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 32,
}
LLAMA = {**COMMON, "num_key_value_heads": 2}
MODELS = {
    "gpt2": ("GPT2", "LMHead", GPT2),
    "gpt2 untied, inner width, exact gelu": (
        "GPT2",
        "LMHead",
        {**GPT2, "tie_word_embeddings": False, "n_inner": 72, "activation_function": "gelu"},
    ),
    "llama grouped": ("Llama", "ForCausalLM", LLAMA),
    "llama tied, one key head, long wavelengths": (
        "Llama",
        "ForCausalLM",
        {
            **COMMON,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rms_norm_eps": 1e-3,
        },
    ),
    "llama with biases": ("Llama", "ForCausalLM", {**COMMON, "attention_bias": True, "mlp_bias": True}),
    "bert": ("Bert", "ForMaskedLM", COMMON),
    "bert untied, tanh gelu": (
        "Bert",
        "ForMaskedLM",
        {**COMMON, "tie_word_embeddings": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    ),
}


def theirs(name):
    """Their model in eval mode; every parameter is random, biases and norms too, and large enough to be told apart."""
    family, head, fields = MODELS[name]
    model = getattr(transformers, f"{family}LMHeadModel" if head == "LMHead" else f"{family}{head}")(
        getattr(transformers, f"{family}Config")(**fields, attn_implementation="eager")
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.13, generator=generator)
    return model.eval()


def ours(mesh, model, weights, kind):
    build = Build(model, mesh, kind)
    network = Network(build).eval()
    initialise(network, build, 0)
    load_weights(network, build, weights)
    return network


def logits(network, tokens, pattern, token_type=None):
    position = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    batch = Batch(tokens, position, pattern, {}, token_type)
    every = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        return network(batch, lambda answers, _: answers.logits(every)).view(*tokens.shape, -1)


def tokens():
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(mesh, name):
    reference, ids = theirs(name), tokens()
    network = ours(mesh, *convert(reference.state_dict(), reference.config), "full" if "bert" in name else "causal")
    segment = torch.ones_like(ids)
    pattern = AttentionPattern.full(segment) if "bert" in name else AttentionPattern.causal(segment)
    with torch.no_grad():
        expected = reference(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(network, ids, pattern), expected, rtol=0, atol=1e-5)


def test_a_padded_segment_is_their_attention_mask_and_token_types_are_theirs(mesh):
    reference, ids = theirs("bert"), tokens()
    network = ours(mesh, *convert(reference.state_dict(), reference.config), "full")
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11], [1]])
    types = (torch.arange(LENGTH) >= 6).long().repeat(ROWS, 1)
    with torch.no_grad():
        expected = reference(ids, attention_mask=real.long(), token_type_ids=types).logits
    got = logits(network, ids, AttentionPattern.full(real.long()), types)
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-5)


def test_a_saved_folder_is_read_in_one_file_or_in_several(tmp_path):
    reference = theirs("llama grouped")
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    model, weights = convert(reference.state_dict(), reference.config)
    for folder in ("one", "several"):
        read, tensors = read_folder(tmp_path / folder)
        assert read == model and tensors.keys() == weights.keys()
        assert all(torch.equal(tensors[name], weights[name]) for name in weights)


def test_a_folder_without_safetensors_is_refused_and_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"has no model\.safetensors.*pickled \.bin weights are not read"):
        read_folder(tmp_path)


def test_names_of_the_published_checkpoints_are_known(tmp_path):
    """GPT-2's file has no prefix and stores its causal mask; BERT's has gamma, beta, a pooler and a sentence head."""
    gpt2, bert = theirs("gpt2"), theirs("bert")
    old = {name.removeprefix("transformer."): x for name, x in gpt2.state_dict().items() if name != "lm_head.weight"}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.zeros(())}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT2}))
    save_file(old, tmp_path / "model.safetensors")
    same(read_folder(tmp_path)[1], convert(gpt2.state_dict(), gpt2.config)[1])
    old = {}
    for name, x in bert.state_dict().items():
        if not name.startswith("cls.predictions.decoder."):
            old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = x
    old |= {"bert.pooler.dense.weight": torch.zeros(48, 48), "cls.seq_relationship.bias": torch.zeros(2)}
    same(convert(old, bert.config)[1], convert(bert.state_dict(), bert.config)[1])


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_half_precision_is_read_as_fp32():
    reference = theirs("llama grouped").bfloat16()
    assert {x.dtype for x in convert(reference.state_dict(), reference.config)[1].values()} == {torch.float32}


def test_the_rotary_base_is_found_where_any_version_keeps_it():
    reference = theirs("llama grouped")
    fields = {k: v for k, v in reference.config.to_dict().items() if k != "rope_parameters"}
    for config, base in [
        (fields, 10000.0),
        ({**fields, "rope_theta": 5e5}, 5e5),
        ({**fields, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}, 3e5),
    ]:
        assert convert(reference.state_dict(), config)[0].rope_base == base


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"model_type": "gpt3"}, "unknown model type of transformers 'gpt3': did you mean 'gpt2'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"activation_function": "gelu_fast"}, "unknown activation 'gelu_fast'"),
        ("llama grouped", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3' are not ours"),
        ("llama grouped", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "type 'linear' are not ours"),
        ("llama grouped", {"attention_bias": True}, "mlp_bias = False .only True"),
        ("llama grouped", {"head_dim": 16}, "head_dim = 16 .only 12"),
        ("bert", {"is_decoder": True}, "is_decoder = True .only False"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(name, fields, message):
    reference = theirs(name)
    with pytest.raises(ValueError, match=message):
        convert(reference.state_dict(), {**reference.config.to_dict(), **fields})


def test_a_config_without_a_field_says_which():
    with pytest.raises(ValueError, match="the gpt2 config has no 'n_layer'"):
        convert({}, {"model_type": "gpt2"})


def test_stored_tensors_are_all_there_and_all_taken():
    reference = theirs("llama grouped")
    state = dict(reference.state_dict())
    state["model.layers.0.self_attn.q_norm.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"missing layers\.1\.mlp\.up_proj\.weight; unexpected layers\.0.*q_norm"):
        convert(state, reference.config)


def test_tied_tensors_that_differ_are_refused():
    reference = theirs("gpt2")
    state = {**reference.state_dict(), "lm_head.weight": torch.zeros(VOCAB, 48)}
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight and lm_head\.weight should be one tensor"):
        convert(state, reference.config)


def test_weights_that_do_not_fit_are_named_and_nothing_is_written(mesh):
    reference = theirs("llama grouped")
    model, weights = convert(reference.state_dict(), reference.config)
    build = Build(model, mesh, "causal")
    network = Network(build)
    initialise(network, build, 0)
    before = {name: x.clone() for name, x in network.state_dict().items() if x is not None}
    for change, message in [
        ({"word.weight": torch.zeros(VOCAB + 1, 48)}, r"word\.weight is \(102, 48\) and should be \(101, 48\)"),
        ({"layers.2.mlp.linear_fc1.weight": torch.zeros(1)}, r"unexpected layers\.2\.mlp\.linear_fc1\.weight"),
        ({"head.final_norm.weight": None}, r"missing head\.final_norm\.weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_weights(network, build, {k: v for k, v in {**weights, **change}.items() if v is not None})
    assert all(torch.equal(network.state_dict()[name], x) for name, x in before.items())


def test_a_pipeline_stage_takes_its_own_layers_only(mesh):
    reference = theirs("llama grouped")
    model, weights = convert(reference.state_dict(), reference.config)
    build = Build(model, replace(mesh, plan=ParallelPlan(pipeline=2), world=2), "causal")
    spec: LayerSpec = layer_list(build)[3]
    layer = torch.nn.ModuleList([spec.cls(*spec.args)])
    load_weights(layer, build, weights)
    assert torch.equal(layer[0].mlp.linear_fc2.weight, weights["layers.1.mlp.linear_fc2.weight"])
    with pytest.raises(ValueError, match=r"unexpected layers\.1\.extra"):
        load_weights(layer, build, {**weights, "layers.1.extra": torch.zeros(1)})
