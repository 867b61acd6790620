"""What comes in computes what `transformers` computes, under every way to divide a model, and is trained on from there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import theirs
import torch
import torch.nn.functional as F
import transformers

from ds_pretrain.data.dataset import Cursor
from ds_pretrain.data.loader import Loader
from ds_pretrain.interop.commands import bring_in, send_out
from ds_pretrain.objectives import Objective
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.planning.memory import random_text
from ds_pretrain.runs import run_of
from ds_pretrain.training import checkpoint, deepspeed_json
from ds_pretrain.training.checkpoint import Snapshot
from ds_pretrain.training.engine import build_for, create_engine
from ds_pretrain.training.optimizer import OptimizerConfig

LENGTH, ROWS = 32, 4
LAYOUTS = {"1": ParallelPlan(), "TP2": ParallelPlan(tensor=2), "PP2": ParallelPlan(pipeline=2)}
ZERO = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000}}


@dataclass
class Listener:
    """An objective that keeps what each head answers everywhere."""

    objective: Objective
    found: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def heads(self):
        return self.objective.heads

    def loss(self, read, batch, comm) -> Mapping[str, torch.Tensor]:
        everywhere = torch.ones_like(batch.inputs, dtype=torch.bool)
        for head in self.objective.heads:
            if head.classes:
                self.found[head.name] = read._classes(head.name, everywhere).detach().view(*batch.inputs.shape, -1)
            elif head.classes == 0:
                self.found[head.name] = read.embed(head.name, everywhere).detach().view(*batch.inputs.shape, -1)
            elif self.objective.generator is None:
                self.found[head.name] = read.logits(everywhere).view(*batch.inputs.shape, -1)
        return {head.name: torch.zeros(()) for head in self.objective.heads}


def answers(engine, batch):
    """What every head answers, on the rank that has it."""
    listener, criterion = Listener(engine.objective), engine.criterion
    real, criterion.objective = criterion.objective, listener
    criterion.start({head.name: 1.0 for head in engine.objective.heads})
    with torch.no_grad():
        engine._evaluate([batch])
    criterion.objective = real
    criterion.start({})
    return listener.found


def measured(runs, layout):
    """For each run on the ranks of this job: a batch, what the heads answer to it, what they answer after a step on it, and
    that step. The run is then saved beside the first one, as of this layout."""
    plan, found = LAYOUTS[layout], []
    mesh = Mesh.build(plan)
    for folder in runs:
        config = run_of(folder)
        objective, model = config.make_objective(), config.model.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
        filled = deepspeed_json.filled(ZERO, mesh.replicas, ROWS, 1, 1.0)
        engine = create_engine(build_for(objective, model, mesh, LENGTH), objective, OptimizerConfig(), filled)
        assert checkpoint.adopt(Snapshot(folder / "checkpoints" / "step-0"), engine) == ([], [])
        with Loader(random_text(objective, LENGTH, ROWS), ROWS, ROWS, 0, 1, Cursor()) as loader:
            (batch,) = next(loader).batches
        asked = {name: target for name, target in batch.targets.items() if not objective.generator or name != "mlm"}
        told = mesh.gather(answers(engine, type(batch)(batch.inputs, batch.position, batch.attention, asked, batch.token_type)))
        step = engine.step([batch], 1, 1e-3)
        then = mesh.gather(answers(engine, type(batch)(batch.inputs, batch.position, batch.attention, asked, batch.token_type)))
        facts = {"model": model.model_dump(), "objective": objective.name, "data": None, "tokens": 1, "world": 1}
        checkpoint.save(trained(folder, layout) / "checkpoints", engine, 1, facts)
        found.append((batch, *(next(answer for answer in each if answer) for each in (told, then)), step))
    return found


def trained(folder, layout):
    return folder.with_name(f"trained {layout}")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name a model of theirs and the folder that it came into."""
    found = {}
    for name in theirs.MODELS:
        folder = tmp_path_factory.mktemp("model")
        found[name] = theirs.save(name, folder / "in"), folder / "run"
        bring_in(folder / "in", folder / "run")
    return found


@pytest.fixture(scope="module")
def everything(models):
    """By layout what `measured` finds, for every model."""
    runs = [folder for _, folder in models.values()]
    return {name: dict(zip(models, spawn(plan.unit, measured, runs, name), strict=True)) for name, plan in LAYOUTS.items()}


def pooled(model, batch):
    """Their vector of each text of a batch, at its first position [B, S, H]; elsewhere nothing."""
    segment, found = batch.attention.segment, torch.zeros(*batch.inputs.shape, model.config.hidden_size)
    for row in range(len(segment)):
        for text in segment[row].unique().tolist():
            here = (segment[row] == text) & (text != 0)
            if here.any():
                found[row, int(here.nonzero()[0])] = model(batch.inputs[row, here][None]).pooler_output[0]
    return found


@torch.no_grad()
def expected(model, batch):
    """Their answers by the name of our head."""
    if "simcse" in batch.targets:
        return {"simcse": pooled(model, batch)}
    segment = batch.attention.segment
    inputs = {"input_ids": batch.inputs, "attention_mask": (segment != 0).long()}
    if batch.token_type is not None:
        inputs["token_type_ids"] = batch.token_type
    out = model(**inputs)
    found = {"clm": getattr(out, "logits", None), "mlm": getattr(out, "prediction_logits", getattr(out, "logits", None))}
    pair = getattr(out, "seq_relationship_logits", getattr(out, "sop_logits", getattr(out, "logits", None)))
    return {**found, "nsp": pair, "sop": pair, "rtd": getattr(out, "logits", None)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", theirs.MODELS)
def test_answers_are_those_of_transformers(everything, models, name, layout):
    batch, told, _, _ = everything[layout][name]
    agree(batch, told, models[name][0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", theirs.MODELS)
def test_what_was_trained_under_a_layout_answers_the_same_in_transformers(everything, models, name, layout):
    run = trained(models[name][1], layout)
    (run / "run.yaml").write_bytes((models[name][1] / "run.yaml").read_bytes())
    folder, *_ = send_out(run, run.with_name(f"out {layout}"))
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    exported = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager").eval()
    batch, before, then, _ = everything[layout][name]
    assert all((before[head] - then[head]).abs().max() > 1e-4 for head in then), "it was trained"
    agree(batch, then, exported)


def agree(batch, told, model):
    """Ours and theirs, within 1e-5."""
    wanted, real = expected(model, batch), batch.attention.segment != 0
    for head, answer in told.items():
        want, got = wanted[head], answer
        if head in ("nsp", "sop"):
            got = answer[:, 0]
        elif head == "simcse":
            first = batch.targets["simcse"].labels > 0
            want, got = want[first], answer[first]
        elif head == "rtd":  # one logit there, the difference of two here
            want, got = want[real], (answer[..., 1] - answer[..., 0])[real]
        else:
            want, got = want[real], answer[real]
        assert want.std() > 0.02
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in theirs.MODELS if name != "electra"])
def test_training_begins_with_their_loss(everything, models, name, layout):
    batch, _, _, step = everything[layout][name]
    wanted, total = expected(models[name][0], batch), 0.0
    for head, target in batch.targets.items():
        if head == "simcse":
            one, two = (F.normalize(wanted[head][target.labels == view], dim=-1) for view in (1, 2))
            total += float(F.cross_entropy(one @ two.T / 0.05, torch.arange(len(one))))
            continue
        answer = wanted[head] if wanted[head].ndim == 3 else wanted[head][:, None].expand(-1, LENGTH, -1)
        losses = F.cross_entropy(answer.transpose(1, 2), target.labels, reduction="none")
        total += float((losses * target.weights).sum() / target.weights.sum())
    assert step.loss == pytest.approx(total, rel=1e-5)
    assert step.grad_norm > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_generator_begins_with_its_own_loss(everything, models, layout):
    batch, _, _, step = everything[layout]["electra"]
    target = batch.targets["mlm"]
    with torch.no_grad():
        answer = theirs.make_generator(models["electra"][0])(batch.inputs, token_type_ids=batch.token_type).logits
    losses = F.cross_entropy(answer.transpose(1, 2), target.labels, reduction="none")
    assert step.sums["mlm"] / step.totals["mlm"] == pytest.approx(
        float((losses * target.weights).sum() / target.weights.sum()), rel=1e-5
    )
    mlm, rtd = (step.sums[head] / step.totals[head] for head in ("mlm", "rtd"))
    assert step.loss == pytest.approx(mlm + 50 * rtd, rel=1e-5), "as in the paper"


def test_all_layouts_find_the_same(everything):
    for name in theirs.MODELS:
        losses = [everything[layout][name][3].loss for layout in LAYOUTS]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5), name
