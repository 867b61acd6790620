"""Every figure has the denominator that its name says, and only causal models have a perplexity."""

import math
from dataclasses import replace

import pytest
from rich.console import Console

from ds_pretrain.evaluation.report import HeadScores, Scores, heads_table, table

SCORES = Scores(nats=1200.0, tokens=400, bytes=1500, words=300, accuracy=0.25)


def text(view) -> str:
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


def test_each_figure_divides_by_what_it_says():
    assert SCORES.loss == 3
    assert SCORES.perplexity == pytest.approx(math.exp(3))
    assert SCORES.word_perplexity == pytest.approx(math.exp(4))
    assert SCORES.bits_per_byte == pytest.approx(0.8 / math.log(2))


def test_the_figures_are_one_quantity():
    """The total in nats comes back from each of them."""
    for nats in (math.log(SCORES.perplexity) * 400, math.log(SCORES.word_perplexity) * 300):
        assert nats == pytest.approx(SCORES.nats)
    assert SCORES.bits_per_byte * 1500 * math.log(2) == pytest.approx(SCORES.nats)
    uniform = Scores(nats=7 * math.log(256), tokens=7, bytes=7, words=1)
    assert (uniform.perplexity, uniform.bits_per_byte) == (pytest.approx(256), pytest.approx(8))


def test_what_an_objective_hides_has_no_perplexity():
    metrics = SCORES.as_metrics("hidden")
    assert metrics == {"loss": 3, "accuracy": 0.25, "tokens_scored": 400}
    shown = text(table([("mlm", SCORES)], "hidden"))
    assert "bits" not in shown
    assert "(per word)" not in shown


def test_a_causal_model_has_all_of_them():
    metrics = SCORES.as_metrics("likelihood")
    assert set(metrics) == {"loss", "accuracy", "tokens_scored", "perplexity", "word_perplexity", "bits_per_byte"}
    assert "accuracy" not in Scores(1.0, 1, 1, 1).as_metrics("likelihood")


def test_a_bound_is_called_one_and_says_how_sure_it_is():
    metrics = replace(SCORES, error=0.125).as_metrics("bound")
    assert metrics["loss_error"] == 0.125 and metrics["bits_per_byte_bound"] == pytest.approx(0.8 / math.log(2))
    assert "perplexity" not in metrics and "bits_per_byte" not in metrics
    assert "upper bound" in text(table([("mdlm", SCORES)], "bound"))


def test_heads_of_their_own_have_figures_of_their_own():
    scores = replace(SCORES, total=5.0, heads={"mlm": HeadScores(3.0, 400, 0.25), "nsp": HeadScores(2.0, 10, 0.8, 0.75, 0.6)})
    metrics = scores.as_metrics("hidden")
    assert metrics["loss"] == 5 and metrics["nsp/recall"] == 0.6 and "mlm/recall" not in metrics
    shown = text(heads_table(scores))
    assert all(part in shown for part in ("nsp", "2.0000", "80.00%", "75.00%", "60.00%", "-"))


def test_hopeless_scores_are_infinite_and_not_an_error():
    assert Scores(nats=9e6, tokens=1_000_000, bytes=4_000_000, words=1000).word_perplexity == math.inf
    nothing = Scores(0.0, 0, 0, 0)
    figures = (nothing.loss, nothing.perplexity, nothing.word_perplexity, nothing.bits_per_byte)
    assert all(math.isnan(x) for x in figures)


def test_the_table_names_denominators_and_fits_a_terminal():
    other = Scores(nats=900.0, tokens=400, bytes=1500, words=300)
    shown = text(table([("bigram", SCORES), ("model [a] at step 5", other)], "likelihood", title="runs/[x], test"))
    assert all(part in shown for part in ("(per token)", "(per word)", "per byte", "nats/token", "1,500 bytes"))
    assert all(part in shown for part in ("3.0000", "20.09", "54.60", "25.00%"))
    assert all(part in shown for part in ("model [a] at step 5", "runs/[x], test"))
    assert max(map(len, shown.splitlines())) <= 100


def test_the_best_of_each_column_is_bold():
    worse = Scores(nats=1300.0, tokens=400, bytes=1500, words=300, accuracy=0.5)
    view = table([("a", SCORES), ("b", worse)], "likelihood")
    cells = {column.header.split("\n")[0]: list(column.cells) for column in view.columns}
    assert cells["loss"] == ["[bold]3.0000[/bold]", "3.2500"]
    assert cells["accuracy"] == ["25.00%", "[bold]50.00%[/bold]"]
