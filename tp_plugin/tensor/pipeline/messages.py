"""Hidden states to the next stage, and their gradients to the one before: one message of each per micro-batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tp_plugin.mesh.groups import Group, Pending


class Messages:
    """This rank's neighbours.

    Args:
        forward, back: the groups of the same TP rank of all stages; two, as a backend may run a group's messages in
            the order in which they were begun.
    """

    def __init__(self, forward: Group, back: Group):
        self._forward, self._back = forward, back
        self.stage, self.stages = forward.rank, forward.size
        self._under_way: list[Pending] = []

    @property
    def is_first(self) -> bool:
        """Whether no stage is before this one."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether no stage is after this one."""
        return self.stage == self.stages - 1

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """Begin to send to the next stage."""
        self._under_way.append(self._forward.start_send(hidden.detach().contiguous(), self.stage + 1))

    def receive_hidden(self, like: torch.Tensor) -> torch.Tensor:
        """What the stage before has sent, which is of the shape and dtype of ``like``."""
        into = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return self._forward.start_receive(into, self.stage - 1).wait()

    def send_gradient(self, gradient: torch.Tensor) -> None:
        """Begin to send to the stage before."""
        self._under_way.append(self._back.start_send(gradient.contiguous(), self.stage - 1))

    def receive_gradient(self, like: torch.Tensor) -> torch.Tensor:
        """What the next stage has sent, of the shape and dtype of ``like``."""
        into = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return self._back.start_receive(into, self.stage + 1).wait()

    def finish(self) -> None:
        """Wait until all that was sent is on its way, so that its memory may be used again."""
        while self._under_way:
            self._under_way.pop().wait()

    def anywhere(self, mine: list[bool], device: torch.device) -> list[bool]:
        """Which of these are true on some stage."""
        found = torch.tensor(mine, dtype=torch.int32, device=device)
        return [bool(one) for one in self._forward.all_reduce(found, dist.ReduceOp.MAX).tolist()]

    def sum_of_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all stages' tensors."""
        return self._forward.all_reduce(tensor)

    def from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last stage's ``tensor``, in place, on every stage."""
        return self._forward.broadcast(tensor, src=self.stages - 1)
