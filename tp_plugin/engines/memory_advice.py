"""What is added to an out-of-memory error that ends a run: what the plan would change, and what each change saves."""

from __future__ import annotations

import torch

from tp_plugin.engines.memory_report import alone, is_checkpointed, trained_models
from tp_plugin.estimate.hardware import GIB
from tp_plugin.estimate.live_run import Batch, engine_of, layout_of_run, numbers_kept, planner_of_run
from tp_plugin.estimate.questions import Questions
from tp_plugin.runtime.first_step import size
from tp_plugin.runtime.runtime import Runtime

SHOWN = 4
"""Changes that are named, those that save most."""


def advice(runtime: Runtime, zero_stage: int) -> str:
    """In a line. Computed on the host by this rank alone, from shapes."""
    mesh, config = runtime.mesh, runtime.config
    command = f"`tp-plugin plan MODEL --gpus {mesh.world.size}` says what fits and which config runs it"
    try:
        state = trained_models(runtime)[0]
        model, progress = state.model(), runtime.progress
        samples, length, micro_batches = progress.first_step.call if progress.first_step else progress.call
        if not samples:
            return command
        batch = Batch(samples, length)
        engine = engine_of(state, zero_stage)
        layout = layout_of_run(config, mesh, engine, batch, micro_batches, is_checkpointed(model))
        memory = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else GIB
        with alone(), numbers_kept():
            planner = planner_of_run(model, state, config, layout, batch, "adamw", memory)
            now = planner.candidate(layout)
            saving = sorted(Questions(planner, [now]).switches(now), key=lambda switch: switch.bytes)
    except Exception:  # the error that ends the run is what counts
        return command
    changes = [f"{switch.name} saves {size(-switch.bytes)}" for switch in saving if switch.bytes < 0][:SHOWN]
    return (
        f"{layout.short} takes {size(now.memory.low)} to {size(now.memory.high)} on a rank by its plan; "
        f"{'; '.join(changes) or 'nothing that it knows saves any'}. {command}"
    )
