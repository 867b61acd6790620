"""A small model, rows and an engine for any registered objective."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from memory import VOCAB, corpus

from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.training import state
from ds_pretrain.training.engine import build_for, create_engine
from ds_pretrain.training.optimizer import OptimizerConfig

SEQ = 64
SIZE = {"layers": 2, "hidden": 32, "heads": 8, "vocab": VOCAB.size, "positions": SEQ, "dropout": 0.0, "init_std": 0.2}


def model_for(objective):
    """A decoder for causal objectives, a BERT for the others."""
    return ModelConfig(**SIZE) if objective.kind == "causal" else ModelConfig(preset="bert-1m", **SIZE)


def samples(objective, store=None, **settings):
    return Samples(store or corpus(), VOCAB, objective=objective, **{"seq_len": SEQ, "source": "train", "seed": 0} | settings)


def first_rows(data, count):
    return data.rows(Cursor(), count)[0]


def engine_for(objective, micro, accumulation, stage=0, plan=ParallelPlan(), seed=1, dropout=0.0):
    mesh = Mesh.build(plan)
    config = {
        "train_batch_size": micro * accumulation * mesh.data_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1e9,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    build = build_for(objective, model_for(objective).model_copy(update={"dropout": dropout}), mesh, SEQ)
    return create_engine(build, objective, OptimizerConfig(lr=1e-3), config, seed)


def gradients(engine):
    """The gradient of a first step, out of Adam's first moment, by logical name (stage 0, one process)."""
    return {f.shard.name: f.views["exp_avg"].clone() / (1 - 0.9) for f in state.fragments(engine)}
