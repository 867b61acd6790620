"""Known models by name, 1M to 13B parameters, and the `create_*` functions of the Python API."""

from __future__ import annotations

from typing import Any

from ds_pretrain.core.registry import Registry
from ds_pretrain.models.config import ModelConfig

PRESETS: Registry[dict[str, Any]] = Registry("model preset")

_GPT2 = {"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "tie_embeddings": True, "bias": True}
_LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "tie_embeddings": False, "bias": False}
_BERT = {
    "norm": "layernorm",
    "norm_position": "post",
    "norm_eps": 1e-12,
    "activation": "gelu",
    "position": "learned",
    "tie_embeddings": True,
    "bias": True,
    "token_types": 2,
    "head_transform": True,
    "dropout": 0.1,
}


def _add(name: str, style: dict[str, Any], layers: int, hidden: int, heads: int, **more: Any) -> None:
    PRESETS.register(name)({**style, "layers": layers, "hidden": hidden, "heads": heads, **more})


_add("gpt-1m", _GPT2, 4, 128, 4)
_add("gpt-5m", _GPT2, 6, 256, 4)
_add("gpt-25m", _GPT2, 8, 512, 8)
_add("gpt-50m", _GPT2, 12, 576, 9)
_add("gpt-100m", _GPT2, 14, 768, 12)
_add("gpt2-small", _GPT2, 12, 768, 12, positions=1024)
_add("gpt2-medium", _GPT2, 24, 1024, 16, positions=1024)
_add("gpt2-large", _GPT2, 36, 1280, 20, positions=1024)
_add("gpt2-xl", _GPT2, 48, 1600, 25, positions=1024)
_add("llama-1m", _LLAMA, 4, 128, 4, kv_heads=2)
_add("llama-160m", _LLAMA, 12, 768, 12)
_add("llama-1b", _LLAMA, 16, 2048, 32, kv_heads=8, ffn=8192, rope_base=500000.0)
_add("llama-7b", _LLAMA, 32, 4096, 32, ffn=11008)
_add("llama-13b", _LLAMA, 40, 5120, 40, ffn=13824)
_add("bert-1m", _BERT, 4, 128, 2)
_add("bert-base", _BERT, 12, 768, 12, positions=512)
_add("bert-large", _BERT, 24, 1024, 16, positions=512)


def create(preset: str, **fields: Any) -> ModelConfig:
    """A model description; fields override the preset's. Weights appear when it is trained or loaded."""
    return ModelConfig(preset=preset, **fields)


def create_gpt_small(vocab_size: int = 50257, **fields: Any) -> ModelConfig:
    """GPT-2 small: 12 layers, 768 wide, 124M parameters at its own vocabulary."""
    return create("gpt2-small", vocab=vocab_size, **fields)


def create_gpt_medium(vocab_size: int = 50257, **fields: Any) -> ModelConfig:
    """GPT-2 medium: 24 layers, 1024 wide, 355M parameters."""
    return create("gpt2-medium", vocab=vocab_size, **fields)


def create_llama_1b(vocab_size: int = 32000, **fields: Any) -> ModelConfig:
    """A LLaMA of 16 layers, 2048 wide, with 8 key heads."""
    return create("llama-1b", vocab=vocab_size, **fields)


def create_llama_7b(vocab_size: int = 32000, **fields: Any) -> ModelConfig:
    """LLaMA 7B."""
    return create("llama-7b", vocab=vocab_size, **fields)


def create_bert_base(vocab_size: int = 30522, **fields: Any) -> ModelConfig:
    """BERT-base: 12 layers, 768 wide, post-norm, 110M parameters."""
    return create("bert-base", vocab=vocab_size, **fields)


def create_bert_large(vocab_size: int = 30522, **fields: Any) -> ModelConfig:
    """BERT-large: 24 layers, 1024 wide."""
    return create("bert-large", vocab=vocab_size, **fields)
