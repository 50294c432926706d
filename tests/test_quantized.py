"""QLoRA: a base in bitsandbytes' codes, cut over the TP group, beside the same on one process."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, build, config_for, unpatched
from workers import run

pytest.importorskip("bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = {**NF4, "bnb_4bit_use_double_quant": True}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
# 3 heads of 64, one MLP's half in the middle of a block; heads of 32 of which two share a block
NARROW = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2}
GPT2 = {"n_embd": 192, "n_head": 3, "n_inner": 448}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nf4": ("llama", WIDE, NF4),
    "double": ("llama", WIDE, DOUBLE),
    "double, across blocks": ("llama", NARROW, DOUBLE),
    "fp4": ("gpt2", GPT2, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
    "fused": ("phi3", NARROW, DOUBLE),
    "int8": ("llama", {**NARROW, "num_key_value_heads": 1}, {"load_in_8bit": True}),
    "wide storage": ("llama", {**NARROW, "num_key_value_heads": 1}, {**DOUBLE, "bnb_4bit_quant_storage": "float32"}),
}


def quantized(folder: str, settings: dict[str, Any]) -> Any:
    """A model quantized as it is loaded, as in a script; the CPU's own layout of codes is left out."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))
    return without_repacking(model)


def without_repacking(model: torch.nn.Module) -> Any:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def adapted(model: torch.nn.Module, model_type: str) -> Any:
    import peft

    targets: Any = ["c_attn", "c_proj", "c_fc"] if model_type == "gpt2" else "all-linear"
    torch.manual_seed(0)
    whole = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    return whole


def decoded(module: Any) -> torch.Tensor:
    """The matrix that a linear computes with."""
    from bitsandbytes.functional import dequantize_4bit

    if type(module).__name__ == "Linear4bit":
        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data * (scales[:, None] / 127)


def expected_slice(whole: torch.Tensor, layout: Any, rank: int) -> torch.Tensor:
    """What a rank's codes decode to: its part, in the blocks around it."""
    stored, features = getattr(layout, "stored", layout), layout.features
    each = features.shape[1] // stored.shape[1] if features.dim == 1 else 1
    return torch.cat(
        [whole.narrow(features.dim, a * each, (b - a) * each) for a, b in stored.parts[rank]], features.dim
    )


def base_bytes(model: torch.nn.Module) -> int:
    from tp_plugin.shard.quantized import packed_in, statistics_of

    return sum(
        module.weight.nbytes + sum(tensor.nbytes for tensor in statistics_of(module).values())
        for _, module in packed_in(model)
    )


def cut_case(name: str, checkpoint: str) -> dict[str, Any]:
    """Two clipped steps of two micro-batches beside plain PEFT, and what the shards are."""
    import peft
    from safetensors.torch import load_file

    from tp_plugin.engines import peft as engine
    from tp_plugin.engines import torch_utils
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize
    from tp_plugin.shard.quantized import packed_in

    stop()
    torch_utils.install()
    model_type, _, settings = CASES[name]
    whole = adapted(quantized(checkpoint, settings), model_type)
    sharded = copy.deepcopy(whole)
    parallelize(sharded, 2)
    plan, mesh = sharded.base_model.model.tp_record.plan, require().mesh
    rank = mesh.tp.rank
    bits, nested = [], set()
    linears = dict(packed_in(sharded.base_model.model))
    for path, module in packed_in(whole.base_model.model):
        layout = plan.layouts[f"{path}.weight"]
        bits.append(torch.equal(decoded(linears[path]), expected_slice(decoded(module), layout, rank)))
        nested.add(getattr(getattr(linears[path].weight, "quant_state", None), "nested", None))
    found: dict[str, Any] = {
        "bits": bits, "nested": nested, "share": base_bytes(sharded) / base_bytes(whole), "losses": [], "norms": [],
    }  # fmt: skip
    gradients: list[dict[str, torch.Tensor]] = []
    for model in (whole, sharded):
        model.train()  # in evaluation, 8 bits quantize activations on a CPU as well
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
        for step in range(3):
            for micro in range(2):
                loss = model(**batch(97, 2 * step + micro)).loss
                loss.backward()
                found["losses"].append(loss.item())
            if step == 0:
                gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
            optimizer.zero_grad()
    assert set(gradients[0]) == set(gradients[1])
    found["grad"] = 0.0
    for parameter, grad in gradients[1].items():
        layout = plan.layouts[parameter.removeprefix("base_model.model.")]
        gathered = layout.gather(mesh.unit_cpu.gather_objects(grad))
        expected = gradients[0][parameter]
        found["grad"] = max(found["grad"], ((gathered - expected).norm() / expected.norm()).item())
    for model in (whole, sharded):
        model.eval()
    found["evaluated"] = []
    for model in (whole, sharded):
        loss = model(**batch(97, 9)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found["evaluated"].append((loss.item(), norm.item()))
    with tempfile.TemporaryDirectory() as folder:
        engine._save_pretrained(unpatched(peft.PeftModel.save_pretrained), sharded, folder)
        if rank == 0:
            whole.save_pretrained(f"{folder}/plain")
            files = [load_file(f"{at}/adapter_model.safetensors") for at in (f"{folder}/plain", folder)]
            assert list(files[0]) == list(files[1])
            found["adapter"] = max((files[0][n] - files[1][n]).abs().max().item() for n in files[0])
            again = peft.PeftModel.from_pretrained(quantized(checkpoint, settings), folder).eval()
            with torch.no_grad():
                found["reloaded"] = again(**batch(97, 9)).loss.item()
    return found


@pytest.mark.parametrize("name", CASES)
def test_beside_one_process(name: str, tmp_path: Path) -> None:
    model_type, overrides, _ = CASES[name]
    build(config_for(model_type, **overrides)).save_pretrained(tmp_path)
    for found in run(2, cut_case, name, str(tmp_path)):
        half = len(found["losses"]) // 2
        assert all(found["bits"])
        assert found["losses"][half:] == pytest.approx(found["losses"][:half], rel=1e-5)
        assert found["norms"][3:] == pytest.approx(found["norms"][:3], rel=1e-5)
        assert found["grad"] <= 1e-4
        rounded = 2e-3 if name == "int8" else 1e-5  # features on the edge of a code: test_token_scales has none
        assert found["evaluated"][1] == pytest.approx(found["evaluated"][0], rel=rounded)
        assert found["share"] <= (0.55 if CASES[name][1] is WIDE else 0.7)
        if "adapter" in found:
            assert found["adapter"] <= 3e-4
            assert found["reloaded"] == pytest.approx(found["evaluated"][1][0], rel=rounded)
    # of a single key and value head every rank has all rows
    assert (True in found["nested"]) == (name in ("double", "wide storage"))


class Recorded:
    """A group of two ranks that run one after the other: the second time, each gets the largest of both."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.shared = False

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        assert op == torch.distributed.ReduceOp.MAX and tensor.numel() == 6  # a number per token
        self.seen.append(tensor.clone())
        return torch.stack(self.seen).amax(0) if self.shared else tensor


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_token_scales(threshold: float) -> None:
    """8 bits on a row-parallel linear: with each token's scale shared, two shards give what the whole gives."""
    from bitsandbytes.nn import Linear8bitLt

    from tp_plugin.tensor import int8_rows

    torch.manual_seed(0)
    weight = torch.randn(40, 96)

    def linear(part: torch.Tensor) -> Any:
        made = Linear8bitLt(part.shape[1], 40, bias=False, has_fp16_weights=False, threshold=threshold)
        made.weight = type(made.weight)(part.clone(), requires_grad=False, has_fp16_weights=False)
        return made.to("cpu").eval()

    whole, x = linear(weight), torch.randn(2, 3, 96)
    x[0, 1, 5], x[1, 2, 70] = 9.0, -20.0  # an outlier on each rank
    x.requires_grad_()
    expected = whole(x)
    upstream = torch.randn(2, 3, 40)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    ranges, group = ((0, 40), (40, 96)), Recorded()
    shards = []
    for a, b in ranges:
        shards.append(linear(weight[:, a:b]))
        codes = whole.state.CB[:, a:b].contiguous()
        shards[-1].state.CB, shards[-1].state.SCB = codes, whole.state.SCB
        shards[-1].weight.CB = shards[-1].weight.SCB = None

    def run_both() -> torch.Tensor:
        parts = zip(shards, ranges, strict=True)
        assert all(int8_rows.quantizes_input(shard, x) for shard in shards)
        return sum(int8_rows.product(shard, x[..., a:b], group) for shard, (a, b) in parts)  # type: ignore[return-value]

    alone = run_both()
    group.shared = True
    got = run_both()
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (alone - expected).abs().max() > 1e-3  # the shared scale is what does it
    assert torch.allclose(torch.autograd.grad(got, x, upstream)[0], wanted, rtol=1e-6, atol=1e-6)
    assert not int8_rows.quantizes_input(shards[0].train(), x) and not int8_rows.quantizes_input(torch.nn.ReLU(), x)
