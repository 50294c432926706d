"""``tp-plugin verify``, and the README's walk through a new architecture with three typical mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tp_plugin.cli.main import main

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 48,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "attention_bias": True,
}  # fmt: skip
POLICY = """
from tp_plugin import Attention, MLP, Policy, Vocabulary
from tp_plugin.policy import even, kv, q

POLICY = Policy(
    ("llama",),
    (
        Attention("layers.*.self_attn", COLUMNS row={"o_proj": q}, LOCAL),
        MLP("layers.*.mlp", columns={"gate_proj": even, "up_proj": even}, row={"down_proj": even}),
    ),
    Vocabulary(),
    (NORMS),
)
"""
RIGHT = {
    "COLUMNS": 'columns={"q_proj": q, "k_proj": kv, "v_proj": kv},',
    "LOCAL": 'local={"num_key_value_groups": "groups"}',
    "NORMS": '"layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm"',
}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def policy(tmp_path: Path, **changes: str) -> str:
    text = POLICY
    for word, value in (RIGHT | changes).items():
        text = text.replace(word, value)
    (tmp_path / "mine.py").write_text(text)
    return f"{tmp_path / 'mine.py'}:POLICY"


def test_dry_run_of_a_full_size_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes alone: 6.7 billion parameters need no memory."""
    assert main(["verify", "llama", "--tp", "4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "100.0% of 6,738,415,616 parameters are sharded; a rank holds at most 1,684,803,584.",
        "Legal tp sizes (of 2, 3, 4, 6, 8, 12, 16, 24, 32, 64): 2, 3, 4, 6, 8, 12, 16, 24, 32.",
        "All-reduces per micro-batch: 65 forward, 65 backward, each of 4096 elements per token; 1 all-gather",
        "model.layers.*.self_attn.q_proj.weight (× 32)",
    ):
        assert line in shown, shown
    assert "column-parallel" in shown and "row-parallel" in shown and "1024×4096" in shown


def test_proof(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", tiny, "--tp", "2", "--policy", policy(tmp_path)]) == 0
    assert "Right at tp=2: every number is inside its limit." in capsys.readouterr().out


def test_mistake_a_parameter_is_forgotten(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", tiny, "--policy", policy(tmp_path, NORMS='"layers.*.input_layernorm", "norm"')]) == 1
    error = capsys.readouterr().err
    assert "nothing in the policy claims model.layers.0.post_attention_layernorm.weight" in error
    assert "name each in a block, in the vocabulary, or in `replicated`" in error


def test_mistake_a_module_is_misspelt(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = 'columns={"q_proj": q, "k_proj": kv, "value": kv},'
    assert main(["verify", tiny, "--policy", policy(tmp_path, COLUMNS=columns)]) == 1
    assert "there is no module 'model.layers.0.self_attn.value'" in capsys.readouterr().err


def test_mistake_the_numbers_are_wrong(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block whose input is not named gets no sum in its backward: the forward is right, the gradients are not."""
    wrong = policy(tmp_path, LOCAL='local={"num_key_value_groups": "groups"}, inputs=("position_embeddings",)')
    assert main(["verify", tiny, "--policy", wrong]) == 1
    shown = capsys.readouterr().out
    assert "FAILED: gradient deviates" in shown and "FAILED: weight deviates" in shown


def test_a_module_whose_output_deviates_is_named(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = policy(tmp_path, COLUMNS='columns={"q_proj": q, "k_proj": kv, "v_proj": lambda *a: kv(*a)[::-1]},')
    assert main(["verify", tiny, "--policy", wrong]) == 1
    assert "FAILED: output deviates" in (shown := capsys.readouterr().out)
    assert "at module model.layers.0.self_attn" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no-such-model"], "'no-such-model' is no folder, no .json file and no model type"),
        (["llama", "--tp", "1"], "--tp 1: expected at least 2 ranks"),
        (["llama", "--tp", "64"], "tp_size=64 is larger than the number of attention heads (32)"),
        (["vit"], "vit"),
        (["llama", "--policy", "nowhere.py:POLICY"], "policy: there is no file nowhere.py"),
        (["llama", "--policy", "nowhere:POLICY"], "policy: 'nowhere:POLICY' cannot be loaded"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 1
    assert message in capsys.readouterr().err
