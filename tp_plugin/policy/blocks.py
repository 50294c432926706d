"""What a policy can say. A policy is a table: per architecture, the blocks and the modules in them.

Module names are patterns, matched against the end of a module's path: ``layers.*.self_attn`` finds
``model.layers.3.self_attn`` in ``LlamaForCausalLM`` and ``layers.3.self_attn`` in ``LlamaModel``; ``*`` is one
path component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tp_plugin.policy.split import Split, even, kv, q

Count = str | Callable[[Any], int]
"""A number in the model's config: its name, or a function of the config."""


@dataclass(frozen=True)
class Block:
    """A unit that communicates once per direction: an all-reduce after ``row`` in the forward, one at ``inputs`` in
    the backward (Shoeybi et al. 2019, section 3: the operators g and f).

    Attributes:
        path: pattern of the block's module.
        columns: column-parallel modules below it (weight split by output features), each with its split.
        row: row-parallel modules below it (weight split by input features), each with its split.
        inputs: names of the forward's arguments that carry activations into the block; empty if the block is no module
            of its own (``fc1`` and ``fc2`` of a layer): it then begins at the input of its one column-parallel module.
        at: the module below ``path`` at whose input the block begins, where that is not the block's own: a residual
            that the block adds itself must not pass there.
        partial: replicated modules or parameters that every rank applies to its own shard only (a norm over
            ``head_dim``): their gradient is summed over the TP group.
        per_head: parameters with entries per head, with the split and the dimension: ``{"sinks": (q, 0)}``.
        head_inputs: arguments of the forward with a dimension of query heads (position biases, ALiBi), of which each
            rank takes its heads; that dimension may be batch · heads.
        wide_norms: RMS norms over the whole width of q or k, whose statistic is a sum over the ranks, with the split of
            their weight.
        local: attributes of the block's module that must hold this rank's share, as
            ``{attribute: "q_heads" | "kv_heads" | "groups" | "q_width" | "kv_width" | "width"}``. A dotted name is an
            attribute of a module below; ``config.NAME`` gives the module a config of its own with that value.
        optional: whether a model may have no such block.

    A name in ``columns``, ``partial``, ``per_head`` or ``wide_norms`` that ends with ``?`` may be absent.
    """

    path: str
    columns: Mapping[str, Split]
    row: Mapping[str, Split]
    inputs: tuple[str, ...] = ("hidden_states",)
    at: str = ""
    partial: tuple[str, ...] = ()
    per_head: Mapping[str, tuple[Split, int]] = field(default_factory=dict)
    head_inputs: Mapping[str, int] = field(default_factory=dict)
    wide_norms: Mapping[str, Split] = field(default_factory=dict)
    local: Mapping[str, str] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True)
class Attention(Block):
    """An attention block; ``heads`` and ``kv_heads`` name the counts in the model's config, or compute them from it."""

    columns: Mapping[str, Split] = field(default_factory=lambda: {"q_proj": q, "k_proj": kv, "v_proj": kv})
    row: Mapping[str, Split] = field(default_factory=lambda: {"o_proj": q})
    heads: Count = "num_attention_heads"
    kv_heads: Count = "num_key_value_heads"


@dataclass(frozen=True)
class MLP(Block):
    """A feed-forward block."""

    columns: Mapping[str, Split] = field(default_factory=lambda: {"gate_proj": even, "up_proj": even})
    row: Mapping[str, Split] = field(default_factory=lambda: {"down_proj": even})
    inputs: tuple[str, ...] = ("x",)


@dataclass(frozen=True)
class Vocabulary:
    """The token embeddings (rows split over the ranks) and the output head, tied to them or not."""

    embedding: str | tuple[str, ...] = "embed_tokens"
    head: str | None = "lm_head"


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
    """

    model_types: tuple[str, ...]
    blocks: tuple[Block, ...] = ()
    vocabulary: Vocabulary | None = None
    replicated: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
