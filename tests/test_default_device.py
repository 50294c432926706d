"""``torch.set_default_device``: host tensors of ours stay on the host, whatever a script has made its default."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import torch
from fresh import scripts
from models import batch, build, config_for
from test_parallel import GQA
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[1]
MAKERS = {maker.__name__ for maker in _device_constructors() if hasattr(torch, maker.__name__)}


def test_every_tensor_is_told_where_to_lie() -> None:
    """``torch.zeros(…)`` and the like, of a device that is said."""
    silent = []
    for path in [*ROOT.glob("tp_plugin/**/*.py"), *ROOT.glob("model_policies/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            makes = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS
            if makes and ast.unparse(node.func.value) == "torch" and "device" not in [k.arg for k in node.keywords]:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not silent, "\n".join(silent)


def script(model_folder: str, out: str, default: str) -> None:
    """All that a training script does after it has built its model, with ``default`` as torch's default device."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from transformers import AutoModelForCausalLM

    accelerator = Accelerator()
    set_seed(3)
    model = AutoModelForCausalLM.from_pretrained(model_folder, attention_dropout=0.2, attn_implementation="eager")
    batches = [batch(97, seed) for seed in range(4)]
    torch.set_default_device(default)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)  # another one's step count is a meta tensor
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    found: list[Any] = []
    for data in batches:
        outputs = model(**data)
        accelerator.backward(outputs.loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found += [outputs.loss.item(), norm.item(), outputs.logits.softmax(-1).max().item()]
    model.eval()
    with torch.no_grad():
        if accelerator.is_main_process:  # its peers are taken along, and read from
            alone = model(**batches[0])
            found += [alone.loss.item(), alone.logits[0, 0, :3].tolist()]
        accelerator.wait_for_everyone()
        found.append(accelerator.gather(model(**batches[1]).loss.reshape(1)).tolist())
        prompt = batches[2]["input_ids"][:1, :5]
        mask = torch.ones_like(prompt)
        found.append(model.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False).tolist())
        if accelerator.is_main_process:
            found.append(model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=True).tolist())
    with torch.no_grad():
        found.append([model.lm_head.weight.norm().item(), model.lm_head.weight[90, :2].tolist()])
        model.lm_head.weight[3] += 1.0
    state = accelerator.get_state_dict(model)
    found.append({name: [str(tensor.device), tensor.double().sum().item()] for name, tensor in state.items()})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.save_pretrained(out)
        Path(out, "found.json").write_text(json.dumps(found))
    accelerator.end_training()


def test_a_run_with_a_default_device_is_the_run_without(tmp_path: Path) -> None:
    """A default of ``meta``: whatever is made without a device has no values."""
    build(config_for("llama", **GQA), 0).save_pretrained(tmp_path / "model")
    written = []
    for default in ("cpu", "meta"):
        out = tmp_path / default
        out.mkdir()
        options = {"TP_PLUGIN_OPTIONS": '{"audit_every": 1}'}
        ended = scripts(2, script, str(tmp_path / "model"), str(out), default, folder=tmp_path, **options)
        assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.said for rank in ended)
        written.append([(out / name).read_bytes() for name in ("found.json", "model.safetensors")])
    assert written[0] == written[1]
