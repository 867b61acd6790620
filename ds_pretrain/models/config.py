"""The shape of a model, its parameter count and its FLOPs: arithmetic only, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ds_pretrain.parallel.plan import ParallelPlan


class RopeScaling(BaseModel):
    """How rotary positions reach further than they were trained to, by slower turns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "llama3"]
    """Of all alike (Chen et al. 2023), or of those alone that do not come round within `trained` positions (LLaMA 3.1)."""
    factor: float = Field(gt=0)
    """How much slower; how much further they reach."""
    low: float = Field(1.0, gt=0)
    """llama3: what turns less often than this in `trained` positions is slowed by the whole factor."""
    high: float = Field(4.0, gt=0)
    """llama3: what turns more often than this is not slowed; between the two it goes gradually."""
    trained: int = Field(8192, ge=1)
    """llama3: positions of the rows before."""

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


class ModelConfig(BaseModel):
    """A transformer. `preset` names a known model whose values the other fields override."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str | None = None
    """Start from this preset (`ds-pretrain list presets`)."""
    layers: int = Field(4, ge=1)
    """Transformer layers."""
    hidden: int = Field(256, ge=8)
    """Width of the residual stream."""
    heads: int = Field(4, ge=1)
    """Attention (query) heads."""
    kv_heads: int | None = Field(None, ge=1)
    """Key and value heads; fewer than `heads` is grouped-query attention. None: as many as heads."""
    ffn: int | None = Field(None, ge=8)
    """Width of the feed-forward layer. None: 4 x hidden, or 8/3 x hidden rounded up to 64 for SwiGLU."""
    vocab: int | None = Field(None, ge=8)
    """Vocabulary size. None: the tokenizer's."""
    positions: int | None = Field(None, ge=8)
    """Longest row of a model with learned positions. None: batch.seq_len."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation."""
    norm_position: Literal["pre", "post"] = "pre"
    """Before each block (GPT-2, LLaMA) or after it (BERT)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance."""
    activation: Literal["gelu", "gelu_tanh", "swiglu", "relu"] = "gelu_tanh"
    """Feed-forward non-linearity; `gelu_tanh` is GPT-2's approximation, `gelu` BERT's exact one."""
    position: Literal["learned", "rope"] = "learned"
    """How positions enter."""
    rope_base: float = Field(10000.0, gt=0)
    """Base wavelength of rotary positions."""
    rope_scaling: RopeScaling | None = None
    """How they reach further: {kind: linear, factor: 2}, or LLaMA 3.1's {kind: llama3, factor: 8}. None: they do not."""
    bias: bool = True
    """Biases in the linear layers."""
    token_types: int = Field(0, ge=0)
    """Rows of the token type embedding; 0 for none (BERT: 2)."""
    head_transform: bool = False
    """BERT's head: dense, activation and norm before the output matrix, and a bias per vocabulary id after it."""
    tie_embeddings: bool = True
    """Share the input and output embedding matrix."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on embeddings and both residual branches, the same under every layout."""
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout on attention probabilities, which each rank draws for itself; None: as `dropout`."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial weights; residual projections of pre-norm models have it over sqrt(2 x layers)."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset"):
            from ds_pretrain.models.presets import PRESETS

            return {**PRESETS[values["preset"]], **values}
        return values

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        if self.ffn:
            return self.ffn
        return -(-self.hidden * 8 // 3 // 64) * 64 if self.activation == "swiglu" else 4 * self.hidden

    @property
    def vocab_size(self) -> int:
        if self.vocab is None:
            raise ValueError("model.vocab is not set: give it, or a tokenizer to take it from")
        return self.vocab

    def problems(self) -> list[str]:
        """Contradictions between the fields, each with its numbers and the fix."""
        found = []
        if self.hidden % self.heads:
            found.append(f"model.hidden {self.hidden} is not divisible by model.heads {self.heads}")
        elif self.position == "rope" and self.head_dim % 2:
            found.append(f"rotary positions need an even head size, got {self.hidden}/{self.heads} = {self.head_dim}")
        if self.heads % self.groups:
            found.append(f"model.heads {self.heads} is not divisible by model.kv_heads {self.groups}")
        return found

    def misfits(self, vocab_size: int | None, seq_len: int) -> Iterator[str]:
        """Where the model contradicts a tokenizer (None: not known yet) or the length of a row."""
        if self.position == "learned" and self.positions and seq_len > self.positions:
            yield f"batch.seq_len {seq_len} is longer than model.positions {self.positions}: lower one or raise the other"
        if vocab_size and self.vocab and self.vocab < vocab_size:
            yield f"model.vocab {self.vocab} is below the tokenizer's {vocab_size} ids: leave it out, or set it to {vocab_size}"

    def undividable(self, plan: ParallelPlan, seq_len: int) -> Iterator[str]:
        """Where the model or a row of `seq_len` positions cannot be laid out by a plan, with the nearest that can."""
        t, c = plan.tensor, plan.context
        for name, count in (("heads", self.heads), ("ffn", self.ffn_width)):
            if count % t:
                yield f"model.{name} {count} is not divisible by parallel.tensor {t}: use {_nearest(t, _divides(count))}"
        if self.groups % t and t % self.groups:
            fits = _nearest(t, lambda n: self.heads % n == 0 and (self.groups % n == 0 or n % self.groups == 0))
            yield f"model.kv_heads {self.groups} and parallel.tensor {t}: one must divide the other, use {fits}"
        if self.heads % t == 0 and (here := self.heads // t) % c:
            fits = _nearest(c, _divides(here))
            yield f"model.heads {self.heads} are {here} on a tensor rank, not divisible by parallel.context {c}: use {fits}"
        if self.layers < plan.pipeline:
            yield f"model.layers {self.layers} is less than parallel.pipeline {plan.pipeline}: use at most {self.layers} stages"
        if plan.sequence and t == 1:
            yield "parallel.sequence needs parallel.tensor above 1: turn it off, or raise parallel.tensor"
        parts = c * (t if plan.sequence else 1)
        if seq_len % parts:
            yield (
                f"batch.seq_len {seq_len} is not divisible by the {parts} parts that parallel.context and parallel.sequence "
                f"make of it: use {max(1, round(seq_len / parts)) * parts}"
            )

    def narrower(self, share: float) -> ModelConfig:
        """The same depth and head size with this share of the heads and the feed-forward width (ELECTRA's generator)."""
        heads = max(1, round(self.heads * share))
        groups = None if self.kv_heads is None else max(1, min(heads, round(self.kv_heads * share)))
        ffn = max(8, round(self.ffn_width * heads / self.heads))
        return self.model_copy(update={"hidden": heads * self.head_dim, "heads": heads, "kv_heads": groups, "ffn": ffn})

    def count_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters; without embeddings it is the N of scaling laws."""
        return sum(n for name, n in self.parameter_table() if embeddings or "embedding" not in name)

    def parameter_table(self) -> list[tuple[str, int]]:
        """(part, parameters) for the whole model."""
        h, f, bias = self.hidden, self.ffn_width, int(self.bias)
        qkv = h + 2 * self.groups * self.head_dim
        up = f * (2 if self.activation == "swiglu" else 1)
        norm = h * (2 if self.norm == "layernorm" else 1)
        attention = (h + bias) * qkv + (h + bias) * h
        ffn = (h + bias) * up + (f + bias) * h
        learned = self.positions or 0 if self.position == "learned" else 0
        head = (h * (h + 1) + norm + self.vocab_size) if self.head_transform else 0
        return [
            ("word embedding", self.vocab_size * h),
            ("position and type embedding", (learned + self.token_types) * h),
            ("attention", self.layers * attention),
            ("feed-forward", self.layers * ffn),
            ("norms", (2 * self.layers + 1) * norm),
            ("head", head),
            ("output embedding", 0 if self.tie_embeddings else self.vocab_size * h),
        ]

    def flops(self, attended: float, tokens: float, scored: float, embedding: int | None = None) -> float:
        """Model FLOPs of one training step, forward and backward, without recomputation.

        attended: pairs (query, key) that the mask lets through; tokens: real tokens, padding left out; scored: positions
        at which logits are computed; embedding: width of the output matrix where it is not the model's. (6 per weight and
        token, 12 x hidden per pair and layer: Chowdhery et al. 2022, B.)
        """
        h, table = self.hidden, dict(self.parameter_table())
        weights = table["attention"] + table["feed-forward"]
        per_scored = self.vocab_size * (embedding or h) + (h * h if self.head_transform else 0)
        return 6.0 * weights * tokens + 12.0 * self.layers * h * attended + 6.0 * per_scored * scored


def _divides(count: int) -> Callable[[int], bool]:
    return lambda n: count % n == 0


def _nearest(size: int, fits: Callable[[int], bool]) -> int:
    """The number closest to `size` that fits, the smaller of two."""
    return min(filter(fits, range(1, 2 * size + 1)), key=lambda n: (abs(n - size), n))
