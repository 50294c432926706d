"""Policy + model + Runtime → sharded model, in place: the same modules and Parameter objects, with less in them.

Keeping the objects keeps everything that was built on them before: optimizers, parameter groups, tied weights, names.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Set

import torch
from torch import nn

from tp_plugin.config.resolve import current_config
from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout, Plan, Policy, load, make_plan, policy_for
from tp_plugin.policy.derived_check import unproven_warning
from tp_plugin.policy.stacks import between, stacks
from tp_plugin.policy.stages import Stages, on_stage
from tp_plugin.runtime.batch_guard import BatchGuard
from tp_plugin.runtime.runtime import Runtime
from tp_plugin.runtime.start import start
from tp_plugin.shard import hooks, lazy_load, quantized, quantized_view  # noqa: F401  (registers its classes)
from tp_plugin.shard.audit import audit, drift
from tp_plugin.shard.build import build_parts
from tp_plugin.shard.find_stages import find_stages
from tp_plugin.shard.model_state import ModelState
from tp_plugin.shard.module_hooks import adopt_hooks
from tp_plugin.shard.pipeline import Pipeline
from tp_plugin.shard.replicas import agree_on_weights, take_share_
from tp_plugin.shard.state_dict import ModuleStateHooks, StateDictHooks, join
from tp_plugin.shard.topology_warning import warn_of_topology
from tp_plugin.tensor.graphs import tell_dynamo, trace_once
from tp_plugin.tensor.pipeline.stage_reads import StageReads


def parallelize(
    model: nn.Module,
    tp_size: int | None = None,
    policy: Policy | None = None,
    *,
    options: RunConfig | None = None,
    loaded_once: bool = False,
) -> nn.Module:
    """Shard ``model`` over its TP group, in place. Collective over the world; a second call does nothing.

    Args:
        model: a transformers model, or a module that contains some; weights whole and on any one device.
        tp_size: size of the TP group; default the one the run was configured with.
        policy: how to shard; default the registered policy of each model's type.
        options: the ``tp_plugin:`` mapping of the config.
        loaded_once: the weights are those of the world's first rank; on others they may be anything.

    Raises:
        PolicyError: no policy, or one that does not fit.
        TPError: ``tp_size`` does not divide the world or is not the run's, or the model is quantized.
    """
    options = options or current_config()
    tp_size = tp_size or options.tp_size
    pp_size = options.pp_size
    roots = list(models_in(model)) if policy is None else [("", model)]
    if tp_size * pp_size > 1 and not roots:
        raise TPError(
            f"{type(model).__name__} contains no transformers model, so no policy applies to it; register one for its "
            f"class: tp_plugin.register(tp_plugin.Policy(model_types=({type(model).__name__!r},), …)), or leave it "
            f"whole: `tp_plugin: {{leave_whole: [{type(model).__name__}]}}`"
        )
    sharded = [root for _, root in roots if is_sharded(root)]
    plans = []
    for _, root in roots:
        kind = model_type(root)
        if not (is_sharded(root) or kind in options.leave_whole or type(root).__name__ in options.leave_whole):
            _refuse_unsupported(root)
            known_by = root.config if hasattr(getattr(root, "config", None), "model_type") else kind
            chosen = policy or (load(options.policy) if options.policy else policy_for(known_by))
            experts, whole = options.expert_parallel, options.leave_whole
            plan = make_plan(root, chosen, tp_size, expert_parallel=experts, leave_whole=whole)
            stages = find_stages(root, plan, pp_size, options.pipeline_split) if pp_size > 1 else None
            plans.append((root, plan, stages))
    runtime = start(options, tp_size)
    with runtime.region.step():
        derived = unproven_warning([plan for _, plan, _ in plans]) if policy is None and tp_size > 1 else None
        if derived and runtime.mesh.rank == 0:
            warnings.warn(derived, stacklevel=2)
        if plans or not sharded:
            # the whole of a wrapper, not only the models in it: a head of its own must start equal on all ranks too
            settled = {id(p) for root in sharded for p in root.parameters()}
            layouts = {
                id(p): unit_layout(plan, stages, name)
                for root, plan, stages in plans
                for name, p in root.named_parameters()
                if not quantized.is_code(p)  # what decodes it has to be the leader's, too: it is cut afterwards
            }
            shared = agree_on_weights(model, runtime.mesh, settled, layouts=layouts, whole_world=loaded_once)
        for root, plan, stages in plans:
            shard_model(root, plan, runtime, options, shared, stages)
        if plans and plans[0][0] is not model:
            plans[0][0].tp_record.wrapper = weakref.ref(model)  # type: ignore[union-attr]
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` itself was sharded by this plugin."""
    return getattr(model, "tp_record", None) is not None


def model_type(model: nn.Module) -> str:
    """What policies know a model by: its config's model type, else its class name."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def models_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models with a policy of their own in ``module`` (itself, or what a wrapper wraps), with paths."""
    from transformers import PreTrainedModel

    from tp_plugin.policy import policies

    def walk(path: str, child: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(child, PreTrainedModel) or type(child).__name__ in policies():
            yield path, child
            return
        for name, inner in child.named_children():
            yield from walk(f"{path}.{name}" if path else name, inner)

    yield from walk("", module)


def unit_layout(plan: Plan, stages: Stages | None, name: str) -> ParamLayout:
    """How the parameter ``name`` lies on the ranks of the unit."""
    layout = plan.layouts[name]
    return layout if stages is None else layout.on_stages(stages.parameters[name], stages.count)


def shard_model(
    model: nn.Module, plan: Plan, runtime: Runtime, options: RunConfig, shared: Set[int], stages: Stages | None = None
) -> None:
    """Carry out ``plan`` on ``model``, whose parameters with ids in ``shared`` are shares. Collective over the unit."""
    mesh = runtime.mesh
    tell_dynamo(model)
    warn_of_topology(model, plan, mesh, runtime.transport.machines)
    split = stacks(model, plan) if options.sequence_parallel else {}
    plan.partial |= between(plan, [layer for layers in split.values() for layer in layers])
    layouts = {name: unit_layout(plan, stages, name) for name in plan.layouts}
    here, pipeline = plan, None
    if stages is not None:
        here, stage = on_stage(plan, stages, mesh.pp.rank), mesh.pp.rank
        split = {path: [layers[at] for at in stages.layers(stage)] for path, layers in split.items()}
        pipeline = Pipeline.of(model, stages, mesh)

    for name, parameter in model.named_parameters():
        if quantized.is_code(parameter) and layouts[name].is_sharded:
            quantized.cut_(model.get_submodule(name.rpartition(".")[0]), layouts[name], mesh.unit.rank)
        elif id(parameter) not in shared:
            _slice(parameter, layouts[name], mesh.unit.rank)
    lazy_load.materialize_buffers_(model)
    lazy_load.forget_forward(model)

    state = ModelState(model, plan, runtime, layouts)
    state.attach()
    reads = runtime.remote_logits if pipeline is None else StageReads(runtime.remote_logits)
    parts = build_parts(model, here, split, mesh.tp, reads, options)
    if parts.heads:
        trace_once(type(model).forward)
    model.tp_record = state  # type: ignore[assignment]
    state.start_counting()
    _hook_state_dict(model, state)
    tolerance, repair = options.audit_tolerance, options.audit_repair
    guard = BatchGuard(
        runtime,
        audit=lambda: audit(state, tolerance, repair),
        audit_every=options.audit_every,
        sample=state.sample,
        check=state.check,
        rounded=lambda: 0 < drift(state) <= tolerance,
        every=options.guard,
    )
    hooks.install(model, hooks.table(model, here, parts, state, guard), parts)
    adopt_hooks(model, here, parts, runtime.region, staged=pipeline is not None)
    if pipeline is not None:
        pipeline.install(state, options)


def _hook_state_dict(model: nn.Module, state: ModelState) -> None:
    """Put the hooks on ``model`` and on every module of it that owns a sharded parameter."""
    around = StateDictHooks(state)
    model.register_state_dict_pre_hook(around.before)
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if any(state.index.layouts[join(path, name)].is_sharded for name in names):
            module.tp_state_hooks = owned = ModuleStateHooks(state, path)
            module._register_state_dict_hook(owned.give)
            module.register_load_state_dict_pre_hook(owned.take)
    model._register_state_dict_hook(around.after)


def _refuse_unsupported(model: nn.Module) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if (getattr(model, "is_quantized", False) or quantizer is not None) and not any(quantized.packed_in(model)):
        raise TPError(
            f"{type(model).__name__} is quantized by {type(quantizer).__name__}; of quantized weights those of "
            "bitsandbytes can be sharded. Load it with a BitsAndBytesConfig or without quantization_config, or set "
            "tp_size: 1"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TPError(f"parameter {name!r} is on the meta device; load its weights before preparing the model")
        if hasattr(parameter, "ds_id"):
            raise TPError(
                f"parameter {name!r} is already partitioned by ZeRO-3 (deepspeed.zero.Init(module=…)), but is to be "
                "sharded first; leave the partitioning to deepspeed.initialize"
            )
        if type(parameter) not in (nn.Parameter, lazy_load.LazyParameter) and not quantized.is_code(parameter):
            raise TPError(
                f"parameter {name!r} is a {type(parameter).__name__}, not a plain Parameter; the model was already "
                "sharded or wrapped by something else (device_map, DeepSpeed, DTensor)"
            )


def _slice(parameter: nn.Parameter, layout: ParamLayout, rank: int) -> None:
    if not (layout.is_sharded or lazy_load.lies_in_file(parameter)):
        return
    with torch.no_grad():
        take_share_(parameter, layout, rank, lazy_load.read_shard(parameter, layout, rank))
