"""Eight GPUs that are not there: what libraries ask of ``torch.cuda`` is answered, and tensors stay on the CPU.

For processes of their own (``fresh.scripts``): nothing is taken back.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

COUNT = 8


class _OnHost(TorchFunctionMode):
    """What is to lie on a card is made on the host, or stays there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        return function(*tree_map(_host, args), **tree_map(_host, kwargs or {}))


def _host(value: Any) -> Any:
    on_card = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if on_card else value


class Cards:
    """The stubbed cards, and what was done to them.

    Attributes:
        current: the index that ``torch.cuda.set_device`` was given last.
        parallel: models that were wrapped in ``nn.DataParallel``.
        device_ids: of each ``DistributedDataParallel``.
    """

    def __init__(self) -> None:
        self.current = 0
        self.parallel: list[Any] = []
        self.device_ids: list[Any] = []
        self._queries()
        self._wrappers()
        original = dist.init_process_group
        dist.init_process_group = lambda backend=None, **given: original("gloo", **given)
        torch._C._push_on_torch_function_stack(_OnHost())

    def _queries(self) -> None:
        cuda: Any = torch.cuda
        state = torch.empty(16, dtype=torch.uint8)
        answers = {
            "is_available": True, "device_count": COUNT, "get_device_name": "NVIDIA H100", "get_rng_state": state,
            "get_device_capability": (9, 0), "is_bf16_supported": True, "memory_allocated": 0, "empty_cache": None,
            "get_device_properties": SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0),
        }  # fmt: skip
        for name, answer in answers.items():
            setattr(cuda, name, lambda *args, answer=answer, **given: answer)
        cuda.current_device = lambda: self.current
        cuda.set_device = lambda device: setattr(self, "current", getattr(device, "index", device))
        torch.cuda.random.get_rng_state_all = lambda: [state] * COUNT
        torch.cuda.random.get_rng_state = cuda.get_rng_state
        here: Any = torch.accelerator
        here.is_available = lambda: True
        here.current_accelerator = lambda check_available=False: torch.device("cuda")
        here.synchronize, here.max_memory_allocated = lambda device=None: None, lambda device=None: 0
        here.device_count, here.current_device_index = cuda.device_count, cuda.current_device

    def _wrappers(self) -> None:
        one_process: Any = torch.nn.DataParallel
        one_process.__init__ = lambda wrapper, module, *args, **given: self.parallel.append(module)
        cls: Any = torch.nn.parallel.DistributedDataParallel
        original = cls.__init__

        def init(wrapper: Any, module: Any, device_ids: Any = None, output_device: Any = None, **given: Any) -> None:
            self.device_ids.append(device_ids)
            original(wrapper, module, **given)

        cls.__init__ = init
