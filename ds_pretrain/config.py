"""The run file: YAML plus `a.b=c` overrides, checked as a whole before a device is asked for.

Every error is found in one go and told with its numbers and its fix. DeepSpeed's JSON stays DeepSpeed's JSON: it decides
stage, precision and offload, and the values it marks "auto" are filled in from the run.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from dataclasses import Field as DataclassField
from dataclasses import fields as dataclass_fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_pretrain.core.registry import unknown
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import REGISTRY, Objective, create
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.training import deepspeed_json
from ds_pretrain.training.optimizer import OptimizerConfig

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class ConfigError(ValueError):
    """Everything that is wrong with a run, one line each."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{where}: {len(self.problems)} problem{'s' * (len(self.problems) > 1)}\n{lines}")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """What to read."""

    path: str
    """Folder that `ds-pretrain prepare` wrote: trained on, unless `mix` says otherwise, evaluated on, its tokenizer used."""
    mix: dict[str, float] = Field(default_factory=dict)
    """Folders to train on and their shares, e.g. {data/medicine: 0.9, data/general: 0.1}; they may change in mid-run."""
    mix_by: Literal["tokens", "samples"] = "tokens"
    """What `mix` has shares of."""
    tokenizer: str | None = None
    """Tokenizer folder; None: the one in `path`."""


class BatchConfig(_Section):
    """How much of it makes a step."""

    global_size: int = Field(32, ge=1)
    """Rows of one step, over all data ranks and micro-batches."""
    micro_size: int | None = Field(None, ge=1)
    """Rows of one micro-batch; None: a data rank's rows in one."""
    seq_len: int = Field(256, ge=8)
    """Positions of a row."""
    lengths: dict[int, int] = {}
    """Curriculum: pieces consumed to the most positions of an example from there on, e.g. {0: 64, 20000: 256}."""

    def micro_batches(self, data: int) -> tuple[int, int]:
        """Rows of a micro-batch and micro-batches of a step, on each of so many data ranks."""
        rows = self.micro_size or max(1, self.global_size // data)
        return rows, max(1, self.global_size // (rows * data))


class ParallelConfig(_Section):
    """The layout; ranks that are left over are data parallel."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    sequence: bool = False
    """Divide activations over the tensor ranks along the sequence."""
    context: int = Field(1, ge=1)
    """Ranks that share each row, for sequences too long for one (DeepSpeed Ulysses)."""

    def plan(self) -> ParallelPlan:
        return ParallelPlan(**self.model_dump())


class DeepSpeedConfig(_Section):
    """Which engine regime."""

    config: str = "zero1_fp32.json"
    """DeepSpeed JSON: a path, or a name in ds_configs/deepspeed."""


class TrainConfig(_Section):
    """How long, and what is kept on the way."""

    max_steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run."""
    eval_every: int = Field(0, ge=0)
    """Evaluate on the validation split every so many steps; 0: never."""
    eval_tokens: int | None = Field(1 << 20, ge=1)
    """Tokens of one evaluation at most (whole documents); None: the whole split."""
    save_every: int = Field(0, ge=0)
    """Checkpoint every so many steps; 0: only at the end."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep."""
    log_every: int = Field(1, ge=1)
    """Write a metrics line every so many steps."""
    check_every: int = Field(1000, ge=0)
    """Compare what ranks must hold alike after the first step of a start or resume and every so many steps; 0: never."""
    watchdog_seconds: float = Field(1800, ge=0)
    """End the job with all stacks where a rank makes no step, evaluation or checkpoint for so long; 0: never."""
    max_minutes: float | None = Field(None, gt=0)
    """Stop with a checkpoint after so many minutes of training; the same command goes on from there."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each transformer layer (needs a compiler)."""


class RunConfig(_Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    objective: dict[str, Any] = {"name": "clm"}
    """`name` and the objective's own fields."""
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    train: TrainConfig = TrainConfig()
    init: str | None = None
    """Begin with the weights of this output folder, of a run or of `ds-pretrain import`, and with the shape of its model where
    the run gives none; optimizer, data and steps begin anew."""
    output: str | None = "runs/default"
    """Folder of run.yaml, metrics.jsonl, checkpoints/ and plots/; null writes nothing."""
    seed: int = Field(0, ge=0)
    """Of weights, order, masks and dropout."""

    def make_objective(self) -> Objective:
        return create(**self.objective)

    def check(self, world: int, vocab_size: int | None = None, here: bool = True) -> list[str]:
        """Every contradiction between the fields for a job of `world` ranks, on this machine or on some, with numbers and
        fixes."""
        return [
            *self.model.problems(),
            *self._check_objective(),
            *self._check_layout(world),
            *self._check_engine(here),
            *self._check_sizes(vocab_size),
        ]

    def _check_objective(self) -> Iterator[str]:
        try:
            objective = self.make_objective()
        except (ValueError, TypeError) as error:
            yield f"objective: {error}"
            return
        if self.model.norm_position == "post" and objective.kind == "causal":
            yield (
                f"model.norm_position post (BERT) is an encoder's, objective {objective.name} is causal: use a gpt or llama "
                "preset, or model.norm_position=pre"
            )
        if objective.token_types > self.model.token_types:
            yield (
                f"objective {objective.name} uses {objective.token_types} token types, model.token_types is "
                f"{self.model.token_types}: use a bert preset, or model.token_types={objective.token_types}"
            )
        if objective.generator:
            small = self.model.narrower(objective.generator[1])
            for problem in small.undividable(self.parallel.plan(), self.batch.seq_len):
                if problem.startswith("model."):  # what is said of the rest is said of the model itself
                    yield f"the generator of {objective.name}: {problem}, or raise objective.generator_size"

    def _check_layout(self, world: int) -> Iterator[str]:
        plan, b = self.parallel.plan(), self.batch
        yield from self.model.undividable(plan, b.seq_len)
        if world % plan.unit:
            yield (
                f"{world} rank{'s' * (world > 1)}: not a multiple of {plan.product()} = {plan.unit}: start that many, with "
                f"launchers/local.sh -n {plan.unit} on this machine, or lower them"
            )
            return
        data = world // plan.unit
        unit = data * (b.micro_size or 1)
        if b.global_size % unit:
            yield (
                f"batch.global_size {b.global_size} is not divisible by {data} data ranks x batch.micro_size "
                f"{b.micro_size or 1} = {unit}: use {max(1, round(b.global_size / unit)) * unit}"
            )

    def _check_engine(self, here: bool) -> Iterator[str]:
        try:
            config = self.deepspeed_json()
        except ValueError as error:
            yield str(error)
            return
        yield from deepspeed_json.problems(config, self.parallel.pipeline, here)

    def _check_sizes(self, vocab_size: int | None) -> Iterator[str]:
        o, steps = self.optimizer, self.train.max_steps
        yield from self.model.misfits(vocab_size, self.batch.seq_len)
        if o.warmup_steps >= steps:
            yield (
                f"optimizer.warmup_steps {o.warmup_steps} is not below train.max_steps {steps}: add "
                f"optimizer.warmup_steps={steps // 10}"
            )
        if o.min_lr > o.lr:
            yield f"optimizer.min_lr {o.min_lr} is above optimizer.lr {o.lr}: add optimizer.min_lr={o.lr / 10:g}"

    def deepspeed_json(self) -> dict[str, Any]:
        """The DeepSpeed configuration as it stands in its file. ValueError naming the file if it is none."""
        return deepspeed_json.read(find(self.deepspeed.config, "deepspeed", ".json"))


def find(name: str, kind: str, suffix: str) -> Path:
    """A file by path, or by name among those that come with the project (`ds_configs/KIND`)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = configs() / kind
    for candidate in (shipped / name, shipped / f"{name}{suffix}"):
        if candidate.is_file():
            return candidate
    if path.parent != Path("."):
        raise ValueError(f"{path}: no such file")
    raise ValueError(unknown(f"{kind.removesuffix('s')} configuration", name, (p.stem for p in shipped.glob(f"*{suffix}"))))


def configs() -> Path:
    """The folder of shipped configurations: beside the package in a checkout, inside it when installed."""
    package = Path(str(resources.files("ds_pretrain")))
    beside = package.parent / "ds_configs"
    return beside if beside.is_dir() else package / "ds_configs"


def load_run(name: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """A run file (path or shipped name) with overrides, as texts a.b=c or as values by a.b. ConfigError lists everything that
    does not parse."""
    path = find(name, "runs", ".yaml")
    values = sections(path)
    where = f"{path}{' with overrides' * bool(overrides)}"
    settings = overrides if isinstance(overrides, Mapping) else dict(_setting(text, where) for text in overrides)
    for key, value in settings.items():
        _set(values, key.split("."), value)
    if values.get("init"):
        values["model"] = {**_shape_of(values, where), **(values.get("model") or {})}
    return parse_run(numbers(values), where)


def sections(path: Path) -> dict[str, Any]:
    """A run file as it is written. ConfigError if it is no mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"not readable as YAML: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["a run file is a mapping of sections (model, objective, data, ...)"])
    return values


def _shape_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The model that a run begins with, as its newest checkpoint tells it; that of its own output where there is one."""
    from ds_pretrain.training import checkpoint

    folder, model = str(values["init"]), values.get("model") or {}
    if not isinstance(model, Mapping) or "preset" in model:
        raise ConfigError(where, [f"init {folder} tells the model's shape: leave out model.preset, or init"])
    folders = [str(values[name]) for name in ("output", "init") if values.get(name)]
    found = [step for each in folders for step in checkpoint.steps(Path(each) / "checkpoints")]
    if not found:
        raise ConfigError(
            where, [f"init {folder} has no checkpoints: give the output folder of a run that was trained or imported"]
        )
    shape: dict[str, Any] = checkpoint.first_manifest(found)["model"]
    return {name: value for name, value in shape.items() if name != "preset"}


def _setting(override: str, where: str) -> tuple[str, Any]:
    """The field and the value of an override."""
    key, sign, text = override.partition("=")
    if not sign:
        raise ConfigError(where, [f"override {override!r} must look like section.key=value"])
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(where, [f"override {override!r} is not readable as YAML: {error}"]) from error
    if isinstance(value, dict) and None in value.values():
        raise ConfigError(where, [f"override {override!r}: put a space after each colon, as in {{a: 0.9, b: 0.1}}"])
    return key, value


def parse_run(values: Mapping[str, Any], where: str = "run") -> RunConfig:
    """Values as a RunConfig; ConfigError with all errors, misspelt keys with the nearest one."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(where, [_explain(dict(e)) for e in error.errors()]) from None


def _explain(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        last = str(error["loc"][-1])
        if not error["loc"][:-1] and any(last in (f.name for f in dataclass_fields(cls)) for cls in REGISTRY.values()):
            return f"{last} is a field of an objective: write objective.{last}=..."
        name = f"key in {'.'.join(map(str, error['loc'][:-1]))}" if error["loc"][:-1] else "section"
        if meant := _elsewhere(last):
            return f"unknown {name} {last!r}: write {' or '.join(meant)}"
        return unknown(name, last, section.model_fields)
    if error["type"] == "missing":
        return f"{place} is required"
    if error["type"] in ("dict_type", "model_type") and isinstance(error["input"], str):
        inner = {"objective": "name", "model": "preset", "data": "path", "deepspeed": "config"}.get(place, "KEY")
        return f"{place} is a section: write {place}.{inner}={error['input']}"
    return f"{place}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"


def _elsewhere(key: str) -> list[str]:
    """Where a run has a key of this name, as overrides write it."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    inside = {name: kind for name, kind in sections.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
    here = [f"{key}, outside any section"] * (key in sections and key not in inside)
    return here + [f"{name}.{key}" for name, kind in inside.items() if key in kind.model_fields]


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(values.setdefault(part, {}), dict):
            raise ConfigError("overrides", [f"{part} is a section, but it is set to {values[part]!r}: write {part}.KEY=VALUE"])
        values = values[part]
    values[path[-1]] = value


def numbers(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as text; make numbers of such text."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def objective_fields(name: str) -> list[tuple[str, str, str]]:
    """The fields of an objective, as `objective.FIELD` in a run file: name, default and what its docstring says."""
    meanings: dict[str, str] = {}
    for cls in reversed(REGISTRY[name].__mro__[:-1]):
        if is_dataclass(cls):
            meanings |= _meanings(cls)
    return [(f.name, _default(f), meanings.get(f.name, "")) for f in dataclass_fields(REGISTRY[name])]


def keys_of(section: type[BaseModel], inside: str = "") -> list[tuple[str, str, str]]:
    """The keys of a file and of its sections, as overrides write them: name, default and what its docstring says."""
    meanings, found = _meanings(section), []
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        if within := [kind for kind in kinds if issubclass(kind, BaseModel)]:
            found += keys_of(within[0], f"{inside}{name}.")
        else:
            default = "required" if field.is_required() else _text(field.get_default(call_default_factory=True))
            found.append((f"{inside}{name}", default, meanings.get(name, "")))
    return found


def _meanings(cls: type) -> dict[str, str]:
    """The docstring below each field of a class."""
    body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _default(field: DataclassField[Any]) -> str:
    value = field.default if field.default is not MISSING else cast(Any, field.default_factory)()
    return "its own defaults" if is_dataclass(value) else _text(value)


def _text(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()
