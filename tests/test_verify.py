"""``tp-plugin verify``, and the docs' walk through a new architecture with three typical mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from workers import run
from zoo import fresh

from tp_plugin.cli.local_ranks import run_on_ranks
from tp_plugin.cli.main import main
from tp_plugin.cli.parity_result import Result
from tp_plugin.cli.policy_hints import explain_failures, hint_for_block
from tp_plugin.cli.proof import prove_here
from tp_plugin.config.keys import ENV_DISABLE, ENV_OPTIONS
from tp_plugin.config.resolve import current_config
from tp_plugin.errors import TPError
from tp_plugin.policy import BlockPlan, HeadSplit, ParamLayout, Plan

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
    "LOCAL": 'local_sizes={"num_key_value_groups": "groups"}',
    "NORMS": '"layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm"',
}


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist sets a terminal's width, in which lines would be folded."""
    monkeypatch.delenv("COLUMNS", raising=False)


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


def proven(config: Any, reference: str | None, tp: int, pp: int, options: dict[str, Any]) -> Any:
    """Run on every rank: what a rank that the command starts does."""
    fresh(**options)
    return prove_here(config, reference, tp, pp)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs on ranks that are there already."""

    def prove(config: Any, reference: str | None, tp: int, pp: int) -> list[Result]:
        results = run(tp * pp, proven, config, reference, tp, pp, json.loads(os.environ[ENV_OPTIONS]))
        for result in results:
            if isinstance(result, TPError):
                raise result
        return results

    monkeypatch.setattr("tp_plugin.cli.verify.prove", prove)


def test_dry_run_of_a_full_size_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes alone: 6.7 billion parameters need no memory."""
    assert main(["verify", "llama", "--tp", "4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "100.0% of 6,738,415,616 parameters are sharded; a rank holds at most 1,684,803,584.",
        "Legal tp sizes (of 2, 3, 4, 6, 8, 12, 16, 24, 32, 64): 2, 3, 4, 6, 8, 12, 16, 24, 32.",
        "All-reduces per micro-batch: 65 forward, 65 backward, each of 4096 elements per token; one",
        "Bytes that a rank puts into them: 532,480 forward, 532,480 backward per token in bf16, twice that in fp32.",
        "model.layers.*.self_attn.q_proj.weight (× 32)",
    ):
        assert line in shown, shown
    assert "column-parallel" in shown and "row-parallel" in shown and "1024×4096" in shown


def test_ranks_that_hold_the_same_are_one_column(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["verify", "llama", "--tp", "8", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "each rank" in shown and "512×4096" in shown and "rank 1" not in shown
    assert max(map(len, shown.partition("sharded;")[0].splitlines()[:-1])) <= 100 and "…" not in shown
    assert "self_attn.q_proj.weight (× 32)" in shown, "no line is folded"
    assert main(["verify", tiny, "--tp", "3", "--dry-run"]) == 0  # 4 heads: two of them on one rank
    shown = capsys.readouterr().out
    assert "ranks 0–1 " in shown and "rank 2 " in shown


def test_json(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", tiny, "--tp", "4", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tp"] == 4 and told["model_type"] == "llama" and told["legal_tp_sizes"] == [2, 3, 4]
    assert told["all_reduces"] == {"forward": 5, "backward": 5}
    assert told["numbers_per_token"] == {"forward": 240, "backward": 240}
    row = next(row for row in told["parameters"] if row["name"].endswith("q_proj.weight"))
    assert row == {
        "name": "model.layers.*.self_attn.q_proj.weight",
        "whole": "48×48",
        "layout": "column-parallel",
        "ranks": ["12×48"] * 4,
        "count": 2,
    }
    assert "failures" not in told


def test_proof(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", tiny, "--tp", "2", "--policy", policy(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Right at tp=2: every number is inside its limit." in shown
    assert "480 forward, 480 backward per token in bf16" in shown
    assert "10 all_reduce of 42,240 bytes;" in shown, "2 x 11 tokens of 480 + 480 bytes, twice that in fp32"


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2)])
def test_proof_of_stages(tiny: str, tp: int, pp: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", tiny, "--tp", str(tp), "--pp", str(pp)]) == 0
    shown = capsys.readouterr().out
    assert f"Right at tp={tp}, pp={pp}: every number is inside its limit." in shown
    assert "model.norm, lm_head" in shown and "the hidden state (48 numbers a token) forward" in shown


def test_stages_as_data(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", tiny, "--tp", "2", "--pp", "2", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first, last = told["stages"]
    assert (first["layers"], last["layers"]) == ([0, 0], [1, 1]) and told["pp"] == 2
    assert first["besides"] == ["model.embed_tokens"] and last["besides"] == ["model.norm", "lm_head"]
    assert sum(first["numel_of_rank"] + last["numel_of_rank"]) > told["numel"]


OTHER_INPUTS = (
    "t5",
    "clip",
    "siglip",
    "llava",
    "gemma3",
    "paligemma",
    "beit",
    "whisper",
    "dinov2",
    "deberta-v2",
    "modernbert",
    "marian",
    "bart",
)


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("target", ["vit", *(pytest.param(t, marks=pytest.mark.full) for t in OTHER_INPUTS)])
def test_proof_of_models_that_take_more_than_tokens(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the name alone: the proof makes a small one of it, and feeds it what it takes."""
    assert main(["verify", target, "--tp", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"The proof runs on a small {target}" in shown
    assert "Right at tp=2: every number is inside its limit." in shown


def test_dry_run_of_a_composite(capsys: pytest.CaptureFixture[str]) -> None:
    """LLaVA 1.5's towers: 32 layers of 32 heads and 24 layers of 16 heads, each by its own policy."""
    assert main(["verify", "llava", "--tp", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "99.7% of 7,062,902,784 parameters are sharded",
        "Legal tp sizes (of 2, 3, 4, 6, 8, 12, 16, 24, 32, 64): 2, 3, 4, 6, 8, 12, 16.",
        "model.language_model.layers.*.self_attn.q_proj.weight (× 32)",
        "model.vision_tower.encoder.layers.*.self_attn.q_proj.weight (× 24)",
    ):
        assert line in shown, shown


def test_mistake_a_parameter_is_forgotten(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", tiny, "--policy", policy(tmp_path, NORMS='"layers.*.input_layernorm", "norm"')]) == 1
    error = capsys.readouterr().err
    assert "nothing in the policy claims model.layers.0.post_attention_layernorm.weight" in error
    assert "name each in a block, in the vocabulary, or in `replicated`" in error


def test_mistake_a_module_is_misspelt(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = 'columns={"q_proj": q, "k_proj": kv, "value": kv},'
    assert main(["verify", tiny, "--policy", policy(tmp_path, COLUMNS=columns)]) == 1
    assert "there is no module 'model.layers.0.self_attn.value'" in capsys.readouterr().err


@pytest.mark.usefixtures("started")
def test_mistake_the_numbers_are_wrong(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block whose input is not named gets no sum in its backward: the forward is right, the gradients are not."""
    wrong = policy(tmp_path, LOCAL='local_sizes={"num_key_value_groups": "groups"}, inputs=("position_embeddings",)')
    assert main(["verify", tiny, "--policy", wrong]) == 1
    shown = capsys.readouterr().out
    assert "FAILED: gradient deviates" in shown and "FAILED: weight deviates" in shown
    plain = " ".join(shown.split())
    assert "the backward goes wrong first at model.layers.1.input_layernorm.weight" in plain
    assert "is every activation that enters model.layers.1.self_attn named in its `inputs`?" in plain


@pytest.mark.usefixtures("started")
def test_mistake_column_and_row_are_confused(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = policy(tmp_path)
    file = tmp_path / "mine.py"
    swapped = file.read_text().replace('"up_proj": even}, row={"down_proj"', '"down_proj": even}, row={"up_proj"')
    file.write_text(swapped)
    assert main(["verify", tiny, "--policy", path]) == 1
    error = capsys.readouterr().err
    assert "the sharded model cannot run: model.layers.0.mlp.up_proj" in error
    assert "a row-parallel module wants a rank's share and got all 48 features: name it in `columns`" in error
    assert "Traceback" not in error


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kept, self.head_dim, self.groups = 4, 4, 4, 2
        self.proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.view(*x.shape[:-1], self.heads, self.head_dim).flatten(-2)) * self.groups


def counted() -> tuple[nn.Module, Plan]:
    model = nn.Sequential(Counted())
    plan = Plan(2, blocks={"0": BlockPlan(("x",), "0", HeadSplit.of(4, 2, 2), rows=["0.proj"])}, rows=["0.proj"])
    plan.layouts["0.proj.weight"] = ParamLayout((16, 16), 1, (((0, 8),), ((8, 16),)))
    return model, plan


def test_counts_of_the_whole_model_are_named() -> None:
    """Only what the forward reads, and no head size that happens to equal a count."""
    model, plan = counted()
    hint = hint_for_block(model, plan, "0.proj")
    assert hint == "in 0, heads = 4 counts the whole model's, this rank has 2: add it to `local_sizes` as 'q_heads'"
    plan.attributes["0", "heads"] = (2, 2)
    assert "what enters 0 is right" in hint_for_block(model, plan, "0")
    assert hint_for_block(model, plan, "1") == ""


def test_an_exception_names_the_innermost_module() -> None:
    model, plan = counted()
    with (
        pytest.raises(TPError, match=r"the whole model cannot run: 0\.proj \(Linear\) raised RuntimeError: mat1"),
        explain_failures(model, None),
    ):
        model[0].proj(torch.ones(1, 8))
    with (
        pytest.raises(TPError, match=r"the sharded model cannot run: 0 \(Counted\) raised .* in 0, heads = 4"),
        explain_failures(model, plan),
    ):
        model(torch.ones(1, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.usefixtures("started")
def test_a_module_whose_output_deviates_is_named(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = policy(tmp_path, COLUMNS='columns={"q_proj": q, "k_proj": kv, "v_proj": lambda *a: kv(*a)[::-1]},')
    assert main(["verify", tiny, "--policy", wrong]) == 1
    assert "FAILED: output deviates" in (shown := capsys.readouterr().out)
    assert "at module model.layers.0.self_attn" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no-such-model"], "'no-such-model' is no folder, no .json file and no model type"),
        (["llama", "--tp", "1"], "--tp 1 --pp 1: expected at least 2 ranks in all"),
        (["llama", "--tp", "64"], "tp_size=64 is larger than the number of attention heads (32)"),
        (["xlnet"], "no tensor-parallel policy for model type 'xlnet'"),
        (["nemotron"], "nemotron: its config makes no model (unsupported operand"),
        (["llama", "--policy", "nowhere.py:POLICY"], "policy: there is no file nowhere.py"),
        (["llama", "--policy", "nowhere:POLICY"], "policy: 'nowhere:POLICY' cannot be loaded"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_ranks_of_a_proof_take_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself runs with the plugin switched off; its ranks were, too, and proved a run without options."""
    monkeypatch.setenv(ENV_DISABLE, "1")
    monkeypatch.setenv(ENV_OPTIONS, json.dumps({"sequence_parallel": True}))
    assert [config.sequence_parallel for config in run_on_ranks(2, current_config)] == [True, True]
