"""Loss scaling: one row of the embedding overflows, which is on one device only when a process is several devices wide.

The checkpoint's first and last rows are tiny, so the first norm blows their gradients up, to thousands of times anybody
else's: with the right scale they alone are infinite. Both ends of the vocabulary have their turn.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import arguments, write, write_rank
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

SCALE = 2.0**112


def main():
    args = arguments().parse_args()
    accelerator = Accelerator()
    set_seed(1)
    model = AutoModelForCausalLM.from_pretrained(args.models / args.model, rms_norm_eps=1e-14)
    last = model.config.vocab_size - 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6)
    steps = []
    # tokens of both halves of the vocabulary, then with the row that overflows: first, last; and a good step after each
    for special in (None, 0, None, last, None):
        tokens = torch.tensor([[5, 100, 7, 90, 50], [120, 3, 60, 11, 80]])
        if special is not None:
            tokens[0, 2] = special
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        finite = [bool(p.grad.isfinite().all()) for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps.append({"loss": loss.item(), "scale": scaler.get_scale(), "infinite here": finite.count(False)})
    state = accelerator.get_state_dict(model)
    write_rank(args.out, {"steps": steps})
    if accelerator.is_main_process:
        save_file({name: tensor.clone() for name, tensor in state.items()}, args.out / "state.safetensors")
        write(args.out / "report.json", {"steps": steps})


if __name__ == "__main__":
    main()
