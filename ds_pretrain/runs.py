"""From a run file to what runs: its data, its trainer, and afterwards its model."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_pretrain.config import ConfigError, RunConfig, load_run, parse_run, sections

log = logging.getLogger(__name__)

PREFLIGHT = 2.0
"""Seconds for the links of nodes and GPUs before a run; `doctor` takes more."""
CHECKPOINT = 12
"""Bytes of a parameter in a checkpoint: fp32 weight and two moments."""


def make_trainer(config: RunConfig, dataset: Any) -> Any:
    """The trainer that a run file describes, on nodes that are fit for it."""
    from ds_pretrain.parallel.mesh import start
    from ds_pretrain.training.trainer import PreTrainer
    from ds_pretrain.training.watchdog import Watchdog

    t, rank = config.train, start().rank  # who meets whom has a limit of its own
    if rank == 0:
        _priced(config)
    stacks = Path(config.output) / "stacks" if config.output else None
    with Watchdog(t.watchdog_seconds, rank, stacks) as watchdog:  # the trainer has its own, for when it trains
        preflight(config.output)
        watchdog.beat("the examination of nodes")
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
            watchdog_seconds=t.watchdog_seconds,
            max_minutes=t.max_minutes,
            activation_checkpointing=t.activation_checkpointing,
            compile=t.compile,
            init=config.init,
            output=config.output,
            seed=config.seed,
            facts=config.model_dump(mode="json"),
        )


def _priced(config: RunConfig) -> None:
    """Warn of a precision that this CPU only imitates."""
    import torch

    from ds_pretrain.parallel import pace
    from ds_pretrain.training.deepspeed_json import half, stage_of

    settings = config.deepspeed_json()
    times = pace.dear(torch.bfloat16) if half(settings) == "bf16" else 0.0
    if not times:
        return
    log.warning(
        "this CPU imitates bf16: its products take %.0f times as long as in fp32; use deepspeed.config=zero%d_fp32.json",
        times,
        stage_of(settings),
    )


def preflight(output: str | None) -> None:
    """Examine the nodes of a job on several GPUs or nodes, in a few seconds (collective).

    ValueError with what must be put right, by node; ConnectionError where another start may get over it.
    """
    from ds_pretrain.parallel import doctor
    from ds_pretrain.parallel.mesh import start

    where = start()
    if where.world == 1 or not doctor.several():
        return
    found = doctor.examine(Path(output) if output else None, PREFLIGHT)
    for warning in found.warnings() if where.rank == 0 else ():
        log.warning(warning)
    if wrong := found.problems():
        told = ConfigError("the nodes of this job", wrong)
        if found.cut or found.broken:  # which another start may get over
            raise ConnectionError(str(told))
        raise told


def open_run(run: str, overrides: Sequence[str] | Mapping[str, Any] | None) -> tuple[RunConfig, Any]:
    """The run and its training data; everything that is wrong with either in one error."""
    from ds_pretrain.parallel.launch import place

    config = load_run(run, overrides or [])
    refuse(run, problems(config, place().world))
    try:
        return config, training_data(config)
    except ValueError as error:
        raise ConfigError(run, str(error).split("; ")) from error


def problems(config: RunConfig, world: int) -> list[str]:
    """What is wrong with a run on so many ranks, or with the data that it names."""
    folders = [("data.path", config.data.path), *(("data.mix", folder) for folder in config.data.mix)]
    tokenizer = tokenizer_of(config)
    return [
        *config.check(world, len(tokenizer) if tokenizer else None),
        *_impatient(config),
        *(_crowded(config, Path(config.output), len(tokenizer)) if tokenizer and config.output else ()),
        *(_strangers(config, tokenizer) if tokenizer else ()),
        *(
            f"{field} {folder} holds no prepared data: {_where(Path(folder))}"
            for field, folder in folders
            if not (Path(folder) / "train.idx").is_file()
        ),
    ]


def _impatient(config: RunConfig) -> Iterator[str]:
    """Where collectives would end before the watchdog can tell who hangs."""
    from ds_pretrain.parallel.mesh import TIMEOUT

    if config.train.watchdog_seconds >= TIMEOUT.total_seconds():
        yield (
            f"train.watchdog_seconds {config.train.watchdog_seconds:g} is not below the {TIMEOUT.total_seconds():g} after "
            "which collectives end: lower it"
        )


def _crowded(config: RunConfig, output: Path, vocab: int) -> Iterator[str]:
    """Where the checkpoints that are kept, and the one that is written, do not fit the disk: weights and Adam's two moments."""
    there = len(list((output / "checkpoints").glob("step-*")))
    need, free = checkpoint_size(config, vocab) * max(1, config.train.keep + 1 - there), free_at(output)
    if need > free:
        yield (
            f"output {output} is on a disk with {free / 1e9:,.1f} GB free, checkpoints will take {need / 1e9:,.1f} GB more: "
            "choose another, or lower train.keep"
        )


def checkpoint_size(config: RunConfig, vocab: int) -> int:
    """Bytes of a checkpoint of a run with so many ids, without heads and generator."""
    model = config.model.model_copy(update={"vocab": config.model.vocab or vocab})
    return CHECKPOINT * model.model_copy(update={"positions": model.positions or config.batch.seq_len}).count_parameters()


def free_at(folder: Path) -> int:
    """Bytes that are free on the disk where a folder is, or will be."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free


def _strangers(config: RunConfig, tokenizer: Any) -> Iterator[str]:
    """Where the tokenizer is not the one that the weights or the objective ask for."""
    if config.init and (Path(config.init) / "run.yaml").is_file():
        other = tokenizer_of(run_of(config.init))
        if other is not None and other.digest != tokenizer.digest:
            yield (
                f"init {config.init} was trained with another tokenizer than {config.data.tokenizer or config.data.path} has: "
                "prepare the text with its own (--tokenizer), or resize it with tools/tokenizer.py resize"
            )
    if tokenizer.specials["<mask>"] != tokenizer.specials["<eod>"]:
        return
    with contextlib.suppress(ValueError, TypeError):  # of an objective that cannot be, which is told elsewhere
        if (objective := config.make_objective()).kind != "causal":
            yield f"objective {objective.name} needs special tokens that this tokenizer, of a causal model, lacks"


def _where(folder: Path) -> str:
    """Where the data are that a folder does not hold, or how to make them."""
    if (folder / "data" / "train.idx").is_file():  # of a chain
        return f"they are in {folder / 'data'}"
    return f"make it with ds-pretrain prepare TEXT -o {folder}"


def training_data(config: RunConfig) -> Any:
    """The rows that a run is trained on."""
    from ds_pretrain.data.dataset import PretrainingDataset
    from ds_pretrain.data.mixing import MixedDataset
    from ds_pretrain.data.tokenizer import TextTokenizer

    data, batch = config.data, config.batch
    tokenizer = TextTokenizer.load(data.tokenizer) if data.tokenizer else None
    dataset = PretrainingDataset(
        data.path, tokenizer, batch.seq_len, config.make_objective(), "train", config.seed, batch.lengths, _verify()
    )
    return MixedDataset(dataset, data.mix, data.mix_by) if data.mix else dataset


def tokenizer_of(config: RunConfig) -> Any:
    """The tokenizer that a run reads with; None before anything is prepared."""
    from ds_pretrain.data.tokenizer import TextTokenizer

    folder = Path(config.data.tokenizer or Path(config.data.path) / "tokenizer")
    return TextTokenizer.load(folder) if folder.exists() else None


def tokenizer_size(config: RunConfig) -> int | None:
    """How large a run's vocabulary is; None before anything is prepared."""
    tokenizer = tokenizer_of(config)
    return None if tokenizer is None else len(tokenizer)


def refuse(run: str, found: list[str]) -> None:
    """ConfigError where something is wrong."""
    if found:
        raise ConfigError(run, found)


def run_of(output: str | Path) -> RunConfig:
    """The settings of a run that was trained or imported. ValueError if there is none."""
    path = Path(output) / "run.yaml"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the output folder of a run that was trained or imported")
    return parse_run(_here(sections(path), Path(output)), str(path))


def _here(values: dict[str, Any], output: Path) -> dict[str, Any]:
    """Settings whose paths in the run's own folder lead there, wherever it was moved and from wherever it is looked at. Those
    that are none stay for `parse_run` to tell."""
    match values:
        case {"output": str(was), "data": dict(data)} if was:
            pass
        case _:
            return values
    paths = {name: data[name] for name in ("path", "tokenizer") if isinstance(data.get(name), str)}
    own = {name: path for name, path in paths.items() if Path(path).is_relative_to(was)}
    moved = {name: str(output / Path(path).relative_to(was)) for name, path in own.items()}
    return {**values, "output": str(output), "data": {**data, **moved}}


def load_model(output: str) -> Any:
    """The model of a run or an import."""
    from ds_pretrain.parallel.launch import place
    from ds_pretrain.parallel.plan import ParallelPlan
    from ds_pretrain.training.inference import FrozenModel

    config = run_of(output)
    tensor = config.parallel.tensor if place().world % config.parallel.tensor == 0 else 1
    return FrozenModel(output, config.make_objective(), ParallelPlan(tensor=tensor))


def own_tokenizer(output: str | Path, manifest: Mapping[str, Any]) -> Any:
    """The tokenizer of a run's checkpoint; None where none came in with its weights. ValueError if it is gone, or another than
    the manifest says, or of more ids than there are rows."""
    from ds_pretrain.models.config import ModelConfig

    config, digest = run_of(output), manifest.get("tokenizer")
    where, rows = config.data.tokenizer or f"{config.data.path}/tokenizer", ModelConfig(**manifest["model"]).vocab_size
    found = tokenizer_of(config)
    if digest and found is None:
        raise ValueError(
            f"{where} does not exist, and {output} was trained with it: go to the folder that this path counts from, or name "
            f"the tokenizer's place in {output}/run.yaml as data.tokenizer"
        )
    if found and ((digest and found.digest != digest) or len(found) > rows):
        raise ValueError(
            f"{where} is not the tokenizer that {output} was trained with: it has {len(found)} ids and digest {found.digest}, "
            f"not {rows if len(found) > rows else digest}; name the right one's folder in {output}/run.yaml as data.tokenizer"
        )
    return found


def load_tokenizer(output: str) -> Any:
    """The tokenizer that a run or an import reads with. ValueError as `own_tokenizer`, and if there is none."""
    from ds_pretrain.training import checkpoint

    found = checkpoint.steps(Path(output) / "checkpoints")
    if not found:
        raise ValueError(f"no checkpoint in {output}/checkpoints: train the run first")
    tokenizer = own_tokenizer(output, checkpoint.first_manifest(found))
    if tokenizer is None:
        raise ValueError(f"{output} came in without a tokenizer: name one in {output}/run.yaml as data.tokenizer")
    return tokenizer


def data_of(output: str) -> Any:
    """The training data of a run, whose other splits they know. ValueError if they are not there."""
    config = run_of(output)
    if not (Path(config.data.path) / "train.idx").is_file():
        tokenizer = f" --tokenizer {config.data.tokenizer}" if config.data.tokenizer else ""
        raise ValueError(
            f"{config.data.path} holds no prepared data: make it with ds-pretrain prepare TEXT -o {config.data.path}{tokenizer}"
        )
    return training_data(config)


def texts_of(output: str) -> tuple[Any, Any]:
    """The stores of a run's training and test text. ValueError where it was trained on several folders, or they are gone."""
    config = run_of(output)
    others = [folder for folder, weight in config.data.mix.items() if weight and folder != config.data.path]
    if others:
        raise ValueError(f"{output} was trained on {', '.join(others)} too (data.mix): text is counted in one folder only")
    data = data_of(output)
    return data.split("train").store, data.split("test").store


def _verify() -> Any:
    """One process of a node compares the data with their checksums."""
    from ds_pretrain.parallel.launch import place

    return "full" if place().local_rank == 0 else "sizes"
