"""What a sweep's finished cells are scored on, beside their own validation split: the same for all of them.

    scores:
      clean: {by: eval, data: data/clean}                     # the test split of a folder of the same tokenizer
      works: {by: probe, texts: data/tasks/passages.tsv}      # logistic regression on frozen states
      recall: {by: memorised, windows: 200}                   # training windows completed verbatim

A cell's figures lie in its folder, with what was asked and the step they are of, so none is computed twice. They are computed
on one process after the cells are trained, wherever that was.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ds_pretrain.core.files import whole
from ds_pretrain.core.registry import Registry
from ds_pretrain.runs import data_of, load_model, load_tokenizer

Figures = dict[str, float]


class Run:
    """A trained run, opened as far as a score needs it."""

    def __init__(self, output: str | Path) -> None:
        self.output = str(output)

    @cached_property
    def model(self) -> Any:
        return load_model(self.output)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.output)

    @cached_property
    def data(self) -> Any:
        return data_of(self.output)


SCORES: Registry[Callable[..., Figures]] = Registry("score")
"""By name, functions of a run and their own fields."""


@SCORES.register("eval")
def evaluated(run: Run, data: str, split: str = "test", tokens: int | None = None) -> Figures:
    """Of another folder's text: the likelihood where the model has one, else the loss of its objective."""
    from ds_pretrain.data.dataset import PretrainingDataset
    from ds_pretrain.evaluation.perplexity import evaluate

    objective = run.model.objective.likelihood or run.model.objective
    dataset = PretrainingDataset(data, run.tokenizer, run.data.seq_len, objective.evaluated, split)
    return evaluate(run.model.under(objective), dataset, tokens).as_metrics(objective.measure)


@SCORES.register("probe")
def probed(run: Run, texts: str) -> Figures:
    """A linear probe of labelled texts: accuracy on those held out, beside the untrained network and the largest class."""
    from ds_pretrain.evaluation import embeddings
    from ds_pretrain.use import embedder

    rows = [(text, label) for text, label in embeddings.read_table(texts, 2)]
    trained, untrained = (embedder(model, run.tokenizer) for model in (run.model, run.model.untrained()))
    found = embeddings.probe(trained, untrained, rows)
    return {"accuracy": found.accuracy, "untrained": found.untrained, "majority": found.majority, "texts": found.test}


@SCORES.register("memorised")
def memorised(run: Run, prompt: int = 32, tokens: int = 32, windows: int = 200) -> Figures:
    """The share of training windows that come out verbatim, by how often they occur; 0: windows of the test split."""
    from ds_pretrain.evaluation.memorisation import memorised

    train, test = (run.data.split(name).store for name in ("train", "test"))
    found = memorised(run.model, train, test, prompt, tokens, windows)
    return {each.occurrences: each.share for each in found}


class Asked(NamedTuple):
    """A score that a sweep asks for: its name there, the function and its fields."""

    name: str
    by: str
    fields: Mapping[str, Any]

    @staticmethod
    def of(name: str, values: Mapping[str, Any]) -> Asked:
        """ValueError for an unknown score or fields that it does not have."""
        fields = dict(values)
        by = fields.pop("by", "")
        try:
            inspect.signature(SCORES[by]).bind(None, **fields)
        except TypeError as error:
            raise ValueError(f"scores.{name}: {error} (of {by})") from None
        return Asked(name, by, fields)


def score(folder: Path, step: int, asked: list[Asked]) -> dict[str, Figures]:
    """The figures of a cell by the names of its scores; what was computed at this step before is read."""
    path, run = folder / "scores.json", Run(folder)
    known = read(folder)
    for each in asked:
        mark = {"by": each.by, **each.fields, "step": step}
        if known.get(each.name, {}).get("asked") != mark:
            known[each.name] = {"asked": mark, "figures": SCORES[each.by](run, **each.fields)}
            with whole(path) as file:
                file.write(json.dumps(known, indent=1).encode())
    return {each.name: known[each.name]["figures"] for each in asked}


def read(folder: Path) -> dict[str, Any]:
    """What has been computed of a cell, by name: what was asked, and the figures."""
    path = folder / "scores.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
