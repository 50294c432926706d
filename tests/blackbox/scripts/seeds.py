"""Random numbers: another seed on every process, weights from a config, dropout with and without recomputation."""

from __future__ import annotations

import hashlib
import os
import random

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Sentences, arguments, collate, write_rank
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

STEPS = 2


def seed_by_rank(seed):
    """What people write when they want processes to differ."""
    seed += int(os.environ.get("LOCAL_RANK", 0))
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def fingerprint(tensor):
    """A few numbers that move when any element does."""
    flat = tensor.detach().double().flatten()
    weights = torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64)
    return [flat.numel(), (flat * weights).sum().item(), flat.abs().sum().item(), *flat[:3].tolist()]


def save(accelerator, model, path):
    if "from config" not in path.name:
        return  # these are about what was drawn, and reading weights costs more than a step
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        path.parent.mkdir(exist_ok=True)
        save_file({key: value.clone() for key, value in state.items()}, path)


def train(args, name, model):
    accelerator = Accelerator()
    found = {"losses": [], "norms": [], "hidden": [], "logits": []}
    loader = DataLoader(Sentences(4 * STEPS, model.config.vocab_size, 6), batch_size=2, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    save(accelerator, model, args.out / "states" / f"{name}, at first.safetensors")
    model.train()
    for _, batch in zip(range(STEPS), loader, strict=False):
        batch.pop("ids")
        output = model(**batch, output_hidden_states=True)
        accelerator.backward(output.loss)
        found["norms"].append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(output.loss.item())
        found["hidden"].append([fingerprint(hidden) for hidden in output.hidden_states])
        found["logits"].append(fingerprint(output.logits))
    model.eval()
    with torch.no_grad():
        found["evaluated"] = model(**batch).loss.item()
    norms = sorted(n for n, _ in model.named_parameters() if "norm" in n or "ln_" in n)
    parameters = dict(model.named_parameters())
    found["replicated"] = {n: hashlib.sha1(parameters[n].detach().numpy().tobytes()).hexdigest() for n in norms}
    found["after"] = torch.rand(1).item()
    save(accelerator, model, args.out / "states" / f"{name}, at last.safetensors")
    accelerator.free_memory()
    return found


def attention_masks(args):
    """Which attention weights each head dropped, in one forward of the first layer."""
    set_seed(31)
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(
        args.models / "gpt2_dropout", attn_pdrop=0.5, attn_implementation="eager"
    )
    model = accelerator.prepare(model)
    model.train()
    tokens = torch.arange(24).reshape(2, 12)
    weights = model(input_ids=tokens, output_attentions=True).attentions[0]
    lower = torch.ones(12, 12).tril().bool()
    heads = (weights == 0)[:, :, lower].transpose(0, 1).flatten(1)
    return [hashlib.sha1(head.numpy().tobytes()).hexdigest() for head in heads]


def main():
    args, _ = arguments().parse_known_args()
    dropout = args.models / "gpt2_dropout"
    load = AutoModelForCausalLM.from_pretrained
    found = {}

    for name in ("llama", "gpt2"):
        config = AutoConfig.from_pretrained(args.models / name)
        seed_by_rank(100)
        found[f"{name} from config"] = train(args, f"{name} from config", AutoModelForCausalLM.from_config(config))

    seed_by_rank(200)
    found["dropout, seed by rank"] = train(args, "dropout, seed by rank", load(dropout))

    for name, specific in {"": False, ", seed by device": True}.items():
        set_seed(21, device_specific=specific)
        found[f"replicated dropout{name}"] = train(args, "replicated", load(dropout, attn_pdrop=0.0))
    for reentrant in (False, True):
        set_seed(21)
        model = load(dropout, attn_pdrop=0.0)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found[f"replicated dropout, recomputed {reentrant}"] = train(args, "recomputed", model)

    for recomputed in (None, False, True):
        set_seed(22)
        model = load(dropout)
        if recomputed is not None:
            model.gradient_checkpointing_enable({"use_reentrant": recomputed})
        found[f"dropout, recomputed {recomputed}"] = train(args, "dropout", model)
    found["dropped by head"] = attention_masks(args)
    write_rank(args.out, found)


if __name__ == "__main__":
    main()
