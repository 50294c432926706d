"""A tiny model with a tokenizer and a chat template, and local data sets: what `trl` wants to be given."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(115)]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <eos>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_data(root: Path) -> None:
    """Folders `chat`, `preference`, `completion`, `judged`, each with train.jsonl and test.jsonl."""
    chance = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))

    def chat() -> dict:
        roles = ["user", "assistant"] * chance.randint(1, 2)
        return {"messages": [{"role": role, "content": words(2, 6)} for role in roles]}

    def preference() -> dict:
        return {"prompt": words(2, 5), "chosen": " " + words(2, 7), "rejected": " " + words(2, 7)}

    def completion() -> dict:
        return {"prompt": words(2, 5), "completion": " " + words(2, 7)}

    def judged() -> dict:
        return completion() | {"label": chance.random() < 0.5}

    for make in (chat, preference, completion, judged):
        for split, count in (("train", 24), ("test", 7)):
            path = root / make.__name__ / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(make()) + "\n" for _ in range(count)))
