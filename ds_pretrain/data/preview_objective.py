"""What an objective does to documents: each before and after, and the rates that a few hundred examples really have.

A `View` is what both forms of the preview are made from, this file's for a terminal and `preview_plot`'s on paper. The
examples come from the same `Samples` that training reads, so they are what a run would see. Of the first ones those are
shown that differ most: one of each component of a mixture, one of each answer of a classifier. The price of the built-in
text, which is short: its rates are those of many masks over few documents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from ds_pretrain.core import rng
from ds_pretrain.core.attention import Span
from ds_pretrain.core.batch import Batch, Document, Example
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.data.audit import Audit
from ds_pretrain.data.collate import collate
from ds_pretrain.data.dataset import Cursor, Row, Samples, refuse
from ds_pretrain.data.preview import (
    LINES,
    Reader,
    Stretch,
    Token,
    ahead,
    beside,
    count,
    legend,
    picture,
    spans_of,
    table_of,
    told,
)
from ds_pretrain.data.tokenizer import TextTokenizer
from ds_pretrain.objectives import Objective
from ds_pretrain.objectives.mixture import Component

SAMPLED = 400
"""Examples that the rates are taken from, at least."""
CANDIDATES = 64
"""Examples that those to show are chosen among."""
PICTURE = 24
"""Columns of a picture of attention."""
MOST = 8
"""Lines of a document before its last one."""
TEXTS = (
    "Call me Ishmael. Some years ago, having little or no money in my purse, and nothing particular to interest me on shore, "
    "I thought I would sail about a little and see the watery part of the world.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do. Once or twice "
    "she had peeped into the book. It had no pictures in it.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    "My dear Mr. Bennet, have you heard that Netherfield Park is let at last?",
    "No one would have believed that this world was being watched keenly and closely. Across the gulf of space, minds vast "
    "and cool regarded this earth with envious eyes. Slowly they drew their plans.",
)
"""Openings of Melville (1851), Carroll (1865), Austen (1813) and, shortened, Wells (1898), all in the public domain."""


class Texts:
    """A few documents in memory, with the interface of a store."""

    def __init__(self, texts: Sequence[str], tokenizer: TextTokenizer) -> None:
        eod = tokenizer.vocabulary.eod
        self._documents = [np.append(ids, eod).astype(np.int32) for ids in tokenizer.encode_batch(texts)]
        self.lengths = np.array([len(document) for document in self._documents], dtype=np.int64)
        self.text = np.array([(len(text.encode()), len(text.split())) for text in texts], dtype=np.int64)
        self.digest = f"{rng.key(tokenizer.digest, *texts):032x}"

    def slice(self, i: int, start: int, stop: int) -> np.ndarray:
        return self._documents[i][start:stop]


@cache
def small_tokenizer() -> TextTokenizer:
    """A tokenizer where there is none: trained in a second on the help texts that come with Python."""
    from pydoc_data.topics import topics

    return TextTokenizer.train((text for _, text in sorted(topics.items())), vocab_size=4096)


def tokenizer_at(folder: str | Path) -> TextTokenizer:
    """The tokenizer of prepared data, or the small one where nothing is prepared."""
    return TextTokenizer.load(folder) if Path(folder).exists() else small_tokenizer()


def samples_of(texts: Sequence[str], tokenizer: TextTokenizer, seq_len: int, objective: Objective, seed: int) -> Samples:
    """The stream that training would read from these documents. ValueError if they are too few or too short."""
    vocab, store = tokenizer.vocabulary, Texts(texts, tokenizer)
    refuse(objective.check(vocab, seq_len))
    tokens = store.lengths - (not objective.eod)
    long_enough = int((tokens >= objective.shortest).sum())
    if long_enough < objective.documents:
        given = ", ".join(str(int(n)) for n in tokens)
        raise ValueError(
            f"the text is too short for {objective.name}: it takes {count(objective.documents, 'document')} of "
            f"{count(objective.shortest, 'token')} at least, and {count(len(texts), 'document')} of {given} "
            f"{'token was' if given == '1' else 'tokens were'} given; use longer texts"
            + (", or repeat --text for more of them" if objective.documents > 1 else "")
        )
    return Samples(store, vocab, seq_len, objective, "preview", seed)


@dataclass(frozen=True)
class Part:
    """A segment of an example: its lines by name, the positions that see ahead, who sees whom and what else is known."""

    lines: Mapping[str, Sequence[Token]]
    ahead: Sequence[bool] = ()
    sight: str = ""
    facts: str = ""


@dataclass(frozen=True)
class Specimen:
    """One example: the documents it was made from, then its parts, which are the segments of the one row of its batch."""

    component: str
    documents: tuple[tuple[Token, ...], ...]
    parts: tuple[Part, ...]
    batch: Batch


@dataclass(frozen=True)
class View:
    """What is to be seen of an objective. rates: numbers with their meaning."""

    name: str
    headline: str
    settings: str
    specimens: tuple[Specimen, ...]
    rates: tuple[tuple[str, str], ...]
    hides: bool
    notes: tuple[str, ...]


def view(data: Samples, token_text: Callable[[int], str], rows: int | None = None) -> View:
    """Look at the first examples of a stream. rows: examples to show; None: two, or one of each component."""
    objective, vocab = data.objective, data.vocab
    taken = _taken(data, SAMPLED)
    batch = data.collate(taken)
    reader = Reader.of(batch, vocab, token_text, objective.heads)
    audit = Audit(objective, vocab)
    audit.add([batch], data.consumed(taken))
    numbers = told(audit.shares, objective.expected)
    numbers += _class_rates(objective, batch)
    numbers += [] if data.drawn else _marker_rates(batch, vocab, token_text)
    numbers.append((f"{sum(map(len, taken)):,}", f"examples of at most {data.seq_len:,} positions were looked at"))
    made = list(islice(_made(data, taken), CANDIDATES))
    shown = _differing(made, reader, rows)
    return View(
        name=objective.name,
        headline=(sys.modules[type(objective).__module__].__doc__ or "").strip().partition("\n")[0],
        settings=" ".join(_settings(objective)),
        specimens=tuple(_specimen(each, objective, reader) for each in shown),
        rates=tuple(numbers),
        hides=bool(reader.hiding),
        notes=tuple(_notes(objective)),
    )


def render(seen: View, short: bool = False) -> RenderableType:
    """A view in a terminal. short: fewer lines of a document, no legend and no attention."""
    most = LINES if short else MOST
    parts: list[RenderableType] = [Rule(seen.name, style="bold"), Text(seen.headline)]
    parts += [Text(line, "dim") for line in (seen.settings, *seen.notes) if line]
    parts += [] if short else [legend(seen.hides)]
    for number, specimen in enumerate(seen.specimens, start=1):
        of = f", made by {specimen.component}" if specimen.component else ""
        parts.append(Text(f"\nexample {number} of {seen.name}{of}", "bold"))
        for document in specimen.documents:
            parts += [Text(f"before: {count(len(document), 'token')}", "bold cyan")]
            parts += [Stretch.of({"text": document}, most=most)]
        for part in specimen.parts:
            parts += [Text(f"after: {part.facts}", "bold magenta"), Stretch.of(part.lines, part.ahead, most=most)]
    distinct = {tuple(part.sight for part in specimen.parts): specimen.batch for specimen in reversed(seen.specimens)}
    pictures = [Group(*picture(batch, 0, PICTURE)) for batch in reversed(distinct.values())]
    table = table_of(seen.rates)
    if short:
        return Group(*parts, Text(), table)
    return Group(*parts, Text(), beside(*pictures, table) if len(pictures) < 3 else Group(beside(*pictures), Text(), table))


@dataclass(frozen=True, eq=False)
class _Made:
    component: str
    documents: tuple[Document, ...]
    example: Example

    @property
    def parts(self) -> tuple[Example, ...]:
        return (self.example, *self.example.then)


def _taken(data: Samples, examples: int) -> list[Row]:
    """The first rows that hold so many examples."""
    rows: list[Row] = []
    cursor, found = Cursor(), 0
    while found < examples:
        taken, cursor = data.rows(cursor, 1)
        rows += taken
        found += sum(map(len, taken))
    return rows


def _made(data: Samples, rows: Sequence[Row]) -> Iterator[_Made]:
    """The examples of these rows in turn, with the documents that each was made from."""
    for sample in (sample for row in rows for sample in row):
        ((variant, docs),) = data.sources([sample])
        name = variant.name if isinstance(variant, Component) else ""
        used = variant.objective.documents if isinstance(variant, Component) else len(docs)
        yield _Made(name, docs[:used], data.example(sample))


def _differing(made: Sequence[_Made], reader: Reader, rows: int | None) -> list[_Made]:
    """One example of each sort, the richest sorts first, then further ones. A sort: component, markers, answers."""
    longest = max(len(m.example.inputs) for m in made)
    scored = {id(m): _scored(m) for m in made}
    usual = float(np.median(list(scored.values())))
    sorts: dict[tuple, list[_Made]] = {}
    for m in sorted(made, key=lambda m: (2 * len(m.example.inputs) < longest, -_fates(m, reader), abs(scored[id(m)] - usual))):
        sorts.setdefault(_sort(m, reader), []).append(m)
    ranked = sorted(sorts.values(), key=lambda group: -len(_sort(group[0], reader)[1]))
    components = {m.component for m in made}
    firsts = {group[0].component: group[0] for group in reversed(ranked)}  # the richest of each component
    order = [group[0] for group in ranked if group[0] is firsts[group[0].component]]
    order += [group[0] for group in ranked if group[0] not in order]
    order += [m for group in ranked for m in group[1:]]
    return order[: max(2, len(components)) if rows is None else max(1, rows)]


def _scored(made: _Made) -> float:
    """The share of positions that bear loss."""
    scored = sum(int((t.weights != 0).sum()) for part in made.parts for t in part.targets.values())
    return scored / sum(len(part.inputs) for part in made.parts)


def _sort(made: _Made, reader: Reader) -> tuple[str, frozenset[int], frozenset[tuple[str, int]]]:
    vocab = reader.vocab
    ids = {int(i) for part in made.parts for i in np.unique(part.inputs) if vocab.is_special[i]}
    answers = {
        (name, int(label))
        for part in made.parts
        for name, t in part.targets.items()
        if name in reader.classes
        for label in t.labels[t.weights != 0]
    }
    plain = {vocab.mask, *vocab.sentinels[1:]}
    return made.component, frozenset(ids - plain), frozenset(answers)


def _fates(made: _Made, reader: Reader) -> int:
    """How many of masked, random and kept it shows."""
    found = set()
    for name, t in made.example.targets.items():
        if name in reader.hiding:
            inputs, labels = made.example.inputs[t.weights != 0], t.labels[t.weights != 0]
            found |= set(np.where(inputs == reader.vocab.mask, 0, np.where(inputs == labels, 1, 2)).tolist())
    return len(found)


def _specimen(made: _Made, objective: Objective, reader: Reader) -> Specimen:
    length = sum(len(part.inputs) for part in made.parts)
    batch = collate([[made.example]], objective, reader.vocab, length)
    documents = tuple(tuple(reader.token(int(token)) for token in doc.tokens) for doc in made.documents)
    spans = spans_of(batch, 0)
    return Specimen(made.component, documents, tuple(_part(batch, span, spans, reader) for span in spans), batch)


def _part(batch: Batch, span: Span, spans: Sequence[Span], reader: Reader) -> Part:
    lines = reader.lines(batch, span)
    unused = [name for name, line in lines.items() if name != "input" and not any(token.text for token in line)]
    sight = _sight(batch, span)
    facts = [f"{span.stop - span.start} positions", sight]
    facts += [f"part {spans.index(span) + 1} of {len(spans)}"] if len(spans) > 1 else []
    for name, target in batch.targets.items():
        scored = int((target.weights[span.row, span.start : span.stop] != 0).sum())
        facts += [f"{count(scored, 'target')} of {name}"] if scored else []
    used = {name: line for name, line in lines.items() if name not in unused}
    return Part(used, ahead(batch, span), sight, ", ".join(facts))


def _sight(batch: Batch, span: Span) -> str:
    """Who sees whom, in words."""
    horizon = (batch.attention.horizon[span.row, span.start : span.stop] - span.start).tolist()
    last = len(horizon) - 1
    if all(h == last for h in horizon):
        return "each sees all"
    if all(h == i for i, h in enumerate(horizon)):
        return "each sees itself and what came before"
    prefix = sum(h > i for i, h in enumerate(horizon))
    if horizon == [max(i, prefix) for i in range(len(horizon))]:
        return f"0-{prefix} see one another, later ones what came before"
    return f"{prefix} see ahead"


def _class_rates(objective: Objective, batch: Batch) -> list[tuple[str, str]]:
    """The balance of heads with two classes; with a generator the answers are not known before it has spoken."""
    found = []
    for head in objective.heads:
        if head.classes == 2 and not objective.generator:
            labels = batch.targets[head.name].labels[batch.targets[head.name].weights != 0]
            found.append((f"{float((labels == 1).float().mean()):.1%}", f"{head.name}: of the answers are 1"))
    return found


def _marker_rates(batch: Batch, vocab: Vocabulary, token_text: Callable[[int], str]) -> list[tuple[str, str]]:
    """The share of the segments that hold each marker (a mode, a fill-in-the-middle token), sentinels left out."""
    usual = {vocab.pad, vocab.eod, vocab.unk, vocab.cls, vocab.sep, vocab.mask, *vocab.sentinels}
    segments = [batch.inputs[span.row, span.start : span.stop].unique().tolist() for span in batch.attention.spans()]
    markers = sorted({token for ids in segments for token in ids if vocab.is_special[token]} - usual)
    shares = ((token, sum(token in ids for ids in segments) / len(segments)) for token in markers)
    return [(f"{share:.1%}", f"of the examples have {token_text(token)}") for token, share in shares]


def _settings(objective: Objective) -> Iterator[str]:
    for each in fields(objective):
        value = getattr(objective, each.name)
        if isinstance(value, str | int | float | None) or (value and isinstance(value, Mapping)):
            yield f"{each.name}={value}"


def _notes(objective: Objective) -> Iterator[str]:
    if objective.generator:
        head, width = objective.generator
        others = ", ".join(h.name for h in objective.heads if h.name != head)
        yield (
            f"a generator of {width:g} of the width answers {head} and fills its positions before the model reads them; the "
            f"labels of {others} follow from what it wrote, here they are 0"
        )
    if objective.pooled:
        yield "the loss of an example depends on the other examples of its step"
