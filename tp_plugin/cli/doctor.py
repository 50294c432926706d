"""``tp-plugin doctor``: what here, or in a config file, would keep ``tp_size`` from working, and what to do."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tp_plugin.config import accelerate_yaml, deepspeed
from tp_plugin.config.keys import ENV_DISABLE, ENV_TP_SIZE, TP_SIZE
from tp_plugin.config.resolve import resolve
from tp_plugin.config.run_config import RunConfig
from tp_plugin.config.written import Written
from tp_plugin.errors import TPError

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "trl")
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
VARIABLES = ("TP_PLUGIN_", "ACCELERATE_", "NCCL_", "GLOO_", "MASTER_", "CUDA_", "OMP_", "FSDP_", "TORCH", "HIP_", "ZE_")
"""Prefixes of environment variables that a bug report names."""


class Finding(NamedTuple):
    """One line: how it is, what was looked at, what was found, and what to do where that is not ok."""

    state: str
    what: str
    found: str
    advice: str = ""


def doctor(config: Path | None, report: Path | None, environ: Mapping[str, str]) -> int:
    """Print the findings; returns the exit status: 1 if one is a problem.

    Args:
        config: an Accelerate or DeepSpeed config file to look at.
        report: where to write them, with the environment, for a bug report.
        environ: the environment variables as the user has them.

    Raises:
        TPError: the config file cannot be read.
    """
    from rich.console import Console
    from rich.markup import escape

    findings = [*_versions(), *_ways_in(environ), *_launchers(), *_devices()]
    if config is not None:
        findings += _config(config, environ)
    console = Console(file=sys.stdout, highlight=False)
    for one in findings:
        colour = {OK: "green", NOTE: "yellow", PROBLEM: "red"}[one.state]
        console.print(f"[{colour}]{one.state:>7}[/{colour}]  {one.what}: {escape(one.found)}", soft_wrap=True)
        if one.advice:
            console.print(f"         → {escape(one.advice)}", soft_wrap=True)
    if report is not None:
        report.write_text("\n".join(_lines(findings, environ)) + "\n", encoding="utf-8")
        console.print(f"Written to {report}; it names no tokens, but look at it before you post it.", soft_wrap=True)
    return int(any(one.state == PROBLEM for one in findings))


def _lines(findings: list[Finding], environ: Mapping[str, str]) -> Iterator[str]:
    yield f"Python {platform.python_version()} on {platform.platform()}"
    for one in findings:
        yield f"{one.state}: {one.what}: {one.found}" + (f" -> {one.advice}" if one.advice else "")
    yield "environment:"
    for name in sorted(environ):
        if name.startswith(VARIABLES):
            yield f"  {name}={environ[name]}"


def _versions() -> Iterator[Finding]:
    """What is installed, against the versions that this package names (``ci/compat.py`` tests the ends)."""
    from packaging.requirements import Requirement

    yield Finding(OK, "tp-plugin", metadata.version("tp-plugin"))
    seen: set[str] = set()
    for text in metadata.requires("tp-plugin") or ():
        requirement = Requirement(text)
        optional = "extra" in str(requirement.marker or "")
        if requirement.name in seen or not requirement.specifier or "dev" in str(requirement.marker or ""):
            continue
        seen.add(requirement.name)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if not optional:
                yield Finding(
                    PROBLEM,
                    requirement.name,
                    "not installed",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                )
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(OK, requirement.name, version)
        else:
            advice = f"supported are {requirement.specifier}: pip install '{requirement.name}{requirement.specifier}'"
            yield Finding(PROBLEM, requirement.name, version, advice)


def _ways_in(environ: Mapping[str, str]) -> Iterator[Finding]:
    hooks = [point.name for point in metadata.entry_points(group="torch.backends")]
    if "tp_plugin" in hooks:
        yield Finding(OK, "hook in `import torch`", "installed")
    else:
        yield Finding(PROBLEM, "hook in `import torch`", "missing: every key is ignored", "pip install tp-plugin again")
    if environ.get(AUTOLOAD, "1") == "0":
        yield Finding(PROBLEM, AUTOLOAD, "0: torch runs no hooks, every key is ignored", f"unset {AUTOLOAD}")
    if environ.get(ENV_DISABLE, "") not in ("", "0"):
        yield Finding(PROBLEM, ENV_DISABLE, f"{environ[ENV_DISABLE]}: every key is ignored", f"unset {ENV_DISABLE}")
    if environ.get(ENV_TP_SIZE):
        yield Finding(
            NOTE, ENV_TP_SIZE, environ[ENV_TP_SIZE], "counts where no command line or Accelerate config says otherwise"
        )


def _launchers() -> Iterator[Finding]:
    here = Path(sys.executable).parent
    for name in LAUNCHERS:
        found = shutil.which(name) or (str(here / name) if (here / name).exists() else None)
        if found is None:
            continue
        if Path(found).parent.resolve() == here.resolve():
            yield Finding(OK, name, found)
        else:
            advice = f"it may start a Python without tp-plugin; call {here / name}, or activate that environment"
            yield Finding(NOTE, name, f"{found}, which is not beside {sys.executable}", advice)


def _devices() -> Iterator[Finding]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield Finding(
            NOTE, "devices", "none: runs take the CPU and gloo", "on a machine with GPUs: is this torch built for them?"
        )
        return
    count = torch.accelerator.device_count()
    module: Any = torch.get_device_module(accelerator)
    for index in range(count):
        properties = module.get_device_properties(index)
        memory = getattr(properties, "total_memory", 0) / 2**30
        yield Finding(OK, f"{accelerator.type}:{index}", f"{getattr(properties, 'name', '?')}, {memory:.0f} GiB")
    if accelerator.type != "cuda" or count < 2:
        return
    apart = [
        f"{a}-{b}" for a in range(count) for b in range(a + 1, count) if not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        advice = "tensor parallelism sends each layer's activations: keep a TP group to devices that are linked"
        yield Finding(NOTE, "links", f"no direct access between {', '.join(apart[:8])}", advice)
    else:
        yield Finding(OK, "links", f"all {count} devices reach each other's memory")


def _config(path: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether this file's key is seen, what it means, and what would stop the run."""
    try:
        text = path.read_text(encoding="utf-8")
        config = deepspeed.as_mapping(str(path)) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TPError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, Mapping):
        raise TPError(f"{path} is no mapping of keys: name an Accelerate config (YAML) or a DeepSpeed config (JSON)")
    is_deepspeed = path.suffix == ".json" and "compute_environment" not in config and "num_processes" not in config
    try:
        resolved = _resolved(config, path, is_deepspeed, environ)
    except TPError as error:
        yield Finding(PROBLEM, str(path), str(error))
        return
    if resolved.tp_size == 1:
        advice = f"write `{TP_SIZE}: 2` at its top level" + (f", or set {ENV_TP_SIZE}=2" if is_deepspeed else "")
        yield Finding(NOTE, str(path), f"no `{TP_SIZE}`: a run with it is left as it is", advice)
        return
    kind = "DeepSpeed" if is_deepspeed else "Accelerate"
    options = resolved.as_written().options
    yield Finding(OK, str(path), f"{kind} config, {TP_SIZE}: {resolved.tp_size}" + (f", {options}" if options else ""))
    if is_deepspeed:
        return
    yield from _processes(config, resolved.tp_size)


def _resolved(config: Mapping[str, Any], path: Path, is_deepspeed: bool, environ: Mapping[str, str]) -> RunConfig:
    from_environment = Written(f"the environment ({ENV_TP_SIZE})", environ.get(ENV_TP_SIZE) or None)
    if is_deepspeed:
        return resolve(environment=from_environment, deepspeed=deepspeed.read(config, str(path)))
    accelerate_yaml.without_our_keys(config)
    inner = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    found = deepspeed.as_mapping(inner) if inner else None
    return resolve(
        accelerate_yaml=accelerate_yaml.read(path),
        environment=from_environment,
        deepspeed=deepspeed.read(found, inner) if found is not None else None,
    )


def _processes(config: Mapping[str, Any], tp_size: int) -> Iterator[Finding]:
    import torch

    processes, machines = int(config.get("num_processes") or 1), int(config.get("num_machines") or 1)
    if processes % tp_size:
        advice = f"num_processes counts all, {TP_SIZE} x replicas: write {tp_size} or {2 * tp_size}"
        yield Finding(PROBLEM, "num_processes", f"{processes}, which {TP_SIZE}: {tp_size} does not divide", advice)
        return
    yield Finding(OK, "num_processes", f"{processes}: {tp_size} ranks hold one model, {processes // tp_size} replicas")
    here = processes // machines
    if machines > 1 and here % tp_size:
        advice = f"let {TP_SIZE} divide the {here} processes of a machine, unless the network is as fast as the links"
        yield Finding(NOTE, TP_SIZE, f"{tp_size}: groups span machines", advice)
    devices = torch.accelerator.device_count()
    if devices and not config.get("use_cpu") and here > devices:
        yield Finding(
            PROBLEM, "num_processes", f"{here} on this machine, which has {devices} devices", "one process a device"
        )
