"""Keywords of policies that were renamed: the old ones are accepted for one version, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def renamed_keywords(**names: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: the constructor accepts each old keyword for the new one (``old="new"``), and warns.

    An old keyword wins over the new one, because ``dataclasses.replace(block, old=…)`` passes both: the value to
    change and the value that the block has.
    """

    def decorate(cls: type[T]) -> type[T]:
        init: Callable[..., None] = cls.__init__

        @functools.wraps(init)
        def wrapper(self: T, *args: Any, **kwargs: Any) -> None:
            for old in kwargs.keys() & names.keys():
                new = names[old]
                warnings.warn(
                    f"{cls.__name__}({old}=…) is deprecated and will be removed in the next version; write {new}=…",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            init(self, *args, **kwargs)

        cls.__init__ = wrapper  # type: ignore[assignment]
        return cls

    return decorate
