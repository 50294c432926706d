"""Says what a process sees of the way in which it was started."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading

import numpy
import torch
from common import arguments, write_rank


def main():
    main_module = sys.modules["__main__"]
    seen = {
        "environment": dict(os.environ),
        "argv": sys.argv,
        "orig_argv": [word for word in sys.orig_argv if word != "-u"],
        "path": sys.path,
        "executable": sys.executable,
        "main": [main_module.__file__, main_module.__spec__, main_module.main is main, type(__loader__).__name__],
        "folder": os.getcwd(),
        "threads": [thread.name for thread in threading.enumerate()],
        "computing threads": torch.get_num_threads(),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
        "collects": gc.isenabled(),
        "streams": [os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)],
        "backward": torch.Tensor.backward.__module__ + str(hasattr(torch.Tensor.backward, "__wrapped__")),
    }
    own = {"random": random.random(), "numpy": numpy.random.rand(), "torch": torch.rand(1).item(), "hash": hash("tp")}
    write_rank(arguments().parse_args().out, {"seen": seen, "own": own})


if __name__ == "__main__":
    main()
