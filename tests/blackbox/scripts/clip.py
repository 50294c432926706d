"""Short trainings, each with another way to clip, another optimizer, another thing done to the model before."""

from __future__ import annotations

# before accelerate, as many scripts do: a name that was bound early must not miss anything
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm  # isort: split

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Sentences, arguments, collate, save_whole, write, write_rank
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

STEPS = 3


def by_shape(model):
    """Decay matrices, not vectors: a grouping that looks at shapes only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def freeze(model):
    """Train attention only, and of the biases none."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn" in name and not name.endswith("bias"))


def freeze_embeddings(model):
    model.get_input_embeddings().weight.requires_grad_(False)


def total_norm_of(kind):
    def norm(accelerator, model):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return get_total_norm(grads, norm_type=kind)

    return norm


def torch_clip(limit, kind, **options):
    return lambda accelerator, model: clip_grad_norm_(model.parameters(), limit, norm_type=kind, **options)


def torch_clip_value(accelerator, model):
    clip_grad_value_(model.parameters(), 0.02)
    return total_norm_of(2.0)(accelerator, model)


def accelerate_clip_value(accelerator, model):
    accelerator.clip_grad_value_(model.parameters(), 0.01)
    return total_norm_of(float("inf"))(accelerator, model)


def accelerate_clip(limit, kind=2):
    return lambda accelerator, model: accelerator.clip_grad_norm_(model.parameters(), limit, norm_type=kind)


def by_group(accelerator, model):
    """Clip a part of the model: vectors and matrices apart, as some recipes do."""
    matrices = clip_grad_norm_([p for p in model.parameters() if p.grad is not None and p.ndim >= 2], 0.5)
    vectors = clip_grad_norm_([p for p in model.parameters() if p.grad is not None and p.ndim < 2], 0.1)
    return matrices + vectors


def sgd(model):
    return torch.optim.SGD(by_shape(model), lr=0.05, momentum=0.9, nesterov=True)


def adamw(model):
    return torch.optim.AdamW(by_shape(model), lr=1e-3)


def foreach(model):
    return torch.optim.AdamW(by_shape(model), lr=1e-3, foreach=True)


def fused(model):
    return torch.optim.AdamW(by_shape(model), lr=1e-3, fused=True)


def gradients(model):
    """One huge step of bare descent: what is saved afterwards is the gradient, to many digits."""
    return torch.optim.SGD(model.parameters(), lr=1e4)


def checkpointing(reentrant):
    return lambda model: model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def resize(rows):
    return lambda model: model.resize_token_embeddings(rows)


def nothing(model):
    pass


# name: model, what is done to it first, optimizer, clipping, steps
CASES = {
    "gradients of llama": ("llama", nothing, gradients, total_norm_of(2.0), 1),
    "gradients of llama_tied": ("llama_tied", nothing, gradients, total_norm_of(2.0), 1),
    "gradients of gpt2": ("gpt2", nothing, gradients, total_norm_of(2.0), 1),
    "2-norm, foreach": ("llama_tied", nothing, foreach, torch_clip(0.5, 2.0), STEPS),
    "foreach 2-norm, fused": ("gpt2", nothing, fused, torch_clip(0.5, 2.0, foreach=True), STEPS),
    "inf-norm, fused": ("llama", nothing, fused, torch_clip(0.05, float("inf")), STEPS),
    "1-norm, momentum, checkpointing": ("gpt2", checkpointing(False), sgd, torch_clip(5.0, 1.0), STEPS),
    "torch's values, frozen": ("llama_tied", freeze, sgd, torch_clip_value, STEPS),
    "accelerate's values, frozen embeddings": ("gpt2", freeze_embeddings, sgd, accelerate_clip_value, STEPS),
    "accelerate's 3-norm, checkpointing": ("llama", checkpointing(False), sgd, accelerate_clip(0.2, 3), STEPS),
    "by group, grown": ("llama", resize(137), adamw, by_group, STEPS),
    "grown, tied, reentrant checkpointing": (
        "gpt2",
        lambda model: (resize(115)(model), checkpointing(True)(model)),
        adamw,
        accelerate_clip(0.5),
        STEPS,
    ),
    "shrunk, tied, reentrant checkpointing": (
        "llama_tied",
        lambda model: (resize(101)(model), checkpointing(True)(model)),
        adamw,
        torch_clip(0.5, 2.0),
        STEPS,
    ),
}


def train(args, name, precision="no", cases=CASES):
    checkpoint, change, build_optimizer, clip, steps = cases[name]
    accelerator = Accelerator(mixed_precision=precision)
    set_seed(3)
    model = AutoModelForCausalLM.from_pretrained(args.models / checkpoint)
    change(model)
    optimizer = build_optimizer(model)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "group sizes": [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups],
        "vocab_size": model.config.vocab_size,
        "rows": model.get_input_embeddings().weight.shape[0],
        "losses": [],
        "norms": [],
    }
    samples = Sentences(4 * steps, min(100, model.config.vocab_size), 4)
    loader = DataLoader(samples, batch_size=2, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for _, batch in zip(range(steps), loader, strict=False):
        batch.pop("ids")
        loss = model(**batch).loss
        accelerator.backward(loss)
        found["norms"].append(float(clip(accelerator, model)))
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
    save_whole(accelerator, model, args.out / "states", name)
    accelerator.free_memory()
    return found


def main():
    args, _ = arguments().parse_known_args()
    found = {name: train(args, name) for name in CASES}
    write_rank(args.out, found)
    if Accelerator().is_main_process:
        write(args.out / "report.json", found)


if __name__ == "__main__":
    main()
