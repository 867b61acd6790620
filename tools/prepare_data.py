#!/usr/bin/env python3
"""From raw text to stores that can be trained on: one chain of steps, or each alone.

In this order:
    read -> screen -> perplexity -> exact -> near ->
    passages -> semantic -> decontaminate -> store

`run` does the chain; every other command is one step, from a folder of documents to the next. A step that was stopped goes on
where it was, one that is done is not done again, and the bytes are the same however many work on it:

    python tools/prepare_data.py run corpus/ -o data/clean \\
        --rules gopher,gopher_repetition --passages 50 --jobs 8
    mpirun -n 9 python -m mpi4py tools/prepare_data.py run ...
    ds-pretrain train quickstart data.path=data/clean/data

Of N ranks of mpirun N - 1 work and one leads; where it finds too few slots, say how many each host has (--host a:8,b:8) or add
--oversubscribe. What is kept and what is dropped, with reasons, is parquet (STEP/kept, STEP/dropped); what happened is in
report.md.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.curation.contamination import WORDS as TEST_WORDS
from ds_pretrain.curation.contamination import decontaminate as clean_of
from ds_pretrain.curation.documents import Folder
from ds_pretrain.curation.duplicates import exact as drop_exact
from ds_pretrain.curation.duplicates import near as drop_near
from ds_pretrain.curation.language import Languages
from ds_pretrain.curation.minhash import MinHash
from ds_pretrain.curation.passages import check as check_passages
from ds_pretrain.curation.passages import passages as cut_passages
from ds_pretrain.curation.prepare import check as check_store
from ds_pretrain.curation.prepare import prepare
from ds_pretrain.curation.quality import RULES, Rules
from ds_pretrain.curation.reading import read as read_sources
from ds_pretrain.curation.report import COLUMNS, rows, write_page, write_report
from ds_pretrain.curation.sampling import check as check_sample
from ds_pretrain.curation.sampling import sample as draw_sample
from ds_pretrain.curation.scoring import Scorer
from ds_pretrain.curation.scoring import check as check_bounds
from ds_pretrain.curation.scoring import perplexity as drop_strange
from ds_pretrain.curation.screening import Label, screening
from ds_pretrain.curation.semantic import THRESHOLD as COSINE
from ds_pretrain.curation.semantic import check as check_semantic
from ds_pretrain.curation.semantic import semantic as drop_semantic
from ds_pretrain.curation.shingles import Grams
from ds_pretrain.curation.workers import Workers, workers
from ds_pretrain.data import corpus
from ds_pretrain.data.sources import is_path
from ds_pretrain.data.tokenizer import TextTokenizer

FLOWING = re.sub(r"(?<=\S)\n(?=\S)", " ", __doc__ or "")
"""The page of help, whose paragraphs are as wide as the terminal."""
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=FLOWING)
err = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else 120)
ORDER = ("read", "screen", "perplexity", "exact", "near", "passages", "semantic", "decontaminate")
"""Of a chain. Copies go before passages are cut: what is left of them would resemble nothing."""
ROWS = 8
"""Documents that are scored at once."""
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
"""Where launchers tell a process its rank."""

QUALITY, MODEL, COPIES, PASSAGES, MEANING, BENCHMARK, STORES = (
    "screen: rules of quality", "perplexity: by a model of your own", "near: copies that differ a little",
    "passages: what repeats inside of documents", "semantic: copies in meaning", "decontaminate: what a benchmark has too",
    "store: tokenizer and splits",
)  # fmt: skip
"""Panels of help, in the order of the chain."""

Sources = Annotated[
    list[str], typer.Argument(help="Files or folders (txt, jsonl, parquet; .gz, .zst), patterns, datasets:NAME, embedded.")
]
Before = Annotated[Path, typer.Argument(metavar="DOCUMENTS", help="The folder of a finished step.")]
Out = Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")]
Jobs = Annotated[int, typer.Option(help="Processes, a core for each; mpirun's ranks count instead.")]
TextField = Annotated[str, typer.Option(help="Field of the text in jsonl and parquet.")]
Chosen = Annotated[
    str,
    typer.Option(
        "--rules",
        help=f"Rule sets, comma-separated: {', '.join(sorted(set(RULES) - {'language'}))}.",
        rich_help_panel=QUALITY,
    ),
]
Language = Annotated[
    str, typer.Option(help="Keep these languages only, such as en,de (needs py3langid).", rich_help_panel=QUALITY)
]
Labels = Annotated[
    str,
    typer.Option("--labels", help="Write down of each document: language, tier (comma-separated).", rich_help_panel=QUALITY),
]
Threshold = Annotated[
    float,
    typer.Option("--near", help="Jaccard similarity from which documents are near copies; 0: none is.", rich_help_panel=COPIES),
]
Unit = Annotated[
    str, typer.Option(help="What n-grams are made of: word, or char for scripts without spaces.", rich_help_panel=COPIES)
]
Ngram = Annotated[int, typer.Option(help="Units of an n-gram.", rich_help_panel=COPIES)]
Passage = Annotated[
    int,
    typer.Option("--passages", help="Cut what repeats over so many words (50 is usual); 0: nothing.", rich_help_panel=PASSAGES),
]
Judge = Annotated[
    Path | None,
    typer.Option("--perplexity", help="Score documents by this finished causal run (its output).", rich_help_panel=MODEL),
]
Most = Annotated[
    float | None,
    typer.Option(help="Bits per byte above which a document is too strange; none: no bound.", rich_help_panel=MODEL),
]
Least = Annotated[
    float | None,
    typer.Option(help="Bits per byte below which a document is too easy; none: no bound.", rich_help_panel=MODEL),
]
Embedder = Annotated[
    Path | None,
    typer.Option(
        "--semantic",
        help="Drop copies in meaning by this sentence embedding model (a local folder).",
        rich_help_panel=MEANING,
    ),
]
Cosine = Annotated[
    float, typer.Option(help="Cosine similarity from which documents are copies in meaning.", rich_help_panel=MEANING)
]
Groups = Annotated[
    int,
    typer.Option(
        help="Groups that copies in meaning are looked for in; 0: the root of the documents.", rich_help_panel=MEANING
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(help="Texts of a benchmark to be tested on; may be given again.", rich_help_panel=BENCHMARK),
]
Tokenizer = Annotated[str | None, typer.Option(help="Use this tokenizer instead of training one.", rich_help_panel=STORES)]
Kind = Annotated[
    str, typer.Option(help="Kind of tokenizer to train: bpe, wordpiece, unigram or sp_bpe.", rich_help_panel=STORES)
]
Vocab = Annotated[int, typer.Option(help="Vocabulary to train.", rich_help_panel=STORES)]
Split = Annotated[str, typer.Option(help="Shares of train, validation and test.", rich_help_panel=STORES)]

Shares = tuple[float, float, float]


def together(jobs: int, do: Callable[[Workers], None]) -> None:
    """Run something with workers, on the one rank that leads them."""
    with workers(jobs) as team:
        if team:
            do(team)


def chosen(rules: str, language: str) -> list[Rules]:
    named = [RULES[name]() for name in rules.split(",") if name]
    return [*named, *([Languages(keep=tuple(code.strip() for code in language.split(",")))] if language else [])]


def labels(text: str) -> list[Label]:
    names = [name for name in text.split(",") if name]
    if wrong := [name for name in names if name not in ("language", "tier")]:
        raise ValueError(f"--labels are language and tier, got {', '.join(wrong)}")
    return names  # type: ignore[return-value]


def parsed(split: str) -> Shares:
    try:
        train, validation, test = (float(share) for share in split.split(","))
    except ValueError:
        raise ValueError(f"--split is three shares such as 0.98,0.01,0.01, got {split!r}") from None
    return train, validation, test


def how(threshold: float, unit: str, n: int) -> MinHash:
    return MinHash(threshold=threshold, grams=Grams(unit=unit, n=n))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Judged:
    """Makes scorers by a run. checkpoint: its name and digest; the newest when this was made. tokenizer: its digest."""

    output: Path = field(repr=False)
    checkpoint: str
    tokenizer: str
    seq_len: int

    @classmethod
    def of(cls, output: Path) -> Judged:
        """ValueError where there is no run, or one whose loss is no likelihood."""
        from ds_pretrain.training.checkpoint import newest

        config, _ = likelihood(output)
        path = newest(output / "checkpoints")
        if path is None:
            raise ValueError(f"no checkpoint in {output / 'checkpoints'}: train the run first")
        return cls(output, named(path), tokenizer_of(config).digest, config.batch.seq_len)

    def __call__(self) -> Scorer:
        from ds_pretrain.parallel.launch import Place
        from ds_pretrain.parallel.mesh import start
        from ds_pretrain.training.inference import FrozenModel

        start(Place(0, 1, 0))  # a world of its own, under mpirun too
        config, objective = likelihood(self.output)
        path = self.output / "checkpoints" / self.checkpoint.partition(" ")[0]
        tokenizer = tokenizer_of(config)
        now = (named(path) if path.exists() else "gone", tokenizer.digest, config.batch.seq_len)
        if now != (self.checkpoint, self.tokenizer, self.seq_len):
            raise ValueError(
                f"{self.output} changed while it was used to score ({self} -> {now}): wait until its training has ended"
            )
        model = FrozenModel(self.output, config.make_objective(), checkpoint=path.name).under(objective)
        if (ids := model.build.model.vocab_size) != len(tokenizer):
            raise ValueError(
                f"{self.output} was trained with {ids} ids, the tokenizer of its data has {len(tokenizer)} now: train it again"
            )
        return lambda texts: bits_per_byte(model, tokenizer, config.batch.seq_len, texts)


def named(checkpoint: Path) -> str:
    from ds_pretrain.data.store import file_digest

    return f"{checkpoint.name} {file_digest(checkpoint / 'manifest.json')}"


def tokenizer_of(config: Any) -> TextTokenizer:
    folder = Path(config.data.tokenizer or Path(config.data.path) / "tokenizer")
    if not folder.exists():
        raise ValueError(f"the run's tokenizer {folder} is not there: start this where the run was started")
    return TextTokenizer.load(folder)


def likelihood(output: Path) -> tuple[Any, Any]:
    """A finished run's settings, and the objective that gives its model a likelihood of texts."""
    import yaml

    from ds_pretrain.config import parse_run

    path = output / "run.yaml"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the output folder of a run that was trained")
    config = parse_run(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    objective = config.make_objective()
    if objective.likelihood is None:
        raise ValueError(f"{output} was trained for {objective.name}, whose loss is no likelihood of texts: give a causal run")
    return config, objective.likelihood.evaluated


def bits_per_byte(model: Any, tokenizer: TextTokenizer, seq_len: int, texts: Sequence[str]) -> list[float]:
    """Of each text, its end included; of one that is longer than a row, those of the row that it begins with."""
    import numpy as np
    import torch

    from ds_pretrain.core.batch import Document
    from ds_pretrain.data.collate import collate
    from ds_pretrain.training.engine import to_device

    def summed(answers: Any, batch: Any) -> torch.Tensor:
        return sum(
            (answers.nll(name, at.labels, at.weights) * at.weights).double().sum(1) for name, at in batch.targets.items()
        )

    vocab, objective, found = tokenizer.vocabulary, model.objective, np.zeros(len(texts))
    tokens = [np.append(ids, np.int32(vocab.eod)) for ids in tokenizer.encode_batch(texts)]
    order = sorted(range(len(texts)), key=lambda i: -len(tokens[i]))
    for some in (order[i : i + ROWS] for i in range(0, len(order), ROWS)):
        width = min(seq_len, len(tokens[some[0]]))
        draw = np.random.default_rng(0)  # a likelihood draws nothing
        rows = [[objective.example((Document(tokens[i][:width]),), vocab, width, draw)] for i in some]
        with torch.no_grad():
            nats = model.network(to_device(collate(rows, objective, vocab, width), model.mesh.device), summed)
        found[some] = nats.cpu().numpy() / [read_bytes(tokenizer, texts[i], tokens[i], width) for i in some]
    return (found / np.log(2)).tolist()


def read_bytes(tokenizer: TextTokenizer, text: str, tokens: Any, width: int) -> float:
    """Bytes of the text that its first tokens stand for: the share that they spell of what all spell."""
    size = len(text.encode())
    if len(tokens) <= width:
        return size
    part, whole = (len(tokenizer.decode(some).encode()) for some in (tokens[:width], tokens[:-1]))
    return size * part / whole


def judged(output: Path | None, most: float | None, least: float | None) -> Judged | None:
    if output is None and (most, least) != (None, None):
        raise ValueError("--most and --least are bounds of --perplexity RUN: give a run to score by")
    check_bounds(most, least)
    return Judged.of(output) if output else None


def show(steps: list[tuple[str, Folder]]) -> None:
    table = Table(*COLUMNS)
    for row in rows({name: folder.report for name, folder in steps}):
        table.add_row(*row)
    err.print(table)


@app.command()
def run(
    sources: Sources,
    output: Out,
    text_field: TextField = "text",
    jobs: Jobs = 1,
    rules: Chosen = "",
    language: Language = "",
    labels_: Labels = "",
    judge: Judge = None,
    most: Most = None,
    least: Least = None,
    threshold: Threshold = 0.7,
    unit: Unit = "word",
    ngram: Ngram = 5,
    passage: Passage = 0,
    embedder: Embedder = None,
    cosine: Cosine = COSINE,
    groups: Groups = 0,
    against: Against = None,
    tokenizer: Tokenizer = None,
    kind: Kind = "bpe",
    vocab_size: Vocab = 8192,
    split: Split = "0.98,0.01,0.01",
) -> None:
    """The whole chain: OUTPUT/data to train on, OUTPUT/report.md to read, OUTPUT/steps to look into.

    A step takes part if an option of its panel asks for it; exact and near copies always go (--near 0: exact ones only).
    """

    for name in filter(is_path, [*sources, *(against or [])]):
        corpus.list_files(name)
    screens, wanted_labels, shares = chosen(rules, language), labels(labels_), parsed(split)
    check_store(kind, vocab_size, shares)
    alike = how(threshold, unit, ngram) if threshold else None
    scorer = judged(judge, most, least)
    if passage:
        check_passages(passage)
    if embedder:
        check_semantic(embedder, cosine, groups)
    if tokenizer:
        TextTokenizer.load(tokenizer)

    def do(team: Workers) -> None:
        steps = [("read", read_sources(sources, output / "steps" / "read", team, text_field))]

        def then(name: str, wanted: object, act: Callable[[Folder, Path], Folder]) -> None:
            if wanted:
                steps.append((name, act(steps[-1][1], output / "steps" / name)))

        then("screen", screens or wanted_labels, lambda a, b: screening(a, b, team, screens, wanted_labels))
        then("perplexity", scorer, lambda a, b: drop_strange(a, b, team, scorer, most, least))
        then("exact", True, lambda a, b: drop_exact(a, b, team))
        then("near", alike, lambda a, b: drop_near(a, b, team, alike))
        then("passages", passage, lambda a, b: cut_passages(a, b, team, passage))
        then("semantic", embedder, lambda a, b: drop_semantic(a, b, team, embedder, cosine, groups))
        then("decontaminate", against, lambda a, b: clean_of(a, b, team, against or []))
        show(steps)
        err.print(f"report: {write_report(steps, output)}")
        stores(steps[-1][1], output / "data", team, tokenizer, kind, vocab_size, shares)
        write_report(steps, output)  # now with the stores

    together(jobs, do)


def stores(
    before: Folder, output: Path, team: Workers, tokenizer: str | None, kind: str, vocab_size: int, split: Shares
) -> None:
    before.filled()
    prepare(
        before.path / "kept",
        output,
        tokenizer=tokenizer,
        kind=kind,  # type: ignore[arg-type]
        vocab_size=vocab_size,
        split=split,
        workers=team,
    )
    err.print(f"next: ds-pretrain train quickstart data.path={output}")


@app.command()
def read(sources: Sources, output: Out, text_field: TextField = "text", jobs: Jobs = 1) -> None:
    """Sources to numbered documents in one spelling."""
    together(jobs, lambda team: show([("read", read_sources(sources, output, team, text_field))]))


@app.command()
def screen(
    documents: Before, output: Out, rules: Chosen = "", language: Language = "", labels_: Labels = "", jobs: Jobs = 1
) -> None:
    """Drop what breaks published rules of quality; label what stays."""
    asked = chosen(rules, language)
    together(jobs, lambda team: show([("screen", screening(Folder(documents), output, team, asked, labels(labels_)))]))


@app.command()
def perplexity(
    documents: Before,
    output: Out,
    scorer: Annotated[Path, typer.Option("--run", help="Output folder of a finished causal run.")],
    most: Most = None,
    least: Least = None,
    jobs: Jobs = 1,
) -> None:
    """Drop what a trained model finds too strange or too easy; without bounds only tell the distribution."""
    check_bounds(most, least)
    asked = Judged.of(scorer)

    def do(team: Workers) -> None:
        found = drop_strange(Folder(documents), output, team, asked, most, least)
        show([("perplexity", found)])
        err.print(spread(found.report["bits_per_byte"]))

    together(jobs, do)


def spread(quantiles: dict[str, dict[str, float]]) -> Table:
    """Bits per byte by the share of documents that have less."""
    table = Table("documents", *quantiles, title="bits per byte")
    for share in quantiles["before"]:
        table.add_row(share, *(f"{row.get(share, float('nan')):.3f}" for row in quantiles.values()))
    return table


@app.command()
def exact(documents: Before, output: Out, jobs: Jobs = 1) -> None:
    """Drop all but the first of equal documents."""
    together(jobs, lambda team: show([("exact", drop_exact(Folder(documents), output, team))]))


@app.command()
def near(
    documents: Before, output: Out, threshold: Threshold = 0.7, unit: Unit = "word", ngram: Ngram = 5, jobs: Jobs = 1
) -> None:
    """Drop all but the first of documents that are nearly the same (MinHash-LSH, verified)."""
    asked = how(threshold, unit, ngram)
    together(jobs, lambda team: show([("near", drop_near(Folder(documents), output, team, asked))]))


@app.command()
def passages(
    documents: Before, output: Out, words: Annotated[int, typer.Option(help="Words at least.")] = 50, jobs: Jobs = 1
) -> None:
    """Cut long passages that occurred before, such as licence headers."""
    together(jobs, lambda team: show([("passages", cut_passages(Folder(documents), output, team, words))]))


@app.command()
def semantic(
    documents: Before,
    output: Out,
    model: Annotated[Path, typer.Option(help="Folder of a sentence embedding model, such as all-MiniLM-L6-v2.")],
    cosine: Cosine = COSINE,
    groups: Groups = 0,
    jobs: Jobs = 1,
) -> None:
    """Drop all but the first of documents that say the same (SemDeDup, needs transformers); tell what other thresholds drop."""

    def do(team: Workers) -> None:
        found = drop_semantic(Folder(documents), output, team, model, cosine, groups)
        show([("semantic", found)])
        dropped = found.report["would_drop"]
        table = Table("cosine", *dropped)
        table.add_row("would drop", *map(str, dropped.values()))
        err.print(table)

    together(jobs, do)


@app.command()
def decontaminate(
    documents: Before,
    output: Out,
    against: Against = None,
    words: Annotated[int, typer.Option(help="Words in a row that are too many to share.")] = TEST_WORDS,
    jobs: Jobs = 1,
) -> None:
    """Drop what shares text with a benchmark."""
    together(jobs, lambda team: show([("decontaminate", clean_of(Folder(documents), output, team, against or [], words))]))


@app.command()
def sample(
    documents: Before,
    output: Out,
    tier: Annotated[str, typer.Option(help="Of this quality tier alone: high, medium or low (screen --labels tier).")] = "",
    megabytes: Annotated[float, typer.Option(min=0, help="Text to keep, 10^6 bytes; 0: all.")] = 0,
    split: Annotated[
        str, typer.Option(help="Shares that `store` will get: its train documents count, the others stay.")
    ] = "1,0,0",
    jobs: Jobs = 1,
) -> None:
    """Keep so much of the text, or of one quality tier: tiers of one size, to learn what quality is worth."""
    size, shares = round(megabytes * 1e6), parsed(split)
    if megabytes and not size:
        raise ValueError(f"--megabytes {megabytes:g} is less than a byte: give 0 for all, or more")
    check_sample(tier, size)
    together(jobs, lambda team: show([("sample", draw_sample(Folder(documents), output, team, tier, size, shares))]))


@app.command()
def store(
    documents: Before,
    output: Out,
    tokenizer: Tokenizer = None,
    kind: Kind = "bpe",
    vocab_size: Vocab = 8192,
    split: Split = "0.98,0.01,0.01",
    jobs: Jobs = 1,
) -> None:
    """Documents to a tokenizer and memory-mapped stores, split by document."""
    shares = parsed(split)
    together(jobs, lambda team: stores(Folder(documents), output, team, tokenizer, kind, vocab_size, shares))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="What `run` made, or a single step.")]) -> None:
    """Make report.md and its pictures: of a chain again, with report.json, of a single step for the first time."""
    chain = [(name, Folder(folder / "steps" / name)) for name in ORDER if (folder / "steps" / name).exists()]
    steps = chain or [(Folder(folder).report["request"]["step"], Folder(folder))]
    show(steps)
    err.print(f"report: {(write_report if chain else write_page)(steps, folder)}")


def main() -> None:
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if not any(int(os.environ.get(name) or 0) for name in RANKS):  # all ranks of mpirun find the same mistake
            err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)


if __name__ == "__main__":
    main()
