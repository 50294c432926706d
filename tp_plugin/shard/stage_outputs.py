"""What the last pipeline stage returns, on every stage: read from there when it is used."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from tp_plugin.errors import TPError
from tp_plugin.runtime.sync_points import SyncPoints
from tp_plugin.shard.lazy_load import ABOUT
from tp_plugin.shard.model_peers import ModelPeers
from tp_plugin.tensor.pipeline.hand_out import Spent
from tp_plugin.tensor.pipeline.messages import Messages


class StageOutputs:
    """See :class:`tp_plugin.tensor.pipeline.forward.Outputs`. All stages use an output, or none does."""

    def __init__(self, peers: ModelPeers, messages: Messages, sync_points: SyncPoints):
        self._peers, self._messages, self._sync_points = peers, messages, sync_points
        self._numbers = itertools.count()

    def __call__(self, name: str, fake: torch.Tensor, made: list[torch.Tensor], loss: torch.Tensor | None) -> Any:
        """The whole output: at once where the ranks do not meet again (``generate``), else once it is used."""
        what = f"output {name!r} of forward {next(self._numbers)}"

        def read() -> torch.Tensor:
            if not self._sync_points.wants_full_logits and not self._peers.meet(what):
                raise TPError(
                    f"{self._peers.line()}: {name!r} is on the last pipeline stage, and the other ranks are not at "
                    "this line; use it on every process, and log or print the result on the main one"
                )
            return self._messages.from_last(_whole(fake, made))

        return read() if self._sync_points.wants_full_logits else LazyOutput.of(fake, read, loss)


def gathered(output: Any) -> torch.Tensor:
    """All columns of a head's output, outside of the graph."""
    return output.gathered() if hasattr(output, "vocabulary") else output  # type: ignore[no-any-return]


@torch.no_grad()
def _whole(fake: torch.Tensor, made: list[torch.Tensor]) -> torch.Tensor:
    """The output on the last stage, elsewhere room for it."""
    if not made:
        return torch.empty_like(fake, memory_format=torch.contiguous_format)
    return torch.cat([gathered(one) for one in made]).contiguous()


class LazyOutput(torch.Tensor):
    """An output that is read when it is used, once; what it is (shape, dtype, device) is known before."""

    found: list[torch.Tensor]
    read: Callable[[], torch.Tensor]
    loss: torch.Tensor | None

    @staticmethod
    def of(like: torch.Tensor, read: Callable[[], torch.Tensor], loss: torch.Tensor | None) -> LazyOutput:
        made: Any = torch.Tensor._make_wrapper_subclass(
            LazyOutput, like.shape, dtype=like.dtype, device=like.device, requires_grad=loss is not None
        )
        made.found, made.read, made.loss = [], read, loss
        result: LazyOutput = made
        return result

    def plain(self) -> torch.Tensor:
        """The output; an ordinary tensor, in the graph of an error if its backward has run."""
        if not self.found:
            self.found.append(self.read())
        whole = self.found[0]
        if self.loss is None or not torch.is_grad_enabled():
            return whole
        spent: torch.Tensor = Spent.apply(whole, self.loss)
        return spent

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in ABOUT or function is torch.Tensor.register_hook:  # (FSDP2's)
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function is torch.Tensor.detach:
            (lazy,) = args
            with torch._C.DisableTorchFunctionSubclass():
                detached = LazyOutput.of(lazy, lazy.read, None)
            detached.found = lazy.found
            return detached
        plain = tree_map_only(LazyOutput, LazyOutput.plain, (args, kwargs))
        return function(*plain[0], **plain[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = tree_map_only(LazyOutput, LazyOutput.plain, (args, kwargs or {}))
        return function(*plain[0], **plain[1])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.plain().detach().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.plain())
