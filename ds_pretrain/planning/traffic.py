"""What a run will send, by arithmetic: bytes per rank and step, by what they are for.

Every axis of a layout is a short list of collectives, from the model's shape and the batch alone; a table of costs makes bytes
of them. `GLOO` is what torch's gloo was measured to send (`parallel/wire.py`), headers of messages included; `NCCL` is what a
ring sends. `needed` says how much of a collective the layout cannot do without, at the ring's cost: the rest is what a library
sends too much. The price: a second account of what the engines do, kept honest by a test that measures every layout.

Counted is a step of the training loop: no checkpoint, no evaluation, no comparison of `agreement`, and none of ZeRO-3's first
two steps, in which DeepSpeed learns what it needs when. Its settings are its defaults but for those that are named here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.table import Column, Table

from ds_pretrain.config import RunConfig
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import Objective
from ds_pretrain.parallel.plan import ParallelPlan, stage_of_layer
from ds_pretrain.planning.held import PERSISTS, REUSE, is_tied, parameters
from ds_pretrain.training.deepspeed_json import half, stage_of

INT32, INT64, FP32, FP64 = 4, 8, 4, 8
PLANES = ((INT64, 3), (INT32, 2))
"""Widths and numbers of the integer planes between stages: tokens, positions, noise; segments, horizons."""
HEADER = 48
"""Bytes of a header of gloo's. A message comes with three: "I shall send", "I am waiting", and its own."""
SEGMENT = 1 << 20
"""Bytes of a message of gloo's rings at most."""
Cost = Callable[[int, float, float], float]
"""(ranks, elements, bytes of the whole tensor) to the bytes that a rank sends, as the mean of its group."""


class Collective(NamedTuple):
    """What the ranks of a group do together, `times` a step.

    elements: of the whole tensor, what is summed, has been gathered or is given out, of `width` bytes each. needed: the share
    of its bytes, at the ring's cost, that the layout cannot do without.
    """

    use: str
    operation: str
    ranks: int
    elements: float
    width: int
    times: float = 1
    needed: float = 1

    def bytes(self, costs: Mapping[str, Cost]) -> float:
        """What a rank sends for it in a step."""
        return self.times * costs[self.operation](self.ranks, self.elements, self.elements * self.width)


def _ring(passes: int) -> Cost:
    return lambda ranks, elements, size: passes * (ranks - 1) / ranks * size


NCCL: Mapping[str, Cost] = {
    "all_reduce": _ring(2),
    **dict.fromkeys(("reduce_scatter", "all_gather", "reduce", "broadcast", "all_to_all"), _ring(1)),
    "send": lambda ranks, elements, size: size,
    "receive": lambda ranks, elements, size: 0.0,
}
"""By rings (Patarasuk & Yuan 2009), as nccl-tests counts; headers left out. Not measured: there was one GPU."""


def _segments(ranks: int, size: float) -> int:
    """Messages into which gloo's rings cut a tensor: equally many for each rank, two at least."""
    return -(-max(math.ceil(size / SEGMENT), 2 * ranks) // ranks) * ranks


def _gloo_all_reduce(ranks: int, elements: float, size: float) -> float:
    return 2 * (ranks - 1) / ranks * (size + 3 * HEADER * min(elements, _segments(ranks, size)))


def _gloo_reduce(ranks: int, elements: float, size: float) -> float:
    """Its ring goes on to two segments before the end, past where it could stop; then all send their part to the root."""
    segments, segment = _segments(ranks, size), min(size / (2 * ranks), SEGMENT)
    left_out = 2 * segment - min(2 * segment, segments * segment - size) / ranks
    return size - left_out + (ranks - 1) / ranks**2 * size + 3 * HEADER * (segments - 1 - 1 / ranks)


GLOO: Mapping[str, Cost] = {
    "all_reduce": _gloo_all_reduce,
    "reduce_scatter": _gloo_all_reduce,  # torch makes it of one, and forgets the other parts
    "all_gather": lambda ranks, elements, size: (ranks - 1) * (size / ranks + 2 * 3 * HEADER),
    "reduce": _gloo_reduce,
    "broadcast": lambda ranks, elements, size: (ranks - 1) / ranks * (size + 3 * HEADER),
    "all_to_all": lambda ranks, elements, size: (ranks - 1) * (size / ranks + 3 * HEADER),
    "send": lambda ranks, elements, size: size + 2 * HEADER,
    "receive": lambda ranks, elements, size: HEADER,
}
"""As torch 2.13 was measured on 2, 3 and 4 ranks, from one element to 24 MB."""


@dataclass(frozen=True)
class Traffic:
    """All collectives of a step, by pipeline stage."""

    layout: str
    stages: tuple[tuple[Collective, ...], ...]

    def by_use(self, costs: Mapping[str, Cost], stage: int) -> dict[str, float]:
        """Bytes that a rank of a stage sends in a step."""
        return _summed((each.use, each.bytes(costs)) for each in self.stages[stage])

    def minimum(self, stage: int) -> dict[str, float]:
        """Those of them that the layout cannot go below."""
        return _summed((each.use, each.needed * each.bytes(NCCL)) for each in self.stages[stage])

    def sent(self, costs: Mapping[str, Cost]) -> list[float]:
        """Bytes that a rank sends in a step, by stage."""
        return [sum(self.by_use(costs, stage).values()) for stage in range(len(self.stages))]


def _summed(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for use, size in pairs:
        found[use] = found.get(use, 0.0) + size
    return found


def predicted(config: RunConfig, model: ModelConfig, world: int, scored: Mapping[str, float] | None = None) -> Traffic:
    """The collectives of a step of a checked run. model: with vocabulary and positions set.

    scored: by head the share of all positions that it scores, where it is known from the data. Else it is what the objective
    promises of its words (`Objective.expected`), or all where it promises nothing; for embeddings, as many as the longest
    samples fill rows with.
    """
    run = _Run.of(config, model, world, scored or {})
    return Traffic(f"{run.plan} on {world} ranks", tuple(tuple(_collectives(run, stage)) for stage in range(run.plan.pipeline)))


def _collectives(run: _Run, stage: int) -> Iterator[Collective]:
    for axis in (_layers, _ends, _words, _pipeline, _context, _gradients, _weights, _pool, _scalars):
        yield from (each for each in axis(run, stage) if each.ranks > 1 and each.times and each.elements)


@dataclass(frozen=True)
class _Run:
    """The numbers that all formulas are made of.

    json: DeepSpeed's. width: bytes of an activation and of a working weight. row_positions: of a micro-batch; positions: those
    of them that are on one context rank. forward, backward, again: passes in a step, the last of layers computed again;
    small: the generator. scored: by number of classes, the positions of a micro-batch that heads score.
    """

    model: ModelConfig
    small: ModelConfig | None
    objective: Objective
    plan: ParallelPlan
    json: Mapping[str, Any]
    world: int
    width: int
    row_positions: int
    positions: float
    forward: int
    backward: int
    again: int
    scored: Mapping[int | None, float]

    @staticmethod
    def of(config: RunConfig, model: ModelConfig, world: int, told: Mapping[str, float]) -> _Run:
        plan, json, objective, batch = config.parallel.plan(), config.deepspeed_json(), config.make_objective(), config.batch
        micro, backward = batch.micro_batches(plan.data(world))
        rows = micro * batch.seq_len
        shares = _summed((str(head.classes), _share(objective, head.name, batch.seq_len, told)) for head in objective.heads)
        return _Run(
            model=model,
            small=model.narrower(objective.generator[1]) if objective.generator else None,
            objective=objective,
            plan=plan,
            json=json,
            world=world,
            width=2 if half(json) else FP32,
            row_positions=rows,
            positions=rows / plan.context,
            forward=backward * (2 if objective.pooled and backward > 1 else 1),  # `training/pool.py` walks twice
            backward=backward,
            again=backward * config.train.activation_checkpointing,
            scored={head.classes: min(1.0, shares[str(head.classes)]) * rows for head in objective.heads},
        )

    @property
    def zero(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.json.get("zero_optimization", {})
        return found

    @property
    def replicas(self) -> int:
        return self.plan.replicas(self.world)

    @property
    def last(self) -> int:
        return self.plan.pipeline - 1

    @property
    def tied(self) -> bool:
        """Whether the first and the last stage both hold the vocabulary matrix."""
        return self.last > 0 and is_tied(self.model, self.objective)

    def networks(self, stage: int) -> list[tuple[ModelConfig, int]]:
        """Networks on a stage and how many of their layers: a generator is on the first."""
        here = stage_of_layer(self.model.layers, self.plan.pipeline).count(stage)
        return [(self.model, here), *([(self.small, self.small.layers)] if self.small and stage == 0 else [])]

    def elements(self, stage: int) -> dict[str, int]:
        """Elements of the parameters that a rank of this stage has, about in the order of their use."""
        here = parameters(self.model, self.objective, self.plan, stage)
        return {name: math.prod(shape) for name, shape in here.items()}


def _share(objective: Objective, head: str, length: int, told: Mapping[str, float]) -> float:
    """The share of all positions that a head scores."""
    if any(each.name == head and each.classes == 0 for each in objective.heads):
        return told.get(head, 1 / float(objective.size(np.array([objective.piece(length)]))[0]))
    return told.get(head, objective.expected.get(f"{head}/rate", 1.0))


def _layers(run: _Run, stage: int) -> Iterator[Collective]:
    """Four sums per layer over the tensor ranks, two forward and two backward (Shoeybi et al. 2019). Divided along the sequence
    each is a reduce-scatter and a gather, and the first matrices' inputs are gathered once more for their gradients
    (Korthikanti et al. 2022)."""
    t, w, both = run.plan.tensor, run.width, run.forward + run.backward
    for net, layers in run.networks(stage):
        x = run.positions * net.hidden
        for sum_ in ("reduce_scatter", "all_gather") if run.plan.sequence else ("all_reduce",):
            yield Collective("tensor: layers", sum_, t, x, w, 2 * layers * both)
            yield Collective("tensor: layers computed again", sum_, t, x, w, 2 * layers * run.again, 0)
        if run.plan.sequence:
            vectors = 2 * (2 if net.norm == "layernorm" else 1) + 2 * net.bias
            yield Collective("tensor: inputs gathered again", "all_gather", t, x, w, 2 * layers * run.backward, 0)
            yield Collective("tensor: norms and biases", "all_reduce", t, net.hidden, w, vectors * layers * run.backward)
        if net.groups < t:  # megatron-core puts queries, keys and values together where a rank has no whole key head
            qkv = x + 2 * run.positions * net.groups * net.head_dim
            yield Collective("tensor: shared key heads", "all_gather", t, qkv, w, layers * (run.forward + run.again))
            yield Collective("tensor: shared key heads", "reduce_scatter", t, qkv, w, layers * run.backward)


def _ends(run: _Run, stage: int) -> Iterator[Collective]:
    """Words looked up in a divided vocabulary, twice where a generator has other words; sequences made whole for the heads."""
    t, w, x, sequence = run.plan.tensor, run.width, run.positions * run.model.hidden, run.plan.sequence
    if stage == 0:
        looks = 2 if run.small else 1
        yield Collective("tensor: word embedding", "all_reduce", t, x, w, looks * run.forward, 0.5 if sequence else 1)
        yield Collective("tensor: word embedding", "all_gather", t, x, w, looks * run.backward * sequence)
        if run.small:
            matrix = (run.model.hidden + 1) * run.small.hidden  # from the one width to the other
            yield Collective("tensor: norms and biases", "all_reduce", t, matrix, w, run.backward * sequence)
            yield Collective("tensor: heads", "all_gather", t, run.positions * run.small.hidden, w, run.forward * sequence)
    if stage == run.last:
        yield Collective("tensor: heads", "all_gather", t, x, w, run.forward * sequence)


def _words(run: _Run, stage: int) -> Iterator[Collective]:
    """Of each scored position the largest logit, the label's and their sum, and the gradient of its hidden state; a generator's
    samples."""
    if stage != (0 if run.small else run.last):
        return
    t, n = run.plan.tensor, run.scored.get(None, 0) / run.plan.context
    yield Collective("head over the vocabulary", "all_reduce", t, n, FP32, 3 * run.backward)
    yield Collective("head over the vocabulary", "all_reduce", t, n * run.model.hidden, run.width, run.backward)
    if run.small:
        for width in (FP32, INT64):  # the best of each rank and its id
            yield Collective("generator's samples", "all_gather", t, n * t, width, run.forward)
        yield Collective("generator's samples", "all_reduce", run.plan.context, run.row_positions, INT64, run.forward, 0.5)


def _pipeline(run: _Run, stage: int) -> Iterator[Collective]:
    """Hidden states and integer planes to the next stage, gradients back; the vocabulary matrix that both ends hold.

    Where tensor ranks have copies DeepSpeed sends a part from each, to be put together there: no more in all, and less between
    stages. But it puts a stage's own output together once more for the backward pass, which needs no more than its shape.
    """
    t, w, first, last = run.plan.tensor, run.width, stage == 0, stage == run.last
    x, cut = run.positions * run.model.hidden, run.plan.tensor > 1 and not run.plan.sequence
    if first and last:
        return
    there = (run.forward * (not last), run.forward * (not first))
    back = (run.backward * (not first), run.backward * (not last))
    for use, times in (("pipeline: hidden states", there), ("pipeline: gradients", back)):
        yield from _handed(use, x / t, w, times)
        yield from _handed(use, 9 * cut, INT64, times, 0)  # how it was cut
        yield Collective(use, "all_gather", t, x, w, times[1] * cut)
    for width, planes in PLANES:
        yield from _handed("pipeline: integer planes", run.row_positions, width, (planes * there[0], planes * there[1]), 0)
    yield Collective("pipeline: outputs put together again", "all_gather", t, x, w, back[1] * cut, 0)
    if run.tied and (first or last):
        yield Collective("tied vocabulary matrix", "all_reduce", 2 * run.replicas, run.elements(0)["word.weight"], w)


def _handed(use: str, elements: float, width: int, times: tuple[int, int], needed: float = 1) -> Iterator[Collective]:
    """From stage to stage. times: a stage sends and receives it."""
    for operation, often in zip(("send", "receive"), times, strict=True):
        yield Collective(use, operation, 2, elements, width, often, needed)


def _context(run: _Run, stage: int) -> Iterator[Collective]:
    """Ulysses (Jacobs et al. 2023): queries, keys, values and what comes of them from positions to heads or back, forward and
    backward; embeddings, which are whole on each rank."""
    c, w = run.plan.context, run.width
    for net, layers in run.networks(stage):
        queries, groups = run.positions * net.hidden / run.plan.tensor, max(1, net.groups // run.plan.tensor)
        keys = queries if groups % c else run.positions * groups * net.head_dim
        for elements in (queries, keys):
            yield Collective("context: attention", "all_to_all", c, elements, w, 2 * layers * (run.forward + run.backward))
            yield Collective("context: attention computed again", "all_to_all", c, elements, w, 2 * layers * run.again, 0)
    if stage == run.last and 0 in run.scored:
        whole = run.row_positions * run.model.hidden
        yield Collective("context: embeddings", "all_gather", c, whole, w, run.forward)
        yield Collective("context: embeddings", "all_reduce", c, whole, w, run.backward, 0.5)


def _gradients(run: _Run, stage: int) -> Iterator[Collective]:
    """Sums over the replicas: of every micro-batch from stage 2 on; whole but in stage 3, though from stage 1 on each replica
    keeps a part. Those of a tied matrix are known by then."""
    r, zero, count = run.replicas, stage_of(run.json), sum(run.elements(stage).values())
    width = {"fp32": FP32, "fp16": 2, "bf16": 2}.get(str(run.json.get("communication_data_type")), run.width)
    operation, parts, enough = "all_reduce", 1, 0.5 if zero else 1
    if zero == 3:
        operation, enough = "reduce_scatter", 1
    elif zero and not run.zero.get("use_multi_rank_bucket_allreduce", True):
        operation, parts, enough = "reduce", r, 1  # to each replica its part
    times = parts * (run.backward if zero >= 2 else 1)
    known = run.elements(0)["word.weight"] if run.tied and stage in (0, run.last) else 0
    yield Collective("data: gradients", operation, r, (count - known) / parts, width, times, enough)
    yield Collective("data: tied matrix once more", operation, r, known / parts, width, times, 0)


def _weights(run: _Run, stage: int) -> Iterator[Collective]:
    """Updated weights: after the step in stages 1 and 2, and in stage 3 those of small parameters. There the others come before
    they are used, once for each micro-batch, and again where DeepSpeed lets them go because their next use is too far away,
    counted in the elements of what is used in between."""
    r, w, zero, sizes = run.replicas, run.width, stage_of(run.json), run.elements(stage)
    if zero in (1, 2):
        yield Collective("ZeRO: updated weights", "all_gather", r, sum(sizes.values()), w)
    if zero != 3:
        return
    small = run.zero.get("stage3_param_persistence_threshold", PERSISTS)
    reach = run.zero.get("stage3_max_reuse_distance", REUSE)
    ahead = sum(sizes.values())
    for name, size in sizes.items():
        ahead -= size
        if size <= small:
            yield Collective("ZeRO: updated weights", "all_gather", r, size, w)
        else:
            times, again = 1 + (2 * ahead >= reach), run.again * (2 * _later(sizes, name, small) >= reach)
            yield Collective("ZeRO: weights", "all_gather", r, size, w, run.backward * times)
            yield Collective("ZeRO: weights to compute again", "all_gather", r, size, w, again, 0)


def _later(sizes: Mapping[str, float], name: str, small: float) -> float:
    """Elements of the large parameters that come after one in its layer; -inf outside of layers: nothing computes it again."""
    layer = re.match(r"(generator\.)?layers\.\d+\.", name)
    names = [each for each, size in sizes.items() if layer and each.startswith(layer[0]) and size > small]
    return sum(sizes[each] for each in names[names.index(name) + 1 :]) if layer else -math.inf


def _pool(run: _Run, stage: int) -> Iterator[Collective]:
    """Embeddings of all samples of the step, over the data ranks, and their gradients."""
    if stage == run.last and run.objective.pooled:
        d = run.plan.data(run.world)
        whole = d * run.backward * run.scored.get(0, 0) * run.model.hidden
        yield Collective("pool of embeddings", "all_reduce", d, d, INT64)
        yield Collective("pool of embeddings", "all_gather", d, whole, FP32)
        yield Collective("pool of embeddings", "all_reduce", d, whole, FP32, needed=0.5)


def _scalars(run: _Run, stage: int) -> Iterator[Collective]:
    """Targets counted, losses summed, who wants to stop; norms over replicas and over parts of the model; a pipeline's loss."""
    use, heads = "counts, losses, norms", len(run.objective.heads)
    for elements in (heads + 1, heads, 1):
        yield Collective(use, "all_reduce", run.world, elements, FP64)
    for ranks in (run.replicas, run.plan.tensor * run.plan.pipeline):
        yield Collective(use, "all_reduce", ranks, 1, FP32, 2)
    yield Collective(use, "broadcast", run.plan.pipeline, 2, FP32)


def tables(traffic: Traffic) -> list[Table]:
    """What a rank sends: by use on the stage that sends most, and by stage where there are several."""
    totals = traffic.sent(NCCL)
    most = totals.index(max(totals))
    where = f", pipeline stage {most}" * (len(totals) > 1)
    table = _table("use", f"MB that a rank sends in a step: layout {traffic.layout}{where}")
    columns = (traffic.by_use(NCCL, most), traffic.by_use(GLOO, most), traffic.minimum(most))
    for use in columns[0]:
        table.add_row(use, *_figures(column[use] for column in columns))
    table.add_row("sum", *_figures(sum(column.values()) for column in columns), style="bold")
    table.caption = "gloo within 1% of what the kernel counts; NCCL as rings send, never measured; minimum: of the layout"
    stages = _table("pipeline stage", "MB that a rank sends in a step, by stage")
    for stage, (ring, gloo) in enumerate(zip(totals, traffic.sent(GLOO), strict=True)):
        stages.add_row(str(stage), *_figures((ring, gloo, sum(traffic.minimum(stage).values()))))
    return [table, stages] if len(totals) > 1 else [table]


def _table(first: str, title: str) -> Table:
    return Table(first, *(Column(name, justify="right") for name in ("NCCL", "gloo", "minimum")), title=title)


def _figures(sizes: Iterable[float]) -> list[str]:
    return [f"{size / 1e6:,.3f}" for size in sizes]
