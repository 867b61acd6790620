"""A whole tensor and its slices: round trips over random shapes, and slices that mean what megatron-core means."""

from dataclasses import replace

import pytest
import torch

from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.transformer import Build, Network, initial_value, initialise
from ds_pretrain.parallel.shards import Shard, shards


def cases(count=150):
    """Random (shape, dim, stride, ranks, padding): slices are of equal length once `padding` rows are added."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(count):
        shape, ranks, stride = [draw(1, 6) for _ in range(draw(1, 4))], draw(1, 6), draw(1, 4)
        dim = draw(0, len(shape))
        rows = draw(1, 5) * stride  # of one rank
        padding = draw(0, rows * ranks) if stride == 1 else 0
        shape[dim] = rows * ranks - padding
        yield tuple(shape), dim, stride, ranks, rows


@pytest.mark.parametrize(("shape", "dim", "stride", "ranks", "rows"), cases())
def test_slices_merge_into_the_whole(shape, dim, stride, ranks, rows):
    whole = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)
    local = (*shape[:dim], rows, *shape[dim + 1 :])
    parts = [Shard("x", shape, local, dim, stride, rank, ranks) for rank in range(ranks)]
    slices = [part.take(whole) for part in parts]
    assert {tuple(s.shape) for s in slices} == {local}
    assert torch.equal(parts[0].merge(slices), whole)
    kept = torch.cat([s.flatten() for s in slices])
    assert torch.equal(kept[kept != 0].sort().values, whole.flatten())  # each element once; what is added is zero


@pytest.mark.parametrize("shape", [(5,), (3, 4)])
def test_a_replica_is_the_whole(shape):
    shard, whole = Shard("x", shape, shape), torch.randn(shape)
    assert torch.equal(shard.take(whole), whole) and torch.equal(shard.merge([whole, whole]), whole)


def test_padding_rows_are_zero_and_at_the_end():
    whole = torch.ones(509, 2)
    slices = [Shard("word.weight", (509, 2), (128, 2), 0, 1, rank, 4).take(whole) for rank in range(4)]
    assert [int(s[:, 0].sum()) for s in slices] == [128, 128, 128, 125]
    assert not slices[3][125:].any()


def test_a_slice_of_swiglu_is_a_slice_of_the_gate_and_the_same_slice_of_the_up_projection():
    gate, up = torch.arange(8), torch.arange(100, 108)
    whole = torch.cat([gate, up])
    for rank in range(4):
        part = Shard("fc1", (16,), (4,), 0, 2, rank, 4).take(whole)
        assert part.tolist() == [2 * rank, 2 * rank + 1, 100 + 2 * rank, 101 + 2 * rank]


STYLES = {
    "gpt": ModelConfig(layers=2, hidden=32, heads=4, vocab=509, positions=16),
    "llama": ModelConfig(preset="llama-1m", layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=509),
    "bert": ModelConfig(preset="bert-1m", layers=2, hidden=32, heads=4, vocab=509, positions=16),
}
DIVIDED = {
    "word.weight": (0, 1),
    "self_attention.linear_qkv.weight": (0, 1),
    "self_attention.linear_qkv.bias": (0, 1),
    "self_attention.linear_proj.weight": (1, 1),
    "mlp.linear_fc1.weight": (0, 1),
    "mlp.linear_fc1.bias": (0, 1),
    "mlp.linear_fc2.weight": (1, 1),
    "output.weight": (0, 1),
    "head.output_bias.bias": (0, 1),
}


def described(mesh, style):
    network = Network(Build(STYLES[style], mesh))
    return network, dict(shards(network, 0, 1))


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_is_described_once_and_divided_as_megatron_does(mesh, style):
    network, found = described(mesh, style)
    assert sorted(map(id, found.values())) == sorted(map(id, network.parameters()))
    assert len({shard.name for shard in found}) == len(found)
    for shard, parameter in found.items():
        assert shard.shape == shard.local == tuple(parameter.shape)
        dim, stride = next((v for k, v in DIVIDED.items() if shard.name.endswith(k)), (None, 1))
        if style == "llama" and "linear_fc1" in shard.name:
            stride = 2
        assert (shard.dim, shard.stride) == (dim, stride), shard.name


def test_names_are_the_ones_checkpoints_hold(mesh):
    names = {style: {s.name for s in described(mesh, style)[1] if not s.name.startswith("layers.1.")} for style in STYLES}
    attention = {f"layers.0.self_attention.{x}.weight" for x in ("linear_qkv", "linear_proj")}
    layer = attention | {f"layers.0.mlp.{x}.weight" for x in ("linear_fc1", "linear_fc2")}
    norms = {"layers.0.input_layernorm.weight", "layers.0.pre_mlp_layernorm.weight", "head.final_norm.weight"}
    assert names["llama"] == {"word.weight", "output.weight"} | layer | norms
    gpt = {"word.weight", "embed.position.weight"} | layer | norms
    assert names["gpt"] == gpt | {n.replace("weight", "bias") for n in layer | norms}
    post = {"layers.0.pre_cross_attn_layernorm.weight", "layers.0.output_norm.weight", "embed.norm.weight"}
    head = {"head.dense.weight", "head.dense_norm.weight"}
    both = layer | post | head
    tables = {"word.weight", "embed.position.weight", "embed.types.weight", "head.output_bias.bias"}
    assert names["bert"] == tables | both | {n.replace("weight", "bias") for n in both}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_initial_weights_do_not_depend_on_the_tensor_ranks(mesh, style, ranks):
    """What each of several tensor ranks would take merges into what one rank has."""
    network, found = described(mesh, style)
    initialise(network, Build(STYLES[style], mesh), 5)
    for shard, parameter in found.items():
        local = list(shard.shape)
        if shard.dim is not None:
            local[shard.dim] = -(-local[shard.dim] // ranks)
        parts = [replace(shard, local=tuple(local), rank=rank, ranks=ranks) for rank in range(ranks)]
        slices = [part.take(initial_value(part.name, part.shape, STYLES[style], 5)) for part in parts]
        assert torch.equal(parts[0].merge(slices), parameter), shard.name
        assert all(s.shape == part.local for s, part in zip(slices, parts, strict=True))


def test_a_slice_of_qkv_holds_whole_groups(mesh):
    """Each key head travels with its queries: rank r of 2 has group r of 2, queries, key and value."""
    model = STYLES["llama"]
    whole = torch.arange(2).repeat_interleave(4 * model.head_dim)[:, None].expand(-1, 32)
    for rank in range(2):
        part = Shard("qkv", (64, 32), (32, 32), 0, 1, rank, 2).take(whole)
        assert part.unique().tolist() == [rank]
    shard = next(s for s in described(mesh, "llama")[1] if s.name.endswith("linear_qkv.weight"))
    assert shard.shape == (64, 32)
