"""What one place says about the plugin's keys, as it was written: read, but not validated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Written:
    """The keys of one config file, command line, environment or dict.

    Attributes:
        origin: the place, as messages name it.
        tp_size: the value of ``tp_size``; None if it is not there.
        options: the value of ``tp_plugin``; None if it is not there.
        pp_size: the value of ``pp_size``; None if it is not there.
    """

    origin: str
    tp_size: object = None
    options: object = None
    pp_size: object = None

    @property
    def is_empty(self) -> bool:
        """Whether none of the keys is there."""
        return self.tp_size is None and self.options is None and self.pp_size is None
