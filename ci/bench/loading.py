"""Loading and saving a large checkpoint on tp ranks of one host: seconds, bytes read, peak host memory.

    python ci/bench/loading.py [--gigabytes 2] [--tp 2] [--folder DIR]

Side by side: the plugin, and the same ranks with transformers' own loader (every rank looks at the whole checkpoint).
``cold`` starts with the files out of the page cache. Writes a table to standard output and ``loading.json`` in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8,
         "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip


def make(folder: Path, gigabytes: float) -> int:
    """Write a bf16 Llama checkpoint of about that size in files of 500 MB; its bytes."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_hidden_layers=1, dtype="bfloat16")
    with init_empty_weights():
        one = LlamaForCausalLM(config).num_parameters()
        config.num_hidden_layers = 2
        layer = LlamaForCausalLM(config).num_parameters() - one
        config.num_hidden_layers = max(1, round((gigabytes * 1e9 / 2 - one) / layer) + 1)
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    files: list[dict[str, Any]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        if size > 5e8:
            files.append({})
            size = 0
        files[-1][name] = tuple(parameter.shape)
        size += 2 * parameter.numel()
    total, where = 0, {}
    for number, shapes in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        where.update(dict.fromkeys(shapes, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def numbers() -> dict[str, int]:
    """Bytes this process has asked for and the disk has given, its memory and the most it was."""
    found = {}
    for path in ("/proc/self/io", "/proc/self/status"):
        for line in Path(path).read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key in ("rchar", "read_bytes"):
                found[key] = int(value)
            elif key in ("VmRSS", "VmHWM"):
                found[key] = 1024 * int(value.split()[0])
    return found


def rank_main(folder: str, how: str, dtype: str, out: str) -> None:
    """One rank: load, shard, save; prints its figures as JSON."""
    import torch
    import torch.distributed as dist
    import transformers
    from transformers import modeling_utils

    from tp_plugin.config.run_config import RunConfig
    from tp_plugin.engines import loading, saving
    from tp_plugin.runtime.start import start
    from tp_plugin.shard import parallelize

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tp = dist.get_world_size()
    os.environ["TP_PLUGIN_TP_SIZE"] = str(tp)
    if how == "plugin":
        loading.install(modeling_utils)
        saving.install(modeling_utils)
    start(RunConfig(tp))
    from transformers.models.llama import modeling_llama  # noqa: F401  (imported before the clock starts)

    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, began = numbers(), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    parallelize(model, tp)
    done, after = time.perf_counter(), numbers()
    share = sum(parameter.nbytes for parameter in model.parameters())
    file_share = sum(parameter.numel() * 2 for parameter in model.parameters())
    dist.barrier()
    found = {
        "from_pretrained s": round(loaded - began, 2), "prepare s": round(done - loaded, 2),
        "asked of share": round((after["rchar"] - before["rchar"]) / file_share, 3),
        "disk of share": round((after["read_bytes"] - before["read_bytes"]) / file_share, 3),
        "peak of share": round((after["VmHWM"] - before["VmRSS"]) / share, 3), "share MB": round(share / 1e6),
        "largest MB": round(max(p.nbytes for p in model.parameters()) / 1e6),
    }  # fmt: skip
    if out:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, began = numbers(), time.perf_counter()
        if how == "plugin" or dist.get_rank() == 0:
            model.save_pretrained(out, max_shard_size="250MB")
        dist.barrier()
        after = numbers()
        found |= {"save s": round(time.perf_counter() - began, 2)}
        found |= {"save peak MB": round((after["VmHWM"] - before["VmRSS"]) / 1e6)}
    Path(os.environ["BENCH_RESULT"] + str(dist.get_rank())).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def launch(tp: int, *args: str) -> list[dict[str, Any]]:
    """The figures of ``tp`` ranks."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as scratch:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        common = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(tp),
            "OMP_NUM_THREADS": "1", "BENCH_RESULT": f"{scratch}/rank", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, __file__, "--rank", *args]
        ranks = [subprocess.Popen(command, env={**common, "RANK": str(rank)}) for rank in range(tp)]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank failed")
        return [json.loads(Path(f"{scratch}/rank{rank}").read_text(encoding="utf-8")) for rank in range(tp)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="the first row alone")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main(*args.rank)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        total = make(folder / "model", args.gigabytes)
        rows = []
        for how, dtype, cold, save in [
            ("plugin", "bfloat16", True, True), ("transformers", "bfloat16", True, False),
            ("plugin", "bfloat16", False, False), ("transformers", "bfloat16", False, False),
            ("plugin", "float32", False, False), ("transformers", "float32", False, False),
        ][: 1 if args.quick else None]:  # fmt: skip
            if cold:
                forget(folder / "model")
            out = str(folder / "saved") if save else ""
            for rank, figures in enumerate(launch(args.tp, str(folder / "model"), how, dtype, out)):
                rows.append({"how": how, "dtype": dtype, "cache": "cold" if cold else "warm", "rank": rank, **figures})
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\nbf16 checkpoint of {total / 1e9:.2f} GB, tp = {args.tp}\n")
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in rows:
            print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
        if args.folder:
            (folder / "loading.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
