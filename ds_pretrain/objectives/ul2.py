"""UL2: a mixture of seven denoisers, each announced by a mode token (Tay et al. 2023).

    R  [NLU]  span corruption, short spans, little noise:         mean 3 or 8, 15%
    S  [S2S]  prefix LM, the last quarter is predicted, no sentinel
    X  [NLG]  span corruption, long spans or much noise:          mean 3, 8 or 64 at 50%, mean 64 at 15%

Which one a sample gets is drawn from its key, uniformly over the seven by default. The paper's text gives S a target share
of 25%, its code 50%: `s_ratio`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ds_pretrain.objectives.base import register
from ds_pretrain.objectives.mixture import Component, Composite
from ds_pretrain.objectives.prefix import PrefixLanguageModeling
from ds_pretrain.objectives.spans import SpanCorruption

R = ((3, 0.15), (8, 0.15))
X = ((3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5))
"""(mean span, density) of the denoisers."""


@register("ul2")
@dataclass(frozen=True, kw_only=True)
class UL2(Composite):
    """Shares are of samples, divided evenly inside a group; they need not sum to 1."""

    r: float = 2.0
    """Share of the two R denoisers together."""
    s: float = 1.0
    """Share of the S denoiser."""
    x: float = 4.0
    """Share of the four X denoisers together."""
    s_ratio: float = 0.25
    """Share of a document that the S denoiser predicts."""

    def __post_init__(self) -> None:
        if min(self.r, self.s, self.x) < 0 or self.r + self.s + self.x <= 0:
            raise ValueError(f"shares must not be negative and not all be 0, got r {self.r}, s {self.s}, x {self.x}")
        if not 0 < self.s_ratio < 1:
            raise ValueError(f"s_ratio must lie between 0 and 1, got {self.s_ratio}")

    @cached_property
    def components(self) -> tuple[Component, ...]:
        return (
            *(Component("r", SpanCorruption(mean_span=mu, density=share, mode="[NLU]")) for mu, share in R),
            Component("s", PrefixLanguageModeling(ratio=1 - self.s_ratio, mode="[S2S]")),
            *(Component("x", SpanCorruption(mean_span=mu, density=share, mode="[NLG]")) for mu, share in X),
        )

    def shares(self, ordinal: np.ndarray) -> np.ndarray:
        each = [self.r / len(R)] * len(R) + [self.s] + [self.x / len(X)] * len(X)
        return np.tile(each, (len(ordinal), 1))


@register("ul2r")
@dataclass(frozen=True, kw_only=True)
class UL2R(UL2):
    """The preset for continuing from a causal model: half S, a quarter R, a quarter X (Tay et al. 2022)."""

    r: float = 0.25
    s: float = 0.5
    x: float = 0.25
