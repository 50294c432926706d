"""Views of whole tensors that the script holds: a row, a slice. What it writes there reaches the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tp_plugin.errors import TPError
from tp_plugin.tensor.global_view.info import GlobalInfo
from tp_plugin.tensor.global_view.whole import read_alone, whole_of, write


class Replicated(torch.Tensor):
    """What was computed of FSDP2's parameters. FSDP2 alone gives a DTensor there, which scripts ask for all of it."""

    def full_tensor(self) -> torch.Tensor:
        """Itself: every rank has all of it."""
        return self.as_subclass(torch.Tensor)

    to_local = full_tensor


def as_fsdp2_gives(value: Any) -> Any:
    """An ordinary tensor with the methods of a DTensor that scripts call."""
    return value.as_subclass(Replicated) if type(value) is torch.Tensor else value


class GlobalView(torch.Tensor):
    """A part of a gathered tensor. It is gathered anew where the parameters may have changed since.

    Attributes:
        base: the tensor that looks whole.
        info: what is known of it.
        path: makes this view of the whole tensor.
        whole: the whole tensor of which this is a part, as of ``made``.
        made: the stamp at that time.
    """

    base: Any
    info: GlobalInfo
    path: Callable[[torch.Tensor], torch.Tensor]
    whole: torch.Tensor
    made: object

    def full_tensor(self) -> torch.Tensor:
        """What a DTensor, which this would be under FSDP2 alone, has."""
        return plain_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), plain_of(self).clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain_of(self).__reduce_ex__(protocol)


def make_view(
    part: torch.Tensor, whole: torch.Tensor, base: Any, info: GlobalInfo, path: Callable[[Any], Any]
) -> GlobalView:
    """``part``, a view of ``whole``, which was gathered of ``base``."""
    view: Any = part
    view.__class__ = GlobalView
    view.base, view.info, view.path, view.whole, view.made = base, info, path, whole, info.peers.stamp()
    return view  # type: ignore[no-any-return]


def plain_of(view: Any) -> torch.Tensor:
    """An ordinary tensor with the present values of ``view``; a view of ``view.whole``. Collective if it is stale."""
    if view.made != view.info.peers.stamp():
        view.whole = whole_of(view.base, view.info)
        view.made = view.info.peers.stamp()
        fresh: torch.Tensor = view.path(view.whole)
        with torch._C.DisableTorchFunctionSubclass():
            view.data = fresh.detach()
        return fresh
    with torch._C.DisableTorchFunctionSubclass():
        same: torch.Tensor = view.view_as(view) if view.requires_grad and torch.is_grad_enabled() else view.detach()
        return same


def write_through(view: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call ``function``, which works in place, on ``view``, and put what it wrote into the shards.

    Raises:
        TPError: gradients are recorded, and would have to flow through what is overwritten.
    """
    refuse_recorded(view.base, view.info)
    if not view.info.peers.meet(f"{view.info.name} to write"):
        read_alone(view.base, view.info, to_write=True)  # which raises
    target = plain_of(view).detach()
    function(target, *args, **kwargs)
    write(view.base, view.whole.detach(), view.info)
    view.made = view.info.peers.stamp()


def refuse_recorded(tensor: Any, info: GlobalInfo) -> None:
    """Raise as torch does for writing into a leaf, and for writing into what autograd follows."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return
    if tensor.is_leaf:
        raise RuntimeError("a view of a leaf Variable that requires grad is being used in an in-place operation.")
    raise TPError(
        f"{info.peers.line()}: {info.describe()}, and to write at an index into what was computed of it, while "
        "gradients are recorded, is not supported with tp_size; make a new tensor (torch.where, index_put), or write "
        "under torch.no_grad()"
    )
