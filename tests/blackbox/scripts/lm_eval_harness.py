"""lm-evaluation-harness on a prepared model: its HF backend, two tasks that lie here, no hub."""

from __future__ import annotations

import json

import torch
from accelerate import Accelerator
from common import arguments, write
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, 131))]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICES = """
task: local_choices
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
CONTINUED = """
task: local_continued
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: ["w7"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def main():
    args = arguments().parse_args()
    accelerator = Accelerator()
    generator = torch.Generator().manual_seed(5)

    def text(length):
        return " ".join(WORDS[token] for token in torch.randint(4, 131, (length,), generator=generator))

    documents = [
        {"question": text(6 + number % 5), "choices": [" " + text(2) for _ in range(3)], "answer": number % 3}
        | {"target": text(3)}
        for number in range(10)
    ]
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            data = args.out / "documents.jsonl"
            data.write_text("\n".join(json.dumps(document) for document in documents))
            (args.out / "tasks").mkdir()
            for name, task in (("choices", CHOICES), ("continued", CONTINUED)):
                (args.out / "tasks" / f"{name}.yaml").write_text(COMMON.format(data=data) + task)
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(args.models / args.model)).eval()
    harness = HFLM(
        pretrained=accelerator.unwrap_model(model),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        batch_size=4,
        max_length=32,
    )
    found = simple_evaluate(
        harness,
        tasks=["local_choices", "local_continued"],
        task_manager=TaskManager(include_path=str(args.out / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    if accelerator.is_main_process:  # the harness gives its results on one rank
        samples = {
            task: [[sample["doc_id"], sample["resps"], sample["filtered_resps"]] for sample in samples]
            for task, samples in found["samples"].items()
        }
        write(args.out / "report.json", json.loads(json.dumps({"results": found["results"], "samples": samples})))


if __name__ == "__main__":
    main()
