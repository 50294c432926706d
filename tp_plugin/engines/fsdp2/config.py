"""What of Accelerate's FSDP settings is incompatible with ``tp_size``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tp_plugin.config.resolve import current_config
from tp_plugin.engines.patching import wrap
from tp_plugin.errors import TPError

USED = "ACCELERATE_USE_FSDP"


def is_asked_for() -> bool:
    """Whether this run's Accelerate shards by FSDP."""
    return os.environ.get(USED, "false").lower() == "true"


def install(dataclasses: Any) -> None:
    """Patch ``accelerate.utils.dataclasses``: settings made in the script's own code are looked at, too."""
    wrap(dataclasses.FullyShardedDataParallelPlugin, "__post_init__", _plugin)


def _plugin(original: Any, self: Any) -> None:
    original(self)
    options = current_config()
    if options.unit_size > 1:
        refuse({"fsdp_version": self.fsdp_version, "fsdp_ignored_modules": self.ignored_modules}, options.tp_size)


def refuse(settings: Mapping[str, Any], tp_size: int) -> None:
    """Check settings by their names in Accelerate's config (``fsdp_config``).

    Raises:
        TPError: naming the key, and what to write.
    """
    version = settings.get("fsdp_version")
    if str(version) != "2":
        raise TPError(
            f"fsdp_version: {version} (FSDP1) cannot shard the layers of tp_size: {tp_size}; write fsdp_version: 2 in "
            "fsdp_config, with fsdp_reshard_after_forward: true in place of fsdp_sharding_strategy"
        )
    if settings.get("fsdp_ignored_modules"):
        raise TPError(
            f"fsdp_ignored_modules: {settings['fsdp_ignored_modules']} is incompatible with tp_size: {tp_size}, which "
            "counts a parameter once over both groups; remove it from fsdp_config"
        )
