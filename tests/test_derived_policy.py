"""Policies that are derived from a model's own plan: what they wrap, what they say before they train, what they refuse.

The architecture is made up: its attention takes a gate beside the hidden states, and both carry gradients.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from workers import WorkerError, run

from tp_plugin.cli.models import build, small_config
from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import PolicyError
from tp_plugin.policy import make_plan, policy_for
from tp_plugin.runtime.runtime import require
from tp_plugin.runtime.start import stop
from tp_plugin.shard import parallelize

LAYERS = 2
PLAN = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


class GatedConfig(PreTrainedConfig):
    model_type = "gated_toy"
    base_model_tp_plan = PLAN
    hidden_size: int = 32
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    handed_over: str = "positional"


class GatedAttention(nn.Module):
    """Causal attention whose input or output is multiplied by what a gate gives, (batch, time, hidden)."""

    def __init__(self, config: GatedConfig):
        super().__init__()
        width = config.hidden_size
        self.head_dim, self.after = width // config.num_attention_heads, config.handed_over == "after the reduction"
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        # no bias: softmax does not see it without positions, so its gradient is nothing but rounding
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim)

    def forward(self, hidden_states: torch.Tensor, gate: Any = None, **kwargs: Any) -> torch.Tensor:
        gate = kwargs.get("extra", gate)
        gate, shift = gate if isinstance(gate, tuple) else (gate, 0.0)
        x = hidden_states if self.after else hidden_states * gate + shift
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in self.projections())
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out * gate if self.after else out

    def projections(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj


class GatedMLP(nn.Module):
    def __init__(self, config: GatedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.down_proj = nn.Linear(3 * config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x).relu())


class GatedLayer(nn.Module):
    def __init__(self, config: GatedConfig):
        super().__init__()
        self.handed_over = config.handed_over
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.self_attn, self.mlp = GatedAttention(config), GatedMLP(config)

    def forward(self, x: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        gate = self.gate(embedded).sigmoid()
        arguments: dict[str, Any] = {
            "keyword": {"gate": gate},
            "undeclared keyword": {"extra": gate},
            "tuple": {"gate": (gate, embedded)},
        }.get(self.handed_over, {})
        x = x + (self.self_attn(x, **arguments) if arguments else self.self_attn(x, gate))
        return x + self.mlp(x)


class GatedModel(PreTrainedModel):
    config_class = GatedConfig

    def __init__(self, config: GatedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(31, config.hidden_size)
        self.layers = nn.ModuleList(GatedLayer(config) for _ in range(LAYERS))
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, embedded)
        return x


def gated_model(**settings: Any) -> GatedModel:
    torch.manual_seed(0)
    model = GatedModel(GatedConfig(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def train_once(model: nn.Module) -> torch.Tensor:
    ids = 2 * torch.arange(14).view(2, 7)
    loss: torch.Tensor = model(ids).square().mean()
    loss.backward()
    return loss


def gradients(handed_over: str, options: dict[str, Any]) -> tuple[float, dict[str, float], int]:
    """Run on every rank: deviation of the loss, of each gradient (relative, in norm), and the number of all-reduces."""
    stop()

    plain = gated_model(handed_over=handed_over)
    sharded = copy.deepcopy(plain)
    plan = make_plan(plain, policy_for(plain.config), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallelize(sharded, tp_size=2, options=RunConfig(tp_size=2, **options))
    mesh = require().mesh
    loss = train_once(plain)
    mesh.tp.context.stats.total.clear()
    apart = abs(train_once(sharded) / loss - 1).item()
    found = {}
    for (name, whole), local in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        expected = plan.layouts[name].shard(whole.grad, mesh.tp.rank)
        found[name] = ((local.grad - expected).norm() / expected.norm()).item()
    return apart, found, mesh.tp.context.stats.total.count["all_reduce/tp"]


@pytest.mark.parametrize("options", [{}, {"overlap": False}], ids=["overlap", "plain"])
@pytest.mark.parametrize("handed_over", ["positional", "keyword", "undeclared keyword", "tuple"])
def test_every_differentiable_input_of_a_block_is_wrapped(handed_over: str, options: dict[str, Any]) -> None:
    """The gate's gradient is complete on every rank, as in one process, with one all-reduce a block and direction."""
    for loss, apart, all_reduces in run(2, gradients, handed_over, options):
        assert loss < 1e-5
        assert {name: value for name, value in apart.items() if not value < 1e-4} == {}
        assert all_reduces == 2 * LAYERS * 2 + 1, "two blocks a layer, forward and backward, and the embedding"


@pytest.mark.parametrize(
    "handed_over, options, message",
    [
        ("after the reduction", {}, r"layers\.0\.self_attn uses one of its inputs outside of its sharded part"),
        ("keyword", {"sequence_parallel": True}, r"sequence_parallel: layers\.0\.self_attn takes 2 differentiable in"),
    ],
)
def test_an_input_that_cannot_be_wrapped_is_refused(handed_over: str, options: dict[str, Any], message: str) -> None:
    """A gate on the block's output has its whole gradient on every rank: the sum would count it twice."""
    with pytest.raises(WorkerError, match=rf"rank 0(?s:.*){message}(?s:.*)rank 1(?s:.*){message}"):
        run(2, gradients, handed_over, options)


def said_by(model_type: str, tp_size: int, explicit: bool) -> list[str]:
    """Run on every rank: the warnings that mention a derived policy."""
    stop()
    if model_type == "gated_toy":
        model: nn.Module = gated_model()
    else:
        model = build(small_config(CONFIG_MAPPING[model_type]()), meta=False)
    policy = policy_for(model.config) if explicit else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallelize(model, tp_size=tp_size, policy=policy, options=RunConfig(tp_size=tp_size))
    return [str(warning.message) for warning in caught if "derived" in str(warning.message)]


def test_an_unproven_policy_says_so_before_it_trains() -> None:
    main, other = run(2, said_by, "gated_toy", 2, False)
    (message,) = main
    assert "policy for 'gated_toy' was derived" in message and message.endswith("`tp-plugin verify gated_toy`")
    assert other == [], "one rank says it"


@pytest.mark.parametrize("model_type, tp_size, explicit", [("cwm", 2, False), ("gated_toy", 1, False)])
def test_nothing_is_said_of_proven_and_of_unsharded_models(model_type: str, tp_size: int, explicit: bool) -> None:
    assert run(2, said_by, model_type, tp_size, explicit) == [[], []]


def test_where_a_policy_comes_from_is_on_it() -> None:
    toy, proven, registered = policy_for(GatedConfig()), policy_for(CONFIG_MAPPING["cwm"]()), policy_for("llama")
    assert (toy.origin, toy.proven) == ("derived", False)
    assert (proven.origin, proven.proven) == ("derived", True)
    assert registered.origin == "registered"
    assert make_plan(gated_model(), toy, 2).unproven == ["gated_toy"]


# --- mistakes that would run, with wrong numbers --------------------------------------------------------------------


class FusedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(gate.sigmoid() * up)


class FusedQuery(GatedAttention):
    """Its query projection gives queries, and then a gate for each of them: [q0 … q3 g0 … g3]."""

    def __init__(self, config: GatedConfig):
        super().__init__(config)
        self.q_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)


class ShortNames(nn.Module):
    """An attention that a plan of linears alone does not show as one."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 4
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Counted(GatedAttention):
    """It counts its heads by a name of its own."""

    def __init__(self, config: GatedConfig):
        super().__init__(config)
        self.total_heads = config.num_attention_heads


@pytest.mark.parametrize(
    "name, module, plan, message",
    [
        (
            "mlp",
            FusedMLP,
            {"gate_up_proj": "colwise", "down_proj": "rowwise"},
            r"layers\.0\.mlp\.gate_up_proj \(colwise\) gives 128 features, but layers\.0\.mlp\.down_proj \(rowwise\) "
            r"takes 64; if it is several linears fused",
        ),
        (
            "self_attn",
            lambda: FusedQuery(GatedConfig()),
            {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise"), "o_proj": "rowwise"},
            r"layers\.0\.self_attn\.q_proj \(colwise\) gives 64 features, 16 for each of 4 heads, where 8 would match",
        ),
        (
            "self_attn",
            lambda: Counted(GatedConfig()),
            {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise"), "o_proj": "rowwise"},
            r"layers\.0\.self_attn\.total_heads = 4 seems to count heads, of which each rank computes some once q_proj",
        ),
        (
            "self_attn",
            ShortNames,
            {**dict.fromkeys(("wq", "wk", "wv"), "colwise"), "wo": "rowwise"},
            r"layers\.0\.self_attn\.n_heads = 4 seems to count heads",
        ),
    ],
    ids=["fused MLP", "fused query", "head count of another name", "attention of other names"],
)
def test_a_plan_that_cannot_be_right_is_refused(
    name: str, module: Callable[[], nn.Module], plan: dict[str, str], message: str
) -> None:
    layer, model = nn.Module(), nn.Module()
    setattr(layer, name, module())
    model.layers, model.config = nn.ModuleList([layer]), GatedConfig()
    model.config.base_model_tp_plan = {f"layers.*.{name}.{linear}": style for linear, style in plan.items()}
    with pytest.raises(PolicyError, match=message + r"(?s:.*)write a policy for this architecture"):
        make_plan(model, policy_for(model.config), 2)


def test_an_attention_of_which_some_projections_are_unnamed_is_refused() -> None:
    config = GatedConfig()
    config.base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.kv_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }
    with pytest.raises(PolicyError, match=r"self_attn has q_proj, kv_proj \(colwise\) but no k_proj, v_proj"):
        policy_for(config)
