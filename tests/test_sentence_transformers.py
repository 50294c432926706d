"""What sentence-transformers asks torch.distributed, which is the world's there, of a TP group."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import build, config_for
from workers import run
from zoo import fresh


def collectives_case() -> dict[str, Any]:
    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines import patching, sentence_transformers
    from tp_plugin.runtime.start import start, stop

    stop()
    process = start(RunConfig(2)).mesh.data.rank
    module: Any = SimpleNamespace(dist=torch.distributed, torch=torch)
    sentence_transformers.install(module)
    try:
        x = torch.full((2,), float(process), requires_grad=True)
        gathered = module.torch.distributed.nn.all_gather(x)
        (gathered[0].sum() + 10 * gathered[-1].sum()).backward()
        plain = [torch.zeros(2) for _ in range(module.dist.get_world_size())]
        module.dist.all_gather(plain, x.detach())
        shard: list[Any] = [None]
        module.dist.scatter_object_list(shard, ["a", "b"] if process == 0 else None, src=0)
        found = [None, None] if process == 0 else None
        module.dist.gather_object(shard[0], found, dst=0)
        return {
            "rank": module.dist.get_rank(), "gathered": torch.cat(gathered).tolist(), "grad": x.grad.tolist(),
            "plain": torch.cat(plain).tolist(), "shard": shard[0], "found": found,
            "torch": module.torch.ones(1).item(),
        }  # fmt: skip
    finally:
        for _ in range(2):
            owner, name, original = patching._originals.pop()
            patching.put_back(owner, name, original)


def test_replicas_are_the_processes() -> None:
    for rank, seen in enumerate(run(4, collectives_case)):
        process = rank // 2
        assert seen["rank"] == process and seen["torch"] == 1
        assert seen["gathered"] == seen["plain"] == [0.0, 0.0, 1.0, 1.0]
        assert seen["grad"] == [2.0 if process == 0 else 20.0] * 2  # the sum over both replicas' losses
        assert seen["shard"] == "ab"[process]
        assert seen["found"] == (["a", "b"] if process == 0 else None)


def test_a_release_that_is_not_known_is_refused() -> None:
    from tp_plugin.engines.sentence_transformers import install
    from tp_plugin.errors import TPError

    with pytest.raises(TPError, match="has neither `dist` nor `torch`"):
        install(ModuleType("sentence_transformers.util.distributed"))


def forward_case(same: bool, gradients: bool) -> str:
    from transformers import AutoModel

    import tp_plugin
    from tp_plugin.runtime.runtime import require

    fresh()
    whole = build(config_for("bert"))
    model = AutoModel.from_config(whole.config)
    model = tp_plugin.parallelize(model, tp_size=2)
    ids = torch.arange(3, 12).unsqueeze(0) + (0 if same else require().mesh.tp.rank)
    with torch.set_grad_enabled(gradients):
        try:
            model.forward(input_ids=ids)  # as sentence-transformers does: none of the model's hooks runs
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "passed"


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_called_by_name_is_watched(gradients: bool) -> None:
    assert run(2, forward_case, True, gradients) == ["passed"] * 2
    for raised in run(2, forward_case, False, gradients):
        assert raised.startswith("DivergenceError") and "different batches" in raised
