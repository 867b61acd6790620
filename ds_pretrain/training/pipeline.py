"""The pipeline engine: the same list of layers, cut into stages by DeepSpeed, ZeRO-1.

Between stages travel one float tensor and the integer planes; labels, weights and totals stay on the last stage, where the
data iterator hands them over as the batch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_pretrain.core.batch import Batch
from ds_pretrain.models.transformer import Build, Generator, LayerSpec, first_inputs, initialise, layer_list, prepare_parameters
from ds_pretrain.parallel.mesh import Mesh
from ds_pretrain.training.context import divide_positions
from ds_pretrain.training.deepspeed_json import offloads
from ds_pretrain.training.engine import Engine
from ds_pretrain.training.optimizer import OptimizerConfig, adamw

WHOLE = {"pipe_partitioned": False, "grad_partitioned": False}
"""DeepSpeed cuts what travels between stages over the tensor ranks, which it takes for copies. Under sequence parallelism each
has another part of the sequence, and all of it must travel."""


class PipelineEngine(Engine):
    """One or more layers per stage, 1F1B over the micro-batches of a step."""

    def _start(self, optimizer: OptimizerConfig, config: dict) -> Any:
        import deepspeed

        module = pipeline_module(self.build, self.criterion)
        for layer in module.modules():
            if isinstance(layer, Generator):
                layer.tell = self.criterion.generated
        prepare_parameters(module, self.build)
        initialise(module, self.build, self.seed)
        tie_everywhere(module, self.mesh)
        divide_positions(module, self.mesh)
        torch_optimizer = adamw(optimizer, module, offloads(config))
        if self.build.megatron.sequence_parallel:
            config = {**config, "pipeline": {**config.get("pipeline", {}), **WHOLE}}
        return deepspeed.initialize(model=module, optimizer=torch_optimizer, config=config)[0]

    def _train(self, batches: Sequence[Batch]) -> float | None:
        self.deepspeed.train_batch(iter([(first_inputs(batch, self.build), batch) for batch in batches]))
        return self._norm()

    def _evaluate(self, batches: Sequence[Batch], dropout: bool = False) -> None:
        module = self.deepspeed.module
        if dropout:
            module.eval = lambda: module  # DeepSpeed turns dropout off through it
        feed = iter([(first_inputs(batch, self.build), batch) for batch in batches])
        self.deepspeed.eval_batch(feed, bcast_loss=False, reduce_output=None, num_micro_batches=len(batches))
        vars(module).pop("eval", None)
        self.deepspeed.train()


def pipeline_module(build: Build, criterion: Any) -> Any:
    """DeepSpeed's PipelineModule over `layer_list`; transformer layers are divided evenly, ends go to the outer stages."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    mesh = build.mesh
    topology = PipeModelDataParallelTopology(num_pp=mesh.plan.pipeline, num_mp=mesh.plan.tensor, num_dp=mesh.replicas)
    return PipelineModule(
        [_deepspeed_spec(spec) for spec in layer_list(build)],
        topology=topology,
        loss_fn=criterion,
        partition_method="type:^Block$",
    )


def tie_everywhere(module: Any, mesh: Mesh) -> None:
    """Sum a tied weight's gradient over its two stages and all replicas at once.

    DeepSpeed sums it over the stages, then over the data ranks of each stage, whose buckets differ and with them the order of
    their sums: from three data ranks on the two copies drift apart by rounding (seen by `agreement` at step 1 of PP2 x DP3).
    Summed at once every rank has the same bits, and the sum over data ranks that follows adds equal numbers.
    """
    for comm in module.tied_comms.values():
        comm["group"] = mesh.ends_group
        for name in comm["weight_attr"]:
            getattr(comm["module"], name).register_hook(lambda gradient: gradient / mesh.replicas)


def _deepspeed_spec(spec: LayerSpec) -> Any:
    from deepspeed.pipe import LayerSpec as Plain
    from deepspeed.pipe import TiedLayerSpec

    if spec.tied is None:
        return Plain(spec.cls, *spec.args)
    return TiedLayerSpec(spec.tied, spec.cls, *spec.args, forward_fn=spec.use, tied_weight_attr="weight")
