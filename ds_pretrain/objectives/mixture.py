"""Several objectives in one run: each sample is given to one of them by a keyed draw.

Shares are of samples, or of loss tokens (then an objective that scores 15% of its tokens is drawn more often than one that
scores all). Vocabulary heads share one divisor, so every loss token weighs the same, as if one objective had made them;
what each contributes stays visible as a head of its own, called after its component. A schedule moves the shares as samples
are consumed, linearly between its points. Which component a sample gets is decided before a token is read, so rows are
packed by exact sizes, and every document is still used exactly once per epoch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ds_pretrain.core import rng as random
from ds_pretrain.core.attention import Kind
from ds_pretrain.core.batch import Batch, Comm, Count, Document, Example, Head, Readout
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.objectives.base import LAST_ORDINAL, Objective, Variant, create, register

LENGTH = 512
"""Positions of a row for which the loss tokens of a sample are measured."""


@dataclass(frozen=True)
class Component:
    """One objective of a composite. name: of its heads; components may share one."""

    name: str
    objective: Objective

    def head(self, own: str) -> str:
        """What the composite calls a head of this component."""
        return self.name if len(self.objective.heads) == 1 else f"{self.name}/{own}"

    def told(self, name: str) -> str:
        """The composite's name for a head of this component or for what is counted of it (HEAD/correct)."""
        head = next(h.name for h in self.objective.heads if name == h.name or name.startswith(f"{h.name}/"))
        return self.head(head) + name.removeprefix(head)

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return self.objective.size(tokens)

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        docs = docs[: self.objective.documents]
        if not self.objective.eod:
            docs = [replace(doc, tokens=doc.tokens[doc.tokens != vocab.eod]) for doc in docs]
        return self._renamed(self.objective.example(docs, vocab, max_len, rng))

    def _renamed(self, example: Example) -> Example:
        targets = {self.head(name): target for name, target in example.targets.items()}
        return replace(example, targets=targets, then=tuple(self._renamed(part) for part in example.then))


@dataclass
class _View:
    """The readout under a component's own names for its heads."""

    read: Readout
    component: Component
    tokens: Tensor

    def nll(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        return self.read.nll(self.component.head(head), labels, weights)

    def correct(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        return self.read.correct(self.component.head(head), labels, weights)

    def states(self) -> Tensor:
        return self.read.states()

    def embed(self, head: str, chosen: Tensor) -> Tensor:
        return self.read.embed(self.component.head(head), chosen)


@dataclass(frozen=True, kw_only=True)
class Composite(Objective):
    """What UL2 and free mixtures share: components, and their shares of the samples as a function of the ordinal."""

    @property
    @abstractmethod
    def components(self) -> tuple[Component, ...]: ...

    @abstractmethod
    def shares(self, ordinal: np.ndarray) -> np.ndarray:
        """float [n, components]: what each is drawn with; need not sum to 1."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        return self.components

    def pick(self, draw: np.ndarray, ordinal: np.ndarray) -> np.ndarray:
        ends = self.shares(ordinal).cumsum(axis=1)
        return (draw[:, None] * ends[:, -1:] >= ends[:, :-1]).sum(axis=1)

    @cached_property
    def heads(self) -> tuple[Head, ...]:  # type: ignore[override]
        found = {
            component.head(head.name): replace(
                head, name=component.head(head.name), group=self.name if head.classes is None else None
            )
            for component in self.components
            for head in component.objective.heads
        }
        return tuple(found.values())

    @cached_property
    def kind(self) -> Kind:  # type: ignore[override]
        kinds = {component.objective.kind for component in self.components}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def framed(self) -> bool:  # type: ignore[override]
        return any(component.objective.framed for component in self.components)

    @property
    def documents(self) -> int:  # type: ignore[override]
        return max(component.objective.documents for component in self.components)

    @property
    def token_types(self) -> int:  # type: ignore[override]
        return max(component.objective.token_types for component in self.components)

    @property
    def eod(self) -> bool:  # type: ignore[override]
        return any(component.objective.eod for component in self.components)

    @property
    def shortest(self) -> int:  # type: ignore[override]
        """What is left where a component takes no end must still be enough for it."""
        return max(c.objective.shortest + (self.eod and not c.objective.eod) for c in self.components)

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return any(component.objective.whole for component in self.components)

    def unusable(self, doc: Document, vocab: Vocabulary) -> str | None:
        reasons = (component.objective.unusable(doc, vocab) for component in self.components)
        return next((why for why in reasons if why), None)

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        return any(component.objective.pooled for component in self.components)

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return all(component.objective.packed for component in self.components)

    def piece(self, max_len: int) -> int:
        return min(component.objective.piece(max_len) for component in self.components)

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return np.max([component.size(tokens) for component in self.components], axis=0)

    def check(self, vocab: Vocabulary, max_len: int) -> list[str]:
        found = [problem for component in self.components for problem in component.objective.check(vocab, max_len)]
        return list(dict.fromkeys(found)) or self._check_pieces(max_len)

    def _check_pieces(self, max_len: int) -> list[str]:
        """Whether what fits all components is enough for each."""
        piece, least = self.piece(max_len), 2 * self.shortest - 1
        if piece >= least:
            return []
        small = min(self.components, key=lambda c: c.objective.piece(max_len)).name
        long = max(self.components, key=lambda c: c.objective.shortest).name
        return [f"{small} takes {piece} tokens of a document at most, {long} needs {least}: they cannot be mixed like this"]

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        """An example of a component that is drawn here, with the last shares; rows of a dataset draw it beforehand."""
        (variant,) = self.pick(rng.random(1), np.array([LAST_ORDINAL]))
        return self.components[variant].example(docs, vocab, max_len, rng)

    def loss(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        return self._collect(batch, lambda c, view: c.objective.loss(_View(read, c, read.tokens), view, comm))

    @property
    def expected(self) -> Mapping[str, float]:
        """What the components promise of their own targets, and their shares of the samples where these do not change."""
        found = {c.told(key): share for c in self._distinct for key, share in c.objective.expected.items()}
        first, last = (self.shares(np.array([ordinal]))[0] for ordinal in (0, LAST_ORDINAL))
        if not np.array_equal(first, last):
            return found
        for component, share in zip(self.components, first / first.sum(), strict=True):
            key = f"{component.name}/samples"
            found[key] = found.get(key, 0.0) + float(share)
        return found

    def counted(self, batch: Batch, vocab: Vocabulary) -> Mapping[str, Count]:
        """What the components count, and the loss tokens of each, of all."""
        found: dict[str, Count] = {}
        words = {head.name for head in self.heads if head.classes is None}
        every = sum(batch.targets[name].total for name in words)
        for component, own in self._views(batch):
            found |= {component.told(key): count for key, count in component.objective.counted(own, vocab).items()}
            mine = {component.head(head.name) for head in component.objective.heads} & words
            found[f"{component.name}/loss_tokens"] = (sum(batch.targets[name].total for name in mine), every)
        return found

    @property
    def tallied(self) -> tuple[str, ...]:
        return tuple(component.told(name) for component in self._distinct for name in component.objective.tallied)

    def tallies(self, read: Readout, batch: Batch, comm: Comm) -> Mapping[str, Tensor]:
        return self._collect(batch, lambda c, view: c.objective.tallies(_View(read, c, read.tokens), view, comm))

    @property
    def _distinct(self) -> Iterable[Component]:
        """One component of each name."""
        return {component.name: component for component in self.components}.values()

    def _collect(self, batch: Batch, ask: Callable[[Component, Batch], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What the components answer, each about a batch that has its own targets only, under the mixture's names."""
        found: dict[str, Tensor] = {}
        for component, own in self._views(batch):
            found |= {component.told(name): value for name, value in ask(component, own).items()}
        return found

    def _views(self, batch: Batch) -> Iterator[tuple[Component, Batch]]:
        """The batch as each component made it: its own targets under their own names."""
        for component in self._distinct:
            own = {head.name: batch.targets[component.head(head.name)] for head in component.objective.heads}
            yield component, replace(batch, targets=own)


@register("mixture")
@dataclass(frozen=True, kw_only=True)
class Mixture(Composite):
    """Any objectives, by weight.

    objective: {name: mixture, weights: {clm: 0.7, mlm: 0.3}, by: tokens, options: {mlm: {mask_prob: 0.3}}}
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"clm": 0.5, "mlm": 0.5})
    """Component to weight. A component is called after its objective, or as you like with `name` among its options."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Component to the fields of its objective."""
    by: Literal["samples", "tokens"] = "samples"
    """What the weights are shares of: samples, or loss tokens."""
    schedule: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Samples consumed to the weights from there on, linear in between; `weights` hold at 0."""

    def __post_init__(self) -> None:
        if not all(isinstance(w, Mapping) for w in (self.weights, *self.schedule.values())):
            raise ValueError(f"weights of a mixture map names to numbers, got {self.weights!r} and {self.schedule!r}")
        if self.by not in ("samples", "tokens"):
            raise ValueError(f"by must be 'samples' or 'tokens', got {self.by!r}")
        if any(int(start) <= 0 for start in self.schedule):
            raise ValueError(f"schedule starts at {min(self.schedule)}: its points lie above 0, `weights` hold at 0")
        for when, weights in self._points:
            if wrong := [f"{k}={w!r}" for k, w in weights.items() if isinstance(w, bool) or not _finite(w)]:
                raise ValueError(f"weights of a mixture are numbers, got {', '.join(wrong)}")
            told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "none"
            if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
                raise ValueError(f"weights of a mixture must not be negative and not all be 0; at sample {when}: {told}")
        self._check_components()

    def _check_components(self) -> None:
        if inner := [c.name for c in self.components if isinstance(c.objective, Mixture)]:
            raise ValueError(f"{', '.join(inner)} cannot be a component of a mixture: write its components and weights out")
        if double := [c.name for c in self.components if c.objective.generator]:
            raise ValueError(f"{', '.join(double)} trains two networks and cannot be mixed with others")
        if running := [c.name for c in self.components if not (c.objective.reset_position and c.objective.reset_attention)]:
            raise ValueError(f"{', '.join(running)}: reset_position and reset_attention stay true in a mixture")
        if strange := [c.name for c in self.components if set(c.name) & set("./")]:
            raise ValueError(f"{', '.join(strange)}: a component's name has no dot and no slash")
        if len(pools := [c.name for c in self.components if c.objective.pooled]) > 1:
            raise ValueError(f"{', '.join(pools)}: a mixture has one contrastive component at most")
        if unused := set(self.options) - {component.name for component in self.components}:
            raise ValueError(f"options for {', '.join(sorted(unused))}, which has no weight")

    @property
    def evaluated(self) -> Objective:
        """Every component, also one that a schedule brings in later or has faded out: with its mean weight over the points."""
        mean = dict(zip((c.name for c in self.components), self._table.mean(axis=0).tolist(), strict=True))
        weights = mean if self.schedule else self.weights
        options = {c.name: {**self.options.get(c.name, {}), **_changes(c.objective)} for c in self.components}
        options = {name: fields for name, fields in options.items() if fields}
        return replace(self, weights=weights, schedule={}, options=options)

    @property
    def _points(self) -> list[tuple[int, Mapping[str, float]]]:
        return [(0, self.weights), *sorted(((int(k), weights) for k, weights in self.schedule.items()), key=lambda p: p[0])]

    @cached_property
    def components(self) -> tuple[Component, ...]:
        names = dict.fromkeys(name for _, weights in self._points for name in weights)
        return tuple(Component(name, create(**{"name": name, **self.options.get(name, {})})) for name in names)

    def check(self, vocab: Vocabulary, max_len: int) -> list[str]:
        problems = super().check(vocab, max_len)
        if not problems and (free := [c.name for c, cost in zip(self.components, self._cost, strict=True) if cost == 0]):
            return [f"by=tokens needs a loss over the vocabulary, {', '.join(free)} has none: use by=samples"]
        return problems

    def shares(self, ordinal: np.ndarray) -> np.ndarray:
        columns = [np.interp(ordinal, self._starts, self._table[:, i]) for i in range(len(self.components))]
        return np.stack(columns, axis=1) / self._cost

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([start for start, _ in self._points], dtype=np.float64)

    @cached_property
    def _table(self) -> np.ndarray:
        """float [points, components]: weights that sum to 1 at every point."""
        rows = [[weights.get(component.name, 0.0) for component in self.components] for _, weights in self._points]
        table = np.array(rows, dtype=np.float64)
        return table / table.sum(axis=1, keepdims=True)

    @cached_property
    def _cost(self) -> np.ndarray:
        """Loss tokens of a sample by component, where weights are shares of those."""
        if self.by == "samples":
            return np.ones(len(self.components))
        return np.array([loss_tokens(component.objective, self.piece(LENGTH)) for component in self.components])


def loss_tokens(objective: Objective, piece: int, samples: int = 64) -> float:
    """Mean divisor of the objective's vocabulary heads for samples of `piece` tokens, measured."""
    vocab = Vocabulary.synthetic()
    heads = [head.name for head in objective.heads if head.classes is None]
    made = _synthetic(objective, vocab, piece, samples)
    parts = [part for example in made for part in (example, *example.then)]
    return sum(part.targets[name].total for part in parts for name in heads if name in part.targets) / samples


def _changes(objective: Objective) -> dict[str, Any]:
    """Fields that an evaluation sets to other values."""
    pairs = ((f.name, getattr(objective.evaluated, f.name)) for f in fields(objective))
    return {name: value for name, value in pairs if value != getattr(objective, name)}


def _finite(number: object) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


def _synthetic(objective: Objective, vocab: Vocabulary, piece: int, samples: int) -> Iterator[Example]:
    """Examples of documents of random words."""
    for number in range(samples):
        rng = random.generator("loss tokens", number)
        texts = [rng.choice(vocab.words, piece) for _ in range(objective.documents)]
        yield objective.example([Document(text) for text in texts], vocab, LENGTH, rng)
