"""Loading under a tp_size: nothing is read before it is looked at, and everything looked at is right.

Oracle: the same model loaded by transformers alone.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, config_for
from torch import nn

DTYPES = [None, torch.bfloat16]
"""The file's own dtype, in which weights are mapped, and another, to which they are cast when they are read."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return saved_models(tmp_path_factory)


def saved_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of a checkpoint of each of ``MODELS``."""
    made = {}
    for name, sizes in MODELS.items():
        folder = tmp_path_factory.mktemp("checkpoints") / name
        model = build(config_for(name, **sizes), 0)
        model.save_pretrained(folder, max_shard_size="700KB")
        made[name] = str(folder)
    return made


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "intermediate_size": 320, "vocab_size": 997, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 96, "vocab_size": 997},  # fused q|k|v in a transposed weight; the head is tied
    "gpt_neox": {"hidden_size": 96, "intermediate_size": 320, "vocab_size": 997},
    "mixtral": {"hidden_size": 96, "intermediate_size": 128, "vocab_size": 997, "num_local_experts": 4},
}


class patched:
    """transformers with the patches of one engine (default: loading), whoever has patched it before."""

    def __init__(self, engine: Any = None):
        from tp_plugin.engines import loading

        self.engine = engine or loading

    def __enter__(self) -> None:
        import transformers.modeling_utils as modeling

        from tp_plugin.engines import patching

        before = len(patching._originals)
        os.environ["TP_PLUGIN_TP_SIZE"] = "2"
        self.engine.install(modeling)
        self.mine = patching._originals[before:]

    def __exit__(self, *_: object) -> None:
        from tp_plugin.engines import patching

        os.environ.pop("TP_PLUGIN_TP_SIZE", None)
        for owner, name, original in reversed(self.mine):  # not those of a library that was imported meanwhile
            patching.put_back(owner, name, original)
            patching._originals.remove((owner, name, original))


def load(folder: str, dtype: torch.dtype | None = None, auto: str = "AutoModelForCausalLM", **kwargs: Any) -> Any:
    import transformers

    dtypes = {} if dtype is None else {"dtype": dtype}
    return getattr(transformers, auto).from_pretrained(folder, **dtypes, **kwargs)


def pair(folder: str, dtype: torch.dtype | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """The model loaded by transformers alone, and the model that lies in its file."""
    with patched():
        lazy = load(folder, dtype, **kwargs)
    return load(folder, dtype, **kwargs), lazy


def unread(model: nn.Module) -> int:
    """How many bytes of the model's parameters nobody has read yet."""
    from tp_plugin.shard.lazy_load import LazyParameter, is_mapped
    from tp_plugin.shard.mapped_file import pages_read

    return sum(
        p.nbytes for p in model.parameters() if isinstance(p, LazyParameter) or (is_mapped(p) and pages_read(p) == 0)
    )


def assert_equal(lazy: nn.Module, plain: nn.Module) -> None:
    ours, theirs = dict(lazy.named_parameters()), dict(plain.named_parameters())
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype and torch.equal(ours[name], expected), name


# --- what does not read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_loaded_model_looks_whole_and_is_unread(
    folders: dict[str, str], name: str, dtype: torch.dtype | None
) -> None:
    plain, lazy = pair(folders[name], dtype)
    total = sum(p.nbytes for p in plain.parameters())
    assert unread(lazy) > 0.9 * total
    for ours, theirs in zip(lazy.parameters(), plain.parameters(), strict=True):
        assert (ours.shape, ours.dtype, ours.device, ours.numel(), ours.stride(), ours.requires_grad, ours.is_leaf) == (
            theirs.shape, theirs.dtype, theirs.device, theirs.numel(), theirs.stride(), theirs.requires_grad,
            theirs.is_leaf,
        )  # fmt: skip
        assert isinstance(ours, nn.Parameter) and not ours.is_meta and ours.grad is None and len(ours) == len(theirs)
    assert lazy.num_parameters() == plain.num_parameters()
    assert lazy.get_input_embeddings().weight.shape[0] == 997
    tied = lazy.get_input_embeddings().weight is lazy.get_output_embeddings().weight
    assert tied == (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight)
    for parameter in list(lazy.parameters())[::2]:
        parameter.requires_grad = False
    lazy.train()
    decay = [p for p in lazy.parameters() if p.dim() > 1 and p.requires_grad]
    torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": [next(lazy.parameters())]}])
    assert unread(lazy) > 0.9 * total


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_injection_reads_nothing(folders: dict[str, str], dtype: torch.dtype | None) -> None:
    import peft

    _, lazy = pair(folders["llama"], dtype)
    before = unread(lazy)
    adapted = peft.get_peft_model(lazy, peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2))
    adapted.print_trainable_parameters()
    assert unread(adapted) == before > 0


# --- what reads -----------------------------------------------------------------------------------------------------


def norms(model: Any, tmp: Path) -> Any:
    return [p.norm() for p in model.parameters()]


def copies(model: Any, tmp: Path) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(model.model.layers[0].mlp.up_proj.weight)
        model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
        model.model.norm.weight[1] = 7.0


def resized(model: Any, tmp: Path) -> Any:
    torch.manual_seed(0)
    model.resize_token_embeddings(1003)  # the new rows are drawn from the mean and covariance of the old
    assert model.get_input_embeddings().weight.shape[0] == 1003


def tied(model: Any, tmp: Path) -> Any:
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.lm_head.weight.sum()


def saved(model: Any, tmp: Path) -> Any:
    model.save_pretrained(tmp)
    return load(str(tmp)).state_dict()


def states(model: Any, tmp: Path) -> Any:
    return {name: value.clone() for name, value in model.state_dict().items()}


def loaded(model: Any, tmp: Path) -> Any:
    state = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items() if "q_proj" in name}
    model.load_state_dict(state, strict=False)


def copied(model: Any, tmp: Path) -> Any:
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return list(reference.parameters())


def forward(model: Any, tmp: Path) -> Any:
    return model(torch.arange(12).view(2, 6)).logits


def compiled(model: Any, tmp: Path) -> Any:
    return torch.compile(model, backend="eager")(torch.arange(12).view(2, 6)).logits


def generated(model: Any, tmp: Path) -> Any:
    return model.generate(torch.arange(12).view(2, 6), max_new_tokens=3, do_sample=False)


def trained(model: Any, tmp: Path) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(12).view(2, 6)
    model(ids, labels=ids).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return norm


def pickled(model: Any, tmp: Path) -> Any:
    file = io.BytesIO()
    torch.save(list(model.parameters()), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def converted(model: Any, tmp: Path) -> Any:
    model.to(torch.bfloat16)


def listed(model: Any, tmp: Path) -> Any:
    flat = torch.nn.utils.parameters_to_vector(model.parameters())
    return [flat, *torch._foreach_norm(list(model.parameters())), torch.tensor(model.lm_head.weight[0].tolist())]


def reinitialised(model: Any, tmp: Path) -> Any:
    torch.manual_seed(0)
    nn.init.normal_(model.lm_head.weight[3:5])
    model.model.norm.weight.data = torch.arange(96.0).to(model.dtype)


def numpied(model: Any, tmp: Path) -> Any:
    return [torch.from_numpy(p.detach().float().numpy().copy()) for p in model.parameters()]


def pissa(model: Any, tmp: Path) -> Any:
    import peft

    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="olora"))
    return [p.detach().clone() for p in adapted.parameters()]


TOUCHES = [
    norms, copies, resized, tied, saved, states, loaded, copied, forward, compiled, generated, trained, pickled,
    converted, listed, reinitialised, numpied, pissa,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
def test_whoever_reads_gets_what_transformers_gives(
    folders: dict[str, str], touch: Callable[[Any, Path], Any], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    plain, lazy = pair(folders["llama"], dtype)
    assert unread(lazy) > 0
    ids = [id(p) for p in lazy.parameters()] if touch not in (resized, tied, converted) else None
    expected, found = touch(plain, tmp_path / "plain"), touch(lazy, tmp_path / "lazy")
    if touch is not pissa:
        assert_equal(lazy, plain)
        if ids:
            assert [id(p) for p in lazy.parameters()] == ids
    assert all(type(p) is nn.Parameter for p in lazy.parameters())
    expected, found = (list(v.values()) if isinstance(v, dict) else v for v in (expected, found))
    if expected is not None:
        pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
        assert all(torch.equal(ours, theirs) and type(ours) is type(theirs) for ours, theirs in pairs)


def test_a_parameter_behind_torchs_back_is_no_zero(folders: dict[str, str]) -> None:
    """Code that takes the memory itself must crash, not compute with zeros."""
    _, lazy = pair(folders["llama"], torch.float16)
    weight = lazy.lm_head.weight
    with torch._C.DisableTorchFunctionSubclass():
        address = weight.data_ptr()
    with open("/proc/self/maps", encoding="ascii") as maps:
        rights = [
            line.split()[1]
            for line in maps
            if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        ]
    assert rights == ["---p"]


# --- other checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(MODELS))
def test_values_of_every_kind_of_checkpoint(folders: dict[str, str], name: str, dtype: torch.dtype | None) -> None:
    plain, lazy = pair(folders[name], dtype)
    assert_equal(lazy, plain)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(lazy(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_head_is_initialised_and_a_base_model_is_found(folders: dict[str, str], dtype: Any) -> None:
    torch.manual_seed(3)
    with patched():
        lazy, info = load(folders["llama"], dtype, "AutoModelForSequenceClassification", output_loading_info=True)
    torch.manual_seed(3)
    plain, told = load(folders["llama"], dtype, "AutoModelForSequenceClassification", output_loading_info=True)
    assert info == told and info["missing_keys"] == {"score.weight"}
    assert_equal(lazy, plain)
    assert_equal(*pair(folders["llama"], dtype, auto="AutoModel"))


def test_what_cannot_lie_in_a_file_is_loaded_as_ever(folders: dict[str, str], tmp_path: Path) -> None:
    plain = load(folders["llama"])
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    plain.config.save_pretrained(tmp_path)
    with patched():
        lazy = load(str(tmp_path))
        mapped = load(folders["llama"], device_map="cpu")
        os.environ["TP_PLUGIN_OPTIONS"] = '{"leave_whole": ["llama"]}'
        whole = load(folders["llama"], torch.float16)
        del os.environ["TP_PLUGIN_OPTIONS"]
    assert unread(lazy) == unread(whole) == 0 < unread(mapped)
    assert_equal(whole, load(folders["llama"], torch.float16))
    for model in (lazy, mapped):
        assert_equal(model, plain)


def test_a_model_outlives_its_files_and_may_be_saved_over_them(folders: dict[str, str], tmp_path: Path) -> None:
    load(folders["llama"]).save_pretrained(tmp_path)
    plain, lazy = pair(str(tmp_path))
    with torch.no_grad():
        for model in (plain, lazy):
            model.lm_head.weight.mul_(2)
    lazy.save_pretrained(tmp_path)
    assert_equal(load(str(tmp_path)), plain)
    (tmp_path / "model.safetensors").unlink()
    assert_equal(lazy, plain)


def test_a_model_left_whole_is_read_whole(folders: dict[str, str]) -> None:
    from tp_plugin.shard import materialize_all_
    from tp_plugin.shard.lazy_load import is_mapped

    for dtype in DTYPES:
        plain, lazy = pair(folders["llama"], dtype)
        ids = [id(p) for p in lazy.parameters()]
        materialize_all_(lazy)
        assert unread(lazy) == 0 and not any(is_mapped(p) for p in lazy.parameters())
        assert [id(p) for p in lazy.parameters()] == ids and {type(p) for p in lazy.parameters()} == {nn.Parameter}
        assert_equal(lazy, plain)


def test_mappings_go_with_their_models(folders: dict[str, str]) -> None:
    from tp_plugin.shard import mapped_file

    before = len(mapped_file.mappings)
    for dtype in DTYPES:
        _, lazy = pair(folders["llama"], dtype)
        assert len(mapped_file.mappings) > before
        del lazy
        assert len(mapped_file.mappings) == before


def test_only_the_kernel_knows_who_wrote(folders: dict[str, str]) -> None:
    from tp_plugin.shard.lazy_load import identity

    _, lazy = pair(folders["llama"])
    weight, other = lazy.lm_head.weight, lazy.model.embed_tokens.weight
    assert identity(weight) and identity(weight) != identity(other)
    version = weight._version
    weight.data[5].mul_(2)  # unseen by torch's version counter
    assert weight._version == version and identity(weight) is None and identity(other)
