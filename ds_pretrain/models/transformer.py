"""The list of layers that every model and both engines are made of.

    word -> embed -> layers.0 ... layers.N-1 -> head -> output

Each is a module from `Stream` to `Stream` (the last two: to `Answers`), so a pipeline stage is a slice of the list and the
model on one device is all of it. The transformer layer is megatron-core's, told by `ModuleSpec` to use our norm and our
core attention; BERT's post-norm is the same class with the norms in other slots. Every layer carries its logical name, so
parameters are called the same whatever engine wraps them.

Shape suffixes: B rows, S positions, H hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    checkpoint,
    copy_to_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from ds_pretrain.core import rng
from ds_pretrain.core.attention import Kind
from ds_pretrain.core.batch import Batch, Stream
from ds_pretrain.core.batch import Head as HeadSpec
from ds_pretrain.models.attention import CoreAttention, lower
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.models.heads import Answers, Head
from ds_pretrain.models.noise import dropout, row_keys
from ds_pretrain.models.norm import Norm
from ds_pretrain.parallel.comm import all_reduce
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.parallel.shards import shards

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
    "relu": F.relu,
}
Sum = Callable[[bool, bool], Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]]
"""megatron-core's slot for bias, dropout and residual sum: (training, fused) to (branch, residual, p) to their sum."""


@dataclass(frozen=True)
class Build:
    """What the layers need to know beside the model's shape."""

    model: ModelConfig
    mesh: Mesh
    kind: Kind = "mixed"
    """The attention kind that the objective promises."""
    seq_len: int = 0
    """Positions of a learned position embedding when the model does not say."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass."""
    heads: tuple[HeadSpec, ...] = (HeadSpec("vocabulary"),)
    """What the objective asks of the model."""
    generator: tuple[str, float] | None = None
    """A smaller network that fills the scored positions of this head first, and its width as a share of the model's."""
    embedding_width: int | None = None
    """Width of the vocabulary matrix where it is not the model's (a generator shares its model's)."""

    @property
    def embedding(self) -> int:
        return self.embedding_width or self.model.hidden

    @property
    def predicts_words(self) -> bool:
        """Whether this network itself has a head over the vocabulary: with a generator, that one has it."""
        return self.generator is None and any(head.classes is None for head in self.heads)

    @functools.cached_property
    def small(self) -> Build:
        """The generator's own build."""
        assert self.generator is not None
        words = tuple(head for head in self.heads if head.classes is None)
        model = self.model.narrower(self.generator[1])
        return replace(self, model=model, heads=words, generator=None, embedding_width=self.model.hidden)

    @functools.cached_property
    def megatron(self) -> TransformerConfig:
        """The same model as megatron-core's config. The pipeline is DeepSpeed's, so it is told of one stage."""
        m = self.model
        return TransformerConfig(
            num_layers=m.layers,
            hidden_size=m.hidden,
            num_attention_heads=m.heads,
            num_query_groups=m.groups,
            ffn_hidden_size=m.ffn_width,
            normalization="RMSNorm" if m.norm == "rmsnorm" else "LayerNorm",
            layernorm_epsilon=m.norm_eps,
            activation_func=_ACTIVATIONS[m.activation],
            gated_linear_unit=m.activation == "swiglu",
            add_bias_linear=m.bias,
            hidden_dropout=m.dropout,
            attention_dropout=m.dropout if m.attention_dropout is None else m.attention_dropout,
            tensor_model_parallel_size=self.mesh.plan.tensor,
            sequence_parallel=self.mesh.plan.sequence and self.mesh.plan.tensor > 1,
            init_method=_leave,
            output_layer_init_method=_leave,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
        )

    def own(self, plane: Tensor) -> Tensor:
        """The positions of a plane [B, S] that this context rank has."""
        size = plane.shape[1] // self.mesh.plan.context
        return plane.narrow(1, self.mesh.at.context * size, size)

    def own_states(self, plane: Tensor) -> Tensor:
        """A plane [B, S] where this rank has hidden states between the matrices: [S / parts, B]."""
        plane, ranks = self.own(plane).t(), self.mesh.plan.tensor if self.megatron.sequence_parallel else 1
        return plane.chunk(ranks)[self.mesh.at.tensor % ranks]

    @property
    def padded_vocab(self) -> int:
        """Vocabulary rows after padding to a multiple of the tensor ranks."""
        ranks = self.mesh.plan.tensor
        return -(-self.model.vocab_size // ranks) * ranks


def _leave(weight: Tensor) -> Tensor:
    """megatron-core's initialiser slot: weights are set by name afterwards, the same under every layout."""
    return weight


class Vocabulary(VocabParallelEmbedding):
    """The vocabulary matrix: looks words up, and projects onto them where it is tied to the output."""

    def __init__(self, build: Build, logical: str) -> None:
        super().__init__(build.padded_vocab, build.model.hidden, init_method=_leave, config=build.megatron)
        self.logical = logical
        self.weight.whole_rows = build.model.vocab_size

    def forward(self, x: Tensor, project: bool = False) -> Tensor:
        """ids [B, S] -> [B, S, H], or with `project` hidden [n, H] -> this rank's logits [n, V / ranks]."""
        return F.linear(copy_to_tensor_model_parallel_region(x), self.weight) if project else super().forward(x)


class Word(Vocabulary):
    """First layer: (tokens, position, segment, horizon[, token type]) -> the same with hidden states in front."""

    def __init__(self, build: Build) -> None:
        super().__init__(build, "word")
        self.own = build.own

    def forward(self, x: Any, project: bool = False) -> Any:
        if project:
            return super().forward(x, project=True)
        return (super().forward(self.own(x[0])).transpose(0, 1), *x)


class Embed(nn.Module):
    """Second layer: adds positions and token types, and cuts the sequence for sequence parallelism."""

    logical = "embed"

    def __init__(self, build: Build) -> None:
        super().__init__()
        m = build.model
        self.position = nn.Embedding(m.positions or build.seq_len, m.hidden) if m.position == "learned" else None
        self.types = nn.Embedding(m.token_types, m.hidden) if m.token_types else None
        self.norm = _replica_norm(build) if m.norm_position == "post" else None
        self.dropout, self.site = m.dropout, rng.key("embed")
        self.sequence, self.own, self.own_states = build.megatron.sequence_parallel, build.own, build.own_states

    def forward(self, x: tuple[Tensor, ...]) -> Stream:
        hidden, tokens, position, segment, horizon, *token_type = x
        if self.position is not None:
            hidden = hidden + self.position(self.own(position).t())
        if self.types is not None:
            types = token_type[0] if token_type else torch.zeros_like(tokens)
            hidden = hidden + self.types(self.own(types).t())
        hidden = hidden if self.norm is None else self.norm(hidden)
        if self.sequence:
            hidden = scatter_to_sequence_parallel_region(hidden)
        noise = torch.zeros_like(tokens)
        if self.training and self.dropout:
            noise = row_keys(tokens, torch.initial_seed())
            hidden = dropout(hidden, self.own_states(noise), self.site, self.dropout)
        return Stream(hidden.contiguous(), tokens, position, segment, horizon, noise)  # it may have to be sent


class Block(TransformerLayer):
    """One transformer layer: Stream -> Stream."""

    def __init__(self, build: Build, index: int, logical: str = "layers") -> None:
        m, name = build.model, f"{logical}.{index}"
        sums = [self._sum(f"{name} {part}") for part in ("attention", "mlp")]
        super().__init__(build.megatron, _spec(m, *sums), layer_number=index + 1)
        self.logical = name
        self.kind, self.recompute, self.own_states = build.kind, build.recompute, build.own_states
        self.rotary = (m.head_dim, m.rope_base if m.position == "rope" else None, m.rope_scaling)
        self.output_norm = Norm(build.megatron, m.hidden, m.norm_eps) if m.norm_position == "post" else None

    def forward(self, x: tuple[Tensor, ...]) -> Stream:
        stream = Stream(*x)
        pattern = lower(stream.segment, stream.horizon, stream.position, self.kind, *self.rotary)

        noise = self.own_states(stream.noise)

        def run(hidden: Tensor) -> Tensor:
            self.noise = noise
            out, _ = TransformerLayer.forward(self, hidden, attention_mask=pattern)
            return out if self.output_norm is None else self.output_norm(out)

        again = self.recompute and self.training
        return stream._replace(hidden=checkpoint(run, False, stream.hidden) if again else run(stream.hidden))

    def _sum(self, use: str) -> Sum:
        """A residual sum whose dropout no layout changes."""
        site = rng.key(use)

        def chosen(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
            def add(out: tuple[Tensor, Tensor | None], residual: Tensor, p: float) -> Tensor:
                x, bias = out
                x = x if bias is None else x + bias
                return residual.to(x.dtype) + (dropout(x, self.noise, site, p) if training and p else x)

            return add

        return chosen


class Narrow(nn.Module):
    """From the shared embeddings to the width of the generator."""

    logical = "generator.embed"

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.dense = nn.Linear(build.model.hidden, build.small.model.hidden)
        for parameter in self.parameters():
            parameter.sequence_parallel = build.megatron.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: tuple[Tensor, ...]) -> Stream:
        stream = Stream(*x)
        return stream._replace(hidden=self.dense(stream.hidden))


class Generator(nn.Module):
    """First layer of two networks: a narrower one with the same embeddings, and the word embedding as output matrix, fills the
    positions that its head scores; then the tokens are embedded for the model. (planes, labels, weights) -> Stream.

    It is one layer, so that its answers never leave the first stage. What they cost is told there: `tell` gets them with
    the labels and weights, and hands back the hidden states with the gradient of that cost tied to them. The price: the
    first stage of a pipeline has the generator's work on top of its share of layers.
    """

    tell: Callable[[Answers, Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(self, build: Build) -> None:
        super().__init__()
        small = build.small
        self.word, self.embed, self.narrow = Word(build), Embed(build), Narrow(build)
        self.layers = nn.ModuleList(Block(small, index, "generator.layers") for index in range(small.model.layers))
        self.head = Head(small, "generator.head")

    def forward(self, x: tuple[Tensor, ...], tell: Callable[..., Tensor] | None = None) -> Stream:
        tokens, position, segment, horizon, *asked = x
        planes = (position, segment, horizon)
        if not asked:
            return self.embed(self.word((tokens, *planes)))
        labels, weights = asked
        answers = self._answers((tokens, *planes))
        stream: Stream = self.embed(self.word((answers.fill(weights != 0), *planes)))
        tell = tell or self.tell
        return stream if tell is None else stream._replace(hidden=tell(answers, labels, weights, stream.hidden))

    def _answers(self, planes: tuple[Tensor, ...]) -> Answers:
        x = self.narrow(self.embed(self.word(planes)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x).attach(self.word)


class Output(Vocabulary):
    """Last layer where the output matrix is not tied: hands its own matrix to the answers."""

    def __init__(self, build: Build) -> None:
        super().__init__(build, "output")

    def forward(self, x: Any, project: bool = False) -> Any:
        return super().forward(x, project=True) if project else x.attach(self)


def attach_tied(word: Word, answers: Answers) -> Answers:
    """Last layer where the output matrix is the word embedding."""
    return answers.attach(word)


def _spec(model: ModelConfig, attention_sum: Sum, mlp_sum: Sum) -> TransformerLayerSubmodules:
    """megatron-core's layer with our parts. Post-norm: the slot before cross attention follows the attention's residual
    sum, and there is no cross attention, so a norm there is exactly BERT's; the second one follows the whole layer."""
    pre = model.norm_position == "pre"
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=CoreAttention, linear_proj=RowParallelLinear
    )
    return TransformerLayerSubmodules(
        input_layernorm=Norm if pre else IdentityOp,
        self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.arbitrary}, attention),
        self_attn_bda=attention_sum,
        pre_cross_attn_layernorm=IdentityOp if pre else Norm,
        pre_mlp_layernorm=Norm if pre else IdentityOp,
        mlp=ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
        mlp_bda=mlp_sum,
    )


def _replica_norm(build: Build) -> Norm:
    """A norm that sees whole sequences on every tensor rank, so its gradient needs no sum over them."""
    norm = Norm(build.megatron, build.model.hidden, build.model.norm_eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = False  # type: ignore[attr-defined]
    return norm


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the list: its class and arguments, and, where a module is shared, under which name and how it is used."""

    cls: type[nn.Module]
    args: tuple[Any, ...]
    tied: str | None = None
    use: Callable[[Any, Any], Any] | None = None


def layer_list(build: Build) -> list[LayerSpec]:
    """The whole model as a list, in order; `tied` entries of one name share one module."""
    tied = "word" if build.model.tie_embeddings and build.predicts_words else None
    first = [LayerSpec(Word, (build,), tied), LayerSpec(Embed, (build,))]
    layers = [
        *(first if build.generator is None else [LayerSpec(Generator, (build,))]),
        *(LayerSpec(Block, (build, index)) for index in range(build.model.layers)),
        LayerSpec(Head, (build,)),
    ]
    if not build.predicts_words:
        return layers
    return [*layers, LayerSpec(Word, (build,), tied, attach_tied) if tied else LayerSpec(Output, (build,))]


class Network(nn.Module):
    """The list on one pipeline stage, for the engine without a pipeline and for inference."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build, self.layers = build, nn.ModuleList()
        self.steps: list[Callable[[Any], Any]] = []
        shared: dict[str, nn.Module] = {}
        for spec in layer_list(build):
            module = shared.get(spec.tied or "") or spec.cls(*spec.args)
            if spec.tied:
                shared[spec.tied] = module
            self.steps.append(functools.partial(spec.use, module) if spec.use else module)
            if module not in set(self.layers):
                self.layers.append(module)
        prepare_parameters(self, build)

    def forward(self, batch: Batch, criterion: Callable[[Answers, Batch], Any]) -> Any:
        """What `criterion` makes of the answers; called inside, so that sharded parameters are there for the heads. One that
        can hear what a generator's answers cost has `generated` for it."""
        first, *others = self.steps
        told = {"tell": getattr(criterion, "generated", None)} if self.build.generator else {}
        x = first(first_inputs(batch, self.build), **told)
        for step in others:
            x = step(x)
        return criterion(x, batch)


def first_inputs(batch: Batch, build: Build) -> tuple[Tensor, ...]:
    """What enters the first layer: integer planes, int64 [B, S] each, and what a generator is asked."""
    planes = (batch.inputs, batch.position, batch.attention.segment, batch.attention.horizon)
    if build.generator is None:
        return planes if batch.token_type is None else (*planes, batch.token_type)
    asked = batch.targets.get(build.generator[0])
    return planes if asked is None else (*planes, asked.labels, asked.weights)


def prepare_parameters(module: nn.Module, build: Build) -> None:
    """Sum the gradients that sequence parallelism leaves partial, over the tensor ranks."""
    if not build.megatron.sequence_parallel:
        return
    group = build.mesh.tensor_group
    for parameter in module.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(functools.partial(_sum_over, group))


def _sum_over(group: Any, gradient: Tensor) -> Tensor:
    return all_reduce(gradient.contiguous().clone(), group)


def initialise(module: nn.Module, build: Build, seed: int) -> None:
    """Set every parameter to its initial value: a pure function of (seed, logical name), whatever the layout.

    Each tensor is drawn whole on the CPU and sliced, which costs one tensor of memory and some seconds per billion
    parameters, and buys the same model on any number of ranks.
    """
    for shard, parameter in shards(module, build.mesh.at.tensor, build.mesh.plan.tensor):
        with torch.no_grad():
            parameter.copy_(shard.take(initial_value(shard.name, shard.shape, build.model, seed)))


def initial_value(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor: norms 1, biases 0, matrices normal with GPT-2's depth scaling when pre-norm."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    residual = name.endswith(("linear_proj.weight", "linear_fc2.weight")) and model.norm_position == "pre"
    std = model.init_std / (math.sqrt(2 * model.layers) if residual else 1)
    return torch.randn(shape, generator=rng.torch_generator("init", seed, name)) * std
