"""Infilling: a line is taken out of a document, and a fill-in-the-middle model writes it again.

Single-line infilling as in Bavarian et al. 2022: the prompt is <PRE> before <SUF> after <MID>, decoding is greedy and ends
with the document or the line. Counted are lines written exactly, and, of documents that are Python, those that still parse.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ds_pretrain.core import rng
from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.evaluation.generate import Sampling, ends_of, generate, no_text
from ds_pretrain.objectives import Objective
from ds_pretrain.objectives.fim import NAMES, FillInTheMiddle
from ds_pretrain.objectives.mixture import Composite
from ds_pretrain.training.inference import FrozenModel


def problems(objective: Objective) -> list[str]:
    """Why a model that was trained for this objective cannot fill in."""
    parts = [part.objective for part in objective.components] if isinstance(objective, Composite) else [objective]
    if any(isinstance(part, FillInTheMiddle) for part in parts):
        return []
    return [f"a run of {objective.name} has never seen a document with its middle moved: infill needs a run of fim"]


LEAST = 8
"""Tokens before a gap, and after it, that are worth asking a model by."""


@dataclass(frozen=True)
class Gap:
    """A document with one line missing."""

    before: str
    middle: str
    after: str

    @property
    def python(self) -> bool:
        return parses(self.before + self.middle + self.after)

    @property
    def idle(self) -> bool:
        """Whether it is Python without the line too."""
        return parses(self.before + self.after)


@dataclass(frozen=True)
class Infilled:
    """One attempt."""

    gap: Gap
    written: str

    @property
    def exact(self) -> bool:
        return self.written.rstrip("\n") == self.gap.middle.rstrip("\n")

    @property
    def parses(self) -> bool:
        return parses(self.gap.before + self.written + self.gap.after)


def parses(text: str) -> bool:
    """Whether the text is a Python module."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def gaps(dataset: PretrainingDataset, count: int, seed: int = 0) -> Iterator[Gap]:
    """One line of each of up to `count` documents, drawn by document: not blank, with text on both sides."""
    draw = rng.generator("infill", seed)
    for number in draw.permutation(len(dataset.store.lengths)):
        if count == 0:
            return
        tokens = dataset.store.slice(int(number), 0, int(dataset.store.lengths[number]) - 1)
        lines = re.findall(r"[^\n]*\n|[^\n]+", dataset.tokenizer.decode(tokens.tolist()))
        full = [i for i, line in enumerate(lines) if line.strip() and 0 < i < len(lines) - 1]
        if full:
            at = int(draw.choice(full))
            count -= 1
            yield Gap("".join(lines[:at]), lines[at], "".join(lines[at + 1 :]))


def infill(model: FrozenModel, tokenizer: TextTokenizer, gap: Gap, tokens: int = 64, one_line: bool = True) -> Infilled:
    """What is missing as the model writes it, one line of it or all. Text beyond the model's window is cut off on the far
    sides. ValueError where next to nothing of it would be left."""
    vocab = tokenizer.vocabulary
    pre, suf, mid = (vocab.names[name] for name in NAMES)
    positions = model.build.model.positions or 1 << 30
    room = (positions - tokens - 5) // 2
    before, after = (tokenizer.encode(text).tolist() for text in (gap.before, gap.after))
    if room < LEAST and max(len(before), len(after)) > room:
        raise ValueError(
            f"{tokens} tokens leave no room for the text around them in {positions} positions: ask for at most "
            f"{max(0, positions - 5 - 2 * LEAST)}"
        )
    prompt = [vocab.begin, pre, *before[-room:], suf, *after[:room], mid]
    ids: list[int] = []
    for token in generate(model, prompt, ends_of(model, vocab), no_text(model, vocab), Sampling(tokens, temperature=0)):
        ids.append(token)
        if one_line and "\n" in tokenizer.decode([token]):
            break
    if not one_line:
        return Infilled(gap, tokenizer.decode(ids))
    line, end, _ = tokenizer.decode(ids).partition("\n")
    return Infilled(gap, line + end)
