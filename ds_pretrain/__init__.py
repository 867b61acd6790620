"""Pre-training objectives for language models, under any DeepSpeed and megatron-core layout.

The names below are the Python API. They are imported when first used, so that `import ds_pretrain` costs nothing.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
warnings.filterwarnings("ignore", module=r"megatron\..*|apex\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ds_pretrain.data.dataset import PretrainingDataset
    from ds_pretrain.data.tokenizer import TextTokenizer
    from ds_pretrain.evaluation.perplexity import evaluate_perplexity
    from ds_pretrain.models.presets import create_bert_base, create_gpt_small
    from ds_pretrain.objectives import CausalLanguageModeling, MaskedLanguageModeling
    from ds_pretrain.parallel.plan import ParallelPlan
    from ds_pretrain.training.trainer import PreTrainer

_HOME = {
    "CausalLanguageModeling": "ds_pretrain.objectives",
    "MaskedLanguageModeling": "ds_pretrain.objectives",
    "PretrainingDataset": "ds_pretrain.data.dataset",
    "PreTrainer": "ds_pretrain.training.trainer",
    "ParallelPlan": "ds_pretrain.parallel.plan",
    "TextTokenizer": "ds_pretrain.data.tokenizer",
    "create_gpt_small": "ds_pretrain.models.presets",
    "create_gpt_medium": "ds_pretrain.models.presets",
    "create_llama_1b": "ds_pretrain.models.presets",
    "create_llama_7b": "ds_pretrain.models.presets",
    "create_bert_base": "ds_pretrain.models.presets",
    "create_bert_large": "ds_pretrain.models.presets",
    "evaluate_perplexity": "ds_pretrain.evaluation.perplexity",
}

__all__ = [
    "CausalLanguageModeling",
    "MaskedLanguageModeling",
    "ParallelPlan",
    "PreTrainer",
    "PretrainingDataset",
    "TextTokenizer",
    "create_bert_base",
    "create_gpt_small",
    "evaluate_perplexity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ds_pretrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
