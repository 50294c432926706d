"""Policy + model + mesh → sharded model, in place: the same modules and the same Parameter objects, with less in them.

Keeping the objects keeps everything that was built on them before: optimizers, parameter groups, tied weights, names.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_plugin.config.run_config import Options
from tp_plugin.errors import TPError
from tp_plugin.mesh.groups import Mesh, init_mesh
from tp_plugin.policy import ParamLayout, Plan, Policy, load, make_plan, policy_for
from tp_plugin.policy.stacks import between, stacks
from tp_plugin.runtime.batch_guard import Guard
from tp_plugin.runtime.transport import PeerTransport, exchange
from tp_plugin.shard import lazy_load, state_dict
from tp_plugin.shard.model_state import ShardRecord
from tp_plugin.shard.replicas import agree_on_weights
from tp_plugin.shard.topology_warning import warn_of_crossing
from tp_plugin.tensor import wgrad_overlap as columns
from tp_plugin.tensor.block import ParallelBlock
from tp_plugin.tensor.dropout import FollowingDropout
from tp_plugin.tensor.embedding import AdaptedRows, VocabularyRows
from tp_plugin.tensor.experts import part_biases
from tp_plugin.tensor.grad_norm import attach
from tp_plugin.tensor.graphs import trace_once
from tp_plugin.tensor.linear import ROW_PARALLEL, fit_sizes
from tp_plugin.tensor.norm import TPRMSNorm
from tp_plugin.tensor.outputs import LayerOutputs
from tp_plugin.tensor.parallel_residual import ParallelResidual
from tp_plugin.tensor.replicas import Piece, ReplicaSum
from tp_plugin.tensor.sequence import LayerRegion, Stack
from tp_plugin.tensor.vocab import Vocabulary, VocabularyColumns
from tp_plugin.tensor.wgrad_overlap import BlockInput


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
            known_by = root.config if hasattr(getattr(root, "config", None), "model_type") else kind
            chosen = policy or (load(options.policy) if options.policy else policy_for(known_by))
            parted, whole = options.expert_parallel, options.leave_whole
            plans.append((root, make_plan(root, chosen, tp_size, expert_parallel=parted, leave_whole=whole)))
    mesh = init_mesh(tp_size)
    if plans or not sharded:
        # the whole of a wrapper, not only the models in it: a head of its own must start equal on all ranks too
        agree_on_weights(model, mesh, settled={id(p) for root in sharded for p in root.parameters()})
    for root, plan in plans:
        shard_model(root, plan, mesh, options)
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


def shard_model(model: nn.Module, plan: Plan, mesh: Mesh, options: Options) -> None:
    """Carry out ``plan`` on ``model``: slice parameters, change row-parallel layers, put hooks where data crosses."""
    link = exchange(mesh)
    warn_of_crossing(model, plan, link)
    found = stacks(model, plan) if options.sequence_parallel else {}
    plan.partial |= between(plan, [layer for layers_of in found.values() for layer in layers_of])
    for name, parameter in model.named_parameters():
        _slice(parameter, plan.layouts[name], mesh.tp.rank)
    lazy_load.materialize_buffers_(model)
    lazy_load.forget_forward(model)
    _arm(model, plan, mesh)
    _fit_modules(model, plan, mesh.tp.rank)
    parallels = _hook_blocks(model, plan, mesh.tp.rank)
    _begin_together(model, plan, parallels, options)
    made = _hook_stacks(model, found, parallels, mesh.tp.rank)
    _hook_outputs(model, plan, made)
    _hook_vocabulary(model, plan, mesh, link)

    record = ShardRecord(model, plan, mesh, link)
    model.tp_record = record  # type: ignore[assignment]
    record.start_counting()
    model.register_forward_pre_hook(_arm_copy, prepend=True)
    state_dict.install(record, model)
    guard = Guard(mesh, link, record.audit, options.audit_every)
    model.register_forward_pre_hook(guard.open, with_kwargs=True, prepend=True)
    model.register_forward_hook(guard.close, always_call=True)
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not isinstance(base, nn.Module) or base is model:
        # a base model alone: a wrapper may call its `forward`, which runs none of its hooks
        with contextlib.suppress(NotImplementedError, AttributeError):
            base = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(base, nn.Module):
        base.register_forward_pre_hook(guard.open_inner, with_kwargs=True, prepend=True)
        base.register_forward_hook(guard.close_inner, always_call=True)


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
        if type(parameter) not in (nn.Parameter, lazy_load.LazyParameter):
            raise TPError(
                f"parameter {name!r} is a {type(parameter).__name__}, not a plain Parameter; the model was already "
                "sharded or wrapped by something else (device_map, DeepSpeed, DTensor)"
            )


def _slice(parameter: nn.Parameter, layout: ParamLayout, rank: int) -> None:
    if not (layout.is_sharded or lazy_load.lies_in_file(parameter)):
        return
    with torch.no_grad():
        grad, parameter.grad = parameter.grad, None
        lazy_load.materialize_(parameter, lazy_load.read_shard(parameter, layout, rank))
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
        pieces: list[Piece] = [
            (replicas[ranks], layout.dim, layout.replicated_in(me, ranks))
            for ranks in layout.replica_groups
            if me in ranks
        ]
        if name in plan.partial:
            pieces = [(mesh.tp, None, ())]
        if pieces:
            ReplicaSum(pieces).arm(parameter)


def _arm_copy(model: nn.Module, args: object) -> None:
    record: ShardRecord = model.tp_record  # type: ignore[assignment]
    if not record.armed:
        record.armed = True
        _arm(model, record.plan, record.mesh)


def _fit_modules(model: nn.Module, plan: Plan, rank: int) -> None:
    for path in (*plan.columns, *plan.rows):
        fit_sizes(model.get_submodule(path), plan.layouts[f"{path}.weight"], rank)
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
        TPRMSNorm.install(model.get_submodule(path), width, layout.owned(rank))


def _hook_blocks(model: nn.Module, plan: Plan, rank: int) -> dict[str, ParallelBlock]:
    parallels = {}
    for path, planned in plan.blocks.items():
        block = model.get_submodule(path)
        entry = model.get_submodule(planned.entry)
        positions = {name: at for at, name in enumerate(inspect.signature(entry.forward).parameters)}
        planned.inputs = tuple(next(iter(positions)) if name == "*" else name for name in planned.inputs)
        parallel = parallels[path] = ParallelBlock(path, planned, positions, rank)
        if planned.inputs:
            entry.register_forward_pre_hook(parallel.enter, with_kwargs=True)
        else:
            block.register_forward_pre_hook(parallel.start)
        for below in planned.input_of:
            enter = functools.partial(parallel.enter_linear, block)
            model.get_submodule(below).register_forward_pre_hook(enter)
        for below in planned.output_of:
            model.get_submodule(below).register_forward_hook(functools.partial(parallel.enter_output, block))
        if planned.sums:
            block.register_forward_hook(parallel.sum_output)
        block.register_forward_hook(parallel.leave, always_call=True)
        if planned.once:
            layouts = {name: plan.layouts[f"{path}.{name}"] for name in planned.once}
            held = {name: (layout.parts[rank][0], layout.shape[-1]) for name, layout in layouts.items()}
            part_biases(block, held)
        for row in planned.rows:
            module: Any = model.get_submodule(row)
            module.__class__ = ROW_PARALLEL[Conv1D if isinstance(module, Conv1D) else nn.Linear]
            module.tp_block = parallel
        for dropout, kind in plan.dropouts.items():
            nearest = max((p for p in plan.blocks if dropout.startswith(p + ".")), key=len)
            if nearest == path:
                beside = FollowingDropout(dropout, kind, parallel, rank)
                model.get_submodule(dropout).register_forward_pre_hook(beside.before)
                model.get_submodule(dropout).register_forward_hook(beside.after, always_call=True)

    for path, blocks in plan.side_by_side.items():
        rows = [plan.blocks[block].rows[0] for block in blocks]
        # an adapted row stands inside PEFT's layer
        outputs = {*blocks, *rows, *(row.removesuffix(".base_layer") for row in rows)}
        beginning = BlockInput()
        pair = ParallelResidual(path, [model.get_submodule(output) for output in sorted(outputs)], beginning)
        for name, row in zip(blocks, rows, strict=True):
            parallels[name].beside, parallels[name].beginning = pair, beginning
            model.get_submodule(row).tp_beside = pair  # type: ignore[assignment]
        model.get_submodule(path).register_forward_pre_hook(pair.begin)
        model.get_submodule(path).register_forward_hook(pair.end, always_call=True)
    return parallels


def _begin_together(model: nn.Module, plan: Plan, parallels: Mapping[str, ParallelBlock], options: Options) -> None:
    """Tell column-parallel linears of the beginning of their block, and put weights that may run as one together."""
    if not (options.overlap or options.fuse):
        return
    for path, planned in plan.blocks.items():
        beginning = parallels[path].beginning
        beginning.overlap, beginning.fuse = options.overlap, options.fuse
        linears: list[Any] = [model.get_submodule(column) for column in planned.columns]
        linears = [linear for linear in linears if type(linear) in columns.COLUMN_PARALLEL]
        for linear in linears:
            linear.__class__ = columns.COLUMN_PARALLEL[type(linear)]
            linear.tp_beginning = beginning
        beginning.linears += linears
        sharded = all(plan.layouts[f"{column}.weight"].is_sharded for column in planned.columns)
        alike = len({(type(linear), linear.weight.shape[1], linear.bias is None) for linear in linears}) == 1
        if not (options.fuse and planned.inputs and len(planned.columns) == len(linears) > 1 and sharded and alike):
            continue
        weights = [linear.weight for linear in linears]
        if isinstance(linears[0], nn.Linear) and len({(w.dtype, w.device) for w in weights}) == 1:
            columns.join(weights)
            beginning.siblings.append(tuple(linears))


def _hook_stacks(
    model: nn.Module, found: Mapping[str, list[str]], parallels: Mapping[str, ParallelBlock], rank: int
) -> dict[str, Stack]:
    made = {path: Stack(path) for path in found}
    for path, members in found.items():
        stack = made[path]
        modules = [model.get_submodule(member) for member in members]
        modules[0].register_forward_pre_hook(stack.split, with_kwargs=True, prepend=True)
        for member, layer in zip(members, modules, strict=True):
            own = LayerRegion(member, stack, rank)
            layer.register_forward_pre_hook(own.before, with_kwargs=True)
            layer.register_forward_hook(own.after, always_call=True)
            layer.register_forward_hook(stack.abandon, always_call=True)
            for name, parallel in parallels.items():
                if name == member or name.startswith(f"{member}."):
                    parallel.stack, parallel.layer_region = stack, own.region
                    if parallel.beside is not None:
                        parallel.beside.stack = stack
        modules[-1].register_forward_hook(stack.join)
    return made


def _hook_outputs(model: nn.Module, plan: Plan, made: Mapping[str, Stack]) -> None:
    """Make whole what the nearest model around the layers returns of them."""
    from transformers import PreTrainedModel

    around: list[str] = [
        path for path, module in model.named_modules() if not path or isinstance(module, PreTrainedModel)
    ]

    def nearest(path: str) -> str:
        return max((a for a in around if f"{path}.".startswith(f"{a}." if a else "")), key=len)

    for owner in around:
        attentions = [path for path, block in plan.blocks.items() if block.heads is not None and nearest(path) == owner]
        heads = [plan.query_heads(path) for path in attentions]
        parted = [stack for path, stack in made.items() if nearest(path) == owner]
        if heads or parted:
            model.get_submodule(owner).register_forward_hook(LayerOutputs(heads, parted), prepend=True)


def _hook_vocabulary(model: nn.Module, plan: Plan, mesh: Mesh, link: PeerTransport) -> None:
    group, rank, peers = mesh.tp, mesh.tp.rank, link.desk
    for path in plan.embeddings:
        embedding, layout = model.get_submodule(path), plan.layouts[f"{path}.weight"]
        if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
            raise TPError(f"{path} must be an nn.Embedding without max_norm to be split by vocabulary rows")
        start, stop = (layout.parts[rank] or ((layout.shape[0], layout.shape[0]),))[0]
        embedding.num_embeddings = layout.local_shape(rank)[0]
        rows = VocabularyRows(layout.shape[0], start, stop, embedding.padding_idx, group)
        embedding.register_forward_pre_hook(rows.before)
        embedding.register_forward_hook(rows.after)
    for path, name in plan.adapted_embeddings:
        adapted: Any = model.get_submodule(path)
        layout = plan.layouts[f"{path}.lora_embedding_A.{name}"]
        start, stop = (layout.parts[rank] or ((layout.shape[1], layout.shape[1]),))[0]
        padding = adapted.get_base_layer().padding_idx
        adapted._embed = AdaptedRows(VocabularyRows(layout.shape[1], start, stop, padding, group))
    if plan.heads:
        trace_once(type(model).forward)
    for path in plan.heads:
        head, layout = model.get_submodule(path), plan.layouts[f"{path}.weight"]
        fit_sizes(head, layout, rank)
        columns = VocabularyColumns(Vocabulary(layout.shape[0], layout.local_shape(rank)[0], group, peers))
        head.register_forward_pre_hook(columns.before)
        head.register_forward_hook(columns.after, prepend=True)  # other hooks see whole logits


__all__ = ["is_sharded", "model_type", "models_in", "parallelize", "shard_model"]
