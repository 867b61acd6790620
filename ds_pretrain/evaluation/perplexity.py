"""How well a model does on a split: summed over all ranks first, divided once.

Every token of a document is predicted exactly once by a causal model, its first one from the end-of-document id, so
windows are disjoint and the text that the nats belong to is known to the byte. Everything else is scored under fixed masks;
a diffusion bound is averaged over several draws of them, and says how sure that average is.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.data.loader import evaluation_batches
from ds_pretrain.evaluation.report import HeadScores, Scores

if TYPE_CHECKING:
    from ds_pretrain.training.engine import Evaluated, Model

DRAWS = 8
"""Draws of masks that a bound is averaged over."""


def evaluate(model: Model, dataset: PretrainingDataset, max_tokens: int | None = None) -> Scores:
    """Scores over at most `max_tokens` tokens of whole documents (collective)."""
    mesh, objective = model.mesh, model.objective
    if dataset.objective.evaluated != dataset.objective:
        dataset = dataset.split(dataset.source, dataset.objective.evaluated)
    plan = dataset.evaluation(max_tokens)
    results = []
    for draw in range(DRAWS if objective.measure == "bound" else 1):
        batches = evaluation_batches(dataset, max_tokens, model.micro_size, mesh.at.data, mesh.data_size, draw)
        results.append(model.evaluate(batches))
    losses = [result.loss for result in results]
    words = [head.name for head in objective.heads if head.classes is None] or [objective.heads[0].name]
    scored = sum(results[0].totals[name] for name in words)
    return Scores(
        nats=statistics.fmean(sum(result.sums[name] for name in words) for result in results),
        tokens=round(scored),
        bytes=plan.bytes,
        words=plan.words,
        accuracy=_share(
            *(sum(results[0].tallies.get(f"{name}/{key}", 0.0) for name in words) for key in ("correct", "scored"))
        ),
        total=statistics.fmean(losses),
        error=statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None,
        heads={head.name: _head(results[0], head.name) for head in objective.heads} if _several(objective.heads) else {},
    )


def _several(heads: tuple) -> bool:
    return len(heads) > 1 or heads[0].classes is not None


def _head(result: Evaluated, name: str) -> HeadScores:
    """One head's figures; precision and recall of label 1 where there are two classes."""
    total, counts = result.totals[name], result.tallies
    correct, positive, found = (counts.get(f"{name}/{what}") for what in ("correct", "positive", "found"))
    accuracy = None if correct is None else _share(correct, counts[f"{name}/scored"])
    scores = HeadScores(_share(result.sums[name], total), round(total), accuracy)
    if positive is None or found is None or correct is None:
        return scores
    guessed = found + (total - positive) - (correct - found)  # wrong on label 0 means label 1 was guessed
    return HeadScores(scores.loss, scores.scored, accuracy, _share(found, guessed), _share(found, positive))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def evaluate_perplexity(model: Model, dataset: PretrainingDataset, max_tokens: int | None = None) -> float:
    """Perplexity per token of a causal model on a dataset split, exp(nats / tokens).

    ValueError for an objective whose loss is not the likelihood of the text: its exp(loss) is no perplexity.
    """
    if dataset.objective.measure != "likelihood":
        raise ValueError(
            f"the loss of {dataset.objective.name} is not the likelihood of the text, so it has no perplexity: read its loss "
            "and accuracy with ds_pretrain.evaluation.perplexity.evaluate"
        )
    return evaluate(model, dataset, max_tokens).perplexity
