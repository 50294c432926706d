"""Liger's kernels on a sharded model: those of a layer stay, its losses give way to that over the split vocabulary."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build, config_for
from transformers import TrainingArguments
from transformers.training_args import TrainingArguments as Arguments
from workers import run

from tp_plugin.engines import liger, patching
from tp_plugin.engines.trainer import _liger_without_loss
from tp_plugin.errors import TPError
from tp_plugin.policy import ParamLayout
from tp_plugin.tensor.param_entry import ParamEntry, bind

IDS = torch.arange(3, 33).view(2, 15)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with patching.taken_back():
        yield


def fake(applied: list[dict[str, Any]]) -> Any:
    """As ``liger_kernel.transformers.monkey_patch`` of 0.8.5, with kernels in torch."""

    def bind_method(module: Any, name: str, method: Callable[..., Any]) -> None:
        vars(module)[name] = method.__get__(module)

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))

    def linear(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()

    def apply_liger_kernel_to_llama(
        rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, model: Any = None
    ) -> None:
        applied.append({"cross_entropy": cross_entropy, "fused": fused_linear_cross_entropy, "rope": rope})
        for layer in [] if model is None else model.model.layers:
            module._bind_method_to_module(layer.input_layernorm, "forward", norm)
            module._bind_method_to_module(layer.mlp, "forward", mlp)
            module._bind_method_to_module(layer.self_attn.q_proj, "forward", linear)  # none does, but around it is ours

    def apply_liger_kernel_to_nemotron(model: Any = None) -> None:
        applied.append({})

    functions = {f.__name__: f for f in (apply_liger_kernel_to_llama, apply_liger_kernel_to_nemotron)}
    table = {name.rpartition("_")[2]: function for name, function in functions.items()}
    module = SimpleNamespace(_bind_method_to_module=bind_method, MODEL_TYPE_TO_APPLY_LIGER_FN=table, **functions)
    return module


def test_its_losses_are_not_applied() -> None:
    applied: list[dict[str, Any]] = []
    module = fake(applied)
    before = dict(vars(module))
    liger.install(module)
    without = {"cross_entropy": False, "fused": False}
    module.apply_liger_kernel_to_llama()
    module.apply_liger_kernel_to_llama(False, True, fused_linear_cross_entropy=False)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"](fused_linear_cross_entropy=True)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN["nemotron"](model=None)  # has no such options
    assert applied == [without | {"rope": True}, without | {"rope": False}, without | {"rope": True}, {}]
    patching.unpatch_all()
    assert vars(module) == before


def test_arguments_say_so(tmp_path: Any) -> None:
    patching.wrap(Arguments, "__post_init__", _liger_without_loss)
    options: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True}
    assert TrainingArguments(**options).liger_kernel_config is None
    assert TrainingArguments(**options, use_liger_kernel=True).liger_kernel_config == liger.OURS
    given = '{"rope": false, "fused_linear_cross_entropy": true}'
    found = TrainingArguments(**options, use_liger_kernel=True, liger_kernel_config=given).liger_kernel_config
    assert found == {"rope": False, **liger.OURS}


def test_its_chunked_losses_are_refused_with_a_share_of_the_head() -> None:
    class LigerFusedLinearDPOLoss(torch.nn.Module):
        def forward(self, weight: torch.Tensor, x: torch.Tensor) -> float:
            return float((x @ weight.t()).sum())

    liger.install_losses(SimpleNamespace(LigerFusedLinearDPOLoss=LigerFusedLinearDPOLoss))
    loss, x = LigerFusedLinearDPOLoss(), torch.ones(1, 3)
    assert loss(torch.ones(4, 3), x) == 12
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    bind(weight, ParamEntry("lm_head.weight", ParamLayout((4, 3), 0, (((0, 2),), ((2, 4),)))))
    with pytest.raises(TPError, match=r"LigerFusedLinearDPOLoss multiplies by lm_head.weight itself"):
        loss(weight, x)


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad.detach().clone() for name, p in model.named_parameters()}


def kernels_case(real: bool, first: bool) -> dict[str, float]:
    """A step of a sharded model with the kernels, and of the whole model without.

    Args:
        first: apply Liger before the model is sharded, as scripts do, or after it, as Trainer does.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import tp_plugin
    from tp_plugin.runtime.start import stop

    stop()
    whole = build(config_for("llama", tie_word_embeddings=False, attention_bias=False, mlp_bias=False))
    expected, grads = step(whole)
    whole.zero_grad()
    rope = None
    if real:
        from liger_kernel.transformers import monkey_patch as module
        from transformers.models.llama import modeling_llama

        rope = modeling_llama.apply_rotary_pos_emb
        options = {"rms_norm": False}  # does not run interpreted
    else:
        module, options = fake([]), {}
    with patching.taken_back():
        liger.install(module)
        try:
            if first:
                module.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"](model=whole, **options)
            model: Any = tp_plugin.parallelize(whole, tp_size=2)
            if not first:
                module.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"](model=model, **options)
            loss, found = step(model)
        finally:
            if rope is not None:
                modeling_llama.apply_rotary_pos_emb = rope
    off = 0.0
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        layout = p.tp_entry.layout
        mine = layout.shard(grads[name], torch.distributed.get_rank())
        off = max(off, ((found[name] - mine).norm() / grads[name].norm()).item())
    return {"loss": abs(loss - expected) / expected, "grads": off}


REAL = pytest.param(True, marks=pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")), reason="needs `pip install liger-kernel triton`"
))  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("real", [False, REAL])
def test_layers_with_its_kernels_are_sharded(real: bool, first: bool) -> None:
    for found in run(2, kernels_case, real, first):
        assert found["loss"] <= 1e-5 and found["grads"] <= 1e-4
