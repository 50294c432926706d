"""What a config alone tells: which rank computes which heads, and whether a TP size is possible at all."""

from __future__ import annotations

from collections.abc import Collection

from tp_plugin.errors import PolicyError
from tp_plugin.policy.blocks import Attention, Count, Policy
from tp_plugin.policy.registry import policy_for
from tp_plugin.policy.split import HeadSplit


def check_config(config: object, policy: Policy, tp: int, leave_whole: Collection[str] = ()) -> None:
    """Raise PolicyError if the head counts in ``config`` forbid ``tp``; needs no model, so it runs before any load."""
    for block in policy.blocks:
        if isinstance(block, Attention):
            head_split(config, block, tp)
    for name in policy.towers.values():
        tower = getattr(config, name, None)
        if tower is None or tower.model_type in leave_whole:
            continue
        try:
            check_config(tower, policy_for(tower), tp, leave_whole)
        except PolicyError as error:
            raise PolicyError(f"{name} ({tower.model_type}): {error}") from error


def head_split(config: object, block: Attention, tp: int) -> HeadSplit:
    """Which heads each of ``tp`` ranks computes of ``block``.

    Raises:
        PolicyError: the config has no such count, or the counts do not divide.
    """
    q_heads = _number(config, block.heads)
    if not isinstance(q_heads, int):
        raise PolicyError(f"the config has no integer {block.heads!r}, which the policy reads the head count from")
    return HeadSplit.of(q_heads, _number(config, block.kv_heads) or q_heads, tp)


def _number(config: object, count: Count) -> int | None:
    return count(config) if callable(count) else getattr(config, count, None)
