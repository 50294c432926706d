"""PyTorch's autoload hook (entry-point group ``torch.backends``): runs at the end of every ``import torch``.

It looks for the key and registers lazy import hooks, nothing else. What it raises would break ``import torch``, so
a bad value is left for the first patched call, which names it. Imports nothing heavy: an idle process pays for a
few look-ups.
"""

from __future__ import annotations

import os
import sys

TP_SIZE = "TP_PLUGIN_TP_SIZE"
DISABLE = "TP_PLUGIN_DISABLE"


def activate() -> None:
    """Entry point: register hooks if this process is a worker with a ``tp_size``, or a launcher."""
    disabled = os.environ.get(DISABLE, "") not in ("", "0")
    if _is_accelerate_launch(sys.argv):
        from tp_plugin.launch import accelerate_cli

        accelerate_cli.register(sys.argv)  # disabled, the keys in the file are still legal
        return
    if disabled:
        return
    if not os.environ.get(TP_SIZE, "").strip():
        from tp_plugin.launch import deepspeed_config

        deepspeed_config.look(sys.argv)
    if os.environ.get(TP_SIZE, "").strip() not in ("", "1"):
        from tp_plugin.launch import worker

        worker.register()


def _is_accelerate_launch(argv: list[str]) -> bool:
    program = os.path.basename(argv[0]) if argv else ""
    if program == "accelerate-launch" or (program == "launch.py" and os.path.join("accelerate", "commands") in argv[0]):
        return True
    if program == "trl":  # launches its scripts by Accelerate, in this process
        return True
    launches = len(argv) > 1 and argv[1] == "launch"
    return launches and (program in ("accelerate", "accelerate_cli.py") or argv[0] == "-m")
