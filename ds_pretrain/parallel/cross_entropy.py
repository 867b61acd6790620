"""Softmax over a vocabulary that is divided over the tensor ranks.

Shape suffixes: n scored positions, V vocabulary, T tensor ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] for this rank's slice of the logits [n, V/T] and whole-vocabulary labels [n]; fp32 [n]."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if parallel_state.get_tensor_model_parallel_world_size() == 1:  # torch fuses what the divided form cannot
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return vocab_parallel_cross_entropy(logits.float().contiguous(), labels)


def argmax(logits: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
    """The most probable id over the whole vocabulary, int64 [n]; `first` is the id of this slice's first column.

    Equal values go to the smallest id, as torch.argmax on one device would.
    """
    value, index = logits.float().max(-1)
    if dist.get_world_size(group) == 1:
        return index
    values, indices = gather(value, group), gather(index + first, group)
    return indices.gather(0, values.argmax(0, keepdim=True))[0]


def whole(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All columns of the logits on every tensor rank, [n, V]; no gradient."""
    return gather(logits, group).transpose(0, 1).flatten(1)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the tensors of all ranks of the group, [T, ...]; no gradient."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)
