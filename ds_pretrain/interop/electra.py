"""ELECTRA (Clark et al. 2020) as `transformers` stores it: two models, each with its own copy of the shared embeddings.

The library's discriminator answers with one logit, ours with two classes: theirs is the difference of ours, so a model that
comes in gets half of it on either side. Only models whose embeddings are as wide as the discriminator (ELECTRA-Base and -Large)
are ours: -Small factorises them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ds_pretrain.interop.bert import embedding_rules, fields_of, is_encoder, layer_rules, shape_of
from ds_pretrain.interop.rules import FAMILIES, Family, Fields, Rule, Side, Way, both, classifiers, require
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective, create

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


def _model(c: Fields) -> ModelConfig:
    """The discriminator of a config."""
    if c.get("embedding_size", 128) != c["hidden_size"]:
        raise ValueError(
            f"this electra config embeds words in {c.get('embedding_size', 128)} dimensions and computes in "
            f"{c['hidden_size']}: a factorised embedding is not ours"
        )
    require(c, hidden_act="gelu", tie_word_embeddings=True)
    return shape_of(c)


def _objective(name: str | None, configs: Mapping[str, Fields]) -> Objective:
    if name not in (None, "electra"):
        raise ValueError(f"an electra model is trained for electra, not for {name}")
    small, model = configs[GENERATOR], shape_of(configs[DISCRIMINATOR])
    require(small, hidden_act="gelu", tie_word_embeddings=True)
    share = small["num_attention_heads"] / model.heads
    other, ours = shape_of(small).model_dump(), model.narrower(share).model_dump()
    for field in other.keys() - {"init_std"}:
        if ours[field] != other[field]:
            raise ValueError(
                f"the generator has {field} {other[field]}: ours, with {share:.3g} of the discriminator's heads, has "
                f"{ours[field]}"
            )
    return create("electra", generator_size=share)


def _two_classes(x: Tensor) -> Tensor:
    return torch.cat((-x.float() / 2, x.float() / 2))


def _one_logit(x: Tensor) -> tuple[Tensor, ...]:
    return (x[1:] - x[:1],)


def _discriminator(model: ModelConfig) -> Iterator[Rule]:
    yield from embedding_rules("electra.")
    yield from layer_rules(model, "electra.")
    yield from both("head.classifiers.rtd.dense", "discriminator_predictions.dense")
    yield from both("head.classifiers.rtd.out", "discriminator_predictions.dense_prediction", Way(_two_classes, _one_logit))


def _generator(small: ModelConfig) -> Iterator[Rule]:
    yield from embedding_rules("electra.")
    yield from both("generator.embed.dense", "electra.embeddings_project")
    yield from layer_rules(small, "electra.", "generator.")
    yield from both("generator.head.dense", "generator_predictions.dense")
    yield from both("generator.head.dense_norm", "generator_predictions.LayerNorm")
    yield Rule("generator.head.output_bias.bias", ("generator_lm_head.bias",))


def _sides(model: ModelConfig, objective: Objective) -> dict[str, Side]:
    assert objective.generator is not None
    small = model.narrower(objective.generator[1])
    wide = {"embedding_size": model.hidden}
    return {
        DISCRIMINATOR: Side("ElectraForPreTraining", {**fields_of(model), **wide}, list(_discriminator(model))),
        GENERATOR: Side("ElectraForMaskedLM", {**fields_of(small), **wide}, list(_generator(small))),
    }


def _takes(m: ModelConfig, objective: Objective) -> bool:
    """A generator as wide as its model has no projection of the embeddings there, and one here."""
    fits = is_encoder(m, objective) and m.tie_embeddings and m.activation == "gelu"
    if not (fits and objective.generator and classifiers(objective) == {("rtd", 2, "gelu")}):
        return False
    return m.narrower(objective.generator[1]).hidden != m.hidden


FAMILIES.register("electra")(
    Family(
        model=_model,
        objective=_objective,
        takes=_takes,
        sides=_sides,
        places=(DISCRIMINATOR, GENERATOR),
        rename=lambda model: {
            r"^(?=embeddings|encoder)": "electra.",
            r"^electra\.embeddings\.position_ids$": "",
            r"^generator_lm_head\.weight$": "electra.embeddings.word_embeddings.weight",
        },
    )
)
