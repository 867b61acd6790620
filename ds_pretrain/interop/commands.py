"""`ds-pretrain import` and `ds-pretrain export`: whole folders, with what goes along with weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from ds_pretrain.core.files import appearing, whole
from ds_pretrain.core.pooling import Sentences, pooling_in
from ds_pretrain.core.registry import unknown
from ds_pretrain.data.tokenizer import ENGINES, TextTokenizer
from ds_pretrain.evaluation.reference import parameter_shapes
from ds_pretrain.interop.card import card
from ds_pretrain.interop.folder import SHARD
from ds_pretrain.interop.origin import known_tokens, origin_of
from ds_pretrain.interop.tokenizer import save_tokenizer, special_ids
from ds_pretrain.interop.transfer import PRECISIONS, Arrival, Precision, hand_out, name_of
from ds_pretrain.runs import own_tokenizer, run_of
from ds_pretrain.training import checkpoint
from ds_pretrain.training.checkpoint import Snapshot

log = logging.getLogger(__name__)
ROW = 2048
"""Positions of the rows that an imported model is evaluated on, where it has as many."""


def bring_in(
    folder: Path, output: Path, generator: Path | None = None, objective: str | None = None, pickles: bool = False
) -> Arrival:
    """Make `output` the output folder of a run that begins with the weights of `folder`: a checkpoint of step 0, run.yaml, and
    the tokenizer where there is one. ValueError with what is wrong, and then nothing is left."""
    arrival = Arrival.of(folder, generator, objective, pickles)
    main = arrival.sources[0].stored.folder
    origin = origin_of(main, arrival.config)
    tokenizer = _tokenizer(main, arrival, origin)
    origin |= {"ids": len(tokenizer)} if tokenizer else {}
    with appearing(output) as attempt:
        facts = {"objective": arrival.objective.name, "data": None, "cursor": None, "origin": origin}
        arrival.save(attempt, {**facts, "tokenizer": tokenizer.digest if tokenizer else None})
        if tokenizer:
            tokenizer.save(attempt / "tokenizer")
        _write_yaml(attempt / "run.yaml", _run_of(arrival, output, tokenizer is not None))
    return arrival


def _tokenizer(folder: Path, arrival: Arrival, origin: Mapping[str, Any]) -> TextTokenizer | None:
    """The folder's tokenizer, whose ids must all have a row."""
    if not any((folder / name).is_file() for name in ENGINES):
        return None
    causal = arrival.objective.kind == "causal"
    known = known_tokens(folder, origin, arrival.config) if causal else {}
    tokenizer = TextTokenizer.load(folder, stand_in=causal, known=known)
    if len(tokenizer) > arrival.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} ids, the embedding {arrival.model.vocab_size} rows: they are of "
            "two models, or the tokenizer was extended without the embedding"
        )
    return tokenizer


def _run_of(arrival: Arrival, output: Path, tokenizer: bool) -> dict[str, Any]:
    """A run file for what came in; its data are yet to be made."""
    fields = {"name": arrival.objective.name}
    if arrival.objective.generator:
        fields["generator_size"] = arrival.objective.generator[1]  # type: ignore[assignment]
    data = {"path": str(output / "data"), **({"tokenizer": str(output / "tokenizer")} if tokenizer else {})}
    batch = {"seq_len": min(arrival.model.positions or ROW, ROW)}
    model = arrival.model.model_dump(mode="json")
    return {"model": model, "objective": fields, "data": data, "batch": batch, "output": str(output)}


def _write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    with whole(path) as file:
        file.write(yaml.safe_dump(dict(values), sort_keys=False).encode())


def told(arrival: Arrival, output: Path) -> Table:
    """What came in."""
    model = arrival.model
    table = Table("", "", title=f"{output}: from {arrival.config['model_type']}", show_header=False, title_justify="left")
    shapes = parameter_shapes(model, arrival.objective)
    table.add_row("parameters", f"{sum(map(math.prod, shapes.values())):,}")
    table.add_row("shape", f"{model.layers} layers, {model.hidden} wide, {model.heads} heads, {model.vocab_size:,} ids")
    table.add_row("objective", arrival.objective.name)
    if not (output / "tokenizer").is_dir():
        table.add_row("tokenizer", "none came with it (no tokenizer.json or tokenizer.model): give the one it had")
    if arrival.fresh:
        table.add_row("not in the folder, begin anew", "\n".join(arrival.fresh))
    if arrival.left_out:
        table.add_row("left out: heads of another objective", "\n".join(arrival.left_out))
    return table


def send_out(
    output: Path, folder: Path, precision: str | None = None, step: str | None = None, shard: int = SHARD
) -> list[Path]:
    """Write a run's newest sound checkpoint (or the one named `step`) as folders of transformers; returns them.

    precision: of the tensors; None: as they came in, fp32 where they were trained. ValueError if nothing there computes what
    the model does, or if `folder` is not empty.
    """
    if precision and precision not in PRECISIONS:
        raise ValueError(unknown("--dtype", precision, PRECISIONS))
    config, path = run_of(output), output / "checkpoints" / step if step else checkpoint.newest(output / "checkpoints")
    if path is None:
        raise ValueError(f"no checkpoint in {output / 'checkpoints'}: train the run first")
    if step and (found := checkpoint.damages(path)):
        raise ValueError(f"{path} is not a sound checkpoint: {found[0]}")
    snapshot, objective = Snapshot(path), config.make_objective()
    came = snapshot.manifest.get("imported", {}).get("precision")
    kept = Precision.read(came) if came and not precision else Precision(PRECISIONS[precision or "float32"])
    tokenizer = own_tokenizer(output, snapshot.manifest)
    with appearing(folder) as attempt:
        origin = snapshot.manifest.get("origin", {})
        generation = origin.get("generation", {})
        extra = special_ids(tokenizer, generation) if tokenizer else _ids_of(snapshot.manifest)
        sides = hand_out(snapshot, objective, attempt, extra, kept, shard)
        for place in sides:
            if tokenizer:
                limit = {"model_max_length": positions} if (positions := snapshot.manifest["model"]["positions"]) else {}
                save_tokenizer(tokenizer, objective, attempt / place, {**limit, **origin.get("tokenizer", {})})
            if objective.kind == "causal":
                said = {**generation, **extra} if tokenizer else {**extra, **generation}
                (attempt / place / "generation_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        if objective.kind == "full":
            pooling = pooling_in(snapshot.manifest, objective.pooling)
            _sentence_model(attempt / next(iter(sides)), Sentences(**{**origin.get("sentences", {}), "pooling": pooling}))
        if not tokenizer:
            log.warning("no tokenizer came in with %s: the folder goes out without one, put it in yourself", output)
        (attempt / "README.md").write_text(card(output, config, snapshot, sides, name_of(kept.most)), encoding="utf-8")
    return [folder / place for place in sides]


def _ids_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The special ids of the config that came in, which stand where no tokenizer says any."""
    config = manifest.get("imported", {}).get("config", {})
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def _sentence_model(folder: Path, said: Sentences) -> None:
    """What sentence-transformers asks for, to embed a text as `ds-pretrain embed` does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    modes = {"pooling_mode_cls_token": said.pooling == "cls", "pooling_mode_mean_tokens": said.pooling == "mean"}
    pooling = {"word_embedding_dimension": config["hidden_size"], **modes}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2), encoding="utf-8")
    if said.tokens:
        tokens = min(said.tokens, config["max_position_embeddings"])
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": tokens}), encoding="utf-8")
    modules = MODULES if said.unit else MODULES[:2]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")
