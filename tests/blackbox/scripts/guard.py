"""A loader that nobody prepared, sharded by LOCAL_RANK: right on the first steps, by chance, and wrong afterwards."""

from __future__ import annotations

import os
import time
import traceback

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Sentences, arguments, collate, write_rank
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM


class EveryoneForThemselves(Sampler):
    """The same samples for everybody up to some step, then every rank its own."""

    def __init__(self, size: int, same: int):
        self.size, self.same = size, same

    def __iter__(self):
        yield from range(self.same)
        yield from range(self.same + int(os.environ.get("LOCAL_RANK", 0)), self.size)

    def __len__(self):
        return self.size


def main():
    parser = arguments()
    parser.add_argument("--same", type=int, required=True, help="samples that are the same on all ranks")
    parser.add_argument("--ragged", action="store_true", help="batches of different lengths")
    args = parser.parse_args()
    accelerator = Accelerator()
    set_seed(1)
    model = AutoModelForCausalLM.from_pretrained(args.models / args.model)
    samples = Sentences(
        16, model.config.vocab_size, 9, shortest=5 if args.ragged else 8, longest=20 if args.ragged else 8
    )
    loader = DataLoader(samples, batch_size=2, sampler=EveryoneForThemselves(16, args.same), collate_fn=collate)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    found = {"losses": [], "error": None}
    started = time.monotonic()
    try:
        for batch in loader:
            batch.pop("ids")
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found["losses"].append(loss.item())
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.monotonic() - started
    write_rank(args.out, found)
    if found["error"]:
        time.sleep(3)  # the launcher ends everybody as soon as one process fails: let each say why
        raise SystemExit(3)


if __name__ == "__main__":
    main()
