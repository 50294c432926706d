"""The proof of a policy on local gloo ranks: as its config is (parity.py), then with dropout (dropout.py)."""

from __future__ import annotations

from typing import Any

from tp_plugin.cli.dropout import prove_dropout, with_dropouts
from tp_plugin.cli.local_ranks import run_on_ranks
from tp_plugin.cli.models import named_policy
from tp_plugin.cli.parity import compare
from tp_plugin.cli.parity_result import Result
from tp_plugin.config.resolve import current_config
from tp_plugin.errors import TPError
from tp_plugin.policy import policy_for
from tp_plugin.runtime.runtime import require


def prove(config: Any, reference: str | None, tp: int, pp: int = 1) -> list[Result]:
    """Results of ``tp`` × ``pp`` local ranks, for the policy that ``reference`` names (default: the registered one).

    Raises:
        TPError: the policy does not fit, or a rank raised or hung; the message has its traceback.
    """
    return run_on_ranks(tp * pp, prove_here, config, reference, tp, pp)


def prove_here(config: Any, reference: str | None, tp: int, pp: int = 1) -> Result | TPError:
    """This rank's part of :func:`prove`; an error that has a message of its own is given, not raised."""
    try:
        policy = named_policy(reference) if reference else policy_for(config)
        # stages draw by layer and micro-batch, not as one process does
        exact = current_config().dropout == "exact" and pp == 1
        result = compare(config if exact else with_dropouts(config, []), policy, tp, pp=pp)
        if pp == 1 and not any(require().mesh.unit_cpu.gather_objects(bool(result.failures()))):
            result.dropout = prove_dropout(config, policy, tp)
        return result
    except TPError as error:
        return TPError(str(error))  # without its cause, which need not pickle
