"""Load a checkpoint with plain transformers, compare it with another one, continue a prompt. Prints one JSON object.

python examples/check_checkpoint.py out/tp --reference out/single --prompt "import os"
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def weight_difference(model: torch.nn.Module, reference: torch.nn.Module) -> tuple[float, str]:
    """The largest absolute difference of any weight, and whose it is."""
    weights, expected = model.state_dict(), reference.state_dict()
    if weights.keys() != expected.keys():
        raise SystemExit(f"different weights in the two checkpoints: {sorted(weights.keys() ^ expected.keys())}")
    differences = {name: (weights[name] - expected[name]).abs().max() for name in expected}
    # max() can lose a nan
    return max((float(difference.nan_to_num(nan=torch.inf)), name) for name, difference in differences.items())


def continue_prompt(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    # Greedy, so that two checkpoints can be compared; a barely trained model would repeat one token for ever.
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, no_repeat_ngram_size=2)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()

    models, texts = [], []
    for folder in (args.checkpoint, args.reference):
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        # from_pretrained fills what a checkpoint lacks with random numbers and only warns.
        problems = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
        if problems:
            raise SystemExit(f"{folder} is not a complete checkpoint: {problems}")
        models.append(model.eval())
        texts.append(continue_prompt(model, AutoTokenizer.from_pretrained(folder), args.prompt, args.max_new_tokens))

    difference, name = weight_difference(*models)
    report = {"weight_difference": difference, "weight": name, "continuation": texts[0], "reference": texts[1]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
