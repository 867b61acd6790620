"""What travels from bytes to loss: Document -> Example -> Batch -> Stream.

The left half is numpy and belongs to one sample; the right half is torch and belongs to one micro-batch. Supervision is
a `Target` per head: labels and weights by position, and the divisor, which is not always the sum of the weights
(masked diffusion divides weighted losses by the number of maskable tokens).

Shape suffixes: B rows, S positions, n tokens of one example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from ds_pretrain.core.attention import AttentionPattern


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or the piece of one that fits an example.

    tokens: int32 [n]; the last piece of a document ends in the end-of-document id.
    before: the id just before the piece, None where the document begins.
    """

    tokens: np.ndarray
    before: int | None = None


Count = tuple[float, float]
"""A part, and the whole that it is of."""

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True, slots=True)
class Target(Generic[Array]):
    """One head's supervision by position.

    labels: integer ids, [n] in an example and [B, S] in a batch; anything where the weight is 0.
    weights: float32 of the same shape; 0 where nothing is predicted.
    total: what the step divides this head's summed loss by; the sum of the weights unless the objective says otherwise.
    """

    labels: Array
    weights: Array
    total: float

    @staticmethod
    def of(labels: np.ndarray, weights: np.ndarray, total: float | None = None) -> Target[np.ndarray]:
        return Target(labels, weights.astype(np.float32), float(weights.sum()) if total is None else float(total))


@dataclass(frozen=True, slots=True)
class Example:
    """One training example, before packing (numpy).

    inputs: int32 [n].
    horizon: int32 [n], the last position a query may see, counted from the example's own start.
    targets: by head name.
    token_type: int32 [n] or None where the objective has no token types.
    then: further parts of the same example, each laid behind as a segment of its own (SimCSE's second view).
    """

    inputs: np.ndarray
    horizon: np.ndarray
    targets: Mapping[str, Target[np.ndarray]]
    token_type: np.ndarray | None = None
    then: tuple[Example, ...] = ()

    @staticmethod
    def bidirectional(
        inputs: np.ndarray, targets: Mapping[str, Target[np.ndarray]], token_type: np.ndarray | None = None
    ) -> Example:
        """An example whose every position sees all of it."""
        return Example(inputs, np.full(len(inputs), len(inputs) - 1, dtype=np.int32), targets, token_type)


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch (torch), every plane [B, S]."""

    inputs: Tensor
    position: Tensor
    attention: AttentionPattern
    targets: Mapping[str, Target[Tensor]]
    token_type: Tensor | None = None


class Stream(NamedTuple):
    """All that crosses a layer or a pipeline stage: one float tensor, the rest integers.

    hidden: [S, B, H], sequence first as megatron-core wants it (S is divided under context and sequence parallelism).
    tokens, position, segment, horizon: int64 [B, S].
    noise: int64 [B, S], what dropout is drawn from at each position, the same under every layout; zeros where there is none.
    """

    hidden: Tensor
    tokens: Tensor
    position: Tensor
    segment: Tensor
    horizon: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """A prediction head that an objective asks the model for.

    classes: how many classes it has; None is the vocabulary.
    coefficient: the factor of its loss in the sum of losses.
    group: heads of one group share one divisor, the sum of their totals; None: a divisor of its own.
    activation: between the two matrices of a head with classes: BERT's pooler has tanh, ELECTRA's discriminator gelu.
    """

    name: str
    classes: int | None = None
    coefficient: float = 1.0
    group: str | None = None
    activation: Literal["tanh", "gelu"] = "tanh"


class Readout(Protocol):
    """The model's answers for one micro-batch. Hides tensor parallelism from the objective."""

    @property
    def tokens(self) -> Tensor:
        """What the model read: the inputs of the batch, unless a generator has filled them."""
        ...

    def nll(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        """Negative log-likelihood (nats, fp32 [B, S]); computed where the weight is not 0, and 0 elsewhere."""
        ...

    def correct(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        """Bool [B, S]: the label is the most probable class, where the weight is not 0."""
        ...

    def states(self) -> Tensor:
        """Final hidden states, [B, S, H]."""
        ...

    def embed(self, head: str, chosen: Tensor) -> Tensor:
        """The hidden layer of a head with classes, at the chosen positions (bool [B, S]), row by row: [n, H]."""
        ...


class Comm(Protocol):
    """What an objective may ask of the other data-parallel ranks."""

    def gather(self, x: Tensor) -> tuple[Tensor, int]:
        """The rows of all data ranks in rank order, however many each has, and where this rank's own begin; gradients flow
        back to their owners."""
        ...
