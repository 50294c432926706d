"""What ``tp-plugin verify`` is asked about: a model type, a config file or a local checkpoint, and a policy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import PolicyError, TPError
from tp_plugin.policy import Policy, load, policy_for

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes of the model that is trained for the proof, by their usual names."""

PROVEN_SIZE = 20_000_000
"""Parameters up to which a model is proven as it is; a larger one by a small model of the same architecture."""


def read_config(target: str) -> Any:
    """The config of a model type, a ``config.json`` or a checkpoint folder; nothing is downloaded.

    Raises:
        TPError: there is no such thing here.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(target)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise TPError(f"{target} has no config.json")
        try:
            written = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TPError(f"{file} is no JSON: {error}") from error
        if written.get("model_type") not in CONFIG_MAPPING:
            raise TPError(f"{file}: transformers knows no model type {written.get('model_type')!r}")
        return AutoConfig.for_model(**written)
    if target not in CONFIG_MAPPING:
        raise TPError(f"{target!r} is no folder, no .json file and no model type that transformers knows")
    return AutoConfig.for_model(target)


def find_policy(config: Any, reference: str | None) -> Policy:
    """The registered policy, or the one named by ``module:NAME`` or ``path/to/file.py:NAME``.

    Raises:
        PolicyError: there is none.
    """
    if reference is None:
        return policy_for(config)
    file, _, name = reference.rpartition(":")
    if not file.endswith(".py"):
        return load(reference)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise PolicyError(f"policy: there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not isinstance(found, Policy):
        raise PolicyError(f"policy: {file} has no Policy named {name!r}")
    return found


def small_config(config: Any) -> Any:
    """A config of the same architecture, small enough to be trained on a laptop in seconds."""
    from transformers import AutoConfig

    known = {**config.attribute_map, **{key: key for key in config.to_dict()}}
    chosen = {key: value for key, value in SMALL.items() if key in known}
    dropouts = {key: 0.0 for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)}
    if "head_dim" in config.to_dict():
        chosen["head_dim"] = 8
    return AutoConfig.for_model(config.model_type, **{**chosen, **dropouts})


def build(config: Any, *, meta: bool) -> nn.Module:
    """A model of ``config``: on the meta device, or with weights that hide nothing (no zero bias, no norm weight 1)."""
    import transformers

    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        if cls is not None:
            model = cls(config)
        else:
            causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
            model = auto.from_config(config)
    if not meta:
        randomize(model)
    return model  # type: ignore[no-any-return]


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
