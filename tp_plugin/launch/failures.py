"""A failed run in a few lines, last: which rank failed first, at which line of the script, of what.

A worker that dies leaves its error in the file that torch's launcher names to it, and prints nothing; the launcher
prints the first one's. Without such a launcher (``mpirun``, ``deepspeed``) or with ``TP_PLUGIN_VERBOSE=1`` each rank
prints what Python prints.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from typing import Any

from tp_plugin.config.environment import is_summarised, is_verbose
from tp_plugin.config.keys import ENV_SUMMARISED, ENV_VERBOSE
from tp_plugin.engines.patching import wrap
from tp_plugin.errors import TPError

FILE = "TORCHELASTIC_ERROR_FILE"
"""Names the file to a worker; ``torch.distributed.elastic.multiprocessing.errors`` says what is in it."""

SIGTERM = 15
"""With which the launcher ends the others."""


def install_in_worker() -> None:
    """Leave the error of this process to the launcher, if that has promised to print it."""
    if is_summarised() and os.environ.get(FILE):
        sys.excepthook = _record


def install_in_launcher(api: Any) -> None:
    """Patch ``torch.distributed.launcher.api``, through which torchrun and ``accelerate launch`` start workers."""
    if not getattr(api.elastic_launch.__call__, "tp_patched", False):  # a launcher may find the key in two places
        wrap(api.elastic_launch, "__call__", _launch)


def _record(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    from tp_plugin.runtime.crash_report import has_lost_others
    from tp_plugin.runtime.script_position import failing_line

    words = f"{kind.__name__}: {error}"
    refused = isinstance(error, TPError)
    told = {
        "py_callstack": "" if refused else "".join(traceback.format_exception(kind, error, trace)),
        "timestamp": str(int(time.time())),
        "line": failing_line(error),
        "lost_others": has_lost_others(words),
    }
    message = {"message": str(error) if refused else words, "extraInfo": told}
    with open(os.environ[FILE], "w", encoding="utf-8") as file:
        json.dump({"message": message}, file)


def _launch(original: Any, self: Any, *args: Any) -> Any:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if is_verbose() or not isinstance(self._entrypoint, str):  # a function's process prints by a hook of its own
        return original(self, *args)
    os.environ[ENV_SUMMARISED] = "1"
    try:
        return original(self, *args)
    except ChildFailedError as error:
        sys.excepthook = functools.partial(_print, summary(error.failures))
        raise
    except SignalException as signal:
        sys.excepthook = functools.partial(_print, f"tp_plugin: ended by signal {int(signal.sigval)}.")
        raise
    finally:
        os.environ.pop(ENV_SUMMARISED, None)


def _print(text: str, *exception: Any) -> None:
    """In place of the launcher's own traceback."""
    print(text, file=sys.stderr, flush=True)


def summary(failures: dict[int, Any]) -> str:
    """What is printed of the failed workers: global rank → torch's ``ProcessFailure``."""

    def order(rank: int) -> tuple[bool, bool, int, int]:
        failure = failures[rank]
        # one that lost others, or was ended by the launcher, failed because of another
        return failure.exitcode == -SIGTERM, _told(failure).get("lost_others", False), failure.timestamp, rank

    first = min(failures, key=order)
    failure, told = failures[first], _told(failures[first])
    if told:
        line = f" at {told['line']}" if told["line"] else ""
        cause = f"rank {first} failed{line}: {failure.message['message']}"
    elif failure.exitcode < 0:
        cause = f"rank {first} was killed by {failure.signal_name()}: out of memory, or a signal from outside"
    else:
        cause = f"rank {first} ended with exit code {failure.exitcode}"
    others = f"; {ENV_VERBOSE}=1 shows what every rank says" if len(failures) > 1 else ""
    return f"{told.get('py_callstack', '')}tp_plugin: {cause}\n(exit codes: {_codes(failures)}{others})"


def _told(failure: Any) -> dict[str, Any]:
    """What :func:`_record` left; empty if the worker left nothing, or something else did."""
    extra = failure.message.get("extraInfo", {}) if isinstance(failure.message, dict) else {}
    return extra if "line" in extra else {}


def _codes(failures: dict[int, Any]) -> str:
    return ", ".join(f"rank {rank}: {failures[rank].exitcode}" for rank in sorted(failures))
