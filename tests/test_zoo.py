"""Every registered model type: its policy fits the installed transformers, says nothing superfluous, and is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import transformers
import zoo
import zoo_table
from models import config_for
from torch import nn
from workers import run

import tp_plugin
from tp_plugin.cli.dropout import dropouts
from tp_plugin.cli.main import main
from tp_plugin.cli.random_batch import LENGTH, SAMPLES
from tp_plugin.errors import PolicyError
from tp_plugin.policy import make_plan, policies, policy_for, registry

TYPES = zoo.model_types()
by_type = pytest.mark.parametrize("model_type", TYPES)
NEWEST = transformers.__version__ >= "5.23"
SMALL = 300_000
"""Parameters that a config of ours may make; an architecture's defaults make millions."""


@by_type
def test_the_policy_fits_the_installed_transformers(model_type: str) -> None:
    """Fails, naming it, if a module, attribute or argument that the policy relies on has moved, in any head class."""
    model, policy = zoo.on_meta(config_for(model_type)), policy_for(model_type)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size < SMALL, f"tests/models.py has no small config for {model_type}: this one has {size:,} parameters"
    assert make_plan(model, policy, 2).sharded_share(dict(model.named_parameters())) > 0.5
    for head in zoo.heads(model_type, {}):
        for expert_parallel in (False, True):
            make_plan(head, policy, 2, expert_parallel=expert_parallel)
    for case in zoo.cases(model_type):
        zoo.plan_of(case)


@contextlib.contextmanager
def renamed(model: nn.Module, name: str) -> Iterator[None]:
    """As if a newer transformers called its modules ``name`` otherwise."""
    owners = [module for module in model.modules() if name in module._modules]
    for owner in owners:
        owner._modules[f"new_{name}"] = owner._modules.pop(name)
    try:
        yield
    finally:
        for owner in owners:
            owner._modules[name] = owner._modules.pop(f"new_{name}")


def of_one_policy() -> list[list[str]]:
    types: dict[int, list[str]] = {}
    for model_type in TYPES:
        types.setdefault(id(policies()[model_type]), []).append(model_type)
    return list(types.values())


@pytest.mark.parametrize("types", of_one_policy(), ids=lambda types: types[0])
def test_the_policy_names_nothing_that_no_model_has(types: list[str]) -> None:
    """Every pattern, name and class in it is there in a head class or in one of the layouts in zoo.py."""
    policy = policy_for(types[0])
    missing = zoo.written(policy)
    for model_type in types:
        layouts = {**zoo.SPECIAL.get(model_type, {}), **zoo.SHAPES_ONLY.get(model_type, {})}
        for overrides in ({}, *layouts.values()):
            for head in zoo.heads(model_type, overrides):
                missing -= zoo.found(policy, head)
    older = {name for name in zoo.written(policy) if name[0] in zoo.OLDER.get(types[0], ())}
    if NEWEST:
        assert missing == older, f"the policy for {'/'.join(types)} names what no model has"
    else:
        assert not missing & older


@pytest.mark.parametrize("types", of_one_policy(), ids=lambda types: types[0])
def test_a_renamed_module_is_noticed(types: list[str]) -> None:
    """Each module that is split: without it the policy does not fit, and says what is missing or left over."""
    model, policy = zoo.on_meta(config_for(types[0])), policy_for(types[0])
    plan = make_plan(model, policy, 2)
    split = [*plan.columns, *plan.rows, *plan.embeddings, *plan.heads, *plan.sharded_norms]
    for name in sorted({path.rpartition(".")[2] for path in split}):
        with renamed(model, name), pytest.raises(PolicyError, match=f"{name}|nothing in the policy claims"):
            make_plan(model, policy, 2)


def test_special_cases_are_of_registered_types() -> None:
    assert {*zoo.SPECIAL, *zoo.SHAPES_ONLY, *zoo.ODD_SIZES, *zoo.OLDER, *zoo.BESIDES, *zoo.ONE_INPUT} <= set(TYPES)
    assert set(ORDINARY) <= {str(case) for case in CASES}
    assert all(set(types) - set(KIN) for types in of_one_policy()), "each policy is proven in an ordinary run"


def test_codegen_refuses_a_head_that_its_blocks_cannot_cut() -> None:
    with pytest.raises(PolicyError, match="a rank has 1 heads of 2 numbers, which do not divide by 4"):
        make_plan(zoo.on_meta(config_for("codegen", n_head=32, rotary_dim=2)), policy_for("codegen"), 32)


AT_FOUR = ("llama", "qwen3", "gpt2", "t5")
KIN = (
    *("mbart", "plbart", "pegasus", "blenderbot", "blenderbot-small", "camembert", "xlm-roberta", "mt5", "deit"),
    *("dinov2_with_registers", "ministral", "mistral", "smollm3", "seed_oss", "helium", "paligemma"),
)
"""Types with the policy of another, whose models differ from that one's in nothing that a policy sees."""
EXPERTS = ("mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3")
"""Of each kind of experts: alone, with biases and transposed, beside a shared one, chosen by groups."""
ORDINARY = (
    *("bart-other_heads_in_the_decoder-tp2", "deberta-v2-projected_positions-tp2", "dinov2-gated-tp2"),
    *("vit-odd_heads-tp2", "opt-350M-tp2", "codegen-odd_heads-tp3"),
)
CASES = [case for model_type in TYPES for case in zoo.cases(model_type)]


TOKENS = SAMPLES * (LENGTH + 16)
"""Of a batch at most, those of a picture included; each has three numbers in the loss."""


def ordinary(case: zoo.Case) -> bool:
    if case.tp == 4:
        return case.name == zoo.PLAIN and case.model_type in AT_FOUR
    if case.name == zoo.WHOLE_EXPERTS:
        return case.model_type in EXPERTS
    return (case.name == zoo.PLAIN and case.model_type not in KIN) or str(case) in ORDINARY


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if ordinary(case) else pytest.mark.full, id=str(case)) for case in CASES]
)
def test_proof(case: zoo.Case) -> None:
    results = run(case.tp, zoo.prove, case)
    assert zoo.faults(results) == []
    model, plan = zoo.plan_of(case)
    # the sums of gradients are one flat all-reduce
    promised = sum(zoo.reductions(case.model_type, plan)) + bool(plan.gradient_sums()) + 2 * len(plan.sharded_norms)
    shared_by_some = {g for layout in plan.layouts.values() for g in layout.replica_groups if len(g) < case.tp}
    for rank, result in enumerate(results):
        assert (result.generation is True) == model.can_generate()
        reduced = result.collectives.pop("all_reduce/tp")
        if case.name in (zoo.PLAIN, zoo.WHOLE_EXPERTS):
            assert reduced == promised + zoo.BESIDES.get(case.model_type, 0)
        # logits stay where they are: the loss takes three numbers per token
        assert result.collectives.pop("all_gather/tp", 0) == len(plan.heads)
        assert result.sent.get("all_gather/tp", 0) <= len(plan.heads) * 3 * 4 * TOKENS
        assert result.collectives.pop("all_gather/unit_cpu") == 1  # the guard
        assert bool(result.collectives.pop("all_reduce/replicas", 0)) == any(rank in group for group in shared_by_some)
        assert result.collectives == {}, "an unexpected collective"


UNREAD = ("mpt",)
"""Types whose code reads none of the dropouts that their config takes."""
WITH_DROPOUT = [kind for kind in TYPES if any(dropouts(config_for(kind))) and kind not in UNREAD]
DROPPED = ("llama", "gpt2", "gptj", "gpt_neox", "opt", "bloom", "bert", "distilbert", "t5", "bart", "phi")


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in DROPPED else pytest.mark.full) for t in WITH_DROPOUT]
)
def test_dropout(model_type: str) -> None:
    results = run(2, zoo.prove_with_dropout, model_type, 2)
    assert zoo.dropout_faults(results) == []
    assert results[0].equal, "no dropout of the config does anything"


def test_the_table_in_the_docs() -> None:
    """Everything in it is what cases and plans say. Anew: python ci/zoo.py --write"""
    assert zoo_table.shown().strip() == zoo_table.markdown(zoo_table.rows()).strip()


def test_the_command_lists_the_zoo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "Tower", tp_plugin.Policy(("Tower",)))
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["policies", "--long"]) == 0
    printed = capsys.readouterr().out
    listed = {
        cells[1].strip(): cells[2].strip() for cells in (line.split("│") for line in printed.splitlines()) if cells[2:]
    }
    assert listed.keys() - {""} == {*TYPES, "Tower"}
    assert listed["Tower"] == "-" and listed["gpt2"] == "98.8%"


def test_the_list_is_quick_and_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is built for it, and 80 columns cut no name."""
    monkeypatch.setattr("tp_plugin.cli.models.typical_share", None)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["policies"]) == 0
    names = capsys.readouterr().out.partition(".")[0].replace("\n", " ").rsplit(" ", 3)[0]
    assert {name.strip() for name in names.split(",")} >= set(TYPES)
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["policies", "whisper"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and "xglm" not in printed
    assert main(["policies", "whispers"]) == 1
