"""For code of ours that the script's region calls: inside, tensors that look whole are what this rank holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def on_shards(function: Function) -> Function:
    """``function`` without the dispatch of tensor subclasses."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
