"""Small random models whose weights hide nothing: biases not zero, norm weights not one, every entry different."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

COMMON = {
    "vocab_size": 97,  # divisible by no tp: the vocabulary is padded
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def config_for(model_type: str, **overrides: Any) -> Any:
    """A small config of an architecture; dropout off unless ``overrides`` say otherwise."""
    from transformers import AutoConfig

    if model_type == "gpt2":
        return AutoConfig.for_model("gpt2", **{**GPT2, **NO_DROPOUT, **overrides})
    settings: dict[str, Any] = dict(COMMON)
    if model_type in ("gemma", "gemma2", "gemma3_text", "qwen3", "seed_oss", "helium", "ministral"):
        settings["head_dim"] = 12
    if model_type in (
        "llama",
        "qwen3",
        "smollm3",
        "seed_oss",
        "granite",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo",
        "arcee",
    ):
        settings["attention_bias"] = True
    if model_type in ("llama", "smollm3", "granite", "helium", "arcee", "seed_oss"):
        settings["mlp_bias"] = True
    if model_type == "seed_oss":
        settings |= {"attention_dropout": 0.0, "residual_dropout": 0.0}
    return AutoConfig.for_model(model_type, **{**settings, **overrides})


def build(config: Any, seed: int = 0, auto: str = "AutoModelForCausalLM") -> nn.Module:
    """A model of ``config`` with non-symmetric random weights, in fp32 on the CPU."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config)
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Replace all zeros and ones: weights about 1/sqrt(fan-in), vectors (norms, biases) shifted at random."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def batch(vocabulary: int, seed: int, size: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    """Token ids, labels (some ignored) and a mask with right padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
