"""Small random models whose weights hide nothing: biases not zero, norm weights not one, every entry different."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tp_plugin.cli.models import randomize

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


GPT_NEO = {
    "vocab_size": 97, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]], "window_size": 5, "intermediate_size": 80, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, **NO_DROPOUT},
    "gpt_neo": GPT_NEO,
    "gptj": {**GPT2, **NO_DROPOUT, "rotary_dim": 8, "n_inner": 80},
    "codegen": {**GPT2, **NO_DROPOUT, "n_head": 16, "n_embd": 64, "rotary_dim": 4, "n_inner": 80},
    "gpt_bigcode": {**GPT2, **NO_DROPOUT, "n_inner": 80},
    "bloom": {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0},
    "mpt": {"vocab_size": 97, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
}
BERT = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1,
}  # fmt: skip
# T5 does not scale its attention scores: narrow heads keep random weights from saturating the softmax
T5 = {
    "vocab_size": 97, "d_model": 48, "d_kv": 4, "d_ff": 80, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "architectures": ["T5ForConditionalGeneration"],
}  # fmt: skip
BART = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 64,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "decoder_start_token_id": 2,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
OWN |= {
    "bert": {**BERT, "architectures": ["BertForMaskedLM"]},
    "roberta": {**BERT, "architectures": ["RobertaForMaskedLM"]},
    "xlm-roberta": {**BERT, "architectures": ["XLMRobertaForMaskedLM"]},
    "camembert": {**BERT, "architectures": ["CamembertForMaskedLM"]},
    "electra": {**BERT, "embedding_size": 32, "architectures": ["ElectraForMaskedLM"]},
    "t5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": T5 | {"architectures": ["MT5ForConditionalGeneration"]},
    "bart": {**BART, "architectures": ["BartForConditionalGeneration"]},
    "mbart": {**BART, "architectures": ["MBartForConditionalGeneration"], "scale_embedding": True},
    "distilbert": {
        "vocab_size": 97, "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
        "dropout": 0.0, "attention_dropout": 0.0, "architectures": ["DistilBertForMaskedLM"],
    },
}  # fmt: skip
DEBERTA = {
    **BERT, "pad_token_id": 0, "relative_attention": True, "max_relative_positions": -1, "position_buckets": 4,
    "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "share_att_key": True, "type_vocab_size": 2,
    "conv_kernel_size": 3, "architectures": ["DebertaV2ForMaskedLM"],
}  # fmt: skip
BART_KIN = {
    "plbart": "PLBart", "pegasus": "Pegasus", "blenderbot": "Blenderbot", "blenderbot-small": "BlenderbotSmall",
    "m2m_100": "M2M100",
}  # fmt: skip
OWN |= {
    **{kin: {**BART, "architectures": [f"{name}ForConditionalGeneration"]} for kin, name in BART_KIN.items()},
    "marian": {**BART, "decoder_vocab_size": 97, "forced_eos_token_id": None},
    "whisper": {
        **BART, "decoder_attention_heads": 8, "num_mel_bins": 6, "max_source_positions": 10,
        "max_target_positions": 32, "begin_suppress_tokens": None, "architectures": ["WhisperForConditionalGeneration"],
    },
    "deberta-v2": DEBERTA,
    "deberta": {**DEBERTA, "max_relative_positions": 8, "architectures": ["DebertaForMaskedLM"]},
    "modernbert": {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "pad_token_id": 0, "local_attention": 6, "global_attn_every_n_layers": 2,
        "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True, "bos_token_id": 1,
        "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    },
}  # fmt: skip
TRUNK = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**TRUNK, "image_size": 16, "patch_size": 4}
WORDS = {
    **TRUNK,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# towers differ in heads and width
CLIP_IMAGE = {**IMAGE, "hidden_size": 64, "num_attention_heads": 8, "projection_dim": 24}
VIT = {**IMAGE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DINOV2 = {**VIT, "mlp_ratio": 2, "drop_path_rate": 0.0, "layerscale_value": 0.5}
OWN |= {
    "vit": {**VIT, "architectures": ["ViTForImageClassification"]},
    "deit": {**VIT, "architectures": ["DeiTForImageClassification"]},
    "beit": {
        **VIT, "drop_path_rate": 0.0, "layer_scale_init_value": 0.5, "use_relative_position_bias": True,
        "architectures": ["BeitForImageClassification"],
    },
    "dinov2": {**DINOV2, "architectures": ["Dinov2ForImageClassification"]},
    "dinov2_with_registers": {**DINOV2, "architectures": ["Dinov2WithRegistersForImageClassification"]},
    "clip": {"text_config": {**WORDS, "projection_dim": 24}, "vision_config": CLIP_IMAGE, "projection_dim": 24},
    "clip_text_model": {**WORDS, "projection_dim": 24, "architectures": ["CLIPTextModelWithProjection"]},
    "clip_vision_model": CLIP_IMAGE,
    "siglip": {"text_config": {**WORDS, "projection_size": 48}, "vision_config": {**IMAGE, "num_attention_heads": 8}},
    "siglip_text_model": {**WORDS, "architectures": ["SiglipTextModel"]},
    "siglip_vision_model": IMAGE,
    "llava": {
        "text_config": {**COMMON, "model_type": "qwen2", "tie_word_embeddings": True},
        "vision_config": {**CLIP_IMAGE, "model_type": "clip_vision_model"},
        "image_token_index": 3, "image_seq_length": 16, "tie_word_embeddings": True,
    },
    "paligemma": {
        "text_config": {**COMMON, "model_type": "gemma", "head_dim": 12, "attention_bias": True},
        "vision_config": {**IMAGE, "model_type": "siglip_vision_model", "projection_dim": 48, "vision_use_head": False},
        "image_token_index": 3, "projection_dim": 48,
    },
    "gemma3": {
        "text_config": {**COMMON, "model_type": "gemma3_text", "head_dim": 12, "sliding_window": 6},
        "vision_config": {**IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_index": 3, "mm_tokens_per_image": 4,
    },
}  # fmt: skip
"""Architectures whose configs have names of their own."""

EXTRA: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"sliding_window": 6, "head_dim": 12},
    "glm": {"head_dim": 12, "attention_bias": True},
    "glm4": {"head_dim": 12, "attention_bias": True},
    "phi": {"qk_layernorm": True},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "persimmon": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "stablelm": {"use_qkv_bias": True, "hidden_size": 64},
    "nemotron": {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True, "head_dim": 12},
    "exaone4": {"sliding_window": 6, "head_dim": 12},
    "falcon": {"bias": True, "new_decoder_architecture": False, "multi_query": True},
    "opt": {"ffn_dim": 80, "dropout": 0.0, "word_embed_proj_dim": 48},
    "xglm": {
        "d_model": 48,
        "ffn_dim": 80,
        "attention_heads": 4,
        "num_layers": 2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0},
}
"""What the common settings do not say."""

MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10,
    "moe_intermediate_size": 20, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
EXTRA |= {
    "mixtral": {"num_local_experts": 6, "head_dim": 12},
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 36,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [0],
        "head_dim": 12, "attention_bias": True,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "attention_bias": True},
    "phimoe": {"num_local_experts": 6, "attention_bias": True, "lm_head_bias": True},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "attention_bias": True},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 6},
    "llama4_text": {
        "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 20, "intermediate_size_mlp": 40,
        "head_dim": 12, "moe_layers": [1], "no_rope_layers": [0, 1], "attention_bias": True,
    },
    "deepseek_v2": {**MLA, "n_routed_experts": 6, "q_lora_rank": None, "attention_bias": True},
    "deepseek_v3": {
        **MLA, "n_routed_experts": 8, "q_lora_rank": 14, "n_group": 2, "topk_group": 1, "attention_bias": True,
    },
}  # fmt: skip
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss", "llama4_text"]
for model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss"):
    # with the auxiliary loss, and so much of it that an error in it would be seen
    EXTRA[model_type] |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def config_for(model_type: str, **overrides: Any) -> Any:
    """A small config of an architecture; dropout off unless ``overrides`` say otherwise."""
    from transformers import AutoConfig

    if model_type in OWN:
        return AutoConfig.for_model(model_type, **{**OWN[model_type], **overrides})
    settings: dict[str, Any] = {**COMMON, **EXTRA.get(model_type, {})}
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


def install_peft() -> None:
    """Patch PEFT as a worker with a ``tp_size`` does, once; the patches do nothing to a model that is not sharded."""
    import peft

    from tp_plugin.engines import peft as engine

    if not hasattr(peft.PeftModel.get_prompt, "tp_patched"):
        engine.install(peft.peft_model)
        engine.install_dora(importlib.import_module("peft.tuners.lora.dora"))


def unpatched(function: Any) -> Any:
    """What a patched function was."""
    return function.__wrapped__ if hasattr(function, "tp_patched") else function


def adapted(model: nn.Module, method: str) -> nn.Module:
    """``model`` with one of PEFT's methods: "lora", "dora", "qlora" (of 4 bits), a trained "prefix", or of METHODS."""
    import peft
    from peft_methods import LINEARS, METHODS

    install_peft()
    if method == "qlora":
        model = in_four_bits(model)
    torch.manual_seed(0)
    if method in ("lora", "dora", "qlora"):
        given: Any = peft.LoraConfig(
            target_modules="all-linear", lora_alpha=16, init_lora_weights=False, use_dora=method == "dora"
        )
    elif method in METHODS:
        kind, _, own = METHODS[method]
        undropped = {key: value for key, value in own.items() if not key.endswith("dropout")}
        given = getattr(peft, kind)(target_modules=LINEARS, **undropped)
    else:
        given = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    found = peft.get_peft_model(model, given)
    if method == "prefix":  # alone it has too small a gradient for clipping
        found.requires_grad_(True)
    if method in METHODS:  # none starts with a gradient of zero; and not with large weights, that multiply rounding
        with torch.no_grad():
            for parameter in found.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return found


def in_four_bits(model: nn.Module) -> nn.Module:
    """``model`` in bitsandbytes' NF4, with double quantization; the CPU's own layout of codes is left out."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})  # save_pretrained writes on rank 0 only
        found: nn.Module = type(model).from_pretrained(folder, quantization_config=settings)  # type: ignore[attr-defined]
    for module in found.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return found


def batch(vocabulary: int, seed: int, size: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    """Token ids, labels (some ignored) and a mask with right padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
