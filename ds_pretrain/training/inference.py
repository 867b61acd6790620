"""A trained model without its optimizer: weights from a checkpoint of any layout, on one device or on tensor ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch
from ds_pretrain.core.pooling import pooling_in
from ds_pretrain.models.cache import remembering
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.transformer import Network, initialise
from ds_pretrain.objectives.base import Objective
from ds_pretrain.parallel.comm import DataComm
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.shards import shards
from ds_pretrain.training.checkpoint import Snapshot, newest
from ds_pretrain.training.engine import Criterion, Model, build_for, to_device


class FrozenModel(Model):
    """The newest sound checkpoint below `output`, or the one that is named, fp32, for evaluation and generation."""

    micro_size = 8

    def __init__(
        self, output: str | Path, objective: Objective, plan: ParallelPlan = ParallelPlan(), checkpoint: str | None = None
    ) -> None:
        if plan.pipeline > 1:
            raise ValueError(f"a model is loaded without a pipeline, not on {plan.pipeline} stages: set parallel.pipeline=1")
        mesh = Mesh.build(plan)
        folder = Path(output) / "checkpoints"
        path = folder / checkpoint if checkpoint else newest(folder, mesh)
        if path is None:
            raise ValueError(f"no checkpoint in {folder}: train the run first")
        self.snapshot = Snapshot(path)
        shape = ModelConfig(**self.snapshot.manifest["model"])
        self.build, self.objective = build_for(objective, shape, mesh, shape.positions or 0), objective
        self.criterion = Criterion(objective, DataComm(mesh), 1.0)
        self.network = Network(self.build).to(mesh.device).eval()
        self._load()

    @property
    def origin(self) -> Mapping[str, Any]:
        """What the folder said that the weights came from (`interop/origin.py`)."""
        found: Mapping[str, Any] = self.snapshot.manifest.get("origin", {})
        return found

    def under(self, objective: Objective) -> FrozenModel:
        """The same weights, scored for another objective that asks for the same heads or fewer."""
        if objective is self.objective:
            return self
        other = copy.copy(self)
        other.objective, other.criterion = objective, Criterion(objective, self.criterion.comm, 1.0)
        return other

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [B, V] after each row of ids [B, S]."""
        last = torch.zeros_like(tokens, dtype=torch.bool)
        last[:, -1] = True
        return self.logits_at(tokens, last)

    @torch.no_grad()
    def logits_at(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Logits [n, V] at the chosen positions (bool [B, S]) of rows of ids that are one document each."""
        chosen = chosen.to(self.mesh.device)
        return self.network(self._batch(tokens, torch.ones_like(tokens)), lambda answers, _: answers.logits(chosen))

    @contextmanager
    def reading(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Inside, what it yields reads on: ids [B, n] and where they are text (bool [B, n]; the rest is padding) to the
        next-token logits [B, V] after the last of them, each id read once."""
        count: Tensor | int = 0

        @torch.no_grad()
        def read(tokens: Tensor, real: Tensor) -> Tensor:
            nonlocal count
            position = (count + real.cumsum(1) - 1).clamp(min=0)
            count = count + real.sum(1, keepdim=True)
            batch = Batch(tokens, position, AttentionPattern.causal(real.long()), {})
            last = torch.zeros_like(real)
            last[:, -1] = True
            return self.network(
                to_device(batch, self.mesh.device), lambda answers, _: answers.logits(last.to(self.mesh.device))
            )

        with remembering(self.network):
            yield read

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """One vector [H] for each sequence of ids, [n, H] fp32 on the CPU: the state of its first position, where the
        objective trains that one ([CLS] of SimCSE and of the pair tasks), else the mean of all."""
        found = [self._embed(texts[i : i + self.micro_size]) for i in range(0, len(texts), self.micro_size)]
        return torch.cat(found)

    @torch.no_grad()
    def _embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        length = max(map(len, texts))
        tokens = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in texts])
        real = torch.arange(length) < torch.tensor([[len(ids)] for ids in texts])
        states = self.network(self._batch(tokens, real.long()), lambda answers, _: answers.states()).float().cpu()
        if pooling_in(self.snapshot.manifest, self.objective.pooling) == "cls":
            return states[:, 0]
        return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def _batch(self, tokens: Tensor, segment: Tensor) -> Batch:
        """Rows of ids [B, S] that are one document each, where `segment` is 1."""
        pattern = AttentionPattern.causal if self.objective.kind == "causal" else AttentionPattern.full
        position = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        return to_device(Batch(tokens, position, pattern(segment), {}), self.mesh.device)

    @property
    def seed(self) -> int:
        """What its run drew its initial weights by; 0 of weights that came in."""
        return int(self.snapshot.manifest.get("seed", 0))

    def untrained(self, seed: int) -> FrozenModel:
        """The same network with the initial weights of a seed: what training is to be held against."""
        other = copy.copy(self)
        other.network = Network(self.build).to(self.mesh.device).eval()
        initialise(other.network, self.build, seed)
        return other

    def _evaluate(self, batches: Sequence[Batch], dropout: bool = False) -> None:
        for batch in batches:
            self.network(to_device(batch, self.mesh.device), self.criterion)

    @torch.no_grad()
    def _load(self) -> None:
        for shard, parameter in shards(self.network, self.mesh.at.tensor, self.mesh.plan.tensor):
            parameter.copy_(shard.take(self.snapshot.whole(shard.name)))
