"""What a policy can say. A policy is a table: per architecture, the blocks and the modules in them.

Module names are patterns, matched against the end of a module's path: ``layers.*.self_attn`` finds
``model.layers.3.self_attn`` in ``LlamaForCausalLM`` and ``layers.3.self_attn`` in ``LlamaModel``; ``*`` is one
path component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tp_plugin.policy.renamed import renamed_keywords
from tp_plugin.policy.split import Blocks, Split, aligned, even, kv, q

BLOCK_KEYWORDS = {"at": "entry", "having": "requires", "local": "local_sizes", "wide_norms": "sharded_norms"}
"""Deprecated keywords of every block."""

Count = str | Callable[[Any], int]
"""A number in the model's config: its name, or a function of the config."""


@renamed_keywords(**BLOCK_KEYWORDS)
@dataclass(frozen=True)
class Block:
    """A unit that communicates once per direction: an all-reduce after ``row`` in the forward, one at ``inputs`` in
    the backward (Shoeybi et al. 2019, section 3: the operators g and f).

    Attributes:
        path: pattern of the block's module.
        columns: column-parallel modules below it (weight split by output features), each with its split.
        row: row-parallel modules below it (weight split by input features), each with its split.
        inputs: names of the forward's arguments that carry activations into the block (``*``: the first one, whatever
            its name, and all others that require a gradient when it runs); empty if it begins elsewhere.
        entry: the module below ``path`` at whose ``inputs`` the block begins, where those are not the block's own: a
            residual that the block adds itself must not pass there.
        input_of, output_of: modules below ``path`` at whose input or output the block begins, if it has no ``inputs``
            (latent attention). By default the input of its one column-parallel module (``fc1`` of a layer whose MLP is
            no module of its own).
        partial: replicated modules or parameters that every rank applies to its own shard only (a norm over
            ``head_dim``): their gradient is summed over the TP group.
        replicated: modules or parameters before the place where the block begins: replicated, like those outside.
        tensors: parameters of no linear layer that are split along a dimension, with split and dimension:
            ``{"sinks": (q, 0)}``.
        head_inputs: arguments of the forward with a dimension of query heads (position biases, ALiBi), of which each
            rank takes its heads: the dimension, counted from the last (-3 is that of (batch, heads, q, k) and of
            (batch · heads, q, k)). A dimension of 1 stands for all heads and stays.
        sharded_norms: RMS norms over the whole width of q or k, whose statistic is a sum over the ranks, with the split
            of their weight.
        local_sizes: attributes of the block's module that must hold this rank's share, as
            ``{attribute: "q_heads" | "kv_heads" | "groups" | "q_width" | "kv_width" | "width"}``. A dotted name is an
            attribute of a module below; ``config.NAME`` gives the module a config of its own with that value.
        methods: functions that take the place of methods of the block's module, called without the module: for a method
            that counts on the whole model's number of heads, and on nothing that an attribute says.
        shared_dropouts: dropouts inside the block whose input is whole on every rank: all ranks drop the same.
        requires: a module below ``path`` without which a match is not this block (layers of which some have a dense
            MLP).
        optional: whether a model may have no such block.

    A name below ``path`` (also an attribute in ``local``) that ends with ``?`` may be absent.
    """

    path: str
    columns: Mapping[str, Split]
    row: Mapping[str, Split]
    inputs: tuple[str, ...] = ("hidden_states",)
    entry: str = ""
    partial: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()
    input_of: tuple[str, ...] = ()
    output_of: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[Split, int]] = field(default_factory=dict)
    head_inputs: Mapping[str, int] = field(default_factory=dict)
    sharded_norms: Mapping[str, Split] = field(default_factory=dict)
    local_sizes: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    shared_dropouts: tuple[str, ...] = ()
    requires: str = ""
    optional: bool = False


@renamed_keywords(**BLOCK_KEYWORDS)
@dataclass(frozen=True)
class Attention(Block):
    """An attention block; ``heads`` and ``kv_heads`` name the counts in the model's config, or compute them from it.

    Attributes:
        folded_heads: whether its dropout acts on weights (batch · heads, q, k), not on (batch, heads, q, k).
    """

    columns: Mapping[str, Split] = field(default_factory=lambda: {"q_proj": q, "k_proj": kv, "v_proj": kv})
    row: Mapping[str, Split] = field(default_factory=lambda: {"o_proj": q})
    heads: Count = "num_attention_heads"
    kv_heads: Count = "num_key_value_heads"
    folded_heads: bool = False


@renamed_keywords(**BLOCK_KEYWORDS)
@dataclass(frozen=True)
class MLP(Block):
    """A feed-forward block."""

    columns: Mapping[str, Split] = field(default_factory=lambda: {"gate_proj": even, "up_proj": even})
    row: Mapping[str, Split] = field(default_factory=lambda: {"down_proj": even})
    inputs: tuple[str, ...] = ("x",)


@renamed_keywords(**BLOCK_KEYWORDS, once="bias_shards", eager_parts="eager_supports_ep")
@dataclass(frozen=True)
class Experts(Block):
    """Experts whose weights are stacked in tensors (expert, …), each split inside; the module's output is the sum.

    With ``expert_parallel`` in the options, whole experts lie on the ranks instead.

    Attributes:
        bias_shards: biases that every expert adds to its output: split by output features, and added where they lie.
        index: the forward's argument with the experts' numbers (tokens, k); empty if there is none: then whole
            experts cannot be distributed.
        count: the module's attribute with the number of experts; an ``index`` of that number means no expert.
        eager_supports_ep: whether the module's own forward (``experts_implementation: eager``) knows such a number.
    """

    path: str = "layers.*.mlp.experts"
    columns: Mapping[str, Split] = field(default_factory=dict)
    row: Mapping[str, Split] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("hidden_states", "top_k_weights")
    tensors: Mapping[str, tuple[Split, int]] = field(
        default_factory=lambda: {"gate_up_proj": (Blocks(("aligned", "aligned")), 1), "down_proj": (aligned, 2)}
    )
    bias_shards: tuple[str, ...] = ()
    index: str = "top_k_index"
    count: str = "num_experts"
    eager_supports_ep: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """The token embeddings (rows split over the ranks) and the output head, tied to them or not."""

    embedding: str | tuple[str, ...] = "embed_tokens"
    head: str | None = "lm_head"


@renamed_keywords(side_by_side="parallel_residual", side_by_side_if="parallel_residual_if")
@dataclass(frozen=True)
class Policy:
    """How the models of some architectures are sharded.

    Attributes:
        model_types: the ``config.model_type`` values this policy serves (class names for modules that are no HF model).
        blocks: the communicating blocks.
        vocabulary: embedding and head, or None.
        replicated: patterns of modules or parameters that every rank holds whole. Every parameter must be claimed by
            a block, the vocabulary or this list; anything else is an error that names it.
        linears: class names of the architecture's own ``nn.Linear`` classes that compute what ``nn.Linear`` does.
        parallel_residual: pattern of the layers that add up the outputs of two blocks, x + attention(a) + mlp(b), and
            use neither by itself: the two communicate as one.
        parallel_residual_if: whether a model with this config has such layers.
        towers: patterns of submodules that are models of their own, each with the name of its config in the model's:
            ``{"vision_tower": "vision_config"}``. Each is sharded by the policy for that config, which sees nothing
            but the tower, as this policy's own patterns see nothing of it.
        rest_replicated: whether every parameter outside the blocks is replicated without being named.
        origin: "registered" by its author, or "derived" from the ``base_model_tp_plan`` of a transformers config.
        proven: whether a test of this project proves a derived policy; a registered one is its author's to prove.
    """

    model_types: tuple[str, ...]
    blocks: tuple[Block, ...] = ()
    vocabulary: Vocabulary | None = None
    replicated: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    parallel_residual: str = ""
    parallel_residual_if: Callable[[Any], bool] = lambda config: True
    towers: Mapping[str, str] = field(default_factory=dict)
    rest_replicated: bool = False
    origin: Literal["registered", "derived"] = "registered"
    proven: bool = True
