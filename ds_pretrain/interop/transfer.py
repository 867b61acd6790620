"""Weights in and out: a folder of `transformers` becomes a checkpoint of ours, and a checkpoint such a folder.

A checkpoint knows no layout, so neither do these: what comes in trains on under any, and what was trained under any goes out.
Both read and write one parameter at a time; neither needs an accelerator, nor more memory than a few of the largest tensors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.interop.folder import DTYPES, SHARD, Entry, Stored, canonical, some, write
from ds_pretrain.interop.rules import FAMILIES, Family, Rule, Side, family_of
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.transformer import initial_value
from ds_pretrain.objectives import Objective, create
from ds_pretrain.parallel.shards import Shard
from ds_pretrain.training import checkpoint
from ds_pretrain.training.checkpoint import Piece, Snapshot

PIECES = 1 << 26
"""Bytes of a checkpoint's file, about: bounds the memory that serialising takes."""


@dataclass(frozen=True)
class Precision:
    """What tensors are stored in: most of them in one precision, others, by class and stored name, in another. Imports made
    before several classes could hold one parameter name them by the parameter."""

    most: torch.dtype
    others: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __call__(self, stored: str, logical: str) -> torch.dtype:
        """Of a tensor by its class and stored name, and by the name of the parameter that it is a part of."""
        return self.others.get(stored, self.others.get(logical, self.most))

    @staticmethod
    def of(held: Mapping[str, torch.dtype]) -> Precision:
        [(most, _)] = Counter(held.values()).most_common(1)
        return Precision(most, {name: dtype for name, dtype in held.items() if dtype != most})

    def told(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"most": name_of(self.most), "others": {name: name_of(dtype) for name, dtype in self.others.items()}}

    @staticmethod
    def read(told: Mapping[str, Any]) -> Precision:
        """What `told` made."""
        return Precision(PRECISIONS[told["most"]], {name: PRECISIONS[dtype] for name, dtype in told["others"].items()})


def name_of(dtype: torch.dtype) -> str:
    """As people and configs write it."""
    return str(dtype).removeprefix("torch.")


PRECISIONS = {name_of(dtype): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Source:
    """One stored model among those that make one of ours: its side, its tensors, and their stored names by canonical name."""

    stored: Stored
    side: Side
    names: Mapping[str, Sequence[str]]

    def problems(self, shapes: Mapping[str, tuple[int, ...]], heads: str) -> Iterator[str]:
        """What keeps it from being the model that its config describes. heads: pattern of what a model may do without."""
        wanted = {name for rule in self.side.rules for name in rule.stored}
        missing = sorted(name for name in wanted - self.names.keys() if not re.match(heads, name))
        strange = sorted(name for name in self.names.keys() - wanted if not re.match(heads, name))
        if missing or strange:
            parts = [f"missing {some(missing)}"] * bool(missing) + [f"unexpected {some(strange)}"] * bool(strange)
            yield f"{self.stored.folder} is no {self.side.architecture}: {'; '.join(parts)}"
        for rule in self.side.rules:
            lacking = [name for name in rule.stored if name not in self.names]
            if lacking and len(lacking) < len(rule.stored) and not rule.copies:
                yield f"{self.stored.folder} has a part of {rule.logical} and lacks {some(lacking)}"
            for name, expected in zip(rule.stored, stored_shapes(rule, shapes[rule.logical]), strict=True):
                for spelling in self.names.get(name, ()):
                    if (found := self.stored.shape(spelling)) != expected:
                        file = self.stored.files[spelling].name
                        yield f"{spelling} is {found} in {file}, by config.json it should be {expected}"
                    if (dtype := self.stored.dtype(spelling)) not in DTYPES.values():
                        known = ", ".join(DTYPES.values())
                        yield f"{spelling} is {dtype} in {self.stored.files[spelling].name}: save it again as one of {known}"

    def has(self, rule: Rule) -> bool:
        return (any if rule.copies else all)(name in self.names for name in rule.stored)

    def parameter(self, rule: Rule) -> Tensor:
        """One of our parameters, in the precision it is stored in."""
        return rule.way.make(*(self._tensor(name) for name in rule.stored if name in self.names))

    def precisions(self) -> Iterator[tuple[str, torch.dtype]]:
        """That of each stored tensor that has a rule."""
        known = {name: dtype for dtype, name in DTYPES.items()}
        for name in (name for rule in self.side.rules for name in rule.stored if name in self.names):
            yield f"{self.side.architecture}:{name}", known[self.stored.dtype(self.names[name][0])]

    def _tensor(self, name: str) -> Tensor:
        first, *others = self.names[name]
        found = self.stored.tensor(first)
        for other in others:
            if not torch.equal(found, self.stored.tensor(other)):
                raise ValueError(f"{first} and {other} should be one tensor by the config, but their values differ")
        return found


@dataclass(frozen=True)
class Arrival:
    """A foreign model, checked and ready to be written. fresh: parameters that it lacks and that begin anew; left_out: stored
    tensors of heads that the objective does not have."""

    model: ModelConfig
    objective: Objective
    sources: Sequence[Source]
    config: Mapping[str, Any]
    fresh: Sequence[str] = ()
    left_out: Sequence[str] = ()

    @staticmethod
    def of(folder: Path, generator: Path | None = None, objective: str | None = None, pickles: bool = False) -> Arrival:
        """Read what is there. ValueError with everything that is wrong with it.

        objective: what it is to be trained for, where it is not what its class was trained for. generator: the folder of
        ELECTRA's; without it both are subfolders.
        """
        places = {"": folder}
        if generator or (folder / "discriminator").is_dir():
            places = {
                "discriminator": folder if generator else folder / "discriminator",
                "generator": generator or folder / "generator",
            }
        main = Stored(next(iter(places.values())), pickles).config
        name = main.get("model_type")
        if not isinstance(name, str):
            raise ValueError(f"{folder}/config.json has no model_type: it must be one of {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        if objective:
            create(objective)  # an unknown name is no fault of the config
        if set(places) != set(family.places):
            raise ValueError(
                f"{name} is one model: leave out --generator, or give the folder that has its config.json"
                if len(family.places) == 1
                else f"{name} is two models: give the folder of the discriminator and --generator with that of the other"
            )
        stored = {place: Stored(path, pickles) for place, path in places.items()}
        where = next(iter(places.values())) / "config.json"
        with _reading(where):
            model = family.model(main)
            made = family.objective(objective, {place: each.config for place, each in stored.items()})
        if wrong := model.problems():
            raise ValueError(f"{where} describes no model: {'; '.join(wrong)}")
        if not family.takes(model, made):
            raise ValueError(f"a model of {name} cannot be one of ours for {made.name}: another --objective, or none, may do")
        return _checked(family, model, made, stored, main)

    def parameters(self, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by logical name, fp32."""
        rules: dict[str, list[tuple[Source, Rule]]] = {}
        for source in self.sources:
            for rule in source.side.rules:
                rules.setdefault(rule.logical, []).append((source, rule))
        for name, shape in parameter_shapes(self.model, self.objective).items():
            if name in self.fresh:
                yield name, initial_value(name, shape, self.model, seed)
                continue
            found = [(source, rule) for source, rule in rules[name] if source.has(rule)]
            first, *others = (source.parameter(rule) for source, rule in found)
            if not all(torch.equal(first, other) for other in others):
                folders = " and ".join(str(source.stored.folder) for source, _ in found)
                raise ValueError(f"{folders} should share {found[0][1].stored[0]}, but their values differ")
            yield name, first.float().contiguous()

    def save(self, output: Path, facts: Mapping[str, Any], seed: int = 0) -> Path:
        """Write `output/checkpoints/step-0` (weights alone)."""
        final = output / "checkpoints" / "step-0"
        attempt = final.with_name("step-0.tmp")
        attempt.mkdir(parents=True)
        whole = (
            (Piece("master", Shard(name, tuple(x.shape), tuple(x.shape)), 0), x.view(-1)) for name, x in self.parameters(seed)
        )
        files = [checkpoint.write_file(attempt, *file) for file in checkpoint.packed(0, whole, PIECES)]
        manifest = {"version": checkpoint.VERSION, "step": 0, "model": self.model.model_dump(), "counters": {}, **facts}
        checkpoint.commit(attempt, final, {**manifest, "imported": self._told(), "files": files})
        return final

    def _told(self) -> dict[str, Any]:
        held = dict(pair for source in self.sources for pair in source.precisions())
        lists = {"fresh": list(self.fresh), "left_out": list(self.left_out)}
        return {"config": dict(self.config), "precision": Precision.of(held).told(), **lists}


@contextmanager
def _reading(config: Path) -> Iterator[None]:
    """ValueError with the file's name for whatever is wrong with a config."""
    try:
        yield
    except KeyError as missing:
        raise ValueError(f"{config} has no {missing}: copy it again") from None
    except ValidationError as error:
        told = "; ".join(f"{each['loc'][-1]}: {each['msg']} ({each['input']!r})" for each in error.errors())
        raise ValueError(f"{config} describes no model: {told}") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{config} has a field that is 0 or of another type than it should be ({error})") from error
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None


def _checked(
    family: Family, model: ModelConfig, objective: Objective, stored: Mapping[str, Stored], config: Mapping[str, Any]
) -> Arrival:
    shapes, sides = parameter_shapes(model, objective), family.sides(model, objective)
    renamed = family.rename(model)
    sources = [Source(stored[name], side, canonical(stored[name].files, renamed)) for name, side in sides.items()]
    if wrong := [problem for source in sources for problem in source.problems(shapes, family.heads)]:
        raise ValueError("; ".join(wrong[:4]) + f" and {len(wrong) - 4} more" * (len(wrong) > 4))
    rules = [(source, rule) for source in sources for rule in source.side.rules]
    fresh = list(dict.fromkeys(rule.logical for source, rule in rules if not source.has(rule)))
    used = {name for _, rule in rules for name in rule.stored}
    left_out = [name for source in sources for name in source.names if name not in used]
    return Arrival(model, objective, sources, config, fresh, left_out)


def stored_shapes(rule: Rule, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of the stored tensors that one of our parameters becomes."""
    return [tuple(part.shape) for part in rule.way.split(torch.empty(shape, device="meta"))]


def hand_out(
    snapshot: Snapshot, objective: Objective, folder: Path, extra: Mapping[str, Any], precision: Precision, shard: int = SHARD
) -> dict[str, Side]:
    """Write config.json and the weights of a checkpoint into an attempt at a folder; returns the models in it, by subfolder.

    extra: further fields of config.json. What did not come in and was not trained since does not go out. ValueError if no
    family computes what the model does.
    """
    fresh = snapshot.manifest.get("imported", {}).get("fresh", ())
    model = ModelConfig(**snapshot.manifest["model"])
    name, family = family_of(model, objective)
    sides = dict(family.sides(model, objective))
    taken = {rule.logical for side in sides.values() for rule in side.rules}
    shapes = snapshot.shapes
    if left := sorted(shapes.keys() - taken):
        raise ValueError(f"{name} has no place for {some(left)}: the run was trained for {objective.name} with another head")
    for place, side in sides.items():
        target = folder / place
        target.mkdir(exist_ok=True)
        kept = {"model_type": name, "architectures": [side.architecture], "dtype": name_of(precision.most)}
        (target / "config.json").write_text(json.dumps({**kept, **side.fields, **extra}, indent=2) + "\n", encoding="utf-8")
        rules = [rule for rule in side.rules if rule.logical not in fresh]
        entries = [
            Entry(stored.removeprefix(side.bare), shape, precision(f"{side.architecture}:{stored}", rule.logical))
            for rule in rules
            for stored, shape in zip(rule.stored, stored_shapes(rule, shapes[rule.logical]), strict=True)
        ]
        write(
            target,
            entries,
            (part for rule in rules for part in rule.way.split(snapshot.whole(rule.logical))),
            shard,
        )
    return sides
