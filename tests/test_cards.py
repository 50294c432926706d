"""HF Trainer and TRL on a node of eight (stubbed) GPUs: a process is one device, also when it is the only process."""

from __future__ import annotations

import json
import os
import unittest.mock
import warnings
from pathlib import Path
from typing import Any

import pytest
from fresh import scripts
from models import batch, build, config_for

WORDS = ["<pad>", "<bos>", "<eos>", *(f"w{number}" for number in range(94))]


def seen(args: Any, trainer: Any, cards: Any) -> None:
    """Write what this rank's trainer was, for :func:`found`."""
    import torch

    from tp_plugin.runtime.runtime import current

    runtime: Any = current()
    wrapped = trainer.model_wrapped
    barriers: list[Any] = []
    with (
        unittest.mock.patch.object(torch.distributed, "get_backend", lambda: "nccl"),
        unittest.mock.patch.object(torch.distributed, "barrier", lambda device_ids: barriers.append(device_ids)),
    ):
        trainer.accelerator.wait_for_everyone()
    rng = next(Path(args.output_dir, "checkpoint-2").glob("rng_state*.pth"))
    Path(args.output_dir, f"rank{os.environ['RANK']}.json").write_text(
        json.dumps(
            {
                "device": str(args.device), "current": cards.current, "n_gpu": args.n_gpu, "world": args.world_size,
                "batch": args.train_batch_size, "eval batch": args.eval_batch_size, "parallel": len(cards.parallel),
                "mode": args.parallel_mode.value, "type": args.distributed_state.distributed_type.value,
                "wrapped": type(wrapped).__name__, "ddp": cards.device_ids, "sharded": len(runtime.models),
                "mapped": getattr(trainer.model, "hf_device_map", None), "steps": trainer.state.global_step,
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                "scalar": list(trainer.accelerator.gather(torch.tensor(1.0)).shape),
                "barrier": barriers, "generators": type(torch.load(rng, weights_only=False)["cuda"]).__name__,
                "saved": sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*")),
            }
        )
    )  # fmt: skip


def settings(out: str) -> dict[str, Any]:
    return {
        "output_dir": out, "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True,
        "logging_steps": 1, "dataloader_pin_memory": False, "bf16": False, "save_steps": 2, "optim": "sgd",
    }  # fmt: skip


def hf_trainer(folder: str, out: str) -> None:
    from cards import Cards
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    cards = Cards()
    args = TrainingArguments(**settings(out))
    rows = batch(97, 0, 8)
    data = [{name: rows[name][i] for name in ("input_ids", "labels")} for i in range(8)]
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")  # as on one card: it is all that one has
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    seen(args, trainer, cards)


def trl_trainer(folder: str, out: str) -> None:
    from cards import Cards
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    cards = Cards()
    args = SFTConfig(**settings(out), max_length=8)
    data = Dataset.from_dict({"text": [" ".join(WORDS[5 + i : 13 + i]) for i in range(8)]})
    trainer = SFTTrainer(folder, args, train_dataset=data)
    trainer.train()
    seen(args, trainer, cards)


def accelerate_alone(folder: str, out: str, on_cards: bool) -> None:
    """What Accelerate does on several processes is left out where there is one."""
    import torch
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD
    from cards import Cards
    from transformers import AutoModelForCausalLM, TrainingArguments

    cards = Cards() if on_cards else None
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found: dict[str, Any] = {"type": type(model).__name__, "kind": accelerator.distributed_type.value}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with accelerator.join_uneven_inputs([model], even_batches=False):
            accelerator.backward(model(**batch(97, 0)).loss)
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=1) as local, accelerator.no_sync(model):
        optimizer.step()
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        local.step()
        found["averaged"] = all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    one = torch.tensor(2.0)
    with accelerator.main_process_first():
        found["gathered"] = accelerator.gather(one).tolist(), accelerator.reduce(one, "sum").item()
    if accelerator.is_main_process:  # it asks nobody
        found["lonely"] = (
            accelerator.gather(one).tolist(),
            accelerator.gather_for_metrics(["a"], use_gather_object=True),
        )
    found["loss"] = model(**batch(97, 1)).loss.item()
    found["card"] = str(accelerator.device), cards and cards.current
    args = TrainingArguments(output_dir=out)
    found["args"] = args.n_gpu, args.parallel_mode.value
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("on_cards", [False, True])
def test_one_process_averages_with_nobody(on_cards: bool, model_folder: str, tmp_path: Path) -> None:
    use_cpu = str(not on_cards).lower()
    given = (model_folder, str(tmp_path), on_cards)
    ended = scripts(2, accelerate_alone, *given, folder=tmp_path, ACCELERATE_USE_CPU=use_cpu)
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.said for rank in ended)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank, found in enumerate(ranks):
        assert found["type"] == "LlamaForCausalLM" and found["averaged"] and found["gathered"] == [2.0, 2.0]
        assert found["kind"] == ("MULTI_GPU" if on_cards else "MULTI_CPU")
        assert found["card"] == ([f"cuda:{rank}", rank] if on_cards else ["cpu:0", None])
        assert found["args"] == [int(on_cards), "not_parallel"] and "parallel_mode" not in ended[rank].said
    assert ranks[0]["lonely"] == [2.0, ["a"]] and ranks[0]["loss"] == ranks[1]["loss"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("model"))
    build(config_for("llama"), 0).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("case", [hf_trainer, trl_trainer])
def test_a_process_has_one_card(case: Any, dp: int, model_folder: str, tmp_path: Path) -> None:
    ended = scripts(2 * dp, case, model_folder, str(tmp_path), folder=tmp_path, ACCELERATE_USE_CPU="false")
    assert [rank.code for rank in ended] == [0] * 2 * dp, "\n".join(rank.said for rank in ended)
    for rank, one in enumerate(ended):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (found["device"], found["current"], found["n_gpu"]) == (f"cuda:{rank}", rank, 1)
        mode = "distributed" if dp > 1 else "not_parallel"
        assert (found["mode"], found["type"], found["world"]) == (mode, "MULTI_GPU", dp)
        assert found["barrier"] == ([[rank]] if dp > 1 else [])
        assert found["generators"] == ("list" if dp > 1 else "Tensor"), "of all cards, or of one's own"
        assert (found["batch"], found["eval batch"]) == (2, 8)
        assert (found["parallel"], found["mapped"], found["sharded"], found["steps"]) == (0, None, 1, 2)
        assert found["ddp"] == ([[rank]] if dp > 1 else [])
        assert found["wrapped"] == ("DistributedDataParallel" if dp > 1 else "LlamaForCausalLM")
        assert found["scalar"] == ([dp] if dp > 1 else []), "a process gathers from itself what it gave"
        assert found["saved"] == ["checkpoint-2"]
        assert "parallel_mode" not in one.said, one.said
    assert len({tuple(json.loads((tmp_path / f"rank{r}.json").read_text())["losses"]) for r in range(2 * dp)}) == 1
