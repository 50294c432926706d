"""Make what a fine-tuning example needs, without the network: a text, a tokenizer trained on it, a small checkpoint.

The text is the source of Python's own standard library, several megabytes that every machine has.

    python examples/make_checkpoint.py --output out/checkpoint --text out/corpus.txt
"""

import argparse
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def read_corpus(max_bytes: int, seed: int) -> list[str]:
    """Standard library modules in a random order, as many as fit; third-party packages and test suites left out."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(
        path
        for path in library.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests", "__pycache__"} & set(path.relative_to(library).parts)
    )
    random.Random(seed).shuffle(sources)
    documents, size = [], 0
    for path in sources:
        document = path.read_text(encoding="utf-8", errors="replace")
        if size + len(document) <= max_bytes:
            documents.append(document)
            size += len(document)
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], length=len(documents), show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def build_config(arch: str, vocab_size: int, end_of_text: int):
    """A few million parameters, deep and narrow: no matrix has a hundred thousand.

    torch adds up a tensor's norm on the CPU in fp32, one element after the other. At half a million elements it is 1e-5
    too small, so that two runs that cut the tensor differently could not be compared to that precision.
    """
    # The usual 0.02 suits widths of thousands; a narrow model needs more, or its first steps are ill-conditioned.
    common = {"vocab_size": vocab_size, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    common["initializer_range"] = 0.06
    if arch == "llama":
        return LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,  # grouped-query attention, as every recent model has
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **common,
        )
    # No dropout: two runs that draw different masks cannot be compared number by number.
    return GPT2Config(
        n_embd=128, n_layer=12, n_head=8, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common
    )


def roughen(model: torch.nn.Module) -> None:
    """Norm weights around one and biases around zero, not exactly there.

    A freshly initialised model is too symmetric: every element of a norm is the same, so a run that mixes up which
    rank holds which would not be noticed. A trained checkpoint is not like that, and this one should not be either.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                center = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(mean=center, std=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="file for the training text")
    parser.add_argument("--arch", choices=["llama", "gpt2"], default="llama")
    parser.add_argument("--vocab-size", type=int, default=767, help="odd by default: no number of ranks divides it")
    parser.add_argument("--text-bytes", type=int, default=600_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    documents = read_corpus(args.text_bytes, args.seed)
    args.text.parent.mkdir(parents=True, exist_ok=True)
    args.text.write_text("\n".join(documents), encoding="utf-8")

    tokenizer = train_tokenizer(documents, args.vocab_size)
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(build_config(args.arch, len(tokenizer), tokenizer.eos_token_id))
    roughen(model)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    print(f"{args.text}: {len(documents)} modules, {args.text.stat().st_size / 1e6:.1f} MB")
    print(f"{args.output}: {args.arch}, {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
