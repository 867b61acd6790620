"""What a run's batches really contain, summed up while it trains, and a word when that is not what was asked for.

A mask rate, a split of 80/10/10 or a mixture's shares are promises of a run file; a wrong tokenizer, a corpus of tiny
documents or a bug in a plug-in break them in silence. Shares are of one data rank's batches, weighted by the positions that
they predict; one that an objective `expects` and that strays by more than five standard deviations of a binomial is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from types import MappingProxyType

from ds_pretrain.core.batch import Batch, Count
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.collate import counted
from ds_pretrain.objectives import Objective

DEVIATIONS = 5.0
TOLERANCE = 0.01
"""What rounding to whole positions may add; below it nobody cares."""


class Audit:
    """Sums of what is counted in the batches."""

    def __init__(self, objective: Objective, vocab: Vocabulary) -> None:
        self.objective, self.vocab, self.expected = objective, vocab, objective.expected
        self._sums: dict[str, Count] = {}
        self._told: set[str] = set()

    def add(self, batches: Sequence[Batch], samples: Mapping[str, int] = MappingProxyType({})) -> None:
        """samples: those of each component of a mixture, as `Samples.consumed` counts them."""
        counts: list[Mapping[str, Count]] = [counted(batches, self.vocab, self.objective.heads)]
        counts += [self.objective.counted(batch, self.vocab) for batch in batches]
        promised = {key.removesuffix("/samples") for key in self.expected if key.endswith("/samples")}
        every = sum(samples.values())
        counts.append({f"{name}/samples": (samples.get(name, 0), every) for name in {*promised, *samples}})
        for key, (part, whole) in chain.from_iterable(found.items() for found in counts):
            before = self._sums.get(key, (0, 0))
            self._sums[key] = (before[0] + part, before[1] + whole)

    @property
    def shares(self) -> dict[str, float]:
        """Every statistic so far."""
        return {key: part / whole for key, (part, whole) in self._sums.items() if whole}

    def surprises(self) -> list[str]:
        """What strays from what the objective expects, each told once."""
        found = []
        for key, expected in self.expected.items():
            part, whole = self._sums.get(key, (0, 0))
            if key in self._told or not whole:
                continue
            if abs(part / whole - expected) > DEVIATIONS * math.sqrt(expected * (1 - expected) / whole) + TOLERANCE:
                self._told.add(key)
                found.append(f"warning: {key} is {part / whole:.2%} of {whole:,.0f}, {expected:.2%} were asked for")
        return found
