"""PyTorch's autoload hook (entry-point group ``torch.backends``): runs at the end of every ``import torch``.

It looks for the key and registers lazy import hooks, nothing else. What it raises would break ``import torch``, so
a bad value is left for the first patched call, which names it. Imports nothing heavy: an idle process pays for a
few look-ups.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from tp_plugin.config import environment
from tp_plugin.launch.imports import after_import, run_by_import

LAUNCHER = "accelerate.commands.launch"
"""What every form of ``accelerate launch``, ``trl`` and a script that launches import, and no training script."""


def activate() -> None:
    """Entry point: register hooks on the launcher, and those of a worker if this process has a ``tp_size``."""
    after_import(LAUNCHER, _install_launcher)  # disabled too: the keys in a config file are still legal
    run_by_import(LAUNCHER)
    if environment.is_disabled():
        return
    if not any(environment.sizes()):
        from tp_plugin.launch import deepspeed_config

        deepspeed_config.look(sys.argv)
        after_import("accelerate.launchers", _watch_notebook_launcher)
    _register_worker()


def _register_worker() -> None:
    if environment.asks():
        from tp_plugin.launch import worker

        worker.register()


def _install_launcher(launch: Any) -> None:
    from tp_plugin.launch import accelerate_cli

    accelerate_cli.install(launch)


def _watch_notebook_launcher(launchers: Any) -> None:
    """A notebook sets ``TP_PLUGIN_TP_SIZE`` in a cell, when torch is imported already; its workers are forked."""
    original = launchers.notebook_launcher

    @functools.wraps(original)
    def looking(*args: Any, **kwargs: Any) -> Any:
        _register_worker()
        return original(*args, **kwargs)

    launchers.notebook_launcher = looking
