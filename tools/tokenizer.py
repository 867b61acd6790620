"""Tokenizers from files to files: train on balanced texts, compare, extend for a new language or domain, resize a checkpoint.

    python tools/tokenizer.py train en=en.txt zh=zh.txt -o both --vocab-size 16384 --temperature 3.33
    python tools/tokenizer.py compare en=en-test.txt zh=zh-test.txt -t both -t gpt2=gpt2/tokenizer.json --reference en
    python tools/tokenizer.py extend english zh.txt -o english+zh --pieces 4000
    ds-pretrain prepare zh.txt -o data/zh --tokenizer english+zh
    python tools/tokenizer.py resize runs/clm/checkpoints/step-1000 english+zh -o runs/wider --data data/zh
    ds-pretrain train runs/wider/run.yaml

A text is anything that `prepare` reads (txt, jsonl, parquet, each also .gz or .zst, folders, datasets:NAME), a tokenizer a
folder that was saved here, or a tokenizer.json or tokenizer.model from elsewhere. NAME= in front names it in tables.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ds_pretrain.curation.prepare import fewer
from ds_pretrain.data import balance, corpus, tokenizer_report
from ds_pretrain.data.tokenizer import TextTokenizer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").partition("\n")[0]
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
err = Console(stderr=True, highlight=False)

Texts = Annotated[list[str], typer.Argument(help="Texts as PATH or NAME=PATH: all that `ds-pretrain prepare` reads.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")]
Field = Annotated[str, typer.Option(help="Field of the text in jsonl and parquet.")]
DIGEST = re.compile("[0-9a-f]{32}")


@app.command()
def train(
    texts: Texts,
    output: Output,
    kind: Annotated[str, typer.Option(help="bpe, wordpiece, unigram or sp_bpe.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Ids in all, specials and sentinels included.")] = 8192,
    temperature: Annotated[
        float, typer.Option(help="1 keeps the shares of the texts, 3.33 is XLM-R's, a large one makes them equal.")
    ] = 1.0,
    budget: Annotated[int | None, typer.Option(help="Bytes to train on; as many as there are if left out.")] = None,
    text_field: Field = "text",
) -> None:
    """Train a tokenizer on texts whose shares are balanced by temperature, a text for each language or source."""
    _absent(output)
    sources = {name: _reader(path, text_field) for name, path in _named(texts).items()}
    plan = balance.shares(balance.measure(sources), temperature, budget)
    out.print(balance.table(plan, temperature))
    with err.status(f"training {kind}"):
        made = TextTokenizer.train(balance.balance(sources, plan), vocab_size, kind)  # type: ignore[arg-type]
    _whole(output, made.save)
    short = "" if len(made) == vocab_size else f" ({fewer(vocab_size)})"
    out.print(f"{output}: {len(made):,} ids{short}, digest {made.digest}")


@app.command()
def compare(
    texts: Texts,
    tokenizer: Annotated[list[str], typer.Option("--tokenizer", "-t", help="A tokenizer as PATH or NAME=PATH; repeat it.")],
    reference: Annotated[
        str | None, typer.Option(help="The text that parity is measured against; the texts are then translations of it.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the comparison here.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write every number here.")] = None,
    text_field: Field = "text",
) -> None:
    """Hold tokenizers against each other: fertility, bytes per token, parity, unknown and continued words, speed."""
    for path in (png, output):
        if path and not path.parent.is_dir():
            raise ValueError(f"{path.parent} is no folder to write {path.name} in: make it first")
    loaded = {name: TextTokenizer.load(path, extend=True) for name, path in _named(tokenizer).items()}
    read = {name: list(_reader(path, text_field)()) for name, path in _named(texts).items()}
    with err.status("encoding"):
        found = tokenizer_report.compare(loaded, read, reference)
    out.print(tokenizer_report.table(found))
    if output:
        _whole(output, lambda path: path.write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8"))
    if png:
        _whole(png, lambda path: tokenizer_report.plot(found, path))
        out.print(f"picture: {png}")


@app.command()
def extend(
    tokenizer: Annotated[str, typer.Argument(help="The tokenizer to extend.")],
    texts: Texts,
    output: Output,
    pieces: Annotated[int, typer.Option(help="New pieces at most.")] = 4000,
    text_field: Field = "text",
) -> None:
    """Teach a tokenizer a new language or domain: old ids keep their meaning, new pieces follow the last of them.

    Beside the tokenizer lies pieces.json, how the old tokenizer spells each new id, by which `resize` widens a checkpoint.
    Old text may be cut otherwise where a new piece applies: prepare the data again.
    """
    from ds_pretrain.data import extend as extension

    _absent(output)
    old = TextTokenizer.load(tokenizer, extend=True)
    read = [text for path in _named(texts).values() for text in _reader(path, text_field)()]
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("learn pieces", total=pieces)
        made = extension.extend(old, read, pieces, lambda learned: progress.update(task, completed=learned))
    _whole(output, made.save)
    before, after = (sum(map(len, each.encode_batch(read))) for each in (old, made.tokenizer))
    out.print(
        f"{output}: {len(made.tokenizer):,} ids, {len(made.parts):,} of them new; the new text takes {after:,} tokens, "
        f"{before:,} before"
    )


@app.command()
def resize(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of any layout: RUN/checkpoints/step-N.")],
    tokenizer: Annotated[Path, typer.Argument(help="The folder that `extend` made of the checkpoint's tokenizer.")],
    output: Output,
    rows: Annotated[
        str, typer.Option(help="pieces: the mean of the rows that spell a token; all: drawn around the mean of all rows.")
    ] = "pieces",
    data: Annotated[
        str | None,
        typer.Option(help="Folder prepared with TOKENIZER that training goes on with, or the digest that `train` asks for."),
    ] = None,
) -> None:
    """Give a checkpoint rows for the ids of an extended tokenizer; it then lies in OUTPUT/checkpoints.

    With a folder of --data, OUTPUT/run.yaml is the run that goes on with it, from its beginning; without --data no run can.
    """
    if rows not in ("pieces", "all"):
        raise ValueError(f"--rows {rows}: choose pieces or all")
    from ds_pretrain.data import extend as extension
    from ds_pretrain.training.resize import resize as run

    made = extension.load(tokenizer)
    follow = _Run.of(checkpoint, output, Path(data), made.tokenizer) if data and not DIGEST.fullmatch(data) else None
    digest = follow.digest if follow else data
    parts = made.parts if rows == "pieces" else None
    path = run(checkpoint, output, len(made.tokenizer), parts, digest, tokenizer=made.tokenizer.digest)
    out.print(f"{path}: {len(made.tokenizer):,} ids, {len(made.parts):,} of them new")
    words = follow.write(path) if follow else _unnamed(checkpoint, tokenizer, output, digest, path)
    out.print(f"next: {shlex.join(words)}", markup=False, soft_wrap=True)
    if digest is None:
        out.print("then: this command again, with --data DATA and another output")


@dataclass(frozen=True)
class _Run:
    """The run that goes on with a resized checkpoint. digest: of its data. file: its settings, still to be written."""

    file: Path
    values: dict[str, Any]
    digest: str

    @classmethod
    def of(cls, checkpoint: Path, output: Path, data: Path, tokenizer: TextTokenizer) -> _Run:
        """By the run that made the checkpoint. ValueError where that is not known, or the data are not this tokenizer's."""
        import yaml

        from ds_pretrain.config import parse_run
        from ds_pretrain.runs import training_data

        was, file = checkpoint.parent.parent / "run.yaml", output / "run.yaml"
        if not was.is_file():
            raise ValueError(f"{was} does not exist, so the run of {checkpoint} is unknown: give --data a digest, or none")
        if file.exists():
            raise ValueError(f"{file} exists: choose another output, or remove it")
        if not (data / "train.idx").is_file():
            raise ValueError(f"{data} holds no prepared data: make it with ds-pretrain prepare TEXT -o {data} --tokenizer ...")
        values = yaml.safe_load(was.read_text(encoding="utf-8"))
        values |= {"output": str(output), "data": values["data"] | {"path": str(data), "tokenizer": None}}
        values["model"] |= {"vocab": max(len(tokenizer), values["model"]["vocab"])}  # an imported one may have been padded
        dataset = training_data(parse_run(values, str(was)))
        if dataset.tokenizer.digest != tokenizer.digest:
            raise ValueError(f"{data} was prepared with another tokenizer than the one given: prepare it with --tokenizer")
        return cls(file, values, dataset.digest)

    def write(self, checkpoint: Path) -> list[str]:
        """The settings; returns what goes on with them, for as many steps again if all that were asked for are done."""
        import yaml

        from ds_pretrain.training.checkpoint import read_manifest

        _whole(self.file, lambda path: path.write_text(yaml.safe_dump(self.values, sort_keys=False), encoding="utf-8"))
        if "imported" in read_manifest(checkpoint):
            data, output = self.values["data"]["path"], self.values["output"]
            begins = [f"init={output}", f"data.path={data}", f"data.mix={{{data}: 1.0}}", f"data.tokenizer={data}/tokenizer"]
            return ["ds-pretrain", "train", "adapt", *begins]
        step = int(checkpoint.name.removeprefix("step-"))
        more = [f"train.max_steps={2 * step}"] if step >= self.values["train"]["max_steps"] else []
        return ["ds-pretrain", "train", str(self.file), *more]


def _unnamed(checkpoint: Path, tokenizer: Path, output: Path, digest: str | None, made: Path) -> list[str]:
    """What goes on where no folder of data is named; capitals are to be filled in."""
    from ds_pretrain.training.checkpoint import read_manifest

    if digest is None:
        return ["ds-pretrain", "prepare", "TEXT", "-o", "DATA", "--tokenizer", str(tokenizer)]
    was = checkpoint.parent.parent / "run.yaml"
    run = str(was) if was.is_file() else "RUN"
    rows = read_manifest(made)["model"]["vocab"]
    return ["ds-pretrain", "train", run, "data.path=DATA", f"output={output}", f"model.vocab={rows}"]


def _named(texts: list[str]) -> dict[str, str]:
    """NAME=PATH, or PATH, whose name then is that of the file or folder, or the one above a folder `tokenizer`."""
    found: dict[str, str] = {}
    for text in texts:
        name, given, path = text.partition("=")
        own = Path(text).parent if Path(text).name == "tokenizer" else Path(text)
        name, path = (name, path) if given else (own.name.partition(".")[0], text)
        if name in found:
            raise ValueError(f"{found[name]} and {path} are both named {name}: put another name and = in front of one")
        found[name] = path
    return found


def _reader(path: str, text_field: str) -> balance.Texts:
    return lambda: (document.text for document in corpus.read(path, text_field=text_field))


def _absent(output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} exists: choose another output, or remove it")


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file or folder that is there whole or not at all."""
    attempt = path.with_name(f".{path.stem}.tmp{path.suffix}")
    shutil.rmtree(attempt, ignore_errors=True)
    attempt.parent.mkdir(parents=True, exist_ok=True)
    write(attempt)
    attempt.replace(path)


def main() -> None:
    """Run a command; a user's mistake ends with a message and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        err.print(f"[bold red]error[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
