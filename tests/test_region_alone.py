"""What the main process does alone, what is refused, and what a script that goes on after an error finds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from torch import nn
from workers import run, sees_whole


def _models(**overrides: Any) -> tuple[Any, Any]:
    import tp_plugin
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()
    whole = build(config_for("llama", **overrides)).train()
    return whole, tp_plugin.parallelize(copy.deepcopy(whole), tp_size=2)


@sees_whole
def main_process_reads() -> dict[str, Any]:
    from tp_plugin.errors import TPError

    whole, model = _models(num_key_value_heads=1)
    main = torch.distributed.get_rank() == 0
    model(**batch(97, 0)).loss.backward()
    found: dict[str, Any] = {}
    if main:
        for name, p in model.named_parameters():
            want = whole.get_parameter(name)
            assert p.norm().item() == pytest.approx(want.norm().item(), rel=1e-6), name
            assert torch.equal(torch.from_numpy(p.detach().cpu().numpy()), want.data), name
            assert torch.equal(p.detach().float().clone()[:2], want.data[:2]), name
        found["printed"] = str(model.lm_head.weight)[:40]
        with pytest.raises(TPError) as raised:
            model.lm_head.weight.grad.norm()
        found["gradient"] = str(raised.value)
        with pytest.raises(TPError) as raised, torch.no_grad():
            model.lm_head.weight[3] = 0
        found["write"] = str(raised.value)
        with pytest.raises(TPError) as raised:
            (model.lm_head.weight.detach() * model.get_input_embeddings().weight.detach()).sum()
        found["two"] = str(raised.value)
    found["loss"] = model(**batch(97, 1)).loss.item(), whole(**batch(97, 1)).loss.item()
    return found


def test_the_main_process_reads_alone() -> None:
    main, peer = run(2, main_process_reads)
    for found in (main, peer):
        assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-6)
    assert main["printed"].startswith("Parameter containing:")
    for what in ("gradient", "write", "two"):
        assert "test_region_alone.py:" in main[what] and "on the main one" in main[what], main[what]
    assert "this rank holds 49 of 97 rows of 'lm_head.weight.grad'" in main["gradient"]


@sees_whole
def different_reads() -> str:
    from tp_plugin.errors import DivergenceError

    _, model = _models()
    weights = [model.lm_head.weight, model.get_input_embeddings().weight]
    me = torch.distributed.get_rank()
    if me == 0:
        model.lm_head.weight.sum()  # alone: read by itself
    with pytest.raises(DivergenceError) as raised:
        model(**batch(97, 0)) if me == 0 else weights[1].sum()
    return str(raised.value)


def test_ranks_at_different_places() -> None:
    for message in run(2, different_reads):
        assert "a read of a whole parameter or gradient" in message and "a forward" in message


@sees_whole
def refusals() -> dict[str, str]:
    from tp_plugin.errors import TPError

    _, model = _models()
    weight = model.lm_head.weight
    model(**batch(97, 0)).loss.backward()
    found = {}

    def refused(what: str, kind: type[Exception], function: Any) -> None:
        with pytest.raises(kind) as raised:
            function()
        found[what] = str(raised.value)

    refused("data", TPError, lambda: setattr(weight, "data", torch.zeros(49, 48)))
    refused("grad", TPError, lambda: setattr(weight, "grad", torch.zeros(49, 48)))
    refused("leaf", RuntimeError, lambda: weight.__setitem__(3, 0.0))
    refused("row of a leaf", RuntimeError, lambda: weight[3].zero_())
    refused("in a graph", TPError, lambda: (weight * 2).__setitem__(3, 0.0))
    refused("out", TPError, lambda: torch.sort(weight.detach(), out=(weight.data, torch.empty(0, dtype=torch.long))))
    refused("numpy", ValueError, lambda: weight.detach().numpy().__setitem__(3, 0.0))
    refused("other shape", RuntimeError, lambda: weight.data.copy_(torch.zeros(49, 48)))
    refused("matmul", RuntimeError, lambda: torch.ones(2, 24) @ weight.T)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    call = torch.func.functional_call
    state["lm_head.weight"] = state["lm_head.weight"][:49]
    refused("functional_call", TPError, lambda: call(model, state, (), batch(97, 0)))
    state = {"lm_head.weight": torch.zeros(97, 48, requires_grad=True)}
    refused("functional_call with gradients", TPError, lambda: call(model, state, (), batch(97, 0)))
    return found


def test_refusals() -> None:
    for found in run(2, refusals):
        assert "lm_head.weight.data was given a tensor of shape (49, 48), but has (97, 48)" in found["data"]
        assert "test_region_alone.py:" in found["data"] and " of 97 rows of " in found["data"]
        assert "lm_head.weight.grad was given" in found["grad"]
        assert "leaf" in found["leaf"] and "leaf" in found["row of a leaf"]
        assert "torch.no_grad()" in found["in a graph"] and "out=" in found["out"]
        assert "97" in found["other shape"] and "97" in found["matmul"]
        assert "(49, 48) for 'lm_head.weight', which has (97, 48)" in found["functional_call"]
        assert "requires a gradient" in found["functional_call with gradients"]


@sees_whole
def functional_calls() -> dict[str, Any]:
    """Whole weights, and those of a step by hand, as meta-learning takes it."""
    whole, model = _models()
    found: dict[str, Any] = {"losses": []}
    for one in (whole, model):
        halves = {name: value.clone() * 0.5 for name, value in one.state_dict().items()}
        first = torch.func.functional_call(one, halves, (), batch(97, 0)).loss.item()
        names = [name for name, _ in one.named_parameters()]
        grads = torch.autograd.grad(one(**batch(97, 0)).loss, list(one.parameters()))
        fast = {name: (p - 0.1 * g).detach() for name, p, g in zip(names, one.parameters(), grads, strict=True)}
        found["losses"].append([first, torch.func.functional_call(one, fast, (), batch(97, 1)).loss.item()])
    return found


def test_functional_call() -> None:
    for found in run(2, functional_calls):
        plain, here = found["losses"]
        assert here == pytest.approx(plain, rel=1e-6)


@sees_whole
def after_errors() -> dict[str, Any]:
    """A forward, a backward and an optimizer's step that raise leave parameters whole."""
    from tp_plugin.errors import DivergenceError

    _, model = _models()
    weight = model.lm_head.weight
    found = {}

    class Failing(torch.optim.SGD):
        tp_elementwise = True

        def step(self, closure: Any = None) -> Any:
            raise ZeroDivisionError

    def fails(*args: Any) -> Any:
        raise ZeroDivisionError

    handle = model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(ZeroDivisionError):
        model(**batch(97, 0))
    handle.remove()
    found["forward"] = tuple(weight.shape)
    loss = model(**batch(97, 0)).loss
    handle = model.model.norm.weight.register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    found["backward"] = tuple(weight.shape)
    with pytest.raises(DivergenceError):
        model(**batch(97, torch.distributed.get_rank()))  # another batch on each rank: refused before the forward
    found["guard"] = tuple(weight.shape)
    optimizer = Failing(model.parameters(), lr=0.1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    model(**batch(97, 0)).loss.backward()
    found["step"] = tuple(weight.shape)
    found["type in a step"] = ""
    mlp = model.model.layers[0].mlp
    run_mlp = mlp.forward

    def look(x: torch.Tensor) -> torch.Tensor:
        found["type in a step"] = type(mlp.gate_proj.weight).__name__
        return run_mlp(x)

    mlp.forward = look
    model(**batch(97, 0))
    found["same object"] = weight is model.lm_head.weight and isinstance(weight, nn.Parameter)
    return found


def test_after_errors_parameters_look_whole_again() -> None:
    for found in run(2, after_errors):
        assert found["forward"] == found["backward"] == found["guard"] == found["step"] == (97, 48)
        assert found["type in a step"] == "Parameter" and found["same object"]


@sees_whole
def saved_by_libraries(folder: str) -> dict[str, Any]:
    """Libraries that read memory, pickle and copy get whole tensors."""
    import io

    from safetensors.torch import load_file, save_file

    whole, model = _models()
    found: dict[str, Any] = {}
    path = f"{folder}/{torch.distributed.get_rank()}.safetensors"
    save_file({name: p.detach() for name, p in model.named_parameters()}, path)
    loaded = load_file(path)
    found["safetensors"] = all(torch.equal(loaded[name], p) for name, p in whole.named_parameters())
    buffer = io.BytesIO()
    torch.save({name: p for name, p in model.named_parameters()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    found["pickle"] = all(torch.equal(loaded[name], p) for name, p in whole.named_parameters())
    copied = [copy.deepcopy(p) for p in model.parameters()]
    found["copies"] = [tuple(p.shape) for p in copied] == [tuple(p.shape) for p in whole.parameters()]
    found["kinds"] = {type(value) for value in loaded.values()} <= {nn.Parameter}
    return found


def test_libraries_get_whole_tensors(tmp_path: Any) -> None:
    for found in run(2, saved_by_libraries, str(tmp_path)):
        assert found == {"safetensors": True, "pickle": True, "copies": True, "kinds": True}


class ByRows(torch.optim.SGD):
    """Each weight's step is as long as the weight: LARS."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=-float(p.norm() / (p.grad.norm() + 1e-8)) * group["lr"])


@sees_whole
def unprepared_optimizers() -> dict[str, str]:
    from transformers import Adafactor

    from tp_plugin.errors import TPError

    _, model = _models()
    found = {}
    for kind in (ByRows, Adafactor, torch.optim.AdamW):
        optimizer = kind(model.parameters(), **({} if kind is Adafactor else {"lr": 1e-3}))
        model(**batch(97, 0)).loss.backward()
        try:
            optimizer.step()
            found[kind.__name__] = ""
        except TPError as error:
            found[kind.__name__] = str(error)
    return found


def test_an_optimizer_that_nobody_prepared() -> None:
    for found in run(2, unprepared_optimizers):
        assert "ByRows gave other numbers for a matrix in two parts" in found["ByRows"]
        assert "accelerator.prepare" in found["Adafactor"]
        assert found["AdamW"] == ""


@sees_whole
def learned_factors() -> dict[str, Any]:
    """Weights times something learned that is beside the model: it gets the gradient of all elements."""
    whole, model = _models(num_key_value_heads=1)
    found: dict[str, Any] = {"grads": [], "weights": []}
    for one in (whole, model):
        one.zero_grad()
        factor = nn.Parameter(torch.ones(1))
        rows = nn.Parameter(torch.linspace(0.5, 1.5, 48))
        key = one.model.layers[0].self_attn.k_proj.weight
        head = one.lm_head.weight
        (
            one(**batch(97, 0)).loss + (head * factor).pow(2).sum() + (key * rows).abs().sum() + (factor * key).sum()
        ).backward()
        found["grads"].append([factor.grad.item(), *rows.grad.tolist()])
        found["weights"].append([key.grad.norm().item(), head.grad.norm().item(), key.grad.sum().item()])
    return found


def test_what_is_learned_beside_the_model_gets_whole_gradients() -> None:
    for found in run(2, learned_factors):
        for what in ("grads", "weights"):
            assert found[what][1] == pytest.approx(found[what][0], rel=1e-5)


@sees_whole
def lists_of_views() -> dict[str, str]:
    from tp_plugin.errors import TPError

    _, model = _models()
    weight = model.lm_head.weight.detach()
    rows, found = [weight[3], weight[90]], {}
    for name, call in {
        "in place": lambda: torch._foreach_mul_(rows, 2.0),
        "not elementwise": lambda: torch._foreach_max([weight]),
    }.items():
        with pytest.raises(TPError) as raised:
            call()
        found[name] = str(raised.value)
    doubled = torch._foreach_mul(rows, 2.0)
    weight.mul_(3)
    assert torch.allclose(torch._foreach_mul(rows, 2.0)[1], 3 * doubled[1])
    return found


def test_lists_of_rows() -> None:
    for found in run(2, lists_of_views):
        for message in found.values():
            assert "test_region_alone.py:" in message and "of 97 rows of 'lm_head.weight'" in message


@sees_whole
def writes_are_announced() -> list[str]:
    """Another thread reads weights for peers on a stream of its own: each write of the script's must hold it back."""
    from tp_plugin.runtime.runtime import require

    _, model = _models()
    weight, seen = model.lm_head.weight, []
    require().progress.weights_changed = lambda device: seen.append(device.type)
    with torch.no_grad():
        for write in (
            lambda: weight.mul_(2),
            lambda: weight.data.__setitem__(3, 0.0),
            lambda: weight.data[5].zero_(),
            lambda: setattr(weight, "data", torch.zeros(97, 48)),
            lambda: nn.init.normal_(weight),
            lambda: torch._foreach_mul_([weight], 2.0),
        ):
            before = len(seen)
            write()
            seen += ["none"] if len(seen) == before else []
    return seen


def test_writes_hold_readers_back() -> None:
    for seen in run(2, writes_are_announced):
        assert set(seen) == {"cpu"} and len(seen) >= 6
