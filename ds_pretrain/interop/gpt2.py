"""GPT-2 (Radford et al. 2019) as `transformers` stores it."""

from __future__ import annotations

from collections.abc import Iterator

from ds_pretrain.interop.rules import (
    ACTIVATIONS,
    FAMILIES,
    TRANSPOSED,
    Family,
    Fields,
    Name,
    Rule,
    Side,
    both,
    fused,
    read,
    require,
    trained_for,
    written,
)
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective

NAMES = {
    "layers": Name("n_layer"),
    "hidden": Name("n_embd"),
    "heads": Name("n_head"),
    "ffn": Name("n_inner", None),
    "vocab": Name("vocab_size"),
    "positions": Name("n_positions"),
    "norm_eps": Name("layer_norm_epsilon", 1e-5),
    "activation": Name("activation_function", "gelu_new"),
    "tie_embeddings": Name("tie_word_embeddings", True),
    "dropout": Name("resid_pdrop", 0.1),
    "attention_dropout": Name("attn_pdrop", 0.1),
    "init_std": Name("initializer_range", 0.02),
}


def _model(c: Fields) -> ModelConfig:
    require(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    found = read(c, NAMES)
    require({"embd_pdrop": 0.1, **c}, embd_pdrop=found["dropout"])
    return ModelConfig.model_validate(found)


def _fields(m: ModelConfig) -> Fields:
    return {**written(m, NAMES), "embd_pdrop": m.dropout, "n_inner": m.ffn}  # None is four times n_embd on both sides


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
        yield Rule("output.weight", ("lm_head.weight",))


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
