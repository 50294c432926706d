"""A model's modules that other stages run become holes, and its forward the pipeline's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tp_plugin.config.run_config import RunConfig
from tp_plugin.mesh.roles import Mesh
from tp_plugin.policy.stages import Stages
from tp_plugin.shard.module_hooks import refuse_hook
from tp_plugin.shard.stage_outputs import StageOutputs
from tp_plugin.tensor.pipeline.executor import Executor
from tp_plugin.tensor.pipeline.forward import PipelineForward
from tp_plugin.tensor.pipeline.holes import AbsentLayer, AbsentModule
from tp_plugin.tensor.pipeline.messages import Messages
from tp_plugin.tensor.pipeline.seeds import Seeds

PER_STAGE = 4
"""Micro-batches for each stage: the share of idle time is (p - 1) / (m + p - 1), under a fifth."""


@dataclass
class Pipeline:
    """One model's; made while its parameters have their whole shapes."""

    model: nn.Module
    stages: Stages
    executor: Executor
    absent: list[nn.Module]

    @staticmethod
    def of(model: nn.Module, stages: Stages, mesh: Mesh) -> Pipeline:
        """Put holes in place of what is elsewhere.

        Raises:
            TPError: a script's hook is on a module of which this rank may have none of the values.
        """
        for path, module in model.named_modules():
            hooks = (
                module._forward_pre_hooks,
                module._forward_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
            for hook in [hook for kind in hooks if path for hook in kind.values()]:
                refuse_hook(path, hook)
        executor = Executor(model, model.forward, Messages(mesh.pp, mesh.pp_back), Seeds())
        stage, layers = mesh.pp.rank, list(model.get_submodule(stages.stack).children())
        runs_before, runs_after = stage == 0, stage == stages.count - 1
        for path in (*(() if runs_before else stages.before), *(() if runs_after else stages.after)):
            module = model.get_submodule(path)
            module.forward = AbsentModule(path, module, lambda: executor.is_running)
        own, absent = stages.layers(stage), []
        for number, layer in enumerate(layers):
            if number in own:
                continue
            at = {own[0] - 1: executor.receive, own[-1] + 1: executor.take}
            hole = AbsentLayer(
                f"{stages.stack}.{number}", lambda: executor.is_running, number, stages.returns_tuples,
                at.get(number, lambda hidden: hidden),
            )  # fmt: skip
            layer.forward = hole
            absent.append(layer)
        return Pipeline(model, stages, executor, absent)

    def install(self, state: Any, options: RunConfig) -> None:
        """Let the model's forward be that of the pipeline."""
        messages = self.executor.messages
        layers = list(self.model.get_submodule(self.stages.stack).children())
        own = self.stages.layers(messages.stage)
        for number in own:
            layers[number].register_forward_pre_hook(self.executor.seeds.before_layer(number))
        outputs = StageOutputs(state.peers, messages, state.runtime.sync_points)
        count = options.pipeline_microbatches or PER_STAGE * messages.stages
        late = options.pipeline_schedule == "gpipe"
        self.model.forward = PipelineForward(
            self.model, self.model.forward, self.executor, count, late, outputs, [layers[at] for at in own], self.absent
        )
