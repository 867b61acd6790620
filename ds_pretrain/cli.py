"""The command line: names things and prints, computes nothing.

Every command runs the same by hand, under torchrun, deepspeed, srun or mpirun. A mistake of the user's ends with a message
that says what to do, exit code 2 and nothing half-written; `train --debug` lets the traceback through instead.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from ds_pretrain.config import ConfigError, RunConfig, configs, keys_of, load_run, objective_fields
from ds_pretrain.console import Output, err, out
from ds_pretrain.core.exits import BUSY, DIVERGED, FAILED, MISTAKE
from ds_pretrain.core.files import BusyError, held, whole
from ds_pretrain.core.registry import unknown
from ds_pretrain.runs import data_of, load_model, make_trainer, open_run, refuse, tokenizer_size
from ds_pretrain.sweep.commands import app as sweep
from ds_pretrain.sweep.spec import Spec
from ds_pretrain.sweep.spec import read as read_sweep
from ds_pretrain.use import app as use

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pre-training objectives for language models, under any DeepSpeed and megatron-core layout.\n\n"
    "Start with: prepare a corpus, preview an objective on it, train a run, eval it, generate from it.",
)
app.add_typer(use)
app.add_typer(sweep, name="sweep")
scaling = typer.Typer(no_args_is_help=True, help="Scaling laws of finished runs.")
app.add_typer(scaling, name="scaling")
bench = typer.Typer(no_args_is_help=True, help="Measurements on the ranks that are here.")
app.add_typer(bench, name="bench")

ASSUMED_VOCABULARY = 32768
"""What `plan` counts with before there is a tokenizer."""
RESUMED = 50
"""Steps of which a checkpoint is in the middle, in `parity --resume`."""
PREVIEWED = 64
"""Positions of an example that `preview OBJECTIVE` shows, unless a run says otherwise."""
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides such as optimizer.lr=1e-3 parallel.tensor=2.")]
Run = Annotated[str, typer.Argument(help="A run file, or the name of one in ds_configs/runs (see `list runs`).")]


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files or folders (txt, jsonl, parquet, each also .gz or .zst), patterns such as 'src/**/*.py', "
            "datasets:NAME[:CONFIG[:SPLIT]], or `embedded`."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make.")],
    vocab_size: Annotated[int, typer.Option(help="Vocabulary to train, specials and sentinels included.")] = 8192,
    kind: Annotated[str, typer.Option(help="bpe, wordpiece, unigram or sp_bpe.")] = "bpe",
    tokenizer: Annotated[str | None, typer.Option(help="Use this tokenizer instead of training one.")] = None,
    split: Annotated[str, typer.Option(help="Shares of train, validation and test.")] = "0.98,0.01,0.01",
    text_field: Annotated[str, typer.Option(help="Field of the text in jsonl and parquet.")] = "text",
    jobs: Annotated[int, typer.Option(help="Processes; tools/prepare_data.py takes MPI ranks too.")] = 1,
) -> None:
    """Text to a tokenizer and memory-mapped stores, split by document."""
    from ds_pretrain.curation.prepare import prepare as run
    from ds_pretrain.curation.workers import workers
    from ds_pretrain.parallel.launch import place

    if place().world > 1:
        raise ValueError(f"prepare is for one process, this job has {place().world}: start it without a launcher")
    shares = tuple(float(share) for share in split.split(","))
    with workers(jobs) as team:
        run(
            sources, output, vocab_size=vocab_size, kind=kind, tokenizer=tokenizer, split=shares, text_field=text_field,  # type: ignore[arg-type]
            workers=team,
        )  # fmt: skip


@app.command()
def tasks(
    prepared: Annotated[Path, typer.Argument(help="A folder that `prepare` wrote; its sources must still be there.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for passages.tsv and cloze.yaml.")],
    split: Annotated[str, typer.Option(help="Whose documents: test or validation.")] = "test",
) -> None:
    """Make tasks from held-out text: which file is a passage from (for `probe`), what is its last word (for lm-eval)."""
    from ds_pretrain.curation.tasks import make

    found = make(prepared, output, split)
    task = (configs() / "lm_eval" / "cloze.yaml").read_text(encoding="utf-8")
    with whole(output / "cloze.yaml") as file:
        file.write(task.replace("data/tasks/cloze.jsonl", str((output / "cloze.jsonl").resolve())).encode())
    table = Table("task", "examples", "", title=str(output), title_justify="left")
    told = f"{found.classes} files, the largest {found.majority:.1%}: ds-pretrain probe RUN {output}/passages.tsv"
    none = f"no such task: {found.classes} files have passages enough, two are the least; give the text file by file"
    table.add_row("passages.tsv", f"{found.passages:,}", told if found.passages else none)
    table.add_row("cloze.jsonl", f"{found.cloze:,}", "last words, for lm-eval")
    out.print(table)
    command = f"--model_args pretrained=FOLDER --include_path {output} --tasks ds_pretrain_cloze"
    out.print(f"lm_eval --model hf {command}   # FOLDER: of ds-pretrain export", soft_wrap=True)


@app.command()
def train(
    run: Run,
    overrides: Overrides = None,
    debug: Annotated[
        bool, typer.Option(help="One process, deterministic, anomaly detection, first batch previewed, full traceback.")
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(help="The same bits each time on one layout: no kernel that sums in an order of its own. Slower on GPUs."),
    ] = False,
) -> None:
    """Train a run; in an existing output it continues from the newest sound checkpoint."""
    config, dataset = open_run(run, overrides)
    if deterministic:
        _determine()
    if debug:
        _debug(dataset, config)
    trainer = make_trainer(config, dataset)
    trainer.train()
    if trainer.mesh.rank == 0 and trainer.output:
        _draw(trainer.output)
        verdict = "its loss DIVERGED, see above" if trainer.diverging else f"next: ds-pretrain eval {trainer.output}"
        out.print(f"trained to step {trainer.step}: {trainer.output}  ({verdict})")


@app.command(context_settings={"ignore_unknown_options": True})
def restart(
    code: Annotated[int, typer.Argument(help="What the job ended with.")],
    command: Annotated[list[str], typer.Argument(help="What it ran: train RUN [a.b=c ...], or sweep cell SPEC CELL.")],
    signalled: Annotated[bool, typer.Option("--signalled", help="It was asked to stop before it failed.")] = False,
) -> None:
    """For batch scripts: end with 0 if a job that failed is worth another start, else say why not and end with 1."""
    import os

    from ds_pretrain.sweep.cells import note, noted
    from ds_pretrain.training.restarts import why_not

    words = [word for word in command if not word.startswith("-")]
    output, most = _output_of(words), os.environ.get("DS_PRETRAIN_RESTARTS", "10")
    if not most.isdigit():
        raise ValueError(f"DS_PRETRAIN_RESTARTS is {most!r}: give the number of failures that are got over")
    if reason := why_not(output, code, int(most), os.environ.get("SLURM_JOB_ID", ""), signalled):
        told = noted(output).get("status", "stopped") != "stopped"  # why it failed
        known = told or code == BUSY or held(output / "lock")  # who trains it
        if words[:2] == ["sweep", "cell"] and not known:
            note(read_sweep(words[2]).find(words[3]), "failed", reason)
        err.print(f"{output} is not started again: {escape(reason)}", soft_wrap=True)
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    output: Output,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    max_tokens: Annotated[int | None, typer.Option(help="Score at most so many tokens of whole documents.")] = None,
    baselines: Annotated[bool, typer.Option(help="Also score a unigram and a bigram model of the same train split.")] = False,
) -> None:
    """Score the newest checkpoint of a run: perplexity per token and word, bits per byte; masked loss and accuracy."""
    import json

    from ds_pretrain.evaluation import ngram, perplexity, report

    model, dataset = load_model(output), data_of(output)
    plain = model.objective.likelihood
    found: dict[str, dict[str, float]] = {}
    for objective in [model.objective, *([plain] if plain and plain != model.objective else [])]:
        under, parts = model.under(objective), dataset.parts(split, objective.evaluated)
        name = f"{objective.name} at step {model.snapshot.manifest['step']}"
        named = {f"{name}, {folder}" if folder else name: part for folder, part in parts.items()}
        rows = [(name, perplexity.evaluate(under, part, max_tokens)) for name, part in named.items()]
        scores = rows[0][1]
        if baselines and objective in (plain, dataset.objective):
            rows += ngram.baselines(dataset.split("train"), parts[""], max_tokens)
        found |= {name: score.as_metrics(objective.measure) for name, score in rows}
        if model.mesh.rank == 0:
            out.print(report.table(rows, objective.measure, title=f"{output}, {split} split"))
            if scores.heads:
                out.print(report.heads_table(scores))
    if model.mesh.rank == 0:
        (Path(output) / f"eval-{split}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        _draw(Path(output))


@app.command()
def preview(
    target: Annotated[str, typer.Argument(help="An objective (see `list objectives`), or a run file or its name.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides such as objective.mask_prob=0.3 batch.seq_len=48 seed=1.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A document to look at; repeat it for more.")] = None,
    run: Annotated[str | None, typer.Option(help="Look at the documents of this run's data, in its row length.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Examples (of a run: rows) to show.")] = None,
    png: Annotated[str | None, typer.Option(help="Also draw it here: of a run the attention pattern.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every objective, in the picture on one sheet.")] = False,
) -> None:
    """Show what an objective does: documents before and after, labels, weights, realised rates and attention.

    Documents are --text, those of --run, or a few built-in ones. Without --run the tokenizer is that of data/embedded, or,
    before anything is prepared, a small one that is trained on the spot. Of a run file, show its first batch.
    """
    from ds_pretrain.data import preview_objective, preview_plot
    from ds_pretrain.objectives import REGISTRY

    overrides = list(overrides or [])
    if png and not Path(png).parent.is_dir():
        raise ValueError(f"{Path(png).parent} is no folder to draw {png} in: make it first")
    if all_ and "=" in target:
        target, overrides = "", [target, *overrides]
    if all_ and target:
        raise ValueError(f"--all shows every objective: leave out {target!r}, or leave out --all")
    if not all_ and target not in REGISTRY:
        _known(target)
        if text or run:
            raise ValueError(f"{target} is a run: --text and --run go with an objective, as in preview mlm --run {target}")
        _, dataset = open_run(target, overrides)
        _preview(dataset, rows or 2, png)
        return
    views = []
    for name in REGISTRY if all_ else [target]:
        data, tokenizer = _samples(name, overrides, text, run)
        views.append(preview_objective.view(data, tokenizer.token, rows or (1 if all_ else None)))
        out.print(preview_objective.render(views[-1], short=all_))
    if png:
        preview_plot.view_png(views, png)
        out.print(f"picture: {png}")


@app.command(name="import")
def bring(
    folder: Annotated[Path, typer.Argument(help="What save_pretrained() wrote: GPT-2, LLaMA, BERT, ALBERT or ELECTRA.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The output folder to make.")],
    generator: Annotated[
        Path | None, typer.Option(help="Of ELECTRA: the generator's folder, FOLDER is the discriminator's.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="What to train it for; else what its class was trained for.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option(help="Read a pickle, with weights_only, where there are no safetensors.")
    ] = False,
) -> None:
    """Take weights from a folder of transformers: the output can be generated from, evaluated, exported, and trained on from.

    Heads that the folder lacks begin anew, and are named. To train on, begin a run with init=OUTPUT and an output of its own.
    """
    from ds_pretrain.interop.commands import bring_in, told

    arrival = bring_in(folder, output, generator, objective, allow_pickle)
    out.print(told(arrival, output))
    tokenizer = output / "tokenizer" if (output / "tokenizer").is_dir() else "TOKENIZER"
    out.print(f"train on:  ds-pretrain prepare TEXT -o DATA --tokenizer {tokenizer}", soft_wrap=True)
    out.print(f"           ds-pretrain train RUN init={output} data.path=DATA output=...", soft_wrap=True)


@app.command()
def export(
    output: Output,
    folder: Annotated[Path, typer.Option("--folder", "-o", help="The folder to make; it must be empty or not there.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as it came in if it was not trained, else float32.")
    ] = None,
    step: Annotated[
        str | None, typer.Option(help="A checkpoint by name, such as step-1000; else the newest sound one.")
    ] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="GB of a file at most.")] = 5.0,
) -> None:
    """Write a run's weights as a folder of transformers: config, safetensors, tokenizer, generation config and model card."""
    from ds_pretrain.interop.commands import send_out

    for made in send_out(Path(output), folder, dtype, step, int(shard_gb * 1e9)):
        out.print(f"{made}: open it with transformers, or read {folder}/README.md")


@app.command()
def plan(
    run: Run,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option(min=1, help="Ranks to plan for.")] = 1,
    measured: Annotated[Path | None, typer.Option(help="Points of `bench scaling --out`: steps are timed from them.")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=1e-9, help="TFLOP/s of a rank in matrix products alone, in place of the measured.")
    ] = None,
    gb_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="GB/s that a rank sends in an all-reduce, in place of the measured.")
    ] = None,
    latency_us: Annotated[
        float | None, typer.Option(min=0, help="Microseconds of an all-reduce of one number, in place of the measured.")
    ] = None,
) -> None:
    """Who sits where, parameters, memory, bytes sent and batch arithmetic for any number of ranks; needs no GPU.

    With speeds also the time of a step: as `bench scaling` has measured them on a few ranks, or as you know them of a cluster
    you do not have.
    """
    from ds_pretrain.planning.points import Cluster, read
    from ds_pretrain.planning.tables import tables

    config = load_run(run, overrides or [])
    size = tokenizer_size(config)
    refuse(run, config.check(world, size, here=False))
    if size is None and config.model.vocab is None:
        size = ASSUMED_VOCABULARY
        where = config.data.tokenizer or config.data.path
        out.print(f"{where} holds no tokenizer yet: a vocabulary of {size:,} is assumed (or give model.vocab)")
    given = {"products": (tflops, 1e12), "link": (gb_per_second, 1e9), "latency": (latency_us, 1e-6)}
    speeds = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    cluster = Cluster.of(read(measured) if measured else [], speeds) if measured or speeds else None
    for table in tables(config, world, size, cluster):
        out.print(table)


@app.command()
def doctor(
    output: Annotated[str | None, typer.Argument(help="The output folder to come, which all nodes must share.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For the links of nodes and GPUs; 0 leaves them out.")] = 10.0,
) -> None:
    """Examine the nodes of a job, under the launcher it will have: versions, devices, disks, clocks, links of nodes and GPUs.

    What differs, is slow or broken is named with its node. A job on several nodes does the same, shorter, before it trains.
    """
    from ds_pretrain.parallel.doctor import examine
    from ds_pretrain.parallel.mesh import start

    where, began = start(), time.monotonic()
    found = examine(Path(output) if output else None, seconds)
    took = time.monotonic() - began
    if where.rank == 0:
        for table in found.tables():
            out.print(table)
        for warning in found.warnings():
            out.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True)
        for problem in found.problems():
            out.print(f"[bold red]problem[/bold red] {escape(problem)}", soft_wrap=True)
        out.print("" if found.problems() else f"fit to train; examined in {took:.1f} s")
    if found.problems():
        raise typer.Exit(1)


@app.command(name="list")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="objectives, presets, runs, sweeps or deepspeed; one objective; `run` or `sweep`: the keys of such a file. "
            "All lists if left out."
        ),
    ] = "",
) -> None:
    """What there is: objectives, model presets, run files, sweeps, DeepSpeed configurations. Of an objective, a run file and a
    sweep file, what each key means."""
    from ds_pretrain.models.config import ModelConfig
    from ds_pretrain.models.presets import PRESETS
    from ds_pretrain.objectives import REGISTRY

    sections: dict[str, list[tuple[str, str]]] = {
        "objectives": [(name, ", ".join(f"{key}={value}" for key, value, _ in objective_fields(name))) for name in REGISTRY],
        "presets": [(name, _preset_line(ModelConfig(preset=name, vocab=50257))) for name in PRESETS],
        **{
            kind: [(path.stem, _first_comment(path)) for path in sorted((configs() / kind).glob("*.yaml"))]
            for kind in ("runs", "sweeps")
        },
        "deepspeed": [(path.name, "") for path in sorted((configs() / "deepspeed").glob("*.json"))],
    }
    files: dict[str, type[BaseModel]] = {"run": RunConfig, "sweep": Spec}
    if what in files:
        out.print(_keys(f"keys of a {what} file", keys_of(files[what])))
        return
    if what in REGISTRY:
        named = [(f"objective.{key}", value, meaning) for key, value, meaning in objective_fields(what)]
        out.print(_keys((REGISTRY[what].__doc__ or "").partition("\n")[0], named))
        return
    if what and what not in sections:
        raise ValueError(unknown("list", what, [*sections, *files, *REGISTRY]))
    for title in [what] if what else sections:
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for row in sections[title]:
            table.add_row(*row)
        out.print(table)


@app.command()
def parity(
    world: Annotated[
        str, typer.Option(help="World sizes to start here, comma-separated; under a launcher its own.")
    ] = "1,2,4,8",
    objectives: Annotated[str, typer.Option(help="Objectives, comma-separated; all if left out.")] = "",
    layouts: Annotated[str, typer.Option(help="Layouts such as DP2,TP2+SP,TP2xPP2; all if left out.")] = "",
    steps: Annotated[int, typer.Option(help="Steps of each case.")] = 20,
    quick: Annotated[bool, typer.Option(help="One case for each objective and layout.")] = False,
    mutants: Annotated[bool, typer.Option(help="Seed known bugs instead, and say which check sees each.")] = False,
    resume: Annotated[bool, typer.Option(help="Save under each layout and go on under every other instead.")] = False,
    output: Annotated[
        str | None, typer.Option("--out", help="Also write every case here (Markdown), and go on where this file stops.")
    ] = None,
) -> None:
    """Train small models for every objective under every layout and print their distance from plain PyTorch."""
    from ds_pretrain.evaluation import parity as check
    from ds_pretrain.evaluation import parity_table as shown
    from ds_pretrain.parallel.launch import place

    if mutants or resume:
        _of_layouts(mutants)
        return
    sizes = [place().world] if place().world > 1 else [int(size) for size in world.split(",")]
    names, plans = ([name for name in text.split(",") if name] for text in (objectives, layouts))
    record = shown.Record(Path(output), steps) if output else None
    results = check.run(sizes, names, plans, steps, quick, record)
    if results is None:
        return
    out.print(shown.table(results))
    for line in shown.left_out(case for size in sizes for case in check.cases(size, names, plans)):
        out.print(line)
    if record:
        record.finish()
    if not all(result.passed for result in results):
        raise typer.Exit(1)


def _of_layouts(seeded: bool) -> None:
    """Seeded bugs and the checks that see them, or checkpoints that change their layout."""
    from ds_pretrain.evaluation import elastic, mutants
    from ds_pretrain.parallel.launch import place

    if place().world > 1:
        raise ValueError(f"this starts its own ranks, the job has {place().world}: start it without a launcher")
    if seeded:
        caught = mutants.run()
        out.print(mutants.table(caught))
        sound = all(result.by for result in caught)
    else:
        resumed = elastic.run(RESUMED)
        out.print(elastic.table(resumed, RESUMED))
        sound = all(result.passed for result in resumed)
    if not sound:
        raise typer.Exit(1)


def _determine() -> None:
    """No kernel whose sums have an order of their own; an operation that has no other ends the run with its name."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@scaling.command()
def fit(
    table: Annotated[str, typer.Argument(help="CSV or parquet, as `sweep collect` writes it; its curves.csv serves too.")],
    size: Annotated[str, typer.Option(help="N: parameters (without embeddings) or parameters_total.")] = "parameters",
    column: Annotated[
        list[str] | None, typer.Option(help="A column's name here, as loss=val_loss; repeat it for more.")
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="FLOPs to spend best; repeat it for more.")] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the runs, those of most compute, to predict from the others.")
    ] = 0.2,
    resamples: Annotated[int, typer.Option(help="Of the runs, for the intervals.")] = 500,
    output: Annotated[
        str | None, typer.Option("--out", help="Folder of report and pictures; scaling/ beside the table.")
    ] = None,
) -> None:
    """Fit the laws of Kaplan and of Chinchilla (three ways), for each objective, with intervals and held-out errors."""
    import json

    from ds_pretrain.evaluation import scaling as laws
    from ds_pretrain.evaluation import scaling_plot

    if size not in laws.SIZES:
        raise ValueError(unknown("--size", size, laws.SIZES))
    if wrong := [pair for pair in column or [] if "=" not in pair]:
        raise ValueError(f"--column {wrong[0]}: write OURS=THEIRS, such as loss=val_loss")
    names = dict(pair.split("=", 1) for pair in column or [])
    report = laws.fit(laws.read(table, names, size), budget or [], resamples, held_out=held_out)  # type: ignore[arg-type]
    for each in report.tables():
        out.print(each)
    folder = Path(output or Path(table).parent / "scaling")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    for picture in scaling_plot.draw(report, folder):
        out.print(f"picture: {picture}")


@bench.command(name="scaling")
def bench_scaling(
    run: Run,
    overrides: Overrides = None,
    layouts: Annotated[
        str, typer.Option(help="Layouts, comma-separated; under a launcher those of its world size.")
    ] = "1,DP2,TP2,PP2",
    kind: Annotated[str, typer.Option(help="strong: the rows of a step stay; weak: those of a data rank.")] = "strong",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each that count.")] = 20,
    save: Annotated[
        Path | None, typer.Option("--out", help="JSON to add the points to; `plan --measured` predicts from it.")
    ] = None,
) -> None:
    """Train a run on several world sizes and layouts: speed, efficiency and bytes sent, beside what is predicted of each."""
    from ds_pretrain import efficiency
    from ds_pretrain.planning.points import save as write_points

    if kind not in ("strong", "weak"):
        raise ValueError(unknown("--kind", kind, ("strong", "weak")))
    points = efficiency.run(load_run(run, overrides or []), layouts.split(","), kind, steps)  # type: ignore[arg-type]
    if points and save:
        points = write_points(points, save)
    for table in efficiency.tables(points, kind) if points else ():  # type: ignore[arg-type]
        out.print(table)


def _output_of(command: list[str]) -> Path:
    """Where a command that was given to a launcher trains."""
    match command:
        case ["train", run, *overrides]:
            if output := load_run(run, overrides).output:
                return Path(output)
            err.print(f"{run} is not started again: it has no output, so it would begin anew")
        case ["sweep", "cell", name, which]:
            return read_sweep(name).find(which).folder
    raise typer.Exit(1)


def _debug(dataset: Any, config: RunConfig) -> None:
    import torch

    from ds_pretrain.parallel.launch import place

    if place().world != 1:
        raise ValueError(f"--debug is for one process, this job has {place().world}: start it without a launcher")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autograd.set_detect_anomaly(True)
    _preview(dataset, 1, None)
    out.print(f"debug: {config.train.max_steps} steps; step in with  python -m pdb -m ds_pretrain train ... --debug")


def _preview(dataset: Any, rows: int, png: str | None) -> None:
    from ds_pretrain.data.preview import preview as render
    from ds_pretrain.data.preview_plot import attention_png

    taken, _ = dataset.rows(dataset.first, rows)
    batch = dataset.collate(taken)
    out.print(render(batch, dataset.vocab, dataset.tokenizer.token, dataset.objective.heads, rows))
    if png:
        attention_png(batch, Path(png))
        out.print(f"attention pattern: {png}")


def _known(target: str) -> None:
    """ValueError naming the nearest objective and the nearest run, if it is neither a run file nor the name of one."""
    import difflib

    from ds_pretrain.objectives import REGISTRY

    known = {"objective": list(REGISTRY), "run": sorted(path.stem for path in (configs() / "runs").glob("*.yaml"))}
    if target.removesuffix(".yaml") in known["run"] or Path(target).is_file() or Path(target).parent != Path("."):
        return
    near = [(kind, difflib.get_close_matches(target, names, n=1, cutoff=0.5)) for kind, names in known.items()]
    hint = " or ".join(f"the {kind} {found[0]!r}" for kind, found in near if found)
    told = "; ".join(f"{kind}s: {', '.join(names)}" for kind, names in known.items())
    what = f"unknown objective or run {target!r}" if target else "name an objective or a run, or use --all"
    raise ValueError(f"{what}{f': did you mean {hint}?' if hint else '.'} Known {told}")


def _samples(name: str, overrides: list[str], text: list[str] | None, run: str | None) -> tuple[Any, Any]:
    """The stream of an objective's examples, and the tokenizer that reads them."""
    from ds_pretrain.data import preview_objective
    from ds_pretrain.data.dataset import PretrainingDataset
    from ds_pretrain.data.tokenizer import TextTokenizer

    file = run or "quickstart"
    own = load_run(file).objective.get("name") == name and run is not None  # then its fields stay
    given = [] if own else [f"objective={{name: {name}}}"]
    config = load_run(file, [*given, *([] if run else [f"batch.seq_len={PREVIEWED}"]), *overrides])
    if config.objective.get("name") != name:
        raise ValueError(f"objective.name={config.objective.get('name')} contradicts {name}: leave it out")
    try:
        objective = config.make_objective()
    except TypeError as error:
        raise ValueError(f"objective {name}: {error}") from error
    folder = Path(config.data.tokenizer or Path(config.data.path) / "tokenizer")
    if run and not text:
        if not (Path(config.data.path) / "train.idx").is_file():
            raise ValueError(f"data.path {config.data.path} holds no prepared data: use --text, or leave out --run {run}")
        tokenizer = TextTokenizer.load(folder)
        data = PretrainingDataset(config.data.path, tokenizer, config.batch.seq_len, objective, "train", config.seed)
        return data, tokenizer
    if not run and not folder.exists():
        err.print(f"[dim]there is no {folder} yet: a small tokenizer stands in, trained on the help texts of Python[/dim]")
    tokenizer = TextTokenizer.load(folder) if run else preview_objective.tokenizer_at(folder)
    texts = text or preview_objective.TEXTS
    return preview_objective.samples_of(texts, tokenizer, config.batch.seq_len, objective, config.seed), tokenizer


def _draw(output: Path) -> None:
    """The learning curve of a run, with the baselines of its last evaluation."""
    import json

    from ds_pretrain.evaluation.plots import learning_curve

    (output / "plots").mkdir(exist_ok=True)
    lines: dict[str, float] = {}
    for file in sorted(output.glob("eval-*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        lines |= {name: score["loss"] for name, score in found.items() if " at step " not in name}
    learning_curve(output / "metrics.jsonl", output / "plots" / "learning_curve.png", lines)


def _keys(title: str, keys: list[tuple[str, str, str]]) -> Table:
    table = Table("key", "default", "meaning", title=title, title_justify="left")
    for row in keys:
        table.add_row(*map(escape, row))
    return table


def _preset_line(model: Any) -> str:
    size = f"{model.count_parameters() / 1e6:,.0f}M parameters at 50,257 ids"
    return f"{size}: {model.layers} layers, {model.hidden} wide, {model.heads} heads"


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _speaks() -> bool:
    """Whether this is the first rank of its node, or its launcher says nothing sound."""
    from ds_pretrain.parallel.launch import place

    try:
        return place().local_rank == 0
    except ValueError:
        return True


def main() -> None:
    """Run a command; what it ends with is in `core/exits.py`."""
    from ds_pretrain.training.signals import InterruptedRun

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]  # deepspeed adds it; we read LOCAL_RANK
    try:
        app()
    except (ValueError, ArithmeticError, OSError, InterruptedRun) as error:
        if "--debug" in sys.argv:
            raise
        asked = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
        code: dict[type[Exception] | tuple[type[Exception], ...], int] = {
            BusyError: BUSY, ValueError: MISTAKE, asked: MISTAKE, OSError: FAILED, ArithmeticError: DIVERGED,
        }  # fmt: skip
        if _speaks() or not isinstance(error, (ConfigError, InterruptedRun)):  # which are the same on a node's ranks
            kind = "" if getattr(error, "exit_code", 1) == 0 else "[bold red]error[/bold red] "
            err.print(f"{kind}{escape(str(error))}", soft_wrap=True)
        sys.exit(next((number for kind, number in code.items() if isinstance(error, kind)), getattr(error, "exit_code", 1)))


if __name__ == "__main__":
    main()
