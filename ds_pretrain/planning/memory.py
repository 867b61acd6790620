"""What a rank holds at the fullest moment of a training step, by arithmetic: bytes of tensors, part by part.

A step is a few moments (the loss, the backward pass of the last and of the first layer, the reduction of gradients, the
optimizer), each with its own parts alive; the peak is the largest of them. What is alive was read off DeepSpeed 0.19.8,
megatron-core 0.16.1 and our own layers, allocation by allocation, and is held against measured peaks: within 5% for all 137
cases of `benchmarks/memory_cpu.md`, 19 of them in a test. ZeRO's division of states is Rajbhandari et al. 2020, what a layer
keeps follows Korthikanti et al. 2022, for the tensors that these layers really make. The price: another version of a library
may hold more, and says so only in that test.

Not counted: what is no tensor (the interpreter, libraries, CUDA's context, fragmentation) and what NCCL or gloo allocate.
On CUDA the formulas are the same but for the lines marked so; they were never measured there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ds_pretrain.config import RunConfig
from ds_pretrain.core.batch import Batch
from ds_pretrain.core.vocabulary import Vocabulary
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective
from ds_pretrain.parallel.plan import ParallelPlan, stage_of_layer
from ds_pretrain.planning.held import BUCKET, PERSISTS, PREFETCH, REUSE, is_tied, parameters, predicts_words
from ds_pretrain.training.deepspeed_json import asks_offload, half, stage_of

if TYPE_CHECKING:
    from ds_pretrain.data.dataset import Samples

SAMPLED = 64
"""Rows of a micro-batch that are made to count its targets; of a larger one the rest is taken to be alike."""


@dataclass(frozen=True)
class Load:
    """What a micro-batch asks for. positions: rows x length. scored: by head, positions with a target. pairs: sum over its
    documents of the squared length, what attention makes where it keeps its scores or a mask."""

    positions: float
    scored: Mapping[str, float]
    pairs: float

    @staticmethod
    def of(objective: Objective, length: int, rows: int, draws: int = 4) -> Load:
        """The heaviest of some micro-batches of random text, in documents as long as an example can be."""
        from ds_pretrain.data.dataset import Cursor

        some = min(rows, SAMPLED)
        data, found, cursor = random_text(objective, length, some), [], Cursor()
        for _ in range(draws):
            numbers, cursor = data.rows(cursor, some)
            found.append(Load.counted(data.collate(numbers)).times(rows / some))
        return heaviest(found)

    @staticmethod
    def counted(batch: Batch) -> Load:
        """What a micro-batch really asks for."""
        scored = {name: int((target.weights != 0).sum()) for name, target in batch.targets.items()}
        pairs = sum((span.stop - span.start) ** 2 for span in batch.attention.spans())
        return Load(batch.inputs.numel(), scored, pairs)

    def times(self, factor: float) -> Load:
        """As many rows more."""
        scored = {name: count * factor for name, count in self.scored.items()}
        return Load(self.positions * factor, scored, self.pairs * factor)


def heaviest(loads: Sequence[Load]) -> Load:
    """The one that scores most positions."""
    return max(loads, key=lambda load: sum(load.scored.values()))


def random_text(objective: Objective, length: int, rows: int, seed: int = 0) -> Samples:
    """Rows of random ids, in documents as long as an example can be, enough of them for a step of that many rows."""
    from ds_pretrain.data.dataset import Samples

    vocab = Vocabulary.synthetic()
    return Samples(_Text(vocab, objective.piece(length), max(64, 4 * rows)), vocab, length, objective, "random", seed)


class _Text:
    """A store in memory."""

    digest = "random"

    def __init__(self, vocab: Vocabulary, length: int, count: int) -> None:
        self.lengths = np.full(count, length)
        self.text = np.stack([self.lengths * 3, self.lengths], axis=1)
        self.document = np.append(np.random.default_rng(0).choice(vocab.words, length - 1), vocab.eod).astype(np.int32)

    def slice(self, i: int, start: int, stop: int) -> np.ndarray:
        return self.document[start:stop]


@dataclass(frozen=True)
class Moment:
    """A moment of the step, and bytes by part."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Rank:
    """A rank by all that its memory depends on.

    place: its pipeline stage. replicas: ranks that ZeRO divides over. deepspeed: the DeepSpeed JSON. accumulation:
    micro-batches of a step. cuda: whether it is a GPU.
    """

    model: ModelConfig
    objective: Objective
    plan: ParallelPlan
    replicas: int
    deepspeed: Mapping[str, Any]
    load: Load
    accumulation: int = 1
    recompute: bool = False
    place: int = 0
    cuda: bool = False

    @cached_property
    def zero(self) -> int:
        return stage_of(self.deepspeed)

    @cached_property
    def width(self) -> int:
        """Bytes of a number in the model."""
        return 2 if half(self.deepspeed) else 4

    def setting(self, name: str, default: int) -> int:
        """A number of ZeRO's section; DeepSpeed's default where it is not set."""
        return int(self.deepspeed.get("zero_optimization", {}).get(name, default))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters on this rank, each with its dimensions here."""
        return parameters(self.model, self.objective, self.plan, self.place)

    @property
    def words(self) -> bool:
        return predicts_words(self.objective)

    @property
    def tied(self) -> bool:
        return is_tied(self.model, self.objective)

    @property
    def first(self) -> bool:
        return self.place == 0

    @property
    def last(self) -> bool:
        return self.place == self.plan.pipeline - 1

    @cached_property
    def layers(self) -> int:
        return stage_of_layer(self.model.layers, self.plan.pipeline).count(self.place)

    @property
    def flying(self) -> int:
        """Micro-batches that wait here for their backward pass (1F1B)."""
        return min(self.plan.pipeline - self.place, self.accumulation)

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @cached_property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)

    @cached_property
    def largest(self) -> int:
        return max(self.sizes)

    @cached_property
    def word(self) -> int:
        """Elements of the matrix that words are embedded by, 0 on a stage that does not embed."""
        return math.prod(self.shapes["word.weight"]) if self.first else 0

    @cached_property
    def matrix(self) -> int:
        """Elements of the matrix that predicts words, 0 on a stage that does not."""
        if not (self.words and self.last):
            return 0
        return math.prod(self.shapes["word.weight" if self.tied else "output.weight"])

    @cached_property
    def groups(self) -> list[int]:
        """Elements by parameter group: what is decayed, what is not (`training/optimizer.py`)."""
        return [sum(math.prod(s) for s in self.shapes.values() if (len(s) > 1) == decayed) for decayed in (True, False)]

    @cached_property
    def parts(self) -> list[int]:
        """Elements of each group that ZeRO gives to a replica, padding included."""
        if self.zero == 3:
            named = self.shapes.values()
            return [sum(-(-math.prod(s) // self.replicas) for s in named if (len(s) > 1) == it) for it in (True, False)]
        unit = 2 * self.replicas
        return [-(-size // unit) * unit // self.replicas for size in self.groups]

    @cached_property
    def bucket(self) -> int:
        """Elements of a reduce bucket."""
        return self.setting("reduce_bucket_size", BUCKET)

    @cached_property
    def persistent(self) -> int:
        """Elements that ZeRO-3 keeps whole beside the parts, because their parameters are small."""
        if self.replicas == 1:
            return 0
        most = self.setting("stage3_param_persistence_threshold", PERSISTS)
        return sum(size for size in self.sizes if size <= most)

    @property
    def between(self) -> int:
        """Over how many ranks hidden states are divided between the matrices."""
        return self.plan.tensor if self.plan.sequence else 1


WEIGHTS, MASTER, ADAM, GRADIENTS = "weights", "fp32 master weights", "Adam moments", "gradients"
BUCKETS, GATHERED, ACTIVATIONS, LOSS = "reduce buckets", "gathered weights", "activations", "logits and their gradient"
PASSING = "passing"
"""Parts of what a rank holds; the last is what an operation needs for itself."""
Parts = dict[str, float]


def fullest(config: RunConfig, model: ModelConfig, world: int, cuda: bool) -> tuple[Rank, Moment]:
    """The rank of a checked run that needs most, and its fullest moment. model: with vocabulary and positions set."""
    plan, objective = config.parallel.plan(), config.make_objective()
    micro, accumulation = config.batch.micro_batches(plan.data(world))
    load = Load.of(objective, config.batch.seq_len, micro)
    shared = (model, objective, plan, plan.replicas(world), config.deepspeed_json(), load, accumulation)
    ranks = [Rank(*shared, config.train.activation_checkpointing, stage, cuda) for stage in range(plan.pipeline)]
    return max(((rank, peak(rank)) for rank in ranks), key=lambda found: found[1].total)


def peak(rank: Rank) -> Moment:
    """The fullest moment of a step."""
    return max(moments(rank), key=lambda moment: moment.total)


def moments(rank: Rank) -> list[Moment]:
    """The moments of a step that can be the fullest, in order; of micro-batches the last, which finds most gradients."""
    always = _state(rank)
    found = {**_forward(rank), **_backward(rank), **_update(rank)}
    return [Moment(name, _sum(always, parts)) for name, parts in found.items()]


def _sum(*found: Mapping[str, float]) -> Parts:
    names = dict.fromkeys(name for parts in found for name in parts)
    return {name: sum(parts.get(name, 0.0) for parts in found) for name in names}


def _state(r: Rank) -> Parts:
    """What is always there."""
    w, mine = r.width, sum(r.parts)
    if r.zero == 0:
        return {WEIGHTS: 4.0 * r.elements, ADAM: 8.0 * r.elements}
    if r.zero < 3:
        return {WEIGHTS: float(w * mine * r.replicas), **_divided(r), ACTIVATIONS: _piped(r)}
    kept = {GRADIENTS: float(w * mine), BUCKETS: float(w * r.bucket), GATHERED: float(w * r.persistent)}
    return {WEIGHTS: float(w * mine), **_divided(r), **kept}


def _piped(r: Rank) -> float:
    """Bytes of hidden states in DeepSpeed's pipeline buffers, beside what layers keep: received ones, and the gradients of
    these; of the first stage the gradient that comes back."""
    buffers = max(2, r.flying)
    tensors = 0 if r.plan.pipeline == 1 else 1 if r.first else 4 + buffers
    return tensors * _hidden(r) / r.between


def _divided(r: Rank) -> Parts:
    """The optimizer's state, which an offloading run has on the CPU of a GPU machine."""
    away = r.cuda and asks_offload(r.deepspeed)
    return {} if away else {MASTER: 4.0 * sum(r.parts), ADAM: 8.0 * sum(r.parts)}


def _held(r: Rank) -> Parts:
    """What earlier micro-batches left: gradients, in ZeRO-1 with the bucket that will reduce them."""
    if r.accumulation == 1 or r.zero == 3:
        return {}
    if r.zero == 2:
        return {GRADIENTS: float(r.width * sum(r.parts))}
    return {GRADIENTS: float(r.width * r.elements)} | ({BUCKETS: float(r.width * r.bucket)} if r.zero else {})


def _gathered(r: Rank) -> float:
    """Bytes of other ranks' weights that ZeRO-3 keeps from the forward to the backward pass: those whose next use is nearer
    than its reuse distance, which counts every element twice, there and back."""
    if r.zero < 3 or r.replicas == 1:
        return 0.0
    reuse = r.setting("stage3_max_reuse_distance", REUSE)
    return r.width * min(r.elements - r.persistent, max(r.matrix, reuse / 2))


def _forward(r: Rank) -> dict[str, Parts]:
    """Up to the loss and its gradient by the logits."""
    found: dict[str, Parts] = {}
    held, waiting = _held(r), {ACTIVATIONS: r.flying * _kept(r), GATHERED: _gathered(r)}
    if _gathered(r):
        ahead = r.width * r.setting("stage3_prefetch_bucket_size", PREFETCH)
        found["weights gathered"] = _sum(held, waiting, {PASSING: min(ahead, _gathered(r))})
    if r.objective.generator and r.first:
        found["generator's words drawn"] = _sum(held, {ACTIVATIONS: _generator(r), PASSING: _drawing(r)})
    if r.last:
        found["loss"] = _sum(held, waiting, {ACTIVATIONS: _answered(r), LOSS: _logits(r) * _per_logit(r)})
    return found


def _kept(r: Rank) -> float:
    """Bytes that this stage keeps of one micro-batch for its backward pass."""
    return r.layers * _kept_of_layer(r) + r.first * (_embedded(r) + _generator(r))


def _kept_of_layer(r: Rank) -> float:
    return _hidden(r) / r.between if r.recompute else _layer(r, r.model)


def _here(r: Rank) -> float:
    """Positions of a micro-batch on this rank."""
    return r.load.positions / r.plan.context


def _hidden(r: Rank) -> float:
    """Bytes of its hidden states."""
    return _here(r) * r.width * r.model.hidden


def _embedded(r: Rank) -> float:
    """What the first stage keeps beside the input of its first layer: dropout's mask, in post-norm what enters and leaves the
    norm; the planes and rotary tables."""
    post, p = r.model.norm_position == "post", r.model.dropout > 0
    tables = 8 * r.model.head_dim * (r.model.position == "rope")
    return _hidden(r) * (post * (2 + p) + p / r.width) / r.between + r.load.positions * (16 + tables)


def _layer(r: Rank, m: ModelConfig) -> float:
    """Bytes that one layer keeps of a micro-batch: what enters and leaves its norms and its attention, both sides of the
    activation, and dropout's masks. On CPU RMSNorm is made of parts, in fp32."""
    w, t, c = r.width, r.plan.tensor, r.plan.context
    norm = 2 * w * m.hidden + 8 if m.norm == "layernorm" or r.cuda else (w + 8) * m.hidden
    masks = 2 * m.hidden * (m.dropout > 0)
    keys = 2 * m.head_dim * max(m.groups, t * c)
    turned = m.hidden + keys // 2 if r.cuda and m.position == "rope" else 0
    whole = r.cuda or not _dropping(m)
    attention = w * ((1 + whole) * m.hidden + m.hidden + keys + turned) + 4 * m.heads
    mlp = w * m.ffn_width * {"swiglu": 5, "relu": 1}.get(m.activation, 2)
    return _here(r) * ((2 * norm + masks) / r.between + (attention + mlp) / t) + _scores(r, m)


def _scores(r: Rank, m: ModelConfig) -> float:
    """Bytes that a layer's attention keeps of pairs of positions. On CPU weights that are dropped are kept three times, a mixed
    pattern as a mask of numbers; on CUDA there is a mask where weights are dropped, which FlexAttention cannot."""
    if r.cuda:
        return float(r.load.pairs) * _dropping(m)
    heads = m.heads / r.plan.tensor / r.plan.context
    return r.width * r.load.pairs * (3 * heads * _dropping(m) + (r.objective.kind == "mixed"))


def _dropping(m: ModelConfig) -> bool:
    """Whether attention drops weights."""
    return (m.dropout if m.attention_dropout is None else m.attention_dropout) > 0


def _answered(r: Rank) -> float:
    """Bytes that the heads keep: the states of all positions where ranks divided them, and of the scored ones the state, its
    norm, BERT's transform or a classifier."""
    m, w = r.model, r.width
    norm = (w if m.norm == "layernorm" or r.cuda else w + 4) * m.hidden * (m.norm_position == "pre")
    transform = 3 * w * m.hidden * (m.head_transform or not r.words)
    scored = sum(r.load.scored.values()) / r.plan.context
    return r.plan.sequence * _hidden(r) + scored * (w * m.hidden + norm + transform)


def _words(r: Rank) -> float:
    """Positions of a micro-batch on this rank where a word is predicted."""
    classes = {head.name for head in r.objective.heads if head.classes is not None}
    return sum(n for name, n in r.load.scored.items() if name not in classes) / r.plan.context


def _vocabulary(r: Rank) -> int:
    return -(-r.model.vocab_size // r.plan.tensor)


def _logits(r: Rank) -> float:
    """Logits of a micro-batch on this rank; a generator's are counted with it."""
    return _words(r) * _vocabulary(r) * r.words


def _per_logit(r: Rank) -> int:
    """Bytes of a logit at the worst: in fp32 its log-softmax and two gradients; over tensor ranks one buffer in fp32 and a
    gradient in the model's precision."""
    return 12 if r.plan.tensor == 1 else 4 if r.width == 4 else 6


def _generator(r: Rank) -> float:
    """Bytes that a generator keeps until its own backward pass, the log-softmax of its words included."""
    if r.objective.generator is None:
        return 0.0
    small = r.model.narrower(r.objective.generator[1])
    layer = _hidden(r) * small.hidden / r.model.hidden / r.between if r.recompute else _layer(r, small)
    return r.model.layers * layer + _embedded(r) + _words(r) * (4 * r.width * r.model.hidden + 4 * _vocabulary(r))


def _drawing(r: Rank) -> float:
    """Bytes of the noise that a generator's words are drawn with: hashes of 64 bits, thrice."""
    return _words(r) * _vocabulary(r) * 24


def _backward(r: Rank) -> dict[str, Parts]:
    """From the head to the embedding, of the last micro-batch."""
    w, held, gathered = r.width, _held(r), {GATHERED: _gathered(r)}
    filling = {BUCKETS: w * r.bucket * (r.zero in (1, 2)) - held.get(BUCKETS, 0.0)}
    missing = 0.0 if r.zero >= 2 else w * r.elements - held.get(GRADIENTS, 0.0)
    found: dict[str, Parts] = {}
    if r.matrix:
        own = {PASSING: w * (r.matrix + max(_logits(r), _copied(r) * r.matrix) + _words(r) * r.model.hidden)}
        head = {ACTIVATIONS: _kept(r) + _answered(r)}
        found["gradient of the head"] = _sum(held, gathered, filling if r.model.head_transform else {}, head, own)
    pending = w * r.matrix * ((r.tied and r.plan.pipeline == 1) or missing > 0)
    done = 2 * _hidden(r) / r.between * (r.model.norm_position == "post")
    again = r.recompute * _layer(r, r.model)
    last = {ACTIVATIONS: r.flying * _kept(r) - done + again, GRADIENTS: pending, PASSING: _passing(r) + _hidden(r) / r.between}
    found["gradient of the last layer"] = _sum(held, gathered, filling, last)
    others, one = (r.flying - 1) * _kept(r), _kept(r) - (r.layers - 1) * _kept_of_layer(r)
    layer = sum(math.prod(shape) for name, shape in r.shapes.items() if name.startswith("layers.")) / r.layers
    grown = (missing - w * (r.word + layer)) * (missing > 0) + w * r.matrix * r.tied * (r.plan.pipeline == 1)
    first = {ACTIVATIONS: others + one + again, GRADIENTS: grown, PASSING: _passing(r)}
    found["gradient of the first layer"] = _sum(held, filling, first)
    if r.first:
        found["gradient of the embedding"] = _sum(held, filling, _embedding_gradient(r, missing))
    return found


def _copied(r: Rank) -> bool:
    """Whether the gradient of the matrix of words is copied by the hook that ties it over stages."""
    return r.tied and r.plan.pipeline > 1


def _passing(r: Rank) -> float:
    """Bytes of gradients inside a layer at the worst, which is in the second matrix of its feed-forward part."""
    m, t = r.model, r.plan.tensor
    wide = m.ffn_width / t * (2 if m.activation == "swiglu" else 1)
    return r.width * (_here(r) * (wide + m.hidden * (1 + r.plan.sequence)) + m.hidden * m.ffn_width / t)


def _embedding_gradient(r: Rank, missing: float) -> Parts:
    """All other gradients are there; the embedding's is dense, made beside the head's where that is the same matrix, as it is a
    generator's, and the two are summed into a third (ZeRO-3 brings a linear layer of its own, after which they are summed in
    place). A generator's layers wait for their turn."""
    w = r.width
    twice = (r.tied and r.plan.pipeline == 1) or r.objective.generator is not None
    tensors = (2 if r.zero == 3 else 3) if twice else 1 + _copied(r)
    return {
        ACTIVATIONS: (r.flying - 1) * _kept(r) + _generator(r), GRADIENTS: missing,
        PASSING: w * r.word * (tensors - (missing > 0)), GATHERED: w * r.word * (r.zero == 3 and r.replicas > 1),
    }  # fmt: skip


def _update(r: Rank) -> dict[str, Parts]:
    """From the reduction of gradients to the optimizer."""
    w, mine, clip = r.width, sum(r.parts), r.largest
    if r.zero == 0:
        gradients = {GRADIENTS: w * r.elements}
        return {
            "gradients reduced": {**gradients, PASSING: w * min(r.elements, BUCKET)},
            "gradient norm": {**gradients, PASSING: 16 * clip},
        }
    kept = {} if r.zero == 3 else {GRADIENTS: w * mine}
    flat = {PASSING: w * r.parts[0] + 4 * r.parts[0] * (w == 2)}
    norm = {PASSING: 8 * (min(clip, mine) if r.zero < 3 else -(-clip // r.replicas))}
    return {"gradients reduced": _reduced(r), "gradient norm": _sum(kept, norm), "optimizer": _sum(kept, flat)}


class Flush(NamedTuple):
    """A bucket sent: its elements, those of all until now, those of the gradient that waits for it, and whether it is the
    first one."""

    elements: int
    done: int
    waits: int
    first: bool


def _flushes(r: Rank) -> Iterator[Flush]:
    """The buckets of a backward pass. ZeRO-1 fills them at its end, in the order of the parameters, the others on the way."""
    order = r.sizes if r.zero == 1 else r.sizes[::-1]
    elements = done = 0
    first = True
    for size in [*order, 0]:
        if elements and (elements + size > r.bucket or not size):
            done += elements
            yield Flush(elements, done, size, first)
            elements, first = 0, False
        elements += size


def _reduced(r: Rank) -> Parts:
    """The worst of the buckets sent: a flat copy of it is reduced, on gloo's reduce-scatter (ZeRO-3) two."""
    return max((_sent(r, flush) for flush in _flushes(r)), key=lambda parts: sum(parts.values()))


def _sent(r: Rank, flush: Flush) -> Parts:
    w, mine, rest = r.width, sum(r.parts), r.elements - flush.done
    if r.zero == 1:
        inside = flush.elements <= r.bucket
        return {
            GRADIENTS: w * (rest + flush.elements * (not inside) + mine * (not flush.first)),
            BUCKETS: w * r.bucket * (2 if r.plan.pipeline > 1 else 1), PASSING: w * max(flush.elements, mine * flush.first),
        }  # fmt: skip
    waits = flush.waits + (r.tied and r.matrix * (flush.waits not in (0, r.word)))
    left = {ACTIVATIONS: _kept(r) * rest / r.elements}
    if r.zero == 2:
        parts = (r.accumulation > 1) + (not flush.first)
        return {**left, BUCKETS: w * r.bucket, GRADIENTS: w * (waits + parts * mine), PASSING: w * flush.elements}
    copies = 1 if r.cuda else 2
    near = min(w * max(0, rest), _gathered(r))
    return {**left, GRADIENTS: w * waits, GATHERED: near, PASSING: w * copies * flush.elements}
