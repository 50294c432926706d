"""``tp_size`` in a DeepSpeed config: found before anything is imported, or when a library is handed the config.

Early: the JSON file that the command line or Accelerate's environment names. Late: a path or a dict in the script's
own code, seen by three watchers (``deepspeed.initialize``, ``TrainingArguments``, ``DeepSpeedPlugin``) that look for
the key and do nothing without it.

``import torch`` runs this module in every process: what only a run with a DeepSpeed config needs is imported where it
is used.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from tp_plugin.config import environment
from tp_plugin.config.keys import PP_SIZE, TP_SIZE
from tp_plugin.launch.imports import after_import

FLAGS = ("deepspeed", "deepspeed_config", "deepspeed_config_file", "ds_config")
"""Command-line options of scripts and launchers that name a DeepSpeed config file."""

WATCHED = {
    "deepspeed": ("", "initialize"),
    "transformers.training_args": ("TrainingArguments", "__post_init__"),
    "accelerate.utils.dataclasses": ("DeepSpeedPlugin", "__post_init__"),
}
"""Module → class (or none) and function that is handed a DeepSpeed config."""


def look(argv: list[str]) -> None:
    """Take the keys over from the file that is named in ``argv``, or watch for a config in the script's own code.

    Nothing is checked here, inside ``import torch``: a bad value is named by the first patched call.
    """
    file = file_in(argv)
    if file and _take_over(file):
        return
    for module in WATCHED:
        after_import(module, functools.partial(_watch, module))


def file_in(argv: list[str]) -> str | None:
    """The DeepSpeed config file that a command line, or the environment of an ``accelerate launch``, names."""
    for at, arg in enumerate(argv):
        name, _, value = arg.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") in FLAGS:
            file = value or (argv[at + 1] if at + 1 < len(argv) else "")
            if file and not file.startswith("-"):  # DeepSpeed's own `--deepspeed` is a switch
                return file
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")


def _take_over(file: str) -> bool:
    """Put the keys of ``file`` into the environment; False if it has no ``tp_size``."""
    from tp_plugin.config import deepspeed
    from tp_plugin.config.keys import TP_PLUGIN
    from tp_plugin.config.written import Written

    config = deepspeed.as_mapping(file) if deepspeed.mentions_key(file) else None
    if config is None or (TP_SIZE not in config and PP_SIZE not in config):
        return False
    environment.publish(Written(file, config.get(TP_SIZE), config.get(TP_PLUGIN), config.get(PP_SIZE)))
    return True


def _watch(name: str, module: Any) -> None:
    owner_name, function = WATCHED[name]
    owner = getattr(module, owner_name) if owner_name else module
    original = vars(owner)[function]

    @functools.wraps(original)
    def looking(*args: Any, **kwargs: Any) -> Any:
        config = _config_among(name, args, kwargs)
        if config is not None and not any(environment.sizes()) and _asks(config) and activate(config):
            return getattr(owner, function)(*args, **kwargs)  # which is patched now
        return original(*args, **kwargs)

    setattr(owner, function, looking)


def _asks(config: dict[str, Any]) -> bool:
    from tp_plugin.config import deepspeed

    return deepspeed.asks_for_us(config)


def _config_among(module: str, args: Any, kwargs: Any) -> dict[str, Any] | None:
    from tp_plugin.config import deepspeed

    if module == "deepspeed":
        named = [kwargs.get("config"), kwargs.get("config_params"), args[10] if len(args) > 10 else None]
        from_script = args[0] if args else kwargs.get("args")
        values = [*named, getattr(from_script, "deepspeed_config", None)]
    else:
        values = [getattr(args[0], "deepspeed", None), getattr(args[0], "hf_ds_config", None)]
    return next((found for value in values if (found := deepspeed.as_mapping(value)) is not None), None)


def activate(config: Any, origin: str = "the DeepSpeed config") -> bool:
    """Turn this process into a worker with the options of ``config``; False if it asks for none.

    Raises:
        TPError: a bad value, or Accelerate already counts its processes without tensor parallelism.
    """
    from tp_plugin.config import deepspeed
    from tp_plugin.config.resolve import resolve
    from tp_plugin.errors import TPError
    from tp_plugin.runtime.runtime import current_mesh

    resolved = resolve(environment=environment.read(), deepspeed=deepspeed.read(config, origin))
    if resolved.unit_size == 1:
        return False
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    if state is not None and state._shared_state and current_mesh() is None:
        raise TPError(
            f"`tp_size: {resolved.tp_size}` was found in {origin} when Accelerate had already counted its processes; "
            f"write it where it is seen earlier: TP_PLUGIN_TP_SIZE={resolved.tp_size} in the environment, or `tp_size` "
            "in the config of `accelerate launch`"
        )
    environment.publish(resolved.as_written())
    from tp_plugin.launch import worker

    worker.register()
    return True
