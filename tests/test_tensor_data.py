"""``other.data = …`` of what looks whole, where ``other`` is a tensor of no sharded model."""

from __future__ import annotations

from typing import Any

import torch
from models import batch
from test_region_alone import _models
from torch import nn
from workers import run, sees_whole


@sees_whole
def data_of_others() -> dict[str, Any]:
    from tp_plugin.errors import TPError

    whole, model = _models(num_key_value_heads=1)
    found: dict[str, Any] = {"wrong": [], "refused": [], "shared": []}
    for one in (whole, model):
        one(**batch(97, 0)).loss.backward()
    for (name, p), plain in zip(model.named_parameters(), whole.parameters(), strict=True):
        target, want = nn.Parameter(torch.full(p.shape, 0.5)), torch.full(p.shape, 0.5)
        target.data = 0.9 * target.data + 0.1 * p.data
        want = 0.9 * want + 0.1 * plain.data
        copied, gradient, row = torch.empty(0), torch.empty(0), torch.empty(0)
        copied.data, gradient.data, row.data = p.data.clone(), p.grad.detach() * 2, p.data[3:5]
        pairs = [(target, want), (copied, plain.data), (gradient, plain.grad * 2), (row, plain.data[3:5])]
        found["wrong"] += [name for here, there in pairs if not torch.allclose(here, there, rtol=1e-4, atol=1e-6)]
        found["wrong"] += [name for here in (target, copied) if "Global" in type(here).__name__]
        for value in (p, p.data, p.detach(), p.grad, p.grad.detach(), p.data.detach()):
            try:
                copied.data = value
                found["shared"].append(name)
            except TPError as error:
                found["refused"].append(f"{name}: {error}")
        p.data, whole_again = p.data, plain.data.clone()
        p.data = whole_again
    split = [name for name, p in model.named_parameters() if p.tp_entry.layout.is_sharded]
    found["split"], found["names"] = split, [name for name, _ in model.named_parameters()]
    found["same"] = all(torch.equal(p, plain) for p, plain in zip(model.parameters(), whole.parameters(), strict=True))

    tensor, calls = torch.ones(3), []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    asked = tensor.as_subclass(Asked)
    asked.data = asked.data
    own = torch._C.TensorBase.data
    found["own"] = torch.Tensor.data is own and own.__get__ in calls and own.__set__ in calls
    found["traced"] = torch.compile(lambda x: x.data * 2, backend="eager", fullgraph=True)(tensor).tolist() == [2] * 3
    return found


def test_data_of_tensors_of_no_sharded_model() -> None:
    for found in run(2, data_of_others):
        assert not found["wrong"] and found["same"] and found["own"] and found["traced"]
        assert len(found["refused"]) == 6 * len(found["split"])
        assert set(found["shared"]) == set(found["names"]) - set(found["split"])  # what a rank has all of is as ever
        assert "this rank holds 49 of 97 rows of 'model.embed_tokens.weight'" in found["refused"][0] or (
            "this rank holds 48 of 97" in found["refused"][0]
        )
        assert "tests/test_tensor_data.py" in found["refused"][0] and "tensor.copy_(p)" in found["refused"][0]
