"""BERT (Devlin et al. 2019) and ALBERT (Lan et al. 2020) as `transformers` stores them: encoders with norms after their blocks.

The heads of the objective say which of the library's classes a model is. Labels agree: 1 is "from another document" and
"swapped" on both sides. Of ALBERT there are its heads only: neither its factorised embedding nor its shared layers are ours, so
a model leaves with an embedding as wide as its layers and a group of its own for every layer, and only such a one comes in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ds_pretrain.interop.rules import (
    ACTIVATIONS,
    FAMILIES,
    Family,
    Fields,
    Name,
    Rule,
    Side,
    Way,
    both,
    classifiers,
    grouped,
    read,
    require,
    trained_for,
    written,
)
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective

log = logging.getLogger(__name__)
EMBEDDINGS = {
    "word": "word_embeddings",
    "embed.position": "position_embeddings",
    "embed.types": "token_type_embeddings",
}


NAMES = {
    "layers": Name("num_hidden_layers"),
    "hidden": Name("hidden_size"),
    "heads": Name("num_attention_heads"),
    "ffn": Name("intermediate_size"),
    "vocab": Name("vocab_size"),
    "positions": Name("max_position_embeddings"),
    "norm_eps": Name("layer_norm_eps", 1e-12),
    "activation": Name("hidden_act", "gelu"),
    "token_types": Name("type_vocab_size", 2),
    "tie_embeddings": Name("tie_word_embeddings", True),
    "dropout": Name("hidden_dropout_prob", 0.1),
    "attention_dropout": Name("attention_probs_dropout_prob", 0.1),
    "init_std": Name("initializer_range", 0.02),
}


def shape_of(c: Fields) -> ModelConfig:
    """The model of a config with BERT's names."""
    require(c, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return ModelConfig.model_validate({**read(c, NAMES), "norm_position": "post", "head_transform": True})


def fields_of(m: ModelConfig) -> Fields:
    """The other way round."""
    return written(m, NAMES)


def is_encoder(m: ModelConfig, objective: Objective) -> bool:
    """Whether a model of ours computes what BERT's layers do."""
    shape = (m.norm, m.norm_position, m.position, m.bias, m.groups == m.heads, m.token_types > 0)
    words = any(head.classes is None for head in objective.heads)
    fits = shape == ("layernorm", "post", "learned", True, True, True) and m.activation in ACTIVATIONS
    return fits and objective.kind == "full" and (m.head_transform or not words)


def embedding_rules(prefix: str) -> Iterator[Rule]:
    """Words, positions, types and the norm after them."""
    for ours, theirs in EMBEDDINGS.items():
        yield Rule(f"{ours}.weight", (f"{prefix}embeddings.{theirs}.weight",))
    yield from both("embed.norm", f"{prefix}embeddings.LayerNorm")


LAYER = {
    "self_attention.linear_proj": "attention.output.dense",
    "pre_cross_attn_layernorm": "attention.output.LayerNorm",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc2": "output.dense",
    "output_norm": "output.LayerNorm",
}
"""Parts of a layer, ours and BERT's. Queries, keys and values come on top."""


def layer_rules(model: ModelConfig, prefix: str, logical: str = "") -> Iterator[Rule]:
    """The encoder's layers."""
    return _layers(model, prefix + "encoder.layer.{}", logical, "attention.self", LAYER)


def _layers(model: ModelConfig, place: str, logical: str, attention: str, parts: Mapping[str, str]) -> Iterator[Rule]:
    """place: of layer {}. attention: where its queries, keys and values are."""
    for i in range(model.layers):
        ours, theirs = f"{logical}layers.{i}", place.format(i)
        qkv = tuple(f"{theirs}.{attention}.{x}" for x in ("query", "key", "value"))
        yield from both(f"{ours}.self_attention.linear_qkv", qkv, grouped(model))
        for mine, name in parts.items():
            yield from both(f"{ours}.{mine}", f"{theirs}.{name}")


def _word_rules(model: ModelConfig, transform: str, norm: str, predictions: str) -> Iterator[Rule]:
    """The head over words. Untied, the library adds the decoder's own bias and keeps an idle one beside it."""
    yield from both("head.dense", transform)
    yield from both("head.dense_norm", norm)
    if model.tie_embeddings:
        yield Rule("head.output_bias.bias", (f"{predictions}.bias",))
        return
    first = Way(_used, lambda x: (x, x))
    yield Rule("head.output_bias.bias", (f"{predictions}.decoder.bias", f"{predictions}.bias"), first, copies=True)
    yield Rule("output.weight", (f"{predictions}.decoder.weight",))


def _used(used: Tensor, *idle: Tensor) -> Tensor:
    """The bias that is added."""
    if not all(torch.equal(used, each) for each in idle):
        log.warning("predictions.bias is not predictions.decoder.bias, which alone is added: both go out as the latter")
    return used


def _tied(predictions: str, embeddings: str) -> dict[str, str]:
    """Second names of tied tensors."""
    return {
        rf"^{predictions}\.decoder\.weight$": f"{embeddings}.word_embeddings.weight",
        rf"^{predictions}\.decoder\.bias$": f"{predictions}.bias",
    }


def _pooled(objective: Objective) -> bool:
    """Whether BERT's pooler and the two classes of its pair head are all that is there beside words."""
    found = classifiers(objective)
    return len(found) <= 1 and all(each == ("nsp", 2, "tanh") or each[1:] == (0, "tanh") for each in found)


def _words_and_classifier(objective: Objective) -> tuple[bool, str | None, bool]:
    """Whether words are predicted, the name of the head with classes, and whether it has any."""
    head = next((head for head in objective.heads if head.classes is not None), None)
    words = any(each.classes is None for each in objective.heads)
    return words, head.name if head else None, bool(head and head.classes)


def _bert(model: ModelConfig, objective: Objective) -> Side:
    words, classifier, classes = _words_and_classifier(objective)
    rules = [*embedding_rules("bert."), *layer_rules(model, "bert.")]
    if classifier:
        rules += both(f"head.classifiers.{classifier}.dense", "bert.pooler.dense")
    if classes:
        rules += both(f"head.classifiers.{classifier}.out", "cls.seq_relationship")
    if words:
        transform = "cls.predictions.transform"
        rules += _word_rules(model, f"{transform}.dense", f"{transform}.LayerNorm", "cls.predictions")
    name = (
        "ForPreTraining"
        if words and classes
        else "ForMaskedLM"
        if words
        else "ForNextSentencePrediction"
        if classes
        else "Model"
    )
    return Side(f"Bert{name}", fields_of(model), rules, bare="" if words or classes else "bert.")


FAMILIES.register("bert")(
    Family(
        model=shape_of,
        objective=trained_for(
            {"BertForPreTraining": "bert", "BertForNextSentencePrediction": "nsp", "BertModel": "simcse"}, "mlm"
        ),
        takes=lambda m, objective: is_encoder(m, objective) and _pooled(objective),
        sides=lambda model, objective: {"": _bert(model, objective)},
        heads=r"cls\.|bert\.pooler\.",
        rename=lambda model: {
            r"^(embeddings|encoder|pooler)\.": r"bert.\1.",
            r"\.gamma$": ".weight",
            r"\.beta$": ".bias",
            r"^bert\.embeddings\.position_ids$": "",
            **(_tied("cls.predictions", "bert.embeddings") if model.tie_embeddings else {}),
        },
    )
)


def _albert_model(c: Fields) -> ModelConfig:
    require(c, inner_group_num=1)
    if c.get("num_hidden_groups", 1) != c["num_hidden_layers"]:
        raise ValueError(
            f"this albert config shares {c.get('num_hidden_groups', 1)} groups of weights among {c['num_hidden_layers']} "
            "layers: ours have their own"
        )
    if c.get("embedding_size", 128) != c["hidden_size"]:
        raise ValueError(
            f"this albert config embeds words in {c.get('embedding_size', 128)} dimensions and computes in {c['hidden_size']}: "
            "a factorised embedding is not ours"
        )
    return shape_of({"hidden_act": "gelu_new", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **c})


def _eye(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=x.dtype) if x.ndim == 2 else torch.zeros_like(x)


def _mapped(word: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The embedding, where the map after it does nothing."""
    if not (torch.equal(weight, _eye(weight)) and torch.equal(bias, _eye(bias))):
        raise ValueError(
            "this albert model maps its embeddings before the first layer (embedding_hidden_mapping_in): ours do not"
        )
    return word


def _unmapped(word: Tensor) -> tuple[Tensor, ...]:
    width = word.shape[1]
    return word, torch.eye(width, dtype=word.dtype), word.new_zeros(width)


ALBERT_LAYER = {
    "self_attention.linear_proj": "attention.dense",
    "pre_cross_attn_layernorm": "attention.LayerNorm",
    "mlp.linear_fc1": "ffn",
    "mlp.linear_fc2": "ffn_output",
    "output_norm": "full_layer_layer_norm",
}


def _albert_rules(model: ModelConfig) -> Iterator[Rule]:
    mapping = "albert.encoder.embedding_hidden_mapping_in"
    words, *others = embedding_rules("albert.")
    yield words._replace(stored=(*words.stored, f"{mapping}.weight", f"{mapping}.bias"), way=Way(_mapped, _unmapped))
    yield from others
    yield from _layers(model, "albert.encoder.albert_layer_groups.{}.albert_layers.0", "", "attention", ALBERT_LAYER)


def _albert(model: ModelConfig, objective: Objective) -> Side:
    _, classifier, _ = _words_and_classifier(objective)
    rules = list(_albert_rules(model))
    rules += both(f"head.classifiers.{classifier}.dense", "albert.pooler")
    rules += both(f"head.classifiers.{classifier}.out", "sop_classifier.classifier")
    rules += _word_rules(model, "predictions.dense", "predictions.LayerNorm", "predictions")
    fields = {
        **fields_of(model),
        "embedding_size": model.hidden,
        "num_hidden_groups": model.layers,
        "classifier_dropout_prob": 0.0,
    }
    return Side("AlbertForPreTraining", fields, rules)


FAMILIES.register("albert")(
    Family(
        model=_albert_model,
        objective=trained_for({"AlbertForPreTraining": "albert"}, "albert"),
        takes=lambda m, objective: (
            is_encoder(m, objective)
            and classifiers(objective) == {("sop", 2, "tanh")}
            and any(head.classes is None for head in objective.heads)
        ),
        sides=lambda model, objective: {"": _albert(model, objective)},
        heads=r"predictions\.|sop_classifier\.|albert\.pooler\.",
        rename=lambda model: {
            r"^(embeddings|encoder|pooler)\.": r"albert.\1.",
            r"^albert\.embeddings\.position_ids$": "",
            **(_tied("predictions", "albert.embeddings") if model.tie_embeddings else {}),
        },
    )
)
