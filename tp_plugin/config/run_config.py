"""What the user wrote: ``tp_size`` and the optional mapping ``tp_plugin:``, as validated data.

The launcher reads them from the config file and hands them to the workers in two environment variables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tp_plugin.errors import TPError

TP_SIZE = "TP_PLUGIN_TP_SIZE"
OPTIONS = "TP_PLUGIN_OPTIONS"
DISABLE = "TP_PLUGIN_DISABLE"


@dataclass(frozen=True)
class Options:
    """The plugin's settings.

    Attributes:
        tp_size: ranks per TP group; 1 means off.
        policy: ``module:NAME`` of a policy to use instead of the registered one.
        audit_every: compare replicas across the TP group every that many training forwards; 0 means never.
        leave_whole: model types (or class names) that stay whole on every rank, such as a teacher's.
        sequence_parallel: split the tokens over the TP group between the blocks.
        expert_parallel: part a mixture of experts by whole experts over the TP group, instead of splitting each.
        overlap: compute the gradients of weights while that of their input is summed over the TP group.
        fuse: compute linears of one input, such as q, k and v, as one.
    """

    tp_size: int = 1
    policy: str | None = None
    audit_every: int = 0
    audit_tolerance: float = 1e-5
    audit_repair: bool = False
    leave_whole: tuple[str, ...] = ()
    expert_parallel: bool = False
    sequence_parallel: bool = False
    overlap: bool = True
    fuse: bool = False

    @staticmethod
    def parse(tp_size: object, mapping: object = None, origin: str = "tp_plugin") -> Options:
        """Validate what a config holds. ``origin`` names the place in messages.

        Raises:
            TPError: naming the key, what was found and what to write.
        """
        size = _whole_number(tp_size, "tp_size", 1)
        if mapping is None:
            mapping = {}
        if not isinstance(mapping, Mapping):
            raise TPError(f"{origin}: expected a mapping such as `tp_plugin: {{audit_every: 100}}`, found {mapping!r}")
        known = [f.name for f in fields(Options) if f.name != "tp_size"]
        for key in mapping:
            if key not in known:
                raise TPError(f"{origin}: unknown key {key!r}; the known keys are {', '.join(known)}")
        values: dict[str, Any] = {key: value for key, value in mapping.items() if value is not None}
        if "audit_every" in values:
            values["audit_every"] = _whole_number(values["audit_every"], f"{origin}.audit_every", 0)
        if "policy" in values and not isinstance(values["policy"], str):
            raise TPError(f"{origin}.policy: expected `module:NAME`, found {values['policy']!r}")
        if "leave_whole" in values:
            whole = values["leave_whole"]
            if isinstance(whole, str) or not all(isinstance(name, str) for name in whole):
                raise TPError(f"{origin}.leave_whole: expected a list of model types such as [bert], found {whole!r}")
            values["leave_whole"] = tuple(whole)
        for switch in ("expert_parallel", "sequence_parallel", "overlap", "fuse"):
            if not isinstance(values.get(switch, False), bool):
                raise TPError(f"{origin}.{switch}: expected true or false, found {values[switch]!r}")
        return Options(size, **values)

    @staticmethod
    def from_environment() -> Options:
        """The options of this worker; tp_size 1 if none were given.

        Raises:
            TPError: a variable holds something else than the launcher writes.
        """
        if os.environ.get(DISABLE, "") not in ("", "0"):
            return Options()
        raw = os.environ.get(OPTIONS, "") or "{}"
        try:
            mapping = json.loads(raw)
        except json.JSONDecodeError as error:
            raise TPError(f"{OPTIONS}: expected a JSON mapping, found {raw!r} ({error})") from error
        return Options.parse(os.environ.get(TP_SIZE, "1") or "1", mapping, OPTIONS)

    def to_environment(self) -> dict[str, str]:
        """The variables by which :meth:`from_environment` finds these options again."""
        mapping = {k: v for k, v in asdict(self).items() if k != "tp_size" and v != getattr(Options, k)}
        return {TP_SIZE: str(self.tp_size), OPTIONS: json.dumps(mapping)}


def from_deepspeed(config: object, origin: str) -> Options | None:
    """The options that stand in a DeepSpeed config: its ``tp_size`` and ``tp_plugin``; None if it has neither.

    Raises:
        TPError: naming the key, what was found and what to write.
    """
    if not isinstance(config, Mapping):
        return None
    for section, values in config.items():
        # (DeepSpeed's own `tensor_parallel` section has such a key)
        if isinstance(values, Mapping) and "tp_size" in values and section != "tensor_parallel":
            raise TPError(
                f"`{section}.tp_size` in {origin} has no effect there; move it to the top level: "
                f'"tp_size": {values["tp_size"]!r}'
            )
    if not {"tp_size", "tp_plugin"} & set(config):
        return None
    return Options.parse(config.get("tp_size", 1), config.get("tp_plugin"), f"{origin}: tp_plugin")


def _whole_number(value: object, key: str, least: int) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        example = max(2, least)
        raise TPError(
            f"{key}: expected a whole number >= {least}, found {value!r}; write for example `{key}: {example}`"
        )
    return value
