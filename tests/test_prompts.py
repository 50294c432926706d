"""PEFT's learned prompts and prefixes beside a sharded model, against plain PEFT on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch, build, config_for, install_peft
from workers import run
from zoo import fresh

KINDS: dict[str, dict[str, Any]] = {
    "prefix": {"peft_type": "PREFIX_TUNING"},
    "projected prefix": {"peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": 20},
    "cartridge": {"peft_type": "CARTRIDGE"},
    "prompt": {"peft_type": "PROMPT_TUNING"},
    "p-tuning": {"peft_type": "P_TUNING", "encoder_hidden_size": 20},
    "context": {  # its loss is made from the logits
        "peft_type": "CPT",
        "cpt_token_ids": [5, 60, 9, 33],
        "cpt_tokens_type_mask": [1, 2, 3, 4],
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 0.7,
    },
}
CASES = [
    (2, "llama", {}, "prefix"),
    (2, "llama", {"num_key_value_heads": 1}, "prefix"),  # the one head is on both ranks, and learns from both
    (2, "gpt2", {}, "projected prefix"),
    (2, "t5", {}, "prefix"),
    (2, "llama", {}, "cartridge"),
    (2, "llama", {}, "prompt"),
    (2, "llama", {}, "p-tuning"),
    (2, "llama", {}, "context"),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [
            (4, "llama", {"num_attention_heads": 6, "num_key_value_heads": 2}, "prefix"),
            (2, "codegen", {}, "prefix"),  # whose heads lie in quarters
            (2, "bart", {}, "prefix"),
            (2, "gemma3_text", {}, "prefix"),
            (2, "bert", {}, "prefix"),
        ]
    ),
]  # fmt: skip
KIND_OF_MODEL = {
    "t5": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "bart": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "bert": ("AutoModelForSequenceClassification", "SEQ_CLS"),
}


def prompt_case(tp: int, model_type: str, overrides: dict[str, Any], kind: str) -> dict[str, Any]:
    """Three clipped steps of two micro-batches, then some tokens; beside plain PEFT."""
    import peft
    from counted import ledger

    from tp_plugin.engines import torch_utils
    from tp_plugin.shard import parallelize

    fresh()
    torch_utils.install()
    install_peft()
    auto, task = KIND_OF_MODEL.get(model_type, ("AutoModelForCausalLM", "CAUSAL_LM"))
    plain = build(config_for(model_type, **overrides), auto=auto)
    given = {"task_type": task, "num_virtual_tokens": 4 if kind == "context" else 3, **KINDS[kind]}
    if model_type == "t5":  # whose heads have a width of their own
        given["token_dim"] = plain.config.num_heads * plain.config.d_kv
    settings = peft.get_peft_config(given)
    whole = peft.get_peft_model(plain, settings)
    sharded = peft.get_peft_model(build(plain.config, auto=auto), settings)  # a copy would lose CPT's hooks
    with torch.no_grad():
        for model in (whole, sharded):
            torch.manual_seed(0)
            for parameter in model.prompt_encoder.parameters():
                parameter.normal_(0, 0.2)
    parallelize(sharded, tp)
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": [], "weights": [], "tokens": [], "counts": []}
    for model in (whole, sharded):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
        for step in range(3):
            for micro in range(2):
                data = batch(97, 2 * step + micro)
                if task == "SEQ_CLS":
                    data["labels"] = torch.tensor([0, 1])
                loss = model(**data).loss
                before_backward = ledger["count"].copy()
                loss.backward()
                found["losses"].append(loss.item())
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            if step == 0:
                found["grads"].append({name: p.grad.clone() for name, p in trained.items()})
                found["counts"].append(dict(ledger["count"] - before_backward))
            found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
            optimizer.zero_grad()
        found["weights"].append({name: p.detach().clone() for name, p in trained.items()})
        model.eval()
        if task != "SEQ_CLS":
            ids = batch(97, 9)["input_ids"][1:]
            mask = torch.ones_like(ids)
            found["tokens"].append(
                model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0).tolist()
            )
    grads, weights = found["grads"], found["weights"]
    return {
        "names": [sorted(part) for part in (*grads, *weights)],
        "losses": found["losses"], "norms": found["norms"], "tokens": found["tokens"],
        "counts": found["counts"],
        "grad": max(((grads[1][n] - g).norm() / g.norm()).item() for n, g in grads[0].items()),
        "weight": max((weights[1][n] - w).abs().max().item() for n, w in weights[0].items()),
    }  # fmt: skip


@pytest.mark.parametrize("tp, model_type, overrides, kind", CASES)
def test_the_numbers_are_those_of_one_process(tp: int, model_type: str, overrides: dict[str, Any], kind: str) -> None:
    for found in run(tp, prompt_case, tp, model_type, overrides, kind):
        assert all(names == found["names"][0] for names in found["names"]) and found["names"][0]
        half = len(found["losses"]) // 2
        assert found["losses"][half:] == pytest.approx(found["losses"][:half], rel=1e-5)
        assert found["norms"][3:] == pytest.approx(found["norms"][:3], rel=1e-5)
        assert found["grad"] <= 1e-4 and found["weight"] <= 3e-4
        assert found["tokens"][1:] == found["tokens"][:1]
        if model_type in ("llama", "gpt2"):
            # the head's and four blocks'; before the first there is nothing that learns from a prefix, which is summed
            assert found["counts"] == [{}, {"all_reduce/tp": 5}]
