"""Policy + model + mesh → sharded model, in place: the same modules and the same Parameter objects, with less in them.

Keeping the objects keeps everything that was built on them before: optimizers, parameter groups, tied weights, names.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.errors import TPError
from tp_plugin.options import Options
from tp_plugin.parallel import layers
from tp_plugin.parallel.exchange import exchange
from tp_plugin.parallel.guard import Guard
from tp_plugin.parallel.layouts import attach
from tp_plugin.parallel.mesh import Mesh, init_mesh
from tp_plugin.policy import ParamLayout, Plan, Policy, load, make_plan, policy_for
from tp_plugin.shard import state_dict
from tp_plugin.shard.record import ShardRecord
from tp_plugin.shard.replicas import agree_on_weights


def parallelize(
    model: nn.Module, tp_size: int | None = None, policy: Policy | None = None, *, options: Options | None = None
) -> nn.Module:
    """Shard ``model`` over its TP group, in place. Collective over the world; a second call does nothing.

    Args:
        model: a transformers model, or a module that contains some; weights whole and on any one device.
        tp_size: size of the TP group; default the one the run was configured with.
        policy: how to shard; default the registered policy of each model's type.
        options: the ``tp_plugin:`` mapping of the config.

    Raises:
        PolicyError: no policy, or one that does not fit.
        TPError: ``tp_size`` does not divide the world or is not the run's, or the model is quantized.
    """
    options = options or Options.from_environment()
    tp_size = tp_size or options.tp_size
    roots = list(models_in(model)) if policy is None else [("", model)]
    if tp_size > 1 and not roots:
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
            chosen = policy or (load(options.policy) if options.policy else policy_for(kind))
            plans.append((root, make_plan(root, chosen, tp_size)))
    mesh = init_mesh(tp_size)
    if plans or not sharded:
        # the whole of a wrapper, not only the models in it: a head of its own must start equal on all ranks too
        agree_on_weights(model, mesh, settled={id(p) for root in sharded for p in root.parameters()})
    for root, plan in plans:
        shard_model(root, plan, mesh, options)
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


def shard_model(model: nn.Module, plan: Plan, mesh: Mesh, options: Options) -> None:
    """Carry out ``plan`` on ``model``: slice parameters, change row-parallel layers, put hooks where data crosses."""
    link = exchange(mesh)
    for name, parameter in model.named_parameters():
        _slice(parameter, plan.layouts[name], mesh.tp.rank)
    _arm(model, plan, mesh)
    _fit_modules(model, plan, mesh.tp.rank)
    _hook_blocks(model, plan, mesh.tp.rank)
    _hook_vocabulary(model, plan, mesh.tp.rank)

    record = ShardRecord(model, plan, mesh, link)
    model.tp_record = record  # type: ignore[assignment]
    record.start_counting()
    model.register_forward_pre_hook(_arm_copy, prepend=True)
    state_dict.install(record, model)
    guard = Guard(mesh, link, record.audit, options.audit_every)
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    for module in {id(m): m for m in (model, base) if isinstance(m, nn.Module)}.values():
        module.register_forward_pre_hook(guard.pre_hook, with_kwargs=True, prepend=True)
        module.register_forward_hook(guard.hook, always_call=True)


def _refuse_unsupported(model: nn.Module) -> None:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise TPError(
            f"{type(model).__name__} is quantized; sharding quantized weights is not supported. Load it without "
            "quantization_config, or set tp_size: 1"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TPError(f"parameter {name!r} is on the meta device; load its weights before preparing the model")
        if hasattr(parameter, "ds_id"):
            raise TPError(
                f"parameter {name!r} is already partitioned by ZeRO-3 (deepspeed.zero.Init(module=…)), but is to be "
                "sharded first; leave the partitioning to deepspeed.initialize"
            )
        if type(parameter) is not nn.Parameter:
            raise TPError(
                f"parameter {name!r} is a {type(parameter).__name__}, not a plain Parameter; the model was already "
                "sharded or wrapped by something else (device_map, DeepSpeed, DTensor)"
            )


def _slice(parameter: nn.Parameter, layout: ParamLayout, rank: int) -> None:
    if not layout.is_sharded:
        return
    with torch.no_grad():
        grad, parameter.grad = parameter.grad, None
        parameter.data = layout.shard(parameter.data, rank)
        if grad is not None:
            parameter.grad = layout.shard(grad, rank)


def _arm(model: nn.Module, plan: Plan, mesh: Mesh) -> None:
    """Tell norms of the parameters' layouts, and hook the gradient sums of replicas."""
    groups = sorted({ranks for layout in plan.layouts.values() for ranks in layout.replica_groups})
    replicas = {ranks: mesh.replicas(ranks) for ranks in groups}  # made by all ranks, in one order
    me = mesh.tp.rank
    for name, parameter in model.named_parameters():
        layout = plan.layouts[name]
        attach(parameter, layout)
        pieces: list[layers.Piece] = [
            (replicas[ranks], layout.dim, layout.replicated_in(me, ranks))
            for ranks in layout.replica_groups
            if me in ranks
        ]
        if name in plan.partial:
            pieces = [(mesh.tp, None, ())]
        if pieces:
            # a leaf takes a hook only while it requires grad; it keeps the hook when it is frozen and thawed
            trained = parameter.requires_grad
            parameter.requires_grad_(True)
            parameter.register_hook(layers.ReplicaSum(pieces))
            parameter.requires_grad_(trained)


def _arm_copy(model: nn.Module, args: object) -> None:
    record: ShardRecord = model.tp_record  # type: ignore[assignment]
    if not record.armed:
        record.armed = True
        _arm(model, record.plan, record.mesh)


def _fit_modules(model: nn.Module, plan: Plan, rank: int) -> None:
    for path in (*plan.columns, *plan.rows):
        layers.fit_sizes(model.get_submodule(path), plan.layouts[f"{path}.weight"], rank)
    for (path, attribute), values in plan.attributes.items():
        *owners, name = attribute.split(".")
        owner: Any = model.get_submodule(path)
        for inner in owners:
            if inner == "config":  # shared by the whole model: this module gets its own
                owner.config = copy.copy(owner.config)
            owner = getattr(owner, inner)
        setattr(owner, name, values[rank])
    for path, width in plan.wide_norms.items():
        layout = plan.layouts[f"{path}.weight"]
        layers.WideNorm.install(model.get_submodule(path), width, layout.owned(rank))


def _hook_blocks(model: nn.Module, plan: Plan, rank: int) -> None:
    for path, inputs in plan.blocks.items():
        block = model.get_submodule(path)
        entry = model.get_submodule(plan.entries.get(path, path))
        positions = {name: at for at, name in enumerate(inspect.signature(entry.forward).parameters)}
        missing = [name for name in (*inputs, *plan.head_inputs.get(path, {})) if name not in positions]
        if missing:
            raise TPError(f"the forward of {path} takes no argument {missing[0]!r}, which its policy calls an input")
        of_heads = plan.head_inputs.get(path, {})
        taken = {name: (dim, heads, ranges[rank]) for name, (dim, heads, ranges) in of_heads.items()}
        parallel = layers.ParallelBlock(path, inputs, positions, rank, taken)
        if inputs:
            entry.register_forward_pre_hook(parallel.enter, with_kwargs=True)
        else:
            column = next(name for name in plan.columns if plan.owners[name] == path)
            model.get_submodule(column).register_forward_pre_hook(functools.partial(parallel.enter_linear, block))
        block.register_forward_hook(parallel.leave, always_call=True)
        for row in plan.rows:
            if plan.owners[row] == path:
                module: Any = model.get_submodule(row)
                module.__class__ = layers.ROW_PARALLEL[Conv1D if isinstance(module, Conv1D) else nn.Linear]
                module.tp_block = parallel
        for dropout, kind in plan.dropouts.items():
            nearest = max((p for p in plan.blocks if dropout.startswith(p + ".")), key=len)
            if nearest == path:
                beside = layers.AdapterDropout(dropout, kind, parallel, rank)
                model.get_submodule(dropout).register_forward_pre_hook(beside.before)
                model.get_submodule(dropout).register_forward_hook(beside.after, always_call=True)


def _hook_vocabulary(model: nn.Module, plan: Plan, rank: int) -> None:
    for path in plan.embeddings:
        embedding, layout = model.get_submodule(path), plan.layouts[f"{path}.weight"]
        if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
            raise TPError(f"{path} must be an nn.Embedding without max_norm to be split by vocabulary rows")
        start, stop = (layout.parts[rank] or ((layout.shape[0], layout.shape[0]),))[0]
        embedding.num_embeddings = layout.local_shape(rank)[0]
        if embedding.padding_idx is not None:
            inside = start <= embedding.padding_idx < stop
            embedding.padding_idx = embedding.padding_idx - start if inside else None
        rows = layers.VocabularyRows(start, stop)
        embedding.register_forward_pre_hook(rows.before)
        embedding.register_forward_hook(rows.after)
    for path in plan.heads:
        head, layout = model.get_submodule(path), plan.layouts[f"{path}.weight"]
        layers.fit_sizes(head, layout, rank)
        columns = layers.VocabularyColumns(layout.shape[0])
        head.register_forward_pre_hook(columns.before)
        head.register_forward_hook(columns.after)


__all__ = ["is_sharded", "model_type", "models_in", "parallelize", "shard_model"]
