"""Pipeline stages against one process: losses, every gradient, norms, weights, the saved state, and what was sent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import config_for
from workers import run, sees_whole

from tp_plugin.cli.models import build
from tp_plugin.config.run_config import RunConfig
from tp_plugin.errors import TPError
from tp_plugin.runtime.runtime import require
from tp_plugin.runtime.start import stop
from tp_plugin.shard import parallelize

STEPS = 6


def batch_of(model: Any, step: int) -> dict[str, torch.Tensor]:
    """Unequal lengths and label tokens in every row, and another width at every step."""
    generator = torch.Generator().manual_seed(step)
    rows, width = 5, 7 + 2 * step
    ids = torch.randint(3, 97, (rows, width), generator=generator)
    lengths = torch.tensor([width, width - 3, 4, width - 1, 5])
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :3] = -100
    if type(model).__name__.endswith("ForMaskedLM"):
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.6, -100)
        labels[0, 0] = ids[0, 0]
        labels[4] = -100  # the last of three micro-batches has none
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: Any, loss_of: Any, steps: int = STEPS) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Clipped AdamW steps, two micro-batches of the script's each: losses, norms, and the first step's gradients."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    # with its usual 1e-8, Adam makes whole steps of gradients that are zero but for rounding (biases of keys)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-6)
    seen = []
    for step in range(steps):
        total = 0.0
        for part in (0, 1):
            loss = loss_of(model, batch_of(model, 2 * step + part)) / 2
            loss.backward()
            total += loss.item()
        if step == 0:
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        seen.append((total, norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return seen, grads


def models_own(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def scripts_own(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    kept = labels[:, 1:] != -100
    entry = logits.gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
    return -(entry * kept).sum() / kept.sum() + 0.01 * logits.square().mean()


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "down_proj", "lm_head", "embed_tokens"]
    model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    return model


def checkpointing(model: Any, use_reentrant: bool = False) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model.train()


def reentrant(model: Any) -> Any:
    return checkpointing(model, use_reentrant=True)


def partly_frozen(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name and "embed" not in name)
    return model


def as_it_is(model: Any) -> Any:
    return model


def in_eval_mode(model: Any) -> Any:
    return model.eval()


@sees_whole
def case(
    model_type: str,
    tp: int,
    options: dict[str, Any],
    loss: str = "models_own",
    how: str = "as_it_is",
    trained: Callable[[Any], Any] = as_it_is,
    steps: int = STEPS,
) -> dict[str, Any]:
    """``trained`` gives what a script makes of the model once it is cut."""
    loss_of = globals()[loss]
    model = build(config_for(model_type, num_hidden_layers=4), meta=False)
    plain = copy.deepcopy(model)
    model, plain = globals()[how](model), globals()[how](plain)
    stop()
    expected, plain_grads = train(plain, loss_of, steps)
    parallelize(model, tp, options=RunConfig(tp, **options))
    stats = require().mesh.context.stats
    stats.total.clear()
    found, our_grads = train(trained(model), loss_of, steps)
    our_grads = {name.replace("_orig_mod.", ""): grad for name, grad in our_grads.items()}
    counts, sizes = dict(stats.total.count), dict(stats.total.bytes)
    grads, weights = {}, {}
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.shape == theirs.shape, name
        weights[name] = (ours.detach() - theirs.detach()).abs().max().item()
    assert our_grads.keys() == plain_grads.keys()
    size = torch.stack([grad.norm() for grad in plain_grads.values()]).norm().item()
    for name, theirs in plain_grads.items():
        scale = theirs.norm().item()  # noise (of a bias of keys, which softmax ignores) must stay noise
        grads[name] = (our_grads[name] - theirs).norm().item() / (scale if scale > 1e-6 * size else 1e-2 * size)
    state = model.state_dict()
    saved = max((state[name].float() - value.float()).abs().max().item() for name, value in plain.state_dict().items())
    stop()
    return {
        "expected": expected, "found": found, "grads": grads, "weights": weights, "saved": saved, "counts": counts,
        "bytes": sizes,
    }  # fmt: skip


def check(results: list[dict[str, Any]]) -> None:
    for found in results:
        for (loss, norm), (our_loss, our_norm) in zip(found["expected"], found["found"], strict=True):
            assert math.isclose(loss, our_loss, rel_tol=1e-5) and math.isclose(norm, our_norm, rel_tol=1e-5), found
        worst = max(found["grads"], key=found["grads"].__getitem__)
        assert found["grads"][worst] <= 1e-4, (worst, found["grads"][worst])
        assert max(found["weights"].values()) <= 3e-4 and found["saved"] <= 3e-4


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_two_stages(model_type: str) -> None:
    """One message per micro-batch and direction, the loss of each forward, once which parameters are in use."""
    first, last = results = run(2, case, model_type, 1, {"pp_size": 2, "pipeline_microbatches": 3})
    check(results)
    forwards = 2 * STEPS
    shared = {"broadcast/pp": forwards, "all_reduce/pp": 1}
    between = {name: n for name, n in first["counts"].items() if "pp" in name}
    assert between == {"send/pp": 3 * forwards, "receive/pp_back": 3 * forwards, **shared}
    between = {name: n for name, n in last["counts"].items() if "pp" in name}
    assert between == {"receive/pp": 3 * forwards, "send/pp_back": 3 * forwards, **shared}
    hidden = sum(batch_of(None, step)["input_ids"].numel() for step in range(forwards)) * 48 * 4
    assert first["bytes"]["send/pp"] == last["bytes"]["send/pp_back"] == hidden
    # the tied weight's gradient; nothing of activations
    sums = {name: n for name, n in first["counts"].items() if name.startswith("all_reduce/") and "pp" not in name}
    tied = forwards if model_type == "gpt2" else 0
    assert sums.get("all_reduce/unit", 0) in (tied, tied + STEPS)  # norms, where torch's are patched in this process
    assert not sums.keys() - {"all_reduce/unit"}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_micro_batch_without_labels(schedule: str) -> None:
    options = {"pp_size": 2, "pipeline_microbatches": 3, "pipeline_schedule": schedule}
    check(run(2, case, "bert", 1, options))
    check(run(4, case, "bert", 2, options))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_two_stages_of_two(model_type: str) -> None:
    check(run(4, case, model_type, 2, {"pp_size": 2, "pipeline_microbatches": 3}))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_loss_of_the_scripts_own(model_type: str) -> None:
    check(run(2, case, model_type, 1, {"pp_size": 2, "pipeline_microbatches": 3}, "scripts_own"))


def test_a_loss_of_the_scripts_own_of_two_stages_of_two() -> None:
    check(run(4, case, "llama", 2, {"pp_size": 2, "pipeline_microbatches": 3}, "scripts_own"))


def test_all_forwards_first() -> None:
    options = {"pp_size": 2, "pipeline_microbatches": 3, "pipeline_schedule": "gpipe"}
    check(run(2, case, "llama", 1, options))


@pytest.mark.parametrize("how", ["with_lora", "checkpointing", "reentrant", "partly_frozen"])
def test_what_scripts_do_to_models(how: str) -> None:
    check(run(2, case, "llama", 1, {"pp_size": 2, "pipeline_microbatches": 3}, "models_own", how))


def test_adapters_and_recomputation_of_two_stages_of_two() -> None:
    for how in ("with_lora", "checkpointing"):
        check(run(4, case, "llama", 2, {"pp_size": 2, "pipeline_microbatches": 3}, "models_own", how))


def test_four_stages() -> None:
    check(run(4, case, "qwen2", 1, {"pp_size": 4, "pipeline_microbatches": 5}))


PROMPT = torch.tensor([[0, 0, 5, 17, 33, 21], [9, 4, 61, 8, 3, 70]])
MASK = (torch.arange(6) >= torch.tensor([[2], [0]])).long()


@sees_whole
def generating(tp: int, stages: int) -> list[tuple[Any, Any]]:
    """Tokens of one process and ours."""
    from test_generate import generation

    stop()
    model = build(config_for("llama", num_hidden_layers=4), meta=False).eval()
    plain = copy.deepcopy(model)
    parallelize(model, tp, options=RunConfig(tp, pp_size=stages))
    found = []
    for settings in (
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 9},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ):
        both = []
        for one in (plain, model):
            torch.manual_seed(3)
            with generation():
                both.append(one.generate(PROMPT, attention_mask=MASK, max_new_tokens=6, min_new_tokens=6, **settings))
        found.append((both[0].tolist(), both[1].tolist()))
    with torch.no_grad():
        logits = [one(PROMPT, attention_mask=MASK).logits for one in (plain, model)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    stop()
    return found


@pytest.mark.parametrize(("tp", "stages"), [(1, 2), (2, 2)])
def test_generate(tp: int, stages: int) -> None:
    for found in run(tp * stages, generating, tp, stages):
        for plain, ours in found:
            assert plain == ours


@sees_whole
def losses_with_dropout(
    stages: int, how: str, trained: Callable[[Any], Any] = as_it_is, of_attention: float = 0.1
) -> list[float]:
    stop()
    dropout = {"attn_pdrop": of_attention, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    model = globals()[how](build(config_for("gpt2", n_layer=4, **dropout), meta=False)).train()
    parallelize(model, 1, options=RunConfig(1, pp_size=stages, pipeline_microbatches=3))
    torch.manual_seed(5)
    found, _ = train(trained(model), models_own)
    stop()
    return [number for pair in found for number in pair] + [torch.rand(()).item()]


@pytest.mark.parametrize("how", ["as_it_is", "checkpointing"])
def test_dropout_masks_depend_on_no_stage(how: str) -> None:
    two, four = run(2, losses_with_dropout, 2, how), run(4, losses_with_dropout, 4, how)
    for found in [*two, *four]:
        assert found == pytest.approx(two[0], rel=1e-5)


class SavedBytes:
    """Most bytes of activations that autograd held at once: distinct memory, without parameters."""

    def __init__(self, model: Any):
        self._skip = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._alive: dict[int, int] = {}
        self._now = self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> Any:
        memory = tensor.untyped_storage()
        if memory.data_ptr() in self._skip:
            return _Kept(tensor, None, self)
        if not self._alive.setdefault(memory.data_ptr(), 0):
            self._now += memory.nbytes()
            self.peak = max(self.peak, self._now)
        self._alive[memory.data_ptr()] += 1
        return _Kept(tensor, memory.data_ptr(), self)

    def release(self, address: int, size: int) -> None:
        self._alive[address] -= 1
        if not self._alive[address]:
            del self._alive[address]
            self._now -= size


class _Kept:
    def __init__(self, tensor: torch.Tensor, address: int | None, of: SavedBytes):
        self.tensor, self.address, self.of, self.size = tensor, address, of, tensor.untyped_storage().nbytes()

    def __del__(self) -> None:
        if self.address is not None:
            self.of.release(self.address, self.size)


def saved_bytes(stages: int, count: int) -> int:
    stop()
    model = build(config_for("llama", num_hidden_layers=8, attn_implementation="eager"), meta=False)
    parallelize(model, 1, options=RunConfig(1, pp_size=stages, pipeline_microbatches=count, pipeline_split=(4, 4)))
    ids = torch.randint(3, 97, (8, 32), generator=torch.Generator().manual_seed(0))
    with SavedBytes(model) as saved:
        model(input_ids=ids, labels=ids).loss.backward()
    stop()
    return saved.peak


def test_a_stage_holds_the_activations_of_few_micro_batches() -> None:
    """min(m, p - s) of m, against one micro-batch of all rows: 1F1B."""
    first, last = run(2, saved_bytes, 2, 8)
    of_all_rows, _ = run(2, saved_bytes, 2, 1)
    assert first == pytest.approx(of_all_rows * 2 / 8, rel=0.05)
    _, last_of_all_rows = run(2, saved_bytes, 2, 1)
    assert last == pytest.approx(last_of_all_rows * 1 / 8, rel=0.05)


@sees_whole
def refusals() -> list[str]:
    stop()
    model = build(config_for("llama"), meta=False)
    parallelize(model, 1, options=RunConfig(1, pp_size=2))
    ids = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    embedded = torch.ones(2, 5, 48, requires_grad=True)
    hooked = build(config_for("llama"), meta=False)
    hooked.model.layers[0].register_forward_hook(lambda module, args, output: None)
    found = []
    for call in (
        lambda: model(inputs_embeds=embedded, labels=ids),
        lambda: model(input_ids=ids, output_hidden_states=True),
        lambda: copy.deepcopy(model),
        lambda: parallelize(hooked, 1, options=RunConfig(1, pp_size=2)),
        lambda: model(attention_mask=torch.ones(2, 5)),
        lambda: (model(input_ids=ids, labels=ids).logits.sum() * 2).backward(),
    ):
        try:
            call()
            found.append("")
        except TPError as error:
            found.append(str(error))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        loss.backward()
    stop()
    return found


def test_what_is_refused_in_a_call() -> None:
    said = (
        "'inputs_embeds' requires a gradient",
        "output_hidden_states is on",
        "cannot be copied",
        "a hook is registered on model.layers.0",
        "none of input_ids, inputs_embeds and pixel_values",
        "whose backward the pipeline has run already",
    )
    for found in run(2, refusals):
        for message, expected in zip(found, said, strict=True):
            assert expected in message


@sees_whole
def half_precision() -> tuple[float, float]:
    """Gradients of a scaled loss in fp16 against those in fp32: relative distance, of one process and ours."""
    stop()
    model = build(config_for("llama", num_hidden_layers=4), meta=False)
    plain = copy.deepcopy(model)
    parallelize(model, 1, options=RunConfig(1, pp_size=2, pipeline_microbatches=3))
    batch = batch_of(model, 0)

    def grads(one: Any, dtype: torch.dtype | None) -> torch.Tensor:
        one.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = one(**batch).loss
        (loss * 1e-5 * 65536).backward()  # as of a scaler, and of a loss whose gradients are small
        return torch.cat([p.grad.clone().reshape(-1) for p in one.parameters()]) / (1e-5 * 65536)

    exact = grads(plain, None)
    apart = [((grads(one, torch.float16) - exact).norm() / exact.norm()).item() for one in (plain, model)]
    stop()
    return apart[0], apart[1]


def test_fp16_gradients_do_not_underflow() -> None:
    for plain, ours in run(2, half_precision):
        assert ours <= 1.5 * plain < 0.05


@pytest.mark.parametrize("option", ["sequence_parallel", "fuse", "fused_head"])
def test_options_of_tensor_parallelism(option: str) -> None:
    check(run(4, case, "llama", 2, {"pp_size": 2, "pipeline_microbatches": 3, option: True}))


def test_whole_experts_on_the_ranks_of_a_stage() -> None:
    check(run(4, case, "qwen3_moe", 2, {"pp_size": 2, "pipeline_microbatches": 3, "expert_parallel": True}))
