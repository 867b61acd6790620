"""How well a model predicts a split: summed over all ranks first, divided once.

Every token of a document is predicted exactly once, its first one from the end-of-document id, so windows are disjoint and
the text that the nats belong to is known to the byte. Masked models are scored under fixed masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.data.loader import evaluation_batches
from ds_pretrain.evaluation.report import Scores

if TYPE_CHECKING:
    from ds_pretrain.training.engine import Model


def evaluate(model: Model, dataset: PretrainingDataset, max_tokens: int | None = None) -> Scores:
    """Scores of the objective's first head over at most `max_tokens` tokens of whole documents (collective)."""
    mesh = model.mesh
    plan = dataset.evaluation(max_tokens)
    batches = evaluation_batches(dataset, max_tokens, model.micro_size, mesh.at.data, mesh.data_size)
    result = model.evaluate(batches)
    head = model.objective.heads[0].name
    return Scores(
        nats=result.sums[head],
        tokens=round(result.totals[head]),
        bytes=plan.bytes,
        words=plan.words,
        accuracy=result.correct[head] / result.totals[head] if result.totals[head] else 0.0,
    )


def evaluate_perplexity(model: Model, dataset: PretrainingDataset, max_tokens: int | None = None) -> float:
    """Perplexity per token of a causal model on a dataset split, exp(nats / tokens).

    ValueError for a model that sees both sides: its exp(loss) is no perplexity (use `evaluate`).
    """
    if dataset.objective.kind != "causal":
        raise ValueError(
            f"{dataset.objective.name} predicts tokens from both sides, so it has no perplexity: read its masked loss and "
            "accuracy with ds_pretrain.evaluation.perplexity.evaluate"
        )
    return evaluate(model, dataset, max_tokens).perplexity
