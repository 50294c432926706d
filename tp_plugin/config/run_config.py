"""``RunConfig``: the plugin's settings for one run, validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tp_plugin.config.keys import PP_SIZE, TP_PLUGIN, TP_SIZE
from tp_plugin.config.misspelt import suggestion
from tp_plugin.config.written import Written
from tp_plugin.errors import TPError


@dataclass(frozen=True)
class RunConfig:
    """The plugin's settings.

    Attributes:
        tp_size: ranks per TP group; 1 means off.
        policy: ``module:NAME`` of a policy to use instead of the registered one.
        guard: compare batches and losses within the TP group at every that many forwards; 0 means never.
        audit_every: compare replicas across the TP group every that many training forwards; 0 means never.
        audit_tolerance: relative difference of replicas up to which the audit takes it for rounding.
        audit_repair: give all ranks of the TP group the first one's values where the audit finds a difference.
        leave_whole: model types (or class names) that stay whole on every rank, such as a teacher's.
        expert_parallel: distribute the experts of a mixture over the TP group, instead of splitting each of them.
        sequence_parallel: split the tokens over the TP group between the blocks.
        overlap: compute the gradients of weights while the gradient of their input is all-reduced over the TP group.
        fuse: compute linears that share an input, such as q, k and v, as one matrix product.
        save_timeout: seconds that other ranks wait for one that saves, since it last read a tensor or wrote a file.
        report: print what the run will do, and how long its first step took.
        report_memory: print predicted and measured memory of each rank, once, after the third optimizer step.
        fused_head: keep no logits: compute them block by block for the loss, and again for its gradient.
        dropout: ``exact``: the masks of one process, also on what is split over the TP group; ``sharded``: there each
            rank draws masks of its own.
        pp_size: pipeline stages per model; 1 means off.
        pipeline_microbatches: into how many a batch is cut; 0 (``auto``): four for each stage.
        pipeline_schedule: ``1f1b``: backwards run between forwards where the model computes its own loss;
            ``gpipe``: after all of them. ``auto`` is ``1f1b``.
        pipeline_split: layers of each stage; empty (``auto``): balanced by cost.
    """

    tp_size: int = 1
    policy: str | None = None
    guard: int = 1
    audit_every: int = 0
    audit_tolerance: float = 1e-5
    audit_repair: bool = False
    leave_whole: tuple[str, ...] = ()
    expert_parallel: bool = False
    sequence_parallel: bool = False
    overlap: bool = True
    fuse: bool = False
    save_timeout: float = 3600.0
    fused_head: bool = False
    report: bool = True
    report_memory: bool = False
    dropout: str = "exact"
    pp_size: int = 1
    pipeline_microbatches: int = 0
    pipeline_schedule: str = "auto"
    pipeline_split: tuple[int, ...] = ()

    @property
    def unit_size(self) -> int:
        """Ranks that hold one model; 1 means that the plugin is off."""
        return self.tp_size * self.pp_size

    @property
    def sizes(self) -> str:
        """Of the unit, as messages name them."""
        return f"tp_size={self.tp_size}" + (f" x pp_size={self.pp_size}" if self.pp_size > 1 else "")

    def refuse_stages(self, engine: str) -> None:
        """Raise TPError if there are pipeline stages, which ``engine`` does not train."""
        if self.pp_size > 1:
            raise TPError(
                f"{PP_SIZE}: {self.pp_size} together with {engine} is not supported by this version: a stage computes "
                "the micro-batches of a step without what gathers its weights; use ZeRO stage 1 or 2, FSDP2 or DDP "
                f"(distributed_type: MULTI_GPU or MULTI_CPU), or write {PP_SIZE}: 1"
            )

    @staticmethod
    def parse(tp_size: object = 1, options: object = None, origin: str = "", pp_size: object = 1) -> RunConfig:
        """Validate the values of the keys ``tp_size``, ``tp_plugin`` and ``pp_size``, found in ``origin``.

        Raises:
            TPError: naming the key, what was found and where, and what to write.
        """
        place = f" in {origin}" if origin else ""
        if not isinstance(options := {} if options is None else options, Mapping):
            raise TPError(
                f"{TP_PLUGIN}: expected a mapping such as `{TP_PLUGIN}: {{audit_every: 100}}`, found {options!r}{place}"
            )
        for key in options:
            if key == TP_SIZE:
                raise TPError(f"{TP_PLUGIN}: `{key}`{place} belongs beside `{TP_PLUGIN}`, not into it")
            if key not in _VALIDATORS:
                hint = suggestion(key, _VALIDATORS) or f"; the known keys are {', '.join(_VALIDATORS)}"
                raise TPError(f"{TP_PLUGIN}: unknown key {key!r}{place}{hint}")
        values = {
            key: _VALIDATORS[key](value, f"{TP_PLUGIN}.{key}", place)
            for key, value in options.items()
            if value is not None
        }
        pp_size = _whole_number(pp_size, PP_SIZE, place, least=1)
        split = values.get("pipeline_split", ())
        if split and len(split) != pp_size:
            raise TPError(
                f"{TP_PLUGIN}.pipeline_split: expected the layers of each of {PP_SIZE}={pp_size} stages, found "
                f"{list(split)}{place}"
            )
        return RunConfig(_whole_number(tp_size, TP_SIZE, place, least=1), pp_size=pp_size, **values)

    def as_written(self, origin: str = "the run's config") -> Written:
        """The keys from which :meth:`parse` makes this config again; defaults are left out of the mapping."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (TP_SIZE, PP_SIZE)}
        options = {k: v for k, v in values.items() if v != getattr(RunConfig, k)}
        return Written(origin, self.tp_size, options, self.pp_size if self.pp_size > 1 else None)


def _whole_number(value: object, key: str, place: str, least: int = 0) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TPError(
            f"{key}: expected a whole number >= {least}, found {value!r}{place}; write for example `{key}: 2`"
        )
    return value


def _how_often(value: object, key: str, place: str) -> int:
    if value is False:  # which YAML takes `off` for
        return 0
    words = {"always": 1, "off": 0}
    if isinstance(value, str) and value in words:
        return words[value]
    try:
        return _whole_number(value, key, place)
    except TPError:
        raise TPError(
            f"{key}: expected always, off or a whole number of forwards, found {value!r}{place}; write for example "
            f"`{key}: always`"
        ) from None


def _fraction(value: object, key: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise TPError(
            f"{key}: expected a number from 0 to below 1, found {value!r}{place}; write for example `{key}: 1e-5`"
        )
    return float(value)


def _seconds(value: object, key: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TPError(f"{key}: expected seconds, found {value!r}{place}; write for example `{key}: 3600`")
    return float(value)


def _switch(value: object, key: str, place: str) -> bool:
    if not isinstance(value, bool):
        raise TPError(f"{key}: expected true or false, found {value!r}{place}")
    return value


def _on_or_off(value: object, key: str, place: str) -> bool:
    words = {"on": True, "off": False, True: True, False: False}  # YAML takes `off` for false, JSON does not
    if not isinstance(value, str | bool) or value not in words:
        raise TPError(f"{key}: expected on or off, found {value!r}{place}")
    return words[value]


def _policy_name(value: object, key: str, place: str) -> str:
    if not isinstance(value, str):
        raise TPError(f"{key}: expected `module:NAME`, found {value!r}{place}")
    return value


def _microbatches(value: object, key: str, place: str) -> int:
    return 0 if value == "auto" else _whole_number(value, key, place, least=1)


def _one_of(*known: str) -> Callable[[object, str, str], str]:
    def validator(value: object, key: str, place: str) -> str:
        if value not in known:
            raise TPError(f"{key}: expected one of {', '.join(known)}, found {value!r}{place}")
        return str(value)

    return validator


def _split(value: object, key: str, place: str) -> tuple[int, ...]:
    if value == "auto":
        return ()
    if not isinstance(value, list | tuple) or not value:
        raise TPError(f"{key}: expected auto or the layers of each stage such as [8, 8], found {value!r}{place}")
    return tuple(_whole_number(layers, key, place, least=1) for layers in value)


def _model_types(value: object, key: str, place: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise TPError(f"{key}: expected a list of model types such as [bert], found {value!r}{place}")
    return tuple(value)


_VALIDATORS: dict[str, Callable[[object, str, str], Any]] = {
    "policy": _policy_name,
    "guard": _how_often,
    "audit_every": _whole_number,
    "audit_tolerance": _fraction,
    "audit_repair": _switch,
    "leave_whole": _model_types,
    "expert_parallel": _switch,
    "sequence_parallel": _switch,
    "overlap": _switch,
    "fuse": _switch,
    "save_timeout": _seconds,
    "fused_head": _switch,
    "pipeline_microbatches": _microbatches,
    "pipeline_schedule": _one_of("auto", "1f1b", "gpipe"),
    "pipeline_split": _split,
    "report": _on_or_off,
    "report_memory": _switch,
    "dropout": _one_of("exact", "sharded"),
}
"""Key in the ``tp_plugin`` mapping → what makes a field of ``RunConfig`` of its value, or refuses it."""
