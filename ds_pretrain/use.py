"""Commands that use a model: continue, fill in, embed, compare, classify."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ds_pretrain.console import Output, err, out
from ds_pretrain.core.files import text_lines
from ds_pretrain.runs import data_of, load_model, load_tokenizer, texts_of

app = typer.Typer()
MASK = "<mask>"
"""What stands for a mask in a text on the command line, whatever the tokenizer calls it."""


@app.command()
def generate(
    output: Output,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeat it for more.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of texts to continue, one a line.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep so many candidates; 0: all. Not for diffusion.")] = 0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1, help="Keep this much probability. Not for diffusion.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0,
) -> None:
    """Continue texts with the newest checkpoint of a causal run, or of a masked diffusion run."""
    from ds_pretrain.evaluation.generate import Sampling, continue_all, ends_of, no_text, unmask

    model, tokenizer = load_model(output), load_tokenizer(output)
    vocab = tokenizer.vocabulary
    texts = [*(prompt or []), *(text_lines(prompts) if prompts else [])] or [""]
    starts, how = [ids.tolist() for ids in tokenizer.encode_batch(texts)], Sampling(tokens, temperature, top_k, top_p, seed)
    if model.objective.measure == "bound":
        found = [unmask(model, start, vocab.mask, no_text(model, vocab), how) for start in starts]
    else:
        beginnings = [[vocab.begin, *ids] for ids in starts]
        steps = list(continue_all(model, beginnings, ends_of(model, vocab), no_text(model, vocab), how))
        found = [[token for step in steps if (token := step[i]) is not None] for i in range(len(starts))]
    for text, start, ids in zip(texts, starts, found, strict=True) if model.mesh.rank == 0 else ():
        written = tokenizer.decode([*start, *ids])[len(tokenizer.decode(start)) :]  # alone it would lack its first space
        out.print(f"[bold]{escape(text)}[/bold]{escape(written)}", soft_wrap=True)


@app.command()
def fill(
    output: Output,
    text: Annotated[list[str], typer.Option(help=f"A text with {MASK} where a token is to be found; repeat it for more.")],
    top: Annotated[int, typer.Option(min=1, help="Candidates for each.")] = 5,
) -> None:
    """Say what a masked model puts where a text has a mask, with probabilities."""
    from ds_pretrain.evaluation import fill as task
    from ds_pretrain.evaluation.generate import no_text

    model, tokenizer = load_model(output), load_tokenizer(output)
    vocab = tokenizer.vocabulary
    for each in text:
        ids = task.masked(each.split(MASK), tokenizer, model.objective.framed)
        found = task.fill(model, ids, vocab.mask, no_text(model, vocab), top)
        table = Table("mask", *(str(rank) for rank in range(1, top + 1)), title=escape(each), title_justify="left")
        for number, candidates in enumerate(found, start=1):
            table.add_row(str(number), *(f"{escape(repr(tokenizer.text(token)))} {p:.1%}" for token, p in candidates))
        if model.mesh.rank == 0:
            out.print(table)


@app.command()
def infill(
    output: Output,
    before: Annotated[str | None, typer.Option(help="What is before the gap; with --after, this one gap alone.")] = None,
    after: Annotated[str, typer.Option(help="What is after it.")] = "",
    documents: Annotated[int, typer.Option(help="Documents to take a line out of.")] = 50,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    tokens: Annotated[int, typer.Option(help="Tokens of a gap at most.")] = 64,
    show: Annotated[int, typer.Option(help="Attempts to print.")] = 3,
) -> None:
    """Let a fill-in-the-middle run write what is missing: between two texts of yours, or lines of its own documents.

    Of lines it says how many are exact, and how much Python still parses, beside how much does with nothing in the gap.
    """
    from ds_pretrain.evaluation import infill as task

    model, tokenizer = load_model(output), load_tokenizer(output)
    if problems := [*task.problems(model.objective), *tokenizer.vocabulary.lacks("infilling", task.NAMES)]:
        raise ValueError(problems[0])
    if before is not None:
        attempt = task.infill(model, tokenizer, task.Gap(before, "", after), tokens, one_line=False)
        if model.mesh.rank == 0:
            out.print(f"{escape(before)}[bold green]{escape(attempt.written)}[/bold green]{escape(after)}", soft_wrap=True)
        return
    gaps = list(task.gaps(data_of(output).split(split), documents))
    shown = track(gaps, "infill", console=err, disable=model.mesh.rank > 0)
    tried = [task.infill(model, tokenizer, gap, tokens) for gap in shown]
    if model.mesh.rank == 0:
        for attempt in tried[:show]:
            _show(attempt)
        python = [attempt for attempt in tried if attempt.gap.python]
        table = Table("lines", "exact", "Python documents", "still parse", "without the line", title=f"{output}, {split} split")
        exact, parsed = sum(attempt.exact for attempt in tried), sum(attempt.parses for attempt in python)
        idle = sum(attempt.gap.idle for attempt in python)
        table.add_row(str(len(tried)), _of(exact, tried), str(len(python)), _of(parsed, python), _of(idle, python))
        out.print(table)


def _show(attempt: Any) -> None:
    gap = attempt.gap
    out.print(f"[dim]{escape(gap.before[-200:])}[/dim][bold green]{escape(attempt.written)}[/bold green]", end="")
    out.print(f"[dim]{escape(gap.after[:100])}[/dim]\n  was: [cyan]{escape(gap.middle.rstrip())}[/cyan]\n")


def _of(part: int, whole: list) -> str:
    return f"{part} ({part / len(whole):.1%})" if whole else "-"


@app.command()
def embed(
    output: Output,
    texts: Annotated[Path, typer.Argument(help="A file of texts, one a line.")],
    vectors: Annotated[Path, typer.Option("--output", "-o", help="What to write: .npy, float32 [texts, width].")],
    unit: Annotated[bool, typer.Option(help="Scale each vector to length 1.")] = False,
) -> None:
    """Write a vector for each text: of [CLS] where that was trained (simcse, pair tasks), else the mean over its tokens."""
    import numpy as np
    import torch.nn.functional as F

    from ds_pretrain.core.files import whole
    from ds_pretrain.evaluation.embeddings import embedder

    model, tokenizer = load_model(output), load_tokenizer(output)
    lines = text_lines(texts)
    if not lines:
        raise ValueError(f"{texts} is empty")
    found = embedder(model, tokenizer)(lines)
    found = F.normalize(found, dim=-1) if unit else found
    if model.mesh.rank == 0:
        with whole(vectors) as file:
            np.save(file, found.numpy())
        out.print(f"{vectors}: {len(lines)} vectors of {found.shape[1]}")


@app.command()
def similarity(
    output: Output,
    pairs: Annotated[str, typer.Argument(help="Lines of sentence TAB sentence TAB score.")],
) -> None:
    """Hold a run's sentence embeddings against human scores: Spearman, alignment, uniformity."""
    from ds_pretrain.evaluation import embeddings

    model, tokenizer = load_model(output), load_tokenizer(output)
    found = embeddings.similarity(embeddings.embedder(model, tokenizer), embeddings.read_scores(pairs))
    if model.mesh.rank == 0:
        table = Table("pairs", "Spearman", "equal pairs", "alignment", "uniformity", title=f"{output}, {pairs}")
        table.add_row(
            str(found.pairs), f"{found.spearman:.4f}", str(found.equal), f"{found.alignment:.4f}", f"{found.uniformity:.4f}"
        )
        out.print(table)


@app.command()
def probe(
    output: Output,
    texts: Annotated[str, typer.Argument(help="Lines of text TAB label.")],
) -> None:
    """Classify texts by a logistic regression on a run's frozen states, beside the untrained network."""
    from ds_pretrain.evaluation import embeddings

    model, tokenizer = load_model(output), load_tokenizer(output)
    found = embeddings.probe_of(model, tokenizer, texts)
    if model.mesh.rank == 0:
        table = Table("features", "held-out accuracy", title=f"{output}, {texts}: {found.train} to fit, {found.test} held out")
        for name, share in (("this run", found.accuracy), ("untrained", found.untrained), ("majority", found.majority)):
            table.add_row(name, f"{share:.2%}")
        out.print(table)


@app.command()
def memorised(
    output: Output,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens that are given.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that must come out as they are.")] = 32,
    windows: Annotated[int, typer.Option(min=1, help="Windows to try for each number of occurrences, at most.")] = 200,
) -> None:
    """Say how much of its training text a causal run gives back verbatim, by how often that text occurs in it."""
    from ds_pretrain.evaluation import memorisation

    model, (train, test) = load_model(output), texts_of(output)
    bar = partial(track, description="memorised", console=err, disable=model.mesh.rank > 0)
    found = memorisation.memorised(model, train, test, prompt, tokens, windows, shown=bar)
    if model.mesh.rank == 0:
        out.print(memorisation.table(found, output, train))
