"""The same models in plain PyTorch: one process, dense masks, no DeepSpeed and no megatron-core.

What every layout is measured against, so it is written to be checked by eye: a dictionary of weights under their logical
names, the equations in order, torch's own AdamW. Only the objectives' own losses are shared with the engines, which know no
layout, and the noise of dropout and of a generator's samples.

Shape suffixes: B rows, S positions, H hidden, N heads, G key heads, D head size, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Batch, Head
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.noise import dropout, gumbel, row_keys
from ds_pretrain.objectives import Objective

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Answers:
    """A `Readout` that holds everything whole. hidden: [B, S, H] after the last norm; name: of the head's weights;
    generated: the answers of the generator that wrote the tokens."""

    w: Weights
    model: ModelConfig
    hidden: Tensor
    tokens: Tensor
    classes: Mapping[str, Head]
    name: str = "head"
    generated: Answers | None = None

    def logits(self) -> Tensor:
        """[B, S, V]"""
        if self.generated is not None:
            return self.generated.logits()
        x, transform = self.hidden, f"{self.name}.dense.weight" in self.w
        if transform:
            dense = _activate(self.model, _linear(self.w, f"{self.name}.dense", x))
            x = _norm(self.w, self.model, f"{self.name}.dense_norm", dense)
        out = F.linear(x, self.w["output.weight" if "output.weight" in self.w else "word.weight"])
        return out + self.w[f"{self.name}.output_bias.bias"] if transform else out

    def scores(self, head: str) -> Tensor:
        """[B, S, V or C]"""
        if head not in self.classes:
            return self.logits()
        return _linear(self.w, f"{self.name}.classifiers.{head}.out", self._dense(head))

    def nll(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        asked = labels.masked_fill(weights == 0, 0).flatten()
        found = F.cross_entropy(self.scores(head).flatten(0, 1).float(), asked, reduction="none")
        return found.view_as(weights).masked_fill(weights == 0, 0.0)

    def correct(self, head: str, labels: Tensor, weights: Tensor) -> Tensor:
        return (self.scores(head).argmax(-1) == labels) & (weights != 0)

    def states(self) -> Tensor:
        return self.hidden

    def embed(self, head: str, chosen: Tensor) -> Tensor:
        return self._dense(head)[chosen]

    def _dense(self, head: str) -> Tensor:
        x = _linear(self.w, f"{self.name}.classifiers.{head}.dense", self.hidden)
        return torch.tanh(x) if self.classes[head].activation == "tanh" else F.gelu(x)


class Alone:
    """A `Comm` without others."""

    def gather(self, x: Tensor) -> tuple[Tensor, int]:
        return x, 0


def answers(w: Weights, m: ModelConfig, objective: Objective, batch: Batch, seed: int = 0) -> Answers:
    """Everything the model says about a batch. seed: of the step's dropout, where the model has any."""
    classes = {head.name: head for head in objective.heads if head.classes is not None}
    tokens = batch.inputs
    if objective.generator is None:
        hidden = _states(w, m, "", _embed(w, m, tokens, batch, seed), tokens, batch, seed)
        return Answers(w, m, hidden, tokens, classes)
    head, share = objective.generator
    small, x = m.narrower(share), _linear(w, "generator.embed.dense", _embed(w, m, tokens, batch, seed))
    generated = Answers(w, small, _states(w, small, "generator.", x, tokens, batch, seed), tokens, {}, "generator.head")
    chosen = batch.targets[head].weights != 0
    noise = gumbel(row_keys(tokens)[chosen], 0, m.vocab_size)
    tokens = tokens.masked_scatter(chosen, (generated.logits().detach().float()[chosen] + noise).argmax(-1))
    hidden = _states(w, m, "", _embed(w, m, tokens, batch, seed), tokens, batch, seed)
    return Answers(w, m, hidden, tokens, classes, generated=generated)


def loss(w: Weights, m: ModelConfig, objective: Objective, batches: Sequence[Batch], seed: int = 0) -> Tensor:
    """One step's loss: for each head the sum over all rows, divided once by its total or its group's, times its factor."""
    found = [objective.loss(answers(w, m, objective, batch, seed), batch, Alone()) for batch in batches]
    parts = []
    for head in objective.heads:
        together = [other.name for other in objective.heads if other is head or (head.group and other.group == head.group)]
        total = sum(batch.targets[name].total for batch in batches for name in together)
        parts.append(head.coefficient * torch.stack([sums[head.name] for sums in found]).sum() / (total or 1))
    return torch.stack(parts).sum()


def parameter_shapes(m: ModelConfig, objective: Objective) -> dict[str, tuple[int, ...]]:
    """Logical names and whole shapes, written out independently of the modules that the engines build."""
    v, h = m.vocab_size, m.hidden
    shapes: dict[str, tuple[int, ...]] = {"word.weight": (v, h)}
    shapes |= {"embed.position.weight": (m.positions or 0, h)} if m.position == "learned" else {}
    shapes |= {"embed.types.weight": (m.token_types, h)} if m.token_types else {}
    shapes |= dict(_with_bias("embed.norm", (h,), m.norm == "layernorm")) if m.norm_position == "post" else {}
    shapes |= dict(_layers(m, ""))
    words = any(head.classes is None for head in objective.heads)
    for head in objective.heads:
        if head.classes is not None:
            shapes |= dict(_with_bias(f"head.classifiers.{head.name}.dense", (h, h), True))
            shapes |= dict(_with_bias(f"head.classifiers.{head.name}.out", (head.classes, h), True)) if head.classes else {}
    if objective.generator is None:
        shapes |= dict(_vocabulary_head(m, "head", h)) if words and m.head_transform else {}
        return shapes if m.tie_embeddings or not words else {**shapes, "output.weight": (v, h)}
    small = m.narrower(objective.generator[1])
    shapes |= dict(_with_bias("generator.embed.dense", (small.hidden, h), True))
    return shapes | dict(_layers(small, "generator.")) | dict(_vocabulary_head(small, "generator.head", h))


Named = Iterator[tuple[str, tuple[int, ...]]]


def _layers(m: ModelConfig, prefix: str) -> Named:
    h, f = m.hidden, m.ffn_width
    post, up = m.norm_position == "post", f * (2 if m.activation == "swiglu" else 1)
    matrices = {
        "self_attention.linear_qkv": (h + 2 * m.groups * m.head_dim, h),
        "self_attention.linear_proj": (h, h),
        "mlp.linear_fc1": (up, h),
        "mlp.linear_fc2": (h, f),
    }
    for layer in range(m.layers):
        for name, shape in matrices.items():
            yield from _with_bias(f"{prefix}layers.{layer}.{name}", shape, m.bias)
        for name in ("pre_cross_attn_layernorm", "output_norm") if post else ("input_layernorm", "pre_mlp_layernorm"):
            yield from _with_bias(f"{prefix}layers.{layer}.{name}", (h,), m.norm == "layernorm")
    if not post:
        yield from _with_bias(f"{prefix}head.final_norm", (h,), m.norm == "layernorm")


def _vocabulary_head(m: ModelConfig, name: str, width: int) -> Named:
    yield from _with_bias(f"{name}.dense", (width, m.hidden), True)
    yield from _with_bias(f"{name}.dense_norm", (width,), m.norm == "layernorm")
    yield f"{name}.output_bias.bias", (m.vocab_size,)


def _with_bias(name: str, shape: tuple[int, ...], bias: bool) -> Named:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _embed(w: Weights, m: ModelConfig, tokens: Tensor, batch: Batch, seed: int) -> Tensor:
    x = w["word.weight"][tokens]
    if m.position == "learned":
        x = x + w["embed.position.weight"][batch.position]
    if m.token_types:
        x = x + w["embed.types.weight"][torch.zeros_like(tokens) if batch.token_type is None else batch.token_type]
    x = _norm(w, m, "embed.norm", x) if m.norm_position == "post" else x
    return dropout(x, row_keys(tokens, seed), rng.key("embed"), m.dropout)


def _states(w: Weights, m: ModelConfig, prefix: str, x: Tensor, tokens: Tensor, batch: Batch, seed: int) -> Tensor:
    mask, noise = batch.attention.dense()[:, None], row_keys(tokens, seed)
    for layer in range(m.layers):
        x = _block(w, m, f"{prefix}layers.{layer}", x, mask, batch.position, noise)
    return _norm(w, m, f"{prefix}head.final_norm", x) if m.norm_position == "pre" else x


def _block(w: Weights, m: ModelConfig, name: str, x: Tensor, mask: Tensor, position: Tensor, noise: Tensor) -> Tensor:
    def drop(branch: Tensor, part: str) -> Tensor:
        return dropout(branch, noise, rng.key(f"{name} {part}"), m.dropout)

    if m.norm_position == "post":
        attended = drop(_attention(w, m, name, x, mask, position), "attention")
        x = _norm(w, m, f"{name}.pre_cross_attn_layernorm", x + attended)
        return _norm(w, m, f"{name}.output_norm", x + drop(_ffn(w, m, name, x), "mlp"))
    x = x + drop(_attention(w, m, name, _norm(w, m, f"{name}.input_layernorm", x), mask, position), "attention")
    return x + drop(_ffn(w, m, name, _norm(w, m, f"{name}.pre_mlp_layernorm", x)), "mlp")


def _attention(w: Weights, m: ModelConfig, name: str, x: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    rows, length, _ = x.shape
    per_group = m.heads // m.groups
    qkv = _linear(w, f"{name}.self_attention.linear_qkv", x).view(rows, length, m.groups, per_group + 2, m.head_dim)
    q = qkv[..., :per_group, :].flatten(2, 3)
    k, v = (qkv[..., per_group + i, :].repeat_interleave(per_group, 2) for i in range(2))
    if m.position == "rope":
        q, k = _rotate(q, position, m), _rotate(k, position, m)
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / m.head_dim**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)  # padding rows see nothing
    return _linear(w, f"{name}.self_attention.linear_proj", torch.einsum("bnqk,bknd->bqnd", weights, v).flatten(2))


def _rotate(x: Tensor, position: Tensor, m: ModelConfig) -> Tensor:
    half = x.shape[-1] // 2
    frequency = [m.rope_base ** (-i / half) / _slower(m, m.rope_base ** (-i / half)) for i in range(half)]
    angle = position[:, :, None, None] * torch.tensor(frequency)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)


def _slower(m: ModelConfig, frequency: float) -> float:
    """How much slower a frequency turns; llama3 blends from the whole factor to none by how often it comes round."""
    s = m.rope_scaling
    if s is None or s.kind == "linear":
        return s.factor if s else 1.0
    turns = s.trained * frequency / (2 * math.pi)
    share = min(1.0, max(0.0, (turns - s.low) / (s.high - s.low)))
    return 1 / ((1 - share) / s.factor + share)


def _ffn(w: Weights, m: ModelConfig, name: str, x: Tensor) -> Tensor:
    up = _linear(w, f"{name}.mlp.linear_fc1", x)
    if m.activation == "swiglu":
        gate, up = up.chunk(2, -1)
        up = F.silu(gate) * up
    else:
        up = _activate(m, up)
    return _linear(w, f"{name}.mlp.linear_fc2", up)


def _activate(m: ModelConfig, x: Tensor) -> Tensor:
    if m.activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if m.activation == "gelu_tanh" else "none")


def _norm(w: Weights, m: ModelConfig, name: str, x: Tensor) -> Tensor:
    if m.norm == "rmsnorm":
        return x * (x.pow(2).mean(-1, keepdim=True) + m.norm_eps).rsqrt() * w[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.pow(2).mean(-1, keepdim=True) + m.norm_eps).rsqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))
