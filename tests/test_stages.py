"""What can be said of pipeline stages without running any: cuts, layouts, order of work, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import config_for

from tp_plugin.cli.models import build
from tp_plugin.config import accelerate_yaml
from tp_plugin.config.resolve import resolve
from tp_plugin.config.run_config import RunConfig
from tp_plugin.config.written import Written
from tp_plugin.errors import PolicyError, TPError
from tp_plugin.policy import ParamLayout, make_plan, policy_for
from tp_plugin.policy.stages import balanced, on_stage
from tp_plugin.shard.find_stages import find_stages
from tp_plugin.tensor.pipeline.micro_batches import cut
from tp_plugin.tensor.pipeline.schedule import one_f_one_b


@st.composite
def staged(draw: st.DrawFn) -> tuple[ParamLayout, ParamLayout, tuple[int, ...], int]:
    """A layout over TP ranks, the same over a unit, the stages that hold it, and their number."""
    tp, count, rows = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(3, 9))
    stages = tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=2))))
    cuts = sorted(draw(st.lists(st.integers(1, rows - 1), min_size=tp - 1, max_size=tp - 1, unique=True)))
    parts = tuple((edge,) for edge in pairwise([0, *cuts, rows]))
    kind = draw(st.sampled_from(["split", "padded", "replicated", "shared"]))
    if kind == "replicated":
        layout = ParamLayout.replicated((rows, 2), tp)
    elif kind == "shared":
        layout = ParamLayout((rows, 2), 0, (((0, rows),),) * tp)
    else:
        layout = ParamLayout((rows, 2), 0, parts, rows if kind == "padded" else None)
    return layout, layout.on_stages(stages, count), stages, count


@settings(deadline=None)
@given(staged())
def test_a_unit_holds_what_its_stages_hold(made: tuple[ParamLayout, ParamLayout, tuple[int, ...], int]) -> None:
    layout, unit, stages, count = made
    whole = torch.randn(layout.shape)
    shards = [unit.shard(whole, rank) for rank in range(unit.ranks)]
    assert unit.ranks == layout.ranks * count and torch.equal(unit.gather(shards), whole)
    for rank, shard in enumerate(shards):
        stage, tp_rank = divmod(rank, layout.ranks)
        assert tuple(shard.shape) == unit.local_shape(rank)
        if stage in stages:
            assert torch.equal(shard, layout.shard(whole, tp_rank))
        else:
            assert not shard.numel() and rank in unit.absent
    if unit.dim is not None:  # norms count each element once
        counted = torch.cat([s.narrow(0, a, b - a) for r, s in enumerate(shards) for a, b in unit.owned(r)])
        assert len(counted) == layout.shape[0]


def test_a_number_lies_on_every_stage() -> None:
    scale = ParamLayout.replicated((), 2)
    assert scale.on_stages((0, 1), 2) == ParamLayout.replicated((), 4)
    with pytest.raises(ValueError, match="single number"):
        scale.on_stages((0,), 2)


@settings(deadline=None)
@given(st.lists(st.floats(1, 10), min_size=1, max_size=9), st.floats(0, 20), st.floats(0, 20), st.integers(1, 4))
def test_balanced_cuts(costs: list[float], first: float, last: float, stages: int) -> None:
    stages = min(stages, len(costs))

    def dearest(cuts: tuple[int, ...]) -> float:
        found = [sum(costs[a:b]) for a, b in pairwise(cuts)]
        found[0] += first
        found[-1] += last
        return max(found)

    def all_cuts(start: int, left: int) -> list[tuple[int, ...]]:
        if left == 1:
            return [(start, len(costs))]
        stops = range(start + 1, len(costs) - left + 2)
        return [(start, *rest) for stop in stops for rest in all_cuts(stop, left - 1)]

    cuts = balanced(costs, first, last, stages)
    assert len(cuts) == stages + 1 and cuts[0] == 0 and cuts[-1] == len(costs) and all(a < b for a, b in pairwise(cuts))
    assert dearest(cuts) <= min(dearest(other) for other in all_cuts(0, stages)) * (1 + 1e-9)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9))
def test_one_forward_one_backward(stages: int, micro_batches: int) -> None:
    """Each once, in order, no backward before its forward; at most as many alive as there are stages to come."""
    for stage in range(stages):
        alive, done = set(), []
        for kind, number in one_f_one_b(stage, stages, micro_batches):
            done.append((kind, number))
            alive.add(number) if kind == "forward" else alive.remove(number)
            assert len(alive) <= stages - stage
        for kind in ("forward", "backward"):
            assert [number for k, number in done if k == kind] == list(range(micro_batches))


def test_what_a_stage_runs() -> None:
    model = build(config_for("gpt2", n_layer=5), meta=True)
    plan = make_plan(model, policy_for("gpt2"), 2)
    stages = find_stages(model, plan, 2)
    assert stages.stack == "transformer.h" and stages.before == ("transformer.wte", "transformer.wpe")
    assert stages.after == ("transformer.ln_f", "lm_head")
    assert stages.of("transformer.wte.weight") == stages.of("lm_head.weight") == (0, 1)
    assert stages.of("transformer.wpe.weight") == stages.of("transformer.h.0.attn") == (0,)
    assert stages.of("transformer.h.4.attn.attn_dropout") == stages.of("transformer.ln_f.bias") == (1,)
    first, last = (on_stage(plan, stages, stage) for stage in (0, 1))
    assert first.embeddings and not first.heads and last.heads and not last.embeddings
    assert sorted([*first.blocks, *last.blocks]) == sorted(plan.blocks)
    assert find_stages(model, plan, 2, (1, 4)).first_layers == (0, 1, 5)


@pytest.mark.parametrize(
    ("model_type", "count", "sizes", "message"),
    [
        ("t5", 2, (), r"T5ForConditionalGeneration cannot be cut .*: it has 4 stacks of layers .*pp_size: 1"),
        ("clip", 2, (), r"CLIPModel cannot be cut .*: it has 2 stacks of layers"),
        ("llama", 3, (), r"pp_size=3: LlamaForCausalLM has 2 layers"),
        ("llama", 2, (1, 2), r"pipeline_split: \[1, 2\] are 3 layers, but the model has 2"),
        ("deberta-v2", 2, (), r"DebertaV2ForMaskedLM cannot be cut"),
    ],
)
def test_refused(model_type: str, count: int, sizes: tuple[int, ...], message: str) -> None:
    model = build(config_for(model_type), meta=True)
    with pytest.raises(PolicyError, match=message):
        find_stages(model, make_plan(model, policy_for(model.config), 1), count, sizes)


def test_a_call_in_micro_batches() -> None:
    """Rows that the number does not divide, arguments of other shapes, and what each loss counts."""
    model = build(config_for("llama"), meta=True)
    ids = torch.arange(12).view(3, 4)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, -100], [-100, -100, -100, 4]])
    call = {
        "input_ids": ids, "labels": labels, "cache_position": torch.arange(3), "attention_mask": {"full": ids > 2},
        "position_ids": torch.arange(3 * 3 * 4).view(3, 3, 4), "other": torch.ones(1, 4), "use_cache": False,
    }  # fmt: skip
    cut_call = cut(model, model.forward, call, 2)
    assert cut_call.rows == [2, 1] and cut_call.shares == [1.0, 1.0] and cut_call.has_labels
    for part, rows in zip(cut_call.calls, (slice(0, 2), slice(2, 3)), strict=True):
        assert torch.equal(part["input_ids"], ids[rows]) and torch.equal(part["labels"], labels[rows])
        assert torch.equal(part["attention_mask"]["full"], ids[rows] > 2)
        assert torch.equal(part["position_ids"], call["position_ids"][:, rows])
        assert part["cache_position"] is call["cache_position"] and part["other"] is call["other"]
        assert part["num_items_in_batch"] == 4  # labels of a causal model are moved by one
    flat = {"input_ids": ids, "position_ids": torch.arange(3)}
    assert all(part["position_ids"] is flat["position_ids"] for part in cut(model, model.forward, flat, 3).calls)

    masked = build(config_for("bert"), meta=True)  # computes its mean itself
    shares = cut(masked, masked.forward, {"input_ids": ids, "labels": labels}, 3).shares
    assert [float(share) for share in shares] == [0.75, 0.0, 0.25]


def test_a_loss_of_another_kind_is_that_of_one_micro_batch() -> None:
    model = build(config_for("llama"), meta=True)
    model.loss_function = lambda logits, labels, **kwargs: logits.square().mean().sqrt()
    ids = torch.ones(4, 3, dtype=torch.long)
    with pytest.warns(UserWarning, match="LlamaForCausalLM is not known to be a mean over labels"):
        assert cut(model, model.forward, {"input_ids": ids, "labels": ids}, 4).rows == [4]


def test_layers_left_out_at_random_are_refused() -> None:
    model = build(config_for("opt", layerdrop=0.1), meta=True)
    with pytest.raises(PolicyError, match="leaves out layers at random"):
        find_stages(model, make_plan(model, policy_for("opt"), 1), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_microbatches": 0}, "pipeline_microbatches: expected a whole number >= 1, found 0"),
        ({"pipeline_schedule": "zero-bubble"}, "pipeline_schedule: expected one of auto, 1f1b, gpipe, found 'zero"),
        ({"pipeline_split": [8]}, r"pipeline_split: expected the layers of each of pp_size=2 stages, found \[8\]"),
        ({"pipeline_split": "even"}, "pipeline_split: expected auto or the layers of each stage"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(TPError, match=message):
        RunConfig.parse(1, options, "a file", pp_size=2)
    fine = RunConfig.parse("2", {"pipeline_microbatches": "auto", "pipeline_split": [3, 5]}, pp_size="2")
    assert fine.unit_size == 4 and fine.pipeline_split == (3, 5)
    again = fine.as_written()
    assert RunConfig.parse(again.tp_size, again.options, pp_size=again.pp_size) == fine
    with pytest.raises(TPError, match="pp_size: 2 together with ZeRO-3 is not supported"):
        fine.refuse_stages("ZeRO-3")


def test_the_first_place_with_the_key_counts() -> None:
    here, file = Written("the command line", None, None, "4"), Written("the file", 2, {"fuse": True}, 2)
    assert resolve(command_line=here, accelerate_yaml=file) == RunConfig(2, pp_size=4, fuse=True)
    assert resolve(environment=Written("the environment", None, None, "2")) == RunConfig(1, pp_size=2)
    with pytest.raises(TPError, match=r"pp_size is 4 in the command line, but 2 in ds\.json; write it in one place"):
        resolve(command_line=here, deepspeed=Written("ds.json", None, None, 2))
    with pytest.raises(TPError, match="pp_size: expected a whole number >= 1, found 'two' in the file"):
        resolve(accelerate_yaml=Written("the file", None, None, "two"))
    with pytest.raises(TPError, match=r"`fsdp_config.pp_size: 2` has no effect there"):
        accelerate_yaml.without_our_keys({"fsdp_config": {"pp_size": 2}})
