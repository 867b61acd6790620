"""GPT-2 (Radford et al. 2019) as `transformers` stores it."""

from __future__ import annotations

from collections.abc import Iterator

from ds_pretrain.interop.rules import (
    ACTIVATIONS,
    FAMILIES,
    SAME,
    TRANSPOSED,
    Family,
    Fields,
    Rule,
    Side,
    activation,
    both,
    fused,
    require,
    trained_for,
)
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective


def _model(c: Fields) -> ModelConfig:
    require(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    dropout = c.get("resid_pdrop", 0.1)
    require({"embd_pdrop": 0.1, **c}, embd_pdrop=dropout)
    return ModelConfig.model_validate(
        {
            "layers": c["n_layer"],
            "hidden": c["n_embd"],
            "heads": c["n_head"],
            "ffn": c.get("n_inner"),
            "vocab": c["vocab_size"],
            "positions": c["n_positions"],
            "norm_eps": c.get("layer_norm_epsilon", 1e-5),
            "activation": activation(c.get("activation_function", "gelu_new")),
            "tie_embeddings": c.get("tie_word_embeddings", True),
            "dropout": dropout,
            "attention_dropout": c.get("attn_pdrop", 0.1),
            "init_std": c.get("initializer_range", 0.02),
        }
    )


def _fields(m: ModelConfig) -> Fields:
    return {
        "n_layer": m.layers,
        "n_embd": m.hidden,
        "n_head": m.heads,
        "n_inner": m.ffn,  # None is four times n_embd on both sides
        "vocab_size": m.vocab,
        "n_positions": m.positions,
        "layer_norm_epsilon": m.norm_eps,
        "activation_function": ACTIVATIONS[m.activation],
        "tie_word_embeddings": m.tie_embeddings,
        "resid_pdrop": m.dropout,
        "embd_pdrop": m.dropout,
        "attn_pdrop": m.dropout if m.attention_dropout is None else m.attention_dropout,
        "initializer_range": m.init_std,
    }


def _rules(model: ModelConfig) -> Iterator[Rule]:
    yield Rule("word.weight", ("transformer.wte.weight",))
    yield Rule("embed.position.weight", ("transformer.wpe.weight",))
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        yield from both(f"{ours}.input_layernorm", f"{theirs}.ln_1")
        yield from both(f"{ours}.self_attention.linear_qkv", f"{theirs}.attn.c_attn", fused(model))
        yield from both(f"{ours}.self_attention.linear_proj", f"{theirs}.attn.c_proj", TRANSPOSED)
        yield from both(f"{ours}.pre_mlp_layernorm", f"{theirs}.ln_2")
        yield from both(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.c_fc", TRANSPOSED)
        yield from both(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.c_proj", TRANSPOSED)
    yield from both("head.final_norm", "transformer.ln_f")
    if not model.tie_embeddings:
        yield Rule("output.weight", ("lm_head.weight",), SAME)


def _takes(m: ModelConfig, objective: Objective) -> bool:
    shape = (m.norm, m.norm_position, m.position, m.bias, m.groups == m.heads, m.head_transform, m.token_types)
    fits = shape == ("layernorm", "pre", "learned", True, True, False, 0) and m.activation in ACTIVATIONS
    return fits and objective.kind == "causal"


FAMILIES.register("gpt2")(
    Family(
        model=_model,
        objective=trained_for({}, "clm"),
        takes=_takes,
        sides=lambda model, objective: {"": Side("GPT2LMHeadModel", _fields(model), list(_rules(model)))},
        rename=lambda model: {
            r"^(?!transformer\.|lm_head\.)": "transformer.",
            r"^transformer\.h\.\d+\.attn\.(masked_)?bias$": "",
            **({r"^lm_head\.": "transformer.wte."} if model.tie_embeddings else {}),
        },
    )
)
