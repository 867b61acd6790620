"""Weights of `transformers` models under our logical names: GPT-2, LLaMA and BERT.

A family is three things: how its config reads as a `ModelConfig`, which stored names mean the same tensor, and a table
of rules, one per parameter, that says which stored tensors it is made of and how. Dictionaries in, dictionaries out:
`transformers` itself is never imported, and of files only safetensors are read. A config that asks for arithmetic we do
not have, and a stored tensor that no rule takes, are errors: dropped silently, either gives a model that runs and is
another one. The price: every rank holds the whole model in fp32 while it loads.

Shape suffixes: H hidden, N query heads, G key heads, D head size, R = N / G query heads of a group, F feed-forward.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_pretrain.core.registry import Registry, unknown
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.transformer import Build
from ds_pretrain.parallel.shards import shards

Weights = dict[str, Tensor]
Fields = Mapping[str, Any]
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


class Rule(NamedTuple):
    """One of our parameters: its logical name, the stored tensors it is made of, and how."""

    logical: str
    stored: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type. Patterns are regular expressions on stored names."""

    model: Callable[[Fields], ModelConfig]
    """The config of the library as ours."""
    rules: Callable[[ModelConfig], Iterator[Rule]]
    """Every parameter of such a model."""
    rename: Callable[[ModelConfig], Mapping[str, str]]
    """Older or second names, pattern to replacement. Two names that become one must hold equal tensors; what becomes
    the empty name is no parameter of the language model (buffers, poolers) and is left out."""


FAMILIES: Registry[Family] = Registry("model type of transformers")


def convert(state: Mapping[str, Tensor], config: Any) -> tuple[ModelConfig, Weights]:
    """Our description and whole fp32 weights by logical name, from a state dict and its config (object or dict)."""
    fields: Fields = config if isinstance(config, Mapping) else config.to_dict()
    family = FAMILIES[str(fields.get("model_type"))]
    try:
        model = family.model(fields)
    except KeyError as missing:
        raise ValueError(f"the {fields['model_type']} config has no {missing}") from None
    stored = _canonical(state, family, model)
    rules = list(family.rules(model))
    _same_names({name for rule in rules for name in rule.stored}, stored)
    return model, {r.logical: r.make(*(stored[name].float() for name in r.stored)).contiguous() for r in rules}


def read_folder(folder: str | Path) -> tuple[ModelConfig, Weights]:
    """The same from what `save_pretrained` wrote: config.json and safetensors, in one file or in several."""
    from safetensors.torch import load_file

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in ("config.json", *names) if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder} has no {', '.join(absent)}: give a folder that save_pretrained() wrote (pickled .bin weights "
            "are not read; saving once more with a current transformers makes safetensors of them)"
        )
    state = {key: value for name in names for key, value in load_file(folder / name).items()}
    return convert(state, json.loads((folder / "config.json").read_text(encoding="utf-8")))


@torch.no_grad()
def load_weights(module: nn.Module, build: Build, weights: Mapping[str, Tensor]) -> None:
    """Put whole tensors, by logical name, into the layers on this rank; before an engine divides the parameters.

    Nothing is written unless everything fits. A pipeline stage judges the names of its own layers only.
    """
    plan, here = build.mesh.plan, list(shards(module, build.mesh.at.tensor, build.mesh.plan.tensor))
    layers = tuple(f"{layer.logical}." for layer in module.modules() if hasattr(layer, "logical"))
    offered = {name for name in weights if plan.pipeline == 1 or name.startswith(layers)}
    _same_names({shard.name for shard, _ in here}, offered)
    wrong = [
        f"{shard.name} is {tuple(weights[shard.name].shape)} and should be {shard.shape}"
        for shard, _ in here
        if tuple(weights[shard.name].shape) != shard.shape
    ]
    if wrong:
        raise ValueError(f"weights do not fit the model: {_some(wrong)}")
    for shard, parameter in here:
        parameter.copy_(shard.take(weights[shard.name]))


def _canonical(state: Mapping[str, Tensor], family: Family, model: ModelConfig) -> Weights:
    """Stored tensors by their current names, each once, without what is no parameter."""
    found: Weights = {}
    origin: dict[str, str] = {}
    for stored, tensor in state.items():
        name = stored
        for pattern, replacement in family.rename(model).items():
            name = re.sub(pattern, replacement, name)
        if not name:
            continue
        if name in found and not torch.equal(found[name], tensor):
            raise ValueError(f"{origin[name]} and {stored} should be one tensor by the config, but their values differ")
        found[name], origin[name] = tensor, stored
    return found


def _same_names(wanted: set[str], got: Mapping[str, Any] | set[str]) -> None:
    missing, unexpected = sorted(wanted - set(got)), sorted(set(got) - wanted)
    if missing or unexpected:
        parts = [f"missing {_some(missing)}"] * bool(missing) + [f"unexpected {_some(unexpected)}"] * bool(unexpected)
        raise ValueError(f"weights do not match the model: {'; '.join(parts)}")


def _some(items: list[str], limit: int = 8) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    """GPT-2 stores its matrices input first."""
    return x.t()


def _stacked(*parts: Tensor) -> Tensor:
    """SwiGLU's first matrix: gate rows, then up rows."""
    return torch.cat(parts)


def _grouped(model: ModelConfig) -> Callable[..., Tensor]:
    """megatron-core's fused QKV: for each key head its query heads, its key, its value; weights [., H], biases [.]."""
    g = model.groups

    def make(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [x.reshape(g, x.shape[0] // g, *x.shape[1:]) for x in (q, k, v)]  # [G, RD | D | D, ...]
        return torch.cat(parts, 1).flatten(0, 1)

    return make


def _both(
    logical: str, stored: str | tuple[str, ...], make: Callable[..., Tensor] = _same, bias: bool = True
) -> Iterator[Rule]:
    """Weight and bias of a linear layer or a norm, made the same way."""
    layers = (stored,) if isinstance(stored, str) else stored
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Rule(f"{logical}.{kind}", tuple(f"{layer}.{kind}" for layer in layers), make)


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(unknown("activation", name, _ACTIVATIONS))
    return _ACTIVATIONS[name]


def _require(fields: Fields, **wanted: Any) -> None:
    """Refuse arithmetic that our layers do not have; a field that is absent has the wanted value by default."""
    wrong = [
        f"{name} = {fields[name]!r} (only {value!r})" for name, value in wanted.items() if fields.get(name, value) != value
    ]
    if wrong:
        raise ValueError(f"this {fields['model_type']} config computes what our layers do not: {', '.join(wrong)}")


def _gpt2_model(c: Fields) -> ModelConfig:
    _require(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return ModelConfig.model_validate(
        {
            "layers": c["n_layer"],
            "hidden": c["n_embd"],
            "heads": c["n_head"],
            "ffn": c.get("n_inner"),
            "vocab": c["vocab_size"],
            "positions": c["n_positions"],
            "norm_eps": c.get("layer_norm_epsilon", 1e-5),
            "activation": _activation(c.get("activation_function", "gelu_new")),
            "tie_embeddings": c.get("tie_word_embeddings", True),
            "dropout": c.get("resid_pdrop", 0.1),
            "init_std": c.get("initializer_range", 0.02),
        }
    )


def _gpt2_rules(model: ModelConfig) -> Iterator[Rule]:
    grouped = _grouped(model)

    def qkv(x: Tensor) -> Tensor:
        return grouped(*x.t().chunk(3))  # a bias has one dimension, for which t() changes nothing

    yield Rule("word.weight", ("wte.weight",), _same)
    yield Rule("embed.position.weight", ("wpe.weight",), _same)
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"h.{i}"
        yield from _both(f"{ours}.input_layernorm", f"{theirs}.ln_1")
        yield from _both(f"{ours}.self_attention.linear_qkv", f"{theirs}.attn.c_attn", qkv)
        yield from _both(f"{ours}.self_attention.linear_proj", f"{theirs}.attn.c_proj", _transposed)
        yield from _both(f"{ours}.pre_mlp_layernorm", f"{theirs}.ln_2")
        yield from _both(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.c_fc", _transposed)
        yield from _both(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.c_proj", _transposed)
    yield from _both("head.final_norm", "ln_f")
    if not model.tie_embeddings:
        yield Rule("output.weight", ("lm_head.weight",), _same)


FAMILIES.register("gpt2")(
    Family(
        model=_gpt2_model,
        rules=_gpt2_rules,
        rename=lambda model: {
            r"^transformer\.": "",
            r"^h\.\d+\.attn\.(masked_)?bias$": "",
            **({r"^lm_head\.": "wte."} if model.tie_embeddings else {}),
        },
    )
)


def _llama_model(c: Fields) -> ModelConfig:
    heads, rope = c["num_attention_heads"], c.get("rope_parameters") or c.get("rope_scaling") or {}
    bias = c.get("attention_bias", False)
    _require(c, hidden_act="silu", mlp_bias=bias, pretraining_tp=1, partial_rotary_factor=1.0)
    if c.get("head_dim") is not None:
        _require(c, head_dim=c["hidden_size"] // heads)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rotary positions of type {scaling!r} are not ours: only 'default', on whole heads ({rope})")
    return ModelConfig.model_validate(
        {
            "layers": c["num_hidden_layers"],
            "hidden": c["hidden_size"],
            "heads": heads,
            "kv_heads": c.get("num_key_value_heads"),
            "ffn": c["intermediate_size"],
            "vocab": c["vocab_size"],
            "norm": "rmsnorm",
            "norm_eps": c.get("rms_norm_eps", 1e-6),
            "activation": "swiglu",
            "position": "rope",
            "rope_base": rope.get("rope_theta", c.get("rope_theta", 10000.0)),
            "bias": bias,
            "tie_embeddings": c.get("tie_word_embeddings", False),
            "init_std": c.get("initializer_range", 0.02),
        }
    )


def _llama_rules(model: ModelConfig) -> Iterator[Rule]:
    bias = model.bias
    yield Rule("word.weight", ("embed_tokens.weight",), _same)
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv, fc1 = tuple(f"{attention}.{x}_proj" for x in "qkv"), (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        yield from _both(f"{ours}.input_layernorm", f"{theirs}.input_layernorm", bias=False)
        yield from _both(f"{ours}.self_attention.linear_qkv", qkv, _grouped(model), bias)
        yield from _both(f"{ours}.self_attention.linear_proj", f"{attention}.o_proj", bias=bias)
        yield from _both(f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm", bias=False)
        yield from _both(f"{ours}.mlp.linear_fc1", fc1, _stacked, bias)
        yield from _both(f"{ours}.mlp.linear_fc2", f"{mlp}.down_proj", bias=bias)
    yield Rule("head.final_norm.weight", ("norm.weight",), _same)
    if not model.tie_embeddings:
        yield Rule("output.weight", ("lm_head.weight",), _same)


FAMILIES.register("llama")(
    Family(
        model=_llama_model,
        rules=_llama_rules,
        rename=lambda model: {
            r"^model\.": "",
            r"^.*rotary_emb\.inv_freq$": "",
            **({r"^lm_head\.": "embed_tokens."} if model.tie_embeddings else {}),
        },
    )
)


_BERT_TIED = {
    r"^cls\.predictions\.decoder\.weight$": "embeddings.word_embeddings.weight",
    r"^cls\.predictions\.decoder\.bias$": "cls.predictions.bias",
}
_BERT_UNTIED = {
    r"^cls\.predictions\.bias$": "",  # transformers adds the decoder's own bias only
    r"^cls\.predictions\.decoder\.bias$": "cls.predictions.bias",
}


def _bert_model(c: Fields) -> ModelConfig:
    _require(c, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return ModelConfig.model_validate(
        {
            "layers": c["num_hidden_layers"],
            "hidden": c["hidden_size"],
            "heads": c["num_attention_heads"],
            "ffn": c["intermediate_size"],
            "vocab": c["vocab_size"],
            "positions": c["max_position_embeddings"],
            "norm_position": "post",
            "norm_eps": c.get("layer_norm_eps", 1e-12),
            "activation": _activation(c.get("hidden_act", "gelu")),
            "token_types": c.get("type_vocab_size", 2),
            "head_transform": True,
            "tie_embeddings": c.get("tie_word_embeddings", True),
            "dropout": c.get("hidden_dropout_prob", 0.1),
            "init_std": c.get("initializer_range", 0.02),
        }
    )


def _bert_rules(model: ModelConfig) -> Iterator[Rule]:
    yield Rule("word.weight", ("embeddings.word_embeddings.weight",), _same)
    yield Rule("embed.position.weight", ("embeddings.position_embeddings.weight",), _same)
    yield Rule("embed.types.weight", ("embeddings.token_type_embeddings.weight",), _same)
    yield from _both("embed.norm", "embeddings.LayerNorm")
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        qkv = tuple(f"{theirs}.attention.self.{x}" for x in ("query", "key", "value"))
        yield from _both(f"{ours}.self_attention.linear_qkv", qkv, _grouped(model))
        yield from _both(f"{ours}.self_attention.linear_proj", f"{theirs}.attention.output.dense")
        yield from _both(f"{ours}.pre_cross_attn_layernorm", f"{theirs}.attention.output.LayerNorm")
        yield from _both(f"{ours}.mlp.linear_fc1", f"{theirs}.intermediate.dense")
        yield from _both(f"{ours}.mlp.linear_fc2", f"{theirs}.output.dense")
        yield from _both(f"{ours}.output_norm", f"{theirs}.output.LayerNorm")
    yield from _both("head.dense", "cls.predictions.transform.dense")
    yield from _both("head.dense_norm", "cls.predictions.transform.LayerNorm")
    yield Rule("head.output_bias.bias", ("cls.predictions.bias",), _same)
    if not model.tie_embeddings:
        yield Rule("output.weight", ("cls.predictions.decoder.weight",), _same)


FAMILIES.register("bert")(
    Family(
        model=_bert_model,
        rules=_bert_rules,
        rename=lambda model: {
            r"^bert\.": "",
            r"\.gamma$": ".weight",
            r"\.beta$": ".bias",
            r"^(embeddings\.position_ids$|pooler\..*|cls\.seq_relationship\..*)": "",
            **(_BERT_TIED if model.tie_embeddings else _BERT_UNTIED),
        },
    )
)
