"""The value types against brute force and against their definitions."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ds_pretrain.core import rng
from ds_pretrain.core.attention import AttentionPattern, Span
from ds_pretrain.core.batch import Batch, Head, Target
from ds_pretrain.core.loss import count_totals, step_loss, weighted_mean
from ds_pretrain.core.registry import Registry
from ds_pretrain.core.vocabulary import Vocabulary

SEGMENT = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 2, 3, 3, 3, 0]], dtype=torch.int32)
LENGTH = torch.tensor([[2, 2, 2, 1, 1, 0], [4] * 6, [0] * 6, [1, 1, 3, 3, 3, 0]])


def brute(segment, sees):
    """The mask by the definition of each structure: documents apart, and `sees(q, k, start)` inside one."""
    rows, length = segment.shape
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for b in range(rows):
        ids = segment[b].tolist()
        for q in range(length):
            for k in range(length):
                start = ids.index(ids[q])
                mask[b, q, k] = ids[q] == ids[k] != 0 and sees(b, q, k, start)
    return mask


PATTERNS = {
    "causal": (AttentionPattern.causal(SEGMENT), lambda b, q, k, start: k <= q),
    "full": (AttentionPattern.full(SEGMENT), lambda b, q, k, start: True),
    "prefix": (
        AttentionPattern.prefix(SEGMENT, LENGTH),
        lambda b, q, k, start: k <= q or (k - start < LENGTH[b, q] and q - start < LENGTH[b, q]),
    ),
    "one document": (AttentionPattern.causal(torch.ones(2, 5, dtype=torch.int32)), lambda b, q, k, start: k <= q),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_dense_mask_is_the_definition(name):
    pattern, sees = PATTERNS[name]
    assert torch.equal(pattern.dense(), brute(pattern.segment, sees))


@pytest.mark.parametrize("name", PATTERNS)
def test_mask_mod_is_the_dense_mask(name):
    pattern, _ = PATTERNS[name]
    rows, length = pattern.segment.shape
    b, q, k = torch.meshgrid(torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(pattern.mask_mod()(b, torch.zeros_like(b), q, k), pattern.dense())


def test_mask_mod_runs_in_flex_attention_as_the_dense_mask_does_in_sdpa():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    pattern, _ = PATTERNS["prefix"]
    pattern = AttentionPattern(pattern.segment[:2], pattern.horizon[:2])
    x = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    block = flex.create_block_mask(pattern.mask_mod(), 2, None, 6, 6, device="cpu")
    ours = flex.flex_attention(x, x, x, block_mask=block)
    dense = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=pattern.dense()[:, None])
    real = pattern.segment != 0
    assert torch.allclose(ours.transpose(1, 2)[real], dense.transpose(1, 2)[real], atol=1e-5)


def test_spans_and_cumulative_lengths_leave_out_the_padding():
    pattern = AttentionPattern.causal(SEGMENT)
    assert pattern.spans() == [Span(0, 0, 3), Span(0, 3, 5), Span(1, 0, 6), Span(3, 0, 1), Span(3, 1, 2), Span(3, 2, 5)]
    assert pattern.cu_seqlens().tolist() == [0, 3, 5, 11, 12, 13, 16]
    assert pattern.cu_seqlens().dtype == torch.int32


@pytest.mark.parametrize("asked", ["mml", "mlmm"])
def test_an_unknown_name_is_answered_with_the_nearest(asked):
    registry = Registry("objective")
    for name in ("mlm", "clm", "electra"):
        registry.register(name)(object())
    with pytest.raises(ValueError, match=f"unknown objective '{asked}': did you mean 'mlm'.* Known: clm, electra, mlm"):
        registry[asked]
    with pytest.raises(ValueError, match=r"unknown objective 'zzzz'\. Known"):
        registry["zzzz"]
    with pytest.raises(ValueError, match="'mlm' is registered twice"):
        registry.register("mlm")(object())
    assert list(registry) == ["clm", "electra", "mlm"] and "mlm" in registry


def test_randomness_is_a_function_of_its_key():
    first, again, other = (rng.generator(*key).random(4) for key in [(0, 1, "a"), (0, 1, "a"), (0, 2, "a")])
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    drawn = [torch.rand(4, generator=rng.torch_generator(0, "a")) for _ in range(2)]
    assert torch.equal(*drawn)
    assert 0 <= rng.torch_seed(0, "a") < 1 << 63


def test_keys_do_not_run_together():
    keys = [("ab", "c"), ("a", "bc"), ("abc",), (1, 23), (12, 3), ("1", 23), (1, "23"), ()]
    assert len({rng.key(*parts) for parts in keys}) == len(keys)


def test_keys_do_not_depend_on_the_process():
    """Python's own hash of a string changes with every interpreter."""
    code = "from ds_pretrain.core import rng; print(rng.key(0, 'train', 5), rng.generator(0, 'train').integers(1 << 40))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.split() == [str(rng.key(0, "train", 5)), str(rng.generator(0, "train").integers(1 << 40))]


HEADS = (Head("a"), Head("b", classes=2, coefficient=50.0))


def test_the_step_is_summed_first_and_divided_once():
    sums, totals = {"a": torch.tensor(6.0), "b": torch.tensor(4.0)}, {"a": 3.0, "b": 8.0}
    assert step_loss(sums, totals, HEADS, 1).item() == pytest.approx(6 / 3 + 50 * 4 / 8)
    assert step_loss(sums, totals, HEADS, 6).item() == pytest.approx(6 * (6 / 3 + 50 * 4 / 8))
    assert weighted_mean({"a": 6.0, "b": 4.0}, totals, HEADS) == pytest.approx(27)


def test_micro_batches_of_unequal_weight_add_up_to_the_whole():
    """GAS 2 on 2 ranks: the engine divides by 2 and averages over 2; the mean of means would be 1.5, not 1.1."""
    nll = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1, 1, 2])
    parts = [nll[:4], nll[4:8], nll[8:9], nll[9:]]
    losses = [step_loss({"a": part.sum()}, {"a": 10.0}, HEADS[:1], 4) for part in parts]
    assert sum(losses).item() / 4 == pytest.approx(1.1)


def test_a_head_without_a_target_contributes_exactly_zero_and_keeps_its_gradient_finite():
    x = torch.ones(3, requires_grad=True)
    sums = {"a": x.sum(), "b": (x * 0).sum()}
    loss = step_loss(sums, {"a": 3.0, "b": 0.0}, HEADS, 1)
    loss.backward()
    assert loss.item() == 1 and torch.equal(x.grad, torch.full((3,), 1 / 3))
    nothing = step_loss({"a": x.sum() * 0, "b": x.sum() * 0}, {"a": 0.0, "b": 0.0}, HEADS, 4)
    assert nothing.item() == 0 and nothing.requires_grad
    assert weighted_mean({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, HEADS) == 0


def test_totals_are_counted_over_micro_batches():
    plane = torch.zeros(1, 2, dtype=torch.int64)
    pattern = AttentionPattern.causal(torch.ones(1, 2, dtype=torch.int32))
    batches = [
        Batch(plane, plane, pattern, {"a": Target(plane, plane.float(), n), "b": Target(plane, plane.float(), 1.5)})
        for n in (2.0, 3.0)
    ]
    assert count_totals(batches, HEADS) == {"a": 5.0, "b": 3.0}


def test_a_target_divides_by_its_weights_unless_told_otherwise():
    labels, weights = np.array([1, 2, 3]), np.array([0.5, 0, 2])
    assert Target.of(labels, weights).total == 2.5 and Target.of(labels, weights, 3).total == 3
    assert Target.of(labels, weights).weights.dtype == np.float32


def test_words_are_what_is_not_special():
    vocab = Vocabulary(10, 0, 1, 2, 3, 4, 5, (6, 7), frozenset(range(8)))
    assert vocab.words.tolist() == [8, 9] and vocab.is_special.tolist() == [True] * 8 + [False] * 2


def test_words_of_any_script():
    """Marks belong to their letter, an ideograph is a word (BERT's rule), and so is every other sign."""
    text = "हिन्दी cafe\u0301 你好 ไทย-x"
    vocab = replace(Vocabulary.synthetic(), surfaces=lambda: list(text), specials=frozenset(), size=len(text))
    starts = vocab.word_starts(np.arange(len(text)))
    words = "".join("|" * bool(start) + char for start, char in zip(starts, text, strict=True))
    assert words == "|हिन्दी| |cafe\u0301| |你|好| |ไทย|-|x"
