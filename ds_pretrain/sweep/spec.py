"""The sweep file: a run, what varies over it, and how long each of its cells trains.

A cell is a run file with settings, named by what varies; its folder has the cell's name, so a sweep that grows keeps what it
has. Everything that is wrong with any cell is told before the first one starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ds_pretrain.config import ConfigError, RunConfig, find, load_run, numbers
from ds_pretrain.core.registry import unknown
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.planning.speed import step_flops
from ds_pretrain.runs import problems, tokenizer_size
from ds_pretrain.sweep.scores import Asked

Settings = dict[str, Any]
LONGEST = 120
"""Characters of a cell's name."""
KINDS = ("tokens", "tokens_per_parameter", "flops", "model_flops")
"""Ways to say how long a cell trains."""
NAMED = 4
"""Cells that are named with what is wrong with them."""


class Budget(BaseModel):
    """How long the cells train: one of tokens, tokens_per_parameter, flops and model_flops, each value a cell of its own. A
    token is a position of a row; parameters are counted without embeddings, as in scaling laws."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: list[float] = []
    """Tokens of a cell."""
    tokens_per_parameter: list[float] = []
    """Tokens of a cell for each of its parameters (Chinchilla: 20)."""
    flops: list[float] = []
    """An iso-FLOP ladder by the rule of thumb, 6 x parameters x tokens: every size at each of these budgets."""
    model_flops: list[float] = []
    """The same by what a step computes, with attention, scored positions and a generator: objectives differ in these."""
    warmup: float | None = Field(None, ge=0, lt=1)
    """Share of a cell's steps in which the learning rate warms up; None: the run's optimizer.warmup_steps."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(bool(getattr(self, kind)) for kind in KINDS) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}")
        if wrong := [length for length in self.lengths() if not length.value > 0]:
            raise ValueError(f"{wrong[0].kind} {wrong[0].value:g} is not above 0")
        return self

    def lengths(self) -> list[Length]:
        """What each combination of the grid is trained for."""
        return [Length(kind, value, self.warmup) for kind in KINDS for value in getattr(self, kind)]

    @property
    def fixes(self) -> dict[str, str]:
        """Fields that follow from it, and why."""
        told = {"train.max_steps": "it follows from the budget"}
        return told if self.warmup is None else {**told, "optimizer.warmup_steps": "it follows from budget.warmup"}


class Length(NamedTuple):
    """How long a cell trains: so much of a kind that `Budget` names."""

    kind: str
    value: float
    warmup: float | None

    def steps(self, config: RunConfig) -> int:
        """Steps of a run, to the nearest."""
        model, rows = whole_model(config), config.batch.global_size * config.batch.seq_len
        size = model.count_parameters(embeddings=False)
        of_step = {
            "tokens": rows, "tokens_per_parameter": rows / size, "flops": 6 * size * rows,
            "model_flops": step_flops(config, model) if self.kind == "model_flops" else math.nan,
        }  # fmt: skip
        return round(self.value / of_step[self.kind])

    def settings(self, config: RunConfig) -> Settings:
        steps = max(1, self.steps(config))
        warm = {} if self.warmup is None else {"optimizer.warmup_steps": min(steps - 1, round(self.warmup * steps))}
        return {"train.max_steps": steps, **warm}


class Spec(BaseModel):
    """A sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = None
    """A sweep file, by path or shipped name, that this one changes: a key here replaces that of the base, whole."""
    run: str
    """Run file, or the name of one, that the cells start from."""
    output: str
    """Folder of the sweep: cells/NAME is the output of a cell."""
    set: Settings = {}
    """Settings of every cell, by field: train.save_every: 100."""
    grid: dict[str, list[Any] | dict[str, Settings]]
    """What varies: a field and its values, or a name and, by the name of each value, several settings (`run` is one too)."""
    budget: Budget | None = None
    """How long each cell trains; None: train.max_steps of the run."""
    ranks: int = Field(1, ge=1)
    """Ranks of a cell."""
    scores: dict[str, dict[str, Any]] = {}
    """What finished cells are scored on, each by a name of yours: {works: {by: probe, texts: passages.tsv}}. `by` is eval,
    probe or memorised, the rest are options of that command."""

    @field_validator("grid")
    @classmethod
    def _not_empty(cls, grid: dict[str, Any]) -> dict[str, Any]:
        if not grid:
            raise ValueError("the grid is empty: give at least one field and its values, such as {seed: [0, 1]}")
        if empty := [axis for axis, values in grid.items() if not values]:
            raise ValueError(f"{empty[0]} has no values")
        return grid

    @field_validator("scores")
    @classmethod
    def _known(cls, scores: dict[str, Any]) -> dict[str, Any]:
        for name, values in scores.items():
            Asked.of(name, values)
        return scores

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @cached_property
    def asked(self) -> list[Asked]:
        """The scores."""
        return [Asked.of(name, values) for name, values in self.scores.items()]

    @cached_property
    def cells(self) -> list[Cell]:
        """Every combination, in the order of the file."""
        axes = [[(axis, *choice) for choice in _choices(axis, values)] for axis, values in self.grid.items()]
        lengths = self.budget.lengths() if self.budget else [None]
        return [self._cell(chosen, length) for chosen in itertools.product(*axes) for length in lengths]

    def _cell(self, chosen: tuple[tuple[str, str, Settings], ...], length: Length | None) -> Cell:
        settings = {**self.set, **{key: value for _, _, each in chosen for key, value in each.items()}}
        labels = {axis: label for axis, label, _ in chosen} | ({length.kind: _size(length.value)} if length else {})
        run, name = settings.pop("run", self.run), _name(labels)
        return Cell(name, labels, run, {**settings, "output": str(self.folder / "cells" / name)}, self.ranks, length)

    def check(self, where: str = "") -> None:
        """ConfigError with everything that is wrong with any cell. where: the file that the sweep was read from."""
        wrong: dict[str, list[str]] = defaultdict(list)
        for cell in self.cells:
            for problem in [*cell.problems(), *self._unscorable(cell)]:
                wrong[problem].append(cell.name)
        found = [f"{_some(names, len(self.cells))}: {problem}" for problem, names in wrong.items()]
        found += self._ignored()
        if same := self._alike():
            found.append(f"{' and '.join(same[:2])} are the same run: let them differ in a field, or leave one out")
        if twice := [name for name, count in _counted(cell.name for cell in self.cells) if count > 1]:
            found.append(f"{twice[0]}: {len(twice)} cells are there more than once: a value is repeated")
        if found:
            raise ConfigError(where or self.output, found)

    def _ignored(self) -> Iterator[str]:
        """Fields that the grid varies in vain."""
        fixed = {"output": "every cell has a folder of its own", **(self.budget.fixes if self.budget else {})}
        varied = {key for axis, values in self.grid.items() for _, each in _choices(axis, values) for key in each}
        return (f"grid.{key}: {why}, so it varies nothing; leave it out" for key, why in fixed.items() if key in varied)

    def _alike(self) -> list[str]:
        """The cells of the first run that is there under several names."""
        runs: dict[str, list[str]] = defaultdict(list)
        for cell in self.cells:
            with contextlib.suppress(ValueError):  # told among the cell's own problems
                runs[cell.config.model_copy(update={"output": None}).model_dump_json()].append(cell.name)
        return next((names for names in runs.values() if len(set(names)) > 1), [])

    def _unscorable(self, cell: Cell) -> list[str]:
        try:
            objective = cell.config.make_objective()
        except (ValueError, TypeError):  # told among the cell's own problems
            return []
        return [problem for each in self.asked for problem in each.problems(objective)]

    def find(self, which: str) -> Cell:
        """A cell by its name or number. ValueError with the nearest name."""
        if which.isdecimal() and int(which) < len(self.cells):
            return self.cells[int(which)]
        if which.isdecimal():
            raise ValueError(f"cell {which}: the sweep has {len(self.cells)}, 0 to {len(self.cells) - 1}")
        for cell in self.cells:
            if cell.name == which:
                return cell
        raise ValueError(unknown("cell", which, [cell.name for cell in self.cells]))


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. labels: value by axis, as in its name."""

    name: str
    labels: Mapping[str, str]
    run: str
    settings: Settings
    ranks: int
    length: Length | None

    @property
    def folder(self) -> Path:
        return Path(self.settings["output"])

    @cached_property
    def config(self) -> RunConfig:
        """The cell's run."""
        return load_run(self.run, self.overrides)

    @cached_property
    def overrides(self) -> Settings:
        """The settings with the length and, where there is none, an evaluation at the end."""
        config = load_run(self.run, self.settings)
        more = self.length.settings(config) if self.length else {}
        if not config.train.eval_every:
            more["train.eval_every"] = more.get("train.max_steps", config.train.max_steps)
        return {**self.settings, **more}

    def problems(self) -> list[str]:
        """What is wrong with this cell, or its data."""
        try:
            found = problems(self.config, self.ranks)
        except ConfigError as error:
            return error.problems
        except ValueError as error:
            return [str(error)]
        if self.length and not self.length.steps(self.config):
            step = self.config.batch.global_size * self.config.batch.seq_len
            found.append(
                f"budget.{self.length.kind} {self.length.value:g} is less than half a step of {step:,} tokens with "
                f"{parameters(self.config):,} parameters: raise it, or lower batch.global_size"
            )
        return found


def parameters(config: RunConfig) -> int:
    """N: parameters without embeddings."""
    return whole_model(config).count_parameters(embeddings=False)


def whole_model(config: RunConfig) -> ModelConfig:
    """The model of a run with the vocabulary and the positions that it will have."""
    vocab = config.model.vocab or tokenizer_size(config) or 8
    return config.model.model_copy(update={"vocab": vocab, "positions": config.model.positions or config.batch.seq_len})


def read(name: str) -> Spec:
    """A sweep file, by path or shipped name. ConfigError with all that does not parse, misspelt keys with the nearest one."""
    path = find(name, "sweeps", ".yaml")
    values = _loaded(path)
    if not (base := values.get("base")):
        return _valid(path, values)
    under = _loaded(where := _base(path, str(base)))
    if under.get("base"):
        raise ConfigError(str(path), [f"base {base} has a base itself: name a sweep file that has none"])
    _valid(where, under)
    return _valid(path, {**under, **values})


def _base(path: Path, name: str) -> Path:
    try:
        return find(name, "sweeps", ".yaml")
    except ValueError as error:
        raise ConfigError(str(path), [f"base: {error}"]) from None


def _valid(path: Path, values: Settings) -> Spec:
    try:
        return Spec.model_validate(numbers(values))
    except ValidationError as error:
        raise ConfigError(str(path), [_explain(dict(each)) for each in error.errors()]) from None


def _loaded(path: Path) -> Settings:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"not readable as YAML: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["a sweep file is a mapping: run, output, grid, perhaps base, set, budget, ranks, scores"])
    return values


def _explain(error: dict[str, Any]) -> str:
    *place, last = map(str, error["loc"])
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Budget if place else Spec
        return unknown(f"key in {place[0]}" if place else "key", last, section.model_fields)
    if error["type"] == "missing":
        return f"{last} is required"
    return f"{'.'.join([*place, last])}: {error['msg'].removeprefix('Value error, ')}"


def _choices(axis: str, values: list[Any] | dict[str, Settings]) -> list[tuple[str, Settings]]:
    """The values of an axis: name and settings."""
    if isinstance(values, dict):
        return [(str(name), settings) for name, settings in values.items()]
    return [(_text(value), {axis: value}) for value in values]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if not isinstance(value, dict | list) else hashlib.sha256(repr(value).encode()).hexdigest()[:6]


def _size(value: float) -> str:
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if 10**power <= value < 10 ** (power + 3):
            return f"{value / 10**power:g}{unit}"
    return f"{value:g}"


def _name(labels: Mapping[str, str]) -> str:
    """A name for a folder, by the last word of each axis."""
    short = {axis: axis.rpartition(".")[2] for axis in labels}
    words = {axis: word if list(short.values()).count(word) == 1 else axis for axis, word in short.items()}
    name = ",".join(f"{words[axis]}={label}" for axis, label in labels.items())
    plain = re.sub(r"[^\w.,=+-]", "_", name)
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return plain if plain == name and len(name) <= LONGEST else f"{plain[: LONGEST - 9]}-{digest}"


def _some(names: list[str], everyone: int) -> str:
    if len(names) == everyone > 1:
        return f"all {everyone} cells"
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def _counted(names: Iterator[str]) -> list[tuple[str, int]]:
    found: dict[str, int] = defaultdict(int)
    for name in names:
        found[name] += 1
    return list(found.items())
