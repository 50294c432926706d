"""PEFT's methods other than LoRA that act on linears, each with a model of which they can be sharded."""

from __future__ import annotations

from typing import Any

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {"num_hidden_layers": 1, "num_key_value_heads": 1}
EVEN = {"num_hidden_layers": 1, "num_key_value_heads": 4, "intermediate_size": 96}

METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "IA3": ("IA3Config", SMALL, {"feedforward_modules": ["down_proj", "up_proj"]}),
    "VeRA": ("VeraConfig", SMALL, {"r": 5, "vera_dropout": 0.1}),
    "LoHa": ("LoHaConfig", SMALL, {"r": 3}),
    "LoKr": ("LoKrConfig", SMALL, {"r": 3, "decompose_both": True}),
    "OFT": ("OFTConfig", EVEN, {"r": 0, "oft_block_size": 4}),
    "OFT, shared blocks": ("OFTConfig", EVEN, {"r": 0, "oft_block_size": 8, "block_share": True}),
    "HiRA": ("HiraConfig", SMALL, {"r": 3, "hira_dropout": 0.1}),
    "BEFT": ("BeftConfig", SMALL, {}),
    "RoAd": ("RoadConfig", EVEN, {"variant": "road_4", "group_size": 4}),
    "DeLoRA": ("DeloraConfig", SMALL, {"r": 3, "module_dropout": 0.1}),
    "FourierFT": ("FourierFTConfig", SMALL, {"n_frequency": 50, "scaling": 30.0}),
    "WaveFT": ("WaveFTConfig", SMALL, {"n_frequency": 50, "scaling": 5.0}),
    "RandLoRA": ("RandLoraConfig", SMALL, {"r": 3, "randlora_alpha": 6, "randlora_dropout": 0.1}),
    "TinyLoRA": ("TinyLoraConfig", SMALL, {"r": 2}),
    "GraLoRA": ("GraloraConfig", SMALL, {"r": 4, "gralora_k": 2, "hybrid_r": 2}),
    "GraLoRA with dropout": ("GraloraConfig", SMALL, {"r": 4, "gralora_k": 2, "gralora_dropout": 0.1}),
    "VB-LoRA": ("VBLoRAConfig", SMALL, {"r": 2, "num_vectors": 6, "vector_length": 4, "vblora_dropout": 0.1}),
    "Uni-LoRA": ("UniLoraConfig", SMALL, {"r": 2, "theta_d_length": 40}),
    "PSOFT": ("PsoftConfig", SMALL, {"r": 4}),
}
"""Name → the class of its config, of a small Llama, the config's settings."""
