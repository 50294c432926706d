"""What a script does to the parameters of a model around ``prepare``: it is right, or refused by name on every rank."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, build, config_for
from torch import nn
from workers import run

QUERY = "model.layers.0.self_attn.q_proj"


def _lora(**changes: Any) -> Any:
    import peft

    return peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, **changes)


def _adapted(model: nn.Module) -> Any:
    import peft

    return peft.get_peft_model(model, _lora(), adapter_name="first")


def _weight_norm(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.get_submodule(QUERY))


def _prune(model: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.get_submodule(QUERY), "weight", 0.3)


def _new_head(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 48))


def _whole_data(model: Any) -> None:
    model.get_submodule(QUERY).weight.data = torch.zeros(48, 48)


def _new_layer(model: Any) -> None:
    model.model.extra = nn.Linear(4, 4)


AFTER: dict[str, tuple[Callable[[Any], Any], str]] = {
    "LoRA": (_adapted, f"parameter '{QUERY}.base_layer.weight' was added"),
    "pruning": (_prune, f"parameter '{QUERY}.weight_orig' was added"),
    "weight norm": (_weight_norm, f"parameter '{QUERY}.parametrizations.weight.original0' was added"),
    "spectral norm": (
        lambda model: nn.utils.parametrizations.spectral_norm(model.get_submodule(QUERY)),
        f"parameter '{QUERY}.parametrizations.weight.original' was added",
    ),
    "another vocabulary": (lambda model: model.resize_token_embeddings(120, mean_resizing=False), "' was replaced"),
    "another head": (_new_head, "parameter 'lm_head.weight' was replaced"),
    "whole data": (_whole_data, f"parameter '{QUERY}.weight' is whole, (48, 48)"),
    "another layer": (_new_layer, "parameter 'model.extra.weight' was added"),
}


def _started() -> None:
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.start import stop

    stop()
    torch_utils.install()


def after_case(name: str) -> list[str]:
    """The messages of the next forward, and of saving."""
    from tp_plugin.errors import TPError
    from tp_plugin.shard import parallelize

    _started()
    sharded = parallelize(build(config_for("llama")), tp_size=2)
    assert sharded.training or sharded.train()
    sharded(**batch(97, 0)).loss.backward()
    AFTER[name][0](sharded)
    messages = []
    for call in (lambda: sharded(**batch(97, 1)), sharded.state_dict):
        with pytest.raises(TPError) as raised:
            call()
        messages.append(str(raised.value))
    return messages


@pytest.mark.parametrize("name", AFTER)
def test_a_changed_model_is_refused(name: str) -> None:
    for messages in run(2, after_case, name):
        for message in messages:
            assert AFTER[name][1] in message and "before " in message


def before_case(change: Callable[[Any], Any]) -> str:
    from tp_plugin.errors import PolicyError
    from tp_plugin.shard import parallelize

    _started()
    model = build(config_for("llama"))
    change(model)
    with pytest.raises(PolicyError) as raised:
        parallelize(model, tp_size=2)
    return str(raised.value)


def test_weights_that_are_computed_from_others_are_refused() -> None:
    for message in run(2, before_case, _prune):
        assert f"{QUERY} has no parameter 'weight', but ['bias', 'weight_orig']" in message
        assert "torch.nn.utils.prune.remove" in message
    for message in run(2, before_case, _weight_norm):
        assert f"{QUERY} is a ParametrizedLinear" in message


def adapters_case(way: str) -> float:
    """Largest deviation of a gradient of adapters that were combined, or loaded by transformers, from the plain run's.

    Args:
        way: "combined" before the model is sharded, or "loaded" by ``PreTrainedModel.load_adapter``.
    """
    from tp_plugin.engines import loading
    from tp_plugin.engines.patching import taken_back
    from tp_plugin.shard import parallelize

    _started()
    import transformers.modeling_utils

    with taken_back():
        loading.install(transformers.modeling_utils)
        torch.manual_seed(1)
        if way == "combined":
            whole = _adapted(build(config_for("llama")))
            whole.add_adapter("second", _lora())
            whole.add_weighted_adapter(["first", "second"], [0.5, 2.0], "both", combination_type="linear")
            whole.set_adapter("both")
        else:
            with tempfile.TemporaryDirectory() as folder:
                _adapted(build(config_for("llama"))).save_pretrained(folder)
                whole = build(config_for("llama"))
                whole.load_adapter(f"{folder}/first", is_trainable=True)
        sharded = copy.deepcopy(whole)
        parallelize(sharded, tp_size=2)
    base: Any = getattr(sharded, "base_model", sharded)
    base = getattr(base, "model", base) if way == "combined" else sharded
    layouts, rank = base.tp_record.plan.layouts, base.tp_record.mesh.tp.rank
    for model in (whole, sharded):
        model(**batch(97, 0)).loss.backward()
    local, worst, seen = dict(sharded.named_parameters()), 0.0, 0
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            want = layouts[name.removeprefix("base_model.model.")].shard(parameter.grad, rank)
            worst = max(worst, ((local[name].grad - want).norm() / parameter.grad.norm()).item())
            seen += "lora_" in name
    assert seen
    return worst


@pytest.mark.parametrize("way", ["combined", "loaded"])
def test_adapters_before_prepare(way: str) -> None:
    assert all(worst <= 1e-4 for worst in run(2, adapters_case, way))


def beside_case() -> tuple[list[float], float]:
    """A classifier that each rank drew for itself and only the optimizer knows of: losses, and what rank 0 drew."""
    from tp_plugin.runtime.runtime import require
    from tp_plugin.shard import parallelize, shard_optimizer

    _started()
    model = build(config_for("llama"))
    torch.manual_seed(torch.distributed.get_rank())
    classifier = nn.Linear(97, 3)
    drawn = classifier.weight.sum().item()
    optimizer = torch.optim.AdamW([*model.parameters(), *classifier.parameters()], lr=1e-3)
    parallelize(model, tp_size=2)
    shard_optimizer(optimizer, require())
    assert classifier.weight.sum().item() == drawn or torch.distributed.get_rank() > 0
    losses = []
    for seed in range(3):
        logits = model(input_ids=batch(97, seed)["input_ids"]).logits
        loss = nn.functional.cross_entropy(classifier(logits[:, -1]), torch.arange(logits.shape[0]) % 3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *classifier.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, classifier.weight.sum().item()


def test_modules_that_only_the_optimizer_knows_start_equal() -> None:
    first, second = run(2, beside_case)
    assert first == second and len(set(first[0])) == 3


def copies_case() -> dict[str, str]:
    """What happens to scripts that write into the tensors of a ``state_dict()``."""
    from tp_plugin.errors import TPError
    from tp_plugin.shard import parallelize

    _started()
    model = parallelize(build(config_for("llama")), tp_size=2)
    average = copy.deepcopy(model)
    found = {}

    def follow() -> None:
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mean.lerp_(value, 0.1)

    follow()
    with pytest.raises(TPError) as raised:
        follow()
    found["average"] = str(raised.value)
    model.state_dict()["lm_head.weight"][3] = 0
    with pytest.raises(TPError) as raised:
        model.train()(**batch(97, 0)), model(**batch(97, 1))
    found["edited"] = str(raised.value)
    state = model.state_dict()  # these are loaded: nothing is lost
    state["lm_head.weight"].mul_(2)
    model.load_state_dict(state)
    for seed in range(4):
        model(**batch(97, seed)).loss.backward()
    assert torch.equal(model.state_dict()["lm_head.weight"], state["lm_head.weight"])
    return found


def test_writes_into_a_state_dict_are_not_lost_silently() -> None:
    for found in run(2, copies_case):
        assert "of a state_dict() was written to in place" in found["average"]
        assert "'lm_head.weight' of a state_dict() was written to in place" in found["edited"]
