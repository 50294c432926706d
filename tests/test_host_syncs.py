"""The host never waits for the device on the plugin's account: a budget of none per training micro-batch and step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from fresh import Ended, scripts
from models import batch, build, config_for


def prepared(dispatch: bool = False) -> tuple[Any, Any, Any, Any]:
    """An accelerator, model and optimizer on a fake device, and a loader of 48 rows."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch or None))
    set_seed(1)
    model = build(config_for("llama", attention_dropout=0.1), 0)
    rows = [{name: row[0] for name, row in batch(97, seed, size=1).items()} for seed in range(48)]
    loader = DataLoader(rows, batch_size=2, shuffle=True)
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)


def on(fake: FakeDevice, model: Any) -> None:
    """``model`` lies on the fake device, and so does what loaders bring there."""
    import accelerate.data_loader as data_loader
    from accelerate.utils import recursively_apply

    from tp_plugin.runtime.runtime import require

    with require().region.step():
        fake.claim(*(p.detach() for p in model.parameters()), *model.buffers())
    send = data_loader.send_to_device

    def send_and_claim(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = tensor.clone()
            fake.claim(moved)
            return moved

        return recursively_apply(move, send(tensors, *args, **kwargs))

    data_loader.send_to_device = send_and_claim


def trained(dispatch: bool, scaled: bool) -> None:
    accelerator, model, optimizer, loader = prepared(dispatch)
    fake = FakeDevice()
    on(fake, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    losses = []
    with fake.running():
        for count, data in enumerate(loader):
            assert fake.holds(data["input_ids"])
            loss = model(**data).loss
            losses.append(loss.detach())
            assert fake.holds(loss)
            accelerator.backward(loss if scaler is None else scaler.scale(loss))
            if count % 2 == 0:
                continue
            if scaler is not None:
                scaler.unscale_(optimizer.optimizer)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            if scaler is not None:
                scaler.step(optimizer.optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert len(losses) > 8, "a look at replicated weights is among the steps"
    assert all(torch.isfinite(loss) for loss in losses)
    print("SYNCS", json.dumps(fake.syncs), flush=True)


def syncs(ended: list[Ended]) -> list[str]:
    found = []
    for end in ended:
        assert end.code == 0, end.said[-3000:]
        (line,) = [line for line in end.said.splitlines() if line.startswith("SYNCS")]
        found += json.loads(line.removeprefix("SYNCS"))
    return found


@pytest.mark.parametrize(
    ("world", "dispatch", "scaled"), [(2, False, False), (4, False, False), (2, False, True), (4, True, False)]
)
def test_training_waits_for_no_device(world: int, dispatch: bool, scaled: bool, tmp_path: Path) -> None:
    assert set(syncs(scripts(world, trained, dispatch, scaled, folder=tmp_path))) == set()
