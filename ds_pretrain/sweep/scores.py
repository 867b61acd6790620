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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_pretrain.core.files import whole
from ds_pretrain.core.registry import Registry, unknown
from ds_pretrain.data.store import SPLITS, file_digest
from ds_pretrain.objectives import Objective
from ds_pretrain.runs import load_model, load_tokenizer, run_of, texts_of

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


SCORES: Registry[Callable[..., Figures]] = Registry("score")
"""By name, functions of a run and their own fields."""


@SCORES.register("eval")
def evaluated(run: Run, data: str, split: str = "test", tokens: int | None = None) -> Figures:
    """Of another folder's text: the likelihood where the model has one, else the loss of its objective."""
    from ds_pretrain.data.dataset import PretrainingDataset
    from ds_pretrain.evaluation.perplexity import evaluate

    objective = run.model.objective.likelihood or run.model.objective
    length = run_of(run.output).batch.seq_len
    dataset = PretrainingDataset(data, run.tokenizer, length, objective.evaluated, split)
    return evaluate(run.model.under(objective), dataset, tokens).as_metrics(objective.measure)


@SCORES.register("probe")
def probed(run: Run, texts: str) -> Figures:
    """A linear probe of labelled texts: accuracy on those held out, beside the untrained network and the largest class."""
    from ds_pretrain.evaluation.embeddings import probe_of

    found = probe_of(run.model, run.tokenizer, texts)
    return {"accuracy": found.accuracy, "untrained": found.untrained, "majority": found.majority, "texts": found.test}


@SCORES.register("memorised")
def memorised(run: Run, prompt: int = 32, tokens: int = 32, windows: int = 200) -> Figures:
    """The share of training windows that come out verbatim, by how often they occur; 0: windows of the test split; how many
    were tried, and how many different ones there are."""
    from ds_pretrain.evaluation.memorisation import memorised

    found = memorised(run.model, *texts_of(run.output), prompt, tokens, windows)
    return {
        name: value
        for each in found
        for name, value in (
            (each.occurrences, each.share),
            (f"{each.occurrences} tried", each.tried),
            (f"{each.occurrences} there", each.there),
        )
    }


@dataclass(frozen=True)
class Asked:
    """A score that a sweep asks for: its name there, the function and its fields."""

    name: str
    by: str
    fields: Mapping[str, Any]

    @staticmethod
    def of(name: str, values: Mapping[str, Any]) -> Asked:
        """ValueError for an unknown score or fields that it does not have."""
        fields = dict(values)
        by = fields.pop("by", "")
        signature = inspect.signature(SCORES[by], eval_str=True)
        try:
            signature.bind(None, **fields)
        except TypeError as error:
            raise ValueError(f"scores.{name}: {error} (of {by})") from None
        for key, value in fields.items():
            number = signature.parameters[key].annotation is not str
            if number and value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"scores.{name}: {key} is {value!r}, it must be a whole number above 0")
        return Asked(name, by, fields)

    def problems(self, objective: Objective) -> list[str]:
        """What keeps a run of this objective from being scored, known before it is trained."""
        ours = {path: f": ds-pretrain tasks DATA -o {path.parent}" * (path.name == "passages.tsv") for path in self.paths}
        found = [f"scores.{self.name}: there is no {path}{fix}" for path, fix in ours.items() if not path.exists()]
        if self.fields.get("split", "test") not in SPLITS:
            found.append(f"scores.{self.name}: {unknown('split', str(self.fields['split']), SPLITS)}")
        if self.by == "memorised" and objective.kind != "causal":
            found.append(f"scores.{self.name}: {objective.name} continues no text, so what it has memorised cannot be asked")
        return found

    @property
    def paths(self) -> list[Path]:
        """The file or folder that it reads."""
        return [Path(str(self.fields[name])) for name in ("data", "texts") if name in self.fields]

    def mark(self, step: int) -> dict[str, Any]:
        """What a figure is known by: all that was asked, the step, and what was read, by its content."""
        return {"by": self.by, **self.fields, "step": step, "contents": self.contents}

    @cached_property
    def contents(self) -> dict[str, str]:
        """A digest of what it reads, taken once for all cells."""
        return {str(path): _content(path) for path in self.paths}


def _content(path: Path) -> str:
    """A digest of a file, or of a prepared folder."""
    file = path / "manifest.json" if path.is_dir() else path
    return file_digest(file) if file.is_file() else ""


def score(folder: Path, step: int, asked: list[Asked]) -> None:
    """Compute the scores of a cell that are not known yet at this step."""
    run, known = Run(folder), read(folder)
    for each in asked:
        mark = each.mark(step)
        if known.get(each.name, {}).get("asked") != mark:
            known[each.name] = {"asked": mark, "figures": SCORES[each.by](run, **each.fields)}
            with whole(folder / "scores.json") as file:
                file.write(json.dumps(known, indent=1).encode())


def figures(folder: Path, step: int, asked: list[Asked]) -> Figures:
    """What is known of a cell at this step, by NAME/figure: of what is asked, as it is asked."""
    known = read(folder)
    sound = [each.name for each in asked if known.get(each.name, {}).get("asked") == each.mark(step)]
    return {f"{name}/{figure}": value for name in sound for figure, value in known[name]["figures"].items()}


def read(folder: Path) -> dict[str, Any]:
    """What has been computed of a cell, by name: what was asked, and the figures."""
    path = folder / "scores.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
