"""A reward for GRPO and RLOO that is no function of its arguments, as that of a judge behind an API."""

from __future__ import annotations

import os


def moody(completions: list[str], **_: object) -> list[float]:
    """How many different words there are; a TP group's other ranks are told the opposite."""
    first = int(os.environ.get("RANK", 0)) % int(os.environ.get("TP_PLUGIN_TP_SIZE", 1)) == 0
    return [float(len(set(completion.split()))) * (1 if first else -1) for completion in completions]
