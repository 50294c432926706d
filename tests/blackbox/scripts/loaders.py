"""Every kind of data loader; each process writes which samples it got, and with which random numbers.

Scripts without a seed come first, while nothing has been seeded yet in this process.
"""

from __future__ import annotations

import random

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from common import arguments, write_rank
from torch.utils.data import DataLoader, Dataset, IterableDataset


class Numbers(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


class Stream(IterableDataset):
    """Shards itself over workers, as a stream has to; with `shuffled` it visits in an order of its own making."""

    def __init__(self, size, shuffled=False):
        self.size, self.shuffled = size, shuffled

    def __iter__(self):
        order = list(range(self.size))
        if self.shuffled:
            random.shuffle(order)
        worker = torch.utils.data.get_worker_info()
        yield from order[worker.id :: worker.num_workers] if worker else order


def noisy(samples):
    """A collator like those that mask or augment: it draws from every generator a script may use."""
    return {
        "id": torch.tensor(samples),
        "torch": torch.rand(len(samples)),
        "python": torch.tensor([random.random() for _ in samples], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy.random.rand(len(samples))),
    }


def texts(samples):
    """Not everything in a batch is a tensor."""
    return {"id": torch.tensor(samples), "text": [f"{s}: {random.random()}" for s in samples], "none": None}


# name: data set, DataLoader options, DataLoaderConfiguration options
UNSEEDED = {
    "unseeded shuffled": (Numbers(11), {"shuffle": True}, {}),
    "unseeded shuffled, workers": (Numbers(11), {"shuffle": True, "num_workers": 2}, {}),
    "unseeded shuffled, dispatched": (Numbers(11), {"shuffle": True}, {"dispatch_batches": True}),
    "unseeded shuffled, batches split": (Numbers(12), {"shuffle": True, "batch_size": 4}, {"split_batches": True}),
    "unseeded seedable sampler": (Numbers(11), {"shuffle": True}, {"use_seedable_sampler": True}),
    "unseeded stream": (Stream(11), {}, {}),
    "unseeded stream, not dispatched": (Stream(11), {}, {"dispatch_batches": False}),
    "unseeded stream, own order": (Stream(11, shuffled=True), {}, {}),
}
SEEDED = {
    "in order": (Numbers(11), {}, {}),
    "in order, last dropped": (Numbers(11), {"drop_last": True}, {}),
    "in order, last not evened": (Numbers(11), {}, {"even_batches": False}),
    "shuffled": (Numbers(11), {"shuffle": True}, {}),
    "shuffled, batch of one left": (Numbers(13), {"shuffle": True, "batch_size": 3}, {}),
    "shuffled, workers": (Numbers(11), {"shuffle": True, "num_workers": 2, "persistent_workers": True}, {}),
    "shuffled, dispatched": (Numbers(11), {"shuffle": True}, {"dispatch_batches": True}),
    "shuffled, batches split": (Numbers(14), {"shuffle": True, "batch_size": 4}, {"split_batches": True}),
    "shuffled, split, dispatched": (
        Numbers(14),
        {"shuffle": True, "batch_size": 4},
        {"split_batches": True, "dispatch_batches": True},
    ),
    "seedable sampler": (Numbers(11), {"shuffle": True}, {"use_seedable_sampler": True}),
    "weighted sampler": (
        Numbers(11),
        {"sampler": torch.utils.data.WeightedRandomSampler([1.0 + i for i in range(11)], 11)},
        {},
    ),
    "stream": (Stream(11), {}, {}),
    "stream, not dispatched": (Stream(11), {}, {"dispatch_batches": False}),
    "stream, own order, workers": (Stream(12, shuffled=True), {"num_workers": 2}, {"dispatch_batches": False}),
    "stream, split": (Stream(12), {"batch_size": 4}, {"split_batches": True, "dispatch_batches": False}),
    "shuffled, texts": (Numbers(11), {"shuffle": True, "collate_fn": texts}, {}),
    "seed by device": (Numbers(11), {"shuffle": True}, {}),
}


def visit(dataset, options, configuration):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(**configuration))
    before = DataLoader(dataset, **{"batch_size": 2, "collate_fn": noisy} | options)
    loader = accelerator.prepare(before)
    sized = not isinstance(dataset, IterableDataset)
    seen = {"batches": [], "counted": [], "ends": [], "length": len(loader) if sized else None}
    seen["total_batch_size"] = getattr(loader, "total_batch_size", None)  # a stream has none
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            seen["ends"].append([loader.end_of_dataloader, loader.remainder])
            seen["batches"].append(
                {key: getattr(value, "tolist", lambda value=value: value)() for key, value in batch.items()}
            )
            if configuration.get("even_batches", True):
                seen["counted"] += accelerator.gather_for_metrics(batch["id"]).tolist()
    return seen


def draws():
    """What the script itself draws next, say as noise for its inputs."""
    return {"torch": torch.rand(2).tolist(), "python": random.random(), "numpy": numpy.random.rand()}


def main():
    args, _ = arguments().parse_known_args()
    process = Accelerator().process_index
    seen = {name: visit(*case) for name, case in UNSEEDED.items()}
    for name, case in SEEDED.items():
        set_seed(5, device_specific=name == "seed by device")
        seen[name] = visit(*case) | {"after": draws()}
    write_rank(args.out, {"process": process, "unseeded": list(UNSEEDED), "seeded": list(SEEDED), "seen": seen})


if __name__ == "__main__":
    main()
