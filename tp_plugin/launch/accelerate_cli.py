"""In the process of ``accelerate launch``: make the keys legal, check them before anything starts, tell the workers.

Patched: ``BaseConfig.process_config`` (does not see our keys), ``launch_command_parser`` (``--tp_size``) and
``_validate_launch_command`` (checks; CPU runs really start their processes).
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from tp_plugin.config import accelerate_yaml, command_line, deepspeed, environment
from tp_plugin.config.resolve import resolve
from tp_plugin.config.run_config import RunConfig
from tp_plugin.config.written import Written
from tp_plugin.engines.patching import patch, wrap
from tp_plugin.errors import TPError
from tp_plugin.launch.failures import install_in_launcher
from tp_plugin.launch.imports import after_import


def install(launch: Any) -> None:
    """Patch ``accelerate.commands.launch`` and the reader of its config file."""
    from accelerate.commands.config.config_args import BaseConfig

    process_config = BaseConfig.process_config

    def without_our_keys(config: dict[str, Any]) -> Any:
        try:
            return process_config(accelerate_yaml.without_our_keys(config))
        except TPError as error:
            _exit(error)

    patch(BaseConfig, "process_config", staticmethod(without_our_keys))
    wrap(launch, "launch_command_parser", _launch_command_parser)
    wrap(launch, "_validate_launch_command", _validate_launch_command)


def _launch_command_parser(original: Any, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = original(*args, **kwargs)
    command_line.add_options(parser)
    return parser


def _validate_launch_command(original: Any, args: Any) -> Any:
    result = original(args)
    if environment.is_disabled():
        return result
    try:
        args, config_file, _ = result
        places = _places(args, config_file)
        if all(place.is_empty for place in places.values()):
            return result
        config = resolve(**places)
        if config.unit_size > 1:
            _check(config, args)
            _start_cpu_processes(args)
            after_import("torch.distributed.launcher.api", install_in_launcher)
    except TPError as error:
        _exit(error)
    environment.publish(config.as_written())
    return result


def _places(args: argparse.Namespace, config_file: Any) -> dict[str, Written]:
    """Every place that a launch reads. ``config_file`` is what Accelerate made of its file, None if it read none."""
    from accelerate.commands.config import default_config_file

    places = {"command_line": command_line.read(args), "environment": environment.read()}
    if config_file is not None:
        places["accelerate_yaml"] = accelerate_yaml.read(args.config_file or default_config_file)
    if (inner := _deepspeed_config(args)) is not None:
        places["deepspeed"] = deepspeed.read(inner, args.deepspeed_config_file)
    return places


def _deepspeed_config(args: argparse.Namespace) -> dict[str, Any] | None:
    return deepspeed.as_mapping(getattr(args, "deepspeed_config_file", None))


def _check(config: RunConfig, args: argparse.Namespace) -> None:
    if config.policy:
        from tp_plugin.policy.registry import load

        load(config.policy)
    processes = args.num_processes or 1
    size, by = config.unit_size, "tp_size x pp_size" if config.pp_size > 1 else "tp_size"
    if processes % size:
        found = f"tp_size: {config.tp_size}" + (f" x pp_size: {config.pp_size}" if config.pp_size > 1 else "")
        raise TPError(
            f"{found} does not divide num_processes: {processes}; num_processes is the whole world, "
            f"{by} x data-parallel size: write for example num_processes: {size} or {2 * size}"
        )
    if getattr(args, "parallelism_config_tp_size", 1) not in (None, 1):
        raise TPError("`--tp_size` and `--parallelism_config_tp_size` are both set; keep `--tp_size`")
    if getattr(args, "use_megatron_lm", False):
        raise TPError(
            f"tp_size: {config.tp_size} together with Megatron-LM is not supported by this version; write "
            "distributed_type: MULTI_GPU, MULTI_CPU, FSDP or DEEPSPEED, or remove tp_size"
        )
    if getattr(args, "use_fsdp", False):
        from tp_plugin.engines.fsdp2.config import refuse as refuse_fsdp

        refuse_fsdp(vars(args), config.tp_size)
    if (inner := _deepspeed_config(args)) is not None:
        from tp_plugin.engines.deepspeed.config import refuse

        refuse(inner, config)


def _start_cpu_processes(args: Any) -> None:
    """Accelerate starts one process for MULTI_CPU; and with ``use_cpu`` its workers do not see each other."""
    if args.use_fsdp and (args.cpu or args.use_cpu):
        # Accelerate would switch FSDP off; the workers find no GPU, and take gloo
        os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="false")
        args.cpu = args.use_cpu = False
        args.gpu_ids = "all"
        return
    if args.use_deepspeed:
        if args.cpu or args.use_cpu:
            # Accelerate would switch DeepSpeed off; its own way to say CPU, with gloo, is this
            os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="false")
            args.cpu = args.use_cpu = False
            args.gpu_ids = "all"
        return
    if args.cpu or args.use_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if getattr(args, "mpirun_hostfile", None) is None and (args.num_processes or 1) > 1:
        args.cpu = False
        args.multi_gpu = True


def _exit(error: TPError) -> NoReturn:
    sys.exit(f"tp_plugin: {error}.")
