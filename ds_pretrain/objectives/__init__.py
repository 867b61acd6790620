"""One file per objective; importing this package registers them all, and those of plug-ins."""

from ds_pretrain.objectives import plugins
from ds_pretrain.objectives.base import REGISTRY, Objective, create, register
from ds_pretrain.objectives.causal import CausalLanguageModeling
from ds_pretrain.objectives.diffusion import MaskedDiffusion
from ds_pretrain.objectives.electra import Electra
from ds_pretrain.objectives.fim import FillInTheMiddle
from ds_pretrain.objectives.masked import MaskedLanguageModeling
from ds_pretrain.objectives.mixture import Mixture
from ds_pretrain.objectives.prefix import PrefixLanguageModeling
from ds_pretrain.objectives.sentence_pair import Albert, Bert, NextSentencePrediction, SentenceOrderPrediction
from ds_pretrain.objectives.simcse import SimCSE
from ds_pretrain.objectives.spans import SpanCorruption
from ds_pretrain.objectives.ul2 import UL2, UL2R

__all__ = [
    "REGISTRY",
    "UL2",
    "UL2R",
    "Albert",
    "Bert",
    "CausalLanguageModeling",
    "Electra",
    "FillInTheMiddle",
    "MaskedDiffusion",
    "MaskedLanguageModeling",
    "Mixture",
    "NextSentencePrediction",
    "Objective",
    "PrefixLanguageModeling",
    "SentenceOrderPrediction",
    "SimCSE",
    "SpanCorruption",
    "create",
    "register",
]

plugins.load()
