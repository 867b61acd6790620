"""Scores and what may be called what: every figure says its denominator.

A causal model's nats are those of the whole text, so they give a perplexity per token, one per word of the original
text, and bits per byte; models with different tokenizers are compared by bits per byte only. The nats of any other
model are those of the hidden tokens alone: a loss and an accuracy, never a perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table

from ds_pretrain.objectives.base import Measure


@dataclass(frozen=True)
class HeadScores:
    """One head's mean loss over what it scored; precision and recall are those of label 1 (replaced, not next, swapped)."""

    loss: float
    scored: int
    accuracy: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class Scores:
    """Sums over an evaluation.

    nats: summed loss of the heads over the vocabulary. tokens: those scored. bytes, words: of the original text.
    accuracy: the share of the scored tokens that was the most probable one; None where nobody counted.
    total: the objective's whole loss, where it has several heads. error: standard error of the loss, where it is averaged
    over random masks. heads: by name, where there are several or one that is not over the vocabulary.
    """

    nats: float
    tokens: int
    bytes: int
    words: int
    accuracy: float | None = None
    total: float | None = None
    error: float | None = None
    heads: Mapping[str, HeadScores] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The objective's loss: nats per scored token where it has one head; not a number where none was scored."""
        if self.total is not None and self.heads:
            return self.total
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Per token: exp(nats / tokens)."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Per word of the original text: exp(nats / words)."""
        return _exp(self.nats / self.words if self.words else math.nan)

    @property
    def bits_per_byte(self) -> float:
        """Per byte of the original text: nats / (bytes * ln 2)."""
        return self.nats / (self.bytes * math.log(2)) if self.bytes else math.nan

    def as_metrics(self, measure: Measure) -> dict[str, float]:
        """What may be reported of an objective with such a loss; `perplexity` is the one per token."""
        found: dict[str, float] = {"loss": self.loss, "tokens_scored": self.tokens}
        if self.accuracy is not None and not math.isnan(self.accuracy):
            found["accuracy"] = self.accuracy
        if measure == "likelihood":
            found |= {"perplexity": self.perplexity, "word_perplexity": self.word_perplexity}
            found["bits_per_byte"] = self.bits_per_byte
        if measure == "bound":
            found |= {"bits_per_byte_bound": self.bits_per_byte}
            found |= {} if self.error is None else {"loss_error": self.error}
        for name, head in self.heads.items():
            figures = {"loss": head.loss, "accuracy": head.accuracy, "precision": head.precision, "recall": head.recall}
            found |= {f"{name}/{key}": x for key, x in figures.items() if x is not None and not math.isnan(x)}
        return found


COLUMNS = {
    "loss": ("loss\n(nats/token)", "{:.4f}"),
    "perplexity": ("perplexity\n(per token)", "{:,.2f}"),
    "word_perplexity": ("perplexity\n(per word)", "{:,.2f}"),
    "bits_per_byte": ("bits\nper byte", "{:.4f}"),
    "loss_error": ("standard\nerror", "{:.4f}"),
    "bits_per_byte_bound": ("bits per byte\n(upper bound)", "{:.4f}"),
    "accuracy": ("accuracy\n(per token)", "{:.2%}"),
    "tokens_scored": ("tokens\nscored", "{:,}"),
}
"""Metric to heading and format, in the order of the table."""


def table(rows: Sequence[tuple[str, Scores]], measure: Measure, title: str | None = None) -> Table:
    """Named scores side by side, for people; the best value of each column is bold."""
    found = [scores.as_metrics(measure) for _, scores in rows]
    shown = [key for key in COLUMNS if any(key in metrics for metrics in found)]
    view = Table(title=title and escape(title), caption=_caption(rows, measure))
    view.title_justify = view.caption_justify = "left"
    view.add_column("model")
    for key in shown:
        heading = COLUMNS[key][0]
        if measure == "hidden":  # pairs and sentences too
            heading = heading.replace("nats/token", "nats").replace("tokens\nscored", "positions\nscored")
        view.add_column(heading, justify="right")
    best = {key: _best([metrics[key] for metrics in found if key in metrics], key) for key in shown}
    for (name, _), metrics in zip(rows, found, strict=True):
        view.add_row(escape(name), *(_cell(key, metrics.get(key), best[key]) for key in shown))
    return view


def heads_table(scores: Scores) -> Table:
    """The heads of an objective that has several, or one over classes."""
    view = Table("head", "loss\n(nats)", "scored", "accuracy", "precision\n(label 1)", "recall\n(label 1)")
    for name, head in scores.heads.items():
        shares = (head.accuracy, head.precision, head.recall)
        shown = ("-" if x is None or math.isnan(x) else f"{x:.2%}" for x in shares)
        view.add_row(escape(name), "-" if math.isnan(head.loss) else f"{head.loss:.4f}", f"{head.scored:,}", *shown)
    return view


def _caption(rows: Sequence[tuple[str, Scores]], measure: Measure) -> str:
    if measure == "hidden":
        return "only what the objective hides is scored: no perplexity"
    texts = dict.fromkeys(f"{scores.bytes:,} bytes, {scores.words:,} words" for _, scores in rows)
    return f"text predicted: {'; '.join(texts)}"


def _best(values: Sequence[float], key: str) -> float | None:
    if len(values) < 2 or key == "tokens_scored":
        return None
    return max(values) if key == "accuracy" else min(values)


def _cell(key: str, value: float | None, best: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.2e}" if abs(value) >= 1e7 and key != "tokens_scored" else COLUMNS[key][1].format(value)
    return f"[bold]{text}[/bold]" if value == best else text


def _exp(power: float) -> float:
    """exp without the OverflowError that text of few words would raise at the start of a run."""
    return math.exp(power) if not power > 700 else math.inf
