"""Objectives from outside the package: a file or a module, named in the environment or by an installed distribution.

    DS_PRETRAIN_PLUGINS=my_objective.py,my_package.objectives ds-pretrain list objectives

An installed package names its modules in the entry point group `ds_pretrain.objectives`. Importing them is all: they
register themselves. Every rank reads the same environment, so all of them know the same objectives.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

VARIABLE = "DS_PRETRAIN_PLUGINS"
GROUP = "ds_pretrain.objectives"


def load() -> None:
    """Import every plug-in. ValueError naming the one that cannot be imported."""
    for name in _named():
        try:
            _import(name)
        except Exception as error:
            raise ValueError(f"plug-in {name} (from {VARIABLE} or entry points {GROUP}) does not import: {error}") from error


def _named() -> Iterator[str]:
    yield from (name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())
    yield from (point.value for point in entry_points(group=GROUP))


def _import(name: str) -> None:
    path = Path(name)
    if path.suffix != ".py":
        importlib.import_module(name)
        return
    module = f"ds_pretrain_plugin_{path.stem}"
    if module in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module, path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path.resolve()}")
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])
