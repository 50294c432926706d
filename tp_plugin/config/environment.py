"""The environment variables: the user's, and those by which a launcher tells its workers.

``import torch`` runs this module in every process: what only a run with a ``tp_size`` needs is imported where it is
used.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from tp_plugin.config.keys import ENV_DISABLE, ENV_OPTIONS, ENV_PP_SIZE, ENV_SUMMARISED, ENV_TP_SIZE, ENV_VERBOSE

if TYPE_CHECKING:
    from tp_plugin.config.written import Written


def is_disabled() -> bool:
    """Whether ``TP_PLUGIN_DISABLE`` turns everything off."""
    return _is_on(ENV_DISABLE)


def is_verbose() -> bool:
    """Whether ``TP_PLUGIN_VERBOSE`` asks for every rank's traceback."""
    return _is_on(ENV_VERBOSE)


def is_summarised() -> bool:
    """Whether the launcher of this worker prints a summary of a failed run."""
    return _is_on(ENV_SUMMARISED) and not is_verbose()


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def sizes() -> tuple[str, str]:
    """What ``TP_PLUGIN_TP_SIZE`` and ``TP_PLUGIN_PP_SIZE`` hold, not validated; "" for one that is not set."""
    return os.environ.get(ENV_TP_SIZE, "").strip(), os.environ.get(ENV_PP_SIZE, "").strip()


def asks() -> bool:
    """Whether these ask for more than one rank per model."""
    return any(size not in ("", "1") for size in sizes())


def read() -> Written:
    """The keys in the environment; none if the plugin is disabled.

    Raises:
        TPError: ``TP_PLUGIN_OPTIONS`` is not JSON.
    """
    from tp_plugin.config.written import Written
    from tp_plugin.errors import TPError

    origin = f"the environment ({ENV_TP_SIZE}, {ENV_PP_SIZE}, {ENV_OPTIONS})"
    if is_disabled():
        return Written(origin)
    raw = os.environ.get(ENV_OPTIONS, "")
    try:
        options = json.loads(raw) if raw else None
    except json.JSONDecodeError as error:
        raise TPError(f"{ENV_OPTIONS}: expected a JSON mapping, found {raw!r} ({error})") from error
    tp, pp = sizes()
    return Written(origin, tp or None, options, pp or None)


def publish(written: Written) -> None:
    """Set the variables from which :func:`read` gets the same keys, in this process and in those that it starts."""
    os.environ[ENV_TP_SIZE] = str(1 if written.tp_size is None else written.tp_size)
    os.environ.pop(ENV_PP_SIZE, None)
    if written.pp_size is not None:
        os.environ[ENV_PP_SIZE] = str(written.pp_size)
    os.environ[ENV_OPTIONS] = json.dumps(written.options or {})
