"""What a run's batches really contain, summed up while it trains, and a word when that is not what was asked for.

A mask rate, a split of 80/10/10 or a mixture's shares are promises of a run file; a wrong tokenizer, a corpus of tiny
documents or a bug in a plug-in break them in silence. Shares are of one data rank's batches, weighted by the positions that
they predict; one that an objective `expects` and that strays by more than five standard deviations of a binomial is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ds_pretrain.core.batch import Batch
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.collate import realised
from ds_pretrain.objectives import Objective

DEVIATIONS = 5.0
TOLERANCE = 0.003
"""What rounding to whole positions may add; below it nobody cares."""


class Audit:
    """Running means of `realised`."""

    def __init__(self, objective: Objective, vocab: Vocabulary) -> None:
        self.objective, self.vocab = objective, vocab
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._predicted: dict[str, float] = {}
        self._told: set[str] = set()

    def add(self, batches: Sequence[Batch]) -> None:
        predicted = {name: sum(int((b.targets[name].weights != 0).sum()) for b in batches) for name in batches[0].targets}
        for name, count in predicted.items():
            self._predicted[name] = self._predicted.get(name, 0.0) + count
        for key, share in realised(batches, self.vocab).items():
            weight = predicted.get(key.rsplit("/", 1)[0], 1)
            self._sums[key] = self._sums.get(key, 0.0) + weight * share
            self._weights[key] = self._weights.get(key, 0.0) + weight

    @property
    def shares(self) -> dict[str, float]:
        """The mean of every statistic so far."""
        return {key: self._sums[key] / weight for key, weight in self._weights.items() if weight}

    def surprises(self) -> list[str]:
        """What strays from what the objective expects, each told once."""
        found = []
        for key, expected in self.objective.expected.items():
            count = self._predicted.get(key.rsplit("/", 1)[0], 0.0)
            share = self._sums.get(key, 0.0) / count if count else expected
            if key in self._told or not count:
                continue
            if abs(share - expected) > DEVIATIONS * math.sqrt(expected * (1 - expected) / count) + TOLERANCE:
                self._told.add(key)
                found.append(f"warning: {key} is {share:.2%} of {count:,.0f} positions, {expected:.2%} were asked for")
        return found
