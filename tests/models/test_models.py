"""What a model may and may not do: learn nothing at the start, look nowhere it should not, and count itself right."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.presets import PRESETS, create, create_bert_base, create_gpt_small, create_llama_7b
from ds_pretrain.models.transformer import Build, Network, initial_value, initialise
from ds_pretrain.parallel.shards import shards

KINDS = {"gpt-1m": "causal", "llama-1m": "causal", "bert-1m": "full"}
LENGTH = 24
TINY = {
    "gpt": ModelConfig(layers=2, hidden=32, heads=4, vocab=61, positions=LENGTH),
    "llama": ModelConfig(preset="llama-1m", layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=61),
    "bert": ModelConfig(preset="bert-1m", layers=2, hidden=32, heads=4, vocab=61, positions=LENGTH),
}


def built(mesh, model, kind, random=True):
    """A network in eval mode; `random`: every parameter far from its initial value, biases and norms too."""
    build = Build(model, mesh, kind, LENGTH)
    network = Network(build).eval()
    initialise(network, build, 0)
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters() if random else ():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    return network


def logits(network, tokens, segment, kind, token_type=None):
    """Logits [B, S, V] of rows whose documents are numbered by `segment`; positions count inside each document."""
    index = torch.arange(tokens.shape[1]).expand_as(segment)
    first = torch.ones_like(segment, dtype=torch.bool)
    first[:, 1:] = segment[:, 1:] != segment[:, :-1]
    position = index - torch.where(first, index, 0).cummax(1).values
    if kind == "mixed":
        pattern = AttentionPattern.prefix(segment, torch.full_like(segment, 3))
    else:
        pattern = getattr(AttentionPattern, kind)(segment)
    batch = Batch(tokens, position, pattern, {}, token_type)
    every = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        return network(batch, lambda answers, _: answers.logits(every)).view(*tokens.shape, -1)


def numbered(lengths):
    """Segments [1, S] of documents of these lengths, one after the other."""
    return torch.cat([torch.full((1, n), i + 1) for i, n in enumerate(lengths)], 1)


def draw(rows, length, vocab=61, seed=0):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [509, 8192])
@pytest.mark.parametrize("preset", KINDS)
def test_the_first_loss_is_that_of_a_uniform_guess(mesh, preset, vocab):
    model = create(preset, vocab=vocab, **({} if preset == "llama-1m" else {"positions": 64}))
    network, tokens, labels = built(mesh, model, KINDS[preset], random=False), draw(8, 64, vocab), draw(8, 64, vocab, 1)
    segment = torch.ones_like(tokens)
    batch = Batch(tokens, torch.arange(64).expand(8, 64), getattr(AttentionPattern, KINDS[preset])(segment), {})
    with torch.no_grad():
        nll = network(batch, lambda answers, _: answers.nll("any", labels, torch.ones(8, 64)))
    assert nll.mean().item() == pytest.approx(math.log(vocab), abs=0.05)


@pytest.mark.parametrize("documents", [[LENGTH], [9, 4, 11]])
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_no_causal_logit_sees_a_later_token(mesh, style, documents):
    """Changing token t leaves every logit before t bitwise alone, and changes the one at t."""
    network, tokens = built(mesh, TINY[style], "causal"), draw(2, LENGTH)
    segment = torch.cat([torch.full((2, n), i + 1) for i, n in enumerate(documents)], 1)
    before = logits(network, tokens, segment, "causal")
    for t in range(LENGTH):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after = logits(network, changed, segment, "causal")
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t], before[:, t], atol=1e-4).all(-1).any()
        later = segment[0, t] == segment[0, t + 1 :]
        assert torch.equal(after[:, t + 1 :][:, ~later], before[:, t + 1 :][:, ~later])  # other documents
        assert (after[:, t + 1 :][:, later] != before[:, t + 1 :][:, later]).any(-1).all()


def test_a_prefix_is_seen_whole_and_what_follows_it_is_causal(mesh):
    """Prefixes of 3: token t changes the logits of its own prefix and of everything after it, and nothing else."""
    network, tokens, segment = built(mesh, TINY["llama"], "mixed"), draw(1, 14), torch.tensor([[1] * 6 + [2] * 8])
    before = logits(network, tokens, segment, "mixed")
    for t in range(14):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 61
        moved = (logits(network, changed, segment, "mixed") != before).any(-1)[0]
        start, stop = (0, 6) if t < 6 else (6, 14)
        seen_from = start if t < start + 3 else t
        assert moved.nonzero().flatten().tolist() == list(range(seen_from, stop))


@pytest.mark.parametrize("kind", ["causal", "full", "mixed"])
@pytest.mark.parametrize("style", TINY)
def test_three_packed_documents_are_exactly_the_three_alone(mesh, style, kind):
    """Bit for bit, in fp32, beside three rows that hold one document and padding each."""
    network, lengths = built(mesh, TINY[style], kind), [9, 4, 11]
    documents = [draw(1, n, seed=n) for n in lengths]
    packed = logits(network, torch.cat(documents, 1), numbered(lengths), kind).split(lengths, 1)
    for tokens, together in zip(documents, packed, strict=True):
        row, segment = (F.pad(x, (0, LENGTH - tokens.shape[1])) for x in (tokens, torch.ones_like(tokens)))
        single = logits(network, row, segment, kind)[:, : tokens.shape[1]]
        assert single.std() > 0.5
        assert torch.equal(together, single)


@pytest.mark.parametrize("kind", ["causal", "full", "mixed"])
@pytest.mark.parametrize("style", TINY)
def test_a_packed_document_is_the_document_alone_without_padding(mesh, style, kind):
    """In float64: matrix products of 24 and of 4 rows are summed in another order, which in fp32 shows in the last bits
    (3e-6 on logits of 8)."""
    network, lengths = built(mesh, TINY[style], kind).double(), [9, 4, 11]
    documents = [draw(1, n, seed=n) for n in lengths]
    packed = logits(network, torch.cat(documents, 1), numbered(lengths), kind).split(lengths, 1)
    for tokens, together in zip(documents, packed, strict=True):
        single = logits(network, tokens, torch.ones_like(tokens), kind)
        torch.testing.assert_close(together, single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["causal", "full", "mixed"])
@pytest.mark.parametrize("style", TINY)
def test_what_stands_in_the_padding_has_no_influence(mesh, style, kind):
    network, tokens = built(mesh, TINY[style], kind), draw(2, LENGTH)
    real = torch.arange(LENGTH) < torch.tensor([[10], [23]])
    types = draw(2, LENGTH, 2) if TINY[style].token_types else None
    other = None if types is None else torch.where(real, types, 1 - types)
    a = logits(network, tokens, real.long(), kind, types)
    b = logits(network, torch.where(real, tokens, (tokens + 7) % 61), real.long(), kind, other)
    assert torch.equal(a[real], b[real]) and a.isfinite().all() and b.isfinite().all()


def test_full_attention_sees_everything_and_token_types_matter(mesh):
    network, tokens = built(mesh, TINY["bert"], "full"), draw(1, LENGTH)
    before = logits(network, tokens, torch.ones_like(tokens), "full")
    for t in (0, LENGTH - 1):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 61
        assert (logits(network, changed, torch.ones_like(tokens), "full") != before).any(-1).all()
    types = torch.zeros_like(tokens)
    assert torch.equal(logits(network, tokens, torch.ones_like(tokens), "full", types), before)
    assert (logits(network, tokens, torch.ones_like(tokens), "full", types + 1) != before).any(-1).all()


@pytest.mark.parametrize("style", TINY)
def test_positions_matter(mesh, style):
    """Two equal tokens after the same first one are told apart by where they stand alone."""
    kind = "full" if style == "bert" else "causal"
    network = built(mesh, TINY[style], kind)
    out = logits(network, torch.tensor([[5, 6, 7, 7, 7]]), torch.ones(1, 5, dtype=torch.int64), kind)
    assert (out[0, 3] - out[0, 4]).abs().max() > 1e-3


def test_answers_are_computed_where_asked_and_zero_elsewhere(mesh):
    network, tokens = built(mesh, TINY["gpt"], "causal"), draw(2, LENGTH)
    segment, labels = torch.ones_like(tokens), draw(2, LENGTH, seed=1)
    weights = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.3).float() * 2
    every = logits(network, tokens, segment, "causal")
    labels = torch.where(torch.arange(LENGTH) % 2 == 0, every.argmax(-1), labels)
    batch = Batch(tokens, torch.arange(LENGTH).expand(2, -1), AttentionPattern.causal(segment), {})
    with torch.no_grad():
        nll, hits = network(batch, lambda a, _: (a.nll("x", labels, weights), a.correct("x", labels, weights)))
    expected = torch.nn.functional.cross_entropy(every.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(nll, expected * (weights != 0), rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, (every.argmax(-1) == labels) & (weights != 0)) and hits.any()


def test_recomputed_activations_give_the_same_gradients(mesh):
    gradients, tokens = [], draw(2, LENGTH)
    batch = Batch(tokens, torch.arange(LENGTH).expand(2, -1), AttentionPattern.causal(torch.ones_like(tokens)), {})
    for recompute in (False, True):
        build = Build(TINY["llama"], mesh, "causal", recompute=recompute)
        network = Network(build).train()
        initialise(network, build, 0)
        network(batch, lambda a, _: a.nll("x", tokens, torch.ones(2, LENGTH)).sum()).backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


CHOICES = {
    "norm": ["layernorm", "rmsnorm"],
    "norm_position": ["pre", "post"],
    "activation": ["gelu", "swiglu"],
    "position": ["learned", "rope"],
}
MORE = {"tie_embeddings": [True, False], "bias": [True, False], "kv_heads": [None, 2], "head_transform": [True, False]}


def combinations(choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@pytest.mark.parametrize("style", combinations(CHOICES), ids=lambda s: "-".join(s.values()))
def test_the_parameter_table_counts_what_is_built(mesh, style):
    for number, more in enumerate(combinations(MORE)):
        shape = {
            "layers": 2,
            "hidden": 16,
            "heads": 4,
            "ffn": 24,
            "vocab": 31,
            "positions": 8,
            "token_types": number % 3,
        }
        model = ModelConfig(**shape, **style, **more)
        real = sum(parameter.numel() for parameter in Network(Build(model, mesh)).parameters())
        assert model.count_parameters() == real == sum(n for _, n in model.parameter_table()), model


def test_each_line_of_the_table_is_the_part_it_names(mesh):
    for model in TINY.values():
        real = dict.fromkeys(dict(model.parameter_table()), 0)
        for shard, parameter in shards(Network(Build(model, mesh)), 0, 1):
            real[_part(shard.name)] += parameter.numel()
        assert real == dict(model.parameter_table())
        assert model.count_parameters(embeddings=False) == sum(n for name, n in real.items() if "embedding" not in name)


def _part(name):
    if name.startswith("head.") and "final_norm" not in name:
        return "head"
    for part, words in {"norms": ("norm",), "attention": ("self_attention",), "feed-forward": ("mlp",)}.items():
        if any(word in name for word in words):
            return part
    return {"word": "word embedding", "embed": "position and type embedding", "output": "output embedding"}[name.split(".")[0]]


KNOWN = {
    "gpt2-small": (50257, 124_439_808),
    "gpt2-medium": (50257, 354_823_168),
    "gpt2-large": (50257, 774_030_080),
    "gpt2-xl": (50257, 1_557_611_200),
    "llama-7b": (32000, 6_738_415_616),
    "llama-13b": (32000, 13_015_864_320),
    "bert-base": (30522, 109_514_298),
    "bert-large": (30522, 335_174_458),
}


@pytest.mark.parametrize("preset", KNOWN)
def test_known_models_have_their_published_size(preset):
    vocab, parameters = KNOWN[preset]
    assert create(preset, vocab=vocab).count_parameters() == parameters


def test_the_api_names_known_models():
    assert create_gpt_small() == create("gpt2-small", vocab=50257)
    assert create_bert_base().count_parameters() == KNOWN["bert-base"][1]
    assert create_llama_7b().count_parameters() == KNOWN["llama-7b"][1]
    assert create_gpt_small(vocab_size=8000, layers=3).layers == 3


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_free_of_contradictions(preset):
    model = create(preset, vocab=32000)
    assert model.problems() == [] and model.preset == preset
    if size := re.fullmatch(r".*-(\d+)([mb])", preset):
        named = int(size[1]) * {"m": 1e6, "b": 1e9}[size[2]]
        assert 0.5 < create(preset, vocab=8192, positions=512).count_parameters(embeddings=False) / named < 1.5


def test_contradictions_are_listed_with_their_numbers():
    def problems(**fields):
        return ModelConfig(vocab=64, **fields).problems()

    assert problems() == []
    assert problems(hidden=100, heads=3) == ["model.hidden 100 is not divisible by model.heads 3"]
    assert problems(hidden=36, heads=4, position="rope") == ["rotary positions need an even head size, got 36/4 = 9"]
    assert problems(hidden=36, heads=4) == []
    assert problems(heads=4, kv_heads=3) == ["model.heads 4 is not divisible by model.kv_heads 3"]
    assert len(problems(hidden=100, heads=3, kv_heads=2)) == 2


def test_the_fields_of_a_preset_give_way_and_unknown_names_are_refused():
    assert ModelConfig(preset="bert-base", vocab=100, layers=2, norm_eps=1e-6).norm_eps == 1e-6
    assert ModelConfig(preset="bert-base", vocab=100).norm_position == "post"
    with pytest.raises(ValueError, match="unknown model preset 'gpt2-smal': did you mean 'gpt2-small'"):
        ModelConfig(preset="gpt2-smal")
    with pytest.raises(ValidationError, match="extra"):
        ModelConfig(layer=3)
    with pytest.raises(ValueError, match="vocab is not set"):
        ModelConfig().count_parameters()


def test_derived_widths():
    assert ModelConfig(hidden=256).ffn_width == 1024
    assert ModelConfig(hidden=4096, activation="swiglu").ffn_width == 10944  # 8/3 of 4096 is 10922.7
    assert ModelConfig(hidden=256, ffn=100).ffn_width == 100
    assert ModelConfig(hidden=256, heads=8, kv_heads=2).groups == 2 and ModelConfig(heads=8, hidden=256).groups == 8


def test_initial_values_have_the_spread_they_should():
    model = ModelConfig(layers=8, hidden=512, heads=8, vocab=1000)
    post = model.model_copy(update={"norm_position": "post"})
    for name, shape, where, std in [
        ("word.weight", (1000, 512), model, 0.02),
        ("layers.3.self_attention.linear_qkv.weight", (1536, 512), model, 0.02),
        ("layers.3.self_attention.linear_proj.weight", (512, 512), model, 0.02 / 4),
        ("layers.3.mlp.linear_fc2.weight", (512, 2048), model, 0.02 / 4),
        ("layers.3.mlp.linear_fc2.weight", (512, 2048), post, 0.02),
    ]:
        value = initial_value(name, shape, where, 0)
        assert value.std().item() == pytest.approx(std, rel=0.01) and abs(value.mean().item()) < std / 50
    assert torch.equal(initial_value("head.final_norm.weight", (4,), model, 0), torch.ones(4))
    assert torch.equal(initial_value("head.final_norm.bias", (4,), model, 0), torch.zeros(4))


def test_initial_values_differ_by_name_and_seed_only():
    model, name = ModelConfig(vocab=64), "layers.0.mlp.linear_fc1.weight"
    value = initial_value(name, (8, 4), model, 0)
    assert torch.equal(initial_value(name, (8, 4), model, 0), value)
    assert not torch.equal(initial_value(name, (8, 4), model, 1), value)
    assert not torch.equal(initial_value(name.replace("0", "1"), (8, 4), model, 0), value)
