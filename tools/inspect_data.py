"""Look into any store: documents, statistics, token counts, search, checksums; and take in Megatron's own.

For example
    python tools/inspect_data.py show data/wiki/train --document 17 --tokens
    python tools/inspect_data.py stats data/wiki --png lengths.png
    python tools/inspect_data.py tokens data/wiki
    python tools/inspect_data.py search data/wiki "harbour of"
    python tools/inspect_data.py verify data/wiki
    python tools/inspect_data.py adopt corpus_text_document --tokenizer tokenizer.json

A path is a store's prefix (or one of its files) or a folder of stores. Files are mapped and read in pieces, so a store may
be far larger than memory. The price: nothing is indexed, so `search` and `tokens` read every token each time they are asked.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from ds_pretrain.data.adopt import Foreign
from ds_pretrain.data.adopt import adopt as adopt_store
from ds_pretrain.data.inspection import Lengths, check, listing, prefixes, search_ids, search_text
from ds_pretrain.data.store import SUFFIXES, Store
from ds_pretrain.data.tokenizer import TextTokenizer

FLOWING = re.sub(r"(?<=\S)\n(?=\S)", " ", __doc__ or "")
"""The page of help, whose paragraphs are as wide as the terminal."""
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=FLOWING)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
Where = Annotated[Path, typer.Argument(metavar="STORE", help="A store's prefix, or a folder of stores.")]
Named = Annotated[Path | None, typer.Option("--tokenizer", help="The tokenizer, where none lies in `tokenizer/` beside it.")]


def plain(text: str) -> str:
    """Text without what would steer a terminal."""
    return text.translate({code: 0x2400 + code for code in range(32) if code not in (9, 10)})


@dataclass(frozen=True)
class Opened:
    """A store and the tokenizer beside it."""

    store: Store
    given: Path | None

    @property
    def name(self) -> str:
        return Path(self.store.prefix).name

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        path = self.given or Path(self.store.prefix).parent / "tokenizer"
        tokenizer = TextTokenizer.load(path, extend=True)
        if tokenizer.digest != self.store.tokenizer_digest:
            raise ValueError(f"{self.store.prefix} was made by tokenizer {self.store.tokenizer_digest}, not by {path}")
        return tokenizer


def opened(path: Path, tokenizer: Path | None = None) -> list[Opened]:
    return [Opened(Store(prefix, "sizes"), tokenizer) for prefix in prefixes(path)]


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar over so many units, on stderr; gives what is to be called with each part that is done."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@app.command()
def show(
    path: Where,
    document: Annotated[int, typer.Option(help="Its number; negative counts from the end.")] = 0,
    tokens: Annotated[bool, typer.Option("--tokens/--text", help="Ids with their pieces, or the text.")] = False,
    limit: Annotated[int, typer.Option(help="Tokens to show at most.")] = 2000,
    tokenizer: Named = None,
) -> None:
    """One document, of a folder's first store."""
    here = opened(path, tokenizer)[0]
    number = document + len(here.store) * (document < 0)
    if not 0 <= number < len(here.store):
        raise ValueError(f"no document {document} in {here.store.prefix}, which has {len(here.store):,}")
    length, (size, words) = int(here.store.lengths[number]), here.store.text[number].tolist()
    ids = here.store.slice(number, 0, min(length, limit))
    out.print(f"[bold]{here.name}[/] document {number:,}: {length:,} tokens, {size:,} bytes, {words:,} words")
    if tokens:
        table = Table("place", "id", "piece", "text")
        for place, token in enumerate(ids.tolist()):
            table.add_row(f"{place:,}", str(token), escape(here.tokenizer.token(token)), escape(_text(here, token)))
        out.print(table)
    else:
        out.print(plain(here.tokenizer.decode(ids)), markup=False)
    if length > limit:
        out.print(f"... {length - limit:,} more tokens (--limit)")


@app.command()
def stats(path: Where, png: Annotated[Path | None, typer.Option(help="Also draw the lengths into this file.")] = None) -> None:
    """Counts, quantiles of the length, and its histogram."""
    names = ("store", "documents", "tokens", "bytes", "bytes/token", "mean", "median", "90%", "99%", "longest", "dtype")
    table = Table(*names[:1], title="lengths in tokens, the end of document included")
    for name in names[1:]:
        table.add_column(name, justify="right")
    found = {here.name: (here.store, Lengths.of(here.store)) for here in opened(path)}
    for name, (store, lengths) in found.items():
        documents, tokens, size = (store.info[key] for key in ("documents", "tokens", "bytes"))
        quantiles = [f"{lengths.quantile(share):,}" for share in (0.5, 0.9, 0.99, 1)]
        decoded = "*" * (store.info.get("text_sizes") == "decoded")
        row = (f"{documents:,}", f"{tokens:,}", f"{size:,}{decoded}", f"{size / tokens:.2f}{decoded}")
        table.add_row(name, *row, f"{tokens / documents:,.1f}", *quantiles, store.info["dtype"])
        if decoded:
            table.caption = "* recovered by decoding, see `adopt`"
    out.print(table)
    for name, (_, lengths) in found.items():
        out.print(histogram(name, lengths))
    if png:
        draw({name: lengths for name, (_, lengths) in found.items()}, png)
        out.print(f"drawn: {png}")


def histogram(name: str, lengths: Lengths, width: int = 25) -> Table:
    """Bars of documents and of tokens by octave of the length."""
    rows = lengths.octaves()
    totals = sum(row[1] for row in rows), sum(row[2] for row in rows)
    table = Table("tokens", "documents", "", "share of tokens", "", title=name)
    table.columns[0].no_wrap = True
    for octave, *counts in rows:
        shares = [count / total for count, total in zip(counts, totals, strict=True)]
        bars = ["█" * round(width * share) or "▏" * bool(count) for share, count in zip(shares, counts, strict=True)]
        edges = f"{1 << octave:,} to {(2 << octave) - 1:,}"
        table.add_row(edges, f"{counts[0]:,}", f"[blue]{bars[0]}[/]", f"{shares[1]:.1%}", f"[yellow]{bars[1]}[/]")
    return table


def draw(found: dict[str, Lengths], path: Path) -> None:
    """One panel a store: the share of documents and of tokens by length, in half octaves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 2.4 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
    longest = max(int(lengths.values[-1]) for lengths in found.values())
    edges = 2 ** np.arange(0, np.log2(longest) + 1, 0.5)
    for panel, (name, (values, counts)) in zip(panels, found.items(), strict=True):
        for weights, label, colour in ((counts, "documents", "#1f5fa8"), (counts * values, "tokens", "#d9621e")):
            share = 100 * weights / weights.sum()
            panel.hist(values, edges, weights=share, histtype="stepfilled", color=colour, alpha=0.45, label=f"of {label}")
        panel.set(xscale="log", ylabel="%")
        panel.set_title(f"{name}: {counts.sum():,} documents, {(counts * values).sum():,} tokens", loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel("tokens of a document")
    figure.savefig(path, dpi=120)


@app.command()
def tokens(
    path: Where,
    top: Annotated[int, typer.Option(help="Ids to show of each end.")] = 20,
    tokenizer: Named = None,
) -> None:
    """The most and the least frequent ids, over all stores of a folder."""
    stores = opened(path, tokenizer)
    count = np.zeros(max(here.store.vocab_size for here in stores), dtype=np.int64)
    with progress("count", sum(here.store.info["tokens"] for here in stores)) as advance:
        for part in (part for here in stores for part in here.store.chunks()):
            count += np.bincount(part, minlength=len(count))
            advance(len(part))
    order = np.lexsort((np.arange(len(count)), -count))
    seen = order[: np.count_nonzero(count)]
    for title, ids in (("most frequent", seen[:top]), ("least frequent of those that occur", seen[: -top - 1 : -1])):
        table = Table("id", "count", "share", "piece", "text", title=title)
        for i in ids.tolist():
            share = f"{count[i] / count.sum():.3%}"
            table.add_row(str(i), f"{count[i]:,}", share, escape(stores[0].tokenizer.token(i)), escape(_text(stores[0], i)))
        out.print(table)
    out.print(f"{count.sum():,} tokens; {len(seen):,} of {len(count):,} ids occur, {len(count) - len(seen):,} never do")


def _text(here: Opened, token: int) -> str:
    return repr(here.tokenizer.decode([token]))


@app.command()
def search(
    path: Where,
    text: Annotated[str, typer.Argument(help="What the documents must contain, to the letter.")],
    ids: Annotated[
        bool,
        typer.Option("--ids", help="Compare ids, of TEXT with and without a space before it: fast, but blind to other cuts."),
    ] = False,
    limit: Annotated[int, typer.Option(help="Documents to find at most.")] = 20,
    tokenizer: Named = None,
) -> None:
    """Documents that contain TEXT: in what their ids decode to, or (--ids) as its own ids."""
    if not text:
        raise ValueError("nothing to search for: TEXT is empty")
    stores, found, find = opened(path, tokenizer), 0, search_ids if ids else search_text
    table = Table("store", "document", "where", title=f"{text!r}")
    with progress("search", sum(here.store.info["tokens"] for here in stores)) as advance:
        for here in stores:
            for hit in find(here.store, here.tokenizer, text, advance):
                before, itself, after = (escape(plain(part).replace("\n", "⏎")) for part in hit.context)
                table.add_row(here.name, f"{hit.document:,}", f"{before}[bold reverse]{itself}[/]{after}")
                found += 1
                if found == limit:
                    break
            if found == limit:
                break
    out.print(table)
    out.print(f"{found} documents{' (--limit reached, there may be more)' * (found == limit)}")


@app.command()
def verify(path: Where) -> None:
    """Every checksum, every id and every end of document, of one store or all of a folder; exit code 1 if one is wrong."""
    table, wrong = Table("store", "file", "bytes", "verdict"), 0
    found = prefixes(path)
    listed = listing(path)
    size = sum(os.path.getsize(f) for p in found for s in SUFFIXES if os.path.exists(f := f"{p}.{s}"))
    with progress("verify", size) as advance:
        for prefix in found:
            for file, verdict in check(prefix, listed, advance):
                wrong += bool(verdict)
                has = f"{os.path.getsize(file):,}" if os.path.exists(file) else "-"
                said = f"[red]{escape(verdict)}[/]" if verdict else "[green]sound[/]"
                table.add_row(prefix.name, Path(file).name, has, said)
    out.print(table)
    for name in set(listed) - {prefix.name for prefix in found}:
        wrong += 1
        out.print(f"[red]manifest.json lists {escape(name)}, which is not in {path}[/]")
    if wrong:
        out.print(f"[red]{wrong} wrong[/], see above: prepare the data again, or fetch those files again")
        raise typer.Exit(1)
    stores = [Store(prefix, "sizes").info for prefix in found]
    told = ", ".join(f"{sum(info[key] for info in stores):,} {key}" for key in ("documents", "tokens"))
    out.print(f"[green]all is sound[/]: every byte of {len(stores)} store{'s'[: len(stores) > 1]}, {told}, {size:,} bytes")


@app.command()
def adopt(
    prefix: Annotated[Path, typer.Argument(help="PREFIX of the .bin and .idx that Megatron's preprocess_data wrote.")],
    tokenizer: Annotated[
        Path, typer.Option(help="The tokenizer that made its ids: a folder, tokenizer.json or tokenizer.model.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Rewrite to this PREFIX, where documents are several sequences or lack their end.")
    ] = None,
) -> None:
    """Make a store of Megatron's ours: verify its ids and structure, recover the sizes of its text, write a sidecar.

    In place nothing is copied and .bin and .idx stay as they are. The tokenizer is saved as `tokenizer/` beside the store.
    Name the stores train, validation and test in one folder and it is a data folder that can be trained on.
    """
    made = TextTokenizer.load(tokenizer, extend=True)
    beside = (output or prefix).parent / "tokenizer"
    if beside.exists() and TextTokenizer.load(beside).digest != made.digest:
        raise ValueError(f"{beside} is another tokenizer than {tokenizer}: choose an --output in another folder")
    with progress("adopt", len(Foreign.open(prefix).tokens)) as advance:
        store = adopt_store(prefix, made, output, advance)
    if not beside.exists():
        made.save(beside)
    counts = ", ".join(f"{store.info[key]:,} {key}" for key in ("documents", "tokens", "bytes"))
    out.print(f"adopted {store.prefix}: {counts} (text sizes recovered by decoding)")


def main() -> None:
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True, highlight=False).print(f"[red]error[/]: {escape(str(error))}")
        sys.exit(2)


if __name__ == "__main__":
    main()
