"""Collective operations, process control and logging; every process writes what it got."""

from __future__ import annotations

import logging
import time

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast, broadcast_object_list, gather_object, pad_across_processes
from common import arguments, rank, write, write_rank


def collectives(accelerator):
    index = accelerator.process_index
    ragged = torch.arange(index + 2) + 10 * index
    padded = accelerator.pad_across_processes(ragged, dim=0, pad_index=-1)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (index + 1)
    mine = [f"process {index}", {"index": index}]
    from_main = [{"chosen": 17}, "text"] if accelerator.is_main_process else [None, None]
    number = torch.tensor([23.0]) if accelerator.is_main_process else torch.zeros(1)
    return {
        "gather": accelerator.gather(values).tolist(),
        "gather scalar": accelerator.gather(torch.tensor(float(index))).tolist(),
        "gather nested": [t.tolist() for t in accelerator.gather([values[0], values[1]])],
        "gather dict": {k: v.tolist() for k, v in accelerator.gather({"a": values[:, 0]}).items()},
        "gather objects": gather_object(mine),
        "gather_for_metrics": accelerator.gather_for_metrics(values).tolist(),
        "gather_for_metrics objects": accelerator.gather_for_metrics(mine, use_gather_object=True),
        "sum": accelerator.reduce(values, reduction="sum").tolist(),
        "mean": accelerator.reduce(values, reduction="mean").tolist(),
        "scaled sum": accelerator.reduce(values, reduction="sum", scale=0.5).tolist(),
        "padded": padded.tolist(),
        "padded first": pad_across_processes(ragged, pad_first=True).tolist(),
        "gather padded": accelerator.gather(padded).tolist(),
        "broadcast": broadcast(number, from_process=0).tolist(),
        "broadcast objects": broadcast_object_list(from_main),
    }


def splits(accelerator):
    found = {}
    tensor = torch.arange(5)
    for name, data in {"list": list("abcde"), "tensor": tensor, "dict": {"x": tensor, "y": list("abcde")}}.items():
        for padding in (False, True):
            with accelerator.split_between_processes(data, apply_padding=padding) as part:
                as_lists = {k: list(v) for k, v in part.items()} if isinstance(part, dict) else list(part)
                found[f"{name}, padding {padding}"] = repr(as_lists)
    return found


def control(accelerator, out):
    """Leaves a file per call, so that the test can count who ran what in the whole world."""

    def leave(what):
        write(out / "calls" / f"{what}.{rank()}", None)

    accelerator.on_main_process(lambda: leave("on_main_process"))()
    accelerator.on_local_main_process(lambda: leave("on_local_main_process"))()
    accelerator.on_last_process(lambda: leave("on_last_process"))()
    accelerator.on_process(lambda: leave("on_process"), process_index=0)()
    if accelerator.is_main_process:
        leave("is_main_process")
    if accelerator.is_local_main_process:
        leave("is_local_main_process")
    if accelerator.is_last_process:
        leave("is_last_process")

    cache = out / "prepared by main"
    with accelerator.main_process_first():
        found = cache.exists()
        if accelerator.is_main_process:
            time.sleep(0.5)
            write(cache, None)
    with accelerator.local_main_process_first():
        found_local = cache.exists()

    time.sleep(0.1 * rank())
    write(out / "barrier" / f"{rank()}", None)
    accelerator.wait_for_everyone()
    waited_for = sorted(path.name for path in (out / "barrier").iterdir())
    accelerator.wait_for_everyone()

    triggered = []
    for step in range(4):
        if step == 1 and accelerator.is_main_process:
            accelerator.set_trigger()
        if step == 2 and accelerator.process_index == accelerator.num_processes - 1:
            accelerator.set_trigger()
        triggered.append(accelerator.check_trigger())
    return {
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
        "local_process_index": accelerator.local_process_index,
        "main": accelerator.is_main_process,
        "main was first": accelerator.is_main_process or found,
        "local main was first": found_local,
        "waited for": waited_for,
        "triggered": triggered,
    }


def log(accelerator):
    logging.basicConfig(level=logging.INFO)
    logger = get_logger("script")
    logger.info("LOGGED BY MAIN", main_process_only=True)
    logger.info("LOGGED IN ORDER", main_process_only=False, in_order=True)
    accelerator.print("PRINTED BY MAIN")


def main():
    args, _ = arguments().parse_known_args()
    accelerator = Accelerator()
    found = {"collectives": collectives(accelerator), "splits": splits(accelerator)}
    found["control"] = control(accelerator, args.out)
    log(accelerator)
    write_rank(args.out, found)


if __name__ == "__main__":
    main()
