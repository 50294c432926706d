"""transformers: ``from_pretrained`` maps the checkpoint instead of reading it; ``prepare`` reads this rank's part.

Scripts and trainers send the model to their device before they prepare it, where a large one has no room. So what lies
in its file is only told where it is to be (``model.to(device)``, ``device_map={"": device}``): it says that it is
there, is read to there whole by whoever uses it, and this rank's part of it by ``prepare``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from tp_plugin.config.resolve import current_config
from tp_plugin.config.run_config import RunConfig
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.engines.quantization import check_linears
from tp_plugin.shard.lazy_load import HOST, LazyParameter, is_mapped, lies_in_file, move_, read_at_forward
from tp_plugin.shard.mapped_file import MOST, open_checkpoint


def install(modeling_utils: Any) -> None:
    """Patch ``PreTrainedModel._load_pretrained_model``, and how a module gets to a device."""
    base = modeling_utils.PreTrainedModel
    original = vars(base)["_load_pretrained_model"].__func__

    @functools.wraps(original)
    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if current_config().unit_size > 1 and not _is_left_whole(model, current_config()):
            check_linears(model)
        if state_dict is None and _is_plain(modeling_utils, model, checkpoint_files, load_config):
            state_dict = _mapped(model, checkpoint_files, load_config)
        device = HOST if state_dict is None else _one_device(load_config.device_map)
        if device != HOST:  # else room for the whole model would be made there, and filled
            load_config = dataclasses.replace(load_config, device_map={"": HOST})
        loaded = original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if current_config().unit_size > 1:
            _make_room(modeling_utils, model)
        if device != HOST:
            _send(model, device)
        read_at_forward(model)
        return loaded

    patch(base, "_load_pretrained_model", staticmethod(load))
    wrap(nn.Module, "to", _to)
    wrap(nn.Module, "cuda", _cuda)


def _to(original: Any, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if current_config().unit_size > 1 and any(map(lies_in_file, self.parameters())):
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        if memory_format is None and not swaps and (device is None or device.type != "meta"):
            move_(self, device and indexed(device), dtype)
    return original(self, *args, **kwargs)


def _cuda(original: Any, self: nn.Module, device: Any = None) -> Any:
    if not any(map(lies_in_file, self.parameters())):
        return original(self, device)
    return self.to(torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda"))


def indexed(device: torch.device) -> torch.device:
    """``device`` as a tensor on it names it."""
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


def _send(model: nn.Module, device: torch.device) -> None:
    """To ``device`` goes what was loaded; what the checkpoint lacks is made there by transformers."""
    move_(model, device, None)
    for tensor in (*model.parameters(), *model.buffers()):
        if not lies_in_file(tensor) and not tensor.is_meta:
            tensor.data = tensor.data.to(device)


def _one_device(device_map: Any) -> torch.device:
    (device,) = {torch.device(device) for device in (device_map or {"": HOST}).values()}
    return indexed(device)


def _make_room(modeling_utils: Any, model: nn.Module) -> None:
    """With FSDP, local rank 0 alone makes up what the checkpoint lacks, for all; the others get room for it."""
    if not modeling_utils.is_fsdp_enabled() or modeling_utils.is_local_dist_rank_0():
        return
    made: dict[int, torch.Tensor] = {}
    for module in list(model.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:  # tied ones stay tied
                    room = torch.zeros_like(tensor, device="cpu")
                    learns = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(room, tensor.requires_grad) if learns else room
                    made[id(tensor)]._is_hf_initialized = True  # type: ignore[attr-defined]
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _is_left_whole(model: Any, options: RunConfig) -> bool:
    known_by = {getattr(getattr(model, "config", None), "model_type", None), type(model).__name__}
    return not known_by.isdisjoint(options.leave_whole)


def _is_plain(modeling_utils: Any, model: Any, files: Any, load_config: Any) -> bool:
    options = current_config()
    devices = {str(device) for device in (load_config.device_map or {}).values()}
    return (
        options.unit_size > 1
        and not _is_left_whole(model, options)
        and bool(files)
        and all(str(file).endswith(".safetensors") for file in files)
        and load_config.hf_quantizer is None
        and getattr(load_config, "device_mesh", None) is None
        and not getattr(load_config, "disable_mmap", None)
        and not any(modeling_utils._is_on_hf_mount(file) for file in files)
        and len(devices) <= 1
        and not devices & {"disk", "meta"}
    )


def _mapped(model: Any, files: Any, load_config: Any) -> dict[str, Any] | None:
    tensors: dict[str, Any] = {}
    for file in files:
        found = open_checkpoint(file)
        if found is None or len(tensors) + len(found) > MOST:
            return None
        tensors.update(found)
    castable = _castable(model, tensors, load_config.weight_mapping or [])
    return {name: Entry(tensor) if name in castable else tensor for name, tensor in tensors.items()}


def _castable(model: Any, names: Any, mapping: list[Any]) -> set[str]:
    """Names of checkpoint tensors that become one parameter as they are, except for their dtype."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = copy.deepcopy(mapping)  # it notes what it was used for
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    meta = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = set()
    for name in names:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, meta)
        if renamed in parameters and converted is None:
            found.add(name)
    return found


class Entry:
    """A mapped tensor as transformers' loader handles one: ``entry[...].to(device=…, dtype=…)``."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.tensor[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor; in another dtype, a Parameter that is cast when it is read."""
        if dtype in (None, self.tensor.dtype):
            return self.tensor
        return LazyParameter.of(self.tensor, dtype) if is_mapped(self.tensor) else self.tensor.to(dtype)
