"""Relatives of the classic loop: other orders of preparing, teachers, own losses, wrappers, heads, generation."""

from __future__ import annotations

import traceback

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from common import Sentences, arguments, collate, save_whole, write_rank
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    get_linear_schedule_with_warmup,
)

STEPS = 4


class Regressor(nn.Module):
    """A home-made model around a pretrained one."""

    def __init__(self, path):
        super().__init__()
        self.backbone = AutoModel.from_pretrained(path)
        self.head = nn.Linear(self.backbone.config.hidden_size, 1)

    def forward(self, input_ids, attention_mask):
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden[:, 0]).squeeze(-1)


def loader_for(vocab_size, **options):
    return DataLoader(Sentences(4 * STEPS, vocab_size, 8), batch_size=2, collate_fn=collate, **options)


def train(args, name, accelerator, model, optimizer, loader, loss_of, scheduler=None):
    """The loop itself, everything being prepared."""
    found = {"losses": [], "norms": [], "lr": []}
    model.train()
    for _, batch in zip(range(STEPS), loader, strict=False):
        batch.pop("ids")
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        found["norms"].append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
            found["lr"] += scheduler.get_last_lr()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
    save_whole(accelerator, model, args.out / "states", name)
    return found


def usual_loss(model, batch):
    return model(**batch).loss


def smoothed(logits, labels):
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
    )


def load(args):
    return AutoModelForCausalLM.from_pretrained(args.models / args.model)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def optimizer_after_the_model(args, name):
    """The model is prepared first; the optimizer is built from the prepared one's parameters."""
    accelerator = Accelerator()
    model = accelerator.prepare(load(args))
    vocab_size = accelerator.unwrap_model(model).config.vocab_size
    optimizer = accelerator.prepare(adamw(model))
    loader = accelerator.prepare(loader_for(vocab_size, shuffle=True))
    return train(args, name, accelerator, model, optimizer, loader, usual_loss)


def split_batches(args, name):
    """Batches are split over the processes, so the schedule counts each step once."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    model = load(args)
    optimizer = adamw(model)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 2 * STEPS)
    prepared = accelerator.prepare(model, optimizer, loader_for(model.config.vocab_size), scheduler)
    return train(args, name, accelerator, *prepared[:3], usual_loss, prepared[3])


def teacher(args, name):
    """Distillation: the teacher is never prepared, the loss is made from logits."""
    accelerator = Accelerator()
    student = load(args)
    other = load(args).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)

    def loss_of(model, batch):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        with torch.no_grad():
            wanted = other(**batch).logits.softmax(-1)
        apart = nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
        return smoothed(logits, labels) + 0.5 * apart

    prepared = accelerator.prepare(student, adamw(student), loader_for(student.config.vocab_size, shuffle=True))
    return train(args, name, accelerator, *prepared, loss_of)


def own_embeddings(args, name):
    """The script embeds, disturbs and adds a loss on hidden states."""
    accelerator = Accelerator()
    model = load(args)

    def loss_of(model, batch):
        embedded = accelerator.unwrap_model(model).get_input_embeddings()(batch.pop("input_ids"))
        embedded = embedded + 0.01 * torch.randn_like(embedded)
        output = model(inputs_embeds=embedded, output_hidden_states=True, **batch)
        return output.loss + 0.1 * output.hidden_states[1].pow(2).mean()

    prepared = accelerator.prepare(model, adamw(model), loader_for(model.config.vocab_size))
    return train(args, name, accelerator, *prepared, loss_of)


def wrapped(args, name):
    accelerator = Accelerator()
    model = Regressor(args.models / args.model)
    vocab_size = model.backbone.config.vocab_size

    def loss_of(model, batch):
        lengths = batch.pop("labels").ne(-100).sum(1).float()
        return nn.functional.mse_loss(model(**batch), lengths / 10)

    prepared = accelerator.prepare(model, adamw(model), loader_for(vocab_size))
    return train(args, name, accelerator, *prepared, loss_of)


def classification(args, name):
    accelerator = Accelerator()
    model = AutoModelForSequenceClassification.from_pretrained(args.models / args.model, num_labels=3, pad_token_id=0)

    def loss_of(model, batch):
        batch["labels"] = batch["input_ids"].sum(1) % 3
        return model(**batch).loss

    prepared = accelerator.prepare(model, adamw(model), loader_for(model.config.vocab_size))
    return train(args, name, accelerator, *prepared, loss_of)


def two_models(args, name):
    """Two trained models, each with its optimizer."""
    accelerator = Accelerator()
    first, second = load(args), load(args)
    loader = loader_for(first.config.vocab_size, shuffle=True)
    both = accelerator.prepare(first, second, adamw(first), torch.optim.SGD(second.parameters(), lr=0.1), loader)
    first, second, one, other, loader = both
    losses = []
    for batch in loader:
        batch.pop("ids")
        for model, optimizer in ((first, one), (second, other)):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return {"losses": losses}


def skipped(args, name):
    """Resumes in the middle of an epoch; evaluates by a loader that nobody prepared, the same on every process."""
    accelerator = Accelerator()
    model = load(args)
    samples = loader_for(model.config.vocab_size)
    prepared = accelerator.prepare(model, adamw(model), loader_for(model.config.vocab_size, shuffle=True))
    model, optimizer, loader = prepared
    found = train(args, name, accelerator, model, optimizer, skip_first_batches(loader, 2), usual_loss)
    model.eval()
    with torch.no_grad():
        batches = ({k: v for k, v in batch.items() if k != "ids"} for batch in samples)
        return found | {"evaluated": [model(**batch).loss.item() for batch in batches]}


def generation(args, name):
    accelerator = Accelerator()
    plain = load(args).eval()
    prepared = accelerator.prepare(load(args)).eval()
    prompt = torch.tensor([[5, 17, 33], [8, 2, 64]])
    found = {}
    for kind, model in {"never prepared": plain, "prepared": accelerator.unwrap_model(prepared)}.items():
        for sample in (False, True):
            set_seed(13)
            tokens = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=sample, pad_token_id=0
            )
            found[f"{kind}, sample {sample}"] = tokens.tolist()
    with torch.no_grad():
        found["losses"] = [plain(input_ids=prompt, labels=prompt).loss.item()]
    return found


def evaluate(accelerator, model, loader):
    model.eval()
    losses = []
    for batch in loader:
        with torch.no_grad():
            loss = model(**{key: value for key, value in batch.items() if key != "ids"}).loss
        losses += accelerator.gather_for_metrics(loss.repeat(len(batch["ids"]))).tolist()
    model.train()
    return losses


def nested(args, name):
    """Peeks at a batch first, evaluates in the middle of an epoch, walks through two loaders at once."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = load(args)
    size = model.config.vocab_size
    loaders = loader_for(size, shuffle=True), loader_for(size, shuffle=True), loader_for(size)
    model, optimizer, *loaders = accelerator.prepare(model, adamw(model), *loaders)
    train_loader, second_loader, eval_loader = loaders
    found = {"peeked": next(iter(train_loader))["ids"].tolist(), "losses": [], "ids": [], "evaluated": []}
    for step, (batch, other) in enumerate(zip(train_loader, second_loader, strict=True)):
        found["ids"] += [batch.pop("ids").tolist(), other.pop("ids").tolist()]
        with accelerator.accumulate(model):
            loss = (model(**batch).loss + model(**other).loss) / 2
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        found["losses"].append(loss.item())
        if step == 1:
            found["evaluated"] += evaluate(accelerator, model, eval_loader)
    return found


def best_weights(args, name):
    """Keeps the best weights in memory and an average beside, goes back to the best, saves optimizer and average."""
    accelerator = Accelerator()
    model = load(args)
    # GPT-2's key biases have no gradient but rounding noise, which an eps of 1e-8 would turn into steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    loader, eval_loader = loader_for(model.config.vocab_size, shuffle=True), loader_for(model.config.vocab_size)
    model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, loader, eval_loader)
    unwrapped = accelerator.unwrap_model(model)
    average = torch.optim.swa_utils.AveragedModel(unwrapped, avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
    best = {key: value.clone() for key, value in unwrapped.state_dict().items()}
    found = {"before": evaluate(accelerator, model, eval_loader)}
    for batch in loader:
        batch.pop("ids")
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(unwrapped)
    found["trained"] = evaluate(accelerator, model, eval_loader)
    found["average"] = evaluate(accelerator, average, eval_loader)
    unwrapped.load_state_dict(best)
    found["went back"] = evaluate(accelerator, model, eval_loader)
    moments = [entry["exp_avg_sq"].double().sum().item() for entry in optimizer.state_dict()["state"].values()]
    found["moments"] = broadcast_object_list([moments if accelerator.is_main_process else None])
    state = average.module.state_dict()
    if accelerator.is_main_process:
        save_file({key: value.clone() for key, value in state.items()}, args.out / "states" / f"{name}.safetensors")
    return found


def main_process_alone(args, name):
    """Every epoch the main process alone looks at a sample and at its loss, while the others go on."""
    accelerator = Accelerator()
    model = load(args)
    prepared = accelerator.prepare(model, adamw(model), loader_for(model.config.vocab_size, shuffle=True))
    prompt = torch.tensor([[5, 17, 33]])
    found = {}
    for epoch in range(2):
        found[f"epoch {epoch}"] = train(args, name, accelerator, *prepared, usual_loss)
        seen = [None]
        if accelerator.is_main_process:
            unwrapped = accelerator.unwrap_model(prepared[0]).eval()
            with torch.no_grad():
                loss = unwrapped(input_ids=prompt, labels=prompt).loss.item()
            tokens = unwrapped.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=args.cache)
            seen = [[loss, tokens.tolist()]]
            unwrapped.train()
        found[f"seen {epoch}"] = broadcast_object_list(seen)
    return found


SECTIONS = {
    "optimizer after the model": optimizer_after_the_model,
    "split batches": split_batches,
    "teacher": teacher,
    "own embeddings": own_embeddings,
    "wrapped": wrapped,
    "classification": classification,
    "two models": two_models,
    "skipped": skipped,
    "nested": nested,
    "best weights": best_weights,
    "generation": generation,
    "main process alone": main_process_alone,  # only if asked for: where it fails, it may hang
}


def main():
    parser = arguments()
    parser.add_argument("--alone", action="store_true", help="the section of the main process alone, and no other")
    parser.add_argument("--cache", action="store_true", help="generate with a cache where the main process is alone")
    args = parser.parse_args()
    found = {}
    for name, section in SECTIONS.items():
        if (name == "main process alone") != args.alone:
            continue
        set_seed(17)
        try:
            found[name] = section(args, name)
        except Exception:  # a section that fails should not hide the others
            found[name] = {"failed": traceback.format_exc()}
        Accelerator(dataloader_config=DataLoaderConfiguration()).free_memory()
    write_rank(args.out, found)


if __name__ == "__main__":
    main()
