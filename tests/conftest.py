"""What holds for every test."""

from __future__ import annotations

import contextlib
import signal

# What a shell starts in the background ignores SIGINT, and so does all that it starts: here it is as in a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
