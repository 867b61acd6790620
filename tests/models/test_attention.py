"""The kernels against the one dense reference, forward and backward; rotary positions against those of transformers."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.models.attention import CoreAttention, Documents, by_document, lower, rotary_table, rotate

LENGTH, SIZE = 16, 8
SEGMENTS = {
    "single": [[1] * 16] * 3,
    "packed": [[1] * 5 + [2] * 3 + [3] * 8, [1] * 16, [1] + [2] * 15],
    "padded": [[1] * 5 + [2] * 4 + [0] * 7, [1] * 15 + [0], [0] * 16],
    "padded in front and between": [
        [0] * 3 + [1] * 13,
        [1] * 6 + [0] * 2 + [2] * 8,
        [0] + [1] * 4 + [0] + [2] * 9 + [0],
    ],
}
HEADS = {"as many key heads": (4, 4), "grouped": (4, 2), "one key head": (3, 1)}


def pattern(kind, rows):
    segment = torch.tensor(SEGMENTS[rows])
    if kind != "mixed":
        return getattr(AttentionPattern, kind)(segment)
    return AttentionPattern.prefix(segment, (segment * 2).clamp(max=5))  # 2, 4 and 5 positions of a document


def lowered(pattern, base=None, size=SIZE):
    position = torch.arange(pattern.segment.shape[1]).repeat(len(pattern.segment), 1)
    return lower(pattern.segment, pattern.horizon, position, pattern.kind, size, base)


def qkv(heads, groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(LENGTH, 3, n, SIZE) for n in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", SEGMENTS)
@pytest.mark.parametrize("kind", ["causal", "full", "mixed"])
def test_documents_one_by_one_are_the_dense_mask(kind, rows, heads):
    where, mine, dense = pattern(kind, rows), qkv(*HEADS[heads]), qkv(*HEADS[heads])
    out = by_document(*mine, where, Documents.of(where), 0.0)
    q, k, v = (x.permute(1, 2, 0, 3) for x in dense)
    expected = F.scaled_dot_product_attention(q, k, v, where.dense()[:, None], enable_gqa=True).permute(2, 0, 1, 3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    out.backward(upstream)
    expected.backward(upstream)
    for ours, theirs in zip(mine, dense, strict=True):
        assert theirs.grad.abs().max() > 0.1
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_documents_of_one_length_are_attended_together():
    documents = Documents.of(pattern("full", "packed"))
    assert sorted(documents.shapes) == [(1, 1), (1, 3), (1, 5), (1, 8), (1, 15), (1, 16)]
    assert Documents.of(pattern("full", "single")).shapes == [(3, 16)]
    assert torch.equal(documents.order[documents.inverse], torch.arange(3 * LENGTH))


@pytest.mark.parametrize("kind", ["causal", "full", "mixed"])
def test_padding_and_empty_rows_are_zeros_and_take_no_gradient(kind):
    where, (q, k, v) = pattern(kind, "padded"), qkv(4, 2)
    out = by_document(q, k, v, where, Documents.of(where), 0.0)
    out.sum().backward()
    padding = (where.segment == 0).t()
    assert torch.equal(out[padding], torch.zeros(int(padding.sum()), 4, SIZE, dtype=out.dtype))
    for x in (q, k, v):
        assert x.grad.isfinite().all() and not x.grad[padding].any()


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_core_attention_is_the_textbook(groups):
    """softmax(q k / sqrt(D)) v, one head at a time, rotary positions counted inside each document."""
    where, size, heads = pattern("causal", "packed"), 8, 4
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(LENGTH, 3, n, size, generator=generator) for n in (heads, groups, groups))
    position = torch.stack([_inside(row) for row in where.segment])
    table = lower(where.segment, where.horizon, position, where.kind, size, 100.0)
    core = CoreAttention(SimpleNamespace(attention_dropout=0.5)).eval()
    out = core(q, k, v, table).view(LENGTH, 3, heads, size)
    rotated_q, rotated_k = rotate(q, table.rotary), rotate(k, table.rotary)
    for row in range(3):
        for head in range(heads):
            group = head * groups // heads
            scores = rotated_q[:, row, head] @ rotated_k[:, row, group].T / size**0.5
            weights = scores.masked_fill(~where.dense()[row], -torch.inf).softmax(-1)
            torch.testing.assert_close(out[:, row, head], weights @ v[:, row, group], rtol=0, atol=1e-6)


def _inside(segment):
    starts = torch.tensor([0, *(torch.nonzero(segment[1:] != segment[:-1]).flatten() + 1).tolist()])
    index = torch.arange(len(segment))
    return index - starts[torch.searchsorted(starts, index, right=True) - 1]


def test_dropout_acts_in_training_only_keeps_documents_apart_and_draws_from_the_ranks_own_stream(mesh):
    where = pattern("causal", "padded")
    q, k, v = (torch.randn(LENGTH, 3, 4, SIZE, generator=torch.Generator().manual_seed(s)) for s in range(3))
    core = CoreAttention(SimpleNamespace(attention_dropout=0.5))
    quiet = core.eval()(q, k, v, lowered(where))
    core.train()
    mesh.seed(0, 1)
    default = torch.get_rng_state()
    first, second = core(q, k, v, lowered(where)), core(q, k, v, lowered(where))
    assert torch.equal(torch.get_rng_state(), default)
    mesh.seed(0, 1)
    assert torch.equal(core(q, k, v, lowered(where)), first)
    assert not torch.equal(first, second) and not torch.equal(first, quiet)
    assert not first.transpose(0, 1)[where.segment == 0].any()
    changed = v.clone()
    changed[5:9, 0] += 1  # the second document of the first row
    mesh.seed(0, 1)
    again = core(q, k, changed, lowered(where))
    assert torch.equal(again[:5, 0], first[:5, 0]) and not torch.equal(again[5:9, 0], first[5:9, 0])


@pytest.mark.parametrize("base", [10000.0, 5e5])
@pytest.mark.parametrize("size", [2, 8, 64])
def test_rotary_positions_are_those_of_llama(base, size):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=4 * size, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    q, k = (torch.randn(2, 4, 40, size, generator=torch.Generator().manual_seed(s)) for s in range(2))
    position = torch.stack([torch.arange(40), torch.arange(40) * 37 % 500])
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, position)
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    table = rotary_table(position, size, base)
    # Angles reach 500, where fp32 numbers are 3e-5 apart: the two ways to write a frequency differ by that.
    for x, theirs in zip((q, k), expected, strict=True):
        ours = rotate(x.permute(2, 0, 1, 3), table).permute(1, 2, 0, 3)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
        near = position[0] < 4
        torch.testing.assert_close(ours[0][:, near], theirs[0][:, near], rtol=0, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind()

    def score(i, j):
        return (
            rotate(q, rotary_table(torch.tensor([[i]]), 16, 1e4)) * rotate(k, rotary_table(torch.tensor([[j]]), 16, 1e4))
        ).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=0, atol=1e-4)
    assert (score(3, 1) - score(1, 3)).abs() > 1e-2


def test_rotation_keeps_the_type_and_works_in_fp32():
    x = torch.randn(4, 1, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rotary_table(torch.arange(4)[None] * 300, 8, 1e4)
    assert table[0].dtype == torch.float32
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_a_pattern_is_lowered_once_per_micro_batch_and_anew_for_anything_else():
    segment = torch.ones(2, 8, dtype=torch.int64)
    causal, full = AttentionPattern.causal(segment), AttentionPattern.full(segment)
    position = torch.arange(8).repeat(2, 1)
    first = lower(segment, causal.horizon, position, "causal", 8, 1e4)
    assert lower(segment, causal.horizon, position, "causal", 8, 1e4) is first
    others = [
        (segment, full.horizon, position, "full", 8, 1e4),  # the same rows under another pattern
        (segment, full.horizon, position, "mixed", 8, 1e4),
        (segment, causal.horizon, position, "mixed", 8, 1e4),
        (segment, full.horizon, position, "mixed", 8, 1e4),
        (segment, full.horizon, position, "mixed", 16, 1e4),  # another model
        (segment, full.horizon, position, "mixed", 16, None),
        (segment, full.horizon, position + 1, "mixed", 16, 1e4),
    ]
    seen = [first]
    for asked in others:
        seen.append(lower(*asked))
        assert seen[-1] is not seen[-2]
        assert torch.equal(seen[-1].pattern.dense(), AttentionPattern(*asked[:2]).dense())
        if asked[-1]:
            assert torch.equal(seen[-1].rotary[0], rotary_table(asked[2], *asked[-2:])[0])


def test_earlier_micro_batches_are_forgotten():
    alive = []
    for _ in range(4):
        plane = torch.ones(1, 8, dtype=torch.int64)
        alive.append(weakref.ref(lower(plane, plane, plane, "causal", 8, 1e4).rotary[0]))
        del plane
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 1
