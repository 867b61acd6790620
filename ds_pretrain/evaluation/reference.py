"""The same model in plain PyTorch: one process, dense masks, no DeepSpeed and no megatron-core.

What every layout is measured against, so it is written to be checked by eye: a dictionary of weights under their logical
names, the equations in order, torch's own AdamW.

Shape suffixes: B rows, S positions, H hidden, N heads, G key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_pretrain.core.batch import Batch
from ds_pretrain.models.config import ModelConfig

Weights = Mapping[str, Tensor]


def logits(w: Weights, m: ModelConfig, batch: Batch) -> Tensor:
    """Logits [B, S, V] of every position."""
    x = w["word.weight"][batch.inputs]
    if m.position == "learned":
        x = x + w["embed.position.weight"][batch.position]
    if m.token_types:
        x = x + w["embed.types.weight"][batch.token_type if batch.token_type is not None else torch.zeros_like(batch.inputs)]
    if m.norm_position == "post":
        x = _norm(w, m, "embed.norm", x)
    mask = batch.attention.dense()[:, None]
    for layer in range(m.layers):
        x = _block(w, m, f"layers.{layer}", x, mask, batch.position)
    if m.norm_position == "pre":
        x = _norm(w, m, "head.final_norm", x)
    if m.head_transform:
        x = _norm(w, m, "head.dense_norm", _activate(m, _linear(w, "head.dense", x)))
    out = F.linear(x, w["word.weight" if m.tie_embeddings else "output.weight"])
    return out + w["head.output_bias.bias"] if m.head_transform else out


def loss(w: Weights, m: ModelConfig, batches: Sequence[Batch], head: str) -> Tensor:
    """One step's loss: weighted nll summed over all rows, divided once."""
    total = sum(batch.targets[head].total for batch in batches)
    parts = []
    for batch in batches:
        target = batch.targets[head]
        nll = F.cross_entropy(logits(w, m, batch).flatten(0, 1), target.labels.flatten(), reduction="none")
        parts.append((nll * target.weights.flatten()).sum())
    return torch.stack(parts).sum() / total


def _block(w: Weights, m: ModelConfig, name: str, x: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    if m.norm_position == "post":
        x = _norm(w, m, f"{name}.pre_cross_attn_layernorm", x + _attention(w, m, name, x, mask, position))
        return _norm(w, m, f"{name}.output_norm", x + _ffn(w, m, name, x))
    x = x + _attention(w, m, name, _norm(w, m, f"{name}.input_layernorm", x), mask, position)
    return x + _ffn(w, m, name, _norm(w, m, f"{name}.pre_mlp_layernorm", x))


def _attention(w: Weights, m: ModelConfig, name: str, x: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    rows, length, _ = x.shape
    per_group = m.heads // m.groups
    qkv = _linear(w, f"{name}.self_attention.linear_qkv", x).view(rows, length, m.groups, per_group + 2, m.head_dim)
    q = qkv[..., :per_group, :].flatten(2, 3)
    k, v = (qkv[..., per_group + i, :].repeat_interleave(per_group, 2) for i in range(2))
    if m.position == "rope":
        q, k = _rotate(q, position, m.rope_base), _rotate(k, position, m.rope_base)
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / m.head_dim**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)  # padding rows see nothing
    return _linear(w, f"{name}.self_attention.linear_proj", torch.einsum("bnqk,bknd->bqnd", weights, v).flatten(2))


def _rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = position[:, :, None, None] * base ** (-torch.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)


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
