"""Accelerate's config file (YAML or JSON): the plugin's keys at its top level."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tp_plugin.config.keys import KEYS, PP_SIZE, TP_PLUGIN, TP_SIZE
from tp_plugin.config.misspelt import refuse_misspelt
from tp_plugin.config.written import Written
from tp_plugin.errors import TPError


def read(file: str | Path) -> Written:
    """The keys in a config file that Accelerate has read already, so that it is known to be well formed."""
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return Written(f"the Accelerate config {file}", config.get(TP_SIZE), config.get(TP_PLUGIN), config.get(PP_SIZE))


def without_our_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as Accelerate may see it.

    Raises:
        TPError: ``tp_size`` is misspelt or stands inside a section, or Accelerate's own tensor parallelism is on, too.
    """
    refuse_misspelt(config, "the Accelerate config")
    for section, values in config.items():
        if not isinstance(values, Mapping) or section in KEYS:
            continue
        for key in (TP_SIZE, PP_SIZE):
            if key in values:
                raise TPError(
                    f"`{section}.{key}: {values[key]}` has no effect there (Accelerate ignores it); move it to the "
                    f"top level of the config file: `{key}: {values[key]}`"
                )
        theirs = values.get("parallelism_config_tp_size")
        if theirs not in (None, 1) and TP_SIZE in config:
            raise TPError(
                f"both `{TP_SIZE}: {config[TP_SIZE]}` and `{section}.parallelism_config_tp_size: {theirs}` are set, "
                f"two different tensor parallelisms; keep the top-level `{TP_SIZE}` and remove the other"
            )
    return {key: value for key, value in config.items() if key not in KEYS}
