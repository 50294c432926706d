"""What a policy can say, and what it means for a model. Knows no architecture and no torch.distributed."""

from tp_plugin.policy.blocks import MLP, Attention, Block, Experts, Policy, Vocabulary
from tp_plugin.policy.config_check import check_config
from tp_plugin.policy.layout import ParamLayout, reshard
from tp_plugin.policy.plan import BlockPlan, Plan
from tp_plugin.policy.planner import make_plan
from tp_plugin.policy.registry import load, policies, policy_for, register
from tp_plugin.policy.split import Blocks, HeadSplit, PerGroup, PerHead, aligned, aligned_pairs, even, kv, q, whole

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "BlockPlan",
    "Blocks",
    "Experts",
    "HeadSplit",
    "ParamLayout",
    "PerGroup",
    "PerHead",
    "Plan",
    "Policy",
    "Vocabulary",
    "aligned",
    "aligned_pairs",
    "check_config",
    "even",
    "kv",
    "load",
    "make_plan",
    "policies",
    "policy_for",
    "q",
    "register",
    "reshard",
    "whole",
]
