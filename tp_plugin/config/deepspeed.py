"""DeepSpeed's config in each form it is handed around in: JSON file, dict, base64, ``HfDeepSpeedConfig``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from tp_plugin.config.keys import KEYS, PP_SIZE, TP_PLUGIN, TP_SIZE
from tp_plugin.config.misspelt import meant, refuse_misspelt
from tp_plugin.config.written import Written
from tp_plugin.errors import TPError


def read(config: Mapping[str, Any], origin: str) -> Written:
    """The keys at the top level of a config.

    Raises:
        TPError: a key is misspelt, or ``tp_size`` or ``pp_size`` stands inside a section.
    """
    refuse_misspelt(config, origin)
    for section, values in config.items():
        # (DeepSpeed's own `tensor_parallel` section has a key of this name.)
        if not isinstance(values, Mapping) or section in ("tensor_parallel", TP_PLUGIN):
            continue
        for key in (TP_SIZE, PP_SIZE):
            if key in values:
                raise TPError(
                    f"`{section}.{key}` in {origin} has no effect there; move it to the top level: "
                    f'"{key}": {values[key]!r}'
                )
    return Written(origin, config.get(TP_SIZE), config.get(TP_PLUGIN), config.get(PP_SIZE))


def without_our_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as DeepSpeed may see it."""
    return {key: value for key, value in config.items() if key not in KEYS}


def asks_for_us(config: Mapping[str, Any]) -> bool:
    """Whether a config has our key, also in a wrong place or misspelt: then :func:`read` has something to say."""
    text = json.dumps(config, default=str)
    return any(f'"{key}"' in text for key in (TP_SIZE, PP_SIZE)) or any(meant(key) for key in config)


def mentions_key(path: str | None) -> bool:
    """Whether the file contains the name of one of our sizes; False if DeepSpeed will report that it cannot be read."""
    try:
        with open(path or "", encoding="utf-8") as file:
            text = file.read()
            return any(f'"{key}"' in text for key in (TP_SIZE, PP_SIZE))
    except (OSError, UnicodeDecodeError):
        return False


def as_mapping(config: Any) -> dict[str, Any] | None:
    """A DeepSpeed config as a dict; None if it is none, or cannot be read, which DeepSpeed will report."""
    if hasattr(config, "config"):  # HfDeepSpeedConfig
        config = config.config
    if isinstance(config, dict):
        return config
    if not isinstance(config, str | os.PathLike):
        return None
    try:
        if os.path.exists(config):
            with open(config, encoding="utf-8") as file:
                found = _loads(file.read())
        else:
            found = _loads(_decoded(os.fspath(config)))
    except (OSError, ValueError, ImportError):
        return None
    return found if isinstance(found, dict) else None


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        import hjson  # DeepSpeed's own reader: comments and trailing commas

        return hjson.loads(text)


def _decoded(text: str) -> str:
    if text.lstrip().startswith("{"):
        return text
    import base64

    return base64.urlsafe_b64decode(text).decode("utf-8")
