"""Which policy serves which architecture. This project's policies and anybody else's come the same way."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import entry_points

from tp_plugin.errors import PolicyError
from tp_plugin.policy.blocks import Policy
from tp_plugin.policy.hf_plan import policy_from_plan

ENTRY_POINTS = "tp_plugin.policies"

_registered: dict[str, Policy] = {}


def register(policy: Policy) -> Policy:
    """Make ``policy`` the one for its model types in this process; it goes before installed packages' policies."""
    for model_type in policy.model_types:
        _registered[model_type] = policy
    return policy


@lru_cache(maxsize=1)
def installed() -> dict[str, Policy]:
    """Policies of all installed packages, by model type.

    Raises:
        PolicyError: two packages claim one model type, or an entry point is no Policy.
    """
    found: dict[str, tuple[str, Policy]] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        for policy in _policies(entry.load(), f"entry point {entry.name} ({entry.value})"):
            for model_type in policy.model_types:
                if model_type in found:
                    raise PolicyError(
                        f"{model_type!r} is claimed by two entry points of {ENTRY_POINTS!r}: {found[model_type][0]} "
                        f"and {entry.value}; uninstall one package, or choose with `tp_plugin: {{policy: module:NAME}}`"
                    )
                found[model_type] = (entry.value, policy)
    return {model_type: policy for model_type, (_, policy) in found.items()}


def policies() -> dict[str, Policy]:
    """Every known policy by model type."""
    return {**installed(), **_registered}


def load(reference: str) -> Policy:
    """The policy named by ``module:NAME``."""
    module, _, name = reference.partition(":")
    if not name:
        raise PolicyError(f"policy: {reference!r} is no reference; write `module:NAME`, for example `mypkg.tp:POLICY`")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PolicyError(f"policy: {reference!r} cannot be loaded: {error}") from error
    (policy,) = _policies(target, reference)
    return policy


def policy_for(config: object) -> Policy:
    """The policy for a model's config: the registered one, else one from the config's own ``base_model_tp_plan``.

    Args:
        config: a transformers config, or a model type as a string.

    Raises:
        PolicyError: there is none; the message says what to write.
    """
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    known = policies()
    if model_type not in known:
        imported = policy_from_plan(config)
        if imported is not None:
            return imported
        raise PolicyError(
            f"no tensor-parallel policy for model type {model_type!r} (`tp-plugin policies` lists the {len(known)} "
            f"that there are). Write one (docs, 'Add an architecture'): "
            f"`tp_plugin.register(tp_plugin.Policy(model_types=({model_type!r},), blocks=(…), replicated=(…)))`, or "
            f"name it in the config: `tp_plugin: {{policy: module:NAME}}`. If this model is not the one to be trained, "
            f"leave it whole: `tp_plugin: {{leave_whole: [{model_type}]}}`."
        )
    return known[model_type]


def _policies(target: object, origin: str) -> tuple[Policy, ...]:
    found = (target,) if isinstance(target, Policy) else tuple(target) if isinstance(target, Iterable) else ()
    if not found or not all(isinstance(policy, Policy) for policy in found):
        raise PolicyError(f"{origin} must be a tp_plugin.Policy or a tuple of them, found {target!r}")
    return found
