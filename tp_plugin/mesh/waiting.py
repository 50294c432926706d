"""Which collective this rank is waiting in, and since when: what the threads that report a hang want to know."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from tp_plugin.errors import DivergenceError, LostRankError


class Waiting:
    """The collective that the main thread is in.

    Attributes:
        since: ``time.monotonic()`` of its beginning; None outside of collectives.
        what: the collective in words.
        in_unit: whether only ranks of this rank's unit take part in it.
        explain: given the collective and the backend's error, what is known of the other ranks; set by who can ask.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.what, self.in_unit = "", False
        self.explain: Callable[[str, RuntimeError], str] | None = None

    @contextlib.contextmanager
    def on(self, what: str, in_unit: bool = False) -> Iterator[None]:
        """Inside, this rank waits in ``what``.

        Raises:
            LostRankError: the backend raised; the message says what is known of the other ranks.
        """
        self.what, self.in_unit, self.since = what, in_unit, time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self.since = None
            if self.explain is None or isinstance(error, DivergenceError | torch.OutOfMemoryError):
                raise
            raise LostRankError(self.explain(what, error)) from error
        finally:
            self.since = None

    def seconds(self) -> float:
        """For how long this rank has been in the collective; 0 outside of one."""
        since = self.since
        return 0.0 if since is None else time.monotonic() - since
