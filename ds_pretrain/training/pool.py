"""A pool of negatives as large as the step: every micro-batch against all others, over the data ranks.

Contrastive losses do not add up over micro-batches. So the step is walked twice (GradCache: Gao et al. 2021): first without
gradients, to get every embedding; the loss of the whole pool gives the gradient of each; then once more with gradients, where
each micro-batch's embeddings are asked to have the gradient that is known by now. The price is one more forward pass; a step
of a single micro-batch does not pay it. Both walks draw the same dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch, Comm, Head, Readout, Target
from ds_pretrain.core.loss import step_loss
from ds_pretrain.objectives.base import Objective


@dataclass(frozen=True)
class Asked:
    """Embeddings that an objective asked a micro-batch for: of a head, at the chosen positions, [n, H]."""

    head: str
    chosen: Tensor
    vectors: Tensor


class Alone:
    """A `Comm` that hears nobody."""

    def gather(self, x: Tensor) -> tuple[Tensor, int]:
        return x, 0


class Recorder:
    """A `Readout` that keeps the embeddings it was asked for."""

    def __init__(self, read: Readout) -> None:
        self._read, self.tokens = read, read.tokens
        self.asked: list[Asked] = []

    def nll(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        return self._read.nll(head, labels, weights)

    def correct(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        return self._read.correct(head, labels, weights)

    def states(self) -> Tensor:
        return self._read.states()

    def embed(self, head: str, chosen: Tensor) -> Tensor:
        vectors = self._read.embed(head, chosen)
        self.asked.append(Asked(head, chosen, vectors))
        return vectors


class Pooled:
    """A `Readout` of all micro-batches at once, for heads without classes; for others it answers zeros."""

    def __init__(self, tokens: Tensor, vectors: Tensor) -> None:
        self.tokens, self.vectors = tokens, vectors

    def nll(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(weights)

    def correct(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(weights, dtype=torch.bool)

    def states(self) -> Tensor:
        raise NotImplementedError("a pool of micro-batches has embeddings only")

    def embed(self, head: str, chosen: Tensor) -> Tensor:
        return self.vectors


@dataclass
class Pool:
    """What a step knows of its pool between the two walks. gradients: of each micro-batch's embeddings, in order."""

    objective: Objective
    batches: list[Batch]
    found: list[Asked]
    gradients: list[Tensor]
    sums: Mapping[str, Tensor]

    @staticmethod
    def empty(objective: Objective) -> Pool:
        return Pool(objective, [], [], [], {})

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that the pool speaks for."""
        return tuple(head for head in self.objective.heads if head.classes == 0)

    def look(self, read: Readout, batch: Batch) -> None:
        """First walk: keep what the objective asks of this micro-batch."""
        self.batches.append(batch)
        self.found.append(self._ask(read, batch)[0])

    def close(self, totals: Mapping[str, float], scale: float, comm: Comm) -> None:
        """Between the walks: the loss of the whole pool (collective over the data ranks), and every embedding's gradient."""
        vectors = torch.cat([asked.vectors.detach().float() for asked in self.found]).requires_grad_()
        whole = _together(self.batches)
        sums = self.objective.loss(Pooled(whole.inputs, vectors), whole, comm)
        step_loss(sums, totals, self.heads, scale).backward()
        assert vectors.grad is not None
        self.gradients = list(vectors.grad.split([len(asked.vectors) for asked in self.found]))
        self.sums = {head.name: sums[head.name].detach() for head in self.heads}

    def answer(
        self, read: Readout, batch: Batch, totals: Mapping[str, float], scale: float
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """Second walk: the sums of this micro-batch's other heads, and a scalar with the gradient of the pool and of them."""
        asked, sums = self._ask(read, batch)
        known = (asked.vectors.float() * self.gradients.pop(0)).sum()
        others = tuple(head for head in self.objective.heads if head not in self.heads)
        own = {head.name: sums[head.name] for head in others}
        if not self.gradients:  # the pool's own sum is counted once, with the last micro-batch
            own |= self.sums
        return own, known + step_loss(sums, totals, others, scale) if others else known

    def _ask(self, read: Readout, batch: Batch) -> tuple[Asked, Mapping[str, Tensor]]:
        recorder = Recorder(read)
        sums = self.objective.loss(recorder, batch, Alone())
        (asked,) = recorder.asked
        return asked, sums


def _together(batches: Sequence[Batch]) -> Batch:
    """Micro-batches as one: inputs and targets, row after row."""
    first = batches[0]
    targets = {
        name: Target(
            torch.cat([b.targets[name].labels for b in batches]),
            torch.cat([b.targets[name].weights for b in batches]),
            sum(b.targets[name].total for b in batches),
        )
        for name in first.targets
    }
    segment, horizon = (torch.cat([getattr(b.attention, name) for b in batches]) for name in ("segment", "horizon"))
    return replace(
        first,
        inputs=torch.cat([b.inputs for b in batches]),
        position=torch.cat([b.position for b in batches]),
        attention=AttentionPattern(segment, horizon, first.attention.kind),
        targets=targets,
        token_type=None,
    )
