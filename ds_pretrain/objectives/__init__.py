"""What a model is trained to do. Importing this package registers every objective."""

from ds_pretrain.objectives.base import REGISTRY, Objective, create, register
from ds_pretrain.objectives.causal import CausalLanguageModeling
from ds_pretrain.objectives.masked import MaskedLanguageModeling

__all__ = ["REGISTRY", "CausalLanguageModeling", "MaskedLanguageModeling", "Objective", "create", "register"]
