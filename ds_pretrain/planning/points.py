"""Runs measured on a few ranks (`bench scaling`), and what they tell of a cluster whose steps are to be predicted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_pretrain.config import RunConfig, parse_run
from ds_pretrain.core.files import whole
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.pace import Pace
from ds_pretrain.planning.memory import Moment, fullest
from ds_pretrain.planning.speed import step_seconds
from ds_pretrain.planning.traffic import GLOO, NCCL, Cost


def costs_on(device: str) -> Mapping[str, Cost]:
    """What collectives cost: through NCCL on "cuda", through gloo on "cpu"."""
    return NCCL if device == "cuda" else GLOO


@dataclass(frozen=True)
class Point:
    """One run on one world size and layout, measured by `bench scaling`: of strong or of weak scaling.

    seconds: of a step. sent: payload bytes of each rank in a step. peak: bytes of tensors at the fullest moment, on the rank
    that held most.
    """

    kind: str
    layout: str
    config: RunConfig
    model: ModelConfig
    world: int
    device: str
    seconds: float
    sent: tuple[float, ...]
    peak: int
    pace: Pace

    @property
    def tokens_per_second(self) -> float:
        return self.config.batch.global_size * self.config.batch.seq_len / self.seconds

    def expected_seconds(self, share: float) -> float:
        """share: of the products' speed."""
        return sum(step_seconds(self.config, self.model, self.world, self.pace, share, costs_on(self.device)).values())

    def expected_peak(self) -> Moment:
        return fullest(self.config, self.model, self.world, self.device == "cuda")[1]


def calibrated(points: Sequence[Point]) -> float:
    """The share of the products' speed that the smallest world reached beside its sending."""
    least = min(points, key=_least)
    at_full = step_seconds(least.config, least.model, least.world, least.pace, 1.0, costs_on(least.device))
    waiting = at_full["sending"] + at_full["latency"]
    if waiting >= least.seconds:
        raise ValueError(
            f"{least.layout} on {least.world} ranks took {least.seconds:.3f} s a step, and its sending alone should take "
            f"{waiting:.3f}: measure a layout that sends less, best of all 1"
        )
    return (sum(at_full.values()) - waiting) / (least.seconds - waiting)


def _least(point: Point) -> tuple[int, int]:
    return point.world, point.config.parallel.pipeline


def save(points: Sequence[Point], path: Path) -> list[Point]:
    """Write points, in place of those of the same kind, world and layout that the file has; returns all that it has then.

    ValueError if the file has points of another model: predictions are held against the smallest of all.
    """
    there = read(path) if path.exists() else []
    if there and there[0].model != points[0].model:
        raise ValueError(f"{path} has points of another model: give --out another file")
    kept = {(point.kind, point.layout, point.world): point for point in [*there, *points]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        file.write(json.dumps([_as_json(point) for point in kept.values()], indent=1).encode())
    return list(kept.values())


def _as_json(point: Point) -> dict[str, object]:
    plain = {name: getattr(point, name) for name in ("kind", "layout", "world", "device", "seconds", "sent", "peak")}
    config, model = point.config.model_dump(mode="json", exclude={"output"}), point.model.model_dump(mode="json")
    return {**plain, "pace": point.pace._asdict(), "config": config, "model": model}


def read(path: Path) -> list[Point]:
    """The points of a file. ValueError if it has none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [_of_json(each, str(path)) for each in found]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        command = f"ds-pretrain bench scaling RUN --out {path}"
        raise ValueError(f"{path} holds no points of `{command}` ({error}): measure them into another file") from None


def _of_json(values: dict[str, Any], where: str) -> Point:
    made = {
        "config": parse_run(values["config"], where),
        "model": ModelConfig(**values["model"]),
        "pace": Pace(**values["pace"]),
        "sent": tuple(values["sent"]),
    }
    return Point(**{**values, **made})


@dataclass(frozen=True)
class Cluster:
    """Ranks by what is known of them.

    share: of the products' speed that a step reaches. errors: how far the predictions of measured points are off, by layout
    and kind of scaling; empty where nothing was measured. peaks: the same of memory.
    """

    pace: Pace
    device: str = "cuda"
    share: float = 1.0
    errors: Mapping[str, float] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(points: Sequence[Point], speeds: Mapping[str, float]) -> Cluster:
        """What points tell, those of most ranks above all, with the speeds that are given in place of theirs (fields of
        `Pace`). ValueError naming the speeds that nothing tells."""
        told = max(points, key=lambda point: point.world).pace._asdict() if points else {}
        alone = {"link", "latency"} if all(point.world == 1 for point in points) else set()  # of one rank they say nothing
        known = {**{name: speed for name, speed in told.items() if name not in alone}, **speeds}
        if missing := [name for name in Pace._fields if name not in known]:
            raise ValueError(
                f"nothing tells the speed of {' and '.join(missing)}: give the points that `ds-pretrain bench scaling --out "
                "points.json` has measured, or all of --tflops, --gb-per-second and --latency-us"
            )
        if not points:
            return Cluster(Pace(**known))
        share = calibrated(points)
        first = min(points, key=_least)
        named = {f"{point.layout} on {point.world} ({point.kind})": point for point in points}
        errors = {
            name: point.expected_seconds(share) / point.seconds - 1
            for name, point in named.items()
            if point is not first and point.world > 1
        }
        peaks = {name: point.expected_peak().total / point.peak - 1 for name, point in named.items()}
        return Cluster(Pace(**known), points[0].device, share, errors, peaks)
