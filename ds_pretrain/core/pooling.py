"""How a folder of sentence-transformers makes one vector of the states of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def pooling_of(folder: Path) -> str:
    """`cls` or `mean`, which is also what stands for a folder that does not say. ValueError for other ways and more layers."""
    modules = [module["type"].rpartition(".")[2] for module in read_json(folder / "modules.json", [])]
    if strange := [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]:
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


def read_json(path: Path, otherwise: Any) -> Any:
    """What a file says, or something else where there is none."""
    return json.loads(path.read_bytes()) if path.exists() else otherwise
