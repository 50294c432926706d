"""The model and the policy that ``tp-plugin verify`` is asked about, and small models of the same architecture."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import PolicyError, TPError
from tp_plugin.policy import Policy, load, make_plan, policies, policy_for

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
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # the other half of an encoder and decoder
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_vocab_size": 97,
    # pictures and sounds
    "image_size": 32,
    "patch_size": 8,
    "image_seq_length": 16,
    "mm_tokens_per_image": 4,
    "projection_dim": 64,
    "projection_size": 64,
    "num_mel_bins": 8,
    "max_source_positions": 24,
    "max_target_positions": 64,
}
"""Sizes of the model that is trained for the proof, by their usual names."""

PROVEN_SIZE = 20_000_000
"""Parameters up to which a model is proven as it is; a larger one by a small model of the same architecture."""


def read_config(target: str) -> Any:
    """The config of a model type, a ``config.json`` or a checkpoint folder; nothing is downloaded.

    Raises:
        TPError: there is no such thing here.
    """
    from transformers import AutoConfig

    path = Path(target)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise TPError(f"{target} has no config.json")
        try:
            written = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TPError(f"{file} is no JSON: {error}") from error
        if not _known(written.get("model_type")):
            raise TPError(f"{file}: transformers knows no model type {written.get('model_type')!r}")
        return AutoConfig.for_model(**written)
    if not _known(target):
        raise TPError(f"{target!r} is no folder, no .json file and no model type that transformers knows")
    return AutoConfig.for_model(target)


def _known(model_type: object) -> bool:
    """Whether transformers knows ``model_type``, by itself or from a package that brings it together with a policy."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        policies()  # loads those packages
    return model_type in CONFIG_MAPPING


def named_policy(reference: str) -> Policy:
    """The policy named by ``module:NAME`` or ``path/to/file.py:NAME``.

    Raises:
        PolicyError: there is none.
    """
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


def small_config(config: Any, **settings: Any) -> Any:
    """A config of the same architecture, small enough to be trained on a laptop in seconds.

    Args:
        settings: values of the config that override the small ones.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    written = config.to_dict()
    known = {*config.attribute_map, *(key for key, value in written.items() if value is not None)}
    known |= {"head_dim", "pad_token_id", "bos_token_id", "eos_token_id"} & set(written)
    chosen: dict[str, Any] = {key: value for key, value in SMALL.items() if key in known}
    if getattr(config, "num_key_value_heads", -1) in (None, getattr(config, "num_attention_heads", None)):
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    chosen |= {key: 0.0 for key, value in written.items() if "drop" in key and isinstance(value, float)}
    for key, value in written.items():
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= SMALL["vocab_size"]:
            chosen.setdefault(key, 3)
        if key.endswith("suppress_tokens"):
            chosen[key] = None
    if config.is_encoder_decoder:
        chosen.setdefault("decoder_start_token_id", 3)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if getattr(part, "model_type", None) in CONFIG_MAPPING:
            chosen[name] = small_config(part).to_dict()
    return AutoConfig.for_model(config.model_type, **{**chosen, **settings})


HEADS = (
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
)
"""Kinds of models with a loss of their own; of those that an architecture has, the first is proven."""


def model_class(config: Any) -> Any:
    """The class that ``config`` names, else the first of :data:`HEADS` for it, else the bare model's."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mappings = [getattr(transformers, f"MODEL_FOR_{head}_MAPPING") for head in HEADS] + [transformers.MODEL_MAPPING]
    found = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    return found[0] if isinstance(found, tuple) else found or _public(config)


def _public(config: Any) -> Any:
    """A public class of transformers for ``config`` that its auto classes do not know (SiglipTextModel)."""
    if ".configuration_" not in type(config).__module__:
        return None
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    classes = (getattr(module, name) for name in getattr(module, "__all__", ()) if "PreTrained" not in name)
    return next((cls for cls in classes if getattr(cls, "config_class", None) is type(config)), None)


DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
DEPTHS += ("encoder_layers", "decoder_layers")


def shallow(config: Any, depth: int = 4) -> Any:
    """A config of the same widths with at most ``depth`` layers, whose model is quick to build on the meta device."""
    changed = copy.deepcopy(config)
    for name, value in vars(changed).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            setattr(changed, name, shallow(value, depth))
    for name in DEPTHS:
        whole = vars(changed).get(name)
        if isinstance(whole, int) and whole > depth:
            setattr(changed, name, depth)
            for other, value in vars(changed).items():
                if isinstance(value, list) and len(value) == whole:
                    setattr(changed, other, value[:depth])
    return changed


@functools.cache
def typical_share(model_type: str) -> float | None:
    """Share of the parameters that is sharded at tp 2 in the model that an architecture's default config makes.

    Of its first layers; of a small model if the default config makes none. None for a type that is no HF model's.
    """
    from transformers import AutoConfig

    if not _known(model_type):
        return None
    config = AutoConfig.for_model(model_type)
    try:
        model = build(shallow(config), meta=True)
    except TypeError:  # a default config that leaves a number open
        model = build(small_config(config), meta=True)
    plan = make_plan(model, policy_for(model_type), 2)
    return plan.sharded_share(dict(model.named_parameters()))


def build(config: Any, *, meta: bool) -> nn.Module:
    """A model of ``config``: on the meta device, or with weights that hide nothing (no zero bias, no norm weight 1).

    Raises:
        TPError: transformers has no model for it.
    """
    cls = model_class(config)
    if cls is None:
        raise TPError(f"transformers has no model for a {type(config).__name__} (model type {config.model_type!r})")
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = cls(config)
    if not meta:
        randomize(model)
    return model  # type: ignore[no-any-return]


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Replace all zeros and ones: weights about 1/sqrt(fan-in), vectors (norms, biases) shifted at random."""
    generator = torch.Generator().manual_seed(seed + 1)
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            if parameter.dim() <= 1:
                parameter.add_(0.3 * noise)
            else:
                fan_in = parameter[0].numel() if id(parameter) in convolutions else parameter.shape[-1]
                parameter.copy_(noise / fan_in**0.5)
