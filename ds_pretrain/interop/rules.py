"""How the tensors of a foreign model and ours are made of each other, and what a family of foreign models is.

A family is a config that reads as a `ModelConfig` and back, and a table of rules, one for each of our parameters, that says of
which stored tensors it is made, and how they come back out of it. Every way there has its way back, bit for bit, so one table
serves both directions. A config that asks for arithmetic we do not have, and a stored tensor that no rule takes, are errors:
dropped silently, either gives a model that runs and is another one. `transformers` itself is never imported.

Shape suffixes: H hidden, N query heads, G key heads, D head size, R = N / G query heads of a group, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_pretrain.core.registry import Registry, unknown
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective, create

Fields = Mapping[str, Any]
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
"""Ours, and what configs call them."""
SPELLINGS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}


class Way(NamedTuple):
    """From stored tensors to one of ours, and back."""

    make: Callable[..., Tensor]
    split: Callable[[Tensor], tuple[Tensor, ...]]


SAME = Way(lambda x: x, lambda x: (x,))
TRANSPOSED = Way(lambda x: x.t(), lambda x: (x.t(),))
"""GPT-2 stores its matrices input first; a bias has one dimension, for which t() changes nothing."""
STACKED = Way(lambda gate, up: torch.cat((gate, up)), lambda x: x.chunk(2))
"""SwiGLU's first matrix: gate rows, then up rows."""


def grouped(model: ModelConfig) -> Way:
    """megatron-core's fused QKV: for each key head its query heads, its key, its value; weights [., H], biases [.]."""
    g, d = model.groups, model.head_dim
    rows = (model.heads // g * d, d, d)  # of a group: R D, D, D

    def make(*qkv: Tensor) -> Tensor:
        return torch.cat([x.reshape(g, n, *x.shape[1:]) for x, n in zip(qkv, rows, strict=True)], 1).flatten(0, 1)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.flatten(0, 1) for part in x.reshape(g, sum(rows), *x.shape[1:]).split(rows, 1))

    return Way(make, split)


def fused(model: ModelConfig) -> Way:
    """GPT-2's QKV: one matrix [H, 3 H] with queries, keys and values side by side."""
    way = grouped(model)
    return Way(lambda x: way.make(*x.t().chunk(3)), lambda x: (torch.cat(way.split(x)).t(),))


class Rule(NamedTuple):
    """One of our parameters: its logical name, the stored tensors it is made of, and how."""

    logical: str
    stored: tuple[str, ...]
    way: Way = SAME
    copies: bool = False
    """Whether the stored tensors are copies of one: any of them will do."""


def both(logical: str, stored: str | tuple[str, ...], way: Way = SAME, bias: bool = True) -> Iterator[Rule]:
    """Weight and bias of a linear layer or a norm, made the same way."""
    layers = (stored,) if isinstance(stored, str) else stored
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Rule(f"{logical}.{kind}", tuple(f"{layer}.{kind}" for layer in layers), way)


class Side(NamedTuple):
    """A model that `transformers` knows: its class, its config (our special ids are added), and the rules of its tensors. bare:
    what names of tensors begin with in the rules and not in the file, as the class is the base of others."""

    architecture: str
    fields: Fields
    rules: Sequence[Rule]
    bare: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one `model_type`. Patterns are regular expressions on stored names."""

    model: Callable[[Fields], ModelConfig]
    """The config of the library as ours."""
    objective: Callable[[str | None, Mapping[str, Fields]], Objective]
    """What a model is to be trained for: the objective of that name, or without one what its class was trained for, as the
    configs of its sides tell it."""
    takes: Callable[[ModelConfig, Objective], bool]
    """Whether a model of ours that was trained so is of this family."""
    sides: Callable[[ModelConfig, Objective], Mapping[str, Side]]
    """Such a model of ours as the library knows it: models by the subfolder they lie in, "" for the folder itself. A parameter
    that two of them have is stored in both, and must be equal there."""
    places: tuple[str, ...] = ("",)
    """Subfolders of its models."""
    heads: str = r"(?!)"
    """Pattern of the stored names that a model may lack or have too many of: those of heads. Without it there are none."""
    rename: Callable[[ModelConfig], Mapping[str, str]]
    """Older or second names, pattern to replacement. Two names that become one must hold equal tensors; what becomes the empty
    name is no parameter (buffers) and is left out."""


FAMILIES: Registry[Family] = Registry("model type of transformers")


def family_of(model: ModelConfig, objective: Objective) -> tuple[str, Family]:
    """The family that a model of ours is written as. ValueError with what stands in the way."""
    for name in FAMILIES:
        if FAMILIES[name].takes(model, objective):
            return name, FAMILIES[name]
    shape = f"{model.norm} {model.norm_position}, {model.activation}, {model.position} positions, bias {model.bias}"
    raise ValueError(
        f"no family of transformers computes what this model does ({shape}, objective {objective.name}): exported are GPT-2 "
        f"(layernorm pre, gelu, learned, bias), LLaMA (rmsnorm pre, swiglu, rope) and BERT's kin (layernorm post, learned)"
    )


def trained_for(classes: Mapping[str, str], other: str) -> Callable[[str | None, Mapping[str, Fields]], Objective]:
    """An objective by its name, or without one by the class in a config. other: what all other classes were trained for."""

    def choose(name: str | None, configs: Mapping[str, Fields]) -> Objective:
        named = next(iter(configs.values())).get("architectures") or ()
        return create(name or next((classes[each] for each in named if each in classes), other))

    return choose


def classifiers(objective: Objective) -> set[tuple[str, int, str]]:
    """Name, classes and activation of each head that is not over words: what a class of the library has to have too."""
    return {(head.name, head.classes, head.activation) for head in objective.heads if head.classes is not None}


class Name(NamedTuple):
    """What a config calls a field of ours. default: the field's value where the config leaves it out; none: it may not."""

    theirs: str
    default: Any = ...


def read(fields: Fields, names: Mapping[str, Name]) -> dict[str, Any]:
    """Our fields as a config has them. KeyError naming one that must be there."""
    found = {
        ours: fields[name.theirs] if name.default is ... else fields.get(name.theirs, name.default)
        for ours, name in names.items()
    }
    return found | ({"activation": activation(found["activation"])} if "activation" in found else {})


def written(m: ModelConfig, names: Mapping[str, Name]) -> dict[str, Any]:
    """The way back, with what ours derives spelled out."""
    dropped = m.dropout if m.attention_dropout is None else m.attention_dropout
    derived = {"ffn": m.ffn_width, "kv_heads": m.groups, "attention_dropout": dropped}
    whole = m.model_dump() | derived | {"activation": ACTIVATIONS.get(m.activation)}
    return {name.theirs: whole[ours] for ours, name in names.items()}


def require(fields: Fields, **wanted: Any) -> None:
    """Refuse arithmetic that our layers do not have; a field that is absent has the wanted value by default."""
    wrong = [
        f"{name} = {fields[name]!r} (only {value!r})" for name, value in wanted.items() if fields.get(name, value) != value
    ]
    if wrong:
        raise ValueError(
            f"this {fields['model_type']} config computes what our layers do not: {', '.join(wrong)}: choose another model"
        )


def activation(name: str) -> str:
    """Ours for a config's."""
    if name not in SPELLINGS:
        raise ValueError(unknown("activation", name, SPELLINGS))
    return SPELLINGS[name]
