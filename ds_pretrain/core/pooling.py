"""How a folder of sentence-transformers makes one vector of a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ds_pretrain.core.files import read_json

UNLIMITED = 1 << 30
"""A limit that is none: tokenizers write 1e30."""
UNLISTED = [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1_Pooling"}]
"""The layers of a folder that has a pooling and lost its list of layers."""


class Sentences(NamedTuple):
    """pooling: `cls` or `mean`; None: it is no folder of sentence-transformers. tokens: how many of a text are read, special
    ones included; None: as many as the model has positions. unit: whether vectors are scaled to length 1."""

    pooling: str | None = None
    tokens: int | None = None
    unit: bool = False


def sentences_of(folder: Path) -> Sentences:
    """What a folder says. ValueError as `pooling_of`, and for what it does to texts before they are cut into tokens."""
    said, prompts = (
        read_json(folder / f"{name}.json", {}) for name in ("sentence_bert_config", "config_sentence_transformers")
    )
    if prompts.get("default_prompt_name"):
        raise ValueError(
            f"{folder / 'config_sentence_transformers.json'} puts its prompt {prompts['default_prompt_name']!r} before each "
            "text, which is not done here: set default_prompt_name to null, and write the prompt into the texts"
        )
    if said.get("do_lower_case") and not _lowers(read_json(folder / "tokenizer.json", {}).get("normalizer") or {}):
        raise ValueError(
            f"{folder / 'sentence_bert_config.json'} asks for lower case, which the tokenizer does not make: set do_lower_case "
            "to false, and write the texts in lower case"
        )
    names = [_kind(module) for module in _modules(folder)]
    limit = said.get("max_seq_length") or read_json(folder / "tokenizer_config.json", {}).get("model_max_length")
    known = isinstance(limit, int) and limit < UNLIMITED
    return Sentences(pooling_of(folder), limit if known else None, "Normalize" in names) if names else Sentences()


def pooling_in(manifest: Mapping[str, Any], trained: str) -> str:
    """How the states of a checkpoint become one vector: as its folder said that came in, until it is `trained` here."""
    said: str | None = manifest.get("origin", {}).get("sentences", {}).get("pooling")
    return said if said and "imported" in manifest else trained


def pooling_of(folder: Path) -> str:
    """`cls` or `mean`, which is also what stands for a folder that does not say. ValueError for other ways and more layers."""
    modules = _modules(folder)
    if strange := [kind for kind in map(_kind, modules) if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{folder / 'modules.json'} has a {strange[0]} layer, which is not supported: choose a model without")
    paths = [folder / module["path"] / "config.json" for module in modules if _kind(module) == "Pooling"]
    if not paths:
        return "mean"
    path = paths[0]
    if not path.is_file():
        raise ValueError(f"{path} is missing, which {folder / 'modules.json'} names: copy it again")
    told = read_json(path, dict[str, Any]())
    on = [key.removeprefix("pooling_mode_") for key, value in told.items() if value is True and key.startswith("pooling_mode_")]
    asked = told.get("pooling_mode", on)
    # cls_token, mean_tokens, mean_sqrt_len_tokens; the last points where the mean does.
    found = [name.partition("_")[0] for name in ([asked] if isinstance(asked, str) else asked)]
    if len(found) != 1 or found[0] not in ("cls", "mean"):
        raise ValueError(f"{path} asks for {' and '.join(found) or 'no'} pooling: choose a model with cls or mean pooling")
    return found[0]


def _lowers(normalizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer itself takes capitals for small letters."""
    return (
        normalizer.get("type") == "Lowercase"
        or bool(normalizer.get("lowercase"))
        or any(map(_lowers, normalizer.get("normalizers", ())))
    )


def _modules(folder: Path) -> list[dict[str, str]]:
    """The layers of a sentence model, each with its type and the path of its files. ValueError where they say neither."""
    path = folder / "modules.json"
    found = read_json(path, UNLISTED if (folder / UNLISTED[1]["path"] / "config.json").is_file() else [])
    if not all(isinstance(each, dict) and {"type", "path"} <= each.keys() for each in found):
        raise ValueError(f"{path} lists layers without type and path: copy it again")
    return found


def _kind(module: Mapping[str, str]) -> str:
    """Its class, wherever a version of the library has that."""
    return module["type"].rpartition(".")[2]
