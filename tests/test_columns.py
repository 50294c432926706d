"""Overlap of a block's input gradient with its weights', and linears that run as one: that they do, and step aside."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from torch.utils._python_dispatch import TorchDispatchMode
from workers import run
from zoo import fresh

LAYERS = 2
GQA = {"num_attention_heads": 8, "num_key_value_heads": 4}
KV_REPLICATED = {"num_attention_heads": 4, "num_key_value_heads": 1}
OFF = {"overlap": False}
ON = {"overlap": True, "fuse": True}


class Events(TorchDispatchMode):
    """Matrix products, and collectives that are under way while the program goes on, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).split(".")[1] in ("mm", "addmm"):
            self.seen.append("product")
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        from tp_plugin.mesh.groups import Pending

        self.kept = Pending.__init__, Pending.wait

        def begin(pending: Any, *args: Any) -> None:
            self.seen.append("begin")
            self.kept[0](pending, *args)

        def wait(pending: Any) -> Any:
            self.seen.append("wait")
            return self.kept[1](pending)

        Pending.__init__, Pending.wait = begin, wait  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        from tp_plugin.mesh.groups import Pending

        Pending.__init__, Pending.wait = self.kept  # type: ignore[method-assign]
        super().__exit__(*args)

    def beside(self) -> int:
        """Products that were computed while something was under way."""
        found, under_way = 0, False
        for event in self.seen:
            under_way = event == "begin" or (under_way and event != "wait")
            found += under_way and event == "product"
        return found


def change_model(model: Any, change: str) -> Any:
    first = model.model.layers[0] if hasattr(model, "model") and hasattr(model.model, "layers") else None
    if change == "pre-hook":
        first.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    elif change == "output hook":
        first.self_attn.k_proj.register_forward_hook(lambda module, args, output: output.mul_(0.5))
    elif change == "in place":
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.ReLU(inplace=True)
    elif change == "backward hook":
        first.self_attn.v_proj.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
    elif change == "other storage":
        weight = first.self_attn.q_proj.weight
        weight.data = weight.data.clone()
    elif change == "moved":
        model.to(torch.float64).to(torch.float32)
    elif change == "frozen":
        first.mlp.up_proj.weight.requires_grad_(False)
    elif change == "copy":
        return copy.deepcopy(model)
    elif change in ("checkpoints", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": change == "reentrant"})
    elif change == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return model


def step(model: Any, change: str, vocabulary: int) -> dict[str, Any]:
    """Two micro-batches of a training step: what it computed, and how."""
    from counted import ledger

    record = getattr(model, "tp_record", None) or getattr(getattr(model, "base_model", None), "tp_record", None)
    for book in ledger.values():
        book.clear()
    forward, backward, loss = Events(), Events(), 0.0
    autocast = torch.autocast("cpu", torch.bfloat16) if change == "autocast" else contextlib.nullcontext()
    for micro in range(2):
        with forward, autocast:
            found = model(**batch(vocabulary, micro)).loss
        with backward:
            found.backward()
        loss += found.item()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if record is not None and change != "lora":
        gather = record.mesh.unit_cpu.gather_objects
        grads = {name: record.plan.layouts[name].gather(gather(grad)) for name, grad in grads.items()}
    return {
        "loss": loss,
        "grads": grads,
        "forward": forward.seen.count("product"),
        "backward": backward.seen.count("product"),
        "beside": backward.beside(),
        "collectives": dict(ledger["count"]),
        "bytes": dict(ledger["bytes"]),
    }


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    size = torch.stack([grad.norm() for grad in other.values()]).norm()
    return max(((one[n] - g).norm() / g.norm().clamp_min(1e-3 * size)).item() for n, g in other.items())


def case(model_type: str, overrides: dict[str, Any], change: str, options: dict[str, bool]) -> dict[str, Any]:
    """Run on every rank: the step of one process, with everything off, and with ``options``."""
    import tp_plugin

    shared = {"sequence_parallel": change == "sequence"}
    fresh(**shared)
    config = config_for(model_type, **overrides)
    whole = build(config).train()
    found = []
    for settings in (None, OFF, options):
        model = copy.deepcopy(whole)
        if settings is not None:
            fresh(**settings, **shared)
            if change == "lora":  # as PEFT's documentation has it: adapters first
                model = change_model(model, change)
            tp_plugin.parallelize(model, tp_size=2)
        model = model if change == "lora" and settings is not None else change_model(model, change)
        found.append(step(model, change, config.vocab_size))
    one, off, on = found
    both = [] if change == "lora" else [apart(off["grads"], one["grads"]), apart(on["grads"], one["grads"])]
    return {
        "losses": [each["loss"] for each in found],
        "apart": both,
        "apart from off": apart(on["grads"], off["grads"]),
        "saved forward": (off["forward"] - on["forward"]) // 2,
        "saved backward": (off["backward"] - on["backward"]) // 2,
        "beside": (off["beside"] // 2, on["beside"] // 2),
        "collectives": (off["collectives"], on["collectives"]),
        "bytes": (off["bytes"], on["bytes"]),
    }


def assert_exact(result: dict[str, Any], autocast: bool = False) -> None:
    one, off, on = result["losses"]
    if autocast:  # as far from one process as a run with nothing switched on
        assert on == pytest.approx(off, rel=1e-3)
        assert result["apart"][1] < 1.5 * result["apart"][0] < 0.1, result["apart"]
    else:
        assert off == pytest.approx(one, rel=1e-5) and on == pytest.approx(off, rel=1e-5)
        assert all(each < 1e-4 for each in (*result["apart"], result["apart from off"])), result["apart"]
    for key in ("collectives", "bytes"):
        off, on = result[key]
        assert off == on, "other collectives"


CHANGES = {
    # change: products saved of a layer's qkv (2) and gate-up (1) in both layers
    "": 6,
    "output hook": 6,
    "in place": 6,
    "checkpoints": 6,
    "sequence": 6,
    "autocast": 6,
    "pre-hook": 4,
    "backward hook": 4,
    "other storage": 4,
    "frozen": 5,
    "moved": 0,
    "copy": 0,
    "lora": 4,  # all but in the first layer's attention, whose input needs no gradient
}


@pytest.mark.parametrize("change", CHANGES)
def test_llama(change: str) -> None:
    for result in run(2, case, "llama", GQA, change, ON):
        assert_exact(result, change == "autocast")
        saved = CHANGES[change]
        assert result["saved forward"] == saved
        # one for the input's gradient and one for the weights', for each that the forward saved; and the forward again
        assert result["saved backward"] == {"checkpoints": 3, "lora": 1}.get(change, 2) * saved
        off, on = result["beside"]
        assert off == 0
        if change == "":
            assert on == 2 * LAYERS, "the weights' gradients, one product a block"
        assert (on > 0) == (change != "lora")


@pytest.mark.parametrize(
    "model_type, overrides, change",
    [
        ("llama", KV_REPLICATED, ""),
        ("llama", KV_REPLICATED, "reentrant"),
        ("gpt2", {}, ""),
        ("gpt2", {}, "autocast"),
        ("gptj", {}, ""),
        ("gptj", {}, "sequence"),
        ("gpt_neox", {}, "checkpoints"),
        ("mixtral", {}, ""),
        ("qwen2_moe", {}, ""),
        ("opt", {}, ""),
        ("bart", {}, ""),
    ],
)
def test_others(model_type: str, overrides: dict[str, Any], change: str) -> None:
    for result in run(2, case, model_type, overrides, change, ON):
        assert_exact(result, change == "autocast")
        assert result["beside"][0] == 0 and result["beside"][1] > 0


@pytest.mark.parametrize("change", ["", "in place"])
@pytest.mark.parametrize("options", [{"fuse": True, "overlap": False}, {}])
def test_one_of_both(options: dict[str, bool], change: str) -> None:
    for result in run(2, case, "llama", GQA, change, options):
        assert_exact(result)
        assert (result["saved forward"] > 0) == ("fuse" in options)
        assert (result["beside"][1] > 0) == ("overlap" not in options)


def several_backwards_case() -> tuple[float, float, float]:
    import tp_plugin

    fresh(**ON)
    model = build(config_for("llama", **GQA)).train()
    tp_plugin.parallelize(model, tp_size=2)
    inputs: list[torch.Tensor] = []
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    loss = model(**batch(97, 0)).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.autograd.grad(loss, inputs, retain_graph=True)  # comes to the linears, not to the block's beginning
    loss.backward(retain_graph=True)
    again = {name: p.grad.clone() for name, p in model.named_parameters()}
    weight = attention.k_proj.weight
    (alone,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    loss.backward()
    twice = {name: p.grad / 2 for name, p in model.named_parameters()}
    return (
        apart(again, once),
        apart(twice, once),
        (alone - once["model.layers.1.self_attn.k_proj.weight"]).abs().max().item(),
    )


def test_several_backwards_of_one_forward() -> None:
    for deviations in run(2, several_backwards_case):
        assert max(deviations) < 1e-6


def zero_case(stage: int) -> list[tuple[float, int, int]]:
    """Loss of a second step, products of its forward, and those beside a collective in its backward; on and off."""
    import deepspeed
    from test_zero import ds_config, plain_again

    import tp_plugin

    found = []
    for options in (OFF, ON):
        plain_again()
        fresh(**options)
        model = build(config_for("llama", attention_bias=False, mlp_bias=False, **GQA)).train()
        tp_plugin.parallelize(model, tp_size=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage, zero={}))
        for number in range(4):
            forward, backward = Events(), Events()
            with forward:
                loss = engine(**batch(97, number)).loss
            with backward:
                engine.backward(loss)
            engine.step()
        found.append((loss.item(), forward.seen.count("product"), backward.beside()))
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_zero(stage: int) -> None:
    """ZeRO 1 lays the weights into one flat tensor in the same order; ZeRO 3 parts them, and both step aside."""
    for off, on in run(2, zero_case, stage):
        assert on[0] == pytest.approx(off[0], rel=1e-5)
        assert off[1] - on[1] == (3 * LAYERS if stage == 1 else 0)
        assert (on[2] > 0) == (stage == 1)


def fsdp2_case(recompute: bool) -> list[tuple[float, int]]:
    """Loss of a second step, and products beside a collective of the TP group in its backward; off and on."""
    from test_fsdp2 import make, new_optimizer

    found = []
    for options in (OFF, ON):
        model, config = make(2, "llama", GQA | {"use_cache": False}, activation_checkpointing=recompute, **options)
        optimizer = new_optimizer(model)
        for number in range(2):
            loss = model(**batch(config.vocab_size, number)).loss
            backward = Events()
            with backward:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((loss.item(), backward.beside()))
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_fsdp2(recompute: bool) -> None:
    """FSDP2's unsharded parameters are plain ones while a layer runs, but lie apart: they overlap, and do not fuse."""
    for off, on in run(4, fsdp2_case, recompute):
        assert on[0] == pytest.approx(off[0], rel=1e-5)
        assert (off[1], on[1]) == (0, 5 * LAYERS), "q, k, v, gate and up of each layer"


def second_order_case(model_type: str, sequence: bool, gathered: bool) -> str | None:
    """A gradient penalty: what is raised by the backward of a gradient's norm, which plain autograd computes."""
    import tp_plugin

    fresh(sequence_parallel=sequence)
    config = config_for(model_type)
    config._attn_implementation = "eager"
    model = build(config).train()
    tp_plugin.parallelize(model, tp_size=2)
    inputs = batch(config.vocab_size, 0)
    if gathered:
        del inputs["labels"]
    found = model(**inputs)
    loss = torch.as_tensor(found.logits).float().square().mean() if gathered else found.loss
    (grad,) = torch.autograd.grad(loss, [model.get_input_embeddings().weight], create_graph=True)
    try:
        grad.norm().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("model_type, sequence", [("llama", False), ("llama", True), ("bert", False)])
def test_second_derivatives_are_refused(model_type: str, sequence: bool, gathered: bool) -> None:
    """They would be those of a rank's shard."""
    for raised in run(2, second_order_case, model_type, sequence, gathered):
        assert raised is not None and "second derivatives (create_graph=True" in raised, raised
