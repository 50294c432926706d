"""One way each to take a training step: forward, backward, clip at 1.0, AdamW. Each runs in processes of its own."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LEARNING_RATE = 1e-4
Batch = dict[str, torch.Tensor]


class Contender:
    """``step(batch)`` takes one step and returns the loss, ``clear()`` drops the gradients."""

    world = 2
    environment: ClassVar[dict[str, str]] = {"TP_PLUGIN_DISABLE": "1"}

    def __init__(self, path: str):
        self.build(path)

    def build(self, path: str) -> None:
        raise NotImplementedError

    def step(self, batch: Batch) -> float:
        raise NotImplementedError

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def bytes_held(self) -> int:
        """Parameters, gradients and optimizer states of this rank."""
        held = 0
        parameters = [_local(p) for p in self.model.parameters()]
        states = [_local(t) for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        grads = [_local(p.grad) for p in self.model.parameters() if p.grad is not None]
        seen = set()
        for tensor in (*parameters, *grads, *states):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held += storage.nbytes()
        return held

    model: Any
    optimizer: Any


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)


def _load(path: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train()


class OneProcess(Contender):
    """An ordinary Accelerate script."""

    world = 1

    def build(self, path: str) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        model = _load(path)
        self.model, self.optimizer = self.accelerator.prepare(model, _adamw(model))

    def step(self, batch: Batch) -> float:
        loss = self.model(**batch).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def bytes_held(self) -> int:
        self.optimizer = self.optimizer.optimizer if hasattr(self.optimizer, "optimizer") else self.optimizer
        return super().bytes_held()


class Plugin(OneProcess):
    """The same script with ``tp_size: 2``."""

    world = 2
    environment: ClassVar[dict[str, str]] = {"TP_PLUGIN_TP_SIZE": "2", "ACCELERATE_USE_CPU": "true"}


class Waiting(Plugin):
    """The same without ``overlap``."""

    environment: ClassVar[dict[str, str]] = {**Plugin.environment, "TP_PLUGIN_OPTIONS": '{"overlap": false}'}


class Fuse(Plugin):
    """The same with ``fuse``, too."""

    environment: ClassVar[dict[str, str]] = {**Plugin.environment, "TP_PLUGIN_OPTIONS": '{"fuse": true}'}


class Stages(Plugin):
    """The same script with ``pp_size: 2`` in place of it: as many micro-batches as rows, at most 8."""

    environment: ClassVar[dict[str, str]] = {
        "TP_PLUGIN_TP_SIZE": "1",
        "TP_PLUGIN_PP_SIZE": "2",
        "TP_PLUGIN_OPTIONS": '{"pipeline_microbatches": 8}',
        "ACCELERATE_USE_CPU": "true",
    }


class Silent(Plugin):
    """The same with every collective left out: the time that would remain if communication were free."""

    def build(self, path: str) -> None:
        super().build(path)
        from tp_plugin.mesh.groups import Group, Pending

        Group.all_reduce = lambda self, tensor, op=None: tensor  # type: ignore[method-assign, assignment]
        Group.start_all_reduce = lambda self, tensor: Pending(tensor)  # type: ignore[method-assign]
        Group.all_gather = lambda self, tensor: [tensor.clone() for _ in range(self.size)]  # type: ignore[method-assign]


class ByHand(Contender):
    """The hand-written reference."""

    def build(self, path: str) -> None:
        from reference import Reference
        from safetensors.torch import load_file
        from transformers import AutoConfig

        _start()
        self.model = Reference(AutoConfig.from_pretrained(path))
        self.model.load(load_file(Path(path) / "model.safetensors"))
        self.optimizer = _adamw(self.model)

    def step(self, batch: Batch) -> float:
        loss = self.model(batch["input_ids"], batch["labels"])
        loss.backward()
        grads = [p.grad for p in self.model.parameters()]
        shares = [1.0 if p.dim() > 1 else 0.5 for p in self.model.parameters()]
        squares = torch.stack([share * grad.pow(2).sum() for share, grad in zip(shares, grads, strict=True)]).sum()
        torch.distributed.all_reduce(squares)
        torch._foreach_mul_(grads, min(1.0, 1.0 / (squares.sqrt().item() + 1e-6)))
        self.optimizer.step()
        return loss.item()


class Transformers(Contender):
    """transformers' own tensor parallelism."""

    def build(self, path: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        _start()
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", distributed_config=DistributedConfig(tp_plan="auto")
        ).train()
        # one optimizer for both kinds of parameters: foreach and fused refuse to mix DTensors with tensors
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, foreach=False)

    def step(self, batch: Batch) -> float:
        loss = self.model(**batch).loss
        loss.backward()
        whole, parts = [], []
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                (parts if hasattr(parameter.grad, "to_local") else whole).append(parameter.grad)
        norms = [torch.nn.utils.get_total_norm(grads) for grads in (whole, parts) if grads]
        norm = math.sqrt(sum((n.full_tensor() if hasattr(n, "full_tensor") else n).item() ** 2 for n in norms))
        torch._foreach_mul_([_local(grad) for grad in (*whole, *parts)], min(1.0, 1.0 / (norm + 1e-6)))
        self.optimizer.step()
        return loss.item()


class AutoTP(Contender):
    """DeepSpeed's AutoTP, ZeRO 0."""

    def build(self, path: str) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile, and leak shared memory
        _start()
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "tensor_parallel": {"autotp_size": 2},
            "zero_optimization": {"stage": 0},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        model = _load(path)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model), config=config)
        self.model = self.engine.module

    def step(self, batch: Batch) -> float:
        loss = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    def clear(self) -> None:
        pass

    def bytes_held(self) -> int:
        self.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return super().bytes_held()


def _start() -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


CONTENDERS: dict[str, type[Contender]] = {
    "one process": OneProcess,
    "tp_plugin": Plugin,
    "by hand": ByHand,
    "transformers TP": Transformers,
    "DeepSpeed AutoTP": AutoTP,
    "tp_plugin, no overlap": Waiting,
    "tp_plugin, fuse": Fuse,
    "tp_plugin, two stages": Stages,
    "tp_plugin, no communication": Silent,
}


class _Counting(TorchDispatchMode):
    """Counts collectives. torch's CommDebugMode follows modules, too, and fails where backwards run in a forward."""

    def __init__(self, found: dict[str, int]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self._found[name] = self._found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(found: dict[str, int]) -> Any:
    """Count the collectives of torch.distributed, DTensor's functional ones included."""
    return _Counting(found)
