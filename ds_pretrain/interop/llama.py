"""LLaMA (Touvron et al. 2023) and what computes the same under its name, grouped-query attention included."""

from __future__ import annotations

from collections.abc import Iterator

from ds_pretrain.interop.rules import (
    FAMILIES,
    STACKED,
    Family,
    Fields,
    Name,
    Rule,
    Side,
    both,
    grouped,
    read,
    require,
    trained_for,
    written,
)
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective

NAMES = {
    "layers": Name("num_hidden_layers"),
    "hidden": Name("hidden_size"),
    "heads": Name("num_attention_heads"),
    "kv_heads": Name("num_key_value_heads", None),
    "ffn": Name("intermediate_size"),
    "vocab": Name("vocab_size"),
    "positions": Name("max_position_embeddings", 2048),
    "norm_eps": Name("rms_norm_eps", 1e-6),
    "bias": Name("attention_bias", False),
    "tie_embeddings": Name("tie_word_embeddings", False),
    "attention_dropout": Name("attention_dropout", 0.0),
    "init_std": Name("initializer_range", 0.02),
}


def _model(c: Fields) -> ModelConfig:
    found, rope = read(c, NAMES), c.get("rope_scaling") or c.get("rope_parameters") or {}
    require(c, hidden_act="silu", mlp_bias=found["bias"], pretraining_tp=1, partial_rotary_factor=1.0)
    if c.get("head_dim") is not None:
        require(c, head_dim=found["hidden"] // found["heads"])
    rotary = {"rope_base": rope.get("rope_theta", c.get("rope_theta", 10000.0)), "rope_scaling": _scaling(c, rope)}
    return ModelConfig.model_validate({**found, **rotary, "norm": "rmsnorm", "activation": "swiglu", "position": "rope"})


SCALING = {
    "factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor", "trained": "original_max_position_embeddings"
}  # fmt: skip
"""Our fields of a scaling, and the library's; a linear one has the first alone."""


def _scaling(c: Fields, rope: Fields) -> Fields | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rotary positions of type {kind!r} are not ours: only default, linear and llama3, on whole heads ({dict(rope)})"
        )
    if kind == "default":
        return None
    told = {**c, **rope}
    return {"kind": kind, **{ours: told[theirs] for ours, theirs in SCALING.items() if kind == "llama3" or ours == "factor"}}


def _rope(m: ModelConfig) -> Fields:
    if (scaling := m.rope_scaling) is None:
        return {"rope_type": "default", "rope_theta": m.rope_base}
    kept = {theirs: getattr(scaling, ours) for ours, theirs in SCALING.items() if scaling.kind == "llama3" or ours == "factor"}
    return {"rope_type": scaling.kind, "rope_theta": m.rope_base, **kept}


def _fields(m: ModelConfig) -> Fields:
    known = written(m, NAMES)
    limit = NAMES["positions"]
    return {
        **known,
        limit.theirs: known[limit.theirs] or limit.default,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "mlp_bias": m.bias,
        "rope_theta": m.rope_base,  # where transformers before 5 looks
        "rope_parameters": _rope(m),
        **({"rope_scaling": _rope(m)} if m.rope_scaling else {}),
    }


def _rules(model: ModelConfig) -> Iterator[Rule]:
    bias = model.bias
    yield Rule("word.weight", ("model.embed_tokens.weight",))
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv, fc1 = tuple(f"{attention}.{x}_proj" for x in "qkv"), (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        yield from both(f"{ours}.input_layernorm", f"{theirs}.input_layernorm", bias=False)
        yield from both(f"{ours}.self_attention.linear_qkv", qkv, grouped(model), bias)
        yield from both(f"{ours}.self_attention.linear_proj", f"{attention}.o_proj", bias=bias)
        yield from both(f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm", bias=False)
        yield from both(f"{ours}.mlp.linear_fc1", fc1, STACKED, bias)
        yield from both(f"{ours}.mlp.linear_fc2", f"{mlp}.down_proj", bias=bias)
    yield Rule("head.final_norm.weight", ("model.norm.weight",))
    if not model.tie_embeddings:
        yield Rule("output.weight", ("lm_head.weight",))


def _takes(m: ModelConfig, objective: Objective) -> bool:
    shape = (m.norm, m.norm_position, m.activation, m.position, m.head_transform, m.token_types)
    return shape == ("rmsnorm", "pre", "swiglu", "rope", False, 0) and objective.kind == "causal"


FAMILIES.register("llama")(
    Family(
        model=_model,
        objective=trained_for({}, "clm"),
        takes=_takes,
        sides=lambda model, objective: {"": Side("LlamaForCausalLM", _fields(model), list(_rules(model)))},
        rename=lambda model: {
            r"^(?!model\.|lm_head\.)": "model.",
            r"^.*rotary_emb\.inv_freq$": "",
            **({r"^lm_head\.": "model.embed_tokens."} if model.tie_embeddings else {}),
        },
    )
)
