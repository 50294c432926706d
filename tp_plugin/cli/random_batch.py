"""Random batches for the proof: tokens, images and sounds, by the names of the arguments of a model's forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

SAMPLES, LENGTH = 2, 11
GENERATED_FROM = ("input_ids", "pixel_values", "input_features")


def batch(model: Any, seed: int) -> dict[str, Any]:
    """Arguments of a training forward: two samples, right padding in the second, labels as the model's class wants.

    ``input_ids`` (2, 11), ``pixel_values`` (2, channels, size, size), ``input_features`` (2, mel bins, frames); a
    language model that looks at pictures gets the places for them first in its ``input_ids``.
    """
    generator = torch.Generator().manual_seed(seed)
    config, wanted = model.config, inspect.signature(model.forward).parameters
    text = config.get_text_config()
    data: dict[str, Any] = {}
    tokens = torch.Tensor()
    if hasattr(text, "vocab_size"):
        known = min(text.vocab_size, getattr(config, "decoder_vocab_size", None) or text.vocab_size)  # by both sides
        tokens = torch.randint(3, known, (SAMPLES, LENGTH), generator=generator, device="cpu")
    if "input_ids" in wanted:
        data["input_ids"] = tokens = _with_pictures(tokens, config) if "pixel_values" in wanted else tokens
        if "token_type_ids" in wanted and "pixel_values" in wanted:  # 1: a place of a picture
            data["token_type_ids"] = (tokens == config.image_token_id).long()
        data["attention_mask"] = torch.ones_like(tokens)
        data["attention_mask"][-1, -3:] = 0
    if "pixel_values" in wanted:
        seen = getattr(config, "vision_config", config)
        shape = (SAMPLES, getattr(seen, "num_channels", 3), *_pair(seen.image_size))
        data["pixel_values"] = torch.randn(shape, generator=generator, device="cpu")
    if "input_features" in wanted:
        shape = (SAMPLES, config.num_mel_bins, 2 * config.max_source_positions)  # a convolution halves the frames
        data["input_features"] = torch.randn(shape, generator=generator, device="cpu")
    if "labels" in wanted:
        data["labels"] = _labels(model, data.get("attention_mask"), tokens, generator)
    elif "decoder_input_ids" in wanted:
        data["decoder_input_ids"] = tokens
    for name in ("start_positions", "end_positions"):  # of an answer in the text
        if name in wanted:
            data[name] = torch.randint(0, LENGTH - 3, (SAMPLES,), generator=generator, device="cpu")
    if "return_loss" in wanted:
        data["return_loss"] = True
    return data


def prompt(model: Any) -> dict[str, Any]:
    """Arguments of ``generate``: four tokens, or what the model looks at or listens to, without padding."""
    data = batch(model, 99)
    given: dict[str, Any] = {name: data[name] for name in GENERATED_FROM if name in data}
    if list(given) == ["input_ids"]:
        given["input_ids"] = given["input_ids"][:, :4]
    if getattr(model.config, "output_router_logits", False):
        given["output_router_logits"] = False  # with a cache, transformers 5.17 fails at the auxiliary loss
    return given


def loss_of(model: nn.Module, seed: int, draws: int | None = None) -> torch.Tensor:
    """The model's own loss on batch ``seed``, or the mean square of all that it returns where it has none.

    Routers and dropouts draw from seed ``draws`` (default: the batch's).
    """
    data = batch(model, seed)
    torch.manual_seed(seed if draws is None else draws)
    output = model(**data)
    loss = getattr(output, "loss", None)
    if loss is None:
        found = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        loss = sum(t.pow(2).mean() for t in found if isinstance(t, torch.Tensor) and t.is_floating_point())
    return loss  # type: ignore[no-any-return]


def _labels(model: Any, mask: torch.Tensor | None, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    kind = type(model).__name__
    if kind.endswith(("SequenceClassification", "ImageClassification", "AudioClassification")):
        return torch.randint(0, model.config.num_labels, (SAMPLES,), generator=generator, device="cpu")
    if kind.endswith("TokenClassification"):
        return torch.randint(0, model.config.num_labels, tokens.shape, generator=generator, device="cpu")
    if mask is None:  # what a decoder says of a sound
        mask = torch.ones_like(tokens)
        mask[-1, -3:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    picture = getattr(model.config, "image_token_id", None)
    return labels if picture is None else labels.masked_fill(tokens == picture, -100)


def _with_pictures(tokens: torch.Tensor, config: Any) -> torch.Tensor:
    """One picture's places before each text, and none in the text; as it is where pictures have no places."""
    picture = getattr(config, "image_token_id", None)
    if picture is None:
        return tokens
    patches = (_pair(config.vision_config.image_size)[0] // config.vision_config.patch_size) ** 2
    count = getattr(config, "image_seq_length", None) or getattr(config, "mm_tokens_per_image", None) or patches
    places = tokens.new_full((len(tokens), count), picture)
    return torch.cat([places, tokens.masked_fill(tokens == picture, 3 if picture != 3 else 4)], dim=1)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
