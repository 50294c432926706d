"""Saving a sharded model holds one output file at a time and leaves what transformers would have written."""

from __future__ import annotations

import copy
import gc
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, config_for
from test_loading import patched
from test_loading_shares import _memory
from workers import run


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def save_case(model_type: str, folder: str, max_shard_size: str, main_only: bool) -> bool:
    from tp_plugin.engines import transformers as engine
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    sharded = build(config_for(model_type), 0)
    parallelize(sharded, 2)
    rank = torch.distributed.get_rank()
    with patched(engine):
        if rank == 0 or not main_only:
            sharded.save_pretrained(folder, max_shard_size=max_shard_size)
    return (Path(folder) / "config.json").is_file()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])  # plain; tied; converted back to single experts
@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
def test_the_files_are_those_of_transformers(model_type: str, max_shard_size: str, tmp_path: Path) -> None:
    build(config_for(model_type), 0).save_pretrained(tmp_path / "plain", max_shard_size=max_shard_size)
    main_only = model_type == "llama" and max_shard_size == "20KB"
    there = run(2, save_case, model_type, str(tmp_path / "sharded"), max_shard_size, main_only)
    assert there == [True, there[1]] and (main_only or there[1])
    expected, found = files_of(tmp_path / "plain"), files_of(tmp_path / "sharded")
    assert list(found) == list(expected) and (len(found) > 5) == (max_shard_size == "20KB")
    for name, content in expected.items():
        assert found[name] == content, name


def memory_case(folder: str, max_shard_size: str) -> dict[str, int]:
    from tp_plugin.engines import saving
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    config = config_for(
        "llama", hidden_size=512, intermediate_size=2048, vocab_size=6000, num_hidden_layers=4, num_key_value_heads=4
    )
    model = build(config, 0)  # 104 MB
    parallelize(model, 2)
    with patched(saving):
        model.save_pretrained(folder + "/once", max_shard_size=max_shard_size)  # imports, threads, connections
        torch.distributed.barrier()
        before = _memory("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
            peak.write("5")
        gc.disable()  # what is held until the collector happens to come is held
        try:
            model.save_pretrained(folder + "/twice", max_shard_size=max_shard_size)
        finally:
            gc.enable()
    return {"peak": _memory("VmHWM") - before}


def test_the_host_holds_one_output_file(tmp_path: Path) -> None:
    leader, peer = run(2, memory_case, str(tmp_path), "20MB")
    sizes = [path.stat().st_size for path in (tmp_path / "twice").glob("*.safetensors")]
    assert len(sizes) > 4
    tensor = 6000 * 512 * 4  # the largest; the half of a peer is a buffer of its own
    assert leader["peak"] <= max(sizes) + tensor / 2 + 6e6 < 0.5 * sum(sizes), (leader, sizes)
    assert peer["peak"] <= 2 * tensor


def broken_case(folder: str) -> list[str]:
    import safetensors.torch
    import transformers.modeling_utils as modeling

    from tp_plugin.engines import saving
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import parallelize

    stop()
    sharded = build(config_for("llama"), 0)
    parallelize(sharded, 2)
    written: list[str] = []

    def full(tensors: Any, filename: str, metadata: Any = None) -> None:
        written.append(filename)
        if len(written) == 3:
            Path(filename).write_bytes(b"half")
            raise OSError("no space left on device")
        safetensors.torch.save_file(tensors, filename, metadata=metadata)

    before, modeling.safe_save_file = modeling.safe_save_file, full
    try:
        with patched(saving):
            sharded.save_pretrained(folder, max_shard_size="20KB")
    except OSError as error:
        return [str(error)]
    finally:
        modeling.safe_save_file = before
    return []


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    """All ranks of the group are told; and of several files, none took the place of one that was complete."""
    assert run(2, broken_case, str(tmp_path)) == [["no space left on device"]] * 2
    assert [path.name for path in tmp_path.iterdir() if "safetensors" in path.name] == []


def promise_case() -> bool:
    """Whatever is done with a promise is done with the whole tensor."""
    from tp_plugin.runtime.start import stop
    from tp_plugin.shard import has_lazy, lazy_full_tensors, materialize, parallelize

    stop()
    whole = build(config_for("llama"), 0)
    sharded = copy.deepcopy(whole)
    parallelize(sharded, 2)
    expected = whole.state_dict()
    if torch.distributed.get_rank() == 0:
        with lazy_full_tensors():
            state = sharded.state_dict()
        assert has_lazy(state) and list(state) == list(expected)
        for name, value in expected.items():
            promised = state[name]
            assert (promised.shape, promised.dtype, promised.device, promised.untyped_storage().nbytes()) == (
                value.shape, value.dtype, value.device, value.untyped_storage().nbytes()
            ) or not has_lazy({name: promised})  # fmt: skip
            assert torch.equal(promised, value) and torch.equal(promised[..., 1:], value[..., 1:])
            assert torch.equal(promised.contiguous().float().sum(), value.sum())
            assert torch.equal(copy.deepcopy(promised), value)
            file = io.BytesIO()
            torch.save(promised, file)
            file.seek(0)
            assert torch.equal(torch.load(file), value)
        assert all(torch.equal(value, expected[name]) for name, value in materialize(state).items())
        assert json.dumps(state["lm_head.weight"].tolist()) == json.dumps(expected["lm_head.weight"].tolist())
    torch.distributed.barrier()
    return True


def test_a_promise_is_the_whole_tensor() -> None:
    assert run(2, promise_case) == [True, True]


def mixed_case(folder: str, alone: bool) -> list[str]:
    """A library's object around a sharded model, which saves both."""
    import torch.distributed as dist
    from huggingface_hub import ModelHubMixin, hub_mixin
    from test_parallel import pair, rank

    from tp_plugin.engines import patching, saving
    from tp_plugin.runtime.runtime import require
    from tp_plugin.runtime.sync_points import BARRIER

    _, sharded = pair(2)

    class Around(ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            sharded.save_pretrained(save_directory)
            (save_directory / "head.json").write_text("{}")

    before = len(patching._originals)
    import transformers.modeling_utils

    saving.install(transformers.modeling_utils)
    saving.install_hub_mixin(hub_mixin)
    try:
        if not alone or rank() == 0:
            Around().save_pretrained(folder)
        require().sync_points.rendezvous(BARRIER)
        dist.barrier()
        config = json.loads((Path(folder) / "config.json").read_text())
        return [config["model_type"], *sorted(path.name for path in Path(folder).iterdir())]
    finally:
        for owner, name, original in reversed(patching._originals[before:]):
            patching.put_back(owner, name, original)
        del patching._originals[before:]


@pytest.mark.parametrize("alone", [False, True])
def test_what_a_library_saves_around_a_model(tmp_path: Path, alone: bool) -> None:
    wanted = ["llama", "README.md", "config.json", "generation_config.json", "head.json", "model.safetensors"]
    assert run(2, mixed_case, str(tmp_path / "saved"), alone) == [wanted] * 2
