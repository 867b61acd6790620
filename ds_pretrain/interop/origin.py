"""What a folder of `transformers` says beside its weights and tokens: how texts end, are cut, become prompts or vectors.

It goes with every checkpoint that began with those weights, as `origin` of its manifest, so that a model that is trained on
and handed out still knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_pretrain.core.files import read_json
from ds_pretrain.core.pooling import sentences_of

TOKENIZER = ("chat_template", "model_max_length")
"""Fields of tokenizer_config.json that are not about its ids."""


def origin_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What goes along. config: of the model. ValueError for a way from states to vectors that is not ours."""
    said, template = read_json(folder / "tokenizer_config.json", {}), folder / "chat_template.jinja"
    if template.is_file():
        said = {**said, "chat_template": template.read_text(encoding="utf-8")}
    ends = {"eos_token_id": config["eos_token_id"]} if config.get("eos_token_id") is not None else {}
    return {
        "generation": {**ends, **read_json(folder / "generation_config.json", {})},
        "tokenizer": {name: said[name] for name in TOKENIZER if name in said},
        "sentences": sentences_of(folder)._asdict(),
    }


def known_tokens(folder: Path, origin: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str | int]:
    """The tokens that a causal model's texts end and begin with, by our names: as its tokenizer says, else its config."""
    said, ends = read_json(folder / "tokenizer_config.json", {}), origin["generation"].get("eos_token_id")
    asked = {
        "<eod>": _spelled(said.get("eos_token"), ends[0] if isinstance(ends, list) and ends else ends),
        "<bos>": _spelled(said.get("bos_token"), config.get("bos_token_id")),
    }
    return {name: token for name, token in asked.items() if token is not None}


def _spelled(token: Any, otherwise: int | None) -> str | int | None:
    """A token as a tokenizer_config.json writes it, plain or with its flags."""
    name = token.get("content") if isinstance(token, dict) else token
    return otherwise if name is None else name
