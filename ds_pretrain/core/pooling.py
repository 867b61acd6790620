"""How a folder of sentence-transformers makes one vector of a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


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
    limit = said.get("max_seq_length")
    names = _modules(folder)
    return Sentences(pooling_of(folder) if names else None, limit, "Normalize" in names)


def pooling_in(manifest: Mapping[str, Any], trained: str) -> str:
    """How the states of a checkpoint become one vector: as its folder said that came in, until it is `trained` here."""
    said: str | None = manifest.get("origin", {}).get("sentences", {}).get("pooling")
    return said if said and "imported" in manifest else trained


def pooling_of(folder: Path) -> str:
    """`cls` or `mean`, which is also what stands for a folder that does not say. ValueError for other ways and more layers."""
    if strange := [name for name in _modules(folder) if name not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{folder / 'modules.json'} has a {strange[0]} layer, which is not supported: choose a model without")
    path = folder / "1_Pooling" / "config.json"
    told = read_json(path, {"pooling_mode": "mean"})
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


def _modules(folder: Path) -> list[str]:
    return [module["type"].rpartition(".")[2] for module in read_json(folder / "modules.json", [])]


def read_json(path: Path, otherwise: Any) -> Any:
    """What a file says, or something else where there is none."""
    return json.loads(path.read_bytes()) if path.exists() else otherwise
