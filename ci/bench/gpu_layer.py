#!/usr/bin/env python
"""One rank's decoder layer of a tp = 8 world on one GPU, at the shapes of Llama-3-8B and -70B, in bf16.

The other ranks are PyTorch's fake process group (alone.py): what is timed is what the rank computes, without what it
waits for. Contenders take turns: the unsharded layer, the same through the plugin at tp = 1, this rank's share at tp,
and the share compiled. Forward and backward; medians.

    python ci/bench/gpu_layer.py                          # on a card; gpu.py keeps what it finds
    python ci/bench/gpu_layer.py --device cpu --tiny      # the same without one, small: does it run?

Prints tables, and all figures in JSON as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

import alone  # noqa: E402
import torch  # noqa: E402
from formulas import Llama  # noqa: E402

SHAPES = {
    "Llama-3-8B": Llama(layers=1, hidden=4096, inner=14336, heads=32, groups=8, vocabulary=256),
    "Llama-3-70B": Llama(layers=1, hidden=8192, inner=28672, heads=64, groups=8, vocabulary=256),
}
"""Of the vocabulary nothing is measured."""
TINY = {"tiny": Llama(layers=1, hidden=128, inner=256, heads=16, groups=8, vocabulary=256)}

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bf16 operations a second, by the vendor's data sheets (SXM where there are several)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape instead of Llama's")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=0, help="default 8192, tiny 64")
    parser.add_argument("--rounds", type=int, default=0, help="timed turns; default 30, tiny 5")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled contender")
    args = parser.parse_args()
    args.tokens = args.tokens or (64 if args.tiny else 8192)
    args.rounds = args.rounds or (5 if args.tiny else 30)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; --device cpu --tiny only shows that the program runs")

    report: dict[str, Any] = {"about": about(args), "shapes": {}}
    alone.enter(args.tp)
    for name, llama in (TINY if args.tiny else SHAPES).items():
        report["shapes"][name] = measure(llama, args)
    print(markdown(report))
    print(json.dumps(report))


class Contender:
    """A layer in its mesh, with inputs."""

    def __init__(self, llama: Llama, args: argparse.Namespace, tp: int, through: bool, compiled: bool = False):
        from transformers import LlamaConfig, LlamaForCausalLM

        import tp_plugin

        self.device = torch.device(args.device)
        self.mesh = alone.use(alone.mesh_of(tp))
        config = LlamaConfig(
            vocab_size=llama.vocabulary, hidden_size=llama.hidden, intermediate_size=llama.inner, num_hidden_layers=1,
            num_attention_heads=llama.heads, num_key_value_heads=llama.groups, attn_implementation="sdpa",
            max_position_embeddings=args.tokens,
        )  # fmt: skip
        torch.manual_seed(0)
        with self.device:
            model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        if through:
            tp_plugin.parallelize(model, tp_size=tp)
        self.model, self.layer = model, model.model.layers[0]
        self.parameters = sum(p.numel() * p.element_size() for p in self.layer.parameters())
        self.x = torch.randn(args.batch, args.tokens, llama.hidden, device=self.device, dtype=torch.bfloat16)
        self.x.requires_grad_()
        self.grad = torch.randn_like(self.x)
        positions = torch.arange(args.tokens, device=self.device)[None]
        self.rotary = model.model.rotary_emb(self.x, positions)
        self.run: Any = torch.compile(self.layer, fullgraph=True) if compiled else self.layer
        self.times: list[float] = []

    def step(self, timed: bool = False) -> None:
        """Forward and backward of the layer."""
        alone.use(self.mesh)
        self._wait()
        started = time.perf_counter()
        self._forward().backward(self.grad)
        self._wait()
        if timed:
            self.times.append(time.perf_counter() - started)
        self.layer.zero_grad()
        self.x.grad = None

    def _forward(self) -> torch.Tensor:
        output = self.run(self.x, position_embeddings=self.rotary)
        return output[0] if isinstance(output, tuple) else output

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> dict[str, int]:
        """Bytes that the forward leaves for the backward, and the most at one time beyond parameters and inputs."""
        alone.use(self.mesh)
        if self.device.type == "cpu":
            from memory import LiveBytes

            with LiveBytes((*self.layer.parameters(), self.x, *self.rotary, self.grad)) as live:
                output = self._forward()
                kept = live.live - output.untyped_storage().nbytes()
                output.backward(self.grad)
            peak = live.peak
        else:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            output = self._forward()
            kept = torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
            output.backward(self.grad)
            peak = torch.cuda.max_memory_allocated() - before
        self.layer.zero_grad()
        self.x.grad = None
        return {"kept": kept, "peak": peak}


def measure(llama: Llama, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders at one shape."""
    contenders = {
        "unsharded": Contender(llama, args, 1, through=False),
        "tp 1 through the plugin": Contender(llama, args, 1, through=True),
        f"rank of tp {args.tp}": Contender(llama, args, args.tp, through=True),
    }
    if not args.no_compile:
        contenders[f"rank of tp {args.tp}, compiled"] = Contender(llama, args, args.tp, through=True, compiled=True)
    for turn in range(3 + args.rounds):
        for contender in contenders.values():
            contender.step(timed=turn >= 3)
    whole = statistics.median(contenders["unsharded"].times)
    peak = _peak(args.device)
    results = {}
    for name, contender in contenders.items():
        tp = contender.mesh.tp_size
        seconds = statistics.median(contender.times)
        flops = llama.layer_flops(args.batch, args.tokens) / tp
        results[name] = {
            "tp": tp,
            "seconds": seconds,
            "to its share of the unsharded": seconds / (whole / tp),
            "flops per second": flops / seconds,
            "mfu": flops / seconds / peak if peak else None,
            "parameters": contender.parameters,
            "parameters by formula": 2 * llama.layer_parameters(tp),
            "kept by formula": llama.kept_by_layer_in_bf16(args.batch, args.tokens, tp),
            **({} if "compiled" in name and args.device == "cpu" else contender.memory()),
        }
    return results


def _peak(device: str) -> float | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((flops for card, flops in PEAK.items() if card in name), None)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The card and the versions."""
    import transformers

    cuda = args.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else os.sysconf("SC_PHYS_PAGES") * 4096,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch": args.batch,
        "tokens": args.tokens,
        "rounds": args.rounds,
    }


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    found = report["about"]
    lines = [
        "# A decoder layer on one GPU, as one rank of a tensor-parallel world",
        "",
        f"{found['device']}, torch {found['torch']}, CUDA {found['cuda']}, transformers {found['transformers']}; bf16, "
        f"{found['batch']} x {found['tokens']} tokens, forward and backward, median of {found['rounds']}. The other "
        "ranks are PyTorch's fake process group: no time of communication.",
    ]
    for name, results in report["shapes"].items():
        lines += [
            "",
            f"## {name}",
            "",
            "| | ms | to its share of the unsharded | MFU | parameters (to formula) | kept activations (to formula) |"
            " peak |",
            "|---|---|---|---|---|---|---|",
        ]
        for contender, each in results.items():
            mfu = f"{each['mfu']:.1%}" if each["mfu"] else "–"
            held = f"{each['parameters'] / 1e6:.1f} MB ({each['parameters'] / each['parameters by formula']:.3f})"
            kept = (
                f"{each['kept'] / 1e6:.1f} MB ({each['kept'] / each['kept by formula']:.3f})" if "kept" in each else "–"
            )
            peak = f"{each['peak'] / 1e6:.1f} MB" if "peak" in each else "–"
            ratio = f"{each['to its share of the unsharded']:.3f}"
            lines.append(f"| {contender} | {1000 * each['seconds']:.2f} | {ratio} | {mfu} | {held} | {kept} | {peak} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
