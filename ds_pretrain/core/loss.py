"""Sum first, divide once.

The loss of a step is sum(m * l) over micro-batches and data ranks, divided by the global sum(m) of the same step. A mean
of per-micro-batch means is another objective as soon as masks vary (a gradient error of 9% to 253% was measured).
DeepSpeed divides by the accumulation steps and averages over the data ranks, so a micro-batch returns its sum times both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ds_pretrain.core.batch import Batch, Head


def step_loss(sums: Mapping[str, Tensor], totals: Mapping[str, float], heads: Sequence[Head], scale: float) -> Tensor:
    """The scalar to call backward on for one micro-batch.

    sums: per-head summed losses of this micro-batch (scalars). totals: per-head divisors of the whole step, counted over
    all micro-batches and data ranks before the first backward pass. scale: accumulation steps times data ranks, which
    undoes the engine's own divisions. A head without a single target in the step contributes exactly 0.
    """
    share = divisors(totals, heads)
    parts = [sums[h.name] * (h.coefficient * scale / share[h.name] if share[h.name] else 0.0) for h in heads]
    return sum(parts[1:], start=parts[0])


def divisors(totals: Mapping[str, float], heads: Sequence[Head]) -> dict[str, float]:
    """What each head's sum is divided by: its own total, or that of its whole group."""
    return {
        h.name: sum(totals[other.name] for other in heads if other.group == h.group) if h.group else totals[h.name]
        for h in heads
    }


def count_totals(batches: Sequence[Batch], heads: Sequence[Head]) -> dict[str, float]:
    """Per-head divisors of these micro-batches, to be summed over the data ranks."""
    return {h.name: sum(batch.targets[h.name].total for batch in batches) for h in heads}


def weighted_mean(sums: Mapping[str, float], totals: Mapping[str, float], heads: Sequence[Head]) -> float:
    """The loss a person reads: every head's global sum over its global total, times its coefficient."""
    share = divisors(totals, heads)
    return sum(h.coefficient * sums[h.name] / share[h.name] for h in heads if share[h.name])
