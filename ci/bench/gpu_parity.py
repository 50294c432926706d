#!/usr/bin/env python
"""Each way to train with tensor parallelism against one process on the same card, by the numbers.

On a machine of several cards a rank has its own, and tp is their number. On one card two ranks share it: NCCL takes
them for two machines if each has an ``NCCL_HOSTID`` of its own; where it does not, gloo carries the card's tensors.
fp32 without TF32, so that the limits are those of the tests.

    python ci/bench/gpu_parity.py                        # on a card
    python ci/bench/gpu_parity.py --device cpu           # the same lines without one
    python ci/bench/gpu_parity.py --only "ZeRO 2,compile"

Prints a line per case, and as its last line all of them in JSON. Ends with status 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import queue
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

STEPS = 4
LIMITS = {"loss": 1e-5, "norm": 1e-4, "weights": 3e-4}
"""Relative, relative, absolute; after clipped steps of AdamW."""
TIMEOUT = 90
"""Seconds for one collective, and for one case."""
BACKENDS = {"cpu": ("gloo",), "cuda": ("cpu:gloo,cuda:nccl", "gloo")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="", help="names of cases, with commas between")
    args = parser.parse_args()
    names = [name for name in CASES if not args.only or name in args.only.split(",")]
    for backend in BACKENDS[args.device]:
        found = on_all_ranks(names, args.device, backend)
        if "failed to start" not in found:
            break
    found["in any order of the queue"] = in_any_order(args.device, backend) if not args.only else {"left out": True}
    wrong = [name for name, result in found.items() if "failed" in result or result.get("wrong")]
    for name, result in found.items():
        print(f"{'WRONG' if name in wrong else 'ok':6s}{name}: {json.dumps(result)[:600]}")
    print(json.dumps({"backend": backend, "cases": found}))
    sys.exit(1 if wrong else 0)


# --- cases: what a rank does; "one" is the model on one process -------------------------------------------------------


def model_of(device: str, **overrides: Any) -> Any:
    """A small Llama, also of fewer key/value heads than ranks, with a vocabulary that no number of ranks divides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 1001, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "attention_bias": True, "use_cache": False}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes | heads | overrides)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(device)


def batch(step: int, device: str) -> dict[str, Any]:
    """Token ids, also as labels, of which some are left out."""
    import torch

    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 1001, (4, 65), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def train(model: Any, device: str, called: Any = None, optimizer: Any = None, amp: bool = False) -> dict[str, Any]:
    """Losses, gradient norms and the whole weights of some clipped steps."""
    import torch

    called = model if called is None else called
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-3, eps=1e-6)
    scaler = torch.amp.GradScaler(device, enabled=amp, init_scale=2.0**10)
    losses, norms = [], []
    for step in range(STEPS):
        with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16, enabled=amp):
            loss = called(**batch(step, device)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 0.5))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return {"loss": [float(x) for x in losses], "norm": [float(x) for x in norms], "weights": weights}


def compared(one: dict[str, Any], two: dict[str, Any], **limits: float) -> dict[str, Any]:
    """The largest differences, and which of them are above their limit."""
    apart = {key: max(abs(a - b) / abs(a) for a, b in zip(one[key], two[key], strict=True)) for key in ("loss", "norm")}
    both = one["weights"].keys() & two["weights"].keys()  # some formats give the other ranks none
    far = [(one["weights"][name] - two["weights"][name]).abs().max().item() for name in both]
    apart["weights"] = max(far, default=0.0)
    wrong = [key for key, value in apart.items() if not value <= (LIMITS | limits)[key]]
    return {"apart": apart, "wrong": wrong}


def parallel(model: Any, **options: Any) -> Any:
    """``model`` on all ranks."""
    import tp_plugin
    from tp_plugin.config.keys import ENV_OPTIONS
    from tp_plugin.runtime.start import stop

    stop()
    os.environ[ENV_OPTIONS] = json.dumps({"audit_every": 1, **options})
    return tp_plugin.parallelize(model, tp_size=_world())


def plain_loop(device: str, **options: Any) -> dict[str, Any]:
    """A training loop of one's own, without an engine."""
    one = model_of(device)
    two = parallel(copy.deepcopy(one), **options)
    return compared(train(one, device), train(two, device))


def loaded_and_saved(device: str) -> dict[str, Any]:
    """Saved in the middle of a run, loaded into a new model and optimizer, and trained on."""
    import torch

    import tp_plugin

    one = parallel(model_of(device))
    first = torch.optim.AdamW(one.parameters(), lr=1e-3, eps=1e-6)
    train(one, device, optimizer=first)
    saved, state = one.state_dict(), copy.deepcopy(first.state_dict())
    box = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else ""]
    torch.distributed.broadcast_object_list(box)
    one.save_pretrained(box[0], is_main_process=torch.distributed.get_rank() == 0)
    torch.distributed.barrier()
    again = tp_plugin.parallelize(type(one).from_pretrained(box[0]).train().to(device), tp_size=_world())
    second = torch.optim.AdamW(again.parameters(), lr=1e-3, eps=1e-6)
    second.load_state_dict(state)
    found = compared(train(one, device, optimizer=first), train(again, device, optimizer=second))
    return found | {"keys": len(saved)}


def fsdp2(device: str) -> dict[str, Any]:
    """``fully_shard`` over a data group of one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    one = model_of(device)
    two = parallel(copy.deepcopy(one))
    for layer in two.model.layers:
        fully_shard(layer)
    fully_shard(two)
    found = train(two, device)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found["weights"] = get_model_state_dict(two, options=options)
    return compared(train(one, device), found)


def zero(device: str, stage: int) -> dict[str, Any]:
    """DeepSpeed's ZeRO over a data group of one."""
    import deepspeed
    import torch
    from deepspeed.utils import groups

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups.mpu = None
    one = model_of(device)
    two = parallel(copy.deepcopy(one))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(two.parameters(), lr=1e-3, eps=1e-6)
    engine, *_ = deepspeed.initialize(model=two, optimizer=optimizer, config=config)
    losses, norms = [], []
    for step in range(STEPS):
        loss = engine(**batch(step, device)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
        norms.append(float(engine.get_global_grad_norm()))
    import tp_plugin

    with tp_plugin.full_parameters(two):
        weights = {name: parameter.detach().cpu().clone() for name, parameter in two.named_parameters()}
    engine.destroy()
    expected = train(one, device)
    expected["weights"] = {name: expected["weights"][name] for name in weights}
    return compared(expected, {"loss": losses, "norm": norms, "weights": weights})


def compiled(device: str) -> dict[str, Any]:
    """``torch.compile`` of the whole model."""
    import torch

    one = model_of(device)
    two = parallel(copy.deepcopy(one))
    torch._dynamo.reset()
    called = torch.compile(two, backend="inductor" if device == "cuda" else "aot_eager")
    return compared(train(one, device), train(two, device, called))


def dropout_recomputed(device: str) -> dict[str, Any]:
    """Dropout in all places: layers that are recomputed draw the masks again that their forward drew."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1001, n_embd=96, n_layer=2, n_head=3, n_positions=65, use_cache=False)
    model = GPT2LMHeadModel(config).train().to(device)
    results = []
    for checkpointing in (False, True):
        two = parallel(copy.deepcopy(model))
        if checkpointing:
            two.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        results.append(train(two, device))
    return compared(*results, loss=0.0, norm=0.0, weights=0.0)


def scaled(device: str) -> dict[str, Any]:
    """fp16 with a GradScaler (on CPU bf16): near to one process within the type's rounding."""
    one = model_of(device)
    two = parallel(copy.deepcopy(one))
    limits = {"loss": 5e-3, "norm": 5e-2, "weights": 1e-2}
    return compared(train(one, device, amp=device == "cuda"), train(two, device, amp=device == "cuda"), **limits)


def lora(device: str) -> dict[str, Any]:
    """PEFT's LoRA on all linear layers."""
    import peft
    import torch

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    one = peft.get_peft_model(model_of(device), config).to(device)
    two = parallel(copy.deepcopy(one))
    return compared(train(one, device), train(two, device))


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain loop": plain_loop,
    "sequence parallel": lambda device: plain_loop(device, sequence_parallel=True),
    "FSDP2": fsdp2,
    "ZeRO 1": lambda device: zero(device, 1),
    "ZeRO 2": lambda device: zero(device, 2),
    "ZeRO 3": lambda device: zero(device, 3),
    "compile": compiled,
    "dropout, recomputed": dropout_recomputed,
    "fp16 with a scaler": scaled,
    "LoRA": lora,
    "saved and resumed": loaded_and_saved,
}


def in_any_order(device: str, backend: str) -> dict[str, Any]:
    """The same seed with kernels one by one and all in flight: bit-equal parameters, or something is not waited for."""
    sums = []
    for blocking in "10":
        os.environ["CUDA_LAUNCH_BLOCKING"] = blocking
        found = on_all_ranks(["bits"], device, backend)["bits"]
        if "failed" in found:
            return found
        sums.append(found["sums"])
    os.environ.pop("CUDA_LAUNCH_BLOCKING")
    return {"sums": sums, "wrong": [] if sums[0] == sums[1] else ["bits"]}


def bits(device: str) -> dict[str, Any]:
    """Checksums of the parameters after steps with overlap, sequence parallelism and clipping."""
    import zlib

    sums = []
    for options in ({}, {"sequence_parallel": True}):
        weights = train(parallel(model_of(device), **options), device)["weights"]
        sums.append(zlib.crc32(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))))
    return {"sums": sums}


# --- ranks ------------------------------------------------------------------------------------------------------------


def _world() -> int:
    return int(os.environ["WORLD_SIZE"])


def ranks_on(device: str) -> int:
    """One for each card; two where there is one card, or none."""
    import torch

    return max(2, torch.cuda.device_count() if device == "cuda" else 0)


def on_all_ranks(names: list[str], device: str, backend: str) -> dict[str, Any]:
    """Results by case of rank 0, or why a rank failed; ranks that failed or hang are replaced by new ones."""
    import torch.multiprocessing as mp

    found: dict[str, Any] = {}
    left, world = list(names), ranks_on(device)
    while left:
        context = mp.get_context("spawn")
        results, port = context.Queue(), _free_port()
        ranks = [
            context.Process(target=_rank, args=(rank, world, port, device, backend, left, results), daemon=True)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        started = False
        try:
            while left:
                answers = dict(results.get(timeout=TIMEOUT * (2 if started else 3)) for _ in range(world))
                if any("start" in answer for answer in answers.values()):
                    if any("failed" in answer["start"] for answer in answers.values()):
                        return {"failed to start": {"failed": answers}}
                    started = True
                    continue
                failures = {str(rank): answer["failed"] for rank, answer in answers.items() if "failed" in answer}
                found[left.pop(0)] = {"failed": failures} if failures else answers[0]
                if failures:
                    break  # collectives may be out of step: the next case gets new ranks
        except queue.Empty:
            found[left.pop(0)] = {"failed": f"no answer in {TIMEOUT * 2} s"}
        for rank in ranks:
            rank.kill()
            rank.join()
    return found


def _rank(rank: int, world: int, port: int, device: str, backend: str, names: list[str], results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(OMP_NUM_THREADS="1", CUBLAS_WORKSPACE_CONFIG=":4096:8", LOCAL_RANK="0")
    if device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    import torch

    from tp_plugin.launch import worker

    worker.register()  # as in a launched run, before anything is imported by name
    try:
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        timeout = datetime.timedelta(seconds=TIMEOUT)
        if device == "cuda":
            if torch.cuda.device_count() == 1:
                os.environ["NCCL_HOSTID"] = f"rank{rank}"
            else:
                os.environ["LOCAL_RANK"] = str(rank)
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
        probe = torch.ones(3, device=device)
        torch.distributed.all_reduce(probe)
        assert probe.tolist() == [world] * 3
        results.put((rank, {"start": "ok"}))
    except Exception:
        results.put((rank, {"start": "failed", "failed": traceback.format_exc()[-600:]}))
        return
    for name in names:
        began = time.monotonic()
        try:
            found = (bits if name == "bits" else CASES[name])(device)
            results.put((rank, {**found, "seconds": round(time.monotonic() - began, 1)}))
        except BaseException:
            results.put((rank, {"failed": traceback.format_exc()[-2500:]}))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
