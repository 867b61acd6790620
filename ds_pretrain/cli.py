"""The command line: names things and prints, computes nothing.

Every command runs the same by hand, under torchrun, deepspeed, srun or mpirun. A mistake of the user's ends with a message
that says what to do, exit code 2 and nothing half-written; `train --debug` lets the traceback through instead.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from ds_pretrain.config import ConfigError, RunConfig, configs, load_run, objective_fields, parse_run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pre-training objectives for language models, under any DeepSpeed and megatron-core layout.\n\n"
    "Start with: prepare a corpus, preview an objective on it, train a run, eval it, generate from it.",
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # a log is no 80 columns wide
err = Console(stderr=True, highlight=False)

ASSUMED_VOCABULARY = 32768
"""What `plan` counts with before there is a tokenizer."""
RESUMED = 50
"""Steps of which a checkpoint is in the middle, in `parity --resume`."""
PREVIEWED = 64
"""Positions of an example that `preview OBJECTIVE` shows, unless a run says otherwise."""
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides such as optimizer.lr=1e-3 parallel.tensor=2.")]
Run = Annotated[str, typer.Argument(help="A run file, or the name of one in ds_configs/runs (see `list runs`).")]
Output = Annotated[str, typer.Argument(help="The output folder of a run.")]


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files or folders (txt, jsonl, parquet, each also .gz or .zst), datasets:NAME[:CONFIG[:SPLIT]], or `embedded`."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make.")],
    vocab_size: Annotated[int, typer.Option(help="Vocabulary to train, specials and sentinels included.")] = 8192,
    kind: Annotated[str, typer.Option(help="bpe, wordpiece, unigram or sp_bpe.")] = "bpe",
    tokenizer: Annotated[str | None, typer.Option(help="Use this tokenizer instead of training one.")] = None,
    split: Annotated[str, typer.Option(help="Shares of train, validation and test.")] = "0.98,0.01,0.01",
    text_field: Annotated[str, typer.Option(help="Field of the text in jsonl and parquet.")] = "text",
) -> None:
    """Text to a tokenizer and memory-mapped stores, split by document."""
    from ds_pretrain.data.prepare import prepare as run
    from ds_pretrain.parallel.mesh import place

    if place().world > 1:
        raise ValueError(f"prepare is for one process, this job has {place().world}: start it without a launcher")
    shares = tuple(float(share) for share in split.split(","))
    run(sources, output, vocab_size=vocab_size, kind=kind, tokenizer=tokenizer, split=shares, text_field=text_field)  # type: ignore[arg-type]


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
    config, dataset = _open_run(run, overrides)
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

    model, dataset = _load(output)
    plain = model.objective.likelihood
    found: dict[str, dict[str, float]] = {}
    for objective in [model.objective, *([plain] if plain and plain != model.objective else [])]:
        part = dataset.split(split, objective.evaluated)
        scores = perplexity.evaluate(model.under(objective), part, max_tokens)
        rows = [(f"{objective.name} at step {model.snapshot.manifest['step']}", scores)]
        if baselines and objective in (plain, dataset.objective):
            rows += ngram.baselines(dataset, part, max_tokens)
        found |= {name: score.as_metrics(objective.measure) for name, score in rows}
        if model.mesh.rank == 0:
            out.print(report.table(rows, objective.measure, title=f"{output}, {split} split"))
            if scores.heads:
                out.print(report.heads_table(scores))
    if model.mesh.rank == 0:
        (Path(output) / f"eval-{split}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        _draw(Path(output))


@app.command()
def generate(
    output: Output,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep so many candidates; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this much probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0,
) -> None:
    """Continue a text with the newest checkpoint of a causal run, or of a masked diffusion run."""
    from ds_pretrain.evaluation.generate import generate as run
    from ds_pretrain.evaluation.generate import unmask

    model, dataset = _load(output)
    tokenizer, vocab = dataset.tokenizer, dataset.vocab
    start = tokenizer.encode(prompt).tolist()
    if model.objective.measure == "bound":
        ids = unmask(model, start, vocab.mask, vocab.specials, tokens, temperature, seed=seed)
    else:
        ids = list(run(model, start, vocab.eod, vocab.specials, tokens, temperature, top_k, top_p, seed))
    text = tokenizer.decode(ids)
    if model.mesh.rank == 0:
        out.print(f"[bold]{escape(prompt)}[/bold]{escape(text)}")


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
        _, dataset = _open_run(target, overrides)
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


@app.command()
def infill(
    output: Output,
    documents: Annotated[int, typer.Option(help="Documents to take a line out of.")] = 50,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    tokens: Annotated[int, typer.Option(help="Tokens of a line at most.")] = 64,
    show: Annotated[int, typer.Option(help="Attempts to print.")] = 3,
) -> None:
    """Let a fill-in-the-middle run write missing lines: how many are exact, and how much Python still parses."""
    from rich.progress import track

    from ds_pretrain.evaluation import infill as task

    model, dataset = _load(output)
    if problems := [*task.problems(model.objective), *dataset.vocab.lacks("infilling", task.NAMES)]:
        raise ValueError(problems[0])
    part = dataset.split(split)
    gaps = list(task.gaps(part, documents))
    tried = [task.infill(model, part, gap, tokens) for gap in track(gaps, "infill", console=err, disable=model.mesh.rank > 0)]
    if model.mesh.rank == 0:
        for attempt in tried[:show]:
            out.print(
                f"[dim]{escape(attempt.gap.before[-200:])}[/dim][bold green]{escape(attempt.written)}[/bold green]", end=""
            )
            out.print(
                f"[dim]{escape(attempt.gap.after[:100])}[/dim]\n  was: [cyan]{escape(attempt.gap.middle.rstrip())}[/cyan]\n"
            )
        python = [attempt for attempt in tried if attempt.gap.python]
        table = Table("lines", "exact", "Python documents", "still parse", title=f"{output}, {split} split")
        exact, parsed = sum(attempt.exact for attempt in tried), sum(attempt.parses for attempt in python)
        table.add_row(str(len(tried)), _of(exact, tried), str(len(python)), _of(parsed, python))
        out.print(table)


@app.command()
def similarity(
    output: Output,
    pairs: Annotated[str, typer.Argument(help="Lines of sentence TAB sentence TAB score.")],
) -> None:
    """Hold a run's sentence embeddings against human scores: Spearman, alignment, uniformity."""
    from ds_pretrain.evaluation import embeddings

    model, dataset = _load(output)
    found = embeddings.similarity(_embedder(model, dataset), embeddings.read_scores(pairs))
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

    model, dataset = _load(output)
    rows = [(text, label) for text, label in embeddings.read_table(texts, 2)]
    found = embeddings.probe(_embedder(model, dataset), _embedder(model.untrained(), dataset), rows)
    if model.mesh.rank == 0:
        table = Table("features", "held-out accuracy", title=f"{output}, {texts}: {found.train} to fit, {found.test} held out")
        for name, share in (("this run", found.accuracy), ("untrained", found.untrained), ("majority", found.majority)):
            table.add_row(name, f"{share:.2%}")
        out.print(table)


@app.command()
def plan(
    run: Run,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option(min=1, help="Ranks to plan for.")] = 1,
) -> None:
    """Who sits where, parameters, memory and batch arithmetic for any number of ranks; needs no GPU."""
    from ds_pretrain.planning import tables

    config = load_run(run, overrides or [])
    _refuse(run, config.check(world))
    size = _tokenizer_size(config)
    if size is None and config.model.vocab is None:
        size = ASSUMED_VOCABULARY
        out.print(f"{config.data.path} holds no tokenizer yet: a vocabulary of {size:,} is assumed (or give model.vocab)")
    for table in tables(config, world, size):
        out.print(table)


@app.command(name="list")
def list_(
    what: Annotated[
        str, typer.Argument(help="objectives, presets, runs or deepspeed, or one objective; all if left out.")
    ] = "",
) -> None:
    """What there is: objectives with their fields, model presets, run files, DeepSpeed configurations. Of one objective, what
    each field means."""
    from ds_pretrain.core.registry import unknown
    from ds_pretrain.models.config import ModelConfig
    from ds_pretrain.models.presets import PRESETS
    from ds_pretrain.objectives import REGISTRY

    sections: dict[str, list[tuple[str, str]]] = {
        "objectives": [(name, ", ".join(f"{key}={value}" for key, value, _ in objective_fields(name))) for name in REGISTRY],
        "presets": [(name, _preset_line(ModelConfig(preset=name, vocab=50257))) for name in PRESETS],
        "runs": [(path.stem, _first_comment(path)) for path in sorted((configs() / "runs").glob("*.yaml"))],
        "deepspeed": [(path.name, "") for path in sorted((configs() / "deepspeed").glob("*.json"))],
    }
    if what in REGISTRY:
        table = Table(
            "field", "default", "meaning", title=(REGISTRY[what].__doc__ or "").partition("\n")[0], title_justify="left"
        )
        for key, value, meaning in objective_fields(what):
            table.add_row(f"objective.{key}", escape(value), escape(meaning))
        out.print(table)
        return
    if what and what not in sections:
        raise ValueError(unknown("list", what, [*sections, *REGISTRY]))
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
    from ds_pretrain.parallel.mesh import place

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
    from ds_pretrain.parallel.mesh import place

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


def make_trainer(config: RunConfig, dataset: Any) -> Any:
    """The trainer that a run file describes."""
    from ds_pretrain.training.trainer import PreTrainer

    t = config.train
    return PreTrainer(
        model=config.model,
        objective=dataset.objective,
        dataset=dataset,
        plan=config.parallel.plan(),
        batch_size=config.batch.global_size,
        micro_batch_size=config.batch.micro_size,
        max_steps=t.max_steps,
        optimizer=config.optimizer,
        deepspeed=config.deepspeed_json(),
        eval_every=t.eval_every,
        eval_tokens=t.eval_tokens,
        save_every=t.save_every,
        keep=t.keep,
        log_every=t.log_every,
        check_every=t.check_every,
        activation_checkpointing=t.activation_checkpointing,
        compile=t.compile,
        output=config.output,
        seed=config.seed,
        facts=config.model_dump(mode="json"),
    )


def _open_run(run: str, overrides: list[str] | None) -> tuple[RunConfig, Any]:
    """The run and its training data; everything that is wrong with either in one error."""
    from ds_pretrain.data.dataset import PretrainingDataset
    from ds_pretrain.data.mixing import MixedDataset
    from ds_pretrain.data.tokenizer import TextTokenizer
    from ds_pretrain.parallel.mesh import place

    config = load_run(run, overrides or [])
    problems = config.check(place().world, _tokenizer_size(config))
    folders = [("data.path", config.data.path), *(("data.mix", folder) for folder in config.data.mix)]
    problems += [
        f"{field} {folder} holds no prepared data: make it with ds-pretrain prepare TEXT -o {folder}"
        for field, folder in folders
        if not (Path(folder) / "train.idx").is_file()
    ]
    _refuse(run, problems)
    tokenizer = TextTokenizer.load(config.data.tokenizer) if config.data.tokenizer else None
    try:
        dataset = PretrainingDataset(
            config.data.path,
            tokenizer,
            config.batch.seq_len,
            config.make_objective(),
            "train",
            config.seed,
            config.batch.lengths,
            _verify(),
        )
        mixed = MixedDataset(dataset, config.data.mix, config.data.mix_by) if config.data.mix else dataset
    except ValueError as error:
        raise ConfigError(run, str(error).split("; ")) from error
    return config, mixed


def _embedder(model: Any, dataset: Any) -> Any:
    """Texts to embeddings, framed as the encoder has seen them and cut to its length."""
    vocab, encoder = dataset.vocab, model.objective.kind != "causal"
    room = dataset.seq_len - 2

    def embed(texts: list[str]) -> Any:
        found = [ids[:room].tolist() for ids in dataset.tokenizer.encode_batch(texts)]
        return model.embed([[vocab.cls, *ids, vocab.sep] if encoder else [vocab.eod, *ids] for ids in found])

    return embed


def _of(part: int, whole: list) -> str:
    return f"{part} ({part / len(whole):.1%})" if whole else "-"


def _tokenizer_size(config: RunConfig) -> int | None:
    from ds_pretrain.data.tokenizer import TextTokenizer

    folder = Path(config.data.tokenizer or Path(config.data.path) / "tokenizer")
    return len(TextTokenizer.load(folder)) if folder.exists() else None


def _refuse(run: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError(run, problems)


def _load(output: str) -> tuple[Any, Any]:
    """A finished run's model and its dataset."""
    import yaml

    from ds_pretrain.data.dataset import PretrainingDataset
    from ds_pretrain.data.tokenizer import TextTokenizer
    from ds_pretrain.parallel.mesh import place
    from ds_pretrain.parallel.plan import ParallelPlan
    from ds_pretrain.training.inference import FrozenModel

    path = Path(output) / "run.yaml"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the output folder of a run that was trained")
    config = parse_run(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    objective = config.make_objective()
    tokenizer = TextTokenizer.load(config.data.tokenizer) if config.data.tokenizer else None
    dataset = PretrainingDataset(
        config.data.path, tokenizer, config.batch.seq_len, objective, "train", config.seed, verify=_verify()
    )
    tensor = config.parallel.tensor if place().world % config.parallel.tensor == 0 else 1
    return FrozenModel(output, objective, ParallelPlan(tensor=tensor)), dataset


def _verify() -> Any:
    """One process of a node compares the data with their checksums."""
    from ds_pretrain.parallel.mesh import place

    return "full" if place().local_rank == 0 else "sizes"


def _determine() -> None:
    """No kernel whose sums have an order of their own; an operation that has no other ends the run with its name."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _debug(dataset: Any, config: RunConfig) -> None:
    import torch

    from ds_pretrain.parallel.mesh import place

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


def _preset_line(model: Any) -> str:
    size = f"{model.count_parameters() / 1e6:,.0f}M parameters at 50,257 ids"
    return f"{size}: {model.layers} layers, {model.hidden} wide, {model.heads} heads"


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def main() -> None:
    """Run a command; user mistakes end with a message and exit code 2, divergence with 3, a signal with 128 + its number."""
    from ds_pretrain.parallel.mesh import place
    from ds_pretrain.training.signals import InterruptedRun

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]  # deepspeed adds it; we read LOCAL_RANK
    try:
        app()
    except (ValueError, ArithmeticError, OSError, InterruptedRun) as error:
        if "--debug" in sys.argv:
            raise
        code: dict[type[Exception], int] = {ValueError: 2, OSError: 2, ArithmeticError: 3}
        if place().local_rank == 0 or not isinstance(error, (ConfigError, InterruptedRun)):  # the same on a node's ranks
            err.print(f"[bold red]error[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(next((number for kind, number in code.items() if isinstance(error, kind)), getattr(error, "exit_code", 1)))


if __name__ == "__main__":
    main()
