"""The contract of a pre-training objective, and the registry that everything else reads.

An objective is its own config: a frozen dataclass whose fields are the parameters that its paper names. It turns
documents into examples (numpy, no state, randomness only from the generator it is handed) and the model's answers into
summed losses. It knows no process group and no model: adding one is one file with `@register("name")`, and the command
line, `preview`, every layout and the law tests pick it up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor

from ds_pretrain.core.attention import Kind
from ds_pretrain.core.batch import Batch, Comm, Count, Document, Example, Head, Readout
from ds_pretrain.core.registry import Registry, unknown
from ds_pretrain.core.vocabulary import Vocabulary

Measure = Literal["likelihood", "bound", "hidden"]
REGISTRY: Registry[type[Objective]] = Registry("objective")
LAST_ORDINAL = np.iinfo(np.int64).max
"""The ordinal after every schedule."""
O = TypeVar("O", bound="type[Objective]")  # noqa: E741


class Variant(Protocol):
    """What makes an example once it is decided who does."""

    def size(self, tokens: np.ndarray) -> np.ndarray: ...

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example: ...


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base class. Class attributes are static facts about the objective; dataclass fields are its parameters."""

    name: ClassVar[str]
    heads: ClassVar[tuple[Head, ...]]
    kind: ClassVar[Kind]
    """What attention its examples use: a static promise that selects the kernel."""
    generator: ClassVar[tuple[str, float] | None] = None
    """For objectives with a second, smaller network that rewrites the inputs first: the head that it answers, whose scored
    positions it fills, and its width as a share of the model's."""
    pooled: ClassVar[bool] = False
    """Whether a sample's loss depends on the other samples of its step (contrastive objectives)."""
    documents: ClassVar[int] = 1
    """Documents that one example is made from."""
    shortest: ClassVar[int] = 1
    """Tokens that a piece must have; shorter documents give no example and are counted."""
    token_types: ClassVar[int] = 0
    """Rows of the token type embedding that its examples use."""
    measure: ClassVar[Measure] = "hidden"
    """What the summed loss of an evaluation is: the negative log-likelihood of the text, an upper bound on it, or the loss
    of whatever the objective hides, which gives no perplexity."""
    eod: ClassVar[bool] = True
    """Whether a document's end-of-document token is part of what the example is made from."""
    framed: ClassVar[bool] = False
    """Whether its examples stand between [CLS] and [SEP]."""
    whole: ClassVar[bool] = False
    """Whether a document must be one example: none may be longer than a piece, and each is looked at before training."""
    packed: ClassVar[bool] = True
    """Whether several examples may share a row."""
    reset_position: ClassVar[bool] = True
    """Whether positions restart with every example of a row."""
    reset_attention: ClassVar[bool] = True
    """Whether the examples of a row are hidden from each other; only causal attention leaves a choice."""

    @property
    def likelihood(self) -> Objective | None:
        """The objective whose loss is the likelihood of the text and that a model trained for this one can be scored by."""
        return self if self.measure == "likelihood" else None

    @property
    def evaluated(self) -> Objective:
        """What an evaluation scores: this objective without what would leave out text."""
        return self

    @property
    def pooling(self) -> Literal["cls", "mean"]:
        """What stands for a text: the state of its first position where a head is trained on that, else the mean of all."""
        return "cls" if any(head.classes is not None and head.activation == "tanh" for head in self.heads) else "mean"

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What a sample may be made by: nearly always this objective alone."""
        return (self,)

    @property
    def in_turn(self) -> bool:
        """Whether the variants, all of one size, make the samples one after the other in the order of training: strata.
        Otherwise each sample draws its own (`pick`)."""
        return False

    def pick(self, draw: np.ndarray, ordinal: np.ndarray) -> np.ndarray:
        """Which of the variants makes each sample. draw: uniform in [0, 1). ordinal: samples that come before it."""
        return np.zeros(len(draw), dtype=np.int64)

    @abstractmethod
    def piece(self, max_len: int) -> int:
        """How many tokens of a document one example of at most `max_len` positions takes; longer ones are cut there."""

    @abstractmethod
    def size(self, tokens: np.ndarray) -> np.ndarray:
        """Positions of the example made from a piece of that many tokens; an upper bound where it is random."""

    @abstractmethod
    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        """One example of at most `max_len` positions. Pure: the same arguments give the same example."""

    def loss(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        """Summed loss per head of one micro-batch: sum(weight * nll), fp32 scalars. Never a mean."""
        return {h.name: self._summed(read, batch, h.name) for h in self.heads}

    @property
    def expected(self) -> Mapping[str, float]:
        """Shares that this objective promises, of `data.collate.counted` and its own `counted`, by the same keys."""
        return {}

    def counted(self, batch: Batch, vocab: Vocabulary) -> Mapping[str, Count]:
        """What only this objective can count in its batches (HEAD/what): rewritten documents, shares of components."""
        return {}

    @property
    def tallied(self) -> tuple[str, ...]:
        """What an evaluation counts: per head the `scored` positions and the `correct` ones; of heads with two classes also
        the `positive` labels and those of them that were `found`."""
        pairs = [f"{h.name}/{what}" for h in self.heads if h.classes == 2 for what in ("positive", "found")]
        return (*(f"{h.name}/{what}" for h in self.heads for what in ("correct", "scored")), *pairs)

    def tallies(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        """These counts for one micro-batch, scalars."""
        counts: dict[str, Tensor] = {}
        for head in self.heads:
            target = batch.targets[head.name]
            hits = read.correct(head.name, target.labels, target.weights)
            counts |= {f"{head.name}/correct": hits.sum(), f"{head.name}/scored": (target.weights != 0).sum()}
            if head.classes == 2:
                positive = (target.labels == 1) & (target.weights != 0)
                counts |= {f"{head.name}/positive": positive.sum(), f"{head.name}/found": (hits & positive).sum()}
        return counts

    def unusable(self, doc: Document, vocab: Vocabulary) -> str | None:
        """Why no example can be made of this document, for objectives that ask for more than text."""
        return None

    def check(self, vocab: Vocabulary, max_len: int) -> list[str]:
        """Every reason why this objective cannot be trained with this tokenizer and length, with numbers and the fix."""
        least = 2 * self.shortest - 1  # a last piece that is too short takes what it lacks from the one before it
        if max_len < 8 or self.piece(max_len) < least:
            need = next(n for n in range(8, 1 << 20) if self.piece(n) >= least)
            return [f"batch.seq_len {max_len} is too short for {self.name}: at least {need} positions are needed"]
        return []

    @staticmethod
    def _summed(read: Readout, batch: Batch, head: str) -> Tensor:
        target = batch.targets[head]
        return (read.nll(head, target.labels, target.weights) * target.weights).sum()


def register(name: str) -> Callable[[O], O]:
    """Class decorator: gives the objective its name and makes it known everywhere."""

    def add(cls: O) -> O:
        cls.name = name
        REGISTRY.register(name)(cls)
        return cls

    return add


def create(name: str, **fields: Any) -> Objective:
    """The objective of that name. Unknown names and fields raise ValueError with the nearest one."""
    cls = REGISTRY[name]
    known = {field.name: field for field in dataclass_fields(cls)}
    for key, value in fields.items():
        if key not in known:
            raise ValueError(unknown(f"field of objective {name}", key, known))
        if told := _mistyped(str(known[key].type), value):
            raise ValueError(f"objective.{key} of {name} is {told}, got {value!r}")
    return cls(**{key: int(value) if known[key].type == "int" else value for key, value in fields.items()})


def _mistyped(annotation: str, value: Any) -> str | None:
    """What a value should be, by the annotation of its field, if it is not; None where it is or where that does not tell."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = annotation.removesuffix(" | None").partition("[")[0]
    if value is None and annotation.endswith(" | None"):
        return None
    match kind:
        case "bool":
            return None if isinstance(value, bool) else "true or false"
        case "int":
            return None if number and value == int(value if math.isfinite(value) else 0.5) else "a whole number"
        case "float":
            return None if number and math.isfinite(value) else "a number"
        case "str" | "Literal":
            return None if isinstance(value, str) else "a word"
        case "Mapping":
            return None if isinstance(value, Mapping) else "a mapping"
    return None
