"""What the norm of all gradients costs: few kernels, one collective, no walk through the model; and what it gives."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from models import batch, build, config_for
from torch.utils._python_dispatch import TorchDispatchMode
from workers import run


class Kernels(TorchDispatchMode):
    """Operators that were called, but views; and the elements of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls[func.name()] += 1
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
        return result


def _sharded(layers: int, **overrides: Any) -> Any:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    torch.manual_seed(0)
    model = build(config_for("llama", num_hidden_layers=layers, **overrides)).train()
    return tp_plugin.parallelize(model, tp_size=2)


def cost_case() -> list[Any]:
    found = []
    for layers in (1, 4):
        model = _sharded(layers)
        model(**batch(97, 0)).loss.backward()
        grads = [p.grad for p in model.parameters()]
        with Kernels() as kernels, mock.patch.object(torch.nn.Module, "named_parameters") as walk:
            torch.nn.utils.get_total_norm(grads)
        found.append((dict(kernels.calls), walk.call_count))
    return found


def test_kernels_do_not_grow_with_the_model() -> None:
    for small, large in run(2, cost_case):
        assert small == large
        calls, walks = large
        assert walks == 0 and calls["aten::_foreach_norm.Scalar"] == 1
        assert sum(calls.values()) <= 8, calls


def value_case(order: float, dtype: torch.dtype, kv: int) -> tuple[float, float]:
    """The whole model's norm, of gradients of two dtypes in a mixture; by hand, and ours."""
    model = _sharded(2, num_key_value_heads=kv)
    from tp_plugin.runtime.runtime import require
    from tp_plugin.tensor.param_entry import layout_of

    generator, whole = torch.Generator().manual_seed(1), []
    for at, p in enumerate(model.parameters()):
        layout: Any = layout_of(p)
        grad = torch.randn(layout.shape, generator=generator).to(dtype if at % 3 else torch.float32)
        whole.append(grad.double().flatten())
        p.data = p.data.to(grad.dtype)
        p.grad = layout.shard(grad, require().mesh.tp.rank).clone()
    grads = [p.grad for p in model.parameters()]
    expected = torch.linalg.vector_norm(torch.cat(whole), order).item()
    return expected, torch.nn.utils.get_total_norm([g.detach() for g in grads], order).item()


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, math.inf, -math.inf])
@pytest.mark.parametrize("dtype, kv", [(torch.float32, 2), (torch.bfloat16, 1)])
def test_values(order: float, dtype: torch.dtype, kv: int) -> None:
    for expected, found in run(2, value_case, order, dtype, kv):
        assert found == pytest.approx(expected, rel=1e-5)


def skipped_case() -> dict[str, Any]:
    """DeepSpeed's norms, where a rank must not count all it holds: what the ranges cost, and what they leave out."""
    from tp_plugin.engines.deepspeed import norms
    from tp_plugin.runtime.runtime import require
    from tp_plugin.tensor.grad_norm import owned_part
    from tp_plugin.tensor.param_entry import layout_of

    found: dict[str, Any] = {"apart": [], "copies": Counter()}
    for kind, overrides in (("llama", {"num_key_value_heads": 1}), ("gpt_bigcode", {})):  # rows; columns, fused
        import tp_plugin
        from tp_plugin.runtime.start import stop

        stop()
        model = tp_plugin.parallelize(build(config_for(kind, **overrides)), tp_size=2)
        group = list(model.parameters())
        with Kernels() as kernels:
            norms._norm_mask(None, None, group)
        found.setdefault("largest", []).append((kernels.largest, sum(p.numel() for p in group)))
        for parameter in group:
            layout: Any = layout_of(parameter)
            if not layout.is_sharded:
                continue
            flat = torch.randn(parameter.numel())
            whole = norms.counted(parameter, flat)
            owned = owned_part(flat.view(parameter.shape), layout, require().mesh.tp.rank)
            found["apart"].append(abs(whole.square().sum() - sum(part.square().sum() for part in owned)).item())
            cut = parameter.numel() // 3  # where ZeRO cuts
            parts = [norms.counted(parameter, flat[:cut]), norms.counted(parameter, flat[cut:], cut)]
            found["apart"].append((torch.cat([part.flatten() for part in parts]) - whole.flatten()).abs().max().item())
            with Kernels() as kernels:
                norms.counted(parameter, flat)
            found["copies"] += Counter({n: c for n, c in kernels.calls.items() if "copy" in n or "lift" in n})
    return found


def test_ranges_of_deepspeeds_norms() -> None:
    for found in run(2, skipped_case):
        assert len(found["apart"]) > 20 and max(found["apart"]) <= 1e-3
        assert not found["copies"], "ranges lie where the gradients do"
        for largest, elements in found["largest"]:
            assert largest <= elements / 10


@pytest.mark.parametrize("dim", [0, 1])
def test_ranges_of_a_shard(dim: int) -> None:
    """Of rows and of columns, against a mask of the elements that :func:`owned_part` leaves out."""
    from tp_plugin.policy import ParamLayout
    from tp_plugin.tensor.grad_norm import not_owned, owned_part

    layout = ParamLayout((6, 6), dim, (((0, 2), (4, 5)), ((2, 4), (4, 6))))
    for here in range(2):
        others = torch.ones(layout.local_shape(here), dtype=torch.bool)
        for part in owned_part(others, layout, here):
            part.fill_(False)
        flat = torch.zeros(others.numel(), dtype=torch.bool)
        ranges = not_owned(layout, here)
        for start, stop in ranges:
            assert not flat[start:stop].any()
            flat[start:stop] = True
        assert torch.equal(flat.view(others.shape), others) and bool(ranges) == (here == 1)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
